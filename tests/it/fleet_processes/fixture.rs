//! Edges of a fleet, their upstream, and requests that must not fail meanwhile.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::rig::{
    FEATURES, LogEvent, Parapet, RedisServer, ScriptedUpstream, Setup, find_only, http, wait_until,
};

/// Several times the duration of a lease.
pub(super) const TIMEOUT: Duration = Duration::from_secs(30);

pub(super) const ADMIN: &str = "*:*.fleet-admin-0123456789abcdef0123456789abcdef";
pub(super) const TOKEN: &str = "*:development.fleet-0123456789abcdef0123456789";

pub(super) const LEADS: &str = r#"parapet_fleet_leader{topic="flags:development"}"#;
pub(super) const ALONE: &str = r#"parapet_fleet_alone{topic="flags:development"}"#;

/// An edge whose name in the fleet is `name`.
pub(super) fn edge(upstream: &ScriptedUpstream, redis_url: &str, name: &str) -> Setup {
    let edge = Parapet::edge(&upstream.url()).admin_token(ADMIN).with_short_intervals();
    edge.flag("--instance-id", name).env("PARAPET_STORE", redis_url)
}

pub(super) async fn upstream_with_flags(flags: &[&str]) -> ScriptedUpstream {
    let upstream = ScriptedUpstream::start().await;
    upstream.state().environments = vec![("development", true)];
    upstream.set_flags("*", flags);
    upstream
}

/// Starts these edges, and waits until each serves `flags`.
pub(super) async fn start_edges<const N: usize>(
    setups: [Setup; N],
    flags: &[&str],
) -> Vec<Parapet> {
    let edges = setups.map(Setup::spawn);
    for edge in &edges {
        edge.wait_until_ready().await;
        edge.wait_until_served(TOKEN, flags).await;
    }
    edges.into()
}

/// Starts three edges, and waits until each serves the flag `one`.
pub(super) async fn start_three_edges(
    upstream: &ScriptedUpstream,
    redis: &RedisServer,
) -> Vec<Parapet> {
    let setups = ["a", "b", "c"].map(|name| edge(upstream, &redis.url(), name));
    start_edges(setups, &["one"]).await
}

/// The position of the only edge that leads, once there is one.
pub(super) async fn wait_for_leader(edges: &[Parapet]) -> usize {
    wait_until("one edge leads", TIMEOUT, async || find_only(edges, LEADS).await).await
}

/// Waits until one edge leads and the others follow.
pub(super) async fn wait_for_one_leader(edges: &[Parapet]) -> usize {
    wait_until("one edge leads, and the others follow", TIMEOUT, async || {
        for edge in edges {
            if edge.metric(ALONE).await != Some(0.0) {
                return None;
            }
        }
        find_only(edges, LEADS).await
    })
    .await
}

/// Waits until each edge fetches flags for itself.
pub(super) async fn wait_until_alone<'a>(edges: impl IntoIterator<Item = &'a Parapet>) {
    for edge in edges {
        wait_until("the edge fetches for itself", TIMEOUT, async || {
            (edge.metric(ALONE).await == Some(1.0)).then_some(())
        })
        .await;
    }
}

/// The fleet in `/status`.
pub(super) async fn fleet_status(edge: &Parapet) -> Value {
    edge.admin_get_as("/status", ADMIN).await.1["fleet"].take()
}

/// The names of the instances that poll upstream for flags, over a number of polls.
pub(super) async fn polling_instances(upstream: &ScriptedUpstream) -> BTreeSet<String> {
    let before = upstream.requests(FEATURES).len();
    let polls = upstream.wait_for_requests(FEATURES, before + 5).await;
    polls.into_iter().skip(before).filter_map(|it| it.instance_id).collect()
}

/// Changes the flags, and waits until each edge serves the new ones.
pub(super) async fn change_flags(upstream: &ScriptedUpstream, edges: &[Parapet], flag: &str) {
    upstream.set_flags("*", &[&format!("p/{flag}")]);
    for edge in edges {
        edge.wait_until_served(TOKEN, &[flag]).await;
    }
}

/// Requests flags from edges all the time, as SDKs do.
pub(super) struct Load {
    task: JoinHandle<()>,
    failures: Arc<Mutex<Vec<String>>>,
    count: Arc<AtomicUsize>,
}

impl Load {
    pub(super) fn start<'a>(edges: impl IntoIterator<Item = &'a Parapet>) -> Self {
        let urls: Vec<_> = edges.into_iter().map(|edge| edge.url() + FEATURES).collect();
        let (failures, count) = (Arc::<Mutex<Vec<_>>>::default(), Arc::<AtomicUsize>::default());
        let (failed, sent) = (Arc::clone(&failures), Arc::clone(&count));
        let task = tokio::spawn(async move {
            loop {
                for url in &urls {
                    let response = http().get(url).header("authorization", TOKEN).send().await;
                    if response.as_ref().map(reqwest::Response::status).ok() != Some(StatusCode::OK)
                    {
                        failed.lock().unwrap().push(format!("{response:?}"));
                    }
                    sent.fetch_add(1, Ordering::Relaxed);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        Self { task, failures, count }
    }

    /// Ends it. Panics if any request has failed.
    pub(super) fn assert_all_answered(self) {
        self.task.abort();
        let failures = self.failures.lock().unwrap();
        assert!(failures.is_empty(), "{failures:?}");
        assert!(self.count.load(Ordering::Relaxed) > 10);
    }
}

/// Waits until Redis has the flags that the leader has shared, which is one of these edges.
pub(super) async fn wait_until_shared<'a>(
    redis: &RedisServer,
    edges: impl IntoIterator<Item = &'a Parapet> + Clone,
) {
    wait_until("Redis has the flags of the leader", TIMEOUT, async || {
        for edge in edges.clone() {
            let fleet = fleet_status(edge).await;
            let mut topics = fleet["topics"].as_array()?.iter();
            let flags = topics.find(|it| it["topic"] == "flags:development")?;
            let Some(fence) = flags["fence"].as_u64() else { continue };
            let pattern = "parapet:fleet:*flags:development*:document";
            let key = redis.cli(&["--scan", "--pattern", pattern]).await;
            let stored = redis.cli(&["hget", key.trim(), "fence"]).await;
            return (stored.trim() == fence.to_string()).then_some(());
        }
        None
    })
    .await;
}

/// The number of times that an edge has logged the beginning and the end of an outage of Redis.
pub(super) fn logged_outages(edge: &Parapet) -> (usize, usize) {
    let (began, ended) = (LogEvent::warn("fleet::hub"), LogEvent::info("fleet::hub"));
    (edge.logged(began).len(), edge.logged(ended).len())
}

/// Waits until each edge has logged one outage of Redis and its end.
pub(super) async fn wait_for_end_of_outage(edges: &[Parapet]) {
    for edge in edges {
        edge.wait_until_logged(LogEvent::info("fleet::hub")).await;
        assert_eq!(logged_outages(edge), (1, 1), "{}", edge.log());
    }
}

/// The number of requests of an edge to upstream, without those of usage.
pub(super) async fn upstream_requests(edge: &Parapet) -> u64 {
    let page = edge.metrics().await;
    let samples = page.lines().filter(|it| it.starts_with("parapet_upstream_requests_total{"));
    let samples = samples.filter(|it| !it.contains("purpose=\"usage\""));
    samples.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}
