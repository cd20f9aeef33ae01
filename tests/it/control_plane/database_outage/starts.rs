//! Starts while the database is unavailable, silent or migrated by another instance.

use std::time::Duration;

use reqwest::StatusCode;
use sqlx::{Connection as _, Executor as _, PgConnection};

use super::super::{Installation, OWNER, PASSWORD, sign_in};
use super::{create_token, delete, installation_behind};
use crate::rig::{
    LogEvent, Parapet, Postgres, PostgresProxy, RedisServer, SilencePoint, secret_leak_check,
    wait_until,
};

/// The local copy of the tokens serves SDKs only.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn start_without_database_accepts_cached_tokens() {
    let postgres = Postgres::shared().await;
    let name = postgres.create_database().await;
    let proxy = PostgresProxy::start(postgres.port()).await;
    let place = installation_behind(&proxy, &name);
    let mut parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let (kept, revoked) =
        (create_token(&owner, "kept").await, create_token(&owner, "revoked").await);
    assert_eq!(delete(&owner, &revoked).await, StatusCode::OK);
    create_token(&owner, "the last one").await;
    parapet.wait_until_stored("the last one").await;
    assert!(parapet.terminate().await.success());
    let copy = parapet.data_dir().join("registry.parapet");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(&copy).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    assert!(!std::fs::read_to_string(&copy).unwrap().contains("\"revoked\""));

    proxy.refuse().await;
    parapet.restart();
    parapet.wait_until_ready().await;
    assert_eq!(parapet.features_status(&kept).await, StatusCode::OK);
    assert_eq!(parapet.features_status(&revoked).await, StatusCode::UNAUTHORIZED);
    let refused = sign_in(&parapet, OWNER, PASSWORD).await.err();
    assert_eq!(refused, Some(StatusCode::SERVICE_UNAVAILABLE));
    parapet.wait_until_logged(LogEvent::warn("control_plane").with("tokens")).await;

    proxy.restore().await;
    wait_until("an account signs in", Duration::from_secs(15), async || {
        sign_in(&parapet, OWNER, PASSWORD).await.ok()
    })
    .await;
    let after = create_token(&owner, "after").await;
    assert_eq!(parapet.features_status(&after).await, StatusCode::OK);

    // A copy of another database does not count.
    assert!(parapet.terminate().await.success());
    proxy.refuse().await;
    let other = format!("postgres://postgres@127.0.0.1:{}/another", proxy.port());
    parapet.restart_with_env("DATABASE_URL", other);
    let ended =
        wait_until("the start fails", Duration::from_secs(30), async || parapet.exit_status())
            .await;
    assert!(!ended.success());
}

/// A new instance, which has no copy of its own, finds that of another one in Redis.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL and Redis"]
async fn new_instance_without_database_accepts_tokens_cached_in_redis() {
    let (postgres, redis) = (Postgres::shared().await, RedisServer::start().await);
    let name = postgres.create_database().await;
    let proxy = PostgresProxy::start(postgres.port()).await;
    let place = installation_behind(&proxy, &name);
    let store = format!("--store={}", redis.url());
    let first = place.start_with(&[&store]).await;
    let owner = sign_in(&first, OWNER, PASSWORD).await.unwrap();
    let token = create_token(&owner, "in Redis").await;
    wait_until("the token is stored", Duration::from_secs(15), async || {
        let records = redis.cli(&["hvals", "{parapet}:records"]).await;
        assert!(!records.contains(&token), "stored a token in plain text");
        records.contains("in Redis").then_some(())
    })
    .await;

    proxy.refuse().await;
    let second = place.start_with(&[&store]).await;
    assert_eq!(second.features_status(&token).await, StatusCode::OK);
}

/// An instance on the database behind `proxy` whose first start generates a password. It may fail before
/// that.
fn first_start_behind(proxy: &PostgresProxy, place: &Installation, database: &str) -> Parapet {
    let url = format!("postgres://postgres@127.0.0.1:{}/{database}?sslmode=disable", proxy.port());
    let flags = place.folder.path().join("flags.json");
    Parapet::mode("standalone").flag("--flags", flags).env("DATABASE_URL", url).spawn()
}

/// Waits until a start has failed, and deletes its remaining data.
async fn wait_until_exited(parapet: &Parapet, limit: Duration) {
    let ended = wait_until("the start fails", limit, async || parapet.exit_status()).await;
    assert!(!ended.success());
    parapet.kill();
}

/// The server goes silent after the first start has created an account, before the start is complete.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn first_start_that_fails_after_creating_account_has_shown_the_password() {
    let postgres = Postgres::shared().await;
    let name = postgres.create_database().await;
    let proxy = PostgresProxy::start(postgres.port()).await;
    let place = installation_behind(&proxy, &name);
    proxy.silence_next_at(SilencePoint::BeforeStatement("SELECT * FROM tokens"));
    let parapet = first_start_behind(&proxy, &place, &name);
    proxy.wait_until_silenced(1).await;
    wait_until_exited(&parapet, Duration::from_secs(30)).await;

    let file = parapet.data_dir().join("first-start.txt");
    let text = std::fs::read_to_string(&file).expect("the first start's secrets are in a file");
    std::fs::remove_file(&file).unwrap();
    let word_after = |name: &str| {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(name));
        let word = line.unwrap().split_whitespace().next().unwrap().to_owned();
        secret_leak_check::register(&word);
        word
    };
    let (password, client) = (word_after("password "), word_after("client "));
    parapet.restart();
    parapet.wait_until_ready().await;
    assert!(sign_in(&parapet, OWNER, &password).await.is_ok());
    assert_eq!(parapet.features_status(&client).await, StatusCode::OK);
    assert!(!file.exists(), "nothing is made a second time");
}

/// The server goes silent while the schema is created, before a statement and after it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn start_fails_within_seconds_when_migration_gets_no_response() {
    let postgres = Postgres::shared().await;
    let proxy = PostgresProxy::start(postgres.port()).await;
    let statement = "CREATE TABLE accounts";
    for (count, moment) in
        [SilencePoint::BeforeStatement(statement), SilencePoint::AfterStatement(statement)]
            .iter()
            .enumerate()
    {
        let name = postgres.create_database().await;
        let place = installation_behind(&proxy, &name);
        proxy.silence_next_at(*moment);
        let parapet = first_start_behind(&proxy, &place, &name);
        proxy.wait_until_silenced(count + 1).await;
        wait_until_exited(&parapet, Duration::from_secs(30)).await;
        parapet.wait_until_printed("no response within").await;
        parapet.restart();
        parapet.wait_until_ready().await;
    }
}

/// Another instance migrates, and takes longer than any request may.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn start_waits_for_slow_migration_of_another_instance() {
    /// The advisory lock for migrations.
    const LOCK: i64 = 0x7061_7261_7065_7401;
    let postgres = Postgres::shared().await;
    let name = postgres.create_database().await;
    let proxy = PostgresProxy::start(postgres.port()).await;
    let place = installation_behind(&proxy, &name);
    let url = format!("postgres://postgres@127.0.0.1:{}/{name}", postgres.port());
    let mut other = PgConnection::connect(&url).await.unwrap();
    other.execute("BEGIN").await.unwrap();
    let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCK);
    lock.execute(&mut other).await.unwrap();

    let parapet = first_start_behind(&proxy, &place, &name);
    wait_until("the server was checked twice", Duration::from_secs(30), async || {
        assert!(parapet.exit_status().is_none(), "{}", parapet.log());
        (proxy.connection_count("pg_stat_activity") >= 2).then_some(())
    })
    .await;
    other.execute("ROLLBACK").await.unwrap();
    parapet.wait_until_ready().await;
}
