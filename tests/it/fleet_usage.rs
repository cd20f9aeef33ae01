//! The usage of a fleet, read back from upstream, while its leader is killed and Redis loses its data.
//!
//! The upstream is a standalone, which recognises a batch that it is sent twice, or Unleash, which does
//! not. `fleet_usage_log` covers the log alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::rig::{
    ChaosProxy, LogEvent, Parapet, RedisServer, Setup, TokenKind, Unleash, UnleashVersion,
    find_only, start_standalone_for_usage, wait_until,
};

const ENVIRONMENT: &str = "development";
const FLAG: &str = "f";
const BULK: &str = "/api/client/metrics/bulk";
const LEADS: &str = r#"parapet_fleet_leader{topic="usage"}"#;
const SENT_ALONE: &str = "parapet_fleet_usage_sent_alone_total";

/// Longer than a claim that a killed leader leaves, and the delays after it.
const TIMEOUT: Duration = Duration::from_mins(3);

/// A standalone as the upstream, with one flag.
struct Upstream {
    standalone: Parapet,
    admin: &'static str,
    _flags: NamedTempFile,
}

impl Upstream {
    async fn start(admin: &'static str, client: &'static str) -> Self {
        let (standalone, flags) = start_standalone_for_usage(FLAG, admin, client).await;
        Self { standalone, admin, _flags: flags }
    }

    /// An edge whose name in the fleet is `name`.
    fn edge(&self, redis: &RedisServer, name: &str) -> Setup {
        edge(&self.standalone.admin_url(), self.admin, redis).flag("--instance-id", name)
    }

    /// The number of evaluations that it has stored.
    async fn stored(&self) -> u64 {
        let path = format!("/api/admin/client-metrics/features/{FLAG}/raw");
        let (_, body) = self.standalone.admin_get(&path).await;
        let hours = body["data"].as_array().into_iter().flatten();
        hours.filter_map(|hour| hour["yes"].as_u64()).sum()
    }

    async fn wait_until_stored(&self, expected: u64) {
        wait_until(&format!("{expected} evaluations are stored"), TIMEOUT, async || {
            let stored = self.stored().await;
            assert!(stored <= expected, "{stored} are stored, not {expected}");
            (stored == expected).then_some(())
        })
        .await;
    }
}

/// An edge without an interval of usage.
fn edge(url: &str, admin: &str, redis: &RedisServer) -> Setup {
    let intervals = [
        ("--features-refresh-interval-seconds", "0.5"),
        ("--token-list-interval-seconds", "0.5"),
        ("--upstream-request-timeout", "2"),
        ("--shutdown-timeout-seconds", "10"),
    ];
    let edge = Parapet::edge(url).admin_token(admin).env("PARAPET_STORE", redis.url());
    intervals.into_iter().fold(edge, |edge, (name, value)| edge.flag(name, value))
}

async fn start_edges(setups: impl IntoIterator<Item = Setup>) -> Vec<Parapet> {
    let edges: Vec<_> = setups.into_iter().map(Setup::spawn).collect();
    for edge in &edges {
        edge.wait_until_ready().await;
    }
    edges
}

/// The position of the only edge that sends the usage of the fleet, once there is one.
async fn wait_for_leader(edges: &[Parapet]) -> usize {
    wait_until("one edge leads", TIMEOUT, async || find_only(edges, LEADS).await).await
}

/// Reports evaluations. Returns whether they were accepted.
async fn report(edge: &Parapet, token: &str, app_name: &str, yes: u64) -> bool {
    let now = jiff::Timestamp::now();
    let toggles = json!({ FLAG: { "yes": yes, "no": 0 } });
    let bucket = json!({ "start": now, "stop": now, "toggles": toggles });
    let body = json!({ "appName": app_name, "instanceId": app_name, "bucket": bucket });
    edge.post("/api/client/metrics", token, &body).await == StatusCode::ACCEPTED
}

/// Reports until they are accepted: a first-seen token may have to be validated first.
async fn report_until_accepted(edge: &Parapet, token: &str, app_name: &str, yes: u64) {
    wait_until("usage is accepted", TIMEOUT, async || {
        report(edge, token, app_name, yes).await.then_some(())
    })
    .await;
}

/// Waits until an edge has nothing left that upstream does not have.
async fn wait_until_all_is_sent(edge: &Parapet) {
    wait_until("all usage is sent", TIMEOUT, async || {
        let gauges = ["parapet_usage_pending", "parapet_usage_batches_parked"];
        let values = join_all(gauges.map(|gauge| edge.metric(gauge))).await;
        values.into_iter().all(|value| value == Some(0.0)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs redis-server, see tests/run"]
async fn usage_is_exact_while_the_leader_is_killed_and_redis_loses_its_data() {
    let (admin, client) = ("*:*.fleet-usage-admin", "*:development.fleet-usage-client");
    let (mut redis, upstream) = (RedisServer::start().await, Upstream::start(admin, client).await);
    let setups = ["a", "b", "c"]
        .map(|name| upstream.edge(&redis, name).flag("--metrics-interval-seconds", "0.5"));
    let mut edges = start_edges(setups).await;
    for (n, edge) in edges.iter().enumerate() {
        report_until_accepted(edge, client, &format!("app-{n}"), 100).await;
    }
    upstream.wait_until_stored(300).await;

    let leader = edges.remove(wait_for_leader(&edges).await);
    wait_until_all_is_sent(&leader).await;
    let followers = Arc::new(edges);
    let (accepted, is_done) = (Arc::new(AtomicU64::new(300)), Arc::new(AtomicBool::new(false)));
    let reporter = {
        let (followers, accepted) = (Arc::clone(&followers), Arc::clone(&accepted));
        let is_done = Arc::clone(&is_done);
        tokio::spawn(async move {
            while !is_done.load(Ordering::Relaxed) {
                for (n, edge) in followers.iter().enumerate() {
                    assert!(report(edge, client, &format!("app-{n}"), 1).await);
                    accepted.fetch_add(1, Ordering::Relaxed);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
    };
    wait_until("the leader sends usage of the others", TIMEOUT, async || {
        (upstream.stored().await > 350).then_some(())
    })
    .await;
    leader.kill();
    wait_for_leader(&followers).await;
    let stored = upstream.stored().await;
    wait_until("the next leader sends usage", TIMEOUT, async || {
        (upstream.stored().await > stored + 50).then_some(())
    })
    .await;

    redis.kill();
    for edge in &*followers {
        wait_until("it sends its usage itself", TIMEOUT, async || {
            edge.metric(SENT_ALONE).await.filter(|count| *count >= 2.0)
        })
        .await;
    }
    redis.restart().await;
    for edge in &*followers {
        edge.wait_until_logged(LogEvent::info("fleet::usage_sink")).await;
        let warnings = edge.logged(LogEvent::warn("fleet::usage_sink"));
        assert_eq!(warnings.len(), 1, "{warnings:?}");
    }
    is_done.store(true, Ordering::Relaxed);
    reporter.await.unwrap();
    upstream.wait_until_stored(accepted.load(Ordering::Relaxed)).await;
    for edge in &*followers {
        wait_until_all_is_sent(edge).await;
    }
    upstream.wait_until_stored(accepted.load(Ordering::Relaxed)).await;
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn last_instance_sends_what_waits_when_it_ends() {
    let (admin, client) = ("*:*.fleet-last-admin", "*:development.fleet-last-client");
    let (redis, upstream) = (RedisServer::start().await, Upstream::start(admin, client).await);
    let setup = upstream.edge(&redis, "a").flag("--metrics-interval-seconds", "3600");
    let edges = start_edges([setup]).await;
    wait_for_leader(&edges).await;
    report_until_accepted(&edges[0], client, "app", 100).await;
    assert!(edges[0].terminate().await.success());
    upstream.wait_until_stored(100).await;
    // The next run learns that the batch was sent.
    edges[0].restart();
    edges[0].wait_until_ready().await;
    report_until_accepted(&edges[0], client, "app", 10).await;
    assert!(edges[0].terminate().await.success());
    upstream.wait_until_stored(110).await;
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn instances_with_own_usage_do_not_hand_it_over() {
    let (admin, client) = ("*:*.fleet-own-admin", "*:development.fleet-own-client");
    let (redis, upstream) = (RedisServer::start().await, Upstream::start(admin, client).await);
    let setup = upstream.edge(&redis, "a").flag("--metrics-interval-seconds", "0.5");
    let edges = start_edges([setup.flag("--fleet-usage", "own")]).await;
    report_until_accepted(&edges[0], client, "app", 100).await;
    upstream.wait_until_stored(100).await;
    assert_eq!(redis.cli(&["--scan", "--pattern", "*usage}*"]).await, "");
}

#[tokio::test]
#[ignore = "needs redis-server, PostgreSQL and the npm packages, see tests/run"]
async fn unleash_receives_the_usage_of_all_instances_in_one_batch() {
    let (redis, unleash) = (RedisServer::start().await, Unleash::shared(UnleashVersion::V8).await);
    unleash.create_enabled_flag(FLAG, ENVIRONMENT, &[]).await;
    unleash.wait_until_counted(FLAG, ENVIRONMENT).await;
    let proxy = ChaosProxy::start(&unleash.url()).await;
    let setups = ["a", "b", "c", "d"].map(|name| {
        let edge = edge(&proxy.url(), unleash.admin_token(), &redis).flag("--instance-id", name);
        edge.flag("--fleet-name", "fleet-usage").flag("--metrics-interval-seconds", "2")
    });
    let mut edges = start_edges(setups).await;
    let app_name = "fleet-usage";
    let token = unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], app_name).await;
    let mut expected = 0;
    for with_kill in [true, false] {
        for edge in &edges {
            report_until_accepted(edge, &token, app_name, 10).await;
            expected += 10;
        }
        unleash.wait_for_usage(FLAG, app_name, ENVIRONMENT, (expected, 0)).await;
        for edge in &edges {
            wait_until_all_is_sent(edge).await;
        }
        if with_kill {
            let leader = edges.remove(wait_for_leader(&edges).await);
            leader.kill();
            wait_for_leader(&edges).await;
        }
    }
    unleash.wait_for_usage(FLAG, app_name, ENVIRONMENT, (expected, 0)).await;
    let is_counted = |body: &Value| {
        let metrics = body["metrics"].as_array().into_iter().flatten();
        metrics.filter_map(|metric| metric["yes"].as_u64()).sum::<u64>()
    };
    let requests = proxy.requests().into_iter().filter(|request| request.path == BULK);
    let counts: Vec<_> = requests
        .map(|request| is_counted(&serde_json::from_slice(&request.body).unwrap()))
        .filter(|count| *count > 0)
        .collect();
    // Reports of one moment may fall into two intervals.
    assert!(counts.len() <= 4 && counts.iter().sum::<u64>() == expected, "{counts:?}");
}
