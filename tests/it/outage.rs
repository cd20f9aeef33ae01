//! Upstream is unavailable, in every way that servers and networks fail: flags stay served, and no usage
//! is lost.
//!
//! `edge` covers a healthy upstream.

use std::time::Duration;

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::rig::{ChaosProxy, Fault, Kind, Parapet, Sdk, Unleash, Version, http, secrets, until};

/// Longer than the retry delays, which grow during an outage.
const SOON: Duration = Duration::from_mins(1);

const HERE: &str = "development";

/// An edge that has fetched its flags from a healthy upstream, and known clients.
struct Edge<'a> {
    unleash: &'a Unleash,
    parapet: Parapet,
    /// On for all users; its usage is counted.
    flag: String,
    /// On at first, off after the outage.
    changing: String,
    backend: String,
    frontend: String,
}

impl<'a> Edge<'a> {
    async fn start(unleash: &'a Unleash, upstream_url: &str, name: &str) -> Self {
        let (flag, changing) = (format!("outage.{name}.flag"), format!("outage.{name}.changing"));
        for flag in [&flag, &changing] {
            unleash.create_enabled_flag(flag, HERE, &[]).await;
        }
        unleash.wait_until_counted(&flag, HERE).await;
        let fleet = format!("outage-{name}");
        let backend = unleash.create_token(Kind::Backend, HERE, &["*"], &fleet).await;
        let frontend = unleash.create_token(Kind::Frontend, HERE, &["*"], &fleet).await;
        let edge = Parapet::edge(upstream_url).admin_token(unleash.admin_token()).impatient();
        let parapet = edge.flag("--fleet-name", &fleet).start().await;
        let edge = Self { unleash, parapet, flag, changing, backend, frontend };
        // Unleash takes a moment to publish a new flag, and Parapet an interval to fetch it.
        until("the new flags are served", SOON, async || {
            let (_, body) = edge.parapet.get("/api/client/features", &edge.backend).await;
            let names: Vec<_> = body["features"].as_array()?.iter().map(|it| &it["name"]).collect();
            [&edge.flag, &edge.changing].iter().all(|it| names.contains(&&json!(it))).then_some(())
        })
        .await;
        edge.assert_served().await;
        // A crash may lose what was received in the last seconds before it; this test is not about
        // those.
        edge.parapet.wait_until_kept(&edge.changing).await;
        for token in [&edge.backend, &edge.frontend] {
            edge.parapet.wait_until_kept(&masked(token)).await;
        }
        edge
    }

    /// Panics unless both APIs serve the flags to known tokens.
    async fn assert_served(&self) {
        let requests = [
            ("/api/client/features", &self.backend, "features"),
            ("/api/frontend", &self.frontend, "toggles"),
        ];
        for (path, token, list) in requests {
            let (status, body) = self.parapet.get(path, token).await;
            assert_eq!(status, StatusCode::OK, "{path}: {body}");
            for flag in [&self.flag, &self.changing] {
                let flag = find(&body[list], flag);
                assert_eq!(flag["enabled"], true, "{path}: {body}");
            }
        }
    }

    /// Waits until a request of Parapet to its upstream has failed.
    async fn wait_until_upstream_is_missed(&self) {
        let begin = jiff::Timestamp::now();
        until("Parapet misses its upstream", SOON, async || {
            let (code, status) = self.parapet.admin_get("/status").await;
            if code == StatusCode::UNAUTHORIZED {
                // Upstream has rejected the admin token, which therefore opens nothing.
                return Some(());
            }
            let failed = status["upstream"]["lastError"]["at"].as_str()?;
            (failed.parse::<jiff::Timestamp>().unwrap() > begin).then_some(())
        })
        .await;
    }

    /// Waits until upstream has confirmed the flags of both environments.
    async fn wait_until_upstream_answers(&self) {
        let begin = jiff::Timestamp::now();
        until("Parapet has its upstream back", SOON, async || {
            let (_, status) = self.parapet.admin_get("/status").await;
            let environments = status["environments"].as_array()?;
            let confirmed = |it: &Value| it["confirmed"].as_str()?.parse::<jiff::Timestamp>().ok();
            let all = environments.iter().all(|it| confirmed(it).is_some_and(|at| at > begin));
            (environments.len() == 2 && all).then_some(())
        })
        .await;
    }

    /// The response to a token that was never presented before.
    async fn present(&self, token: &str) -> reqwest::Response {
        secrets::remember(token);
        let url = self.parapet.url() + "/api/client/features";
        http().get(url).header("Authorization", token).send().await.unwrap()
    }

    /// Uses a flag in a newly started SDK, which gets the flags.
    async fn use_flag(&self, mut sdk: Sdk, times: u32) {
        assert!(sdk.evaluate(json!({})).await[&self.flag].enabled);
        sdk.count(&self.flag, times).await;
        sdk.flush().await;
        sdk.close().await;
    }

    /// Runs the scenario: `begin` makes upstream unavailable; `end` restores it and disables the
    /// changing flag.
    async fn ride_out(&self, name: &str, begin: impl AsyncFnOnce(), end: impl AsyncFnOnce()) {
        let apps = [format!("outage-{name}-node"), format!("outage-{name}-browser")];
        begin().await;
        self.wait_until_upstream_is_missed().await;
        self.assert_served().await;

        self.parapet.kill();
        self.parapet.restart();
        self.parapet.wait_until_ready().await;
        self.assert_served().await;
        let first_seen = format!("*:{HERE}.outage-first-seen-{name}");
        let answer = self.present(&first_seen).await;
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(answer.headers().contains_key("retry-after"), "{answer:?}");
        self.use_flag(Sdk::node(&self.parapet.url(), &self.backend, &apps[0]).await, 3).await;
        self.use_flag(Sdk::frontend(&self.parapet.url(), &self.frontend, &apps[1]).await, 4).await;

        let status = self.parapet.terminate().await;
        assert_eq!(status.code(), Some(0), "{}", self.parapet.log());
        self.parapet.restart();
        self.parapet.wait_until_ready().await;
        self.assert_served().await;
        self.use_flag(Sdk::node(&self.parapet.url(), &self.backend, &apps[0]).await, 2).await;

        end().await;
        until("what changed meanwhile arrives", SOON, async || {
            let (status, flags) = self.parapet.get("/api/client/features", &self.backend).await;
            assert_eq!(status, StatusCode::OK);
            assert_eq!(find(&flags["features"], &self.flag)["enabled"], true);
            (find(&flags["features"], &self.changing)["enabled"] == false).then_some(())
        })
        .await;
        until("the first-seen token is judged", SOON, async || {
            (self.present(&first_seen).await.status() == StatusCode::UNAUTHORIZED).then_some(())
        })
        .await;
        // Both at once, and again when nothing more can arrive.
        let counts = [(&apps[0], 5), (&apps[1], 4)];
        for last in [false, true] {
            for (app, count) in counts {
                self.unleash.wait_for_usage(&self.flag, app, HERE, (count, 0)).await;
            }
            if !last {
                assert!(self.parapet.terminate().await.success());
            }
        }
        let fleet = format!("parapet-outage-{name}");
        let environments = self.unleash.remember_tokens_named(&fleet).await;
        assert_eq!(environments, ["development", "production"], "no token is made in vain");
    }
}

fn find<'a>(flags: &'a Value, name: &str) -> &'a Value {
    let mut flags = flags.as_array().expect("a list of flags").iter();
    flags.find(|flag| flag["name"] == name).unwrap_or_else(|| panic!("{name} is missing"))
}

/// The masked form of a v1 or v2 token, as in stores and on pages.
fn masked(token: &str) -> String {
    let (scope, secret) = token.split_once('.').expect("a token of an environment");
    let secret = secret.strip_prefix("v2_").unwrap_or(secret);
    format!("{scope}.{}****", &secret[..4])
}

fn answer(status: u16, body: &'static str) -> Fault {
    let headers = vec![("content-type", "application/json"), ("retry-after", "1")];
    Fault::Answer { status: StatusCode::from_u16(status).unwrap(), headers, body }
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn flags_stay_served_and_usage_arrives_after_upstream_failures() {
    let faults = [
        ("cut", Fault::Cut),
        ("stalled", Fault::Stall),
        ("busy", answer(503, "")),
        ("refusing", answer(401, r#"{"message":"no"}"#)),
        ("broken", answer(500, "<html>")),
    ];
    let unleash = Unleash::shared(Version::V8).await;
    let stories = faults.map(async |(name, fault)| {
        let proxy = ChaosProxy::start(&unleash.url()).await;
        let edge = Edge::start(&unleash, &proxy.url(), name).await;
        let end = async || {
            unleash.disable(&edge.changing, HERE).await;
            proxy.restore().await;
        };
        edge.ride_out(name, async || proxy.set(fault).await, end).await;
    });
    join_all(stories).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn flags_stay_served_and_usage_arrives_after_upstream_crash() {
    let each = [(Version::V7, "killed-7"), (Version::V8SecureTokens, "killed-8")];
    let stories = each.map(async |(version, name)| {
        let unleash = Unleash::start(version).await;
        let edge = Edge::start(&unleash, &unleash.url(), name).await;
        let end = async || {
            unleash.restart().await;
            unleash.disable(&edge.changing, HERE).await;
        };
        edge.ride_out(name, async || unleash.kill(), end).await;
    });
    join_all(stories).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn no_upstream_response_removes_flags() {
    let unleash = Unleash::shared(Version::V8).await;
    let proxy = ChaosProxy::start(&unleash.url()).await;
    let edge = Edge::start(&unleash, &proxy.url(), "statuses").await;
    let statuses = [204, 301, 302, 304, 400, 401, 403, 404, 410, 429, 500, 502, 504];
    let bodies =
        ["", "{}", "[]", "null", "<html>", r#"{"features":null}"#, r#"{"version":2,"featu"#];
    let answers = statuses.map(|status| answer(status, ""));
    for fault in answers.into_iter().chain(bodies.map(|body| answer(200, body))) {
        let before = proxy.count("/api/client/features");
        proxy.set(fault.clone()).await;
        // After the second request for each environment the first response has been applied.
        until(&format!("{fault:?} is answered"), SOON, async || {
            (proxy.count("/api/client/features") >= before + 4).then_some(())
        })
        .await;
        edge.assert_served().await;
        proxy.restore().await;
        edge.wait_until_upstream_answers().await;
        edge.assert_served().await;
    }
}

#[tokio::test]
async fn upstream_that_was_never_reachable_is_logged_once() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let token = "*:development.0123456789abcdef0123456789abcdef";
    let parapet = Parapet::edge(&url).flag("--tokens", token).impatient().spawn();
    let warning = "Token validation at upstream failed";
    let ask = async || {
        let request = http().get(format!("{}/api/client/features", parapet.url()));
        Some(request.header("authorization", token).send().await.ok()?.status())
    };
    until("upstream is missed", SOON, async || {
        let is_logged = parapet.log().contains(warning);
        (ask().await? == StatusCode::SERVICE_UNAVAILABLE && is_logged).then_some(())
    })
    .await;
    for _ in 0..3 {
        assert_eq!(ask().await, Some(StatusCode::SERVICE_UNAVAILABLE));
    }
    let log = parapet.log();
    assert_eq!(log.matches(warning).count(), 1, "{log}");
    assert!(log.contains("onnection refused") && !log.contains("0123456789abcdef"), "{log}");
}
