//! Tokens are created and revoked upstream, and the edge notices within its configured interval.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::json;

use crate::rig::{
    ChaosProxy, Fault, LogEvent, Parapet, Setup, TokenKind, Unleash, UnleashVersion, http,
    wait_until,
};

const ENVIRONMENT: &str = "development";

/// Many times the interval of 0.5 s, and far below every default.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Unleash's own servers accept a revoked token for up to a minute.
const UNLEASH_REVOCATION_TIMEOUT: Duration = Duration::from_secs(90);

/// An edge that polls the list at its interval, as without Unleash's event log.
fn edge_that_polls(url: &str) -> Setup {
    Parapet::edge(url).flag("--upstream-mode", "poll")
}

async fn flags_status(parapet: &Parapet, kind: TokenKind, token: &str) -> StatusCode {
    let path = match kind {
        TokenKind::Backend => "/api/client/features",
        TokenKind::Frontend => "/api/frontend",
    };
    parapet.get(path, token).await.0
}

async fn wait_for_status(
    parapet: &Parapet,
    token: &str,
    kind: TokenKind,
    expect: StatusCode,
    limit: Duration,
) {
    wait_until(&format!("a {kind:?} token gets {expect}"), limit, async || {
        (flags_status(parapet, kind, token).await == expect).then_some(())
    })
    .await;
}

/// The path of Unleash's token list.
const TOKEN_LIST_PATH: &str = "/api/admin/api-tokens";

/// The number of its items that could not be parsed.
const UNREADABLE_ITEMS: &str = "parapet_token_list_items_unreadable";

/// The path with which an edge checks whether a client token is accepted.
const PROBE_PATH: &str = "/api/client/features/parapet-asks-for-nothing";

/// Waits for a read of the token list that starts after this call.
async fn wait_for_token_list(parapet: &Parapet) {
    wait_for_token_lists(parapet, "ok", 2.0).await;
}

/// Waits for `more` further reads of the token list with this outcome.
async fn wait_for_token_lists(parapet: &Parapet, outcome: &str, more: f64) {
    let sample =
        format!("parapet_upstream_requests_total{{purpose=\"list_tokens\",outcome=\"{outcome}\"}}");
    let count = async || parapet.metric(&sample).await.unwrap_or_default();
    let before = count().await;
    wait_until(&format!("the token list is read, {outcome}"), TIMEOUT, async || {
        (count().await >= before + more).then_some(())
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn new_and_revoked_tokens_are_noticed_within_the_list_interval() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let edge = edge_that_polls(&unleash.url())
            .admin_token(unleash.admin_token())
            .with_short_intervals();
        let parapet = edge.flag("--fleet-name", "revocation").start().await;
        for kind in [TokenKind::Backend, TokenKind::Frontend] {
            let token = unleash.create_token(kind, ENVIRONMENT, &["*"], "revocation").await;
            wait_for_status(&parapet, &token, kind, StatusCode::OK, TIMEOUT).await;
            wait_for_token_list(&parapet).await;
            unleash.delete_token(&token).await;
            wait_for_status(&parapet, &token, kind, StatusCode::UNAUTHORIZED, TIMEOUT).await;
            // Unleash itself would still validate it, so a restarted edge must not ask.
            assert!(parapet.terminate().await.success());
            parapet.restart();
            parapet.wait_until_ready().await;
            assert_eq!(flags_status(&parapet, kind, &token).await, StatusCode::UNAUTHORIZED);

            let later = format!("*:{ENVIRONMENT}.revocation-made-after-its-first-refusal-{kind:?}");
            assert_eq!(flags_status(&parapet, kind, &later).await, StatusCode::UNAUTHORIZED);
            unleash.insert_token(kind, &later, "revocation-later").await;
            wait_for_status(&parapet, &later, kind, StatusCode::OK, TIMEOUT).await;
        }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn token_created_and_revoked_between_two_lists_is_rejected() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let edge = edge_that_polls(&unleash.url()).admin_token(unleash.admin_token());
        let edge = edge.flag("--fleet-name", "between").flag("--token-list-interval-seconds", "5");
        let parapet = edge.start().await;
        let token = unleash
            .create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "revocation-between")
            .await;
        assert_eq!(flags_status(&parapet, TokenKind::Backend, &token).await, StatusCode::OK);
        unleash.delete_token(&token).await;
        let refused = StatusCode::UNAUTHORIZED;
        wait_for_status(&parapet, &token, TokenKind::Backend, refused, UNLEASH_REVOCATION_TIMEOUT)
            .await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn revoked_token_is_rejected_without_admin_token_once_unleash_rejects_it() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let configured =
            unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "revocation-given").await;
        let edge =
            edge_that_polls(&unleash.url()).env("TOKENS", &configured).with_short_intervals();
        let parapet = edge.flag("--token-revalidation-interval-seconds", "0.5").start().await;
        let kinds = [TokenKind::Backend, TokenKind::Frontend];
        let revoked = kinds.map(async |kind| {
            let token = unleash.create_token(kind, ENVIRONMENT, &["*"], "revocation-without").await;
            assert_eq!(flags_status(&parapet, kind, &token).await, StatusCode::OK);
            unleash.delete_token(&token).await;
            wait_for_status(
                &parapet,
                &token,
                kind,
                StatusCode::UNAUTHORIZED,
                UNLEASH_REVOCATION_TIMEOUT,
            )
            .await;
            // `/edge/validate` still lists it as valid.
            let validated = serde_json::json!({ "tokens": [token] }).to_string();
            let validate = http().post(unleash.url() + "/edge/validate");
            let validate = validate.header("Content-Type", "application/json").body(validated);
            assert!(validate.send().await.unwrap().text().await.unwrap().contains(&token));
            token
        });
        let revoked = futures_util::future::join_all(revoked).await;
        assert_eq!(flags_status(&parapet, TokenKind::Backend, &configured).await, StatusCode::OK);
        // Another edge, which has never seen the token, does not trust that either.
        let other = edge_that_polls(&unleash.url())
            .env("TOKENS", &configured)
            .with_short_intervals()
            .start()
            .await;
        for (kind, token) in kinds.into_iter().zip(revoked) {
            assert_eq!(flags_status(&other, kind, &token).await, StatusCode::UNAUTHORIZED);
        }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn rejected_token_is_revalidated_after_the_invalid_token_ttl() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let proxy = ChaosProxy::start(&unleash.url()).await;
        let token =
            unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "revocation-new").await;
        let parapet = edge_that_polls(&proxy.url()).with_short_intervals().start_listening().await;
        // Unleash caches unknown tokens for five minutes, so it must not be queried before the token
        // exists.
        let body = r#"{"tokens":[]}"#;
        proxy.set_fault(Fault::Respond { status: StatusCode::OK, headers: Vec::new(), body }).await;
        assert_eq!(
            flags_status(&parapet, TokenKind::Backend, &token).await,
            StatusCode::UNAUTHORIZED
        );
        proxy.restore().await;
        wait_for_status(&parapet, &token, TokenKind::Backend, StatusCode::OK, TIMEOUT).await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn list_requested_before_a_deletion_does_not_restore_the_deleted_token() {
    let versions = [UnleashVersion::V8, UnleashVersion::V8SecureTokens].map(async |version| {
        let unleash = Unleash::shared(version).await;
        let proxy = ChaosProxy::start(&unleash.url()).await;
        let edge = edge_that_polls(&proxy.url()).admin_token(unleash.admin_token());
        let edge = edge.flag("--fleet-name", "order").flag("--token-list-interval-seconds", "0.5");
        let parapet = edge.arg("--admin-relay").start().await;
        let (used, unused) = (
            unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "order-used").await,
            unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "order-unused").await,
        );
        wait_for_status(&parapet, &used, TokenKind::Backend, StatusCode::OK, TIMEOUT).await;
        wait_for_token_list(&parapet).await;

        proxy.block_response_to(TOKEN_LIST_PATH).await;
        for token in [&used, &unused] {
            let listed_as = token.split_once(".v2_").map_or(&**token, |(_, rest)| &rest[..22]);
            let delete =
                http().delete(format!("{}{TOKEN_LIST_PATH}/{listed_as}", parapet.admin_url()));
            let response = delete.header("authorization", unleash.admin_token()).send().await;
            assert_eq!(response.unwrap().status(), StatusCode::OK);
            let status = flags_status(&parapet, TokenKind::Backend, token).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{version:?}");
        }
        // The blocked list contains both tokens; every later request for it fails.
        let (status_of_lists, body) = (StatusCode::SERVICE_UNAVAILABLE, "");
        proxy
            .set_fault(Fault::RespondToGet { path: TOKEN_LIST_PATH, status: status_of_lists, body })
            .await;
        wait_for_token_lists(&parapet, "failed", 3.0).await;
        for token in [&used, &unused] {
            let status = flags_status(&parapet, TokenKind::Backend, token).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{version:?}");
        }
    });
    futures_util::future::join_all(versions).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn listed_v2_token_sees_the_projects_of_the_list() {
    let unleash = Unleash::shared(UnleashVersion::V8SecureTokens).await;
    unleash.create_enabled_flag("revocation.projects", ENVIRONMENT, &[]).await;
    let proxy = ChaosProxy::start(&unleash.url()).await;
    let edge =
        edge_that_polls(&proxy.url()).admin_token(unleash.admin_token()).with_short_intervals();
    let parapet = edge.flag("--fleet-name", "projects").start().await;
    let token =
        unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "revocation-projects").await;
    let (_, rest) = token.split_once(".v2_").unwrap();
    let sees = async |expect: bool| {
        wait_until(&format!("the flag is seen: {expect}"), TIMEOUT, async || {
            let (status, response) = parapet.get("/api/client/features", &token).await;
            let features = response["features"].as_array().filter(|_| status == StatusCode::OK)?;
            let sees = features.iter().any(|it| it["name"] == "revocation.projects");
            (sees == expect).then_some(())
        })
        .await;
    };
    sees(true).await;
    for (project, expect) in [("another", false), ("default", true), ("another", false)] {
        let body = json!({ "tokens": [{ "secret": &rest[..22], "tokenName": "x",
            "type": "backend", "environment": ENVIRONMENT, "projects": [project], "secure": true }] });
        let (status, body) = (StatusCode::OK, body.to_string().leak());
        proxy.set_fault(Fault::RespondToGet { path: TOKEN_LIST_PATH, status, body }).await;
        sees(expect).await;
    }
    proxy.restore().await;
    sees(true).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn revoked_tokens_are_rejected_while_the_token_list_is_unavailable() {
    let versions = UnleashVersion::ALL.map(async |version| {
        let unleash = Unleash::shared(version).await;
        let proxy = ChaosProxy::start(&unleash.url()).await;
        let edge =
            edge_that_polls(&proxy.url()).admin_token(unleash.admin_token()).with_short_intervals();
        let parapet = edge.flag("--fleet-name", "unreadable").start().await;
        let (doomed, other) = (
            unleash
                .create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "unreadable-doomed")
                .await,
            unleash
                .create_token(TokenKind::Frontend, ENVIRONMENT, &["*"], "unreadable-other")
                .await,
        );
        wait_for_status(&parapet, &doomed, TokenKind::Backend, StatusCode::OK, TIMEOUT).await;
        wait_for_status(&parapet, &other, TokenKind::Frontend, StatusCode::OK, TIMEOUT).await;
        wait_for_token_list(&parapet).await;

        // The response to the edge's admin token after its own deletion.
        let (status_of_lists, body) = (StatusCode::UNAUTHORIZED, "");
        proxy
            .set_fault(Fault::RespondToGet { path: TOKEN_LIST_PATH, status: status_of_lists, body })
            .await;
        unleash.delete_token(&doomed).await;
        let refused = StatusCode::UNAUTHORIZED;
        wait_for_status(&parapet, &doomed, TokenKind::Backend, refused, UNLEASH_REVOCATION_TIMEOUT)
            .await;
        assert_eq!(
            flags_status(&parapet, TokenKind::Frontend, &other).await,
            StatusCode::OK,
            "{version:?}"
        );
    });
    futures_util::future::join_all(versions).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn new_token_stays_valid_while_the_list_is_unavailable_and_validation_lags() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let proxy = ChaosProxy::start(&unleash.url()).await;
    let edge =
        edge_that_polls(&proxy.url()).admin_token(unleash.admin_token()).with_short_intervals();
    let parapet = edge.flag("--fleet-name", "lag").start().await;
    // Unleash caches for five minutes that the token is unknown.
    let token = format!("*:{ENVIRONMENT}.revocation-made-after-its-first-refusal-lag");
    assert_eq!(flags_status(&parapet, TokenKind::Backend, &token).await, StatusCode::UNAUTHORIZED);
    unleash.insert_token(TokenKind::Backend, &token, "revocation-lag").await;
    wait_for_status(&parapet, &token, TokenKind::Backend, StatusCode::OK, TIMEOUT).await;
    wait_until("Unleash's API takes the token", UNLEASH_REVOCATION_TIMEOUT, async || {
        let fetch = http().get(unleash.url() + "/api/client/features");
        let response = fetch.header("authorization", &token).send().await.unwrap();
        response.status().is_success().then_some(())
    })
    .await;

    let (status_of_lists, body) = (StatusCode::UNAUTHORIZED, "");
    proxy
        .set_fault(Fault::RespondToGet { path: TOKEN_LIST_PATH, status: status_of_lists, body })
        .await;
    let questions = async || {
        let seen = proxy.requests().into_iter().filter(|it| it.path == "/edge/validate");
        seen.filter(|it| String::from_utf8_lossy(&it.body).contains(&token)).count()
    };
    let before = questions().await;
    // A denial counts once it is repeated.
    wait_until("the token is checked repeatedly", 3 * TIMEOUT, async || {
        (questions().await >= before + 4).then_some(())
    })
    .await;
    assert_eq!(flags_status(&parapet, TokenKind::Backend, &token).await, StatusCode::OK);
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn malformed_list_item_revokes_no_token() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let proxy = ChaosProxy::start(&unleash.url()).await;
    let edge =
        edge_that_polls(&proxy.url()).admin_token(unleash.admin_token()).with_short_intervals();
    let parapet = edge.flag("--fleet-name", "item").start().await;
    let [unnamed, named, doomed] =
        ["item-unnamed", "item-named", "item-doomed"].map(async |name| {
            unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], name).await
        });
    let (unnamed, named, doomed) = tokio::join!(unnamed, named, doomed);
    for token in [&unnamed, &named, &doomed] {
        wait_for_status(&parapet, token, TokenKind::Backend, StatusCode::OK, TIMEOUT).await;
    }
    wait_for_token_list(&parapet).await;
    let item = |secret: &serde_json::Value, kind: &str| json!({ "secret": secret, "tokenName": "x", "type": kind, "environment": ENVIRONMENT, "projects": ["*"] });
    let listed = async |items: serde_json::Value| {
        let body = json!({ "tokens": items }).to_string().leak();
        let status = StatusCode::OK;
        proxy.set_fault(Fault::RespondToGet { path: TOKEN_LIST_PATH, status, body }).await;
        wait_for_token_lists(&parapet, "ok", 3.0).await;
    };
    // An item that names its token does not affect others: missing tokens are revoked.
    let readable = item(&json!(unnamed), "client");
    listed(json!([readable, item(&json!(named), "of-a-later-release")])).await;
    for (token, expect) in
        [(&unnamed, StatusCode::OK), (&named, StatusCode::OK), (&doomed, StatusCode::UNAUTHORIZED)]
    {
        assert_eq!(flags_status(&parapet, TokenKind::Backend, token).await, expect);
    }
    assert_eq!(parapet.metric(UNREADABLE_ITEMS).await, Some(1.0));

    // An item that names none may stand for any token, which is then checked instead of revoked.
    listed(json!([item(&json!(named), "client"), item(&json!(7), "client")])).await;
    for token in [&unnamed, &named] {
        assert_eq!(flags_status(&parapet, TokenKind::Backend, token).await, StatusCode::OK);
    }
    assert_eq!(parapet.metric(UNREADABLE_ITEMS).await, Some(1.0));
    assert_eq!(parapet.logged(LogEvent::warn("auth::").with("unreadable")).len(), 1);
    unleash.delete_token(&unnamed).await;
    let refused = StatusCode::UNAUTHORIZED;
    wait_for_status(&parapet, &unnamed, TokenKind::Backend, refused, UNLEASH_REVOCATION_TIMEOUT)
        .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn token_forbidden_upstream_gets_403_from_the_cache() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let first =
        edge_that_polls(&unleash.url()).admin_token(unleash.admin_token()).with_short_intervals();
    let first =
        first.flag("--fleet-name", "forbidden").flag("--environments", ENVIRONMENT).start().await;
    let proxy = ChaosProxy::start(&first.url()).await;
    let here =
        unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "forbidden-here").await;
    let kinds = [TokenKind::Backend, TokenKind::Frontend];
    let elsewhere =
        kinds.map(async |kind| unleash.create_token(kind, "production", &["*"], "forbidden").await);
    let elsewhere = futures_util::future::join_all(elsewhere).await;
    for (kind, token) in kinds.into_iter().zip(&elsewhere) {
        wait_for_status(&first, token, kind, StatusCode::FORBIDDEN, TIMEOUT).await;
    }

    // Among several configured tokens it does not delay readiness for ever.
    let edge = edge_that_polls(&proxy.url()).env("TOKENS", format!("{},{here}", elsewhere[0]));
    let parapet = edge.flag("--features-refresh-interval-seconds", "0.5").start().await;
    assert_eq!(flags_status(&parapet, TokenKind::Backend, &here).await, StatusCode::OK);
    for (kind, token) in kinds.into_iter().zip(&elsewhere) {
        let first_time = flags_status(&parapet, kind, token).await;
        assert_eq!(first_time, StatusCode::FORBIDDEN, "{kind:?}");
        let requests_before = proxy.request_count("/edge/validate");
        for _ in 0..20 {
            assert_eq!(flags_status(&parapet, kind, token).await, StatusCode::FORBIDDEN);
        }
        assert_eq!(proxy.request_count("/edge/validate"), requests_before, "it is remembered");
    }
    // A third edge gets the second edge's result from it.
    let validated = json!({ "tokens": elsewhere }).to_string();
    let validate = http().post(parapet.url() + "/edge/validate").body(validated).send().await;
    let validated = validate.unwrap().text().await.unwrap();
    assert!(elsewhere.iter().all(|token| validated.contains(token)), "{validated}");
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn client_token_for_all_environments_gets_403_as_from_unleash() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let proxy = ChaosProxy::start(&unleash.url()).await;
    let configured =
        unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "every-given").await;
    let token = "*:*.revocation-client-of-every-environment";
    unleash.insert_token(TokenKind::Backend, token, "every").await;
    let parapet = edge_that_polls(&proxy.url()).env("TOKENS", &configured).start().await;
    let (status, response) = parapet.get("/api/client/features", token).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    let message = "upstream knows this token and refuses it (403): \
                   it may not serve the token's environment";
    assert_eq!(
        (&response["name"], &response["message"]),
        (&"NoAccessError".into(), &message.into())
    );
    let requests_before = proxy.requests().len();
    for _ in 0..20 {
        assert_eq!(parapet.features_status(token).await, StatusCode::FORBIDDEN);
    }
    let asked_again = proxy.requests().split_off(requests_before);
    assert!(asked_again.iter().all(|it| it.path != "/edge/validate"), "{asked_again:?}");
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn forbidden_token_is_accepted_once_upstream_serves_its_environment() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let proxy = ChaosProxy::start(&unleash.url()).await;
    let token =
        unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "forbidden-first").await;
    let (forbidden, body) = (StatusCode::FORBIDDEN, "");
    let configured =
        unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "forbidden-given").await;
    let edge = || edge_that_polls(&proxy.url()).env("TOKENS", &configured).with_short_intervals();
    let parapet = edge().start().await;
    proxy.set_fault(Fault::RespondToGet { path: PROBE_PATH, status: forbidden, body }).await;
    assert_eq!(flags_status(&parapet, TokenKind::Backend, &token).await, StatusCode::FORBIDDEN);
    proxy.restore().await;
    wait_for_status(&parapet, &token, TokenKind::Backend, StatusCode::OK, TIMEOUT).await;
    // A 403 does not cut off a token in use: only a 401 means that it has been revoked.
    let edge = edge().flag("--token-revalidation-interval-seconds", "0.5").start().await;
    wait_for_status(&edge, &token, TokenKind::Backend, StatusCode::OK, TIMEOUT).await;
    proxy.set_fault(Fault::RespondToGet { path: PROBE_PATH, status: forbidden, body }).await;
    let requests_before = proxy.request_count(PROBE_PATH);
    wait_until("it is checked repeatedly", TIMEOUT, async || {
        (proxy.request_count(PROBE_PATH) >= requests_before + 4).then_some(())
    })
    .await;
    assert_eq!(flags_status(&edge, TokenKind::Backend, &token).await, StatusCode::OK);
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn token_list_is_not_read_before_retry_after() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let proxy = ChaosProxy::start(&unleash.url()).await;
    let edge =
        edge_that_polls(&proxy.url()).admin_token(unleash.admin_token()).with_short_intervals();
    let parapet = edge.flag("--fleet-name", "retry-after").start().await;
    proxy.respond_with(StatusCode::TOO_MANY_REQUESTS, &[("retry-after", "3")]).await;
    let lists = || proxy.requests().iter().filter(|it| it.path == TOKEN_LIST_PATH).count();
    let (started, before) = (Instant::now(), lists());
    wait_until("the list is requested three times", UNLEASH_REVOCATION_TIMEOUT, async || {
        (lists() >= before + 3).then_some(())
    })
    .await;
    assert!(started.elapsed() >= Duration::from_secs(2 * 3), "{}", parapet.log());
    proxy.restore().await;
    wait_for_token_list(&parapet).await;
}
