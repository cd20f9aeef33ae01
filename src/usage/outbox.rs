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
//! evaluations may be counted twice, unless the destination is a registry, which recognizes the ID. In
//! all other cases they are counted exactly once.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tracing::warn;

use super::{
    counter::Lost,
    lane::{BatchId, Lane},
    ledger::Generation,
    meter::{self, Reason},
};
use crate::token::Environment;

/// A batch to send now.
#[derive(Clone, Debug)]
pub(super) struct Dispatch {
    pub(super) id: BatchId,
    pub(super) environment: Environment,
    pub(super) body: Bytes,
    /// Number of impact metrics in it, or parts of them.
    pub(super) impact: usize,
}

/// The result of sending a batch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Outcome {
    /// Upstream accepted it.
    Sent,
    /// Upstream rejected it permanently, but may have stored some of it: resending it, or parts of it,
    /// could count twice.
    Rejected,
    /// Upstream, or a proxy in front of it, rejected the body as too large.
    TooLarge,
    /// Upstream rejected the token, or there is no token for the environment yet.
    Unauthorized,
    /// Upstream was unavailable or busy; it may have requested a delay.
    Later(Option<Duration>),
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Rejected => "rejected",
            Self::TooLarge => "too_large",
            Self::Unauthorized => "unauthorized",
            Self::Later(_) => "later",
        }
    }
}

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
pub struct Totals {
    /// Evaluations that upstream accepted.
    pub sent: u64,
    /// Evaluations that were dropped.
    pub dropped: u64,
}

/// The pending usage of all environments.
#[derive(Debug)]
pub(super) struct Outbox {
    lanes: BTreeMap<Environment, Lane>,
    max_counters: usize,
    /// Distinguishes the batches of this instance from those of others.
    instance: u64,
    /// Number of batches so far.
    batches: u64,
    /// Number of changes to the pending usage.
    changes: u64,
    totals: Totals,
}

impl Outbox {
    /// An empty queue. `instance` must be random and differ from that of all other instances.
    pub(super) fn new(max_counters: usize, instance: u64) -> Self {
        let (queues, totals) = (BTreeMap::new(), Totals::default());
        Self { lanes: queues, max_counters, instance, batches: 0, changes: 0, totals }
    }

    /// Adds drained usage.
    pub(super) fn absorb(&mut self, drained: BTreeMap<Environment, Generation>, now: Instant) {
        let mut lost = 0;
        self.changes += u64::from(!drained.is_empty());
        for (environment, drained) in drained {
            let queue = self.lanes.entry(environment).or_default();
            queue.since.get_or_insert(now);
            lost += queue.absorb(drained).0;
        }
        self.drop_counts(Reason::Overflow, lost);
        self.shrink();
    }

    /// Adds restored usage; restored batches are resent unchanged. The store is assumed to still contain
    /// it.
    pub(super) fn restore(&mut self, environment: Environment, restored: Lane, now: Instant) {
        let queue = self.lanes.entry(environment).or_default();
        queue.stored = true;
        queue.since.get_or_insert(now);
        let Lost(lost) = queue.restore(restored);
        self.changes += 1;
        self.drop_counts(Reason::Overflow, lost);
        self.shrink();
    }

    /// The next batch to send, if one is due.
    ///
    /// At most one batch per environment is in flight.
    pub(super) fn next(&mut self, now: Instant) -> Option<Dispatch> {
        for (environment, queue) in &mut self.lanes {
            if queue.flying || !queue.backoff.is_over(now) {
                continue;
            }
            if queue.hand.is_none() {
                queue.hand = queue.left.pop_front();
            }
            if queue.hand.is_none() {
                self.changes += u64::from(!queue.is_empty());
                let (batch, oversized) = queue.cut(environment);
                meter::dropped(Reason::Size, oversized);
                self.totals.dropped = self.totals.dropped.saturating_add(oversized);
                queue.hand = batch.map(|batch| (BatchId::new(self.instance, self.batches), batch));
                self.batches += 1;
            }
            match &queue.hand {
                Some((id, batch)) => {
                    queue.flying = true;
                    let environment = environment.clone();
                    let (body, impact) = (batch.body(), batch.impact());
                    return Some(Dispatch { id: *id, environment, body, impact });
                }
                None => queue.since = None,
            }
        }
        None
    }

    /// Records the result of sending a batch. `draw` is uniform in `0..1` and randomizes the delay of
    /// the next attempt.
    pub(super) fn settle(&mut self, id: BatchId, outcome: Outcome, now: Instant, draw: f64) {
        let is_batch = |(_, queue): &(&Environment, &mut Lane)| {
            queue.hand.as_ref().is_some_and(|(batch, _)| *batch == id)
        };
        let Some((environment, queue)) = self.lanes.iter_mut().find(is_batch) else { return };
        meter::batch(outcome.as_str());
        queue.flying = false;
        self.changes += match outcome {
            Outcome::Unauthorized | Outcome::Later(_) => 0,
            Outcome::Sent | Outcome::Rejected | Outcome::TooLarge => 1,
        };
        match outcome {
            Outcome::Unauthorized => queue.backoff.fail(now, None, draw),
            Outcome::Later(delay) => queue.backoff.fail(now, delay, draw),
            Outcome::Sent => {
                let count = queue.complete();
                meter::sent(count);
                self.totals.sent = self.totals.sent.saturating_add(count);
            }
            Outcome::Rejected if queue.list_no_strategies() => {}
            Outcome::Rejected => {
                let count = queue.put_down();
                self.drop_counts(Reason::Rejected, count);
            }
            Outcome::TooLarge => {
                let next = BatchId::new(self.instance, self.batches);
                self.batches += 1;
                let dropped = queue.split(next, now, draw);
                if let Some(batch) = dropped {
                    let (bytes, count) = (batch.body().len(), batch.count());
                    warn!(
                        %environment,
                        bytes,
                        count,
                        "Dropped usage that upstream rejected as too large twice, with other batches \
                         accepted in between"
                    );
                    meter::items_dropped("oversized", 1);
                    self.drop_counts(Reason::Size, count);
                }
            }
        }
    }

    /// When the next batch becomes due, if one is delayed.
    pub(super) fn wake(&self) -> Option<Instant> {
        let waiting = self.lanes.values().filter(|queue| !queue.flying && !queue.is_empty());
        waiting.filter_map(|queue| queue.backoff.retry_at()).min()
    }

    /// Cancels all delays, for the last attempt at shutdown.
    pub(super) fn hurry(&mut self) {
        self.lanes.values_mut().for_each(|queue| queue.backoff.succeed());
    }

    /// Makes batches in flight due again: their results will never be reported.
    pub(super) fn recall(&mut self) {
        self.lanes.values_mut().for_each(|queue| queue.flying = false);
    }

    /// Drops everything: there is no upstream.
    pub(super) fn discard(&mut self) {
        let queues = std::mem::take(&mut self.lanes);
        let count = queues.values().fold(0_u64, |sum, queue| sum.saturating_add(queue.total()));
        self.drop_counts(Reason::NoUpstream, count);
    }

    /// The weight of the pending counters; variants count too.
    pub(super) fn len(&self) -> usize {
        self.lanes.values().map(|queue| queue.counters.weight()).sum()
    }

    fn is_empty(&self) -> bool {
        self.lanes.values().all(Lane::is_empty)
    }

    /// How long the oldest pending usage has been waiting.
    pub(super) fn oldest(&self, now: Instant) -> Duration {
        let since =
            self.lanes.values().filter(|queue| !queue.is_empty()).filter_map(|queue| queue.since);
        since.min().map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    pub(super) fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Identifies the present state of the pending usage.
    pub(super) fn revision(&self) -> Revision {
        if self.is_empty() { Revision::EMPTY } else { Revision(self.changes) }
    }

    /// A copy of the pending usage for a store, which is assumed to contain it from now on.
    pub(super) fn copy(&mut self) -> Vec<(Environment, Lane)> {
        self.lanes.values_mut().for_each(|queue| queue.stored = !queue.is_empty());
        self.queues().map(|(environment, queue)| (environment.clone(), queue.clone())).collect()
    }

    /// Whether a store contains usage of an environment that has nothing pending any longer.
    pub(super) fn is_store_outdated(&self) -> bool {
        self.lanes.values().any(|queue| queue.stored && queue.is_empty())
    }

    pub(super) fn queues(&self) -> impl Iterator<Item = (&Environment, &Lane)> {
        self.lanes.iter()
    }

    fn drop_counts(&mut self, reason: Reason, count: u64) {
        meter::dropped(reason, count);
        self.totals.dropped = self.totals.dropped.saturating_add(count);
    }

    /// Reduces the counters to the limit in the environments that exceed their fair share of it.
    fn shrink(&mut self) {
        let share =
            fair_share(self.max_counters, self.lanes.values().map(|queue| queue.counters.weight()));
        let shrink = |queue: &mut Lane| queue.counters.shrink_to(share).0;
        let lost = self.lanes.values_mut().map(shrink).fold(0, u64::saturating_add);
        self.drop_counts(Reason::Overflow, lost);
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
