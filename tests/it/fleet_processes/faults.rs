//! Faults of the leader and of Redis.

use std::time::{Duration, Instant};

use super::fixture::{
    ADMIN, LEADS, Load, TIMEOUT, TOKEN, change_flags, edge, logged_outages, start_edges,
    start_three_edges, upstream_with_flags, wait_for_end_of_outage, wait_for_leader,
    wait_for_one_leader, wait_until_alone, wait_until_shared,
};
use crate::rig::{
    BUSY_MACHINE_FACTOR, ChaosProxy, Fault, Parapet, RedisServer, TcpProxy, wait_until,
};

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn killed_leader_is_replaced_and_every_request_is_answered() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let mut edges = start_three_edges(&upstream, &redis).await;
    let leader = edges.swap_remove(wait_for_one_leader(&edges).await);
    wait_until_shared(&redis, [&leader]).await;
    let load = Load::start(&edges);
    leader.kill();
    let killed_at = Instant::now();
    wait_for_leader(&edges).await;
    let limit = Duration::from_secs(10) * BUSY_MACHINE_FACTOR;
    assert!(killed_at.elapsed() < limit, "{:?}", killed_at.elapsed());
    change_flags(&upstream, &edges, "two").await;
    wait_until_shared(&redis, &edges).await;
    load.assert_all_answered();
    assert_eq!(edges.iter().map(logged_outages).collect::<Vec<_>>(), [(0, 0); 2]);
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn leader_that_was_suspended_beyond_its_lease_follows_and_never_goes_back() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let mut edges = start_three_edges(&upstream, &redis).await;
    let suspended = edges.swap_remove(wait_for_one_leader(&edges).await);
    wait_until_shared(&redis, [&suspended]).await;
    let load = Load::start(&edges);
    suspended.send_signal("STOP");
    wait_for_leader(&edges).await;
    change_flags(&upstream, &edges, "two").await;
    wait_until_shared(&redis, &edges).await;
    suspended.send_signal("CONT");
    suspended.wait_until_served(TOKEN, &["two"]).await;
    wait_until("it follows", TIMEOUT, async || {
        (suspended.metric(LEADS).await == Some(0.0)).then_some(())
    })
    .await;
    for _ in 0..20 {
        assert_eq!(suspended.served_flags(TOKEN).await, Ok(vec!["two".to_owned()]));
    }
    // It has not overwritten the flags of its successor.
    wait_until_shared(&redis, &edges).await;
    let fresh = edge(&upstream, &redis.url(), "d").start().await;
    assert_eq!(fresh.served_flags(TOKEN).await, Ok(vec!["two".to_owned()]));
    load.assert_all_answered();
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edges_serve_on_while_redis_is_dead_and_fill_it_again() {
    let (mut redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let mut edges = start_three_edges(&upstream, &redis).await;
    wait_for_one_leader(&edges).await;
    let load = Load::start(&edges);
    redis.kill();
    wait_until_alone(&edges).await;
    change_flags(&upstream, &edges, "two").await;
    let late = edge(&upstream, &redis.url(), "late").start().await;
    late.wait_until_served(TOKEN, &["two"]).await;
    edges.push(late);

    redis.restart().await;
    wait_for_one_leader(&edges).await;
    wait_until_shared(&redis, &edges).await;
    change_flags(&upstream, &edges, "three").await;
    wait_for_end_of_outage(&edges).await;
    load.assert_all_answered();
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edges_serve_current_flags_while_redis_has_no_memory() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let edges = start_three_edges(&upstream, &redis).await;
    wait_for_one_leader(&edges).await;
    wait_until_shared(&redis, &edges).await;
    for edge in &edges {
        wait_until("all instances are known", TIMEOUT, async || {
            (edge.metric("parapet_fleet_instances").await == Some(3.0)).then_some(())
        })
        .await;
    }
    let load = Load::start(&edges);
    assert_eq!(redis.cli(&["config", "set", "maxmemory", "1"]).await.trim(), "OK");
    // Its lease can still be renewed. The followers would see a leader, and never another document.
    change_flags(&upstream, &edges, "two").await;
    wait_until_alone(&edges).await;
    change_flags(&upstream, &edges, "three").await;

    assert_eq!(redis.cli(&["config", "set", "maxmemory", "0"]).await.trim(), "OK");
    wait_for_one_leader(&edges).await;
    wait_until_shared(&redis, &edges).await;
    change_flags(&upstream, &edges, "four").await;
    wait_for_end_of_outage(&edges).await;
    load.assert_all_answered();
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edges_serve_on_while_redis_does_not_respond() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let edges = start_three_edges(&upstream, &redis).await;
    wait_for_one_leader(&edges).await;
    let load = Load::start(&edges);
    redis.send_signal("STOP");
    wait_until_alone(&edges).await;
    change_flags(&upstream, &edges, "two").await;
    redis.send_signal("CONT");
    wait_for_one_leader(&edges).await;
    wait_until_shared(&redis, &edges).await;
    change_flags(&upstream, &edges, "three").await;
    wait_for_end_of_outage(&edges).await;
    load.assert_all_answered();
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edge_that_alone_cannot_reach_redis_fetches_for_itself_and_overwrites_nothing() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let proxy = TcpProxy::start(redis.port()).await;
    // The first instance becomes the leader.
    let proxied = format!("redis://127.0.0.1:{}", proxy.port());
    let mut edges = start_edges([edge(&upstream, &proxied, "cut-off")], &["one"]).await;
    wait_for_one_leader(&edges).await;
    let setups = ["b", "c"].map(|name| edge(&upstream, &redis.url(), name));
    edges.extend(start_edges(setups, &["one"]).await);
    let load = Load::start(&edges);
    proxy.close().await;
    wait_until_alone(&edges[..1]).await;
    assert_ne!(wait_for_leader(&edges).await, 0);
    change_flags(&upstream, &edges, "two").await;
    wait_until_shared(&redis, &edges).await;
    proxy.open().await;
    assert_ne!(wait_for_one_leader(&edges).await, 0);
    wait_until_shared(&redis, &edges).await;
    change_flags(&upstream, &edges, "three").await;
    wait_for_end_of_outage(&edges[..1]).await;
    assert_eq!(edges[1..].iter().map(logged_outages).collect::<Vec<_>>(), [(0, 0); 2]);
    load.assert_all_answered();
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn leader_that_cannot_reach_upstream_lets_another_lead() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let proxy = ChaosProxy::start(&upstream.url()).await;
    // The URL of upstream is the same for both: it is a part of the identity of a fleet.
    let setups = ["a", "b"].map(|name| {
        let edge = Parapet::edge("http://unleash.test").admin_token(ADMIN).with_short_intervals();
        edge.flag("--instance-id", name).env("PARAPET_STORE", redis.url())
    });
    let [first, second] = setups;
    let first = first.env("HTTP_PROXY", proxy.url());
    let second = second.env("HTTP_PROXY", upstream.url());
    let mut edges = start_edges([first], &["one"]).await;
    wait_for_one_leader(&edges).await;
    edges.extend(start_edges([second], &["one"]).await);
    for edge in &edges {
        wait_until("both are known", TIMEOUT, async || {
            (edge.metric("parapet_fleet_instances").await == Some(2.0)).then_some(())
        })
        .await;
    }
    let load = Load::start(&edges);
    proxy.set_fault(Fault::Disconnect).await;
    wait_until("the other edge leads", TIMEOUT, async || {
        (edges[1].metric(LEADS).await == Some(1.0)).then_some(())
    })
    .await;
    change_flags(&upstream, &edges, "two").await;
    load.assert_all_answered();
}
