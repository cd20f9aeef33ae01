//! Edges of a fleet as an operator runs them: processes that share a Redis, in front of one upstream.
//!
//! `fleet` and `fleet_sync` cover the same in this process, with shorter intervals.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};

use crate::rig::{FEATURES, LogEvent, Parapet, RedisServer, ScriptedUpstream, Setup, wait_until};

/// Several times the duration of a lease.
const TIMEOUT: Duration = Duration::from_secs(30);

const ADMIN: &str = "*:*.fleet-admin-0123456789abcdef0123456789abcdef";
const TOKEN: &str = "*:development.fleet-0123456789abcdef0123456789";

const LEADS: &str = r#"parapet_fleet_leader{topic="flags:development"}"#;

/// An edge whose name in the fleet is `name`.
fn edge(upstream: &ScriptedUpstream, redis_url: &str, name: &str) -> Setup {
    let edge = Parapet::edge(&upstream.url()).admin_token(ADMIN).with_short_intervals();
    edge.flag("--instance-id", name).env("PARAPET_STORE", redis_url)
}

async fn upstream_with_flags(flags: &[&str]) -> ScriptedUpstream {
    let upstream = ScriptedUpstream::start().await;
    upstream.state().environments = vec![("development", true)];
    upstream.set_flags("*", flags);
    upstream
}

/// Starts these edges, and waits until each serves `flags`.
async fn start_edges<const N: usize>(setups: [Setup; N], flags: &[&str]) -> Vec<Parapet> {
    let edges = setups.map(Setup::spawn);
    for edge in &edges {
        edge.wait_until_ready().await;
        edge.wait_until_served(TOKEN, flags).await;
    }
    edges.into()
}

/// The position of the only edge that leads, once there is one.
async fn wait_for_leader(edges: &[Parapet]) -> usize {
    wait_until("one edge leads", TIMEOUT, async || {
        let mut leaders = Vec::new();
        for (n, edge) in edges.iter().enumerate() {
            if edge.metric(LEADS).await == Some(1.0) {
                leaders.push(n);
            }
        }
        <[usize; 1]>::try_from(leaders).ok().map(|[leader]| leader)
    })
    .await
}

/// The fleet in `/status`.
async fn fleet_status(edge: &Parapet) -> Value {
    edge.admin_get_as("/status", ADMIN).await.1["fleet"].take()
}

/// The names of the instances that poll upstream for flags, over a number of polls.
async fn polling_instances(upstream: &ScriptedUpstream) -> BTreeSet<String> {
    let before = upstream.requests(FEATURES).len();
    let polls = upstream.wait_for_requests(FEATURES, before + 5).await;
    polls.into_iter().skip(before).filter_map(|it| it.instance_id).collect()
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edges_poll_upstream_as_one_and_the_leader_hands_over_when_it_ends() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let setups = ["a", "b", "c"].map(|name| edge(&upstream, &redis.url(), name));
    let mut edges = start_edges(setups, &["one"]).await;
    let leader = wait_for_leader(&edges).await;
    let names = ["a", "b", "c"];
    assert_eq!(polling_instances(&upstream).await, BTreeSet::from([names[leader].to_owned()]));
    for edge in &edges {
        let count = || async { edge.metric("parapet_fleet_instances").await };
        wait_until("all instances are counted", TIMEOUT, async || {
            (count().await == Some(3.0)).then_some(())
        })
        .await;
        let fleet = fleet_status(edge).await;
        assert_eq!(
            (&fleet["name"], &fleet["redis"]["lastError"]),
            (&json!("default"), &Value::Null)
        );
        let mut listed: Vec<_> = fleet["instances"]["names"].as_array().unwrap().clone();
        listed.sort_by_key(Value::to_string);
        assert_eq!((json!(listed), &fleet["instances"]["count"]), (json!(names), &json!(3)));
        let topics = fleet["topics"].as_array().unwrap();
        let flags = topics.iter().find(|it| it["topic"] == "flags:development").unwrap();
        assert_eq!(flags["leader"], names[leader]);
        let since: jiff::Timestamp = flags["leaderSince"].as_str().unwrap().parse().unwrap();
        assert!(since <= jiff::Timestamp::now(), "{flags}");
    }

    let ending = edges.swap_remove(leader);
    ending.terminate().await;
    // It has given its lease back instead of letting it expire.
    let keys = redis.cli(&["--scan", "--pattern", "parapet:fleet:*flags:development*:lease"]).await;
    for key in keys.split_whitespace() {
        assert_ne!(redis.cli(&["hget", key, "name"]).await.trim(), names[leader]);
    }
    wait_for_leader(&edges).await;
    upstream.set_flags("*", &["p/two"]);
    for edge in &edges {
        edge.wait_until_served(TOKEN, &["two"]).await;
        let fleet = fleet_status(edge).await;
        assert!(fleet["lastNoticeSeconds"].is_u64(), "{fleet}");
    }
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edges_without_an_admin_token_or_with_the_fleet_off_stand_alone() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let without_admin = Parapet::edge(&upstream.url()).with_short_intervals();
    let without_admin = without_admin.env("TOKENS", TOKEN).env("PARAPET_STORE", redis.url());
    let setups = [without_admin, edge(&upstream, &redis.url(), "b").flag("--fleet", "off")];
    for edge in start_edges(setups, &["one"]).await {
        assert_eq!(edge.metric(LEADS).await, None);
        assert!(edge.logged(LogEvent::info("app::edge").with("instance")).is_empty());
    }
    assert_eq!(redis.cli(&["--scan", "--pattern", "parapet:fleet:*"]).await, "");
}
