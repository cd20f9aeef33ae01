//! Event streams that continue at another edge of the fleet.

use super::fixture::{
    TOKEN, change_flags, start_three_edges, upstream_with_flags, wait_for_leader,
};
use crate::rig::{DeltaStream, Parapet, RedisServer, summary};

/// What an edge sends first to a client that has received the event `last`: the id of its state, and a
/// summary of the changes since.
async fn changes_since(edge: &Parapet, last: &str) -> (String, Vec<(String, String)>) {
    let mut stream = DeltaStream::open(&edge.url(), TOKEN, Some(last)).await;
    let (_, id, changes) = stream.next_update().await;
    (id, changes)
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn stream_continues_at_any_edge_also_after_changes_of_the_leader_and_restarts() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let edges = start_three_edges(&upstream, &redis).await;
    let leader = wait_for_leader(&edges).await;
    let mut stream = DeltaStream::open(&edges[leader].url(), TOKEN, None).await;
    let (_, first, all) = stream.next_update().await;
    assert_eq!(all, [summary("hydration", "one")]);
    change_flags(&upstream, &edges, "two").await;
    let (_, second, changes) = stream.next_update().await;
    let to_two = [summary("feature-removed", "one"), summary("feature-updated", "two")];
    assert_eq!(changes, to_two);
    for edge in &edges {
        assert_eq!(changes_since(edge, &first).await, (second.clone(), to_two.to_vec()));
        assert_eq!(changes_since(edge, &second).await, (second.clone(), vec![]));
    }

    // The next leader goes on with ids that are larger, and shared as well.
    edges[leader].kill();
    let others: Vec<_> = (0..edges.len()).filter(|it| *it != leader).map(|it| &edges[it]).collect();
    upstream.set_flags("*", &["p/three"]);
    let to_three = [summary("feature-updated", "three"), summary("feature-removed", "two")];
    let mut ids = Vec::new();
    for edge in others {
        edge.wait_until_served(TOKEN, &["three"]).await;
        let (id, changes) = changes_since(edge, &second).await;
        assert_eq!(changes, to_three);
        ids.push(id);
    }
    assert_eq!(ids[0], ids[1]);

    // An edge that starts has only the latest state: it knows whether a client is current.
    edges[leader].restart();
    edges[leader].wait_until_ready().await;
    edges[leader].wait_until_served(TOKEN, &["three"]).await;
    assert_eq!(changes_since(&edges[leader], &ids[0]).await, (ids[0].clone(), vec![]));
    let whole = vec![summary("hydration", "three")];
    assert_eq!(changes_since(&edges[leader], &second).await, (ids[0].clone(), whole));
}
