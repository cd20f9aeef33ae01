//! Edges of a fleet as an operator runs them: processes that share a Redis, in front of one upstream.
//!
//! `fleet` and `fleet_sync` cover the same in this process, with shorter intervals.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::rig::{
    BUSY_MACHINE_FACTOR, FEATURES, LogEvent, Parapet, RedisServer, ScriptedUpstream, Setup,
    TcpProxy, TokenKind, Unleash, UnleashVersion, http, secret_leak_check, wait_until,
};

/// Several times the duration of a lease.
const TIMEOUT: Duration = Duration::from_secs(30);

const ADMIN: &str = "*:*.fleet-admin-0123456789abcdef0123456789abcdef";
const TOKEN: &str = "*:development.fleet-0123456789abcdef0123456789";

const LEADS: &str = r#"parapet_fleet_leader{topic="flags:development"}"#;
const ALONE: &str = r#"parapet_fleet_alone{topic="flags:development"}"#;

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

/// Requests flags from edges all the time, as SDKs do.
struct Load {
    task: JoinHandle<()>,
    failures: Arc<Mutex<Vec<String>>>,
    count: Arc<AtomicUsize>,
}

impl Load {
    fn start<'a>(edges: impl IntoIterator<Item = &'a Parapet>) -> Self {
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
    fn assert_all_answered(self) {
        self.task.abort();
        let failures = self.failures.lock().unwrap();
        assert!(failures.is_empty(), "{failures:?}");
        assert!(self.count.load(Ordering::Relaxed) > 10);
    }
}

/// Waits until each edge fetches flags for itself.
async fn wait_until_alone<'a>(edges: impl IntoIterator<Item = &'a Parapet>) {
    for edge in edges {
        wait_until("the edge fetches for itself", TIMEOUT, async || {
            (edge.metric(ALONE).await == Some(1.0)).then_some(())
        })
        .await;
    }
}

/// Waits until one edge leads and the others follow.
async fn wait_for_one_leader(edges: &[Parapet]) -> usize {
    wait_until("one edge leads, and the others follow", TIMEOUT, async || {
        let mut leaders = Vec::new();
        for (n, edge) in edges.iter().enumerate() {
            if edge.metric(ALONE).await != Some(0.0) {
                return None;
            }
            if edge.metric(LEADS).await == Some(1.0) {
                leaders.push(n);
            }
        }
        <[usize; 1]>::try_from(leaders).ok().map(|[leader]| leader)
    })
    .await
}

/// Changes the flags, and waits until each edge serves the new ones.
async fn change_flags(upstream: &ScriptedUpstream, edges: &[Parapet], flag: &str) {
    upstream.set_flags("*", &[&format!("p/{flag}")]);
    for edge in edges {
        edge.wait_until_served(TOKEN, &[flag]).await;
    }
}

/// Waits until Redis has the flags that this leader has shared.
async fn wait_until_shared(redis: &RedisServer, leader: &Parapet) {
    wait_until("Redis has the flags of the leader", TIMEOUT, async || {
        let fleet = fleet_status(leader).await;
        let topics = fleet["topics"].as_array()?;
        let flags = topics.iter().find(|it| it["topic"] == "flags:development")?;
        let fence = flags["fence"].as_u64()?.to_string();
        let keys =
            redis.cli(&["--scan", "--pattern", "parapet:fleet:*flags:development*:document"]);
        let stored = redis.cli(&["hget", keys.await.trim(), "fence"]).await;
        (stored.trim() == fence).then_some(())
    })
    .await;
}

/// The number of times that an edge has logged the beginning and the end of an outage of Redis.
fn logged_outages(edge: &Parapet) -> (usize, usize) {
    let (began, ended) = (LogEvent::warn("fleet::hub"), LogEvent::info("fleet::hub"));
    (edge.logged(began).len(), edge.logged(ended).len())
}

/// Waits until each edge has logged one outage of Redis and its end.
async fn wait_for_end_of_outage(edges: &[Parapet]) {
    for edge in edges {
        edge.wait_until_logged(LogEvent::info("fleet::hub")).await;
        assert_eq!(logged_outages(edge), (1, 1), "{}", edge.log());
    }
}

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

/// The number of requests of an edge to upstream, without those of usage.
async fn upstream_requests(edge: &Parapet) -> u64 {
    let page = edge.metrics().await;
    let samples = page.lines().filter(|it| it.starts_with("parapet_upstream_requests_total{"));
    let samples = samples.filter(|it| !it.contains("purpose=\"usage\""));
    samples.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
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

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn killed_leader_is_replaced_and_every_request_is_answered() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let setups = ["a", "b", "c"].map(|name| edge(&upstream, &redis.url(), name));
    let mut edges = start_edges(setups, &["one"]).await;
    let leader = edges.swap_remove(wait_for_one_leader(&edges).await);
    wait_until_shared(&redis, &leader).await;
    let load = Load::start(&edges);
    leader.kill();
    let killed_at = Instant::now();
    let next = wait_for_leader(&edges).await;
    let limit = Duration::from_secs(10) * BUSY_MACHINE_FACTOR;
    assert!(killed_at.elapsed() < limit, "{:?}", killed_at.elapsed());
    change_flags(&upstream, &edges, "two").await;
    wait_until_shared(&redis, &edges[next]).await;
    load.assert_all_answered();
    assert_eq!(edges.iter().map(logged_outages).collect::<Vec<_>>(), [(0, 0); 2]);
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn leader_that_was_suspended_beyond_its_lease_follows_and_never_goes_back() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let setups = ["a", "b", "c"].map(|name| edge(&upstream, &redis.url(), name));
    let mut edges = start_edges(setups, &["one"]).await;
    let suspended = edges.swap_remove(wait_for_one_leader(&edges).await);
    wait_until_shared(&redis, &suspended).await;
    let load = Load::start(&edges);
    suspended.send_signal("STOP");
    let next = wait_for_leader(&edges).await;
    change_flags(&upstream, &edges, "two").await;
    wait_until_shared(&redis, &edges[next]).await;
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
    wait_until_shared(&redis, &edges[next]).await;
    let fresh = edge(&upstream, &redis.url(), "d").start().await;
    assert_eq!(fresh.served_flags(TOKEN).await, Ok(vec!["two".to_owned()]));
    load.assert_all_answered();
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edges_serve_on_while_redis_is_dead_and_fill_it_again() {
    let (mut redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let setups = ["a", "b", "c"].map(|name| edge(&upstream, &redis.url(), name));
    let mut edges = start_edges(setups, &["one"]).await;
    wait_for_one_leader(&edges).await;
    let load = Load::start(&edges);
    redis.kill();
    wait_until_alone(&edges).await;
    change_flags(&upstream, &edges, "two").await;
    let late = edge(&upstream, &redis.url(), "late").start().await;
    late.wait_until_served(TOKEN, &["two"]).await;
    edges.push(late);

    redis.restart().await;
    let leader = wait_for_one_leader(&edges).await;
    wait_until_shared(&redis, &edges[leader]).await;
    change_flags(&upstream, &edges, "three").await;
    wait_for_end_of_outage(&edges).await;
    load.assert_all_answered();
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edges_serve_current_flags_while_redis_has_no_memory() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let setups = ["a", "b", "c"].map(|name| edge(&upstream, &redis.url(), name));
    let edges = start_edges(setups, &["one"]).await;
    let leader = wait_for_one_leader(&edges).await;
    wait_until_shared(&redis, &edges[leader]).await;
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
    let leader = wait_for_one_leader(&edges).await;
    wait_until_shared(&redis, &edges[leader]).await;
    change_flags(&upstream, &edges, "four").await;
    wait_for_end_of_outage(&edges).await;
    load.assert_all_answered();
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edges_serve_on_while_redis_does_not_respond() {
    let (redis, upstream) = (RedisServer::start().await, upstream_with_flags(&["p/one"]).await);
    let setups = ["a", "b", "c"].map(|name| edge(&upstream, &redis.url(), name));
    let edges = start_edges(setups, &["one"]).await;
    wait_for_one_leader(&edges).await;
    let load = Load::start(&edges);
    redis.send_signal("STOP");
    wait_until_alone(&edges).await;
    change_flags(&upstream, &edges, "two").await;
    redis.send_signal("CONT");
    let leader = wait_for_one_leader(&edges).await;
    wait_until_shared(&redis, &edges[leader]).await;
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
    let leader = wait_for_leader(&edges).await;
    assert_ne!(leader, 0);
    change_flags(&upstream, &edges, "two").await;
    wait_until_shared(&redis, &edges[leader]).await;
    proxy.open().await;
    assert_eq!(wait_for_one_leader(&edges).await, leader);
    wait_until_shared(&redis, &edges[leader]).await;
    change_flags(&upstream, &edges, "three").await;
    wait_for_end_of_outage(&edges[..1]).await;
    assert_eq!(edges[1..].iter().map(logged_outages).collect::<Vec<_>>(), [(0, 0); 2]);
    load.assert_all_answered();
}
