//! Upstream is unavailable, in every way that servers and networks fail: flags stay served, and no usage
//! is lost.
//!
//! `edge` covers a healthy upstream.

use std::time::Duration;

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::rig::{
    ChaosProxy, Fault, LogEvent, Parapet, Sdk, TokenKind, Unleash, UnleashVersion, free_port, http,
    secret_leak_check, wait_until,
};

/// Longer than the retry delays, which grow during an outage.
const TIMEOUT: Duration = Duration::from_mins(1);

const ENVIRONMENT: &str = "development";

/// An edge that has fetched its flags from a healthy upstream, and known clients.
struct EdgeUnderOutage<'a> {
    unleash: &'a Unleash,
    parapet: Parapet,
    /// On for all users; its usage is counted.
    flag: String,
    /// On at first, off after the outage.
    changing: String,
    backend: String,
    frontend: String,
}

impl<'a> EdgeUnderOutage<'a> {
    async fn start(unleash: &'a Unleash, upstream_url: &str, name: &str) -> Self {
        let (flag, changing) = (format!("outage.{name}.flag"), format!("outage.{name}.changing"));
        for flag in [&flag, &changing] {
            unleash.create_enabled_flag(flag, ENVIRONMENT, &[]).await;
        }
        unleash.wait_until_counted(&flag, ENVIRONMENT).await;
        let fleet = format!("outage-{name}");
        let backend = unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], &fleet).await;
        let frontend = unleash.create_token(TokenKind::Frontend, ENVIRONMENT, &["*"], &fleet).await;
        let edge =
            Parapet::edge(upstream_url).admin_token(unleash.admin_token()).with_short_intervals();
        let parapet = edge.flag("--fleet-name", &fleet).start().await;
        let edge = Self { unleash, parapet, flag, changing, backend, frontend };
        // Unleash takes a moment to publish a new flag, and Parapet an interval to fetch it.
        wait_until("the new flags are served", TIMEOUT, async || {
            let (_, body) = edge.parapet.get("/api/client/features", &edge.backend).await;
            let names: Vec<_> = body["features"].as_array()?.iter().map(|it| &it["name"]).collect();
            [&edge.flag, &edge.changing].iter().all(|it| names.contains(&&json!(it))).then_some(())
        })
        .await;
        edge.assert_flags_served().await;
        // A crash may lose what was received in the last seconds before it; this test is not about
        // those.
        edge.parapet.wait_until_stored(&edge.changing).await;
        for token in [&edge.backend, &edge.frontend] {
            edge.parapet.wait_until_stored(&masked_token(token)).await;
        }
        edge
    }

    /// Panics unless both APIs serve the flags to known tokens.
    async fn assert_flags_served(&self) {
        let requests = [
            ("/api/client/features", &self.backend, "features"),
            ("/api/frontend", &self.frontend, "toggles"),
        ];
        for (path, token, list) in requests {
            let (status, body) = self.parapet.get(path, token).await;
            assert_eq!(status, StatusCode::OK, "{path}: {body}");
            for flag in [&self.flag, &self.changing] {
                let flag = find_flag(&body[list], flag);
                assert_eq!(flag["enabled"], true, "{path}: {body}");
            }
        }
    }

    /// The response to a token that was never presented before.
    async fn request_with_token(&self, token: &str) -> reqwest::Response {
        secret_leak_check::register(token);
        let url = self.parapet.url() + "/api/client/features";
        http().get(url).header("Authorization", token).send().await.unwrap()
    }

    /// Uses a flag in a newly started SDK, which gets the flags.
    async fn use_flag(&self, mut sdk: Sdk, times: u32) {
        assert!(sdk.evaluate(json!({})).await[&self.flag].enabled);
        sdk.use_flag(&self.flag, times).await;
        sdk.flush().await;
        sdk.close().await;
    }

    /// Runs the scenario: `begin` makes upstream unavailable; `end` restores it and disables the
    /// changing flag.
    async fn survive_outage(&self, name: &str, begin: impl AsyncFnOnce(), end: impl AsyncFnOnce()) {
        let apps = [format!("outage-{name}-node"), format!("outage-{name}-browser")];
        begin().await;
        self.parapet.wait_until_upstream_fails().await;
        self.assert_flags_served().await;

        self.parapet.kill();
        self.parapet.restart();
        self.parapet.wait_until_ready().await;
        self.assert_flags_served().await;
        let first_seen = format!("*:{ENVIRONMENT}.outage-first-seen-{name}");
        let response = self.request_with_token(&first_seen).await;
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(response.headers().contains_key("retry-after"), "{response:?}");
        self.use_flag(Sdk::node(&self.parapet.url(), &self.backend, &apps[0]).await, 3).await;
        self.use_flag(Sdk::frontend(&self.parapet.url(), &self.frontend, &apps[1]).await, 4).await;

        let status = self.parapet.terminate().await;
        assert_eq!(status.code(), Some(0), "{}", self.parapet.log());
        self.parapet.restart();
        self.parapet.wait_until_ready().await;
        self.assert_flags_served().await;
        self.use_flag(Sdk::node(&self.parapet.url(), &self.backend, &apps[0]).await, 2).await;

        end().await;
        wait_until("what changed meanwhile arrives", TIMEOUT, async || {
            let (status, flags) = self.parapet.get("/api/client/features", &self.backend).await;
            assert_eq!(status, StatusCode::OK);
            assert_eq!(find_flag(&flags["features"], &self.flag)["enabled"], true);
            (find_flag(&flags["features"], &self.changing)["enabled"] == false).then_some(())
        })
        .await;
        wait_until("the first-seen token is judged", TIMEOUT, async || {
            (self.request_with_token(&first_seen).await.status() == StatusCode::UNAUTHORIZED)
                .then_some(())
        })
        .await;
        // Both at once, and again when nothing more can arrive.
        let counts = [(&apps[0], 5), (&apps[1], 4)];
        for last in [false, true] {
            for (app, count) in counts {
                self.unleash.wait_for_usage(&self.flag, app, ENVIRONMENT, (count, 0)).await;
            }
            if !last {
                assert!(self.parapet.terminate().await.success());
            }
        }
        let fleet = format!("parapet-outage-{name}");
        let environments = self.unleash.register_tokens_named(&fleet).await;
        assert_eq!(environments, ["development", "production"], "no token is made in vain");
    }
}

fn find_flag<'a>(flags: &'a Value, name: &str) -> &'a Value {
    let mut flags = flags.as_array().expect("a list of flags").iter();
    flags.find(|flag| flag["name"] == name).unwrap_or_else(|| panic!("{name} is missing"))
}

/// The masked form of a v1 or v2 token, as in stores and on pages.
fn masked_token(token: &str) -> String {
    let (scope, secret) = token.split_once('.').expect("a token of an environment");
    let secret = secret.strip_prefix("v2_").unwrap_or(secret);
    format!("{scope}.{}****", &secret[..4])
}

fn respond_fault(status: u16, body: &'static str) -> Fault {
    let headers = vec![("content-type", "application/json"), ("retry-after", "1")];
    Fault::Respond { status: StatusCode::from_u16(status).unwrap(), headers, body }
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn flags_stay_served_and_usage_arrives_after_upstream_failures() {
    let faults = [
        ("cut", Fault::Disconnect),
        ("stalled", Fault::Stall),
        ("busy", respond_fault(503, "")),
        ("refusing", respond_fault(401, r#"{"message":"no"}"#)),
        ("broken", respond_fault(500, "<html>")),
    ];
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let stories = faults.map(async |(name, fault)| {
        let proxy = ChaosProxy::start(&unleash.url()).await;
        let edge = EdgeUnderOutage::start(&unleash, &proxy.url(), name).await;
        let end = async || {
            unleash.disable(&edge.changing, ENVIRONMENT).await;
            proxy.restore().await;
        };
        edge.survive_outage(name, async || proxy.set_fault(fault).await, end).await;
    });
    join_all(stories).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn flags_stay_served_and_usage_arrives_after_upstream_crash() {
    let each = [(UnleashVersion::V7, "killed-7"), (UnleashVersion::V8SecureTokens, "killed-8")];
    let stories = each.map(async |(version, name)| {
        let unleash = Unleash::start(version).await;
        let edge = EdgeUnderOutage::start(&unleash, &unleash.url(), name).await;
        let end = async || {
            unleash.restart().await;
            unleash.disable(&edge.changing, ENVIRONMENT).await;
        };
        edge.survive_outage(name, async || unleash.kill(), end).await;
    });
    join_all(stories).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn no_upstream_response_removes_flags() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let proxy = ChaosProxy::start(&unleash.url()).await;
    let edge = EdgeUnderOutage::start(&unleash, &proxy.url(), "statuses").await;
    let statuses = [204, 301, 302, 304, 400, 401, 403, 404, 410, 429, 500, 502, 504];
    let bodies =
        ["", "{}", "[]", "null", "<html>", r#"{"features":null}"#, r#"{"version":2,"featu"#];
    let responses = statuses.map(|status| respond_fault(status, ""));
    for fault in responses.into_iter().chain(bodies.map(|body| respond_fault(200, body))) {
        let before = proxy.request_count("/api/client/features");
        proxy.set_fault(fault.clone()).await;
        // After the second request for each environment the first response has been applied.
        wait_until(&format!("{fault:?} is answered"), TIMEOUT, async || {
            (proxy.request_count("/api/client/features") >= before + 4).then_some(())
        })
        .await;
        edge.assert_flags_served().await;
        proxy.restore().await;
        edge.parapet.wait_until_upstream_recovers(2).await;
        edge.assert_flags_served().await;
    }
}

#[tokio::test]
async fn upstream_that_was_never_reachable_is_logged_once() {
    let url = format!("http://127.0.0.1:{}", free_port());
    let token = "*:development.0123456789abcdef0123456789abcdef";
    let parapet = Parapet::edge(&url).flag("--tokens", token).with_short_intervals().spawn();
    let validation_failed = LogEvent::warn("auth::").with("error");
    let fetch_status = async || {
        let request = http().get(format!("{}/api/client/features", parapet.url()));
        Some(request.header("authorization", token).send().await.ok()?.status())
    };
    wait_until("upstream is missed", TIMEOUT, async || {
        let is_logged = !parapet.logged(validation_failed).is_empty();
        (fetch_status().await? == StatusCode::SERVICE_UNAVAILABLE && is_logged).then_some(())
    })
    .await;
    for _ in 0..3 {
        assert_eq!(fetch_status().await, Some(StatusCode::SERVICE_UNAVAILABLE));
    }
    let log = parapet.log();
    assert_eq!(parapet.logged(validation_failed).len(), 1, "{log}");
    assert!(log.contains("onnection refused") && !log.contains("0123456789abcdef"), "{log}");
}
