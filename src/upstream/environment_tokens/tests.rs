//! Tokens from a scripted admin API, and offered ones.

use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    store::{FileStore, MemoryStore},
    upstream::{
        scripted_server::{ReceivedRequest, ScriptedReply, ScriptedServer},
        token_set::MAX_REDUNDANT_TOKENS,
    },
};

const ADMIN: &str = "*:*.964a287e1b728cb5f4f3e012";

fn token(text: &str) -> Token {
    Token::parse(text).expect("token")
}

fn dev() -> Environment {
    Environment::new("development")
}

/// The format of the secrets that the server issues.
#[derive(Clone, Copy)]
enum SecretFormat {
    V1,
    V2,
}

/// An in-memory fake of the token endpoints of Unleash's admin API.
#[derive(Clone)]
struct FakeAdminApi {
    secrets: SecretFormat,
    tokens: Arc<Mutex<Vec<Value>>>,
    created: Arc<AtomicUsize>,
}

impl FakeAdminApi {
    async fn start(secrets: SecretFormat) -> (Self, ScriptedServer) {
        let admin = Self { secrets, tokens: Arc::default(), created: Arc::default() };
        let script = admin.clone();
        (admin, ScriptedServer::start(move |request| script.respond(request)).await)
    }

    fn respond(&self, request: &ReceivedRequest) -> ScriptedReply {
        let mut tokens = self.tokens.lock().expect("tokens");
        let (method, path) = request.line.split_once(' ').expect("a request line");
        let last = path.rsplit('/').next().expect("a path");
        if request.headers["authorization"] != ADMIN {
            return (401, &[], String::new());
        }
        match method {
            "GET" => (200, &[], json!({ "tokens": *tokens }).to_string()),
            "POST" => {
                let mut made: Value = serde_json::from_str(&request.body).expect("json");
                let (secret, listed) = self.secret(made["environment"].as_str().expect("name"));
                made["secret"] = listed.into();
                made["createdAt"] = jiff::Timestamp::now().to_string().into();
                tokens.push(made);
                (201, &[], json!({ "secret": secret }).to_string())
            }
            "DELETE" => {
                tokens.retain(|it| it["secret"] != last);
                (200, &[], String::new())
            }
            _ => (405, &[], String::new()),
        }
    }

    /// A new secret and what listings show of it.
    fn secret(&self, environment: &str) -> (String, String) {
        let number = self.created.fetch_add(1, Ordering::Relaxed);
        match self.secrets {
            SecretFormat::V1 => {
                let secret = format!("*:{environment}.{number:056x}");
                (secret.clone(), secret)
            }
            SecretFormat::V2 => {
                let selector = format!("{number:022}");
                (format!("*:{environment}.v2_{selector}_{number:043}"), selector)
            }
        }
    }

    fn listed_secrets(&self) -> Vec<String> {
        let tokens = self.tokens.lock().expect("tokens");
        tokens.iter().map(|it| it["secret"].as_str().expect("secret").to_owned()).collect()
    }
}

fn edge(server: &ScriptedServer, writer: &BackgroundWriter) -> EnvironmentTokens {
    edge_of(ADMIN, server, writer)
}

fn edge_of(admin: &str, server: &ScriptedServer, writer: &BackgroundWriter) -> EnvironmentTokens {
    let upstream = Upstream::new(server.config()).expect("client");
    let admin = AdminToken::new(token(admin), None);
    EnvironmentTokens::with_admin(admin, "main", upstream, writer.clone())
}

fn memory_writer() -> BackgroundWriter {
    BackgroundWriter::new(Arc::new(MemoryStore::default()))
}

/// Saves pending records, as at shutdown.
async fn save_pending(writer: &BackgroundWriter) {
    let stop = CancellationToken::new();
    stop.cancel();
    writer.run(&stop).await;
}

async fn obtain_one(edge: &EnvironmentTokens) -> Token {
    let credentials = edge.obtain(&dev()).await.expect("a token");
    let [credential] = credentials.as_slice() else { panic!("{credentials:?}") };
    assert_eq!(edge.usage_token(&dev()).as_ref(), Some(&credential.token));
    credential.token.clone()
}

#[tokio::test]
async fn concurrent_callers_share_one_created_token_per_environment() {
    let (admin, server) = FakeAdminApi::start(SecretFormat::V1).await;
    let edge = edge(&server, &memory_writer());
    let (one, two, other) = tokio::join!(obtain_one(&edge), obtain_one(&edge), async {
        edge.obtain(&Environment::new("production")).await.expect("a token")
    });
    assert_eq!(one, two);
    assert_eq!(other[0].token.environment(), Some(Environment::new("production")));
    assert_eq!(admin.listed_secrets().len(), 2);
    let create = server.received_requests().into_iter().find(|it| it.line.starts_with("POST"));
    let body: Value = serde_json::from_str(&create.expect("a request").body).expect("json");
    assert_eq!((&body["tokenName"], &body["type"]), (&json!("parapet-main"), &json!("backend")));
}

#[tokio::test]
async fn edges_of_a_fleet_share_a_v1_token() {
    let (admin, server) = FakeAdminApi::start(SecretFormat::V1).await;
    let first = obtain_one(&edge(&server, &memory_writer())).await;
    let second = obtain_one(&edge(&server, &memory_writer())).await;
    assert_eq!(first, second);
    assert_eq!(admin.listed_secrets().len(), 1);
}

#[tokio::test]
async fn restart_needs_no_upstream_and_store_contains_no_secret() {
    let (_, server) = FakeAdminApi::start(SecretFormat::V2).await;
    let folder = tempfile::tempdir().expect("folder");
    let writer = BackgroundWriter::new(Arc::new(FileStore::open(folder.path()).expect("store")));
    let made = obtain_one(&edge(&server, &writer)).await;
    save_pending(&writer).await;
    let calls = server.received_requests().len();
    assert_eq!(obtain_one(&edge(&server, &writer)).await, made);
    assert_eq!(server.received_requests().len(), calls);
    for file in std::fs::read_dir(folder.path()).expect("folder") {
        let bytes = std::fs::read(file.expect("file").path()).expect("bytes");
        let text = String::from_utf8_lossy(&bytes);
        assert!(!text.contains(made.expose()) && !text.contains("v2_"), "{text}");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn no_token_is_created_while_stored_record_is_slow_to_read() {
    let (admin, server) = FakeAdminApi::start(SecretFormat::V2).await;
    let folder = tempfile::tempdir().expect("folder");
    let writer = BackgroundWriter::new(Arc::new(FileStore::open(folder.path()).expect("store")));
    let made = obtain_one(&edge(&server, &writer)).await;
    save_pending(&writer).await;
    // Opening a named pipe for reading blocks until there is a writer.
    let file = folder.path().join("credentials-development.parapet");
    let record = std::fs::read(&file).expect("the record");
    std::fs::remove_file(&file).expect("removed");
    let pipe = std::process::Command::new("mkfifo").arg(&file).status();
    assert!(pipe.expect("mkfifo runs").success());
    let (edge, lists) = (edge(&server, &writer), server.count("GET"));
    let (found, ()) = tokio::join!(obtain_one(&edge), async {
        while server.count("GET") == lists {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::task::spawn_blocking(move || std::fs::write(file, record).expect("written"))
            .await
            .expect("no panic");
    });
    assert_eq!(found, made);
    assert_eq!(admin.listed_secrets().len(), 1);
}

#[tokio::test]
async fn refused_own_token_is_replaced_once_and_deleted() {
    let (admin, server) = FakeAdminApi::start(SecretFormat::V2).await;
    let writer = memory_writer();
    let (edge, other) = (edge(&server, &writer), edge(&server, &memory_writer()));
    let (refused, theirs) = (obtain_one(&edge).await, obtain_one(&other).await);
    save_pending(&writer).await;
    // A restart resets the mint limiter.
    let edge = self::edge(&server, &writer);
    assert_eq!(obtain_one(&edge).await, refused);
    let digest = refused.digest();
    let dev = dev();
    let (one, two) =
        tokio::join!(edge.replace_refused(&dev, &digest), edge.replace_refused(&dev, &digest));
    assert_eq!(one.expect("another"), two.expect("the same"));
    let now = obtain_one(&edge).await;
    assert_ne!(now, refused);
    let selectors: Vec<_> =
        [theirs, now].iter().map(|it| it.selector().expect("v2").to_owned()).collect();
    assert_eq!(admin.listed_secrets(), selectors);
    assert_eq!(server.count("POST"), 3);
}

#[tokio::test]
async fn upstream_that_refuses_everything_is_not_flooded_with_tokens() {
    let (admin, server) = FakeAdminApi::start(SecretFormat::V1).await;
    let edge = edge(&server, &memory_writer());
    let made = obtain_one(&edge).await;
    for _ in 0..3 {
        let error = edge.replace_refused(&dev(), &made.digest()).await.expect_err("too soon");
        assert!(matches!(error, Error::Throttled { .. }), "{error:?}");
    }
    assert_eq!(obtain_one(&edge).await, made);
    assert_eq!(admin.listed_secrets().len(), 1);
}

#[tokio::test]
async fn token_encrypted_with_another_admin_token_is_replaced_and_deleted() {
    let (admin, server) = FakeAdminApi::start(SecretFormat::V2).await;
    let writer = memory_writer();
    let old = obtain_one(&edge(&server, &writer)).await;
    save_pending(&writer).await;
    let error = edge_of("*:*.other", &server, &writer).obtain(&dev()).await.expect_err("401");
    assert!(matches!(&error, Error::Upstream { source, .. } if source.is_token_refused()));
    assert!(!format!("{error} {error:?}").contains(old.expose()));

    let foreign = edge_of("*:*.former", &server, &writer);
    let (exchange, _) = foreign.0.provisioning.as_ref().expect("an exchange");
    let sealed = Credential { token: old, projects: Projects::All };
    exchange.save(&dev(), &mut ProvisioningHistory::default(), &sealed, true);
    save_pending(&writer).await;
    let new = obtain_one(&edge(&server, &writer)).await;
    assert_eq!(admin.listed_secrets(), [new.selector().expect("v2")]);
}

#[tokio::test]
async fn stored_token_survives_a_replaced_admin_token() {
    let (admin, server) = FakeAdminApi::start(SecretFormat::V2).await;
    let writer = memory_writer();
    let upstream = Upstream::new(server.config()).expect("client");
    let first = AdminToken::new(token(ADMIN), None);
    let edge = EnvironmentTokens::with_admin(first.clone(), "main", upstream, writer.clone());
    let made = obtain_one(&edge).await;
    save_pending(&writer).await;
    assert!(first.replace(token("*:*.second"), None));
    edge.reencrypt().await;
    save_pending(&writer).await;
    // Without a request to upstream, which accepts only the first admin token.
    let restarted = edge_of("*:*.second", &server, &writer);
    assert_eq!(obtain_one(&restarted).await, made);
    // The record still says that this edge created it, so it may be deleted.
    first.replace(token(ADMIN), None);
    edge.reencrypt().await;
    save_pending(&writer).await;
    let error = edge.replace_refused(&dev(), &made.digest()).await.expect_err("too soon");
    assert!(matches!(error, Error::Throttled { .. }), "{error:?}");
    let restarted = edge_of(ADMIN, &server, &writer);
    assert_eq!(obtain_one(&restarted).await, made);
    let replaced = restarted.replace_refused(&dev(), &made.digest()).await.expect("another");
    assert_eq!(admin.listed_secrets(), [replaced[0].token.selector().expect("v2")]);
}

#[tokio::test]
async fn fleet_tokens_are_deleted_only_after_24_h_without_use() {
    let (admin, server) = FakeAdminApi::start(SecretFormat::V2).await;
    let at =
        |hours: i64| (jiff::Timestamp::now() - jiff::SignedDuration::from_hours(hours)).to_string();
    let listed = |secret: &str, environment: &str, created: i64, seen: Option<i64>| {
        json!({"secret": secret.repeat(22), "tokenName": "parapet-main", "type": "backend",
            "projects": ["*"], "environment": environment, "createdAt": at(created),
            "seenAt": seen.map(at)})
    };
    *admin.tokens.lock().expect("tokens") = vec![
        listed("a", "development", 100, Some(1)),
        listed("b", "development", 100, Some(30)),
        listed("c", "development", 30, None),
        listed("d", "development", 2, None),
        listed("e", "production", 100, None),
    ];
    obtain_one(&edge(&server, &memory_writer())).await;
    let retained = ["a", "d", "e"].map(|it| it.repeat(22));
    assert_eq!(admin.listed_secrets()[..3], retained);
    assert_eq!(admin.listed_secrets().len(), 4);
}

fn offer(edge: &EnvironmentTokens, text: &str, kind: TokenKind, ids: &[&str]) -> bool {
    let projects = Projects::from_list(ids.iter().copied());
    edge.offer(&token(text), &Grant { kind, scope: Scope { environment: dev(), projects } })
}

fn secrets_in_use(edge: &EnvironmentTokens) -> Vec<String> {
    edge.tokens(&dev()).iter().map(|it| it.token.expose().to_owned()).collect()
}

#[tokio::test]
async fn widest_offered_tokens_are_used_without_admin_token() {
    use TokenKind::{Client, Frontend};
    let edge = EnvironmentTokens::without_admin();
    let error = edge.obtain(&dev()).await.expect_err("nothing offered");
    assert!(matches!(error, Error::NoToken { .. }), "{error:?}");
    assert!(!offer(&edge, "a:development.f", Frontend, &["a"]));
    assert!(offer(&edge, "a:development.1", Client, &["a"]));
    assert!(!offer(&edge, "a:development.2", Client, &["a"]));
    assert!(offer(&edge, "[]:development.3", Client, &["b", "c"]));
    assert_eq!(secrets_in_use(&edge)[0], "[]:development.3");
    assert_eq!(secrets_in_use(&edge).len(), 2);
    assert!(offer(&edge, "*:development.4", Client, &["*"]));
    assert_eq!(secrets_in_use(&edge), ["*:development.4"]);
}

#[test]
fn token_in_use_is_not_replaced_by_one_with_the_same_projects() {
    let edge = EnvironmentTokens::without_admin();
    for number in 0..MAX_REDUNDANT_TOKENS {
        offer(&edge, &format!("*:development.{number}"), TokenKind::Client, &["*"]);
        assert_eq!(secrets_in_use(&edge), ["*:development.0"]);
    }
}

#[tokio::test]
async fn refused_token_is_used_only_for_projects_that_others_do_not_cover() {
    let edge = EnvironmentTokens::without_admin();
    offer(&edge, "*:development.1", TokenKind::Client, &["*"]);
    offer(&edge, "a:development.2", TokenKind::Client, &["a"]);
    let first = token("*:development.1").digest();
    edge.replace_refused(&dev(), &first).await.expect("the other");
    assert_eq!(secrets_in_use(&edge), ["a:development.2", "*:development.1"]);
    let second = token("a:development.2").digest();
    edge.replace_refused(&dev(), &second).await.expect_err("no other");
    assert_eq!(secrets_in_use(&edge), ["*:development.1"]);
    assert!(offer(&edge, "a:development.2", TokenKind::Client, &["a"]));
    assert_eq!(secrets_in_use(&edge), ["a:development.2", "*:development.1"]);
    edge.mark_accepted(&dev(), &first);
    assert_eq!(secrets_in_use(&edge), ["*:development.1"]);
}

#[tokio::test]
async fn only_revoked_tokens_are_removed() {
    let edge = EnvironmentTokens::without_admin();
    offer(&edge, "a:development.1", TokenKind::Client, &["a"]);
    for number in 0..2 * MAX_REDUNDANT_TOKENS {
        offer(&edge, &format!("b:development.{number}"), TokenKind::Client, &["b"]);
    }
    let first = token("a:development.1").digest();
    edge.replace_refused(&dev(), &first).await.expect("the other");
    offer(&edge, "b:development.more", TokenKind::Client, &["b"]);
    assert!(secrets_in_use(&edge).contains(&"a:development.1".to_owned()));
    edge.revoke(&first);
    assert!(!secrets_in_use(&edge).contains(&"a:development.1".to_owned()));
    assert_eq!(edge.environments(), BTreeSet::from([dev()]));
}

#[tokio::test(start_paused = true)]
async fn tokens_are_complete_once_configured_and_expected_ones_are_available() {
    let grant = |ids: &[&str]| {
        let projects = Projects::from_list(ids.iter().copied());
        Grant { kind: TokenKind::Client, scope: Scope { environment: dev(), projects } }
    };
    let expecting = |ids: &[&str]| {
        let edge = EnvironmentTokens::without_admin();
        edge.expect_token(token("c:development.1").digest(), &grant(ids));
        offer(&edge, "a:development.2", TokenKind::Client, &["a"]);
        assert!(!edge.is_complete(&dev()), "configured tokens are not validated yet");
        edge.mark_configured_validated();
        edge
    };
    assert!(expecting(&["a"]).is_complete(&dev()), "another sees as much");
    assert!(expecting(&["c"]).is_complete(&Environment::new("production")));

    let edge = expecting(&["c"]);
    assert!(!edge.is_complete(&dev()));
    // It has fewer projects than before.
    offer(&edge, "c:development.1", TokenKind::Client, &["a"]);
    assert!(edge.is_complete(&dev()));
    let edge = expecting(&["c"]);
    edge.revoke(&token("c:development.1").digest());
    assert!(edge.is_complete(&dev()));

    let edge = expecting(&["c"]);
    tokio::time::advance(EXPECTATION_TIMEOUT / 2).await;
    assert!(!edge.is_complete(&dev()));
    tokio::time::advance(EXPECTATION_TIMEOUT / 2).await;
    assert!(edge.is_complete(&dev()));

    let (_, server) = FakeAdminApi::start(SecretFormat::V1).await;
    let edge = self::edge(&server, &memory_writer());
    edge.expect_token(token("c:development.1").digest(), &grant(&["c"]));
    assert!(edge.is_complete(&dev()), "the edge has tokens of its own");
}

proptest! {
    #[test]
    fn tokens_in_use_cover_all_offers_without_redundancy(
        offers in prop::collection::vec(prop::collection::vec("[a-d]", 1..4), 1..12),
    ) {
        let edge = EnvironmentTokens::without_admin();
        let mut seen = Vec::new();
        for (number, ids) in offers.iter().enumerate() {
            let ids: Vec<_> = ids.iter().map(String::as_str).collect();
            let is_wider = offer(&edge, &format!("[]:development.{number}"), TokenKind::Client, &ids);
            let projects = Projects::from_list(ids);
            prop_assert_eq!(is_wider, !seen.iter().any(|it: &Projects| it.covers(&projects)));
            seen.push(projects);
        }
        let used = edge.tokens(&dev());
        for projects in &seen {
            prop_assert!(used.iter().any(|it| it.projects.covers(projects)));
        }
        for (at, one) in used.iter().enumerate() {
            let others = used.iter().enumerate().filter(|(other, _)| *other != at);
            prop_assert!(others.into_iter().all(|(_, it)| !it.projects.covers(&one.projects)));
        }
    }
}
