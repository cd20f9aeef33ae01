//! Hands the usage of this instance over to the leader of its fleet.
//!
//! # Which instance sends a batch
//!
//! Each batch has one sender, so that it is neither lost nor counted twice:
//!
//! * **The leader**, from the moment the log holds the batch, or may hold it. This instance keeps the batch
//!   and asks for its outcome, until the leader has stored it. If Redis has lost the batch meanwhile, it is
//!   appended again; if Redis is away, the batch waits for it.
//! * **This instance**, if the log certainly does not hold the batch and has not accepted it for a while
//!   ([`Timing::patience`](super::Timing), and a part that grows with the fleet). It then sends the batch
//!   itself until upstream accepts it, also if Redis returns in between. An instance that ends does so at
//!   once.
//!
//! A request whose outcome is unknown may have appended the batch. So this instance first asks whether the
//! log knows the batch: without a reply, nothing was appended.
//!
//! A full log is no reason to send the batch: it is full because upstream does not accept usage.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::BoxFuture;
use metrics::{counter, describe_counter};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{
    hub::Hub,
    lease::patience,
    timing::Timing,
    usage_log::{BatchState, CLAIM_DURATION, FinalOutcome, UsageLog},
};
use crate::{
    redis_client::Error,
    telemetry::error_chain,
    token::Environment,
    usage::{BatchId, OutgoingBatch, SendOutcome, UsageSink},
};

const HANDED_OVER: &str = "parapet_fleet_usage_handed_over_total";
const SENT_ALONE: &str = "parapet_fleet_usage_sent_alone_total";

/// The shortest and the longest time until the log is asked for an outcome again.
const MIN_CHECK_INTERVAL: Duration = Duration::from_millis(500);
const MAX_CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// How long Redis keeps an outcome after this instance has seen it. Its stored copy of pending usage is
/// newer by then, so that a restart does not ask for the outcome again.
const FORGET_AFTER: Duration = Duration::from_mins(1);
/// The number of outcomes to let Redis remove at once.
const FORGOTTEN_AT_ONCE: usize = 100;
/// The number of outcomes that wait for that. Redis removes further ones later, because it keeps a limited
/// number.
const MAX_SEEN: usize = 10_000;

/// Appends usage to the log of the fleet; sends it upstream itself while that is impossible.
#[derive(Debug)]
pub struct FleetUsageSink {
    log: UsageLog,
    upstream: Arc<dyn UsageSink>,
    hub: Arc<Hub>,
    timing: Timing,
    check_interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    outage: Option<Outage>,
    /// The batch of each environment that this instance sends itself.
    own: BTreeMap<Environment, BatchId>,
    /// Whether this instance ends.
    is_ending: bool,
    /// Outcomes that were seen, the oldest first.
    seen: VecDeque<(Instant, BatchId)>,
}

/// The log does not accept batches.
#[derive(Clone, Copy, Debug)]
struct Outage {
    /// When this instance begins to send batches itself.
    alone_at: Instant,
    is_announced: bool,
}

impl FleetUsageSink {
    pub(super) fn new(
        log: UsageLog,
        upstream: Arc<dyn UsageSink>,
        hub: Arc<Hub>,
        timing: Timing,
        interval: Duration,
    ) -> Self {
        describe_counter!(HANDED_OVER, "Batches of usage handed over to the leader of the fleet");
        describe_counter!(SENT_ALONE, "Batches of usage sent without the leader of the fleet");
        let check_interval = (interval / 6).clamp(MIN_CHECK_INTERVAL, MAX_CHECK_INTERVAL);
        Self { log, upstream, hub, timing, check_interval, state: Mutex::default() }
    }

    async fn deliver(&self, batch: OutgoingBatch) -> SendOutcome {
        let OutgoingBatch { id, environment, may_be_parked, .. } = &batch;
        if self.state().own.get(environment) == Some(id) {
            return self.upstream.send(batch).await;
        }
        let parked = SendOutcome::Parked(self.check_interval);
        let seen = Instant::now().checked_sub(FORGET_AFTER);
        let seen = seen.map(|before| self.state().seen_before(before)).unwrap_or_default();
        let mut known = match self.log.look(*id, &seen).await {
            Ok(known) => known,
            Err(_) if *may_be_parked => return parked,
            Err(error) => return self.send_without_log(batch, &error).await,
        };
        self.state().forget(&seen);
        if known == BatchState::Absent {
            let delay = if *may_be_parked { CLAIM_DURATION } else { Duration::ZERO };
            known = match self.log.append(*id, environment, &batch.body, delay).await {
                Ok(known) => known,
                Err(error) if *may_be_parked || error.is_outcome_unknown() => return parked,
                Err(error) => return self.send_without_log(batch, &error).await,
            };
            if known == BatchState::Waiting {
                counter!(HANDED_OVER).increment(1);
                self.on_handed_over();
            }
        }
        let outcome = match known {
            BatchState::Absent | BatchState::Waiting => return parked,
            BatchState::Full => return SendOutcome::Retry(None),
            BatchState::Finished(outcome) => outcome,
        };
        self.state().on_seen(*id);
        match outcome {
            FinalOutcome::Sent => SendOutcome::Sent,
            FinalOutcome::Rejected => SendOutcome::Rejected,
            FinalOutcome::TooLarge => SendOutcome::TooLarge,
        }
    }

    /// Sends a batch that the log certainly does not hold, if that has been so for long enough.
    async fn send_without_log(&self, batch: OutgoingBatch, error: &Error) -> SendOutcome {
        if !self.is_alone(error) {
            return SendOutcome::Retry(None);
        }
        self.state().own.insert(batch.environment.clone(), batch.id);
        counter!(SENT_ALONE).increment(1);
        self.upstream.send(batch).await
    }

    /// Records that the log did not accept a batch; returns whether it has not for long enough.
    fn is_alone(&self, error: &Error) -> bool {
        let now = Instant::now();
        let patience = patience(self.timing.patience, self.hub.instances(), rand::random());
        let mut state = self.state();
        let is_ending = state.is_ending;
        let new = Outage { alone_at: now + patience, is_announced: false };
        let outage = state.outage.get_or_insert(new);
        if now < outage.alone_at && !is_ending {
            return false;
        }
        let is_first = !std::mem::replace(&mut outage.is_announced, true);
        drop(state);
        if is_first {
            warn!(
                redis = self.log.location(),
                error = error_chain(error),
                "Usage cannot be handed over to the leader of the fleet; this instance sends its own to \
                 upstream"
            );
        }
        true
    }

    fn on_handed_over(&self) {
        let outage = self.state().outage.take();
        if outage.is_some_and(|outage| outage.is_announced) {
            info!(
                redis = self.log.location(),
                "Usage is handed over to the leader of the fleet again"
            );
        }
    }

    /// Ignores poisoning: each change under this lock is complete.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl UsageSink for FleetUsageSink {
    fn send(&self, batch: OutgoingBatch) -> BoxFuture<'_, SendOutcome> {
        Box::pin(self.deliver(batch))
    }

    fn begin_shutdown(&self) {
        self.state().is_ending = true;
        self.upstream.begin_shutdown();
    }
}

impl State {
    fn on_seen(&mut self, id: BatchId) {
        if self.seen.len() < MAX_SEEN {
            self.seen.push_back((Instant::now(), id));
        }
    }

    /// Some of the outcomes that were seen before a time.
    fn seen_before(&self, time: Instant) -> Vec<BatchId> {
        let seen = self.seen.iter().take_while(|(at, _)| *at < time);
        seen.map(|(_, id)| *id).take(FORGOTTEN_AT_ONCE).collect()
    }

    /// Redis has removed these outcomes.
    fn forget(&mut self, ids: &[BatchId]) {
        self.seen.retain(|(_, id)| !ids.contains(id));
    }
}
