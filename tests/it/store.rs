//! Stores on real servers: the contract that every store fulfils, and edges that start from them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parapet::redis_client::{Config, Credentials, RedisClient, Server, Timeouts, Tls, Topology};
use parapet::store::{
    Bucket, BucketStore, Cloud, Error, ProcessSlot, RecordKey, RedisStore, RedisStoreTimeouts,
    Store,
};
use parapet::token::Environment;
use zeroize::Zeroizing;

use self::contract::check_contract;
use crate::rig::certificate_authority::TestAuthority;
use crate::rig::{
    LogEvent, Parapet, RedisCluster, RedisSentinels, RedisServer, S3Server, ScriptedUpstream,
    Setup, free_port, wait_until,
};

#[path = "store_contract.rs"]
mod contract;

const TIMEOUT: Duration = Duration::from_secs(30);

fn server(port: u16) -> Server {
    Server { host: "127.0.0.1".to_owned(), port }
}

fn config(topology: Topology) -> Config {
    Config {
        topology,
        credentials: Credentials::default(),
        tls: None,
        database: 0,
        timeouts: Timeouts { connect: TIMEOUT, command: TIMEOUT },
    }
}

fn open(config: Config) -> Arc<dyn Store> {
    let timeouts = RedisStoreTimeouts { load: TIMEOUT, save: TIMEOUT };
    Arc::new(RedisStore::new(RedisClient::new(config).unwrap(), "parapet", timeouts))
}

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn single_redis_fulfils_the_contract_and_sets_damaged_records_aside() {
    let redis = RedisServer::start().await;
    let config = config(Topology::Single(server(redis.port())));
    check_contract(|| open(config.clone())).await;

    let store = open(config);
    redis.cli(&["hset", "{parapet}:records", "verdicts", "parapet 1 5 damaged"]).await;
    let error = store.load(&RecordKey::TokenCache).await.unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
    assert_eq!(store.load(&RecordKey::TokenCache).await.unwrap(), None);
    let aside = redis.cli(&["hget", "{parapet}:set-aside", "verdicts"]).await;
    assert_eq!(aside.trim(), "parapet 1 5 damaged");
}

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn redis_cluster_fulfils_the_contract() {
    let cluster = RedisCluster::start().await;
    // The others are found through one of them.
    let nodes = vec![server(free_port()), server(cluster.ports()[0])];
    let config = config(Topology::Cluster(nodes));
    check_contract(|| open(config.clone())).await;
}

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn store_follows_the_master_that_sentinels_elect() {
    let mut servers = RedisSentinels::start().await;
    let config = config(Topology::Sentinel {
        sentinels: vec![server(free_port()), server(servers.sentinel_port())],
        master: "main".to_owned(),
        credentials: Credentials::default(),
    });
    check_contract(|| open(config.clone())).await;

    let store = open(config);
    let key = RecordKey::Usage(ProcessSlot::FIRST);
    store.save(&key, Bytes::from_static(b"before")).await.unwrap();
    servers.master.kill();
    wait_until("the new master accepts saves", TIMEOUT * 2, async || {
        store.save(&key, Bytes::from_static(b"after")).await.ok()
    })
    .await;
    assert_eq!(store.load(&key).await.unwrap().as_deref(), Some(&b"after"[..]));
}

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn redis_with_acl_users_and_an_own_certificate_authority_fulfils_the_contract() {
    let authority = TestAuthority::new();
    let files = authority.loopback_files("redis");
    let [certificate, key] = files.paths().map(|path| path.to_str().unwrap());
    let (authority_file, port) = (authority.file(), free_port());
    let arguments = [
        "--port",
        "0",
        "--tls-port",
        &port.to_string(),
        "--tls-auth-clients",
        "no",
        "--tls-cert-file",
        certificate,
        "--tls-key-file",
        key,
        "--tls-ca-cert-file",
        authority_file.to_str().unwrap(),
        "--user",
        "default",
        "off",
        "--user",
        "parapet",
        "on",
        ">s3cr3t",
        "~{parapet}:*",
        "&*",
        "+@all",
    ];
    let redis = RedisServer::start_with(port, &arguments).await;
    let plain = config(Topology::Single(server(redis.port())));
    let password = |text: &str| Some(Zeroizing::new(text.to_owned()));
    let user =
        |text| Credentials { username: Some("parapet".to_owned()), password: password(text) };
    let ca = Some(std::fs::read(authority_file).unwrap());
    let right = Config { credentials: user("s3cr3t"), tls: Some(Tls { ca }), ..plain };
    check_contract(|| open(right.clone())).await;

    let wrong_password = Config { credentials: user("wrong-word"), ..right.clone() };
    let wrong_authority = Config { tls: Some(Tls::default()), ..right };
    for wrong in [wrong_password, wrong_authority] {
        let error = open(wrong).list().await.unwrap_err();
        let text = format!("{error:?} {}", parapet::telemetry::error_chain(&error));
        assert!(error.is_unavailable() && !text.contains("wrong-word"), "{text}");
    }
}

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn lease_survives_a_restart_without_data_and_is_lost_to_another_owner() {
    let mut redis = RedisServer::start().await;
    let config = config(Topology::Single(server(redis.port())));
    let (store, key) = (open(config.clone()), RecordKey::Usage(ProcessSlot::FIRST));
    let lock = store.try_lock(&key).await.unwrap().unwrap();
    redis.restart().await;
    wait_until("the lock is renewed", TIMEOUT, async || lock.renew().await.ok().filter(|&it| it))
        .await;
    assert!(open(config).try_lock(&key).await.unwrap().is_none());
    redis.cli(&["set", "{parapet}:lock:usage", "another"]).await;
    assert!(!lock.renew().await.unwrap());
    lock.release().await.unwrap();
    assert_eq!(redis.cli(&["get", "{parapet}:lock:usage"]).await.trim(), "another");
}

const TOKEN: &str = "*:development.store-0123456789abcdef";

/// An edge with this store; its disk is empty at each start.
fn edge(upstream_url: &str, store_url: &str) -> Setup {
    let edge = Parapet::edge(upstream_url).with_short_intervals().env("TOKENS", TOKEN);
    edge.env("PARAPET_STORE", store_url).flag("--drain-delay-seconds", "0")
}

/// A URL where nothing listens.
fn unused_url() -> String {
    format!("http://127.0.0.1:{}", free_port())
}

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn edge_with_an_empty_disk_starts_from_redis_while_upstream_is_away() {
    let (redis, upstream) = (RedisServer::start().await, ScriptedUpstream::start().await);
    upstream.set_flags(TOKEN, &["default/one", "default/two"]);
    let first = edge(&upstream.url(), &redis.url()).start().await;
    first.wait_until_served(TOKEN, &["one", "two"]).await;
    wait_until("flags and tokens are stored", TIMEOUT, async || {
        let names = redis.cli(&["hkeys", "{parapet}:records"]).await;
        (names.contains("flags-development") && names.contains("verdicts")).then_some(())
    })
    .await;
    first.kill();
    let records = redis.cli(&["hvals", "{parapet}:records"]).await;
    assert!(!records.contains(TOKEN), "stored a token in plain text");

    let second = edge(&unused_url(), &redis.url()).start().await;
    assert_eq!(second.served_flags(TOKEN).await.unwrap(), ["one", "two"]);
}

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn edge_starts_and_serves_while_its_redis_is_away_and_fills_it_later() {
    let (mut redis, upstream) = (RedisServer::start().await, ScriptedUpstream::start().await);
    upstream.set_flags(TOKEN, &["default/one"]);
    redis.kill();
    let edge = edge(&upstream.url(), &redis.url()).start().await;
    edge.wait_until_served(TOKEN, &["one"]).await;
    redis.restart().await;
    wait_until("flags are stored", TIMEOUT, async || {
        let names = redis.cli(&["hkeys", "{parapet}:records"]).await;
        names.contains("flags-development").then_some(())
    })
    .await;
    let warnings = edge.logged(LogEvent::warn("store::outage_log"));
    assert_eq!(warnings.len(), 1, "{warnings:?}");
}

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn backup_of_unleash_edge_in_redis_is_taken_over() {
    let redis = RedisServer::start().await;
    let tokens = format!(
        r#"[{{"token":"{TOKEN}","type":"client","environment":"development","projects":["*"],
            "status":"Validated"}}]"#
    );
    let flags = r#"[["development",{"version":2,"features":[
        {"name":"one","enabled":true,"strategies":[],"project":"default"}]}]]"#;
    redis.cli(&["set", "unleash-tokens", &tokens]).await;
    redis.cli(&["set", "unleash-features", flags]).await;
    let edge = Parapet::edge(&unused_url()).env("REDIS_URL", redis.url()).start().await;
    assert_eq!(edge.served_flags(TOKEN).await.unwrap(), ["one"]);
}

/// A store in a bucket of this server.
fn open_bucket(s3: &S3Server, name: &str) -> Arc<dyn Store> {
    // The same provider may be installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let bucket = Bucket { cloud: Cloud::S3, name: name.to_owned(), prefix: "some/path".to_owned() };
    Arc::new(BucketStore::with_settings(&bucket, &s3.settings()).unwrap())
}

#[tokio::test]
#[ignore = "needs moto: tests/run installs it"]
async fn s3_fulfils_the_contract_and_sets_damaged_records_aside() {
    let s3 = S3Server::start().await;
    s3.create_bucket("flags").await;
    check_contract(|| open_bucket(&s3, "flags")).await;

    s3.create_bucket("damaged").await;
    s3.put("damaged", "some/path/verdicts.parapet", "damaged").await;
    let store = open_bucket(&s3, "damaged");
    let error = store.load(&RecordKey::TokenCache).await.unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
    assert_eq!(store.load(&RecordKey::TokenCache).await.unwrap(), None);
    assert!(s3.list("damaged").await.contains("some/path/verdicts.damaged"));

    let error = open_bucket(&s3, "missing").list().await.unwrap_err();
    assert!(!parapet::telemetry::error_chain(&error).is_empty());
}

#[tokio::test]
#[ignore = "needs moto: tests/run installs it"]
async fn edge_with_an_empty_disk_starts_from_s3_while_upstream_is_away() {
    let (s3, upstream) = (S3Server::start().await, ScriptedUpstream::start().await);
    s3.create_bucket("flags").await;
    upstream.set_flags(TOKEN, &["default/one", "default/two"]);
    let with_settings = |setup: Setup| {
        s3.settings()
            .into_iter()
            .fold(setup, |setup, (name, value)| setup.env(name.to_uppercase(), value))
    };
    let first = with_settings(edge(&upstream.url(), "s3://flags/edge")).start().await;
    first.wait_until_served(TOKEN, &["one", "two"]).await;
    wait_until("flags and tokens are stored", TIMEOUT, async || {
        let names = s3.list("flags").await;
        (names.contains("edge/flags-development.parapet")
            && names.contains("edge/verdicts.parapet"))
        .then_some(())
    })
    .await;
    first.kill();

    let second = with_settings(edge(&unused_url(), "s3://flags/edge")).start().await;
    assert_eq!(second.served_flags(TOKEN).await.unwrap(), ["one", "two"]);
}

#[tokio::test]
#[ignore = "needs moto: tests/run installs it"]
async fn backup_of_unleash_edge_in_s3_is_taken_over() {
    let s3 = S3Server::start().await;
    s3.create_bucket("flags").await;
    let tokens = format!(
        r#"[{{"token":"{TOKEN}","type":"client","environment":"development","projects":["*"],
            "status":"Validated"}}]"#
    );
    let flags = r#"[["development",{"version":2,"features":[
        {"name":"one","enabled":true,"strategies":[],"project":"default"}]}]]"#;
    s3.put("flags", "/unleash-tokens.json", &tokens).await;
    s3.put("flags", "/unleash-features.json", flags).await;
    let setup = Parapet::edge(&unused_url()).env("S3_BUCKET_NAME", "flags");
    let setup = s3
        .settings()
        .into_iter()
        .fold(setup, |setup, (name, value)| setup.env(name.to_uppercase(), value));
    let edge = setup.start().await;
    assert_eq!(edge.served_flags(TOKEN).await.unwrap(), ["one"]);
}
