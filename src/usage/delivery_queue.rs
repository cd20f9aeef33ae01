//! The usage that is waiting to be sent, and when to try: a state machine without clock, randomness or
//! IO.
//!
//! Each environment has its own queue, so that one that fails never delays another. A queue merges what
//! is drained and serializes only the one batch *in flight*. An outage of hours therefore takes only the
//! memory of the distinct counters, which are bounded. When there are too many, counters are merged in
//! the environments that have the most ([`shrink_to`](super::counters::Counters::shrink_to)). No count is dropped, and other
//! environments are unaffected.
//!
//! A batch in flight is retried *unchanged* and with the same ID until upstream accepts or rejects it.
//! If it is unknown whether upstream accepted it (the connection broke after it was sent), its
//! evaluations may be counted twice, unless the destination recognizes the ID. In all other cases they
//! are counted exactly once.
//!
//! A destination that does not know the outcome yet *parks* the batch: the queue keeps it, sends others,
//! and asks for its outcome from time to time.

mod environment_queue;
mod issued_batch;
mod parked_batches;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tracing::warn;

pub(super) use self::{environment_queue::EnvironmentQueue, issued_batch::IssuedBatch};
use super::{
    aggregator::Drained,
    batch::{BatchId, OutgoingBatch, SendOutcome},
    usage_metrics::{self, DropReason},
};
use crate::token::Environment;

/// Identifies a state of the queue: the same revision means the same pending usage.
///
/// The empty queue always has the same revision.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Revision(u64);

impl Revision {
    const EMPTY: Self = Self(0);
}

/// Numbers of evaluations sent and dropped.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DeliveryTotals {
    /// Evaluations that upstream accepted.
    pub sent: u64,
    /// Evaluations that were dropped.
    pub dropped: u64,
}

/// The pending usage of all environments.
#[derive(Debug)]
pub(super) struct DeliveryQueue {
    queues: BTreeMap<Environment, EnvironmentQueue>,
    max_counters: usize,
    /// Distinguishes the batches of this instance from those of others.
    instance_id: u64,
    /// Number of batches so far.
    batch_count: u64,
    /// Number of changes to the pending usage.
    change_count: u64,
    totals: DeliveryTotals,
}

impl DeliveryQueue {
    /// An empty queue. `instance_id` must be random and differ from that of all other instances.
    pub(super) fn new(max_counters: usize, instance_id: u64) -> Self {
        let (queues, totals) = (BTreeMap::new(), DeliveryTotals::default());
        Self { queues, max_counters, instance_id, batch_count: 0, change_count: 0, totals }
    }

    /// Adds drained usage.
    pub(super) fn enqueue(&mut self, drained: BTreeMap<Environment, Drained>, now: Instant) {
        let mut lost = 0_u64;
        self.change_count += u64::from(!drained.is_empty());
        for (environment, drained) in drained {
            let queue = self.queues.entry(environment).or_default();
            queue.waiting_since.get_or_insert(now);
            lost = lost.saturating_add(queue.merge(drained));
        }
        self.count_dropped(DropReason::Overflow, lost);
        self.enforce_limit();
    }

    /// Adds restored usage; restored batches are resent unchanged. The store is assumed to still contain
    /// it.
    pub(super) fn restore(
        &mut self,
        environment: Environment,
        restored: EnvironmentQueue,
        now: Instant,
    ) {
        let queue = self.queues.entry(environment).or_default();
        queue.is_persisted = true;
        queue.waiting_since.get_or_insert(now);
        let lost = queue.restore(restored);
        self.change_count += 1;
        self.count_dropped(DropReason::Overflow, lost);
        self.enforce_limit();
    }

    /// The next batch to send, if one is due.
    ///
    /// At most one batch per environment is in flight.
    pub(super) fn next_batch(&mut self, now: Instant) -> Option<OutgoingBatch> {
        for (environment, queue) in &mut self.queues {
            if queue.is_sending || !queue.is_due(now) {
                continue;
            }
            if queue.in_flight.is_none() {
                queue.in_flight = queue.parked.take_due(now).or_else(|| queue.pop_restored());
            }
            if queue.in_flight.is_none() && !queue.parked.is_full() {
                self.change_count += u64::from(queue.has_unsent());
                let (batch, oversized) = queue.next_batch(environment);
                usage_metrics::count_dropped(DropReason::Size, oversized);
                self.totals.dropped = self.totals.dropped.saturating_add(oversized);
                let id = BatchId::new(self.instance_id, self.batch_count);
                let waiting_since = queue.waiting_since;
                queue.in_flight =
                    batch.map(|batch| IssuedBatch { waiting_since, ..IssuedBatch::new(id, batch) });
                self.batch_count += 1;
            }
            match &queue.in_flight {
                Some(IssuedBatch { id, batch, may_be_parked, .. }) => {
                    queue.is_sending = true;
                    let (environment, body) = (environment.clone(), batch.body());
                    let (id, may_be_parked) = (*id, *may_be_parked);
                    return Some(OutgoingBatch { id, environment, body, may_be_parked });
                }
                None if queue.has_unsent() => {}
                None => queue.waiting_since = None,
            }
        }
        None
    }

    /// Records the result of sending a batch. `draw` is uniform in `0..1` and randomizes the delay of
    /// the next attempt.
    pub(super) fn record_outcome(
        &mut self,
        id: BatchId,
        outcome: SendOutcome,
        now: Instant,
        draw: f64,
    ) {
        let is_batch = |(_, queue): &(&Environment, &mut EnvironmentQueue)| {
            queue.in_flight.as_ref().is_some_and(|in_flight| in_flight.id == id)
        };
        let Some((environment, queue)) = self.queues.iter_mut().find(is_batch) else { return };
        queue.is_sending = false;
        let is_check = queue.in_flight.as_ref().is_some_and(|in_flight| in_flight.may_be_parked);
        if !(is_check && matches!(outcome, SendOutcome::Parked(_))) {
            usage_metrics::count_batch(outcome.as_str());
        }
        self.change_count += match outcome {
            SendOutcome::Unauthorized | SendOutcome::Retry(_) | SendOutcome::Parked(_) => 0,
            SendOutcome::Sent | SendOutcome::Rejected | SendOutcome::TooLarge => 1,
        };
        match outcome {
            SendOutcome::Unauthorized => queue.schedule_retry(now, None, draw),
            SendOutcome::Retry(delay) => queue.schedule_retry(now, delay, draw),
            SendOutcome::Parked(recheck_after) => queue.park_in_flight(now + recheck_after),
            SendOutcome::Sent => {
                let count = queue.complete_in_flight();
                usage_metrics::count_sent(count);
                self.totals.sent = self.totals.sent.saturating_add(count);
            }
            SendOutcome::Rejected => {
                let next = BatchId::new(self.instance_id, self.batch_count);
                self.batch_count += 1;
                if !queue.add_empty_strategies(next) {
                    let count = queue.discard_in_flight();
                    self.count_dropped(DropReason::Rejected, count);
                }
            }
            SendOutcome::TooLarge => {
                let next = BatchId::new(self.instance_id, self.batch_count);
                self.batch_count += 1;
                let dropped = queue.split_in_flight(next, now, draw);
                if let Some(batch) = dropped {
                    let (bytes, count) = (batch.body().len(), batch.evaluations());
                    warn!(
                        %environment,
                        bytes,
                        count,
                        "Dropped usage that upstream rejected as too large twice, with other batches \
                         accepted in between"
                    );
                    usage_metrics::count_dropped_items("oversized", 1);
                    self.count_dropped(DropReason::Size, count);
                }
            }
        }
    }

    /// When the next batch becomes due, if one is delayed: by a failure, or because too many are parked.
    pub(super) fn next_retry_at(&self) -> Option<Instant> {
        let waiting = self.queues.values().filter(|queue| !queue.is_sending && queue.has_unsent());
        let delayed = |queue: &EnvironmentQueue| {
            let is_full = queue.in_flight.is_none() && queue.parked.is_full();
            let parked = queue.parked.next_check_at().filter(|_| is_full);
            queue.retry_at.max(parked)
        };
        waiting.filter_map(delayed).min()
    }

    /// When to ask for the outcome of a parked batch next.
    pub(super) fn next_check_at(&self) -> Option<Instant> {
        let idle = self.queues.values().filter(|queue| !queue.is_sending);
        let check = |queue: &EnvironmentQueue| {
            let check_at = queue.parked.next_check_at()?;
            Some(queue.retry_at.map_or(check_at, |retry_at| retry_at.max(check_at)))
        };
        idle.filter_map(check).min()
    }

    /// Cancels all delays, for the last attempt at shutdown.
    pub(super) fn reset_backoff(&mut self) {
        self.queues.values_mut().for_each(EnvironmentQueue::reset_backoff);
    }

    /// Makes batches in flight due again: their results will never be reported.
    pub(super) fn requeue_in_flight(&mut self) {
        for queue in self.queues.values_mut().filter(|queue| queue.is_sending) {
            queue.is_sending = false;
            if let Some(in_flight) = &mut queue.in_flight {
                in_flight.may_be_parked = true;
            }
        }
    }

    /// Drops everything: there is no upstream.
    pub(super) fn discard_all(&mut self) {
        let queues = std::mem::take(&mut self.queues);
        let count =
            queues.values().fold(0_u64, |sum, queue| sum.saturating_add(queue.evaluations()));
        self.count_dropped(DropReason::NoUpstream, count);
    }

    /// The weight of the pending counters; variants count too.
    pub(super) fn counter_weight(&self) -> usize {
        self.queues.values().map(|queue| queue.counters.weight()).sum()
    }

    /// The number of parked batches.
    pub(super) fn parked_count(&self) -> usize {
        self.queues.values().map(|queue| queue.parked.len()).sum()
    }

    fn is_empty(&self) -> bool {
        self.queues.values().all(EnvironmentQueue::is_empty)
    }

    /// How long the oldest pending usage has been waiting.
    pub(super) fn oldest_age(&self, now: Instant) -> Duration {
        let queues = self.queues.values().filter(|queue| !queue.is_empty());
        let since = queues.flat_map(|queue| {
            let in_flight = queue.in_flight.as_ref().and_then(|it| it.waiting_since);
            [queue.waiting_since, in_flight, queue.parked.waiting_since()]
        });
        since.flatten().min().map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    pub(super) fn totals(&self) -> &DeliveryTotals {
        &self.totals
    }

    /// Identifies the present state of the pending usage.
    pub(super) fn revision(&self) -> Revision {
        if self.is_empty() { Revision::EMPTY } else { Revision(self.change_count) }
    }

    /// A copy of the pending usage for a store, which is assumed to contain it from now on.
    pub(super) fn copy_for_store(&mut self) -> Vec<(Environment, EnvironmentQueue)> {
        self.queues.values_mut().for_each(|queue| queue.is_persisted = !queue.is_empty());
        self.queues().map(|(environment, queue)| (environment.clone(), queue.clone())).collect()
    }

    /// Whether a store contains usage of an environment that has nothing pending any longer.
    pub(super) fn has_delivered_stored_usage(&self) -> bool {
        self.queues.values().any(|queue| queue.is_persisted && queue.is_empty())
    }

    pub(super) fn queues(&self) -> impl Iterator<Item = (&Environment, &EnvironmentQueue)> {
        self.queues.iter()
    }

    fn count_dropped(&mut self, reason: DropReason, count: u64) {
        usage_metrics::count_dropped(reason, count);
        self.totals.dropped = self.totals.dropped.saturating_add(count);
    }

    /// Reduces the counters to the limit in the environments that exceed their fair share of it.
    fn enforce_limit(&mut self) {
        let share = fair_share(
            self.max_counters,
            self.queues.values().map(|queue| queue.counters.weight()),
        );
        let shrink = |queue: &mut EnvironmentQueue| queue.counters.shrink_to(share);
        let lost = self.queues.values_mut().map(shrink).fold(0, u64::saturating_add);
        self.count_dropped(DropReason::Overflow, lost);
    }
}

/// The share of `total` for each so that the sum does not exceed it and small demands are met in full
/// (max-min fairness); `total` if all demands can be met.
fn fair_share(total: usize, demands: impl Iterator<Item = usize>) -> usize {
    let mut demands: Vec<_> = demands.collect();
    demands.sort_unstable();
    let mut rest = total;
    for (nth, demand) in demands.iter().enumerate() {
        let share = rest / (demands.len() - nth);
        if *demand > share {
            return share;
        }
        rest -= demand;
    }
    total
}

#[cfg(test)]
mod tests;
