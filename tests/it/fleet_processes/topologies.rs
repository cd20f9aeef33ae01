//! Fleets on a Redis Cluster and on a master that Sentinels elect.

use super::fixture::{
    Load, TIMEOUT, change_flags, edge, polling_instances, start_edges, upstream_with_flags,
    wait_for_one_leader,
};
use crate::rig::{RedisCluster, RedisSentinels, wait_until};

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
