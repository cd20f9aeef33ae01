//! Tokens from their creation to their end, on one instance, on several, and through an edge.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{DatabaseKind, Installation, OWNER, PASSWORD, Session, identifier, sign_in};
use crate::rig::{Parapet, Postgres, secret_leak_check, wait_until};

async fn token_lifecycle(database_kind: DatabaseKind) {
    let place = Installation::new(database_kind).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let me = owner.get("/api/admin/user").await;
    assert_eq!(me["permissions"], json!([{ "permission": "ADMIN" }]));

    let (status, made) = owner.create_token("client", "checkout").await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let secret = made["secret"].as_str().unwrap().to_owned();
    assert_eq!(parapet.features_status(&secret).await, StatusCode::OK, "it works at once");
    let listed = owner.get("/api/admin/api-tokens/checkout").await;
    assert!(!listed.to_string().contains(&secret), "lists show no secret");
    assert_eq!(listed["tokens"][0]["type"], "backend");

    // Reported usage is stored and listed.
    let toggles = json!({ "first": { "yes": 3, "no": 1, "variants": { "a": 2 } } });
    for _ in 0..2 {
        parapet.report_usage(&secret, "shop", &toggles).await;
    }
    wait_until("the usage is shown", Duration::from_secs(30), async || {
        let usage = owner.get("/api/admin/client-metrics/features/first/raw").await;
        let hours = usage["data"].as_array().unwrap();
        let sum = |name: &str| hours.iter().map(|hour| hour[name].as_u64().unwrap()).sum::<u64>();
        let a = hours.iter().map(|hour| hour["variants"]["a"].as_u64().unwrap_or(0)).sum::<u64>();
        ((sum("yes"), sum("no"), a) == (6, 2, 4)).then_some(())
    })
    .await;
    let applications = owner.get("/api/admin/metrics/applications").await;
    assert_eq!(applications["applications"][0]["appName"], "shop");

    // A token expires without any action.
    let end = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(5);
    let path = format!("/api/admin/api-tokens/{}", identifier(&owner, "checkout").await);
    let (status, _) =
        owner.call(Method::PUT, &path, &json!({ "expiresAt": end.to_string() })).await;
    assert_eq!(status, StatusCode::OK);
    wait_until("the token has expired", Duration::from_secs(10), async || {
        (parapet.features_status(&secret).await == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
    owner.call(Method::PUT, &path, &json!({ "expiresAt": null })).await;
    assert_eq!(parapet.features_status(&secret).await, StatusCode::OK, "and comes back");

    // Deleted by its secret, it is rejected at once, on this instance and after a restart.
    let path = format!("/api/admin/api-tokens/{secret}");
    assert_eq!(owner.call(Method::DELETE, &path, &Value::Null).await.0, StatusCode::OK);
    assert_eq!(parapet.features_status(&secret).await, StatusCode::UNAUTHORIZED);
    let (_, kept_token) = owner.create_token("frontend", "kept").await;
    assert!(parapet.terminate().await.success());
    parapet.restart();
    parapet.wait_until_ready().await;
    assert_eq!(parapet.features_status(&secret).await, StatusCode::UNAUTHORIZED);
    let frontend = kept_token["secret"].as_str().unwrap();
    assert_eq!(parapet.get("/api/frontend", frontend).await.0, StatusCode::OK);

    // The session survives the restart, and the audit log contains every step.
    let events = owner.get("/api/admin/events?limit=1000").await;
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for event in events["events"].as_array().unwrap() {
        *kinds.entry(event["type"].as_str().unwrap()).or_default() += 1;
    }
    assert_eq!(kinds["api-token-updated"], 2);
    assert_eq!(kinds["api-token-deleted"], 1);
    assert!(kinds["api-token-created"] >= 2 && kinds["user-signed-in"] == 1, "{kinds:?}");
    assert!(!events.to_string().contains(&secret));
    let deleted = owner.get("/api/admin/events?type=api-token-deleted").await;
    assert_eq!(deleted["events"][0]["createdBy"], OWNER);
    assert_eq!(deleted["events"][0]["preData"]["tokenName"], "checkout");
    if let Some(name) = place.database_name() {
        let dump = Postgres::shared().await.dump(name).await;
        assert!(dump.contains("checkout"), "the dump is of this database");
        secret_leak_check::assert_none_in(
            "the database",
            &[("its dump".to_owned(), dump.into_bytes())],
        );
    }
}

#[tokio::test]
async fn token_lifecycle_on_sqlite() {
    token_lifecycle(DatabaseKind::Sqlite).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL"]
async fn token_lifecycle_on_postgresql() {
    token_lifecycle(DatabaseKind::Postgres).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL"]
async fn token_deleted_on_one_instance_is_rejected_by_the_other() {
    let place = Installation::new(DatabaseKind::Postgres).await;
    let (one, other) = tokio::join!(place.start(), place.start());
    let owner = sign_in(&one, OWNER, PASSWORD).await.unwrap();
    let accounts = owner.get("/api/admin/user-admin").await;
    assert_eq!(accounts["users"].as_array().unwrap().len(), 1, "one of two starts makes it");
    let (_, made) = owner.create_token("client", "shared").await;
    let secret = made["secret"].as_str().unwrap();
    let at_other = async |expect| {
        wait_until("the other instance has noticed", Duration::from_secs(10), async || {
            (other.features_status(secret).await == expect).then_some(())
        })
        .await;
    };
    at_other(StatusCode::OK).await;
    let path = format!("/api/admin/api-tokens/{}", identifier(&owner, "shared").await);
    assert_eq!(owner.call(Method::DELETE, &path, &Value::Null).await.0, StatusCode::OK);
    at_other(StatusCode::UNAUTHORIZED).await;
    // A session of one instance is valid on the other.
    let there = Session { url: other.admin_url(), cookies: owner.cookies.clone() };
    assert_eq!(there.get("/api/admin/user").await["user"]["username"], OWNER);
}

#[tokio::test]
async fn edge_uses_standalone_as_upstream_like_unleash() {
    const ADMIN: &str = "*:*.seeded-admin-for-an-edge-0123456789";
    secret_leak_check::register(ADMIN);
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let flags = place.folder.path().join("flags.json");
    let standalone = Parapet::mode("standalone")
        .flag("--flags", flags)
        .flag("--metrics-interval-seconds", "1")
        .env("INIT_ADMIN_API_TOKENS", ADMIN)
        .env("UNLEASH_DEFAULT_ADMIN_PASSWORD", PASSWORD)
        .start()
        .await;
    let owner = sign_in(&standalone, OWNER, PASSWORD).await.unwrap();
    let edge = Parapet::edge(&standalone.admin_url())
        .admin_token(ADMIN)
        .with_short_intervals()
        .start()
        .await;
    let (_, made) = owner.create_token("client", "behind the edge").await;
    let secret = made["secret"].as_str().unwrap();
    assert_eq!(edge.features_status(secret).await, StatusCode::OK);
    edge.report_usage(secret, "far", &json!({ "first": { "yes": 5, "no": 0 } })).await;
    wait_until("the usage has come through", Duration::from_mins(1), async || {
        let usage = owner.get("/api/admin/client-metrics/features/first/raw").await;
        let hours = usage["data"].as_array().unwrap().iter();
        (hours.map(|hour| hour["yes"].as_u64().unwrap()).sum::<u64>() == 5).then_some(())
    })
    .await;
    let path = format!("/api/admin/api-tokens/{}", identifier(&owner, "behind%20the%20edge").await);
    assert_eq!(owner.call(Method::DELETE, &path, &Value::Null).await.0, StatusCode::OK);
    wait_until("the edge refuses it", Duration::from_mins(1), async || {
        (edge.features_status(secret).await == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
}

/// Through an edge in front of the standalone, with the session that was started there.
#[tokio::test]
async fn token_is_created_used_and_deleted_through_edge_that_relays_to_standalone() {
    const ADMIN: &str = "*:*.seeded-admin-for-a-relay-0123456789";
    secret_leak_check::register(ADMIN);
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let flags = place.folder.path().join("flags.json");
    let standalone = Parapet::mode("standalone")
        .flag("--flags", flags)
        .flag("--proxy-trusted-servers", "127.0.0.1")
        .arg("--trust-proxy")
        .env("INIT_ADMIN_API_TOKENS", ADMIN)
        .env("UNLEASH_DEFAULT_ADMIN_PASSWORD", PASSWORD)
        .start()
        .await;
    let edge = Parapet::edge(&standalone.admin_url()).admin_token(ADMIN).arg("--admin-relay");
    // Intervals are too long to explain what this test sees.
    let edge = edge.flag("--token-list-interval-seconds", "3600").start().await;

    let owner = sign_in(&edge, OWNER, PASSWORD).await.unwrap();
    let foreign = [("cookie", owner.cookies.as_str()), ("origin", "http://evil.example")];
    let token = json!({ "tokenName": "x", "type": "client" });
    let refused = owner.call_as(Method::POST, "/api/admin/api-tokens", &token, &foreign).await;
    assert_eq!(refused.0, StatusCode::FORBIDDEN, "{}", refused.1);
    let (status, made) = owner.create_token("client", "through the edge").await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let secret = made["secret"].as_str().unwrap();
    assert_eq!(edge.features_status(secret).await, StatusCode::OK);
    let path =
        format!("/api/admin/api-tokens/{}", identifier(&owner, "through%20the%20edge").await);
    assert_eq!(owner.call(Method::DELETE, &path, &Value::Null).await.0, StatusCode::OK);
    assert_eq!(edge.features_status(secret).await, StatusCode::UNAUTHORIZED);
    assert_eq!(standalone.features_status(secret).await, StatusCode::UNAUTHORIZED);
    let deleted = owner.get("/api/admin/events?type=api-token-deleted").await;
    assert_eq!(deleted["events"][0]["createdBy"], OWNER);
    assert_eq!(owner.call(Method::POST, "/logout", &Value::Null).await.0, StatusCode::NO_CONTENT);
    let status = owner.call(Method::GET, "/api/admin/user", &Value::Null).await.0;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
}
