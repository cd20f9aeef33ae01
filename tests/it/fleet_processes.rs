//! Edges of a fleet as an operator runs them: processes that share a Redis, in front of one upstream.
//!
//! `fleet` and `fleet_sync` cover the same in this process, with shorter intervals.

mod faults;
mod fixture;
mod streams;
mod tokens;
mod topologies;

use std::collections::BTreeSet;

use reqwest::StatusCode;
use serde_json::{Value, json};

use self::fixture::{
    LEADS, TIMEOUT, TOKEN, edge, fleet_status, polling_instances, start_edges, upstream_requests,
    upstream_with_flags, wait_for_leader,
};
use crate::rig::{LogEvent, Parapet, RedisServer, TokenKind, Unleash, UnleashVersion, wait_until};

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edges_poll_upstream_as_one_and_the_leader_hands_over_when_it_ends() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let names = ["a", "b", "c"];
    let [first, second, third] = names.map(|name| edge(&upstream, &redis.url(), name));
    let mut edges = start_edges([first], &["one"]).await;
    wait_for_leader(&edges).await;
    edges.extend(start_edges([second, third], &["one"]).await);
    let leader = wait_for_leader(&edges).await;
    assert_eq!(leader, 0);
    assert_eq!(polling_instances(&upstream).await, BTreeSet::from([names[leader].to_owned()]));
    for path in ["/api/admin/environments", "/api/admin/search/events"] {
        let requests = upstream.requests(path);
        let by: BTreeSet<_> = requests.into_iter().filter_map(|it| it.instance_id).collect();
        assert_eq!(by, BTreeSet::from([names[leader].to_owned()]), "{path}");
    }
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
async fn one_edge_leads_everything_although_all_start_at_once() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    upstream.state().environments =
        ["development", "production", "test"].map(|it| (it, true)).into();
    let setups = ["a", "b", "c", "d"].map(|name| edge(&upstream, &redis.url(), name));
    let edges = start_edges(setups, &["one"]).await;
    wait_until("one edge leads every topic", TIMEOUT * 2, async || {
        let mut leaders = BTreeSet::new();
        for edge in &edges {
            let fleet = fleet_status(edge).await;
            let topics = fleet["topics"].as_array().unwrap();
            leaders.extend(topics.iter().map(|topic| topic["leader"].to_string()));
            if topics.len() < 5 {
                return None;
            }
        }
        (leaders.len() == 1 && !leaders.contains("null")).then_some(())
    })
    .await;
    upstream.set_flags("*", &["p/two"]);
    for edge in &edges {
        edge.wait_until_served(TOKEN, &["two"]).await;
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

#[tokio::test]
#[ignore = "needs PostgreSQL, redis-server and the npm packages, see tests/run"]
async fn followers_request_nothing_from_unleash_whatever_changes_there() {
    const READS: &str = "parapet_upstream_requests_total{purpose=\"event_log\",outcome=\"ok\"}";
    for version in [UnleashVersion::V7, UnleashVersion::V8SecureTokens] {
        let (redis, unleash) = (RedisServer::start().await, Unleash::start(version).await);
        unleash.create_enabled_flag("first", "development", &[]).await;
        let [used, revoked] = ["used", "revoked"];
        let used = unleash.create_token(TokenKind::Backend, "development", &["*"], used).await;
        let revoked =
            unleash.create_token(TokenKind::Backend, "development", &["*"], revoked).await;
        let [leader, a, b] = ["leader", "a", "b"].map(|name| {
            let edge = Parapet::edge(&unleash.url()).admin_token(unleash.admin_token());
            let edge = edge.with_short_intervals().flag("--instance-id", name);
            edge.env("PARAPET_STORE", redis.url())
        });
        let leader = leader.start().await;
        wait_for_leader(std::slice::from_ref(&leader)).await;
        let followers = [a.start().await, b.start().await];
        for edge in followers.iter().chain([&leader]) {
            for token in [&used, &revoked] {
                edge.wait_until_served(token, &["first"]).await;
            }
        }
        // Each obtains its own token once, after some seconds.
        let mut before = Vec::new();
        for follower in &followers {
            let count = wait_until("the follower is quiet", TIMEOUT, async || {
                let (count, reads) =
                    (upstream_requests(follower).await, leader.metric(READS).await);
                let enough = reads.unwrap_or_default() + 10.0;
                wait_until("the leader reads the event log", TIMEOUT, async || {
                    (leader.metric(READS).await.unwrap_or_default() >= enough).then_some(())
                })
                .await;
                (upstream_requests(follower).await == count).then_some(count)
            })
            .await;
            before.push(count);
        }
        unleash.create_enabled_flag("second", "development", &[]).await;
        unleash.delete_token(&revoked).await;
        for edge in followers.iter().chain([&leader]) {
            edge.wait_until_served(&used, &["first", "second"]).await;
            wait_until("the token is rejected", TIMEOUT, async || {
                (edge.features_status(&revoked).await == StatusCode::UNAUTHORIZED).then_some(())
            })
            .await;
        }
        for (follower, before) in followers.iter().zip(before) {
            assert_eq!(upstream_requests(follower).await, before, "{}", follower.metrics().await);
        }
    }
}
