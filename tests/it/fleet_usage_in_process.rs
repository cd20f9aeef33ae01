//! How instances hand usage over, and what their leader sends, on a real Redis and with a scripted
//! upstream in this process.
//!
//! `fleet_usage` covers processes, and `fleet_usage_log` the log alone.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use parapet::fleet::{Fleet, FleetUsageSink, Topic};
use parapet::token::Environment;
use parapet::usage::{BatchId, OutgoingBatch, SendOutcome, Shutdown, UsageSink};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::fleet::{STABLE, TIMEOUT, TIMING, fleet};
use crate::rig::{RedisServer, wait_until};

const INTERVAL: Duration = Duration::from_millis(300);

/// An upstream that answers with these outcomes, and then accepts everything.
#[derive(Debug, Default)]
struct ScriptedSink {
    outcomes: Mutex<VecDeque<SendOutcome>>,
    received: Mutex<Vec<OutgoingBatch>>,
}

impl UsageSink for ScriptedSink {
    fn send(&self, batch: OutgoingBatch) -> BoxFuture<'_, SendOutcome> {
        self.received.lock().unwrap().push(batch);
        let outcome = self.outcomes.lock().unwrap().pop_front().unwrap_or(SendOutcome::Sent);
        async move { outcome }.boxed()
    }
}

impl ScriptedSink {
    fn new(outcomes: impl IntoIterator<Item = SendOutcome>) -> Arc<Self> {
        let outcomes = Mutex::new(outcomes.into_iter().collect());
        Arc::new(Self { outcomes, ..Self::default() })
    }

    /// The ids of the batches that it received, and their evaluations.
    fn received(&self) -> Vec<(BatchId, u64)> {
        let received = self.received.lock().unwrap();
        received.iter().map(|batch| (batch.id, evaluations(&batch.body))).collect()
    }
}

fn evaluations(body: &[u8]) -> u64 {
    let body: Value = serde_json::from_slice(body).unwrap();
    let metrics = body["metrics"].as_array().unwrap().iter();
    metrics.filter_map(|metric| metric["yes"].as_u64()).sum()
}

fn id(n: u64) -> BatchId {
    BatchId::parse(&format!("{n:032x}")).unwrap()
}

/// The `n`-th batch, with `n` evaluations of a flag whose name is `flag`.
fn batch_of(n: u64, flag: &str) -> OutgoingBatch {
    let metric = json!({ "featureName": flag, "appName": "a", "environment": "dev",
                         "timestamp": "2026-01-02T03:00:00Z", "yes": n, "no": 0, "variants": {} });
    let body = json!({ "applications": [], "metrics": [metric] });
    let (environment, body) = (Environment::new("dev"), body.to_string().into());
    OutgoingBatch { id: id(n), environment, body, may_be_parked: false }
}

fn batch(n: u64) -> OutgoingBatch {
    batch_of(n, "f")
}

/// The same batch, which was parked before.
fn parked(n: u64) -> OutgoingBatch {
    OutgoingBatch { may_be_parked: true, ..batch(n) }
}

fn sink(redis: &RedisServer, name: &str, upstream: &Arc<ScriptedSink>) -> FleetUsageSink {
    fleet(redis, name, TIMING).usage_sink(Arc::<ScriptedSink>::clone(upstream), INTERVAL)
}

fn is_parked(outcome: SendOutcome) -> bool {
    matches!(outcome, SendOutcome::Parked(_))
}

/// An instance that may lead; it ends without leaving when dropped.
struct Leader {
    fleet: Fleet,
    tasks: [JoinHandle<()>; 2],
}

impl Leader {
    fn start(redis: &RedisServer, name: &str, upstream: &Arc<ScriptedSink>) -> Self {
        let fleet = fleet(redis, name, TIMING);
        let leader = fleet.usage_leader(Arc::<ScriptedSink>::clone(upstream), INTERVAL);
        let (requested, forced) = (CancellationToken::new(), CancellationToken::new());
        let ending = Shutdown { requested, grace: Duration::from_secs(1), forced };
        let is_flushed = CancellationToken::new();
        let part = fleet.join(Topic::Usage);
        let lead = tokio::spawn(async move { leader.run(part, &is_flushed, &ending).await });
        let member = fleet.clone();
        let register = tokio::spawn(async move { member.run().await });
        Self { fleet, tasks: [lead, register] }
    }

    async fn wait_until_it_leads(&self) {
        wait_until("it leads", TIMEOUT, async || {
            let status = self.fleet.status();
            status.topics.first().and_then(|topic| topic.fence).map(drop)
        })
        .await;
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

async fn wait_until_sent(sink: &FleetUsageSink, n: u64) {
    wait_until("the batch is sent", TIMEOUT, async || {
        let outcome = sink.send(parked(n)).await;
        assert!(is_parked(outcome) || outcome == SendOutcome::Sent, "{outcome:?}");
        (outcome == SendOutcome::Sent).then_some(())
    })
    .await;
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn leader_sends_the_batches_of_all_instances_as_one() {
    let (redis, upstream) = (RedisServer::start().await, ScriptedSink::new([]));
    let sinks = ["a", "b"].map(|name| sink(&redis, name, &upstream));
    for (sink, n) in sinks.iter().zip([1, 2]) {
        assert!(is_parked(sink.send(batch(n)).await));
        assert!(is_parked(sink.send(parked(n)).await));
    }
    let _leader = Leader::start(&redis, "c", &upstream);
    for (sink, n) in sinks.iter().zip([1, 2]) {
        wait_until_sent(sink, n).await;
    }
    let [(merged, evaluations)] = upstream.received()[..] else { panic!("one batch") };
    assert_eq!(evaluations, 3);
    assert!(merged != id(1) && merged != id(2));
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn batch_with_an_unknown_outcome_is_sent_again_unchanged_by_the_next_leader() {
    let redis = RedisServer::start().await;
    let failing = ScriptedSink::new([SendOutcome::Retry(None); 100]);
    let upstream = ScriptedSink::new([]);
    let sink = sink(&redis, "a", &upstream);
    for n in [1, 2] {
        assert!(is_parked(sink.send(batch(n)).await));
    }
    let first = Leader::start(&redis, "first", &failing);
    first.wait_until_it_leads().await;
    wait_until("the first leader tries to send", TIMEOUT, async || {
        (!failing.received().is_empty()).then_some(())
    })
    .await;
    // Appended later, so it is not in the merged batch.
    assert!(is_parked(sink.send(batch(4)).await));
    drop(first);
    let _second = Leader::start(&redis, "second", &upstream);
    for n in [1, 2, 4] {
        wait_until_sent(&sink, n).await;
    }
    assert_eq!(upstream.received()[0], failing.received()[0]);
    assert_eq!(upstream.received()[1], (id(4), 4));
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn merged_batch_that_is_too_large_is_sent_in_parts() {
    let redis = RedisServer::start().await;
    let upstream = ScriptedSink::new([SendOutcome::TooLarge]);
    let sink = sink(&redis, "a", &upstream);
    for n in [1, 2] {
        let long = n.to_string().repeat(5000);
        assert!(is_parked(sink.send(batch_of(n, &long)).await));
    }
    let _leader = Leader::start(&redis, "b", &upstream);
    for n in [1, 2] {
        wait_until_sent(&sink, n).await;
    }
    let received = upstream.received();
    assert_eq!(received[0].1, 3);
    assert_eq!(received[1..], [(id(1), 1), (id(2), 2)]);
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn instance_learns_that_its_batch_was_rejected_or_is_too_large_alone() {
    let redis = RedisServer::start().await;
    let expected = [SendOutcome::Rejected, SendOutcome::TooLarge];
    let upstream = ScriptedSink::new(expected);
    let sink = sink(&redis, "a", &upstream);
    let _leader = Leader::start(&redis, "b", &upstream);
    for (n, expected) in [(1, expected[0]), (2, expected[1])] {
        assert!(is_parked(sink.send(batch(n)).await));
        let outcome = wait_until("the outcome is known", TIMEOUT, async || {
            let outcome = sink.send(parked(n)).await;
            (!is_parked(outcome)).then_some(outcome)
        })
        .await;
        assert_eq!(outcome, expected);
    }
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn batch_that_is_appended_again_after_redis_lost_its_data_is_not_sent_again() {
    let (redis, upstream) = (RedisServer::start().await, ScriptedSink::new([]));
    let sink = sink(&redis, "a", &upstream);
    assert!(is_parked(sink.send(batch(1)).await));
    let old = Leader::start(&redis, "old", &upstream);
    wait_until("it is sent", TIMEOUT, async || (!upstream.received().is_empty()).then_some(()))
        .await;
    wait_until("its outcome is stored", TIMEOUT, async || {
        let outcomes = redis.cli(&["--scan", "--pattern", "*usage}:outcomes"]).await;
        (!outcomes.is_empty()).then_some(())
    })
    .await;
    redis.cli(&["flushall"]).await;
    assert!(is_parked(sink.send(parked(1)).await), "Redis does not know it");
    wait_until_sent(&sink, 1).await;
    old.wait_until_it_leads().await;
    assert_eq!(upstream.received(), [(id(1), 1)]);
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn instance_sends_itself_only_what_the_log_does_not_hold() {
    let (mut redis, upstream) = (RedisServer::start().await, ScriptedSink::new([]));
    let sink = sink(&redis, "a", &upstream);
    assert!(is_parked(sink.send(batch(1)).await));
    redis.kill();
    let outcome = sink.send(batch(2)).await;
    assert!(matches!(outcome, SendOutcome::Retry(_)), "it waits for Redis first: {outcome:?}");
    wait_until("it is sent without Redis", TIMEOUT, async || {
        assert!(is_parked(sink.send(parked(1)).await), "the leader may have it");
        (sink.send(batch(2)).await == SendOutcome::Sent).then_some(())
    })
    .await;
    // From the first attempt on, this instance sends it, also if Redis returns.
    upstream.outcomes.lock().unwrap().push_back(SendOutcome::Retry(None));
    assert_eq!(sink.send(batch(3)).await, SendOutcome::Retry(None));
    redis.restart().await;
    assert_eq!(sink.send(batch(3)).await, SendOutcome::Sent);
    assert_eq!(upstream.received(), [(id(2), 2), (id(3), 3), (id(3), 3)]);

    let count = AtomicU64::new(4);
    wait_until("usage is handed over again", TIMEOUT, async || {
        let next = batch(count.fetch_add(1, Ordering::Relaxed));
        is_parked(sink.send(next).await).then_some(())
    })
    .await;
    assert!(is_parked(sink.send(parked(1)).await), "it is appended again");
    let waiting = redis.cli(&["--scan", "--pattern", "*usage}:waiting"]).await;
    assert_eq!(redis.cli(&["zcard", waiting.trim()]).await.trim(), "2");
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn instance_that_ends_without_redis_sends_its_usage_itself_at_once() {
    let (mut redis, upstream) = (RedisServer::start().await, ScriptedSink::new([]));
    let sink =
        fleet(&redis, "a", STABLE).usage_sink(Arc::<ScriptedSink>::clone(&upstream), INTERVAL);
    redis.kill();
    assert!(matches!(sink.send(batch(1)).await, SendOutcome::Retry(_)));
    sink.begin_shutdown();
    assert_eq!(sink.send(batch(1)).await, SendOutcome::Sent);
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn redis_without_memory_is_as_good_as_none_for_new_batches() {
    let (redis, upstream) = (RedisServer::start().await, ScriptedSink::new([]));
    let sink = sink(&redis, "a", &upstream);
    assert!(is_parked(sink.send(batch(1)).await));
    let _leader = Leader::start(&redis, "b", &ScriptedSink::new([]));
    redis.cli(&["config", "set", "maxmemory", "1"]).await;
    wait_until("a new batch is sent without Redis", TIMEOUT, async || {
        (sink.send(batch(2)).await == SendOutcome::Sent).then_some(())
    })
    .await;
    assert_eq!(upstream.received(), [(id(2), 2)]);
    redis.cli(&["config", "set", "maxmemory", "0"]).await;
    wait_until_sent(&sink, 1).await;
}
