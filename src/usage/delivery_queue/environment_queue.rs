//! The pending usage of one environment, and what becomes of its batch in flight.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{issued_batch::IssuedBatch, parked_batches::ParkedBatches};
use crate::{
    backoff::Backoff,
    token::Environment,
    usage::{
        aggregator::Drained,
        batch::{Batch, BatchBuilder, BatchId, Item, ItemKind, MAX_BODY_BYTES, to_raw_json},
        counters::Counters,
        impact_metrics::ImpactSeries,
        instances::PendingRegistrations,
        usage_metrics,
    },
};

/// The delay of a retry after a first failure.
const MIN_RETRY_DELAY: Duration = Duration::from_secs(1);
/// The longest delay of a retry, unless the destination requests a longer one.
const MAX_RETRY_DELAY: Duration = Duration::from_mins(1);
/// The smallest body limit to choose when upstream rejects bodies as too large, in bytes.
const MIN_BODY_BYTES: usize = 4096;
/// Number of items to defer because upstream rejected each of them alone as too large.
const MAX_DEFERRED: usize = 16;
/// Number of consecutive accepted bodies after which a larger one is tried.
const GROW_LIMIT_AFTER: u32 = 8;

/// The pending usage of one environment.
#[derive(Clone, Debug)]
pub(in crate::usage) struct EnvironmentQueue {
    pub(in crate::usage) applications: PendingRegistrations,
    pub(in crate::usage) counters: Counters,
    pub(in crate::usage) impact: ImpactSeries,
    /// Serialized items, to be sent before those.
    pub(in crate::usage) serialized: VecDeque<Item>,
    /// Serialized items, to be sent after everything else: upstream rejected each of them alone as too
    /// large.
    pub(in crate::usage) deferred: VecDeque<Item>,
    /// The batch that is being sent or will be retried.
    pub(in crate::usage) in_flight: Option<IssuedBatch>,
    pub(super) is_sending: bool,
    /// Batches that the destination holds.
    pub(in crate::usage) parked: ParkedBatches,
    /// Batches that were in flight when earlier instances ended, to be sent unchanged before anything
    /// else.
    pub(in crate::usage) restored_batches: VecDeque<IssuedBatch>,
    /// The size of body that upstream is assumed to accept, in bytes.
    pub(super) body_limit: usize,
    /// Number of consecutive bodies that upstream accepted.
    pub(super) consecutive_successes: u32,
    pub(super) backoff: Backoff,
    /// When the next batch may be sent, if the last one failed.
    pub(super) retry_at: Option<Instant>,
    /// When the oldest pending usage was queued.
    pub(super) waiting_since: Option<Instant>,
    /// Whether a store may hold usage of this environment.
    pub(super) is_persisted: bool,
}

impl Default for EnvironmentQueue {
    fn default() -> Self {
        Self {
            applications: PendingRegistrations::default(),
            counters: Counters::default(),
            impact: ImpactSeries::default(),
            serialized: VecDeque::new(),
            deferred: VecDeque::new(),
            in_flight: None,
            is_sending: false,
            parked: ParkedBatches::default(),
            restored_batches: VecDeque::new(),
            body_limit: MAX_BODY_BYTES,
            consecutive_successes: 0,
            backoff: Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY),
            retry_at: None,
            waiting_since: None,
            is_persisted: false,
        }
    }
}

impl EnvironmentQueue {
    pub(in crate::usage) fn is_empty(&self) -> bool {
        self.parked.is_empty() && !self.has_unsent()
    }

    /// Whether it has anything besides parked batches.
    pub(super) fn has_unsent(&self) -> bool {
        let has_none = self.in_flight.is_none()
            && self.restored_batches.is_empty()
            && self.serialized.is_empty()
            && self.deferred.is_empty()
            && self.applications.is_empty()
            && self.counters.is_empty()
            && self.impact.is_empty();
        !has_none
    }

    /// Merges drained usage; returns what exceeds the counters' limits.
    pub(super) fn merge(&mut self, drained: Drained) -> u64 {
        let lost = self.counters.extend(drained.counters);
        for application in drained.applications {
            self.applications.add(application);
        }
        self.impact.merge(drained.impact);
        lost
    }

    /// Merges usage from a store; returns what exceeds the counters' limits.
    pub(in crate::usage) fn restore(&mut self, restored: Self) -> u64 {
        let Self {
            applications, counters, impact, serialized, in_flight, restored_batches, ..
        } = restored;
        let lost = self.counters.extend(counters);
        for application in applications.into_values() {
            self.applications.add_earlier(application);
        }
        self.impact.restore(impact);
        // A serialized gauge is older than the other gauges of its record.
        let mut without_gauges = |items: Vec<Item>| -> Vec<Item> {
            items.into_iter().filter_map(|item| self.impact.restore_gauges(item)).collect()
        };
        let serialized = without_gauges(serialized.into());
        let batches = in_flight.into_iter().chain(restored_batches);
        let batches = batches.map(|IssuedBatch { id, batch, .. }| {
            IssuedBatch::restored(id, Batch::new(without_gauges(batch.into_items())))
        });
        self.restored_batches.extend(batches.filter(|it| !it.batch.items().is_empty()));
        self.serialized.extend(serialized);
        lost
    }

    /// Removes a batch of an earlier run.
    pub(super) fn pop_restored(&mut self) -> Option<IssuedBatch> {
        let batch = self.restored_batches.pop_front()?;
        Some(IssuedBatch { waiting_since: self.waiting_since, ..batch })
    }

    /// Whether no delay is left after the last failure.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.retry_at.is_none_or(|at| at <= now)
    }

    /// Delays the next batch after a failure, at least by the `retry_after` that upstream requests.
    /// `draw` is uniform in `0..1` and randomizes the delay.
    pub(super) fn schedule_retry(
        &mut self,
        now: Instant,
        retry_after: Option<Duration>,
        draw: f64,
    ) {
        self.retry_at = Some(now + self.backoff.next_delay(retry_after, draw));
    }

    /// Ends the delay of the next batch, and makes the next delay the shortest one.
    pub(super) fn reset_backoff(&mut self) {
        self.backoff.reset();
        self.retry_at = None;
    }

    /// Drops the batch in flight, which upstream rejected; returns its evaluations.
    pub(super) fn discard_in_flight(&mut self) -> u64 {
        self.reset_backoff();
        self.in_flight.take().map_or(0, |in_flight| in_flight.batch.evaluations())
    }

    /// Parks the batch in flight, whose outcome is to be asked for at `check_at`.
    pub(super) fn park_in_flight(&mut self, check_at: Instant) {
        self.reset_backoff();
        if let Some(in_flight) = self.in_flight.take() {
            self.parked.park(in_flight, check_at);
        }
    }

    /// Removes the batch in flight, which upstream accepted; returns its evaluations. Raises the body
    /// limit after [`GROW_LIMIT_AFTER`] consecutive successes.
    pub(super) fn complete_in_flight(&mut self) -> u64 {
        self.consecutive_successes = self.consecutive_successes.saturating_add(1);
        if self.consecutive_successes.is_multiple_of(GROW_LIMIT_AFTER) {
            self.body_limit = self.body_limit.saturating_mul(2).min(MAX_BODY_BYTES);
        }
        self.discard_in_flight()
    }

    /// Splits the batch in flight, which upstream rejected as too large, and lowers the body limit.
    /// Returns a single item that must be dropped.
    ///
    /// If upstream, or a proxy in front of it, rejects everything as too large, nothing is dropped. A
    /// single item is dropped only if it is larger than the smallest limit and is rejected again after
    /// upstream has accepted other batches.
    pub(super) fn split_in_flight(
        &mut self,
        next: BatchId,
        now: Instant,
        draw: f64,
    ) -> Option<Batch> {
        let IssuedBatch { mut batch, waiting_since, .. } = self.in_flight.take()?;
        let in_flight = |batch| IssuedBatch { waiting_since, ..IssuedBatch::new(next, batch) };
        let size = batch.body().len();
        let has_accepted = std::mem::take(&mut self.consecutive_successes) > 0;
        if batch.items().len() > 1 {
            if size <= MIN_BODY_BYTES || self.backoff.failures() > 0 {
                self.schedule_retry(now, None, draw);
            }
            self.body_limit = (size / 2).clamp(MIN_BODY_BYTES, self.body_limit.max(MIN_BODY_BYTES));
            let (front, back) = batch.split();
            self.in_flight = Some(in_flight(front));
            back.into_iter().rev().for_each(|item| self.serialized.push_front(item));
            return None;
        }
        let was_refused = batch.mark_too_large();
        if size > MIN_BODY_BYTES && has_accepted && was_refused {
            self.reset_backoff();
            return Some(batch);
        }
        self.schedule_retry(now, None, draw);
        if size > MIN_BODY_BYTES && self.deferred.len() < MAX_DEFERRED {
            self.deferred.extend(batch.into_items());
        } else {
            self.in_flight = Some(in_flight(batch));
        }
        None
    }

    /// Adds empty strategies to the batch in flight, for an upstream that requires lists of strategies.
    /// It becomes the batch `next`. False if the batch was rejected for another reason.
    pub(super) fn add_empty_strategies(&mut self, next: BatchId) -> bool {
        let Some(in_flight) = &mut self.in_flight else { return false };
        if !in_flight.batch.add_empty_strategies() {
            return false;
        }
        (in_flight.id, in_flight.may_be_parked) = (next, false);
        self.reset_backoff();
        true
    }

    /// Removes a batch of items of one kind, and returns how many evaluations were too large to be sent.
    pub(super) fn next_batch(&mut self, environment: &Environment) -> (Option<Batch>, u64) {
        let mut builder = BatchBuilder::new(self.body_limit);
        let mut oversized = 0_u64;
        while let Some(item) = self.pop_item(environment) {
            let is_first = builder.is_empty();
            match builder.push(item) {
                Ok(()) => {}
                Err(item) if is_first => {
                    oversized = oversized.saturating_add(item.evaluations);
                    usage_metrics::count_dropped_items("oversized", 1);
                }
                Err(item) => {
                    self.serialized.push_front(item);
                    break;
                }
            }
        }
        (builder.finish(), oversized)
    }

    /// Removes the next item: applications first, then the oldest counters.
    pub(super) fn pop_item(&mut self, environment: &Environment) -> Option<Item> {
        if let Some(item) = self.serialized.pop_front() {
            return Some(item);
        }
        if let Some(registration) = self.applications.pop_first() {
            let application = registration.application();
            let kind = match application.strategies {
                Some(_) => ItemKind::Application,
                None => ItemKind::ApplicationWithoutStrategies,
            };
            return Some(Item::new(kind, to_raw_json(application), 0));
        }
        if let Some((key, counter)) = self.counters.pop_oldest() {
            let json = to_raw_json(&counter.to_bulk_metric(environment.as_str(), &key));
            return Some(Item::new(ItemKind::Metric, json, counter.total()));
        }
        self.serialized.extend(self.impact.pop_items());
        if let Some(item) = self.serialized.pop_front() {
            return Some(item);
        }
        while let Some(item) = self.deferred.pop_front() {
            if let Some(item) = self.impact.without_stale_gauges(item) {
                return Some(item);
            }
        }
        None
    }

    /// The items that are serialized already, including those of batches.
    pub(in crate::usage) fn items(&self) -> impl Iterator<Item = &Item> {
        let batches = self.in_flight.iter().chain(self.parked.iter()).chain(&self.restored_batches);
        let items = batches.flat_map(|it| it.batch.items());
        items.chain(&self.serialized).chain(&self.deferred)
    }

    /// Number of pending evaluations, including the batch in flight.
    pub(super) fn evaluations(&self) -> u64 {
        let items = self.items().map(|item| item.evaluations);
        items.fold(self.counters.total(), u64::saturating_add)
    }
}
