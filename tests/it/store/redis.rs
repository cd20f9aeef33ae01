//! Redis as a store: a single server, a Cluster, a set behind Sentinels, ACL users and TLS.

use super::contract::check_contract;
use super::*;
use crate::rig::certificate_authority::TestAuthority;

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

/// The store in a single server.
pub(super) fn open_single(redis: &RedisServer) -> Arc<dyn Store> {
    open(config(Topology::Single(server(redis.port()))))
}

fn open(config: Config) -> Arc<dyn Store> {
    let timeouts = RedisStoreTimeouts { load: TIMEOUT, save: TIMEOUT };
    Arc::new(RedisStore::new(RedisClient::new(config).unwrap(), "parapet", timeouts))
}

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn single_redis_fulfils_the_contract_and_sets_damaged_records_aside() {
    let redis = RedisServer::start().await;
    check_contract(|| open_single(&redis)).await;

    let store = open_single(&redis);
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
        "+@read",
        "+@write",
        "+@scripting",
        "+@connection",
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
    let (store, key) = (open_single(&redis), RecordKey::Usage(ProcessSlot::FIRST));
    let lock = store.try_lock(&key).await.unwrap().unwrap();
    redis.restart().await;
    wait_until("the lock is renewed", TIMEOUT, async || lock.renew().await.ok().filter(|&it| it))
        .await;
    assert!(open_single(&redis).try_lock(&key).await.unwrap().is_none());
    redis.cli(&["set", "{parapet}:lock:usage", "another"]).await;
    assert!(!lock.renew().await.unwrap());
    lock.release().await.unwrap();
    assert_eq!(redis.cli(&["get", "{parapet}:lock:usage"]).await.trim(), "another");
}
