//! Edges of one fleet, in this process, on a real Redis: the flags that they serve, and how often they poll
//! upstream together.
//!
//! `fleet` covers leases and documents.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parapet::background_writer::BackgroundWriter;
use parapet::event_log::EventLog;
use parapet::fleet::{Fleet, Role, Timing};
use parapet::served::Snapshots;
use parapet::store::{MemoryStore, Store};
use parapet::sync::environment_manager::{EnvironmentManager, EnvironmentSelection};
use parapet::sync::{self, UpstreamMode};
use parapet::telemetry::Readiness;
use parapet::token::{Environment, Grant, Projects, Scope, Token, TokenKind};
use parapet::upstream::{self, EnvironmentTokens, Upstream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::fleet::{ENVIRONMENT, STABLE, TIMEOUT, TIMING, fleet};
use crate::rig::{FEATURES, RedisServer, ScriptedUpstream, wait_until};

const TOKEN: &str = "*:dev.fleet-0123456789abcdef0123456789abcdef";

/// An instance that serves the flags of an upstream, with the polling interval of the tests.
struct Edge {
    snapshots: Snapshots,
    fleet: Fleet,
    tasks: Vec<JoinHandle<()>>,
}

impl Edge {
    fn start(redis: &RedisServer, upstream: &ScriptedUpstream, name: &str, timing: Timing) -> Self {
        let fleet = fleet(redis, name, timing);
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let upstream = Upstream::new(upstream::Config {
            url: upstream.url().parse().unwrap(),
            token_header: hyper::header::AUTHORIZATION,
            extra_headers: Vec::new(),
            request_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(15),
            certificate_file: None,
            client_certificate: None,
            skip_certificate_verification: false,
            no_proxy: String::new(),
            app_name: "parapet".to_owned(),
            instance_id: name.to_owned(),
        });
        let credentials = EnvironmentTokens::without_admin();
        let environment = Environment::new(ENVIRONMENT);
        let scope = Scope { environment: environment.clone(), projects: Projects::All };
        let grant = Grant { kind: TokenKind::Client, scope };
        credentials.offer(&Token::parse(TOKEN).unwrap(), &grant);
        credentials.mark_configured_validated();
        let snapshots = Snapshots::default();
        let manager = EnvironmentManager {
            config: sync::Config { interval: Duration::from_millis(200), mode: UpstreamMode::Poll },
            selection: EnvironmentSelection::Named(BTreeSet::from([environment])),
            upstream: upstream.unwrap(),
            credentials,
            token_added: Arc::new(Notify::new()),
            snapshots: snapshots.clone(),
            store: Arc::clone(&store),
            writer: BackgroundWriter::new(store),
            event_log: EventLog::unavailable(),
            fleet: Some(fleet.clone()),
        };
        let notices = fleet.clone();
        let tasks = vec![
            tokio::spawn(async move {
                let (_readiness, ready) = Readiness::new();
                manager.run(&ready).await;
            }),
            tokio::spawn(async move { notices.run().await }),
        ];
        Self { snapshots, fleet, tasks }
    }

    async fn wait_until_served(&self, names: &[&str]) {
        wait_until(&format!("{names:?} are served"), TIMEOUT, async || {
            let snapshot = self.snapshots.load(&Environment::new(ENVIRONMENT))?;
            let served = snapshot.document().features().iter().map(|it| &**it.name());
            served.eq(names.iter().copied()).then_some(())
        })
        .await;
    }

    async fn wait_for_role(&self, role: Role) {
        let what = format!("the edge is {}", role.as_str());
        wait_until(&what, TIMEOUT, async || (self.role() == Some(role)).then_some(())).await;
    }

    fn role(&self) -> Option<Role> {
        self.fleet.status().topics.first().map(|topic| topic.role)
    }

    /// Ends without leaving.
    fn kill(&mut self) {
        self.tasks.drain(..).for_each(|task| task.abort());
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.kill();
    }
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn upstream_sees_the_polls_of_one_edge() {
    let redis = RedisServer::start().await;
    let upstream = ScriptedUpstream::start().await;
    upstream.set_flags("*", &["p/one"]);
    let first = Edge::start(&redis, &upstream, "a", STABLE);
    first.wait_until_served(&["one"]).await;
    first.wait_for_role(Role::Leader).await;
    let followers = [(); 4].map(|()| Edge::start(&redis, &upstream, "f", STABLE));
    for follower in &followers {
        follower.wait_until_served(&["one"]).await;
        assert_eq!(follower.role(), Some(Role::Follower));
    }
    upstream.set_flags("*", &["p/one", "p/two"]);
    for edge in followers.iter().chain([&first]) {
        edge.wait_until_served(&["one", "two"]).await;
    }
    // Followers would have polled as often as the leader.
    let before = upstream.poll_count(TOKEN);
    upstream.wait_for_requests(FEATURES, before + 5).await;
    let polled_by = upstream.instance_ids();
    assert_eq!(polled_by, BTreeSet::from(["a".to_owned()]));
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn edges_serve_on_through_every_change_of_the_leader() {
    let mut redis = RedisServer::start().await;
    let upstream = ScriptedUpstream::start().await;
    upstream.set_flags("*", &["p/one"]);
    let mut edges: Vec<_> =
        ["a", "b", "c"].map(|name| Edge::start(&redis, &upstream, name, TIMING)).into();
    for edge in &edges {
        edge.wait_until_served(&["one"]).await;
    }
    let leader = wait_until("one leads", TIMEOUT, async || {
        edges.iter().position(|edge| edge.role() == Some(Role::Leader))
    })
    .await;
    edges.swap_remove(leader).kill();
    upstream.set_flags("*", &["p/two"]);
    for edge in &edges {
        edge.wait_until_served(&["two"]).await;
    }
    redis.kill();
    upstream.set_flags("*", &["p/three"]);
    for edge in &edges {
        edge.wait_until_served(&["three"]).await;
    }
    redis.restart().await;
    wait_until("there is one leader again", TIMEOUT, async || {
        let mut roles: Vec<_> = edges.iter().filter_map(Edge::role).map(Role::as_str).collect();
        roles.sort_unstable();
        (roles == ["follower", "leader"]).then_some(())
    })
    .await;
    upstream.set_flags("*", &["p/four"]);
    for edge in &edges {
        edge.wait_until_served(&["four"]).await;
    }
    // A new instance finds the flags in the Redis that was empty.
    let fresh = Edge::start(&redis, &upstream, "d", TIMING);
    fresh.wait_until_served(&["four"]).await;
    fresh.wait_for_role(Role::Follower).await;
}
