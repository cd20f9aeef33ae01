//! Impact metrics merged by application, name and labels.
//!
//! As Unleash Edge merges them: counters are summed, of gauges the last value stays, histograms are
//! summed bucket by bucket, and every sample is labelled `origin="edge"`.

use std::{collections::BTreeMap, sync::Arc};

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
}

impl ImpactSeries {
    /// Adds what `app` reports; returns how many samples found no room among `limit`.
    pub(super) fn record(&mut self, app: &Arc<str>, metric: ImpactMetric, limit: usize) -> usize {
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
            let series = Series { help: Arc::clone(&help), sample };
            lost += usize::from(!self.add(key, series, limit));
        }
        lost
    }

    /// Adds what was merged elsewhere, and later; returns how many samples found no room.
    pub(super) fn absorb(&mut self, other: Self, limit: usize) -> usize {
        let added = other.series.into_iter().map(|(key, series)| self.add(key, series, limit));
        added.filter(|added| !added).count()
    }

    /// How many samples are held.
    pub(super) fn len(&self) -> usize {
        self.series.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.series.is_empty()
    }

    /// Takes out one metric with as many of its samples as `max`, for upstream.
    pub(super) fn pop(&mut self, max: usize) -> Option<ImpactMetric> {
        Some(self.pop_with_app(max, |_, _| true)?.1)
    }

    /// Takes out one metric of one application, for the spool.
    pub(super) fn pop_of_app(&mut self) -> Option<(Arc<str>, ImpactMetric)> {
        self.pop_with_app(usize::MAX, |first, app| first == app)
    }

    fn pop_with_app(
        &mut self,
        max: usize,
        same: impl Fn(&str, &str) -> bool,
    ) -> Option<(Arc<str>, ImpactMetric)> {
        let (Key { kind, name, app, labels }, Series { help, sample }) = self.series.pop_first()?;
        let mut samples = vec![(labels, sample)];
        while samples.len() < max {
            let Some(next) = self.series.first_entry() else { break };
            let key = next.key();
            if key.kind != kind || key.name != name || !same(&app, &key.app) {
                break;
            }
            let (key, series) = next.remove_entry();
            samples.push((key.labels, series.sample));
        }
        Some((app, ImpactMetric { name, help, samples: to_wire(kind, samples) }))
    }

    fn add(&mut self, key: Key, series: Series, limit: usize) -> bool {
        if let Some(present) = self.series.get_mut(&key) {
            present.help = series.help;
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
            assert_eq!(series.record(&"app".into(), metric(kind, samples), 10), 0);
        }
        let merged = series.pop(10).map(|metric| serde_json::to_value(metric).unwrap());
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
        assert_eq!(series.record(&"app".into(), report, 5), 15);
        assert_eq!(series.series.len(), 5);
    }
}
