//! Tests of merging samples, of their limits by size, and of restored gauges.

use super::*;
use crate::{token::TokenDigest, usage::quota_pool::QuotaPool};

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
            series
                .record(&"app".into(), metric(kind, samples), [], |_| Some(Reservation::default())),
            0
        );
    }
    let merged = series.pop_for_app().map(|popped| serde_json::to_value(popped.metric).unwrap());
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
    let quota = QuotaPool::new(50_000).quota_of(&TokenDigest::of("token"));
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
    let popped = series.pop_for_app().unwrap();
    let Samples::Histogram(samples) = popped.metric.samples else { panic!() };
    assert!((2..30).contains(&samples[0].buckets.len()), "{samples:?}");
    assert!(quota.try_reserve(40_000).is_some());
}

#[test]
fn longer_help_is_dropped_if_it_exceeds_the_quota() {
    let quota = QuotaPool::new(2000).quota_of(&TokenDigest::of("token"));
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
    assert_eq!(series.pop_items().len(), 1);
    series.restore(gauge("b", 2, Some(5)));
    assert!(series.is_empty());
    series.restore(gauge("b", 3, Some(7)));
    assert_eq!(values(&series), [3.0]);
    // A new report replaces the value even if the clock was set back.
    series.merge(gauge("b", 4, Some(1)));
    assert_eq!(values(&series), [4.0]);
    assert!(series.gauge_times.len() == 1);
}
