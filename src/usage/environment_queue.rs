//! The pending usage of one environment, and the batches made from it.
//!
//! This module does not decide when to send. The memory of registrations is bounded where they are
//! accepted.

use std::{
    collections::{BTreeMap, VecDeque},
    iter::repeat,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;

use super::{
    aggregator::Drained,
    applications::Registration,
    batch::{Batch, BatchBuilder, BatchId, Item, ItemKind, MAX_BODY_BYTES},
    counter::Overflow,
    counters::Counters,
    impact_metrics::{AppMetric, ImpactSeries},
    memory_pool::Reservation,
    usage_metrics,
};
use crate::{
    backoff::Backoff,
    protocol::usage::{ClientApplication, ImpactMetric, Samples},
    token::Environment,
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
/// Number of samples of one impact metric in an item.
const SAMPLES_PER_ITEM: usize = 64;
/// The largest item with several samples, in bytes.
const MAX_IMPACT_ITEM_BYTES: usize = 16 * 1024;

/// Whether a report is older or newer than the pending usage.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Age {
    Older,
    Newer,
}

/// Whether strategies are unknown, the application's name, and its instance. Sorts applications with
/// strategies first.
pub(super) type ApplicationKey = (bool, Arc<str>, Option<Arc<str>>);

/// The pending usage of one environment.
#[derive(Clone, Debug)]
pub(super) struct EnvironmentQueue {
    pub(super) applications: BTreeMap<ApplicationKey, Arc<Registration>>,
    pub(super) counters: Counters,
    pub(super) impact: ImpactSeries,
    /// Serialized items, to be sent before those.
    pub(super) serialized: VecDeque<Item>,
    /// Serialized items, to be sent after everything else: upstream rejected each of them alone as too
    /// large.
    pub(super) deferred: VecDeque<Item>,
    /// The batch that is being sent or will be retried.
    pub(super) in_flight: Option<(BatchId, Batch)>,
    pub(super) is_sending: bool,
    /// Batches that were in flight when earlier instances ended, to be sent unchanged before anything
    /// else.
    pub(super) restored_batches: VecDeque<(BatchId, Batch)>,
    /// The size of body that upstream is assumed to accept, in bytes.
    body_limit: usize,
    /// Number of consecutive bodies that upstream accepted.
    consecutive_successes: u32,
    backoff: Backoff,
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
            applications: BTreeMap::new(),
            counters: Counters::default(),
            impact: ImpactSeries::default(),
            serialized: VecDeque::new(),
            deferred: VecDeque::new(),
            in_flight: None,
            is_sending: false,
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
    pub(super) fn is_empty(&self) -> bool {
        self.in_flight.is_none()
            && self.restored_batches.is_empty()
            && self.serialized.is_empty()
            && self.deferred.is_empty()
            && self.applications.is_empty()
            && self.counters.is_empty()
            && self.impact.is_empty()
    }

    /// Merges drained usage; returns what exceeds the counters' limits.
    pub(super) fn merge(&mut self, drained: Drained) -> Overflow {
        let mut lost = 0_u64;
        for (key, counter) in drained.counters {
            lost = lost.saturating_add(self.counters.add(key, counter).0);
        }
        for application in drained.applications {
            self.add_registration(application, Age::Newer);
        }
        self.impact.merge(drained.impact);
        Overflow(lost)
    }

    /// Merges usage from a store; returns what exceeds the counters' limits.
    pub(super) fn restore(&mut self, restored: Self) -> Overflow {
        let Self {
            applications, counters, impact, serialized, in_flight, restored_batches, ..
        } = restored;
        let mut lost = 0_u64;
        for (key, counter) in counters {
            lost = lost.saturating_add(self.counters.add(key, counter).0);
        }
        for application in applications.into_values() {
            self.add_registration(application, Age::Older);
        }
        self.impact.restore(impact);
        // A serialized gauge is older than the other gauges of its record.
        let mut without_gauges = |items: Vec<Item>| -> Vec<Item> {
            let not_gauge = |item: Item| match parse_gauge(&item) {
                Some(series) => {
                    self.impact.restore(series);
                    None
                }
                None => Some(item),
            };
            items.into_iter().filter_map(not_gauge).collect()
        };
        let serialized = without_gauges(serialized.into());
        let batches = in_flight.into_iter().chain(restored_batches);
        let batches =
            batches.map(|(id, batch)| (id, Batch::new(without_gauges(batch.into_items()))));
        self.restored_batches.extend(batches.filter(|(_, batch)| !batch.items().is_empty()));
        self.serialized.extend(serialized);
        Overflow(lost)
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
        self.in_flight.take().map_or(0, |(_, batch)| batch.evaluations())
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
        let (_, mut batch) = self.in_flight.take()?;
        let size = batch.body().len();
        let has_accepted = std::mem::take(&mut self.consecutive_successes) > 0;
        if batch.items().len() > 1 {
            if size <= MIN_BODY_BYTES || self.backoff.failures() > 0 {
                self.schedule_retry(now, None, draw);
            }
            self.body_limit = (size / 2).clamp(MIN_BODY_BYTES, self.body_limit.max(MIN_BODY_BYTES));
            let (front, back) = batch.split();
            self.in_flight = Some((next, front));
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
            self.in_flight = Some((next, batch));
        }
        None
    }

    /// Adds empty strategies to the batch in flight, for an upstream that requires lists of strategies.
    /// False if the batch was rejected for another reason.
    pub(super) fn add_empty_strategies(&mut self) -> bool {
        let in_flight = self.in_flight.as_mut();
        let prepared = in_flight.is_some_and(|(_, batch)| batch.add_empty_strategies());
        if prepared {
            self.reset_backoff();
        }
        prepared
    }

    /// Adds a registration. Unknown strategies do not replace a list.
    pub(super) fn add_registration(&mut self, registration: Arc<Registration>, age: Age) {
        let key = |is_unlisted, it: &ClientApplication| -> ApplicationKey {
            (is_unlisted, Arc::clone(&it.app_name), it.instance_id.clone())
        };
        let application = registration.application();
        let present = self.applications.remove(&key(false, application));
        let present = present.or_else(|| self.applications.remove(&key(true, application)));
        let (newer, older) = match (present, age) {
            (None, _) => (registration, None),
            (Some(present), Age::Newer) => (registration, Some(present)),
            (Some(present), Age::Older) => (present, Some(registration)),
        };
        let merged = match older {
            Some(older) if newer.application().strategies.is_none() => {
                Arc::new(newer.with_strategies_of(&older))
            }
            _ => newer,
        };
        let is_unlisted = merged.application().strategies.is_none();
        self.applications.insert(key(is_unlisted, merged.application()), merged);
    }

    /// Removes a batch of items of one kind, and returns how many evaluations were too large to be sent.
    pub(super) fn next_batch(&mut self, environment: &Environment) -> (Option<Batch>, u64) {
        let mut packer = BatchBuilder::new(self.body_limit);
        let mut oversized = 0_u64;
        while let Some(item) = self.pop_item(environment) {
            let is_first = packer.is_empty();
            match packer.push(item) {
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
        (packer.finish(), oversized)
    }

    /// Removes the next item: applications first, then the oldest counters.
    fn pop_item(&mut self, environment: &Environment) -> Option<Item> {
        if let Some(item) = self.serialized.pop_front() {
            return Some(item);
        }
        if let Some(((is_unlisted, ..), registration)) = self.applications.pop_first() {
            let part = if is_unlisted {
                ItemKind::ApplicationWithoutStrategies
            } else {
                ItemKind::Application
            };
            return Some(Item::new(part, to_json(registration.application()), 0));
        }
        if let Some((key, counter)) = self.counters.pop_oldest() {
            let json = to_json(&counter.to_bulk_metric(environment.as_str(), &key));
            return Some(Item::new(ItemKind::Metric, json, counter.total()));
        }
        if let Some(AppMetric { metric, reported_at, .. }) =
            self.impact.pop_metric(SAMPLES_PER_ITEM)
        {
            serialize_impact_metric(metric, reported_at, &mut self.serialized);
            return self.serialized.pop_front();
        }
        while let Some(item) = self.deferred.pop_front() {
            if let Some(item) = self.without_stale_gauges(item) {
                return Some(item);
            }
        }
        None
    }

    /// Drops the gauges of an item that were reported again since, because deferred items are sent after
    /// them. `None` if no gauge is left.
    fn without_stale_gauges(&self, mut item: Item) -> Option<Item> {
        let Some(mut metric) = parse_impact_metric(&item) else { return Some(item) };
        let Samples::Gauge(samples) = &mut metric.samples else { return Some(item) };
        let before = samples.len();
        let times = item.reported_at.iter().copied().chain(repeat(None));
        (*samples, item.reported_at) = std::mem::take(samples)
            .into_iter()
            .zip(times)
            .filter(|(sample, at)| self.impact.is_latest(&metric.name, &sample.labels, *at))
            .unzip();
        match samples.len() {
            0 => return None,
            left if left < before => item.json = to_json(&metric),
            _ => {}
        }
        Some(item)
    }

    /// Number of pending evaluations, including the batch in flight.
    pub(super) fn evaluations(&self) -> u64 {
        let items = self.serialized.iter().chain(&self.deferred).map(|item| item.evaluations);
        let batches = self
            .in_flight
            .iter()
            .chain(&self.restored_batches)
            .map(|(_, batch)| batch.evaluations());
        items.chain(batches).fold(self.counters.total(), u64::saturating_add)
    }
}

/// Parses an item that is an impact metric.
fn parse_impact_metric(item: &Item) -> Option<ImpactMetric> {
    if item.kind != ItemKind::ImpactMetric {
        return None;
    }
    ImpactMetric::from_value(serde_json::from_str(&item.json).ok()?).ok()
}

/// Parses an item that is a gauge; its application is lost.
fn parse_gauge(item: &Item) -> Option<ImpactSeries> {
    let metric = parse_impact_metric(item)?;
    let Samples::Gauge(_) = &metric.samples else { return None };
    let mut series = ImpactSeries::default();
    let times = item.reported_at.iter().copied();
    series.record(&"".into(), metric, times, |_| Some(Reservation::default()));
    Some(series)
}

/// Serializes a metric into items, split by samples so that none exceeds the limit if possible.
fn serialize_impact_metric(
    metric: ImpactMetric,
    times: Vec<Option<Timestamp>>,
    into: &mut VecDeque<Item>,
) {
    fn split_off_half<T>(samples: &mut Vec<T>) -> Option<Vec<T>> {
        (samples.len() > 1).then(|| samples.split_off(samples.len() / 2))
    }
    let mut rest = vec![(metric, times)];
    while let Some((mut metric, mut reported_at)) = rest.pop() {
        let json = to_json(&metric);
        let other = match &mut metric.samples {
            _ if json.len() <= MAX_IMPACT_ITEM_BYTES => None,
            Samples::Counter(samples) => split_off_half(samples).map(Samples::Counter),
            Samples::Gauge(samples) => split_off_half(samples).map(Samples::Gauge),
            Samples::Histogram(samples) => split_off_half(samples).map(Samples::Histogram),
        };
        match other {
            None => {
                into.push_back(Item { reported_at, ..Item::new(ItemKind::ImpactMetric, json, 0) });
            }
            Some(samples) => {
                let (name, help) = (Arc::clone(&metric.name), Arc::clone(&metric.help));
                let later = reported_at.split_off(reported_at.len() / 2);
                rest.push((ImpactMetric { name, help, samples }, later));
                rest.push((metric, reported_at));
            }
        }
    }
}

fn to_json(value: &impl serde::Serialize) -> Box<str> {
    serde_json::to_string(value).expect("wire types with text keys are JSON").into()
}
