//! Impact metrics merged by application, name and labels.
//!
//! As Unleash Edge merges them: counters are summed, of gauges the last value stays, histograms are
//! summed bucket by bucket, and every sample is labelled `origin="edge"`.
//!
//! What a store held was reported before a restart, or to another instance. A gauge of it is left
//! out where a later value of the same gauge waits or has been taken out, whichever application it
//! is of: upstream does not tell them apart.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;

use crate::wire::usage::{
    HistogramSample, ImpactMetric, Labels, MAX_INTEGER, MAX_NUMBER, NumericSample, Samples,
    UpperBound,
};

/// How many buckets of a histogram are kept.
const MAX_BUCKETS: usize = 256;

/// The type of a metric.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// What is measured apart within an environment.
///
/// The application comes after the name: upstream does not know it, and wants all samples of a
/// metric in one place, as it forgets a metric whose labels' names change.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Key {
    kind: Kind,
    name: Arc<str>,
    app: Arc<str>,
    labels: Labels,
}

#[derive(Clone, Debug)]
struct Series {
    help: Arc<str>,
    sample: Sample,
    /// When it was reported, if that is known: earlier versions stored no times.
    at: Option<Timestamp>,
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
    series: BTreeMap<Key, Series>,
    /// When each gauge was last reported, by name and labels; those that were absorbed or restored,
    /// and taken out since.
    gauges: BTreeMap<(Arc<str>, Labels), Option<Timestamp>>,
}

/// What was taken out: one metric, as far as it is of one application.
#[derive(Debug)]
pub(super) struct OfApp {
    pub(super) app: Arc<str>,
    pub(super) metric: ImpactMetric,
    /// When each sample was reported, if that is known.
    pub(super) times: Vec<Option<Timestamp>>,
}

impl ImpactSeries {
    /// Adds what `app` reports; returns how many samples found no room among `limit`. The n-th of
    /// `times` is when the n-th sample was reported.
    pub(super) fn record(
        &mut self,
        app: &Arc<str>,
        metric: ImpactMetric,
        times: impl IntoIterator<Item = Option<Timestamp>>,
        limit: usize,
    ) -> usize {
        let mut times = times.into_iter();
        let ImpactMetric { name, help, samples } = metric;
        let numeric = |sample: NumericSample, kind, wrap: fn(f64) -> Sample| {
            (kind, sample.labels, wrap(sample.value))
        };
        let samples: Vec<_> = match samples {
            Samples::Counter(samples) => samples
                .into_iter()
                .map(|sample| numeric(sample, Kind::Counter, Sample::Counter))
                .collect(),
            Samples::Gauge(samples) => samples
                .into_iter()
                .map(|sample| numeric(sample, Kind::Gauge, Sample::Gauge))
                .collect(),
            Samples::Histogram(samples) => samples
                .into_iter()
                .map(|HistogramSample { labels, count, sum, buckets }| {
                    (Kind::Histogram, labels, Sample::Histogram { count, sum, buckets })
                })
                .collect(),
        };
        let mut lost = 0;
        for (kind, mut labels, sample) in samples {
            labels.insert("origin".into(), "edge".into());
            let key = Key { kind, name: Arc::clone(&name), app: Arc::clone(app), labels };
            let at = times.next().flatten();
            let series = Series { help: Arc::clone(&help), sample, at };
            lost += usize::from(!self.add(key, series, limit));
        }
        lost
    }

    /// Adds what was merged elsewhere, and later; returns how many samples found no room.
    pub(super) fn absorb(&mut self, other: Self, limit: usize) -> usize {
        let mut lost = 0;
        for (key, series) in other.series {
            if key.kind == Kind::Gauge {
                self.note_gauge(&key, series.at, limit);
            }
            lost += usize::from(!self.add(key, series, limit));
        }
        lost
    }

    /// Adds what a store held; returns how many samples found no room. Gauges that are older than
    /// what was absorbed or restored before are left out.
    pub(super) fn restore(&mut self, other: Self, limit: usize) -> usize {
        let mut lost = 0;
        for (key, series) in other.series {
            if key.kind == Kind::Gauge {
                let last = self.gauges.get(&(Arc::clone(&key.name), key.labels.clone()));
                if last.is_some_and(|last| series.at <= *last) {
                    continue;
                }
                self.note_gauge(&key, series.at, limit);
            }
            lost += usize::from(!self.add(key, series, limit));
        }
        lost
    }

    fn note_gauge(&mut self, key: &Key, at: Option<Timestamp>, limit: usize) {
        let gauge = (Arc::clone(&key.name), key.labels.clone());
        if self.gauges.len() < limit || self.gauges.contains_key(&gauge) {
            self.gauges.insert(gauge, at);
        }
    }

    /// How many samples are held.
    pub(super) fn len(&self) -> usize {
        self.series.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.series.is_empty()
    }

    /// Whether this is the last report of a gauge, as far as reports are known.
    pub(super) fn is_latest(
        &self,
        name: &Arc<str>,
        labels: &Labels,
        at: Option<Timestamp>,
    ) -> bool {
        let last = self.gauges.get(&(Arc::clone(name), labels.clone()));
        last.is_none_or(|last| *last == at)
    }

    /// Takes out one metric with as many of its samples as `max`, for upstream; of which
    /// application is no matter then.
    pub(super) fn pop(&mut self, max: usize) -> Option<OfApp> {
        self.pop_with_app(max, |_, _| true)
    }

    /// Takes out one metric of one application, for the spool.
    pub(super) fn pop_of_app(&mut self) -> Option<OfApp> {
        self.pop_with_app(usize::MAX, |first, app| first == app)
    }

    fn pop_with_app(&mut self, max: usize, same: impl Fn(&str, &str) -> bool) -> Option<OfApp> {
        let (Key { kind, name, app, labels }, Series { help, sample, at }) =
            self.series.pop_first()?;
        let (mut samples, mut times) = (vec![(labels, sample)], vec![at]);
        while samples.len() < max {
            let Some(next) = self.series.first_entry() else { break };
            let key = next.key();
            if key.kind != kind || key.name != name || !same(&app, &key.app) {
                break;
            }
            let (key, series) = next.remove_entry();
            samples.push((key.labels, series.sample));
            times.push(series.at);
        }
        let metric = ImpactMetric { name, help, samples: to_wire(kind, samples) };
        Some(OfApp { app, metric, times })
    }

    fn add(&mut self, key: Key, series: Series, limit: usize) -> bool {
        if let Some(present) = self.series.get_mut(&key) {
            present.help = series.help;
            present.at = series.at;
            present.sample.merge(series.sample);
            return true;
        }
        let fits = self.series.len() < limit;
        if fits {
            self.series.insert(key, series);
        }
        fits
    }
}

impl Sample {
    /// Adds a later sample; one of another type cannot come, the type being part of the key.
    fn merge(&mut self, later: Self) {
        match (self, later) {
            (Self::Counter(sum), Self::Counter(value)) => *sum = clamped(*sum + value),
            (Self::Gauge(last), Self::Gauge(value)) => *last = value,
            (
                Self::Histogram { count, sum, buckets },
                Self::Histogram { count: more, sum: value, buckets: others },
            ) => {
                *count = count.saturating_add(more).min(MAX_INTEGER);
                *sum = clamped(*sum + value);
                for (bound, more) in others {
                    if buckets.len() < MAX_BUCKETS || buckets.contains_key(&bound) {
                        let count = buckets.entry(bound).or_default();
                        *count = count.saturating_add(more).min(MAX_INTEGER);
                    }
                }
            }
            (present, later) => *present = later,
        }
    }
}

/// A sum within the numbers that upstream takes; it would refuse all metrics for one beyond.
fn clamped(sum: f64) -> f64 {
    sum.clamp(-MAX_NUMBER, MAX_NUMBER)
}

fn to_wire(kind: Kind, samples: Vec<(Labels, Sample)>) -> Samples {
    let numeric = |samples: Vec<(Labels, Sample)>| {
        let value = |(labels, sample)| match sample {
            Sample::Counter(value) | Sample::Gauge(value) => Some(NumericSample { labels, value }),
            Sample::Histogram { .. } => None,
        };
        samples.into_iter().filter_map(value).collect()
    };
    match kind {
        Kind::Counter => Samples::Counter(numeric(samples)),
        Kind::Gauge => Samples::Gauge(numeric(samples)),
        Kind::Histogram => {
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

    fn metric(kind: &str, samples: &str) -> ImpactMetric {
        let json = format!(r#"{{"name":"n","help":"h","type":"{kind}","samples":{samples}}}"#);
        ImpactMetric::from_value(serde_json::from_str(&json).unwrap()).unwrap()
    }

    #[track_caller]
    fn check(kind: &str, reports: &[&str], expected: &str) {
        let mut series = ImpactSeries::default();
        for samples in reports {
            assert_eq!(series.record(&"app".into(), metric(kind, samples), [], 10), 0);
        }
        let merged = series.pop(10).map(|popped| serde_json::to_value(popped.metric).unwrap());
        let expected: serde_json::Value = serde_json::from_str(expected).unwrap();
        assert_eq!(merged.unwrap()["samples"], expected);
        assert!(series.is_empty());
    }

    #[test]
    fn counters_sum_gauges_keep_the_last_and_histograms_sum_by_bucket() {
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
    fn the_number_of_samples_is_bounded() {
        let mut series = ImpactSeries::default();
        let samples: Vec<_> =
            (0..20).map(|at| format!(r#"{{"value":1,"labels":{{"at":"{at}"}}}}"#)).collect();
        let report = metric("gauge", &format!("[{}]", samples.join(",")));
        assert_eq!(series.record(&"app".into(), report, [], 5), 15);
        assert_eq!(series.series.len(), 5);
    }

    fn gauge(app: &str, value: u8, second: Option<i64>) -> ImpactSeries {
        let at = second.map(|second| Timestamp::from_second(second).unwrap());
        let mut series = ImpactSeries::default();
        let metric = metric("gauge", &format!(r#"[{{"value":{value}}}]"#));
        assert_eq!(series.record(&app.into(), metric, [at], 10), 0);
        series
    }

    /// The values of all gauges that wait.
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
            assert_eq!(series.restore(gauge("a", 1, first), 10), 0);
            assert_eq!(series.restore(gauge("a", 2, then), 10), 0);
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
    fn restored_gauge_is_left_out_after_a_later_one_was_taken_out() {
        let mut series = ImpactSeries::default();
        assert_eq!(series.absorb(gauge("a", 1, Some(6)), 10), 0);
        assert!(series.pop(10).is_some());
        assert_eq!(series.restore(gauge("b", 2, Some(5)), 10), 0);
        assert!(series.is_empty());
        assert_eq!(series.restore(gauge("b", 3, Some(7)), 10), 0);
        assert_eq!(values(&series), [3.0]);
        // What is reported now counts, whatever the clock said before.
        assert_eq!(series.absorb(gauge("b", 4, Some(1)), 10), 0);
        assert_eq!(values(&series), [4.0]);
        assert!(series.gauges.len() == 1);
    }
}
