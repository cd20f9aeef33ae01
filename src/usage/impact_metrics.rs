//! Impact metrics merged by application, name and labels.
//!
//! They are merged as in Unleash Edge: counters are summed, a gauge keeps its last value, histograms are
//! summed by bucket, and every sample is labelled `origin="edge"`.
//!
//! Metrics restored from a store were reported before a restart, or to another instance. A restored
//! gauge is dropped if a later value of the same gauge is queued or was already removed for sending. Its
//! application does not matter, because upstream does not distinguish applications.
//!
//! The size of a series counts toward the quota of the token that first reported it, in bytes. The size
//! of the pool is set elsewhere.

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    iter::repeat,
    sync::Arc,
};

use jiff::Timestamp;
use xxhash_rust::xxh3::Xxh3Default;

use super::{
    batch::{Item, ItemKind, to_raw_json},
    quota_pool::{Reservation, TEXT_OVERHEAD_BYTES},
};
use crate::protocol::usage::{
    HistogramSample, ImpactMetric, Labels, MAX_INTEGER, MAX_NUMBER, NumericSample, Samples,
    UpperBound,
};

/// The largest number of buckets in a histogram.
const MAX_BUCKETS: usize = 256;
/// The number of gauges whose latest report time is remembered.
const MAX_GAUGE_TIMES: usize = 16_384;
/// Bytes that a histogram bucket takes.
const BUCKET_BYTES: usize = 32;
/// Number of samples of one metric in an item of a batch.
const SAMPLES_PER_ITEM: usize = 64;
/// The largest item with several samples, in bytes.
const MAX_ITEM_BYTES: usize = 16 * 1024;

/// The type of a metric.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
enum MetricKind {
    Counter,
    Gauge,
    Histogram,
}

/// The dimensions that are merged separately within an environment.
///
/// The application sorts after the name, so that all samples of a metric are adjacent. Upstream does not
/// know applications, and it resets a metric whose label names change.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct SeriesKey {
    kind: MetricKind,
    name: Arc<str>,
    app: Arc<str>,
    labels: Labels,
}

#[derive(Clone, Debug)]
struct Series {
    help: Arc<str>,
    sample: Sample,
    /// When it was reported, if known: earlier versions stored no times.
    reported_at: Option<Timestamp>,
    reservation: Reservation,
}

#[derive(Clone, Debug)]
enum Sample {
    Counter(f64),
    Gauge(f64),
    Histogram { count: u64, sum: f64, buckets: BTreeMap<UpperBound, u64> },
}

/// The merged impact metrics of an environment.
#[derive(Clone, Debug, Default)]
pub(super) struct ImpactSeries {
    series: BTreeMap<SeriesKey, Series>,
    /// The latest report time of gauges that were merged or restored, including those removed since.
    gauge_times: HashMap<GaugeHash, Option<Timestamp>>,
}

/// Identifies a gauge by its name and labels.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
struct GaugeHash(u128);

impl GaugeHash {
    fn of(name: &str, labels: &Labels) -> Self {
        let mut hash = Xxh3Default::new();
        let texts = labels.iter().flat_map(|(label, value)| [&**label, &**value]);
        for text in std::iter::once(name).chain(texts) {
            hash.update(&text.len().to_le_bytes());
            hash.update(text.as_bytes());
        }
        Self(hash.digest128())
    }
}

/// The samples of one metric for one application.
#[derive(Debug)]
pub(super) struct AppMetric {
    pub(super) app: Arc<str>,
    pub(super) metric: ImpactMetric,
    /// When each sample was reported, if known.
    pub(super) reported_at: Vec<Option<Timestamp>>,
}

impl ImpactSeries {
    /// Adds a metric that `app` reports; returns how many samples were rejected. `reserve` reserves the
    /// given bytes for a new series. The n-th of `times` is the report time of the n-th sample.
    pub(super) fn record(
        &mut self,
        app: &Arc<str>,
        metric: ImpactMetric,
        times: impl IntoIterator<Item = Option<Timestamp>>,
        reserve: impl Fn(usize) -> Option<Reservation>,
    ) -> usize {
        let mut times = times.into_iter();
        let ImpactMetric { name, help, samples } = metric;
        let numeric = |sample: NumericSample, kind, wrap: fn(f64) -> Sample| {
            (kind, sample.labels, wrap(sample.value))
        };
        let samples: Vec<_> = match samples {
            Samples::Counter(samples) => samples
                .into_iter()
                .map(|sample| numeric(sample, MetricKind::Counter, Sample::Counter))
                .collect(),
            Samples::Gauge(samples) => samples
                .into_iter()
                .map(|sample| numeric(sample, MetricKind::Gauge, Sample::Gauge))
                .collect(),
            Samples::Histogram(samples) => samples
                .into_iter()
                .map(|HistogramSample { labels, count, sum, buckets }| {
                    (MetricKind::Histogram, labels, Sample::Histogram { count, sum, buckets })
                })
                .collect(),
        };
        let mut lost = 0;
        for (kind, mut labels, sample) in samples {
            labels.insert("origin".into(), "edge".into());
            let key = SeriesKey { kind, name: Arc::clone(&name), app: Arc::clone(app), labels };
            let reported_at = times.next().flatten();
            let no_reservation = Reservation::default();
            let mut series = Series {
                help: Arc::clone(&help),
                sample,
                reported_at,
                reservation: no_reservation,
            };
            if !self.series.contains_key(&key) {
                let Some(reservation) = reserve(memory_size(&key, &series)) else {
                    lost += 1;
                    continue;
                };
                series.reservation = reservation;
            }
            self.add(key, series);
        }
        lost
    }

    /// Merges series that were reported later.
    pub(super) fn merge(&mut self, other: Self) {
        for (key, series) in other.series {
            if key.kind == MetricKind::Gauge {
                self.record_gauge_time(&key, series.reported_at);
            }
            self.add(key, series);
        }
    }

    /// Merges the gauges of an item from a store; their application is lost. Returns an item that contains
    /// no gauges.
    pub(super) fn restore_gauges(&mut self, item: Item) -> Option<Item> {
        let Some(metric) = parse(&item) else { return Some(item) };
        let Samples::Gauge(_) = &metric.samples else { return Some(item) };
        let mut series = Self::default();
        series.record(&"".into(), metric, item.reported_at, |_| Some(Reservation::default()));
        self.restore(series);
        None
    }

    /// Merges series from a store. Gauges that are not newer than those already merged or restored are
    /// dropped.
    pub(super) fn restore(&mut self, other: Self) {
        for (key, series) in other.series {
            if key.kind == MetricKind::Gauge {
                let last = self.gauge_times.get(&GaugeHash::of(&key.name, &key.labels));
                if last.is_some_and(|last| series.reported_at <= *last) {
                    continue;
                }
                self.record_gauge_time(&key, series.reported_at);
            }
            self.add(key, series);
        }
    }

    fn record_gauge_time(&mut self, key: &SeriesKey, at: Option<Timestamp>) {
        let gauge = GaugeHash::of(&key.name, &key.labels);
        if self.gauge_times.len() < MAX_GAUGE_TIMES || self.gauge_times.contains_key(&gauge) {
            self.gauge_times.insert(gauge, at);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.series.is_empty()
    }

    /// Drops the gauges of an item for which a later report is known. `None` if no gauge is left.
    pub(super) fn without_stale_gauges(&self, mut item: Item) -> Option<Item> {
        let Some(mut metric) = parse(&item) else { return Some(item) };
        let Samples::Gauge(samples) = &mut metric.samples else { return Some(item) };
        let before = samples.len();
        let times = item.reported_at.iter().copied().chain(repeat(None));
        (*samples, item.reported_at) = std::mem::take(samples)
            .into_iter()
            .zip(times)
            .filter(|(sample, at)| {
                let last = self.gauge_times.get(&GaugeHash::of(&metric.name, &sample.labels));
                last.is_none_or(|last| last == at)
            })
            .unzip();
        match samples.len() {
            0 => return None,
            left if left < before => item.json = to_raw_json(&metric),
            _ => {}
        }
        Some(item)
    }

    /// The number of observations in all histograms and their buckets.
    pub(super) fn observations(&self) -> u128 {
        let histogram = |series: &Series| match &series.sample {
            Sample::Counter(_) | Sample::Gauge(_) => 0,
            Sample::Histogram { count, buckets, .. } => {
                buckets.values().chain([count]).map(|count| u128::from(*count)).sum()
            }
        };
        self.series.values().map(histogram).sum()
    }

    /// Removes some samples of one metric, regardless of applications, as items of a batch.
    pub(super) fn pop_items(&mut self) -> Vec<Item> {
        let popped = self.pop_matching(SAMPLES_PER_ITEM, |_, _| true);
        popped
            .map(|AppMetric { metric, reported_at, .. }| to_items(metric, reported_at))
            .unwrap_or_default()
    }

    /// Removes one metric of one application, for the spool.
    pub(super) fn pop_for_app(&mut self) -> Option<AppMetric> {
        self.pop_matching(usize::MAX, |first, app| first == app)
    }

    fn pop_matching(&mut self, max: usize, same: impl Fn(&str, &str) -> bool) -> Option<AppMetric> {
        let (SeriesKey { kind, name, app, labels }, Series { help, sample, reported_at, .. }) =
            self.series.pop_first()?;
        let (mut samples, mut reported_at) = (vec![(labels, sample)], vec![reported_at]);
        while samples.len() < max {
            let Some(next) = self.series.first_entry() else { break };
            let key = next.key();
            if key.kind != kind || key.name != name || !same(&app, &key.app) {
                break;
            }
            let (key, series) = next.remove_entry();
            samples.push((key.labels, series.sample));
            reported_at.push(series.reported_at);
        }
        let metric = ImpactMetric { name, help, samples: to_samples(kind, samples) };
        Some(AppMetric { app, metric, reported_at })
    }

    fn add(&mut self, key: SeriesKey, series: Series) {
        match self.series.entry(key) {
            Entry::Vacant(place) => {
                place.insert(series);
            }
            Entry::Occupied(present) => {
                let present = present.into_mut();
                if present.reservation.try_resize(present.help.len(), series.help.len()) {
                    present.help = series.help;
                }
                present.reported_at = series.reported_at;
                present.sample.merge(series.sample, &mut present.reservation);
            }
        }
    }
}

/// Approximate bytes that a series takes.
fn memory_size(key: &SeriesKey, series: &Series) -> usize {
    let labels =
        key.labels.iter().map(|(name, value)| 2 * TEXT_OVERHEAD_BYTES + name.len() + value.len());
    let buckets = match &series.sample {
        Sample::Counter(_) | Sample::Gauge(_) => 0,
        Sample::Histogram { buckets, .. } => buckets.len(),
    };
    let texts =
        2 * TEXT_OVERHEAD_BYTES + key.name.len() + series.help.len() + labels.sum::<usize>();
    size_of::<(SeriesKey, Series)>() + texts + buckets * BUCKET_BYTES
}

impl Sample {
    /// Adds a later sample of the same type (the type is part of the key). New buckets are dropped if
    /// `reservation` cannot grow.
    fn merge(&mut self, later: Self, reservation: &mut Reservation) {
        match (self, later) {
            (Self::Counter(sum), Self::Counter(value)) => {
                *sum = clamp_to_upstream_range(*sum + value);
            }
            (Self::Gauge(last), Self::Gauge(value)) => *last = value,
            (
                Self::Histogram { count, sum, buckets },
                Self::Histogram { count: more, sum: value, buckets: others },
            ) => {
                *count = count.saturating_add(more).min(MAX_INTEGER);
                *sum = clamp_to_upstream_range(*sum + value);
                for (bound, more) in others {
                    let is_present = buckets.contains_key(&bound);
                    if is_present
                        || buckets.len() < MAX_BUCKETS && reservation.try_resize(0, BUCKET_BYTES)
                    {
                        let count = buckets.entry(bound).or_default();
                        *count = count.saturating_add(more).min(MAX_INTEGER);
                    }
                }
            }
            (present, later) => *present = later,
        }
    }
}

/// Limits a sum to the range that upstream accepts; it would reject all metrics because of one number
/// beyond.
fn clamp_to_upstream_range(sum: f64) -> f64 {
    sum.clamp(-MAX_NUMBER, MAX_NUMBER)
}

fn to_samples(kind: MetricKind, samples: Vec<(Labels, Sample)>) -> Samples {
    let numeric = |samples: Vec<(Labels, Sample)>| {
        let value = |(labels, sample)| match sample {
            Sample::Counter(value) | Sample::Gauge(value) => Some(NumericSample { labels, value }),
            Sample::Histogram { .. } => None,
        };
        samples.into_iter().filter_map(value).collect()
    };
    match kind {
        MetricKind::Counter => Samples::Counter(numeric(samples)),
        MetricKind::Gauge => Samples::Gauge(numeric(samples)),
        MetricKind::Histogram => {
            let value = |(labels, sample)| match sample {
                Sample::Histogram { count, sum, buckets } => {
                    Some(HistogramSample { labels, count, sum, buckets })
                }
                Sample::Counter(_) | Sample::Gauge(_) => None,
            };
            Samples::Histogram(samples.into_iter().filter_map(value).collect())
        }
    }
}

/// Parses an item that is an impact metric.
fn parse(item: &Item) -> Option<ImpactMetric> {
    if item.kind != ItemKind::ImpactMetric {
        return None;
    }
    ImpactMetric::from_value(serde_json::from_str(item.json.get()).ok()?).ok()
}

/// Serializes a metric into items, split by samples so that none exceeds the limit if possible.
fn to_items(metric: ImpactMetric, times: Vec<Option<Timestamp>>) -> Vec<Item> {
    fn split_off_half<T>(samples: &mut Vec<T>) -> Option<Vec<T>> {
        (samples.len() > 1).then(|| samples.split_off(samples.len() / 2))
    }
    let mut items = Vec::new();
    let mut rest = vec![(metric, times)];
    while let Some((mut metric, mut reported_at)) = rest.pop() {
        let json = to_raw_json(&metric);
        let other = match &mut metric.samples {
            _ if json.get().len() <= MAX_ITEM_BYTES => None,
            Samples::Counter(samples) => split_off_half(samples).map(Samples::Counter),
            Samples::Gauge(samples) => split_off_half(samples).map(Samples::Gauge),
            Samples::Histogram(samples) => split_off_half(samples).map(Samples::Histogram),
        };
        match other {
            None => items.push(Item { reported_at, ..Item::new(ItemKind::ImpactMetric, json, 0) }),
            Some(samples) => {
                let (name, help) = (Arc::clone(&metric.name), Arc::clone(&metric.help));
                let later = reported_at.split_off(reported_at.len() / 2);
                rest.push((ImpactMetric { name, help, samples }, later));
                rest.push((metric, reported_at));
            }
        }
    }
    items
}

#[cfg(test)]
mod tests;
