//! Fleets on a Redis Cluster, on a master that Sentinels elect, and of a user with few rights.

use super::fixture::{
    Load, TIMEOUT, change_flags, edge, polling_instances, start_edges, upstream_with_flags,
    wait_for_one_leader,
};
use crate::rig::{RedisCluster, RedisSentinels, RedisServer, free_port, wait_until};

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edges_act_as_one_on_a_cluster() {
    let (cluster, upstream) = (RedisCluster::start().await, upstream_with_flags(&["p/one"]).await);
    let nodes: Vec<_> = cluster.ports().iter().map(|port| format!("127.0.0.1:{port}")).collect();
    let url = format!("redis+cluster://{}", nodes.join(","));
    let setups = ["a", "b"].map(|name| edge(&upstream, &url, name));
    let edges = start_edges(setups, &["one"]).await;
    let leader = wait_for_one_leader(&edges).await;
    assert_eq!(polling_instances(&upstream).await.len(), 1);
    change_flags(&upstream, &edges, "two").await;
    let follower = &edges[1 - leader];
    wait_until("a notice arrives from any node", TIMEOUT, async || {
        follower.metric("parapet_fleet_notices_total").await.filter(|count| *count > 0.0)
    })
    .await;
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edges_serve_on_while_sentinels_elect_another_master() {
    let mut redis = RedisSentinels::start().await;
    let upstream = upstream_with_flags(&["p/one"]).await;
    let url = format!("redis+sentinel://127.0.0.1:{}/main", redis.sentinel_port());
    let setups = ["a", "b"].map(|name| edge(&upstream, &url, name));
    let edges = start_edges(setups, &["one"]).await;
    wait_for_one_leader(&edges).await;
    let load = Load::start(&edges);
    redis.master.kill();
    change_flags(&upstream, &edges, "two").await;
    wait_until("Redis works for both", TIMEOUT * 2, async || {
        for edge in &edges {
            if edge.metric("parapet_fleet_redis_failing").await != Some(0.0) {
                return None;
            }
        }
        Some(())
    })
    .await;
    wait_for_one_leader(&edges).await;
    assert_eq!(polling_instances(&upstream).await.len(), 1);
    change_flags(&upstream, &edges, "three").await;
    load.assert_all_answered();
}

/// The rights that docs/configuration.md lists.
#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edge_needs_only_the_documented_rights() {
    let upstream = upstream_with_flags(&["p/one"]).await;
    let port = free_port();
    let port_text = port.to_string();
    let mut arguments = vec!["--port", &port_text, "--user", "default", "off"];
    arguments.extend(["--user", "parapet", "on", ">s3cr3t"]);
    arguments.extend(["~{parapet}:*", "~parapet:fleet:*", "&parapet:fleet:*"]);
    arguments.extend(["+@read", "+@write", "+@scripting", "+@connection", "+@pubsub", "+time"]);
    let _redis = RedisServer::start_with(port, &arguments).await;
    let url = format!("redis://parapet:s3cr3t@127.0.0.1:{port}");
    let edges = start_edges(["a", "b"].map(|name| edge(&upstream, &url, name)), &["one"]).await;
    wait_for_one_leader(&edges).await;
    change_flags(&upstream, &edges, "two").await;
    for edge in &edges {
        let log = edge.log();
        assert!(!log.contains("NoPerm") && !log.contains("permission"), "{log}");
    }
}
