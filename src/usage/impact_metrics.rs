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
    sync::Arc,
};

use jiff::Timestamp;
use xxhash_rust::xxh3::Xxh3Default;

use super::memory_pool::{Reservation, TEXT_OVERHEAD_BYTES};
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

    /// Whether no later report of this gauge is known.
    pub(super) fn is_latest(
        &self,
        name: &Arc<str>,
        labels: &Labels,
        at: Option<Timestamp>,
    ) -> bool {
        let last = self.gauge_times.get(&GaugeHash::of(name, labels));
        last.is_none_or(|last| *last == at)
    }

    /// Removes a metric with at most `max` samples, for upstream, regardless of applications.
    pub(super) fn pop_metric(&mut self, max: usize) -> Option<AppMetric> {
        self.pop_matching(max, |_, _| true)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{token::TokenDigest, usage::memory_pool::MemoryPool};

    fn metric(kind: &str, samples: &str) -> ImpactMetric {
        let json = format!(r#"{{"name":"n","help":"h","type":"{kind}","samples":{samples}}}"#);
        ImpactMetric::from_value(serde_json::from_str(&json).unwrap()).unwrap()
    }

    /// One sample without labels.
    const ONE: &str = r#"[{"value":1}]"#;

    #[track_caller]
    fn check(kind: &str, reports: &[&str], expected: &str) {
        let mut series = ImpactSeries::default();
        for samples in reports {
            assert_eq!(
                series.record(&"app".into(), metric(kind, samples), [], |_| Some(
                    Reservation::default()
                )),
                0
            );
        }
        let merged =
            series.pop_metric(10).map(|popped| serde_json::to_value(popped.metric).unwrap());
        let expected: serde_json::Value = serde_json::from_str(expected).unwrap();
        assert_eq!(merged.unwrap()["samples"], expected);
        assert!(series.is_empty());
    }

    #[test]
    fn counters_and_histograms_are_summed_and_gauges_keep_the_last_value() {
        check(
            "counter",
            &[r#"[{"value":1},{"value":5,"labels":{"a":"b"}}]"#, r#"[{"value":2}]"#],
            r#"[{"value":5.0,"labels":{"a":"b","origin":"edge"}},
                {"value":3.0,"labels":{"origin":"edge"}}]"#,
        );
        check(
            "gauge",
            &[r#"[{"value":1}]"#, r#"[{"value":-2}]"#],
            r#"[{"value":-2.0,"labels":{"origin":"edge"}}]"#,
        );
        check(
            "histogram",
            &[
                r#"[{"count":2,"sum":3,"buckets":[{"le":1,"count":1},{"le":"+Inf","count":2}]}]"#,
                r#"[{"count":1,"sum":0.5,"buckets":[{"le":1,"count":1},{"le":"+Inf","count":1}]}]"#,
            ],
            r#"[{"count":3,"sum":3.5,"buckets":[{"le":1.0,"count":2},{"le":"+Inf","count":3}],
                 "labels":{"origin":"edge"}}]"#,
        );
    }

    #[test]
    fn samples_are_bounded_by_their_size_in_bytes() {
        let quota = MemoryPool::new(50_000).quota_of(&TokenDigest::of("token"));
        let reserve = |bytes| quota.try_reserve(bytes);
        let record = |series: &mut ImpactSeries, kind: &str, samples: &[String]| {
            let metric = metric(kind, &format!("[{}]", samples.join(",")));
            series.record(&"app".into(), metric, [], reserve)
        };
        let labelled: Vec<_> =
            (0..200).map(|at| format!(r#"{{"value":1,"labels":{{"at":"{at:0>200}"}}}}"#)).collect();
        let mut series = ImpactSeries::default();
        let lost = record(&mut series, "gauge", &labelled);
        assert!((80..150).contains(&lost), "{lost}");
        assert_eq!(series.series.len(), 200 - lost);
        // Existing series need no additional memory.
        assert_eq!(record(&mut series, "gauge", &labelled[..50]), 0);
        drop(series);

        let mut series = ImpactSeries::default();
        let histogram = |buckets: std::ops::Range<usize>| {
            let buckets = buckets.map(|le| format!(r#"{{"le":{le},"count":1}}"#));
            let buckets = buckets.collect::<Vec<_>>().join(",");
            [format!(r#"{{"count":1,"sum":1,"buckets":[{buckets}]}}"#)]
        };
        assert_eq!(record(&mut series, "histogram", &histogram(0..1)), 0);
        let rest = quota.try_reserve(39_000).unwrap();
        assert_eq!(record(&mut series, "histogram", &histogram(0..200)), 0);
        drop(rest);
        let popped = series.pop_metric(1).unwrap();
        let Samples::Histogram(samples) = popped.metric.samples else { panic!() };
        assert!((2..30).contains(&samples[0].buckets.len()), "{samples:?}");
        assert!(quota.try_reserve(40_000).is_some());
    }

    #[test]
    fn longer_help_is_dropped_if_it_exceeds_the_quota() {
        let quota = MemoryPool::new(2000).quota_of(&TokenDigest::of("token"));
        let mut series = ImpactSeries::default();
        let mut helped_by = |length: usize| {
            let metric = ImpactMetric { help: "h".repeat(length).into(), ..metric("gauge", ONE) };
            let reserve = |bytes| quota.try_reserve(bytes);
            assert_eq!(series.record(&"app".into(), metric, [], reserve), 0);
            series.series.values().map(|series| series.help.len()).sum::<usize>()
        };
        assert_eq!(helped_by(1), 1);
        assert_eq!(helped_by(1000), 1000);
        assert!(quota.try_reserve(600).is_none());
        assert_eq!(helped_by(10), 10);
        let rest = quota.try_reserve(600).unwrap();
        assert_eq!(helped_by(1000), 10);
        drop((rest, series));
        assert!(quota.try_reserve(1600).is_some());
    }

    fn gauge(app: &str, value: u8, second: Option<i64>) -> ImpactSeries {
        let at = second.map(|second| Timestamp::from_second(second).unwrap());
        let mut series = ImpactSeries::default();
        let metric = metric("gauge", &format!(r#"[{{"value":{value}}}]"#));
        assert_eq!(series.record(&app.into(), metric, [at], |_| Some(Reservation::default())), 0);
        series
    }

    /// The values of all gauges.
    fn values(series: &ImpactSeries) -> Vec<f64> {
        let value = |series: &Series| match series.sample {
            Sample::Gauge(value) => value,
            _ => panic!("{series:?}"),
        };
        series.series.values().map(value).collect()
    }

    #[test]
    fn restored_gauge_replaces_only_an_older_one() {
        let check = |first: Option<i64>, then: Option<i64>, expected: f64| {
            let mut series = ImpactSeries::default();
            series.restore(gauge("a", 1, first));
            series.restore(gauge("a", 2, then));
            assert_eq!(values(&series), [expected], "{first:?} {then:?}");
        };
        check(Some(5), Some(6), 2.0);
        check(Some(6), Some(5), 1.0);
        check(Some(5), Some(5), 1.0);
        check(None, Some(5), 2.0);
        check(Some(5), None, 1.0);
        check(None, None, 1.0);
    }

    #[test]
    fn restored_gauge_is_dropped_after_a_later_one_was_sent() {
        let mut series = ImpactSeries::default();
        series.merge(gauge("a", 1, Some(6)));
        assert!(series.pop_metric(10).is_some());
        series.restore(gauge("b", 2, Some(5)));
        assert!(series.is_empty());
        series.restore(gauge("b", 3, Some(7)));
        assert_eq!(values(&series), [3.0]);
        // A new report replaces the value even if the clock was set back.
        series.merge(gauge("b", 4, Some(1)));
        assert_eq!(values(&series), [4.0]);
        assert!(series.gauge_times.len() == 1);
    }
}
