//! Unleash, an edge, a second edge behind it, and SDKs behind the second: changes and usage pass from
//! one end to the other.
//!
//! `upstream_streaming` covers an edge whose upstream's stream fails.

use std::sync::Arc;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::json;

use crate::rig::{LogEvent, Parapet, STORE_TIMEOUT, Sdk, TokenKind, Unleash, http, wait_until};

const ENVIRONMENT: &str = "development";

/// Many times the intervals of 0.5 s, and far below those of an hour.
const TIMEOUT: Duration = Duration::from_mins(1);

/// An edge with Unleash's admin token, and a second edge behind it with its own token, which would poll
/// once an hour.
struct Chain {
    first: Parapet,
    second: Parapet,
    /// The second edge's own token.
    own: String,
}

impl Chain {
    async fn start(unleash: &Unleash, name: &str) -> Self {
        let edge =
            Parapet::edge(&unleash.url()).admin_token(unleash.admin_token()).with_short_intervals();
        let first = edge.flag("--fleet-name", name).start().await;
        let own = unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], name).await;
        let edge = Parapet::edge(&first.url()).env("TOKENS", &own);
        let second = [
            ("--features-refresh-interval-seconds", "3600"),
            ("--token-revalidation-interval-seconds", "0.5"),
            ("--metrics-interval-seconds", "0.5"),
            ("--upstream-request-timeout", "2"),
        ];
        let edge = second.into_iter().fold(edge, |edge, (name, value)| edge.flag(name, value));
        let chain = Self { first, second: edge.start().await, own };
        chain.wait_until_streaming(1).await;
        chain
    }

    /// Waits until the second edge has logged this many times that it follows the first one's stream.
    async fn wait_until_streaming(&self, times: usize) {
        let lines = self.second.wait_until_logged_times(LogEvent::STREAMING, times).await;
        assert_eq!(lines.len(), times);
    }
}

async fn wait_until_sdk_sees(sdk: &mut Sdk, flag: &str, enabled: bool) {
    wait_until(&format!("the SDK sees {flag} {enabled}"), TIMEOUT, async || {
        let flags = sdk.evaluate(json!({})).await;
        flags.get(flag).is_some_and(|it| it.enabled == enabled).then_some(())
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn change_passes_two_edges_without_polling() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let flag = format!("chain.change-{:?}", unleash.version()).to_lowercase();
        unleash.create_enabled_flag(&flag, ENVIRONMENT, &[]).await;
        let chain = Chain::start(&unleash, "chain-change").await;
        let token =
            unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "chain-change").await;
        let mut sdk = Sdk::node_streaming(&chain.second.url(), &token, "chain-change").await;
        wait_until_sdk_sees(&mut sdk, &flag, true).await;
        let before = chain.second.upstream_poll_count().await;
        for enabled in [false, true, false] {
            if enabled {
                unleash.enable(&flag, ENVIRONMENT).await;
            } else {
                unleash.disable(&flag, ENVIRONMENT).await;
            }
            wait_until_sdk_sees(&mut sdk, &flag, enabled).await;
        }
        // After a crash the edge reconnects, and receives what changed meanwhile.
        chain.first.kill();
        unleash.enable(&flag, ENVIRONMENT).await;
        wait_until_sdk_sees(&mut sdk, &flag, false).await;
        chain.first.restart();
        wait_until_sdk_sees(&mut sdk, &flag, true).await;
        chain.wait_until_streaming(2).await;

        assert_eq!(chain.second.upstream_poll_count().await, before, "{}", chain.second.log());
        assert_eq!(sdk.stderr(), "", "nothing of it was seen behind the second");
        // Each of its two environments was requested once at each start, and is polled.
        let lines = chain.first.wait_until_logged_times(LogEvent::POLLING, 2 * 2).await;
        assert_eq!(lines.len(), 2 * 2, "{lines:?}");
        let sample = "parapet_upstream_requests_total{purpose=\"stream\",outcome=\"not_offered\"}";
        assert_eq!(chain.first.metric(sample).await, Some(2.0));
        let warnings = chain.first.logged(LogEvent::warn("sync::").with("transport"));
        assert!(warnings.is_empty(), "that is nothing to worry about: {warnings:?}");
        sdk.close().await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn usage_and_impact_metrics_are_counted_once_behind_two_edges() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let (name, app) = ("chain-usage", "chain-usage-node");
        let flag = format!("chain.usage-{:?}", unleash.version()).to_lowercase();
        unleash.create_enabled_flag(&flag, ENVIRONMENT, &[]).await;
        unleash.wait_until_counted(&flag, ENVIRONMENT).await;
        let chain = Chain::start(&unleash, name).await;
        let backend = unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], name).await;
        let frontend = unleash.create_token(TokenKind::Frontend, ENVIRONMENT, &["*"], name).await;
        let mut node = Sdk::node(&chain.second.url(), &backend, app).await;
        let mut browser = Sdk::frontend(&chain.second.url(), &frontend, "chain-usage-web").await;
        wait_until_sdk_sees(&mut node, &flag, true).await;
        for (uses, add, set, observe) in [(3, 2, 5, 7), (4, 3, 4, 70)] {
            node.use_flag(&flag, uses).await;
            node.record_impact_metrics("chain_impact", add, set, observe).await;
            node.flush().await;
            browser.use_flag(&flag, uses).await;
            browser.flush().await;
        }
        node.use_flag("chain.unknown", 2).await;
        node.flush().await;
        // Once when it has arrived, and again when nothing more can arrive.
        let impact = [
            ("chain_impact_counter", 5.0),
            ("chain_impact_gauge", 4.0),
            ("chain_impact_histogram_bucket +Inf", 2.0),
            ("chain_impact_histogram_bucket 10", 1.0),
            ("chain_impact_histogram_bucket 100", 2.0),
            ("chain_impact_histogram_count", 2.0),
            ("chain_impact_histogram_sum", 77.0),
        ];
        let impact = impact.map(|(series, value)| (series.to_owned(), value)).into();
        for last in [false, true] {
            unleash.wait_for_usage(&flag, app, ENVIRONMENT, (7, 0)).await;
            unleash.wait_for_usage(&flag, "chain-usage-web", ENVIRONMENT, (7, 0)).await;
            wait_until("the impact has arrived", TIMEOUT, async || {
                let measured = unleash.impact_metrics("chain_impact").await;
                let sum = measured.get("chain_impact_counter").copied().unwrap_or_default();
                assert!(sum <= 5.0, "counted too much: {measured:?}");
                (measured == impact).then_some(())
            })
            .await;
            if !last {
                assert!(chain.second.terminate().await.success(), "{}", chain.second.log());
                assert!(chain.first.terminate().await.success(), "{}", chain.first.log());
            }
        }
        wait_until("the application is registered", STORE_TIMEOUT, async || {
            unleash.applications().await.iter().any(|it| it == app).then_some(())
        })
        .await;
        node.close().await;
        browser.close().await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn revoked_token_is_rejected_behind_two_edges_and_its_streams_close() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let name = "chain-revocation";
        let flag = format!("chain.revocation-{:?}", unleash.version()).to_lowercase();
        unleash.create_enabled_flag(&flag, ENVIRONMENT, &[]).await;
        let chain = Chain::start(&unleash, name).await;
        let status = async |token: &str| chain.second.features_status(token).await;
        let until_status = async |token: &str, expect: StatusCode| {
            // The token list may not have contained a token that was created a moment ago. Then
            // Unleash's caches decide, within a minute.
            wait_until(&format!("a token gets {expect}"), 2 * TIMEOUT, async || {
                (status(token).await == expect).then_some(())
            })
            .await;
        };
        let doomed = unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], name).await;
        let other = unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], name).await;
        until_status(&doomed, StatusCode::OK).await;
        until_status(&other, StatusCode::OK).await;
        let mut sdk = Sdk::node_streaming(&chain.second.url(), &other, name).await;
        wait_until_sdk_sees(&mut sdk, &flag, true).await;
        let stream = http().get(chain.second.url() + "/api/client/streaming").timeout(4 * TIMEOUT);
        let mut stream = stream.header("authorization", &doomed).send().await.unwrap();
        assert_eq!(stream.status(), StatusCode::OK);
        unleash.delete_token(&doomed).await;
        until_status(&doomed, StatusCode::UNAUTHORIZED).await;
        let end = async { while stream.chunk().await.unwrap().is_some() {} };
        tokio::time::timeout(TIMEOUT, end).await.expect("its stream ends");

        // Without its own token the second edge continues with one that an SDK has presented.
        unleash.delete_token(&chain.own).await;
        until_status(&chain.own, StatusCode::UNAUTHORIZED).await;
        unleash.disable(&flag, ENVIRONMENT).await;
        wait_until_sdk_sees(&mut sdk, &flag, false).await;
        let streams = "parapet_upstream_streams";
        assert_eq!(chain.second.metric(streams).await, Some(1.0));
        assert_eq!(status(&other).await, StatusCode::OK);
        assert_eq!(sdk.stderr(), "");
        sdk.close().await;
    })
    .await;
}
