//! Secrets and settings that change at run time: the admin token, token files, SIGHUP.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::rig::{
    LogEvent, Parapet, TokenKind, Unleash, UnleashVersion, build_hanging_disk_library, http,
    secret_leak_check, send_json, wait_until,
};

const FLAGS: &str = r#"{"version":2,"features":[
    {"name":"first","project":"default","enabled":true,"strategies":[{"name":"default"}]}]}"#;

/// Many times every interval of these instances.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Unleash accepts a deleted token for up to a minute.
const UNLEASH_REVOCATION_TIMEOUT: Duration = Duration::from_secs(100);

const ADMIN_TOKEN_REFUSED_LINE: LogEvent = LogEvent::warn("upstream::admin_token");
const ADMIN_TOKEN_ACCEPTED: LogEvent = LogEvent::info("upstream::admin_token");
const ADMIN_TOKEN_REPLACED: LogEvent = LogEvent::info("app::admin_token_watcher");
const ADMIN_TOKEN_UNREADABLE: LogEvent = LogEvent::warn("app::admin_token_watcher").with("error");
const SAVING_FAILED: LogEvent = LogEvent::warn("background_writer");

const ADMIN_TOKEN_REFUSED: &str = "parapet_upstream_admin_token_refused";

/// A secret as Kubernetes mounts it: `token` is a link through `..data`, which is replaced as a whole.
struct MountedSecret {
    folder: TempDir,
    version: u32,
}

impl MountedSecret {
    fn new(text: &str) -> Self {
        let mut secret = Self { folder: tempfile::tempdir().unwrap(), version: 0 };
        secret.replace(text);
        symlink("..data/token", secret.path()).unwrap();
        secret
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("token")
    }

    fn replace(&mut self, text: &str) {
        self.version += 1;
        let name = format!("..{}", self.version);
        fs::create_dir(self.folder.path().join(&name)).unwrap();
        fs::write(self.folder.path().join(&name).join("token"), text).unwrap();
        let link = self.folder.path().join("..data_tmp");
        symlink(&name, &link).unwrap();
        fs::rename(link, self.folder.path().join("..data")).unwrap();
    }
}

async fn wait_for_features_status(parapet: &Parapet, token: &str, expect: StatusCode) {
    wait_until(&format!("a token gets {expect}"), TIMEOUT, async || {
        (parapet.features_status(token).await == expect).then_some(())
    })
    .await;
}

async fn wait_for_status_page(parapet: &Parapet, token: &str, expect: StatusCode, limit: Duration) {
    wait_until(&format!("an admin token gets {expect}"), limit, async || {
        (parapet.admin_get_as("/status", token).await.0 == expect).then_some(())
    })
    .await;
}

/// The environments of the edge's own tokens, with their masked secrets from the list.
async fn own_tokens(unleash: &Unleash, fleet: &str) -> Vec<(String, String)> {
    let text = |token: &Value, field: &str| token[field].as_str().unwrap().to_owned();
    let tokens = unleash.tokens_named(&format!("parapet-{fleet}")).await;
    let mut tokens: Vec<_> =
        tokens.iter().map(|it| (text(it, "environment"), text(it, "secret"))).collect();
    tokens.sort();
    tokens
}

async fn admin_token_is_replaced(
    version: UnleashVersion,
    second: &'static str,
    other: &'static str,
) {
    const FLEET: &str = "rotation";
    let unleash = Unleash::start(version).await;
    let first = unleash.admin_token();
    unleash.admin_post("/api/admin/environments/production/off", &json!({})).await;
    let mut secret = MountedSecret::new(&format!("{first}\n"));
    let edge = Parapet::edge(&unleash.url()).env("UPSTREAM_ADMIN_TOKEN_FILE", secret.path());
    let parapet = edge.flag("--fleet-name", FLEET).with_short_intervals().start().await;
    let sdk = unleash.create_token(TokenKind::Backend, "development", &["*"], "sdk").await;
    wait_for_features_status(&parapet, &sdk, StatusCode::OK).await;
    let (status, shown) = parapet.admin_get_as("/status", first).await;
    assert_eq!(
        (status, &shown["upstream"]["adminToken"]["refusedSince"]),
        (StatusCode::OK, &Value::Null)
    );
    assert_eq!(parapet.metric(ADMIN_TOKEN_REFUSED).await, Some(0.0));
    let minted = own_tokens(&unleash, FLEET).await;
    unleash.register_tokens_named(&format!("parapet-{FLEET}")).await;

    unleash.insert_admin_token(other).await;
    unleash.delete_admin_token(other).await;
    wait_for_status_page(&parapet, first, StatusCode::UNAUTHORIZED, UNLEASH_REVOCATION_TIMEOUT)
        .await;
    assert_eq!(parapet.metric(ADMIN_TOKEN_REFUSED).await, Some(1.0));
    parapet.wait_until_logged(ADMIN_TOKEN_REFUSED_LINE).await;
    // Flags stay served.
    assert_eq!(parapet.features_status(&sdk).await, StatusCode::OK);
    assert!(parapet.is_ready().await);
    // Another valid admin token of upstream opens the admin listener.
    wait_for_status_page(&parapet, other, StatusCode::OK, TIMEOUT).await;
    let (_, shown) = parapet.admin_get_as("/status", other).await;
    assert!(shown["upstream"]["adminToken"]["refusedSince"].is_string(), "{shown}");

    unleash.insert_admin_token(second).await;
    secret.replace(&format!("\u{feff}{second}\n"));
    wait_for_status_page(&parapet, second, StatusCode::OK, UNLEASH_REVOCATION_TIMEOUT).await;
    parapet.wait_until_logged_times(ADMIN_TOKEN_ACCEPTED, 2).await;
    assert_eq!(parapet.metric(ADMIN_TOKEN_REFUSED).await, Some(0.0));
    let (_, shown) = parapet.admin_get_as("/status", second).await;
    assert_eq!(shown["upstream"]["adminToken"]["refusedSince"], Value::Null, "{shown}");
    assert_eq!(parapet.admin_get_as("/status", first).await.0, StatusCode::UNAUTHORIZED);

    // The edge reads the token list: a deleted token is soon rejected, although Unleash still validates
    // it for a while.
    let readings = "parapet_upstream_requests_total{purpose=\"list_tokens\",outcome=\"ok\"}";
    let before = parapet.metric(readings).await.unwrap();
    let revoked = unleash.create_token(TokenKind::Backend, "development", &["*"], "revoked").await;
    wait_for_features_status(&parapet, &revoked, StatusCode::OK).await;
    wait_until("the list is read", TIMEOUT, async || {
        (parapet.metric(readings).await.unwrap() > before).then_some(())
    })
    .await;
    unleash.delete_token(&revoked).await;
    wait_for_features_status(&parapet, &revoked, StatusCode::UNAUTHORIZED).await;

    // It finds new environments and creates tokens for them.
    unleash.admin_post("/api/admin/environments/production/on", &json!({})).await;
    parapet.send_sighup();
    let there = unleash.create_token(TokenKind::Backend, "production", &["*"], "there").await;
    wait_until("a new environment is served", UNLEASH_REVOCATION_TIMEOUT, async || {
        (parapet.features_status(&there).await == StatusCode::OK).then_some(())
    })
    .await;
    let now = own_tokens(&unleash, FLEET).await;
    assert_eq!(now.len(), 2, "{now:?}");
    assert!(minted.iter().all(|token| now.contains(token)), "{minted:?} {now:?}");

    // Credentials that were stored under the first admin token are readable with the second.
    unleash.register_tokens_named(&format!("parapet-{FLEET}")).await;
    assert!(parapet.terminate().await.success());
    parapet.restart();
    parapet.wait_until_ready().await;
    assert_eq!(parapet.features_status(&sdk).await, StatusCode::OK);
    assert_eq!(own_tokens(&unleash, FLEET).await, now);
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn replaced_admin_token_is_used_without_restart() {
    tokio::join!(
        admin_token_is_replaced(
            UnleashVersion::V8,
            "*:*.parapet-rig-second-admin-51c1f0a54f934c3f8c8a0e7c5d2b6a90",
            "*:*.parapet-rig-other-admin-0b7a52f3e86d4b0b9a52c6c9b1d34e77",
        ),
        admin_token_is_replaced(
            UnleashVersion::V8SecureTokens,
            "*:*.parapet-rig-second-admin-7d0a6c8e23fb45d99be1a4c3f7052d18",
            "*:*.parapet-rig-other-admin-e4f9b1c7a60d48a2b35d8f7e9c2a1064",
        ),
    );
}

/// A standalone as upstream, with these admin tokens; its secrets are in files.
async fn standalone(folder: &Path, tokens: &[&str]) -> Parapet {
    for token in tokens {
        secret_leak_check::register(token);
    }
    let flags = folder.join("flags.json");
    fs::write(&flags, FLAGS).unwrap();
    let (admins, password) = (folder.join("admin-tokens"), folder.join("password"));
    fs::write(&admins, tokens.join("\n")).unwrap();
    fs::write(&password, "a password of the owner\n").unwrap();
    Parapet::mode("standalone")
        .flag("--flags", flags)
        .env("INIT_ADMIN_API_TOKENS_FILE", admins)
        .env("UNLEASH_DEFAULT_ADMIN_PASSWORD_FILE", password)
        .start()
        .await
}

async fn create_backend_token(server: &Parapet, admin: &str, name: &str) -> String {
    create_token(server, admin, name, "backend").await
}

async fn create_token(server: &Parapet, admin: &str, name: &str, kind: &str) -> String {
    let new_token =
        json!({ "tokenName": name, "type": kind, "environment": "development", "projects": ["*"] });
    let (status, made) =
        server.admin_request(Method::POST, "/api/admin/api-tokens", admin, &new_token).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let secret = made["secret"].as_str().unwrap().to_owned();
    secret_leak_check::register(&secret);
    secret
}

#[tokio::test]
async fn sighup_rereads_the_admin_token_file_from_the_environment() {
    const FIRST: &str = "*:*.first-admin-of-a-reload-0123456789abcdef";
    const SECOND: &str = "*:*.second-admin-of-a-reload-0123456789abcde";
    let folder = tempfile::tempdir().unwrap();
    let upstream = standalone(folder.path(), &[FIRST, SECOND]).await;
    let file = folder.path().join("parapet.toml");
    fs::write(&file, format!("upstream_admin_token = \"{FIRST}\"\n")).unwrap();
    let edge = Parapet::edge(&upstream.admin_url()).flag("--config", &file);
    // Intervals are too long to explain what this test sees.
    let edge = edge.flag("--token-list-interval-seconds", "3600").start().await;
    assert_eq!(edge.admin_get_as("/status", FIRST).await.0, StatusCode::OK);
    fs::write(&file, format!("upstream_admin_token = \"{SECOND}\"\nmax_streams = 77\n")).unwrap();
    edge.send_sighup();
    wait_for_status_page(&edge, SECOND, StatusCode::OK, TIMEOUT).await;
    let line = edge.wait_until_logged(LogEvent::RELOADED).await;
    assert!(line.contains("upstream-admin-token"), "{line}");
    assert!(line.contains("max-streams"), "it names what needs a restart: {line}");
}

/// The event stream URL that `edge` offers to a provider.
async fn event_stream(edge: &Parapet, token: &str) -> String {
    wait_until("an event stream is offered", TIMEOUT, async || {
        let request = http().post(edge.url() + "/ofrep/v1/evaluate/flags");
        let request =
            request.header("Authorization", token).header("Content-Type", "application/json");
        let response = request.body(r#"{"context":{"targetingKey":"7"}}"#).send().await.unwrap();
        let response: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
        response["eventStreams"][0]["endpoint"]["requestUri"].as_str().map(str::to_owned)
    })
    .await
}

#[tokio::test]
async fn stream_tokens_signed_with_a_reloaded_secret_outlive_the_admin_token() {
    const FIRST: &str = "*:*.first-admin-of-tickets-0123456789abcdef012";
    const SECOND: &str = "*:*.second-admin-of-tickets-0123456789abcdef01";
    const SECRET: &str = "ofrep_ticket_secret = \"a secret that a fleet shares\"\n";
    let folder = tempfile::tempdir().unwrap();
    let upstream = standalone(folder.path(), &[FIRST, SECOND]).await;
    let token = create_token(&upstream, FIRST, "web", "frontend").await;
    let configs = ["one.toml", "other.toml"].map(|name| folder.path().join(name));
    let admin = |token| format!("upstream_admin_token = \"{token}\"\n");
    fs::write(&configs[0], admin(FIRST)).unwrap();
    fs::write(&configs[1], admin(FIRST) + SECRET).unwrap();
    let edge = |config| Parapet::edge(&upstream.admin_url()).flag("--config", config).start();
    let (one, other) = tokio::join!(edge(&configs[0]), edge(&configs[1]));
    event_stream(&other, &token).await;
    let opens = async || {
        let address = other.url() + &event_stream(&one, &token).await;
        http().get(address).send().await.unwrap().status()
    };
    assert_eq!(opens().await, StatusCode::UNAUTHORIZED);
    fs::write(&configs[0], admin(FIRST) + SECRET).unwrap();
    one.send_sighup();
    let line = one.wait_until_logged(LogEvent::RELOADED).await;
    assert!(line.contains("ofrep-ticket-secret"), "{line}");
    assert_eq!(opens().await, StatusCode::OK);
    fs::write(&configs[0], admin(SECOND) + SECRET).unwrap();
    one.send_sighup();
    wait_for_status_page(&one, SECOND, StatusCode::OK, TIMEOUT).await;
    one.wait_until_logged_times(ADMIN_TOKEN_ACCEPTED, 2).await;
    assert_eq!(opens().await, StatusCode::OK);
}

#[tokio::test]
async fn admin_token_file_without_token_is_ignored_and_reported() {
    const FIRST: &str = "*:*.first-admin-in-a-file-0123456789abcdef012";
    const SECOND: &str = "*:*.second-admin-in-a-file-0123456789abcdef01";
    let folder = tempfile::tempdir().unwrap();
    let upstream = standalone(folder.path(), &[FIRST, SECOND]).await;
    let mut secret = MountedSecret::new(FIRST);
    let edge = Parapet::edge(&upstream.admin_url()).env("UPSTREAM_ADMIN_TOKEN_FILE", secret.path());
    let edge = edge.with_short_intervals().start().await;
    let sdk = create_backend_token(&upstream, FIRST, "sdk").await;
    for (text, count) in [("\n", 1), ("*:development.x", 2)] {
        secret.replace(text);
        edge.wait_until_logged_times(ADMIN_TOKEN_UNREADABLE, count).await;
        assert_eq!(edge.admin_get_as("/status", FIRST).await.0, StatusCode::OK);
        assert_eq!(edge.features_status(&sdk).await, StatusCode::OK);
    }
    fs::remove_file(secret.path()).unwrap();
    edge.wait_until_logged_times(ADMIN_TOKEN_UNREADABLE, 3).await;
    secret.replace(SECOND);
    symlink("..data/token", secret.path()).unwrap();
    edge.wait_until_logged(ADMIN_TOKEN_REPLACED).await;
    wait_for_status_page(&edge, SECOND, StatusCode::OK, TIMEOUT).await;
    let (_, shown) = edge.admin_get_as("/status", SECOND).await;
    assert_eq!(shown["upstream"]["adminToken"]["refusedSince"], Value::Null, "{shown}");
}

#[tokio::test]
async fn rejected_admin_token_opens_nothing_while_the_disk_hangs() {
    const FIRST: &str = "*:*.first-admin-of-a-disk-that-hangs-0123456789";
    const WRONG: &str = "*:*.wrong-admin-of-a-disk-that-hangs-0123456789";
    secret_leak_check::register(WRONG);
    let folder = tempfile::tempdir().unwrap();
    let upstream = standalone(folder.path(), &[FIRST]).await;
    let mut secret = MountedSecret::new(FIRST);
    let marker = folder.path().join("hangs");
    let edge = Parapet::edge(&upstream.admin_url()).env("UPSTREAM_ADMIN_TOKEN_FILE", secret.path());
    let edge =
        edge.env("HANG", &marker).env("LD_PRELOAD", build_hanging_disk_library(folder.path()));
    let edge = edge.with_short_intervals().start().await;
    fs::write(&marker, "").unwrap();
    secret.replace(WRONG);
    edge.wait_until_logged(ADMIN_TOKEN_REPLACED).await;
    edge.wait_until_logged(ADMIN_TOKEN_REFUSED_LINE).await;
    wait_for_status_page(&edge, WRONG, StatusCode::UNAUTHORIZED, TIMEOUT).await;
    assert!(edge.logged(SAVING_FAILED).is_empty(), "{}", edge.log());
    edge.wait_until_logged(SAVING_FAILED).await;
}

#[tokio::test]
async fn sighup_replaces_the_tokens_that_fetch_flags() {
    const ADMIN: &str = "*:*.admin-of-a-reload-of-tokens-0123456789ab";
    let folder = tempfile::tempdir().unwrap();
    let upstream = standalone(folder.path(), &[ADMIN]).await;
    let first = create_backend_token(&upstream, ADMIN, "first").await;
    let second = create_backend_token(&upstream, ADMIN, "second").await;
    let file = folder.path().join("tokens");
    fs::write(&file, format!("{first}\n")).unwrap();
    let edge = Parapet::edge(&upstream.admin_url()).env("TOKENS_FILE", &file);
    let edge = edge.with_short_intervals().start().await;
    fs::write(&file, format!("{second}\r\n")).unwrap();
    edge.send_sighup();
    edge.wait_until_logged(LogEvent::RELOADED).await;
    // The first one is now like any other token that SDKs present.
    wait_for_features_status(&edge, &first, StatusCode::OK).await;
    // Upstream no longer accepts it; the second one continues to fetch.
    let (_, listed) = upstream.admin_get_as("/api/admin/api-tokens/first", ADMIN).await;
    let id = listed["tokens"][0]["secret"].as_str().unwrap();
    let path = format!("/api/admin/api-tokens/{id}");
    let (status, body) = upstream.admin_request(Method::DELETE, &path, ADMIN, &Value::Null).await;
    assert!(status.is_success(), "{body}");
    fs::write(folder.path().join("flags.json"), FLAGS.replace("first", "renamed")).unwrap();
    wait_until("the edge serves what has changed since", TIMEOUT, async || {
        let (_, flags) = edge.get("/api/client/features", &second).await;
        (flags["features"][0]["name"] == "renamed").then_some(())
    })
    .await;
    let tokens = create_backend_token(&upstream, ADMIN, "third").await;
    wait_for_features_status(&edge, &tokens, StatusCode::OK).await;
}

#[tokio::test]
async fn sighup_replaces_offline_tokens_and_ignores_invalid_configuration() {
    const FIRST: &str = "*:development.first-of-an-offline-reload-0123456789";
    const SECOND: &str = "*:development.second-of-an-offline-reload-012345678";
    const ELSEWHERE: &str = "*:elsewhere.third-of-an-offline-reload-0123456789ab";
    for token in [FIRST, SECOND, ELSEWHERE] {
        secret_leak_check::register(token);
    }
    let folder = tempfile::tempdir().unwrap();
    let (flags, tokens) = (folder.path().join("flags.json"), folder.path().join("tokens"));
    let config = folder.path().join("parapet.toml");
    fs::write(&flags, FLAGS).unwrap();
    fs::write(&tokens, format!("{FIRST}\n")).unwrap();
    fs::write(&config, "log = \"info\"\n").unwrap();
    let parapet = Parapet::mode("offline")
        .flag("--bootstrap-file", &flags)
        .flag("--config", &config)
        .env("CLIENT_TOKENS_FILE", &tokens)
        .start()
        .await;
    assert_eq!(parapet.features_status(FIRST).await, StatusCode::OK);
    assert_eq!(parapet.features_status(SECOND).await, StatusCode::UNAUTHORIZED);

    fs::write(&tokens, format!("\u{feff}{SECOND},\n  {ELSEWHERE}\n\n")).unwrap();
    parapet.send_sighup();
    wait_for_features_status(&parapet, SECOND, StatusCode::OK).await;
    wait_for_features_status(&parapet, ELSEWHERE, StatusCode::OK).await;
    assert_eq!(parapet.features_status(FIRST).await, StatusCode::UNAUTHORIZED);
    parapet.wait_until_logged(LogEvent::RELOADED).await;

    fs::write(&config, "log = \"loud\"\nmax_stream = 1\n").unwrap();
    fs::write(&tokens, FIRST).unwrap();
    parapet.send_sighup();
    let line = parapet.wait_until_logged(LogEvent::error("app::reload")).await;
    assert!(line.contains("max_stream") && line.contains("parapet.toml:1"), "{line}");
    assert_eq!(parapet.features_status(SECOND).await, StatusCode::OK);
    assert_eq!(parapet.features_status(FIRST).await, StatusCode::UNAUTHORIZED);

    fs::write(&config, "log = \"info,parapet=debug\"\n").unwrap();
    fs::write(&tokens, format!("{SECOND}\n{ELSEWHERE}\n")).unwrap();
    parapet.send_sighup();
    parapet.wait_until_logged_times(LogEvent::RELOADED, 2).await;
    parapet.send_sighup();
    parapet.wait_until_logged_times(LogEvent::RELOADED, 3).await;
    assert!(parapet.is_ready().await);
    assert!(parapet.terminate().await.success());
}

#[tokio::test]
async fn offline_is_ready_once_sighup_loads_its_first_tokens() {
    const TOKEN: &str = "*:development.only-one-of-an-offline-reload-0123456789";
    secret_leak_check::register(TOKEN);
    let folder = tempfile::tempdir().unwrap();
    let (flags, config) = (folder.path().join("flags.json"), folder.path().join("parapet.toml"));
    fs::write(&flags, FLAGS).unwrap();
    fs::write(&config, "").unwrap();
    let setup = Parapet::mode("offline").flag("--bootstrap-file", &flags);
    let parapet = setup.flag("--config", &config).start_listening().await;
    assert!(!parapet.is_ready().await);
    fs::write(&config, format!("client_tokens = [\"{TOKEN}\"]\n")).unwrap();
    parapet.send_sighup();
    wait_for_features_status(&parapet, TOKEN, StatusCode::OK).await;
    parapet.wait_until_ready().await;
}

#[tokio::test]
async fn sighup_rereads_flags_of_a_standalone_and_closes_nothing() {
    const ADMIN: &str = "*:*.admin-of-a-standalone-reload-0123456789a";
    let folder = tempfile::tempdir().unwrap();
    let parapet = standalone(folder.path(), &[ADMIN]).await;
    let account = json!({ "username": "admin", "password": "a password of the owner" });
    let sign_in = http().post(parapet.admin_url() + "/auth/simple/login");
    assert_eq!(send_json(sign_in, &account).await.0, StatusCode::OK);
    let flags = folder.path().join("flags.json");
    let token = create_backend_token(&parapet, ADMIN, "one").await;
    fs::write(&flags, "{").unwrap();
    parapet.send_sighup();
    parapet.wait_until_logged(LogEvent::RELOADED).await;
    fs::write(&flags, FLAGS.replace("first", "second")).unwrap();
    parapet.send_sighup();
    wait_until("the flags are read", TIMEOUT, async || {
        let (_, flags) = parapet.get("/api/client/features", &token).await;
        (flags["features"][0]["name"] == "second").then_some(())
    })
    .await;
    assert!(parapet.terminate().await.success());
}
