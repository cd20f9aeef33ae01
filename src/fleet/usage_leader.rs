//! Sends the usage of all instances, while this instance leads the topic.
//!
//! Once an interval, or earlier if much is waiting, it takes the batches from the log, merges those of an
//! environment, and sends the merged batches one after the other. A merged batch is claimed first, and
//! sent unchanged until upstream accepts or rejects it, by this leader or the next. Its outcome is stored
//! right after, and again until Redis has accepted it, whether or not this instance still leads.
//!
//! A leader that cannot reach upstream leads on. It gives up the topics of flags and tokens then, and usage
//! is handed over to the instance that leads those.
//!
//! # When a batch is counted twice
//!
//! The only ambiguity is the time between upstream's acceptance and the storing of the outcome. If the
//! leader is killed then, or is cut off from Redis until its claim has ended, the next leader sends the
//! merged batch again with the same id: a Parapet as upstream recognises it, Unleash counts it twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use metrics::{counter, describe_counter, describe_gauge, gauge};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::{
    coordinator::Coordinator,
    hub::Hub,
    member::Member,
    recent_outcomes::RecentOutcomes,
    role::Fence,
    usage_log::{CLAIM_DURATION, Claim, FinalOutcome, LogSize, Taken, UsageLog},
};
use crate::{
    backoff::Backoff,
    telemetry::error_chain,
    token::Environment,
    usage::{
        MergedBatch, OutgoingBatch, QueuedBatch, SendOutcome, Shutdown, UsageSink, merge_batches,
    },
};

const WAITING: &str = "parapet_fleet_usage_waiting";
const BYTES: &str = "parapet_fleet_usage_waiting_bytes";
const MERGED: &str = "parapet_fleet_usage_merged_total";
const BATCHES: &str = "parapet_fleet_usage_batches_total";

/// The longest that sending takes. It ends before the claim does, so that two leaders never send at the same
/// time.
const SEND_TIMEOUT: Duration = Duration::from_secs(45);
const _: () = assert!(SEND_TIMEOUT.as_secs() < CLAIM_DURATION.as_secs());
/// How long to wait for responses when shutdown is forced.
const FORCED_RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);
/// How often the log is looked at.
const TICK: Duration = Duration::from_secs(1);
/// Usage of this size is sent before the end of the interval, in bytes.
const EARLY_BYTES: usize = 512 * 1024;
/// The delays between attempts to send.
const MIN_RETRY_DELAY: Duration = Duration::from_secs(1);
const MAX_RETRY_DELAY: Duration = Duration::from_mins(1);
/// The smallest body to choose if upstream rejects bodies as too large, in bytes.
const MIN_BODY_BYTES: usize = 4096;
/// The largest body, in bytes; merging has a smaller limit of its own.
const MAX_BODY_BYTES: usize = 1 << 20;

/// Sends the usage in the log of a fleet.
#[derive(Clone, Debug)]
pub struct UsageLeader {
    log: UsageLog,
    hub: Arc<Hub>,
    upstream: Arc<dyn UsageSink>,
    interval: Duration,
}

/// The work of one run.
struct Delivery<'a> {
    leader: &'a UsageLeader,
    member: Member,
    next_round: Instant,
    /// Environments whose last batch was not accepted.
    failures: BTreeMap<Environment, Failure>,
    /// Outcomes that Redis does not have yet. An environment whose outcomes are missing is not sent further,
    /// so there are few.
    unstored: Vec<(MergedBatch, FinalOutcome)>,
    outcomes: RecentOutcomes,
    /// The last known epoch of the log.
    epoch: Option<String>,
    max_body: usize,
}

#[derive(Debug)]
struct Failure {
    backoff: Backoff,
    retry_at: Instant,
}

/// Batches by environment.
type Work<T> = BTreeMap<Environment, Vec<T>>;

/// What became of a merged batch.
struct Attempt {
    environment: Environment,
    batch: MergedBatch,
    /// `None` if another instance leads or has claimed it.
    outcome: Option<SendOutcome>,
    /// Whether Redis has the outcome.
    is_stored: bool,
}

impl UsageLeader {
    pub(super) fn new(
        log: UsageLog,
        hub: Arc<Hub>,
        upstream: Arc<dyn UsageSink>,
        interval: Duration,
    ) -> Self {
        describe_gauge!(WAITING, "Batches of usage that wait for the leader of the fleet");
        describe_gauge!(BYTES, "Size of the usage that waits for the leader of the fleet");
        describe_counter!(MERGED, "Batches of usage that this instance merged as the leader");
        describe_counter!(BATCHES, "Attempts to send merged usage as the leader, by outcome");
        Self { log, hub, upstream, interval }
    }

    /// Sends usage while this instance leads [`Topic::Usage`](super::Topic::Usage), which `member` and
    /// `coordinator` are for, until `is_flushed`: this instance ends and has handed its last usage over.
    /// Then sends everything that waits, within the grace period of `ending`, because there may be no other
    /// instance.
    ///
    /// Dropping the future is safe: the next leader sends what is left.
    pub async fn run(
        &self,
        (member, coordinator): (Member, Coordinator),
        is_flushed: &CancellationToken,
        ending: &Shutdown,
    ) {
        let mut delivery = Delivery::new(self, member);
        let lead = async {
            loop {
                tokio::select! {
                    () = sleep(TICK.min(self.interval)) => delivery.tick().await,
                    () = is_flushed.cancelled() => break,
                }
            }
            delivery.send_all().await;
        };
        let grace_over = async {
            is_flushed.cancelled().await;
            tokio::select! {
                () = sleep(ending.grace) => {}
                () = ending.forced.cancelled() => sleep(FORCED_RESPONSE_TIMEOUT).await,
            }
        };
        tokio::select! {
            () = coordinator.run() => {}
            () = lead => {}
            () = grace_over => {}
        }
    }
}

impl<'a> Delivery<'a> {
    fn new(leader: &'a UsageLeader, member: Member) -> Self {
        Self {
            leader,
            member,
            next_round: Instant::now(),
            failures: BTreeMap::new(),
            unstored: Vec::new(),
            outcomes: RecentOutcomes::default(),
            epoch: None,
            max_body: MAX_BODY_BYTES,
        }
    }

    /// Does what is due.
    async fn tick(&mut self) {
        self.store_outcomes().await;
        let fence = self.member.fence();
        if fence.is_none() {
            set_gauges(&LogSize::default());
            if self.outcomes.is_empty() {
                return;
            }
        }
        let Some(size) = self.request(self.leader.log.size()).await else { return };
        self.check_epoch(&size.epoch);
        let Some(fence) = fence else { return };
        set_gauges(&size);
        let now = Instant::now();
        let is_early = size.bytes >= EARLY_BYTES && self.failures.is_empty();
        let is_round = size.waiting > 0 && (self.next_round <= now || is_early);
        if is_round {
            self.next_round = now + self.leader.interval;
        }
        let is_retry_due = self.failures.values().all(|failure| failure.retry_at <= now);
        if is_round || size.claims > 0 && is_retry_due {
            self.round(fence, is_round).await;
        }
    }

    /// Sends everything that waits, until something cannot be sent.
    async fn send_all(&mut self) {
        while let Some(fence) = self.member.fence() {
            let is_complete = self.round(fence, true).await;
            self.store_outcomes().await;
            if !is_complete || !self.failures.is_empty() {
                return;
            }
        }
    }

    /// Sends claimed batches again, and merges and sends those that wait. Returns whether anything was sent.
    async fn round(&mut self, fence: Fence, with_waiting: bool) -> bool {
        let log = &self.leader.log;
        let Some(Some(taken)) = self.request(log.take(fence, with_waiting)).await else {
            return false;
        };
        let (mut work, waiting) = self.plan(taken, Instant::now());
        for (environment, batches) in waiting {
            work.insert(environment, self.merge(batches).await);
        }
        let attempts = work
            .into_iter()
            .map(|(environment, batches)| self.send_in_order(fence, environment, batches));
        let attempts: Vec<_> = join_all(attempts).await.into_iter().flatten().collect();
        let is_any_sent = attempts.iter().any(|attempt| attempt.outcome == Some(SendOutcome::Sent));
        for attempt in attempts {
            self.apply(fence, attempt).await;
        }
        is_any_sent
    }

    /// The claimed batches to send now, and the batches to merge, by environment. An environment with a claim
    /// sends nothing else.
    fn plan(&mut self, taken: Taken, now: Instant) -> (Work<MergedBatch>, Work<QueuedBatch>) {
        let mut work = Work::new();
        let mut claimed = BTreeSet::new();
        for Claim { environment, batch, held_for } in taken.claims {
            claimed.insert(environment.clone());
            let known = batch.parts.first().and_then(|part| self.outcomes.get(*part));
            if let Some(outcome) = known {
                self.store_later(batch, outcome);
            } else if held_for.is_zero() && self.is_retry_due(&environment, now) {
                work.entry(environment).or_default().push(batch);
            }
        }
        let mut waiting = Work::new();
        for batch in taken.batches {
            if let Some(outcome) = self.outcomes.get(batch.id) {
                let (id, parts, body) = (batch.id, vec![batch.id], Bytes::new());
                self.store_later(MergedBatch { id, parts, body }, outcome);
            } else if !claimed.contains(&batch.environment)
                && self.is_retry_due(&batch.environment, now)
            {
                let queued = QueuedBatch { id: batch.id, body: batch.body };
                waiting.entry(batch.environment).or_default().push(queued);
            }
        }
        (work, waiting)
    }

    /// Merges batches, away from the tasks that serve requests. If that panics, they are sent one by one.
    async fn merge(&self, batches: Vec<QueuedBatch>) -> Vec<MergedBatch> {
        counter!(MERGED).increment(batches.len() as u64);
        let (copy, max_body) = (batches.clone(), self.max_body);
        let merged = spawn_blocking(move || merge_batches(copy, max_body)).await;
        merged.unwrap_or_else(|error| {
            error!(error = error_chain(&error), "Merging usage panicked; it is sent unmerged");
            let alone = |QueuedBatch { id, body }| MergedBatch { id, parts: vec![id], body };
            batches.into_iter().map(alone).collect()
        })
    }

    fn is_retry_due(&self, environment: &Environment, now: Instant) -> bool {
        self.failures.get(environment).is_none_or(|failure| failure.retry_at <= now)
    }

    /// Sends the batches of one environment until one has no final outcome.
    async fn send_in_order(
        &self,
        fence: Fence,
        environment: Environment,
        batches: Vec<MergedBatch>,
    ) -> Vec<Attempt> {
        let mut attempts = Vec::new();
        for batch in batches {
            let outcome = self.send(fence, &environment, &batch).await;
            let is_stored = match outcome.and_then(|outcome| final_outcome(outcome, &batch)) {
                Some(outcome) => {
                    self.request(self.leader.log.finish(&batch, outcome)).await.is_some()
                }
                None => false,
            };
            let is_final = outcome.is_some_and(|outcome| final_outcome(outcome, &batch).is_some());
            let environment = environment.clone();
            attempts.push(Attempt { environment, batch, outcome, is_stored });
            if !is_final {
                break;
            }
        }
        attempts
    }

    /// Claims a batch and sends it. `None` if it may not be sent.
    async fn send(
        &self,
        fence: Fence,
        environment: &Environment,
        batch: &MergedBatch,
    ) -> Option<SendOutcome> {
        let deadline = Instant::now() + SEND_TIMEOUT;
        let claim = self.leader.log.claim(fence, environment, batch, CLAIM_DURATION);
        // A leader that was suspended meanwhile may have a successor.
        if !self.request(claim).await? || deadline <= Instant::now() {
            return None;
        }
        let (id, environment, body) = (batch.id, environment.clone(), batch.body.clone());
        let outgoing = OutgoingBatch { id, environment, body, may_be_parked: false };
        let sent = timeout_at(deadline, self.leader.upstream.send(outgoing)).await;
        let outcome = sent.unwrap_or(SendOutcome::Retry(None));
        counter!(BATCHES, "outcome" => outcome.as_str()).increment(1);
        Some(outcome)
    }

    /// Records the outcome of an attempt.
    async fn apply(&mut self, fence: Fence, attempt: Attempt) {
        let Attempt { environment, batch, outcome, is_stored } = attempt;
        let Some(outcome) = outcome else { return };
        if let Some(outcome) = final_outcome(outcome, &batch) {
            self.failures.remove(&environment);
            self.max_body = self.max_body.saturating_add(self.max_body / 8).min(MAX_BODY_BYTES);
            for part in &batch.parts {
                self.outcomes.insert(*part, outcome);
            }
            if !is_stored {
                self.store_later(batch, outcome);
            }
            return;
        }
        let log = &self.leader.log;
        match outcome {
            // Certainly not accepted.
            SendOutcome::TooLarge => {
                self.max_body = (batch.body.len() / 2).max(MIN_BODY_BYTES);
                self.request(log.release(fence, &batch)).await;
                self.next_round = Instant::now();
            }
            // Perhaps accepted, now or at an earlier attempt: it stays claimed and unchanged. Any leader may
            // retry it at once.
            SendOutcome::Retry(_) | SendOutcome::Unauthorized | SendOutcome::Parked(_) => {
                let delay = if let SendOutcome::Retry(delay) = outcome { delay } else { None };
                let ended = log.claim(fence, &environment, &batch, Duration::ZERO);
                self.request(ended).await;
                self.fail(environment, delay);
            }
            SendOutcome::Sent | SendOutcome::Rejected => {}
        }
    }

    /// Stores the latest outcomes again if Redis has lost its data. Instances that have not seen them append
    /// these batches again, which then wait as long as a claim lasts.
    fn check_epoch(&mut self, epoch: &str) {
        if epoch.is_empty() || self.epoch.as_deref() == Some(epoch) {
            return;
        }
        if self.epoch.replace(epoch.to_owned()).is_some() {
            for (outcome, parts) in self.outcomes.latest() {
                let id = parts.first().copied().unwrap_or_default();
                self.store_later(MergedBatch { id, parts, body: Bytes::new() }, outcome);
            }
        }
    }

    fn fail(&mut self, environment: Environment, retry_after: Option<Duration>) {
        let now = Instant::now();
        let failure = self.failures.entry(environment).or_insert_with(|| Failure {
            backoff: Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY),
            retry_at: now,
        });
        failure.retry_at = now + failure.backoff.next_delay(retry_after, rand::random());
    }

    fn store_later(&mut self, batch: MergedBatch, outcome: FinalOutcome) {
        if !self.unstored.iter().any(|(known, _)| known.id == batch.id) {
            // Storing an outcome does not need the body.
            self.unstored.push((MergedBatch { body: Bytes::new(), ..batch }, outcome));
        }
    }

    /// Stores the outcomes that Redis does not have yet.
    async fn store_outcomes(&mut self) {
        while let Some((batch, outcome)) = self.unstored.last() {
            if self.request(self.leader.log.finish(batch, *outcome)).await.is_none() {
                return;
            }
            self.unstored.pop();
        }
    }

    /// The value of a successful request; an outage is logged once for the whole fleet.
    async fn request<T>(
        &self,
        request: impl Future<Output = Result<T, crate::redis_client::Error>>,
    ) -> Option<T> {
        self.leader.hub.request(request).await
    }
}

/// The outcome to store, if the batch is not to be sent again as it is.
fn final_outcome(outcome: SendOutcome, batch: &MergedBatch) -> Option<FinalOutcome> {
    match outcome {
        SendOutcome::Sent => Some(FinalOutcome::Sent),
        SendOutcome::Rejected => Some(FinalOutcome::Rejected),
        SendOutcome::TooLarge => (batch.parts.len() == 1).then_some(FinalOutcome::TooLarge),
        SendOutcome::Unauthorized | SendOutcome::Retry(_) | SendOutcome::Parked(_) => None,
    }
}

#[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
fn set_gauges(size: &LogSize) {
    gauge!(WAITING).set(size.waiting as f64);
    gauge!(BYTES).set(size.bytes as f64);
}
