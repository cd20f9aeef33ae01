//! Tokens come and go upstream, and the edge follows within the interval that it was given.

use std::sync::Arc;
use std::time::Duration;

use reqwest::StatusCode;

use crate::rig::{ChaosProxy, Fault, Kind, Parapet, Unleash, http, until};

const HERE: &str = "development";

/// Many times the interval of half a second, and far below every default.
const WITHIN: Duration = Duration::from_secs(10);

/// Unleash's own servers believe a revoked token for up to a minute.
const WITHIN_UNLEASHS_MINUTE: Duration = Duration::from_secs(90);

async fn status(parapet: &Parapet, kind: Kind, token: &str) -> StatusCode {
    let path = match kind {
        Kind::Backend => "/api/client/features",
        Kind::Frontend => "/api/frontend",
    };
    parapet.get(path, token).await.0
}

async fn wait_for(parapet: &Parapet, token: &str, kind: Kind, expect: StatusCode, limit: Duration) {
    until(&format!("a {kind:?} token gets {expect}"), limit, async || {
        (status(parapet, kind, token).await == expect).then_some(())
    })
    .await;
}

/// Waits until a reading of the token list that began after now has ended.
async fn wait_until_listed(parapet: &Parapet) {
    const READINGS: &str =
        "parapet_upstream_requests_total{purpose=\"list_tokens\",outcome=\"ok\"}";
    let before = parapet.metric(READINGS).await.unwrap();
    until("the token list is read", WITHIN, async || {
        (parapet.metric(READINGS).await.unwrap() >= before + 2.0).then_some(())
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn with_an_admin_token_revoked_and_new_tokens_are_noticed_within_the_list_interval() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let edge = Parapet::edge(&unleash.url()).admin_token(unleash.admin_token()).impatient();
        let parapet = edge.flag("--fleet-name", "revocation").start().await;
        for kind in [Kind::Backend, Kind::Frontend] {
            let token = unleash.create_token(kind, HERE, &["*"], "revocation").await;
            wait_for(&parapet, &token, kind, StatusCode::OK, WITHIN).await;
            wait_until_listed(&parapet).await;
            unleash.delete_token(&token).await;
            wait_for(&parapet, &token, kind, StatusCode::UNAUTHORIZED, WITHIN).await;
            // Unleash itself would still vouch for it; a restart must not ask.
            assert!(parapet.terminate().await.success());
            parapet.restart();
            parapet.wait_until_ready().await;
            assert_eq!(status(&parapet, kind, &token).await, StatusCode::UNAUTHORIZED);

            let later = format!("*:{HERE}.revocation-made-after-its-first-refusal-{kind:?}");
            assert_eq!(status(&parapet, kind, &later).await, StatusCode::UNAUTHORIZED);
            unleash.plant_token(kind, &later, "revocation-later").await;
            wait_for(&parapet, &later, kind, StatusCode::OK, WITHIN).await;
        }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn a_token_that_came_and_went_between_two_readings_of_the_list_is_refused_too() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let edge = Parapet::edge(&unleash.url()).admin_token(unleash.admin_token());
        let edge = edge.flag("--fleet-name", "between").flag("--token-list-interval-seconds", "5");
        let parapet = edge.start().await;
        let token = unleash.create_token(Kind::Backend, HERE, &["*"], "revocation-between").await;
        assert_eq!(status(&parapet, Kind::Backend, &token).await, StatusCode::OK);
        unleash.delete_token(&token).await;
        let refused = StatusCode::UNAUTHORIZED;
        wait_for(&parapet, &token, Kind::Backend, refused, WITHIN_UNLEASHS_MINUTE).await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn without_an_admin_token_a_revoked_token_is_refused_when_unleash_refuses_it() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let given = unleash.create_token(Kind::Backend, HERE, &["*"], "revocation-given").await;
        let edge = Parapet::edge(&unleash.url()).env("TOKENS", &given).impatient();
        let parapet = edge.flag("--token-revalidation-interval-seconds", "0.5").start().await;
        let kinds = [Kind::Backend, Kind::Frontend];
        let revoked = kinds.map(async |kind| {
            let token = unleash.create_token(kind, HERE, &["*"], "revocation-without").await;
            assert_eq!(status(&parapet, kind, &token).await, StatusCode::OK);
            unleash.delete_token(&token).await;
            wait_for(&parapet, &token, kind, StatusCode::UNAUTHORIZED, WITHIN_UNLEASHS_MINUTE)
                .await;
            // `/edge/validate` goes on vouching for it.
            let validated = serde_json::json!({ "tokens": [token] }).to_string();
            let validate = http().post(unleash.url() + "/edge/validate");
            let validate = validate.header("Content-Type", "application/json").body(validated);
            assert!(validate.send().await.unwrap().text().await.unwrap().contains(&token));
            token
        });
        let revoked = futures_util::future::join_all(revoked).await;
        assert_eq!(status(&parapet, Kind::Backend, &given).await, StatusCode::OK);
        // Neither does an edge believe that to which they are new.
        let other = Parapet::edge(&unleash.url()).env("TOKENS", &given).impatient().start().await;
        for (kind, token) in kinds.into_iter().zip(revoked) {
            assert_eq!(status(&other, kind, &token).await, StatusCode::UNAUTHORIZED);
        }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn without_an_admin_token_a_refused_token_is_asked_for_again_after_the_invalid_token_ttl() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let proxy = ChaosProxy::start(&unleash.url()).await;
        let token = unleash.create_token(Kind::Backend, HERE, &["*"], "revocation-new").await;
        let parapet = Parapet::edge(&proxy.url()).impatient().start_listening().await;
        // Unleash remembers for five minutes which tokens it did not know, so it is not asked while it does not.
        let body = r#"{"tokens":[]}"#;
        proxy.set(Fault::Answer { status: StatusCode::OK, headers: Vec::new(), body }).await;
        assert_eq!(status(&parapet, Kind::Backend, &token).await, StatusCode::UNAUTHORIZED);
        proxy.restore().await;
        wait_for(&parapet, &token, Kind::Backend, StatusCode::OK, WITHIN).await;
    })
    .await;
}
