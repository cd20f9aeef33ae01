//! A store that fails never stops an edge from serving, and the log tells it once.

use super::*;

/// The warnings that concern the store.
fn store_warnings(edge: &Parapet) -> Vec<String> {
    let log = edge.log();
    let warnings = log.lines().filter(|line| line.contains(" WARN ") && !line.contains("upstream"));
    warnings.map(str::to_owned).collect()
}

/// Changes the flags, and waits until the edge serves them.
async fn change_flags(upstream: &ScriptedUpstream, edge: &Parapet, flag: &str) {
    upstream.set_flags(TOKEN, &[&format!("default/{flag}")]);
    edge.wait_until_served(TOKEN, &[flag]).await;
}

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn edge_serves_while_its_redis_is_away_and_fills_it_later() {
    let (mut redis, upstream) = (RedisServer::start().await, ScriptedUpstream::start().await);
    upstream.set_flags(TOKEN, &["default/one"]);
    redis.kill();
    let edge = edge(&upstream.url(), &redis.url()).start().await;
    edge.wait_until_served(TOKEN, &["one"]).await;
    redis.restart().await;
    wait_until_filled(&*redis::open_single(&redis)).await;
    let warnings = store_warnings(&edge);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
}

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn edge_serves_while_its_redis_is_out_of_memory() {
    let (redis, upstream) = (RedisServer::start().await, ScriptedUpstream::start().await);
    redis.cli(&["config", "set", "maxmemory", "1"]).await;
    let edge = edge(&upstream.url(), &redis.url()).start_listening().await;
    change_flags(&upstream, &edge, "one").await;
    edge.wait_until_logged(LogEvent::warn("store::outage_log")).await;
    change_flags(&upstream, &edge, "two").await;
    redis.cli(&["config", "set", "maxmemory", "0"]).await;
    wait_until_filled(&*redis::open_single(&redis)).await;
    edge.wait_until_logged(LogEvent::info("store::outage_log")).await;
    let warnings = store_warnings(&edge);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
}

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn edge_serves_while_its_redis_does_not_respond_or_rejects_its_password() {
    let (redis, upstream) = (RedisServer::start().await, ScriptedUpstream::start().await);
    redis.cli(&["client", "pause", "600000", "all"]).await;
    let wrong_password = RedisServer::start().await;
    wrong_password.cli(&["config", "set", "requirepass", "right"]).await;
    let url = format!("redis://:wrong-word@127.0.0.1:{}", wrong_password.port());
    for store_url in [&redis.url(), &url] {
        let edge = edge(&upstream.url(), store_url)
            .flag("--redis-read-connection-timeout-milliseconds", "200")
            .flag("--redis-write-connection-timeout-milliseconds", "200")
            .start_listening()
            .await;
        change_flags(&upstream, &edge, "one").await;
        change_flags(&upstream, &edge, "two").await;
        let warnings = store_warnings(&edge);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(!edge.log().contains("wrong-word"));
    }
}

#[tokio::test]
#[ignore = "needs moto and Azurite: tests/run installs them"]
async fn edge_serves_without_its_bucket_or_with_wrong_credentials_or_a_damaged_record() {
    let (s3, upstream) = (S3Server::start().await, ScriptedUpstream::start().await);
    let azure = AzureServer::start().await;
    azure.create_container("flags").await;
    let [endpoint, account, _] = azure.settings().try_into().unwrap();
    let wrong_key = ("azure_storage_account_key", "d3Jvbmcta2V5".to_owned());
    s3.create_bucket("flags").await;
    s3.put("flags", "damaged/flags-development.parapet", "damaged").await;
    let mut away = s3.settings();
    away[0].1 = unused_url();
    for (store_url, settings) in [
        ("s3://flags/away", away),
        ("az://flags", vec![endpoint, account, wrong_key]),
        ("s3://missing", s3.settings()),
        ("s3://flags/damaged", s3.settings()),
    ] {
        let edge = with_settings(edge(&upstream.url(), store_url), settings);
        let edge = edge.start_listening().await;
        change_flags(&upstream, &edge, "one").await;
        change_flags(&upstream, &edge, "two").await;
        let warnings = store_warnings(&edge);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
    }
    assert!(s3.list("flags").await.contains("damaged/flags-development.damaged"));
}
