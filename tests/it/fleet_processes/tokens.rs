//! The token list and first-seen tokens.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use reqwest::StatusCode;

use super::fixture::{
    ADMIN, TIMEOUT, TOKEN, edge, start_edges, start_three_edges, upstream_with_flags,
    wait_for_leader,
};
use crate::rig::{Parapet, RedisServer, secret_leak_check, wait_until};

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn one_edge_reads_the_token_list_and_a_revocation_reaches_all() {
    const OTHER: &str = "*:development.other-0123456789abcdef0123456789";
    const THIRD: &str = "*:development.third-0123456789abcdef0123456789";
    const LIST: &str = "/api/admin/api-tokens";
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    for token in [OTHER, THIRD] {
        secret_leak_check::register(token);
    }
    upstream.state().listed_tokens = [ADMIN, TOKEN, OTHER, THIRD].into();
    let [first, second, third] = ["a", "b", "c"].map(|name| edge(&upstream, &redis.url(), name));
    let mut edges = start_edges([first], &["one"]).await;
    wait_for_leader(&edges).await;
    edges.extend(start_edges([second, third], &["one"]).await);
    for edge in &edges {
        wait_until("the tokens are known", TIMEOUT, async || {
            let (_, status) = edge.admin_get_as("/status", ADMIN).await;
            (status["tokens"]["valid"] == 3).then_some(())
        })
        .await;
        let validations = upstream.requests("/edge/validate").len();
        for token in [OTHER, THIRD] {
            assert_eq!(edge.features_status(token).await, StatusCode::OK);
        }
        // The list was sufficient, of which followers have only the digests.
        assert_eq!(upstream.requests("/edge/validate").len(), validations);
    }
    let before = upstream.requests(LIST).len();
    let lists = upstream.wait_for_requests(LIST, before + 5).await;
    let by: BTreeSet<_> = lists.into_iter().skip(before).filter_map(|it| it.instance_id).collect();
    assert_eq!(by, BTreeSet::from(["a".to_owned()]));
    let key = redis.cli(&["--scan", "--pattern", "parapet:fleet:*:tokens}:document"]).await;
    assert!(!key.trim().is_empty());

    let wait_until_rejected = async |edges: &[Parapet], token| {
        for edge in edges {
            wait_until("the token is rejected", TIMEOUT, async || {
                (edge.features_status(token).await == StatusCode::UNAUTHORIZED).then_some(())
            })
            .await;
        }
    };
    upstream.state().revoked.insert(OTHER);
    wait_until_rejected(&edges, OTHER).await;
    edges.swap_remove(0).kill();
    upstream.state().revoked.insert(THIRD);
    wait_until_rejected(&edges, THIRD).await;
    for edge in &edges {
        assert_eq!(edge.features_status(TOKEN).await, StatusCode::OK);
    }
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn first_seen_token_is_validated_by_one_edge_for_all() {
    const VALIDATE: &str = "/edge/validate";
    let (mut redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    upstream.state().listed_tokens = [ADMIN].into();
    upstream.state().valid_tokens_contain = "fleet";
    let setups = ["a", "b", "c"].map(|name| {
        // Known tokens are validated again at long intervals only.
        let edge = Parapet::edge(&upstream.url()).admin_token(ADMIN).flag("--instance-id", name);
        let edge = edge.flag("--token-list-interval-seconds", "3600");
        edge.flag("--upstream-mode", "poll").env("PARAPET_STORE", redis.url())
    });
    let edges = start_edges(setups, &["one"]).await;
    let present = async |token: String| {
        secret_leak_check::register(&token);
        join_all(edges.iter().map(|edge| edge.features_status(&token))).await
    };
    let before = upstream.requests(VALIDATE).len();
    for n in 0..20 {
        let statuses = present(format!("*:development.fleet-first-seen-{n}-0123456789")).await;
        assert_eq!(statuses, [StatusCode::OK; 3]);
    }
    // Each of the others would have asked as often. On a busy machine some do not wait for the verdict.
    let validations = upstream.requests(VALIDATE).len() - before;
    assert!((20..40).contains(&validations), "{validations}");
    let statuses = present("*:development.invented-0123456789abcdef".to_owned()).await;
    assert_eq!(statuses, [StatusCode::UNAUTHORIZED; 3]);
    let keys = redis.cli(&["--scan", "--pattern", "parapet:fleet:*:answers}:*"]).await;
    assert!(!keys.is_empty() && !keys.contains("first-seen"), "{keys}");

    redis.kill();
    let statuses = present("*:development.fleet-without-redis-0123456789".to_owned()).await;
    assert_eq!(statuses, [StatusCode::OK; 3]);
}

/// Only a leader lists tokens; the others notice by themselves.
#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn rejected_admin_token_opens_no_edge_any_more() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    upstream.state().listed_tokens = [ADMIN, TOKEN].into();
    let edges = start_three_edges(&upstream, &redis).await;
    for edge in &edges {
        assert_eq!(edge.admin_get_as("/status", ADMIN).await.0, StatusCode::OK);
    }
    upstream.state().revoked.insert(ADMIN);
    for edge in &edges {
        wait_until("the admin token is rejected", TIMEOUT * 3, async || {
            let (status, _) = edge.admin_get_as("/status", ADMIN).await;
            (status == StatusCode::UNAUTHORIZED).then_some(())
        })
        .await;
        assert_eq!(edge.features_status(TOKEN).await, StatusCode::OK);
    }
}
