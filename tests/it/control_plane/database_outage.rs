//! A database that goes silent, is locked, or is unavailable. Two instances share it, each behind its
//! own proxy.

mod random_silence;
mod starts;

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _, PgConnection};

use super::{DatabaseKind, FLAGS, Installation, NEW_PASSWORD, OWNER, PASSWORD, Session, sign_in};
use crate::rig::{
    LogEvent, Parapet, Postgres, PostgresProxy, SilencePoint, secret_leak_check, wait_until,
};

/// The database does not respond, or not as it should.
const DATABASE_UNREACHABLE: LogEvent = LogEvent::warn("control_plane::maintenance").with("error");

/// Two instances on one database.
struct InstancePair {
    one: Parapet,
    two: Parapet,
    proxy_of_one: PostgresProxy,
    proxy_of_two: PostgresProxy,
    /// Signed in at the first instance.
    owner: Session,
    /// The database URL, without the proxies.
    url: String,
    _places: [Installation; 2],
}

impl InstancePair {
    async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Two instances, with a high limit of tokens, and these arguments for the first.
    async fn start_with(arguments: &[&str]) -> Self {
        let room = ["--unleash-api-tokens-limit", "100000"];
        let postgres = Postgres::shared().await;
        let name = postgres.create_database().await;
        let url = format!("postgres://postgres@127.0.0.1:{}/{name}", postgres.port());
        let proxy_of_one = PostgresProxy::start(postgres.port()).await;
        let proxy_of_two = PostgresProxy::start(postgres.port()).await;
        let places =
            [installation_behind(&proxy_of_one, &name), installation_behind(&proxy_of_two, &name)];
        let one = places[0].start_with(&[&room, arguments].concat()).await;
        let two = places[1].start_with(&room).await;
        let Session { cookies, .. } = sign_in(&two, OWNER, PASSWORD).await.unwrap();
        let owner = Session { url: one.admin_url(), cookies };
        Self { one, two, proxy_of_one, proxy_of_two, owner, url, _places: places }
    }

    /// The owner's session at the second instance.
    fn owner_of_two(&self) -> Session {
        Session { url: self.two.admin_url(), cookies: self.owner.cookies.clone() }
    }

    /// A token that both instances accept.
    async fn token(&self, name: &str) -> String {
        let secret = create_token(&self.owner, name).await;
        wait_until("the token is known", Duration::from_secs(10), async || {
            (self.two.features_status(&secret).await == StatusCode::OK).then_some(())
        })
        .await;
        secret
    }
}

fn installation_behind(proxy: &PostgresProxy, database: &str) -> Installation {
    secret_leak_check::register(PASSWORD);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("flags.json"), FLAGS).unwrap();
    let port = proxy.port();
    let url = format!("postgres://postgres@127.0.0.1:{port}/{database}?sslmode=disable");
    Installation { folder, database: Some(url) }
}

/// Creates a token and returns its secret.
async fn create_token(session: &Session, name: &str) -> String {
    let (status, made) = session.create_token("client", name).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    made["secret"].as_str().unwrap().to_owned()
}

async fn delete(session: &Session, secret: &str) -> StatusCode {
    let path = format!("/api/admin/api-tokens/{secret}");
    session.call(Method::DELETE, &path, &Value::Null).await.0
}

/// Waits until `parapet` rejects a token.
async fn wait_until_rejected(parapet: &Parapet, secret: &str, limit: Duration) {
    wait_until("the revocation takes effect", limit, async || {
        (parapet.features_status(secret).await == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
}

/// Waits until a token can be created.
async fn wait_until_token_created(session: &Session, limit: Duration) {
    wait_until("a token is made", limit, async || {
        (session.create_token("client", "after").await.0 == StatusCode::CREATED).then_some(())
    })
    .await;
}

async fn database_status(session: &Session) -> Value {
    session.get("/status").await["database"].clone()
}

/// The server goes silent while an instance reads the tokens.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn revocation_takes_effect_when_the_token_query_gets_no_response() {
    let pair = InstancePair::start().await;
    let secret = pair.token("revoked").await;
    // An admin token needs no database query, unlike a session.
    let (_, admin) = pair.owner.create_token("admin", "watch").await;
    let admin = admin["secret"].as_str().unwrap();
    wait_until("the admin token is known", Duration::from_secs(10), async || {
        (pair.two.admin_get_as("/status", admin).await.0 == StatusCode::OK).then_some(())
    })
    .await;

    pair.proxy_of_two.silence_next_at(SilencePoint::BeforeStatement("SELECT * FROM tokens"));
    create_token(&pair.owner, "cause").await;
    pair.proxy_of_two.wait_until_silenced(1).await;
    assert_eq!(delete(&pair.owner, &secret).await, StatusCode::OK);
    // Meanwhile it reports the age of its data.
    wait_until("the age of the registry's data is reported", Duration::from_secs(10), async || {
        let (_, reported) = pair.two.admin_get_as("/status", admin).await;
        let age = pair.two.metric("parapet_registry_age_seconds").await?;
        (age > 2.0 && reported["database"]["registryAgeSeconds"].as_u64()? >= 2).then_some(())
    })
    .await;
    wait_until_rejected(&pair.two, &secret, Duration::from_secs(10)).await;
    wait_until_token_created(&pair.owner_of_two(), Duration::from_secs(10)).await;
    pair.two.wait_until_logged(DATABASE_UNREACHABLE).await;
}

/// The machine of an instance disappears in the middle of a transaction; its database session stays,
/// with its locks.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn instance_lost_during_commit_blocks_others_for_seconds_only() {
    let pair = InstancePair::start().await;
    pair.token("first").await;
    pair.proxy_of_one.silence_next_at(SilencePoint::BeforeStatement("COMMIT"));
    let made = pair.owner.create_token("client", "never");
    let vanish = async {
        pair.proxy_of_one.wait_until_silenced(1).await;
        pair.proxy_of_one.silence_connections("");
    };
    let ((status, _), ()) = tokio::join!(made, vanish);
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    pair.one.kill();
    wait_until_token_created(&pair.owner_of_two(), Duration::from_secs(15)).await;
    pair.one.restart();
    pair.one.wait_until_ready().await;
    let names = pair.owner.token_names().await;
    assert!(!names.contains(&"never".to_owned()), "{names:?}");
}

/// A firewall drops the idle connection that listens for changes.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn silent_listening_connection_is_replaced() {
    let pair = InstancePair::start().await;
    pair.token("first").await;
    let before = pair.proxy_of_two.connection_count("LISTEN");
    pair.proxy_of_two.silence_connections("LISTEN");
    pair.proxy_of_two.wait_until_statement_seen("LISTEN", before + 1).await;
    for number in 0..5 {
        let secret = pair.token(&format!("number {number}")).await;
        assert_eq!(delete(&pair.owner, &secret).await, StatusCode::OK);
        wait_until_rejected(&pair.two, &secret, Duration::from_secs(2)).await;
    }
}

/// Another session locks the tables, as `VACUUM FULL` does.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn requests_waiting_for_locked_table_get_a_response() {
    // Shorter than the database's lock timeout.
    let pair = InstancePair::start_with(&["--edge-request-timeout", "2"]).await;
    let secret = create_token(&pair.owner_of_two(), "first").await;
    wait_until("the token is known", Duration::from_secs(10), async || {
        (pair.one.features_status(&secret).await == StatusCode::OK).then_some(())
    })
    .await;
    let mut holder = PgConnection::connect(&pair.url).await.unwrap();
    let lock = "BEGIN; LOCK TABLE tokens, accounts, sessions, events, applications, flag_usage";
    holder.execute(lock).await.unwrap();

    let token = json!({ "tokenName": "it", "type": "client", "environment": "development" });
    let attempt = json!({ "username": OWNER, "password": PASSWORD });
    let (there, user) = (format!("/api/admin/api-tokens/{secret}"), "/api/admin/user-admin");
    let account = json!({ "username": "ann", "rootRole": 1, "password": NEW_PASSWORD });
    for (method, path, body) in [
        (Method::POST, "/api/admin/api-tokens", &token),
        (Method::DELETE, &*there, &Value::Null),
        (Method::GET, "/api/admin/events", &Value::Null),
        (Method::GET, "/api/admin/metrics/applications", &Value::Null),
        (Method::GET, "/api/admin/client-metrics/features/first/raw", &Value::Null),
        (Method::GET, user, &Value::Null),
        (Method::POST, user, &account),
        (Method::POST, "/auth/simple/login", &attempt),
        (Method::POST, "/logout", &Value::Null),
    ] {
        let (status, response) = pair.owner.call(method, path, body).await;
        let reported = response["message"].as_str().unwrap_or_default();
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{path}: {response}");
        assert!(reported.contains("the request timed out"), "{path}: {response}");
    }
    let (status, response) = pair.owner_of_two().call(Method::POST, user, &account).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{response}");
    assert!(response.to_string().contains("is busy"), "the response has the reason: {response}");
    assert_eq!(pair.one.features_status(&secret).await, StatusCode::OK, "flags need no database");
    holder.execute("ROLLBACK").await.unwrap();
    wait_until_token_created(&pair.owner, Duration::from_secs(15)).await;
}

async fn post_usage(parapet: &Parapet, secret: &str, times: u64) {
    parapet.report_usage(secret, "shop", &json!({ "first": { "yes": times, "no": 0 } })).await;
}

async fn wait_until_counted(session: &Session, times: u64, limit: Duration) {
    wait_until(&format!("{times} uses are stored"), limit, async || {
        let usage = session.get("/api/admin/client-metrics/features/first/raw").await;
        let hours = usage["data"].as_array().unwrap().iter();
        let sum = hours.map(|hour| hour["yes"].as_u64().unwrap()).sum::<u64>();
        (sum == times).then_some(())
    })
    .await;
}

/// The server goes silent while usage is stored, and the session keeps its lock.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn usage_is_stored_on_all_instances_after_one_connection_went_silent() {
    let pair = InstancePair::start().await;
    let secret = pair.token("first").await;
    pair.proxy_of_two.silence_next_at(SilencePoint::BeforeStatement("INSERT INTO flag_usage"));
    post_usage(&pair.two, &secret, 1).await;
    pair.proxy_of_two.wait_until_silenced(1).await;
    post_usage(&pair.one, &secret, 10).await;
    wait_until("the log reports that usage waits", Duration::from_secs(15), async || {
        (pair.two.metric("parapet_usage_storing").await? == 0.0).then_some(())
    })
    .await;
    pair.two.wait_until_logged(LogEvent::warn("control_plane::usage_store").with("error")).await;
    wait_until_counted(&pair.owner, 11, Duration::from_secs(30)).await;
    wait_until("the log reports that usage is stored", Duration::from_secs(15), async || {
        (database_status(&pair.owner_of_two()).await["usageWaitsSince"].is_null()).then_some(())
    })
    .await;
    pair.two.wait_until_logged(LogEvent::info("control_plane::usage_store")).await;
}

/// The server is stopped for a while.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn unavailable_database_is_reported_at_once_with_reason() {
    let pair = InstancePair::start().await;
    let secret = pair.token("first").await;
    let (_, admin) = pair.owner.create_token("admin", "watch").await;
    let admin = admin["secret"].as_str().unwrap();
    assert_eq!(pair.one.metric("parapet_database_reachable").await, Some(1.0));
    let before = pair.one.log().len();
    pair.proxy_of_one.refuse().await;

    // Each request fails at once, without waiting for a server that refuses connections: twenty that
    // waited for it would take longer than this limit.
    let attempts = async {
        for _ in 0..20 {
            let (status, reported) = pair.owner.create_token("client", "more").await;
            assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{reported}");
            assert!(reported.to_string().contains("cannot be reached"), "{reported}");
        }
    };
    let attempts = tokio::time::timeout(Duration::from_secs(50), attempts).await;
    attempts.expect("a refused connection is no reason to wait");
    let (_, reported) = pair.one.admin_get_as("/status", admin).await;
    let reported = &reported["database"];
    assert_eq!(reported["reachable"], false, "{reported}");
    assert!(reported["awaySince"].is_string(), "{reported}");
    assert!(reported["lastError"]["error"].as_str().unwrap().contains("refused"), "{reported}");
    assert_eq!(reported["connections"]["limit"], 5, "{reported}");
    let (status, ready) = pair.one.get("/internal-backstage/ready", "").await;
    assert_eq!((status, ready["status"].as_str()), (StatusCode::OK, Some("READY")), "{ready}");
    assert!(ready["warning"].as_str().unwrap().contains("database"), "{ready}");
    assert_eq!(pair.one.metric("parapet_database_reachable").await, Some(0.0));
    assert_eq!(pair.one.features_status(&secret).await, StatusCode::OK, "flags need no database");
    let line = pair.one.wait_until_logged(DATABASE_UNREACHABLE).await;
    assert!(line.contains("refused"), "{line}");

    pair.proxy_of_one.restore().await;
    wait_until_token_created(&pair.owner, Duration::from_secs(10)).await;
    pair.one.wait_until_logged(LogEvent::info("control_plane::").with("away_for")).await;
    let log = pair.one.log().split_off(before);
    assert!(log.lines().count() < 8, "twenty requests are no reason for many lines: {log}");
    let (_, ready) = pair.one.get("/internal-backstage/ready", "").await;
    assert_eq!(ready, json!({ "status": "READY" }));
    let statements = r#"parapet_database_seconds_count{operation="statement"}"#;
    assert!(pair.one.metric(statements).await.is_some_and(|count| count > 0.0));
}

/// The file is deleted under a running instance.
#[cfg(unix)]
#[tokio::test]
async fn deleted_database_file_accepts_no_changes() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let secret = create_token(&owner, "first").await;
    let (_, admin) = owner.create_token("admin", "watch").await;
    let admin = [("authorization", admin["secret"].as_str().unwrap())];
    let file = parapet.data_dir().join("parapet.db");
    let aside = parapet.data_dir().join("aside.db");

    std::fs::rename(&file, &aside).unwrap();
    let token = json!({ "tokenName": "lost", "type": "client", "environment": "development" });
    let make = async || owner.call_as(Method::POST, "/api/admin/api-tokens", &token, &admin).await;
    let (status, reported) = make().await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{reported}");
    assert!(reported.to_string().contains("deleted or replaced"), "{reported}");
    let line = parapet.wait_until_logged(DATABASE_UNREACHABLE).await;
    assert!(line.contains("parapet.db"), "{line}");
    assert_eq!(parapet.features_status(&secret).await, StatusCode::OK, "flags need no database");
    std::fs::write(&file, "").unwrap();
    assert_eq!(make().await.0, StatusCode::SERVICE_UNAVAILABLE, "another file is not that one");
    std::fs::rename(&aside, &file).unwrap();
    let (status, made) = make().await;
    assert_eq!(status, StatusCode::CREATED, "it is back: {made}");

    assert!(parapet.terminate().await.success());
    parapet.restart();
    parapet.wait_until_ready().await;
    assert_eq!(parapet.features_status(&secret).await, StatusCode::OK);
    assert_eq!(parapet.features_status(made["secret"].as_str().unwrap()).await, StatusCode::OK);
}

/// Of several servers the first writable one is used, and another one when that becomes unavailable.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn writable_server_is_selected_among_several() {
    let (writable, standby) = (Postgres::shared().await, Postgres::start().await);
    let name = writable.create_database().await;
    standby.execute("postgres", &format!("create database {name}")).await;
    standby.execute("postgres", "alter system set default_transaction_read_only = on").await;
    standby.execute("postgres", "select pg_reload_conf()").await;
    let url = format!("postgres://postgres@127.0.0.1:{}/{name}", standby.port());
    wait_until("the standby is read-only", Duration::from_secs(10), async || {
        let mut connection = PgConnection::connect(&url).await.unwrap();
        let make = connection.execute("CREATE TABLE may_not_be (id INT)").await;
        make.is_err().then_some(())
    })
    .await;

    let first = PostgresProxy::start(writable.port()).await;
    let second = PostgresProxy::start(writable.port()).await;
    let hosts = [standby.port(), first.port(), second.port()].map(|it| format!("127.0.0.1:{it}"));
    let mut place = installation_behind(&first, &name);
    let access = "target_session_attrs=read-write&sslmode=disable";
    place.database = Some(format!("postgres://postgres@{}/{name}?{access}", hosts.join(",")));
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    create_token(&owner, "at the first").await;
    let shown = database_status(&owner).await["location"].clone();
    assert_eq!(shown, format!("postgres://{}/{name}", hosts.join(",")));

    first.refuse().await;
    wait_until_token_created(&owner, Duration::from_secs(15)).await;
    second.wait_until_statement_seen("LISTEN", 1).await;
    first.restore().await;
    second.refuse().await;
    wait_until_token_created(&owner, Duration::from_secs(15)).await;
}
