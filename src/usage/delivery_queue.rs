//! The usage that is waiting to be sent, and when to try: a state machine without clock, randomness or
//! IO.
//!
//! Each environment has its own queue, so that one that fails never delays another. A queue merges what
//! is drained and serializes only the one batch *in flight*. An outage of hours therefore takes only the
//! memory of the distinct counters, which are bounded. When there are too many, counters are merged in
//! the environments that have the most ([`Counters::shrink_to`]). No count is dropped, and other
//! environments are unaffected.
//!
//! [`Counters::shrink_to`]: super::counters::Counters::shrink_to
//!
//! A batch in flight is retried *unchanged* and with the same ID until upstream accepts or rejects it.
//! If it is unknown whether upstream accepted it (the connection broke after it was sent), its
//! evaluations may be counted twice, unless the destination recognizes the ID. In all other cases they are counted exactly once.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tracing::warn;

use super::{
    aggregator::Drained,
    batch::{BatchId, OutgoingBatch, SendOutcome},
    counter::Overflow,
    environment_queue::EnvironmentQueue,
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
#[derive(Clone, Debug, Default, Eq, PartialEq)]
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
    /// An empty queue. `instance` must be random and differ from that of all other instances.
    pub(super) fn new(max_counters: usize, instance_id: u64) -> Self {
        let (queues, totals) = (BTreeMap::new(), DeliveryTotals::default());
        Self { queues, max_counters, instance_id, batch_count: 0, change_count: 0, totals }
    }

    /// Adds drained usage.
    pub(super) fn enqueue(&mut self, drained: BTreeMap<Environment, Drained>, now: Instant) {
        let mut lost = 0;
        self.change_count += u64::from(!drained.is_empty());
        for (environment, drained) in drained {
            let queue = self.queues.entry(environment).or_default();
            queue.waiting_since.get_or_insert(now);
            lost += queue.merge(drained).0;
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
        let Overflow(lost) = queue.restore(restored);
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
                queue.in_flight = queue.restored_batches.pop_front();
            }
            if queue.in_flight.is_none() {
                self.change_count += u64::from(!queue.is_empty());
                let (batch, oversized) = queue.next_batch(environment);
                usage_metrics::count_dropped(DropReason::Size, oversized);
                self.totals.dropped = self.totals.dropped.saturating_add(oversized);
                queue.in_flight =
                    batch.map(|batch| (BatchId::new(self.instance_id, self.batch_count), batch));
                self.batch_count += 1;
            }
            match &queue.in_flight {
                Some((id, batch)) => {
                    queue.is_sending = true;
                    let environment = environment.clone();
                    return Some(OutgoingBatch { id: *id, environment, body: batch.body() });
                }
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
            queue.in_flight.as_ref().is_some_and(|(batch, _)| *batch == id)
        };
        let Some((environment, queue)) = self.queues.iter_mut().find(is_batch) else { return };
        usage_metrics::count_batch(outcome.as_str());
        queue.is_sending = false;
        self.change_count += match outcome {
            SendOutcome::Unauthorized | SendOutcome::Retry(_) => 0,
            SendOutcome::Sent | SendOutcome::Rejected | SendOutcome::TooLarge => 1,
        };
        match outcome {
            SendOutcome::Unauthorized => queue.schedule_retry(now, None, draw),
            SendOutcome::Retry(delay) => queue.schedule_retry(now, delay, draw),
            SendOutcome::Sent => {
                let count = queue.complete_in_flight();
                usage_metrics::count_sent(count);
                self.totals.sent = self.totals.sent.saturating_add(count);
            }
            SendOutcome::Rejected if queue.add_empty_strategies() => {}
            SendOutcome::Rejected => {
                let count = queue.discard_in_flight();
                self.count_dropped(DropReason::Rejected, count);
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

    /// When the next batch becomes due, if one is delayed.
    pub(super) fn next_retry_at(&self) -> Option<Instant> {
        let waiting = self.queues.values().filter(|queue| !queue.is_sending && !queue.is_empty());
        waiting.filter_map(|queue| queue.retry_at).min()
    }

    /// Cancels all delays, for the last attempt at shutdown.
    pub(super) fn reset_backoff(&mut self) {
        self.queues.values_mut().for_each(EnvironmentQueue::reset_backoff);
    }

    /// Makes batches in flight due again: their results will never be reported.
    pub(super) fn requeue_in_flight(&mut self) {
        self.queues.values_mut().for_each(|queue| queue.is_sending = false);
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

    fn is_empty(&self) -> bool {
        self.queues.values().all(EnvironmentQueue::is_empty)
    }

    /// How long the oldest pending usage has been waiting.
    pub(super) fn oldest_age(&self, now: Instant) -> Duration {
        let since = self
            .queues
            .values()
            .filter(|queue| !queue.is_empty())
            .filter_map(|queue| queue.waiting_since);
        since.min().map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
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
        let shrink = |queue: &mut EnvironmentQueue| queue.counters.shrink_to(share).0;
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
