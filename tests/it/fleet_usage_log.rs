//! The usage log of a fleet on a real Redis: what is held once, who may send it, and what stays when
//! leaders change or Redis has no memory.

use std::time::Duration;

use parapet::fleet::{
    BatchState, CLAIM_DURATION, Claim, Fence, FinalOutcome, LogSize, Taken, UsageLog, WaitingBatch,
};
use parapet::token::Environment;
use parapet::usage::{BatchId, MergedBatch, QueuedBatch, merge_batches};

use crate::fleet::{STABLE, fleet};
use crate::rig::RedisServer;

/// The start of the keys: they contain a digest of upstream's URL.
const KEY: &str = "test:fleet:{eu@3e48579bfb7fcc6e:usage}";

const OLD: Fence = Fence::new(7);
const NEW: Fence = Fence::new(8);

/// A body that cannot be merged with others.
const BODY: &[u8] = b"usage";

async fn start() -> (RedisServer, UsageLog) {
    let redis = RedisServer::start().await;
    lead(&redis, OLD).await;
    let log = fleet(&redis, "a", STABLE).usage_log();
    (redis, log)
}

/// Grants the lease of the usage.
async fn lead(redis: &RedisServer, fence: Fence) {
    redis.cli(&["set", &format!("{KEY}:fence"), &fence.get().to_string()]).await;
}

fn id(n: u32) -> BatchId {
    BatchId::parse(&format!("{n:032x}")).unwrap()
}

fn dev() -> Environment {
    Environment::new("dev")
}

async fn append(log: &UsageLog, n: u32) -> BatchState {
    log.append(id(n), &dev(), BODY, Duration::ZERO).await.unwrap()
}

async fn look(log: &UsageLog, n: u32) -> BatchState {
    log.look(id(n), &[]).await.unwrap()
}

async fn take(log: &UsageLog, fence: Fence) -> Taken {
    log.take(fence, true).await.unwrap().expect("it leads")
}

/// Several batches as one.
fn merged(n: u32, parts: &[u32]) -> MergedBatch {
    let parts = parts.iter().map(|n| id(*n)).collect();
    MergedBatch { id: id(n), parts, body: "merged".into() }
}

async fn is_empty(log: &UsageLog) -> bool {
    let LogSize { waiting, bytes, claims, epoch: _ } = log.size().await.unwrap();
    (waiting, bytes, claims) == (0, 0, 0)
}

async fn claim(log: &UsageLog, fence: Fence, batch: &MergedBatch) -> bool {
    log.claim(fence, &dev(), batch, CLAIM_DURATION).await.unwrap()
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn batch_is_held_once_until_its_instance_has_seen_its_outcome() {
    let (_redis, log) = start().await;
    assert_eq!(look(&log, 1).await, BatchState::Absent);
    for _ in 0..2 {
        assert_eq!(append(&log, 1).await, BatchState::Waiting);
        assert_eq!(look(&log, 1).await, BatchState::Waiting);
    }
    let waiting = WaitingBatch { id: id(1), environment: dev(), body: BODY.into() };
    assert_eq!(take(&log, OLD).await.batches, [waiting]);
    let batches = take(&log, OLD).await.batches;
    let batches = batches.into_iter().map(|it| QueuedBatch { id: it.id, body: it.body });
    let [merged] = &merge_batches(batches.collect(), usize::MAX)[..] else { panic!("one batch") };
    assert!(claim(&log, OLD, merged).await);
    assert_eq!(append(&log, 1).await, BatchState::Waiting);
    assert!(take(&log, OLD).await.batches.is_empty());

    for _ in 0..2 {
        log.finish(merged, FinalOutcome::Sent).await.unwrap();
        let sent = BatchState::Finished(FinalOutcome::Sent);
        assert_eq!((look(&log, 1).await, append(&log, 1).await), (sent, sent));
    }
    assert!(is_empty(&log).await);
    assert_eq!(log.look(id(2), &[id(1)]).await.unwrap(), BatchState::Absent);
    assert_eq!(look(&log, 1).await, BatchState::Absent);
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn environment_whose_batch_is_not_accepted_does_not_delay_others() {
    let (_redis, log) = start().await;
    append(&log, 1).await;
    assert!(claim(&log, OLD, &merged(9, &[1])).await);
    append(&log, 2).await;
    let other = Environment::new("other");
    log.append(id(3), &other, BODY, Duration::ZERO).await.unwrap();
    let Taken { claims, batches } = take(&log, OLD).await;
    assert_eq!(claims.len(), 1);
    assert_eq!(batches, [WaitingBatch { id: id(3), environment: other, body: BODY.into() }]);
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn only_the_leader_takes_and_claims() {
    let (redis, log) = start().await;
    append(&log, 1).await;
    lead(&redis, NEW).await;
    assert!(log.take(OLD, true).await.unwrap().is_none());
    let batch = merged(9, &[1]);
    assert!(!claim(&log, OLD, &batch).await);
    assert!(claim(&log, NEW, &batch).await);
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn next_leader_sends_a_claimed_batch_unchanged_after_the_claim_has_ended() {
    let (redis, log) = start().await;
    for n in [1, 2, 3] {
        append(&log, n).await;
    }
    let batch = merged(9, &[1, 2]);
    assert!(claim(&log, OLD, &batch).await);
    assert!(claim(&log, OLD, &batch).await, "the leader may prolong its claim");
    assert!(!claim(&log, OLD, &merged(8, &[2, 3])).await, "a part is claimed already");
    let Taken { claims, batches } = take(&log, OLD).await;
    let own = Claim { environment: dev(), batch: batch.clone(), held_for: Duration::ZERO };
    assert_eq!((&claims[..], batches.len()), (&[own.clone()][..], 0));

    lead(&redis, NEW).await;
    let Taken { claims, .. } = take(&log, NEW).await;
    let held_for = claims[0].held_for;
    assert!(held_for > Duration::from_secs(30) && held_for <= CLAIM_DURATION);
    assert!(!claim(&log, NEW, &batch).await, "the old leader may still be sending it");
    // The time of the claim has passed.
    let key = format!("{KEY}:deadlines");
    redis.cli(&["hset", &key, &id(9).to_string(), "7:1"]).await;
    assert_eq!(take(&log, NEW).await.claims, [own]);
    assert!(claim(&log, NEW, &batch).await);

    // The old leader has sent it after all: that is a fact.
    log.finish(&batch, FinalOutcome::Sent).await.unwrap();
    let Taken { claims, batches } = take(&log, NEW).await;
    assert_eq!((claims.len(), batches.len()), (0, 1));
    assert_eq!(look(&log, 2).await, BatchState::Finished(FinalOutcome::Sent));
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn parts_of_a_released_claim_wait_again() {
    let (redis, log) = start().await;
    for n in [1, 2] {
        append(&log, n).await;
    }
    let batch = merged(9, &[1, 2]);
    assert!(claim(&log, OLD, &batch).await);
    lead(&redis, NEW).await;
    log.release(NEW, &batch).await.unwrap();
    assert_eq!(take(&log, NEW).await.batches.len(), 0, "only the holder may release it");
    log.release(OLD, &batch).await.unwrap();
    assert_eq!(take(&log, NEW).await.batches.len(), 2);
    let LogSize { waiting, bytes, claims, epoch } = log.size().await.unwrap();
    assert_eq!((waiting, bytes, claims), (2, 2 * BODY.len(), 0));
    assert_eq!(log.size().await.unwrap().epoch, epoch);
    redis.cli(&["flushall"]).await;
    assert_ne!(log.size().await.unwrap().epoch, epoch);
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn outcome_is_kept_by_a_redis_that_has_lost_its_data() {
    let (redis, log) = start().await;
    append(&log, 1).await;
    let batch = merged(9, &[1, 2]);
    redis.cli(&["flushall"]).await;
    assert_eq!(look(&log, 1).await, BatchState::Absent);
    // The instance appends it again, and it waits as long as the old leader may be sending it.
    let again = log.append(id(1), &dev(), BODY, Duration::from_mins(1)).await.unwrap();
    assert_eq!(again, BatchState::Waiting);
    lead(&redis, NEW).await;
    assert!(take(&log, NEW).await.batches.is_empty());
    log.finish(&batch, FinalOutcome::Sent).await.unwrap();
    for n in [1, 2] {
        assert_eq!(look(&log, n).await, BatchState::Finished(FinalOutcome::Sent));
    }
    assert!(is_empty(&log).await);
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn log_is_bounded_and_drops_nothing() {
    let (_redis, log) = start().await;
    let large = vec![b'x'; 1 << 20];
    let append = async |n| log.append(id(n), &dev(), &large, Duration::ZERO).await.unwrap();
    for n in 0..64 {
        assert_eq!(append(n).await, BatchState::Waiting);
    }
    assert_eq!(append(64).await, BatchState::Full);
    assert_eq!(append(0).await, BatchState::Waiting, "it is held already");
    assert_eq!(look(&log, 64).await, BatchState::Absent);
    let batches = take(&log, OLD).await.batches;
    assert_eq!(batches.len(), 4, "the leader takes a part of it at once");
    let first = MergedBatch { id: id(0), parts: vec![id(0)], body: large.clone().into() };
    assert!(claim(&log, OLD, &first).await);
    log.finish(&first, FinalOutcome::Sent).await.unwrap();
    assert_eq!(append(64).await, BatchState::Waiting);
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn redis_without_memory_accepts_nothing_new_and_lets_the_leader_go_on() {
    let (redis, log) = start().await;
    append(&log, 1).await;
    redis.cli(&["config", "set", "maxmemory", "1"]).await;
    let error = log.append(id(2), &dev(), BODY, Duration::ZERO).await.unwrap_err();
    assert!(!error.is_outcome_unknown(), "{error:?}");
    assert_eq!(look(&log, 2).await, BatchState::Absent);
    let batch = merged(9, &[1]);
    assert_eq!(take(&log, OLD).await.batches.len(), 1);
    assert!(claim(&log, OLD, &batch).await);
    log.finish(&batch, FinalOutcome::Rejected).await.unwrap();
    assert_eq!(look(&log, 1).await, BatchState::Finished(FinalOutcome::Rejected));
}
