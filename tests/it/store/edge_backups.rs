//! The backup that Unleash Edge has left in the same place is taken over at the first start.

use super::*;

const TOKENS: &str = r#"[{"token":"*:development.store-0123456789abcdef","type":"client",
    "environment":"development","projects":["*"],"status":"Validated"}]"#;

const FLAGS: &str = r#"[["development",{"version":2,"features":[
    {"name":"one","enabled":true,"strategies":[],"project":"default"}]}]]"#;

#[tokio::test]
#[ignore = "needs Redis: tests/run installs it"]
async fn edge_takes_over_the_backup_in_redis() {
    let redis = RedisServer::start().await;
    redis.cli(&["set", "unleash-tokens", TOKENS]).await;
    redis.cli(&["set", "unleash-features", FLAGS]).await;
    let edge = Parapet::edge(&unused_url()).env("REDIS_URL", redis.url()).start().await;
    assert_eq!(edge.served_flags(TOKEN).await.unwrap(), ["one"]);
}

#[tokio::test]
#[ignore = "needs moto: tests/run installs it"]
async fn edge_takes_over_the_backup_in_s3() {
    let s3 = S3Server::start().await;
    s3.create_bucket("flags").await;
    s3.put("flags", "/unleash-tokens.json", TOKENS).await;
    s3.put("flags", "/unleash-features.json", FLAGS).await;
    let setup = Parapet::edge(&unused_url()).env("S3_BUCKET_NAME", "flags");
    let edge = with_settings(setup, s3.settings()).start().await;
    assert_eq!(edge.served_flags(TOKEN).await.unwrap(), ["one"]);
}
