//! With an admin token, an edge follows Unleash's event log: it requests what changed, and nothing else.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::json;

use crate::rig::{
    ChaosProxy, Fault, LogEvent, Parapet, Setup, TokenKind, Unleash, UnleashVersion, wait_until,
};

const TIMEOUT: Duration = Duration::from_mins(1);

const EVENT_LOG: &str = "/api/admin/search/events";
const TOKENS: &str = "/api/admin/api-tokens";
const ENVIRONMENTS: &str = "/api/admin/environments";
const FEATURES: &str = "/api/client/features";
const STREAM: &str = "/api/client/streaming";
const USAGE: &str = "/api/client/metrics/bulk";

const AGE: &str = r#"parapet_snapshot_age_seconds{environment="development"}"#;

/// An edge whose intervals are the default ones divided by 30: half a second for flags and tokens, and two
/// seconds for usage.
fn edge(url: &str, unleash: &Unleash, fleet: &str) -> Setup {
    let edge = Parapet::edge(url).admin_token(unleash.admin_token()).flag("--fleet-name", fleet);
    let edge = edge.flag("--features-refresh-interval-seconds", "0.5");
    edge.flag("--token-list-interval-seconds", "0.5").flag("--metrics-interval-seconds", "2")
}

/// Waits until the event log was read `more` times from now on.
async fn wait_for_reads(proxy: &ChaosProxy, more: usize) {
    let enough = proxy.request_count(EVENT_LOG) + more;
    wait_until("the event log is read", TIMEOUT, async || {
        (proxy.request_count(EVENT_LOG) >= enough).then_some(())
    })
    .await;
}

/// The number of requests for everything that the event log tells about.
fn polls(proxy: &ChaosProxy) -> usize {
    [TOKENS, ENVIRONMENTS, FEATURES, STREAM].map(|path| proxy.request_count(path)).iter().sum()
}

/// Waits until nothing but the event log is read: changes are polled again after some seconds.
async fn wait_until_quiet(proxy: &ChaosProxy) {
    wait_until("only the event log is read", TIMEOUT, async || {
        let before = polls(proxy);
        wait_for_reads(proxy, 10).await;
        (polls(proxy) == before).then_some(())
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn idle_edge_asks_for_events_and_sends_usage_only() {
    for version in [UnleashVersion::V7, UnleashVersion::V8] {
        // Its own server: changes of other tests are events too.
        let unleash = Unleash::start(version).await;
        unleash.create_enabled_flag("first", "development", &[]).await;
        let token = unleash.create_token(TokenKind::Backend, "development", &["*"], "sdk").await;
        let proxy = ChaosProxy::start(&unleash.url()).await;
        let parapet = edge(&proxy.url(), &unleash, "idle").start().await;
        parapet.wait_until_served(&token, &["first"]).await;
        parapet.report_usage(&token, "idle", &json!({ "first": { "yes": 1, "no": 0 } })).await;
        // Unleash logs that it has seen a new application.
        unleash.wait_for_usage("first", "idle", "development", (1, 0)).await;
        wait_until_quiet(&proxy).await;

        let count = |path| proxy.request_count(path);
        let (events, usage, others) = (count(EVENT_LOG), count(USAGE), polls(&proxy));
        wait_until("usage is sent", TIMEOUT, async || {
            parapet.report_usage(&token, "idle", &json!({ "first": { "yes": 1, "no": 0 } })).await;
            (count(USAGE) >= usage + 5).then_some(())
        })
        .await;
        let (events, usage) = (count(EVENT_LOG) - events, count(USAGE) - usage);
        assert_eq!(polls(&proxy), others, "{:?}", proxy.requests());
        assert_eq!(parapet.served_flags(&token).await, Ok(vec!["first".to_owned()]));
        // Four events to one usage at the default intervals, give or take a request under way.
        assert!(events <= 5 * usage + 5, "{events} {usage}");
        assert!(parapet.metric(AGE).await.unwrap() < 30.0, "the log confirms the flags");
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn changes_are_requested_when_they_are_logged() {
    for version in [UnleashVersion::V7, UnleashVersion::V8, UnleashVersion::V8SecureTokens] {
        let unleash = Unleash::start(version).await;
        let [sdk, other] = ["sdk", "other"];
        let sdk = unleash.create_token(TokenKind::Backend, "development", &["*"], sdk).await;
        let other = unleash.create_token(TokenKind::Frontend, "development", &["*"], other).await;
        let proxy = ChaosProxy::start(&unleash.url()).await;
        let parapet = edge(&proxy.url(), &unleash, "changes").start().await;
        parapet.wait_until_served(&sdk, &[]).await;
        assert_eq!(parapet.get("/api/frontend", &other).await.0, StatusCode::OK);
        wait_until_quiet(&proxy).await;

        let lists = proxy.request_count(TOKENS);
        unleash.create_enabled_flag("new", "development", &[]).await;
        parapet.wait_until_served(&sdk, &["new"]).await;
        unleash.create_segment("segment", &json!([])).await;
        wait_until_quiet(&proxy).await;
        assert_eq!(proxy.request_count(TOKENS), lists, "only flags changed");

        unleash.delete_token(&other).await;
        wait_until("the token is rejected", TIMEOUT, async || {
            let (status, _) = parapet.get("/api/frontend", &other).await;
            (status == StatusCode::UNAUTHORIZED).then_some(())
        })
        .await;
        assert_eq!(parapet.features_status(&sdk).await, StatusCode::OK);

        unleash.admin_delete("/api/admin/projects/default/features/new").await;
        parapet.wait_until_served(&sdk, &[]).await;
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn without_the_event_log_flags_and_tokens_are_polled() {
    let unleash = Unleash::start(UnleashVersion::V8).await;
    let sdk = unleash.create_token(TokenKind::Backend, "development", &["*"], "sdk").await;
    let other = unleash.create_token(TokenKind::Frontend, "development", &["*"], "other").await;
    let proxy = ChaosProxy::start(&unleash.url()).await;
    for status in [StatusCode::FORBIDDEN, StatusCode::BAD_GATEWAY] {
        proxy.set_fault(Fault::RespondToGet { path: EVENT_LOG, status, body: "" }).await;
        let parapet = edge(&proxy.url(), &unleash, "without").start().await;
        parapet.wait_until_logged(LogEvent::info("event_log").with("error")).await;
        let name = format!("flag-{}", status.as_u16());
        unleash.create_enabled_flag(&name, "development", &[]).await;
        wait_until("the flag is served", TIMEOUT, async || {
            parapet.served_flags(&sdk).await.is_ok_and(|flags| flags.contains(&name)).then_some(())
        })
        .await;
        let (lists, features) = (proxy.request_count(TOKENS), proxy.request_count(FEATURES));
        wait_until("tokens and flags are polled on", TIMEOUT, async || {
            let is_polled = proxy.request_count(TOKENS) >= lists + 3
                && proxy.request_count(FEATURES) >= features + 3;
            is_polled.then_some(())
        })
        .await;
        if status == StatusCode::BAD_GATEWAY {
            proxy.restore().await;
            wait_until_quiet(&proxy).await;
            // It fails later, too.
            proxy.set_fault(Fault::RespondToGet { path: EVENT_LOG, status, body: "" }).await;
            unleash.delete_token(&other).await;
            wait_until("the token is rejected", TIMEOUT, async || {
                let (status, _) = parapet.get("/api/frontend", &other).await;
                (status == StatusCode::UNAUTHORIZED).then_some(())
            })
            .await;
        } else {
            assert_eq!(parapet.get("/api/frontend", &other).await.0, StatusCode::OK);
            assert_eq!(proxy.request_count(EVENT_LOG), 1, "a refusal is not asked for again");
        }
        parapet.terminate().await;
    }
}
