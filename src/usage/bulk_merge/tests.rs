//! Merging keeps every count, however the batches are ordered.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::json;

use super::*;

const HOUR: &str = "2026-01-02T03:00:00Z";

fn batch(n: u64, body: &Value) -> QueuedBatch {
    QueuedBatch { id: BatchId::new(1, n), body: body.to_string().into() }
}

fn metrics(metrics: &[Value]) -> Value {
    json!({ "applications": [], "metrics": metrics })
}

fn metric(app: &str, flag: &str, hour: &str, (yes, no): (u64, u64), variants: &Value) -> Value {
    json!({ "featureName": flag, "appName": app, "environment": "dev", "timestamp": hour,
            "yes": yes, "no": no, "variants": variants })
}

fn application(app: &str, instance: &str, strategies: Option<&[&str]>) -> Value {
    let mut application = json!({ "appName": app, "instanceId": instance, "environment": "dev",
                                  "projects": ["default"], "connectVia": [], "interval": 60,
                                  "started": HOUR });
    if let Some(strategies) = strategies {
        application["strategies"] = json!(strategies);
    }
    application
}

fn applications(applications: &[Value]) -> Value {
    json!({ "applications": applications, "metrics": [] })
}

fn impact_metrics(metrics: &[Value]) -> Value {
    json!({ "applications": [], "metrics": [], "impactMetrics": metrics })
}

fn impact(kind: &str, sample: &Value) -> Value {
    let mut sample = sample.clone();
    sample["labels"] = json!({ "origin": "edge" });
    json!({ "name": kind, "help": "h", "type": kind, "samples": [sample] })
}

/// The merged batches: the numbers of their parts, and their bodies.
fn merged(bodies: &[Value]) -> Vec<(Vec<u64>, Value)> {
    let batches = (0..).zip(bodies).map(|(n, body)| batch(n, body)).collect();
    let number = |id: BatchId| (0..100).find(|n| BatchId::new(1, *n) == id).expect("a part");
    let numbers = |parts: Vec<BatchId>| parts.into_iter().map(number).collect();
    let parse = |body: &[u8]| serde_json::from_slice(body).expect("a body is JSON");
    merge_batches(batches, usize::MAX)
        .into_iter()
        .map(|it| (numbers(it.parts), parse(&it.body)))
        .collect()
}

#[test]
fn counts_of_the_same_flag_application_and_hour_are_summed() {
    let later = "2026-01-02T04:00:00Z";
    let bodies = [
        metrics(&[
            metric("a", "f", HOUR, (1, 2), &json!({ "v": 1 })),
            metric("a", "f", later, (1, 0), &json!({})),
        ]),
        metrics(&[metric("a", "f", HOUR, (10, 20), &json!({ "v": 3, "w": 7 }))]),
        metrics(&[metric("b", "f", HOUR, (5, 0), &json!({}))]),
    ];
    let expected = metrics(&[
        metric("a", "f", HOUR, (11, 22), &json!({ "v": 4, "w": 7 })),
        metric("b", "f", HOUR, (5, 0), &json!({})),
        metric("a", "f", later, (1, 0), &json!({})),
    ]);
    assert_eq!(merged(&bodies), [(vec![0, 1, 2], expected)]);
}

#[test]
fn kinds_are_not_mixed() {
    let bodies = [
        applications(&[application("a", "1", Some(&["default"]))]),
        applications(&[application("a", "2", None)]),
        metrics(&[metric("a", "f", HOUR, (1, 0), &json!({}))]),
        impact_metrics(&[impact("counter", &json!({ "value": 1.0 }))]),
        applications(&[application("a", "3", Some(&[]))]),
        applications(&[application("a", "4", None)]),
    ];
    let parts: Vec<_> = merged(&bodies).into_iter().map(|(parts, _)| parts).collect();
    assert_eq!(parts, [vec![0, 4], vec![1, 5], vec![2], vec![3]]);
}

#[test]
fn last_registration_of_an_instance_is_kept() {
    let first = application("a", "1", Some(&["default"]));
    let last = application("a", "1", Some(&["default", "userWithId"]));
    let other = application("a", "2", Some(&["default"]));
    let bodies = [applications(&[first, other.clone()]), applications(std::slice::from_ref(&last))];
    assert_eq!(merged(&bodies), [(vec![0, 1], applications(&[last, other]))]);
}

#[test]
fn impact_metrics_are_summed_and_the_last_value_of_a_gauge_is_kept() {
    let report = |value: f64, counts: [u64; 2]| {
        let buckets =
            [json!({ "le": 1.0, "count": counts[0] }), json!({ "le": "+Inf", "count": counts[1] })];
        let histogram = json!({ "count": counts[1], "sum": value, "buckets": buckets });
        impact_metrics(&[
            impact("counter", &json!({ "value": value })),
            impact("gauge", &json!({ "value": value })),
            impact("histogram", &histogram),
        ])
    };
    let mut expected = report(3.0, [3, 5]);
    expected["impactMetrics"][1] = impact("gauge", &json!({ "value": 2.0 }));
    assert_eq!(merged(&[report(1.0, [1, 2]), report(2.0, [2, 3])]), [(vec![0, 1], expected)]);
}

#[test]
fn batch_that_merging_would_change_is_sent_alone_and_unchanged() {
    let plain = || metrics(&[metric("a", "f", HOUR, (1, 0), &json!({}))]);
    let mut novel_field = plain();
    novel_field["metrics"][0]["novel"] = json!(1);
    let mut novel_list = plain();
    novel_list["novel"] = json!([]);
    let mut malformed = plain();
    malformed["metrics"].as_array_mut().unwrap().push(json!({ "featureName": "f" }));
    let mut mixed = plain();
    mixed["applications"] = json!([application("a", "1", None)]);
    let none = metrics(&[]);
    for odd in [novel_field, novel_list, malformed, mixed, none, json!("text")] {
        let expected = [
            (vec![1], odd.clone()),
            (vec![0, 2], { metrics(&[metric("a", "f", HOUR, (2, 0), &json!({}))]) }),
        ];
        assert_eq!(merged(&[plain(), odd, plain()]), expected);
    }
}

#[test]
fn counts_beyond_the_limits_are_sent_separately() {
    let check = |counts: (u64, u64), variants: [&Value; 2]| {
        let body = |variants| metrics(&[metric("a", "f", HOUR, counts, variants)]);
        let bodies = variants.map(body);
        let [first, second] = bodies.clone();
        assert_eq!(merged(&bodies), [(vec![0], first), (vec![1], second)]);
    };
    let none = json!({});
    check((MAX_COUNT, 0), [&none, &none]);
    check((0, MAX_COUNT), [&none, &none]);
    let most = json!({ "v": MAX_VARIANT_COUNT });
    check((1, 1), [&most, &most]);
    let names = |range: std::ops::Range<usize>| {
        json!(range.map(|n| (format!("v{n}"), 1)).collect::<BTreeMap<_, _>>())
    };
    check((1, 1), [&names(0..MAX_VARIANTS), &names(1..MAX_VARIANTS + 1)]);
}

#[test]
fn histogram_that_would_have_too_many_buckets_is_sent_separately() {
    let report = |first: u32| {
        let buckets: Vec<_> =
            (first..first + 200).map(|le| json!({ "le": f64::from(le), "count": 1 })).collect();
        let histogram = json!({ "count": 1, "sum": 1.0, "buckets": buckets });
        impact_metrics(&[impact("histogram", &histogram)])
    };
    let parts = |bodies: &[Value]| -> Vec<_> {
        merged(bodies).into_iter().map(|(parts, _)| parts).collect()
    };
    assert_eq!(parts(&[report(0), report(0)]), [[0, 1]]);
    assert_eq!(parts(&[report(0), report(100)]), [[0], [1]]);
}

#[test]
fn id_depends_on_the_parts_and_is_kept_for_a_single_batch() {
    let body = metrics(&[metric("a", "f", HOUR, (1, 0), &json!({}))]);
    let id = |numbers: &[u64]| {
        let merged = merge_batches(numbers.iter().map(|n| batch(*n, &body)).collect(), usize::MAX);
        assert_eq!(merged.len(), 1);
        merged[0].id
    };
    assert_eq!(id(&[7]), BatchId::new(1, 7));
    assert_eq!(id(&[7, 8, 9]), id(&[9, 7, 8]));
    assert_ne!(id(&[7, 8]), id(&[7, 8, 9]));
}

/// Every count of some bodies, summed.
fn totals(bodies: impl IntoIterator<Item = Value>) -> BTreeMap<String, u64> {
    let mut totals = BTreeMap::new();
    for body in bodies {
        for metric in body["metrics"].as_array().expect("a list") {
            let key =
                format!("{} {} {}", metric["timestamp"], metric["appName"], metric["featureName"]);
            let variants = metric["variants"].as_object().expect("an object").iter();
            let counts = variants.map(|(name, count)| (format!("{key} variant {name}"), count));
            let own = ["yes", "no"].map(|side| (format!("{key} {side}"), &metric[side]));
            for (key, count) in counts.chain(own) {
                *totals.entry(key).or_default() += count.as_u64().expect("a count");
            }
        }
    }
    totals
}

fn arbitrary_body() -> impl Strategy<Value = Value> {
    let name = prop_oneof![4 => "[a-c]", 1 => "[a-z]{200}"];
    let hour = (0..3).prop_map(|hour| format!("2026-01-02T0{hour}:00:00Z"));
    let variants = prop::collection::btree_map("[u-w]", 0_u64..1000, 0..3);
    let metric = (name.clone(), name, hour, (0_u64..1000, 0_u64..1000), variants).prop_map(
        |(app, flag, hour, counts, variants)| metric(&app, &flag, &hour, counts, &json!(variants)),
    );
    prop::collection::vec(metric, 1..100).prop_map(|all| metrics(&all))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn merging_keeps_sums_and_the_size_limit_in_any_order(
        bodies in prop::collection::vec(arbitrary_body(), 1..20).prop_shuffle(),
        seed in any::<u64>(),
        limit in 40_000..=MAX_BODY_BYTES,
    ) {
        let batches: Vec<_> = (0..).zip(&bodies).map(|(n, body)| batch(n, body)).collect();
        let mut others = batches.clone();
        others.sort_by_key(|batch| BatchId::merged(&[batch.id, BatchId::new(seed, 0)]));
        let results = merge_batches(batches.clone(), limit);
        prop_assert_eq!(&results, &merge_batches(others, limit));

        let parts: Vec<_> = results.iter().flat_map(|it| it.parts.iter().copied()).collect();
        prop_assert_eq!(parts.len(), batches.len());
        let parts: BTreeSet<_> = parts.into_iter().collect();
        prop_assert_eq!(parts, batches.iter().map(|batch| batch.id).collect());
        prop_assert!(results.iter().all(|it| it.body.len() <= limit || it.parts.len() == 1));
        let merged = results.iter().map(|it| serde_json::from_slice(&it.body).unwrap());
        prop_assert_eq!(totals(merged), totals(bodies));
    }
}
