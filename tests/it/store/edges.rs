//! Edges whose disk is empty start from a store while upstream is away.

use super::*;

/// Starts an edge that fills the store, and then one that has only the store.
async fn check_start(store_url: &str, settings: Vec<(&'static str, String)>, store: &dyn Store) {
    let upstream = ScriptedUpstream::start().await;
    upstream.set_flags(TOKEN, &["default/one", "default/two"]);
    let first = with_settings(edge(&upstream.url(), store_url), settings.clone()).start().await;
    first.wait_until_served(TOKEN, &["one", "two"]).await;
    wait_until_filled(store).await;
    first.kill();

    let second = with_settings(edge(&unused_url(), store_url), settings).start().await;
    assert_eq!(second.served_flags(TOKEN).await.unwrap(), ["one", "two"]);
}

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn edge_starts_from_redis() {
    let redis = RedisServer::start().await;
    check_start(&redis.url(), Vec::new(), &*redis::open_single(&redis)).await;
    let records = redis.cli(&["hvals", "{parapet}:records"]).await;
    assert!(!records.contains(TOKEN), "stored a token in plain text");
}

#[tokio::test]
#[ignore = "needs moto: tests/run installs it"]
async fn edge_starts_from_s3() {
    let s3 = S3Server::start().await;
    s3.create_bucket("flags").await;
    let store = object_storage::open(Cloud::S3, "flags", "edge", &s3.settings());
    check_start("s3://flags/edge", s3.settings(), &*store).await;
    assert!(s3.list("flags").await.contains("edge/flags-development.parapet"));
    let tokens = store.load(&RecordKey::TokenCache).await.unwrap().unwrap();
    assert!(!String::from_utf8_lossy(&tokens).contains(TOKEN), "stored a token in plain text");
}

#[tokio::test]
#[ignore = "needs Azurite: tests/run installs it"]
async fn edge_starts_from_azure() {
    let azure = AzureServer::start().await;
    azure.create_container("flags").await;
    let store = object_storage::open(Cloud::Azure, "flags", "edge", &azure.settings());
    check_start("az://flags/edge", azure.settings(), &*store).await;
}
