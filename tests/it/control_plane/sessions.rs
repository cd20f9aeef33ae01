//! Signing in, sessions and their end, and floods of wrong passwords.

use std::collections::BTreeMap;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{DatabaseKind, Installation, NEW_PASSWORD, OWNER, PASSWORD, sign_in, sign_in_with};
use crate::rig::secret_leak_check;

/// Attempts that fail because of the database do not count, neither to sign in nor to change the own
/// password. With the right password both work as soon as the database does.
async fn database_failure_costs_no_attempts(database_kind: DatabaseKind) {
    let place = Installation::new(database_kind).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let attempt = async |password| sign_in(&parapet, OWNER, password).await.map(drop);
    let change = json!({ "oldPassword": PASSWORD, "password": PASSWORD });
    let change =
        async || owner.call(Method::POST, "/api/admin/user/change-password", &change).await;

    place.set_accounts_unavailable(&parapet, true).await;
    for _ in 0..10 {
        assert_eq!(attempt(PASSWORD).await, Err(StatusCode::SERVICE_UNAVAILABLE));
        assert_eq!(attempt(NEW_PASSWORD).await, Err(StatusCode::SERVICE_UNAVAILABLE));
    }
    place.set_accounts_unavailable(&parapet, false).await;
    assert_eq!(attempt(PASSWORD).await, Ok(()));

    place.set_read_only(&parapet, true).await;
    for _ in 0..10 {
        assert_eq!(attempt(PASSWORD).await, Err(StatusCode::SERVICE_UNAVAILABLE));
        let (status, response) = change().await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{response}");
    }
    place.set_read_only(&parapet, false).await;
    assert_eq!(attempt(PASSWORD).await, Ok(()));
    assert_eq!(change().await.0, StatusCode::OK);

    // Attempts that were checked do count.
    let mut judged = 0;
    while attempt(NEW_PASSWORD).await == Err(StatusCode::UNAUTHORIZED) {
        judged += 1;
    }
    assert!((1..10).contains(&judged), "{judged}");
    assert_eq!(attempt(NEW_PASSWORD).await, Err(StatusCode::TOO_MANY_REQUESTS));
}

#[tokio::test]
async fn database_failure_costs_no_attempts_on_sqlite() {
    database_failure_costs_no_attempts(DatabaseKind::Sqlite).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL"]
async fn database_failure_costs_no_attempts_on_postgresql() {
    database_failure_costs_no_attempts(DatabaseKind::Postgres).await;
}

#[tokio::test]
async fn password_change_ends_sessions_and_cross_origin_changes_are_denied() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let id = owner.create_account("ann", 3).await;
    let ann = sign_in(&parapet, "Ann", PASSWORD).await.unwrap();
    assert_eq!(sign_in(&parapet, "ann", "wrong").await.err(), Some(StatusCode::UNAUTHORIZED));
    assert_eq!(sign_in(&parapet, "nobody", "wrong").await.err(), Some(StatusCode::UNAUTHORIZED));

    // A page of another origin cannot change anything with a user's cookies.
    let token = json!({ "tokenName": "x", "type": "client" });
    for headers in [
        vec![("cookie", owner.cookies.as_str())],
        vec![("cookie", owner.cookies.as_str()), ("origin", "http://evil.example")],
        vec![("cookie", owner.cookies.as_str()), ("sec-fetch-site", "cross-site")],
    ] {
        let response = owner.call_as(Method::POST, "/api/admin/api-tokens", &token, &headers).await;
        assert_eq!(response.0, StatusCode::FORBIDDEN, "{headers:?}");
    }

    secret_leak_check::register(NEW_PASSWORD);
    let path = format!("/api/admin/user-admin/{id}/change-password");
    let (status, response) =
        owner.call(Method::POST, &path, &json!({ "password": NEW_PASSWORD })).await;
    assert_eq!(status, StatusCode::OK, "{response}");
    let status = ann.call(Method::GET, "/api/admin/user", &Value::Null).await.0;
    assert_eq!(status, StatusCode::UNAUTHORIZED, "a new password ends sessions");
    assert_eq!(sign_in(&parapet, "ann", PASSWORD).await.err(), Some(StatusCode::UNAUTHORIZED));
    let ann = sign_in(&parapet, "ann", NEW_PASSWORD).await.unwrap();
    assert_eq!(ann.call(Method::POST, "/logout", &Value::Null).await.0, StatusCode::NO_CONTENT);
    let status = ann.call(Method::GET, "/api/admin/user", &Value::Null).await.0;
    assert_eq!(status, StatusCode::UNAUTHORIZED);

    // The last owner cannot be deleted.
    let (status, _) = owner.call(Method::DELETE, "/api/admin/user-admin/1", &Value::Null).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn floods_of_passwords_and_cookies_do_not_lock_out_the_owner() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let mut seen: BTreeMap<u16, usize> = BTreeMap::new();
    for number in 0..10_000 {
        let status = sign_in(&parapet, OWNER, &format!("guess-{number}-guess")).await.err();
        *seen.entry(status.expect("no attempt succeeds").as_u16()).or_default() += 1;
    }
    assert!(seen[&429] > 9_000 && seen.keys().all(|it| [401, 429].contains(it)), "{seen:?}");
    // The owner's browser is a known device.
    let again = sign_in_with(&parapet, OWNER, PASSWORD, &owner.cookies).await;
    assert!(again.is_ok(), "{:?}", again.err());
    let mut seen: BTreeMap<u16, usize> = BTreeMap::new();
    for number in 0..10_000_u64 {
        let cookie = format!("parapet-session={number:022}.{number:043}");
        let response = owner
            .call_as(Method::GET, "/api/admin/user", &Value::Null, &[("cookie", &cookie)])
            .await;
        *seen.entry(response.0.as_u16()).or_default() += 1;
    }
    assert!(seen[&429] > 5_000 && seen.keys().all(|it| [401, 429].contains(it)), "{seen:?}");
    assert_eq!(owner.get("/api/admin/user").await["user"]["username"], OWNER);
}
