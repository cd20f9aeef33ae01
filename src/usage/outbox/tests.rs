//! What is sent, when, and what is kept after each outcome.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::{
    usage::{
        applications::Registration,
        batch::MAX_BODY,
        counter::{Counter, CounterKey, Hour, MAX_NAME, MAX_VARIANTS, Name},
        lane::Age,
        pool::{Account, Charge, Pool},
        spool,
    },
    wire::usage::{Application, BulkMetric, ImpactMetric, ToggleStats},
};

fn counter(yes: u64) -> Counter {
    let stats = ToggleStats { yes, ..ToggleStats::default() };
    Counter::of(stats, &Arc::default(), |_| Name::Known).0
}

fn key(hour: u8, app: &str, flag: &str) -> CounterKey {
    let time = format!("2026-01-02T{hour:02}:00:00Z").parse().unwrap();
    CounterKey { hour: Hour::of(time), app: app.into(), flag: flag.into() }
}

fn generation(
    environment: &str,
    counters: impl IntoIterator<Item = (CounterKey, u64)>,
) -> BTreeMap<Environment, Generation> {
    let counters = counters.into_iter().map(|(key, yes)| (key, counter(yes))).collect();
    let generation = Generation { counters, ..Generation::default() };
    BTreeMap::from([(Environment::new(environment), generation)])
}

/// A counter that is large by the names of its variants.
fn large(yes: u64) -> (CounterKey, Counter) {
    let long = "x".repeat(MAX_NAME - 4);
    let variants = (0..MAX_VARIANTS).map(|n| (format!("{n}{long}").into(), 1)).collect();
    let stats = ToggleStats { yes, no: 0, variants };
    (key(1, "a", "large"), Counter::of(stats, &Arc::default(), |_| Name::Known).0)
}

fn registered(application: Application) -> Arc<Registration> {
    Arc::new(Registration::restored(application, &uncharged()))
}

fn uncharged() -> Account {
    Pool::new(0).anonymous()
}

fn metrics(body: &[u8]) -> Vec<BulkMetric> {
    let body: Value = serde_json::from_slice(body).unwrap();
    let metrics = body["metrics"].as_array().unwrap();
    metrics.iter().map(|metric| BulkMetric::from_value(metric.clone()).unwrap()).collect()
}

fn yes(body: &[u8]) -> u64 {
    metrics(body).iter().map(|metric| metric.stats.yes).sum()
}

#[test]
fn a_batch_is_sent_again_unchanged_while_new_counts_wait() {
    let now = Instant::now();
    let mut outbox = Outbox::new(100, 7);
    outbox.absorb(generation("dev", [(key(1, "a", "f"), 2)]), now);
    let first = outbox.next(now).unwrap();
    assert!(outbox.next(now).is_none());
    outbox.settle(first.id, Outcome::Later(None), now, 0.5);
    outbox.absorb(generation("dev", [(key(1, "a", "f"), 5)]), now);
    assert!(outbox.next(now).is_none());
    let later = outbox.wake().unwrap();
    let again = outbox.next(later).unwrap();
    assert_eq!(again.body, first.body);
    outbox.settle(again.id, Outcome::Sent, later, 0.5);
    let rest = outbox.next(later).unwrap();
    assert_eq!(yes(&rest.body), 5);
    outbox.settle(rest.id, Outcome::Sent, later, 0.5);
    assert!(outbox.is_empty());
    assert_eq!(outbox.totals(), &Totals { sent: 7, dropped: 0 });
}

#[test]
fn one_environments_failure_does_not_delay_another() {
    let now = Instant::now();
    let mut outbox = Outbox::new(100, 7);
    outbox.absorb(generation("a", [(key(1, "a", "f"), 1)]), now);
    let first = outbox.next(now).unwrap();
    let pause = Duration::from_mins(5);
    outbox.settle(first.id, Outcome::Later(Some(pause)), now, 0.0);
    assert!(outbox.wake().unwrap() >= now + pause);
    outbox.absorb(generation("b", [(key(1, "a", "f"), 1)]), now);
    assert_eq!(outbox.next(now).unwrap().environment.as_str(), "b");
}

#[test]
fn a_refused_batch_is_dropped_and_counted() {
    let now = Instant::now();
    let mut outbox = Outbox::new(100, 7);
    outbox.absorb(generation("dev", [(key(1, "a", "f"), 2)]), now);
    let batch = outbox.next(now).unwrap();
    outbox.settle(batch.id, Outcome::Rejected, now, 0.5);
    assert!(outbox.is_empty());
    assert_eq!(outbox.totals(), &Totals { sent: 0, dropped: 2 });
}

#[test]
fn a_batch_found_too_large_is_halved_until_it_passes() {
    let now = Instant::now();
    let mut outbox = Outbox::new(10_000, 7);
    let counters = (0..900).map(|flag| (key(1, "a", &format!("{flag:0>90}")), 1));
    outbox.absorb(generation("dev", counters), now);
    let mut sent = 0;
    let mut refused = 0;
    while let Some(batch) = outbox.next(now) {
        let fits = batch.body.len() <= 10_000;
        (sent, refused) =
            if fits { (sent + yes(&batch.body), refused) } else { (sent, refused + 1) };
        let outcome = if fits { Outcome::Sent } else { Outcome::TooLarge };
        outbox.settle(batch.id, outcome, now, 0.5);
    }
    // Four to find a size, and one each time that a larger one is tried.
    assert_eq!((sent, refused), (900, 7));
}

/// Sends all that waits; what is larger than `limit` is called too large.
fn flush(outbox: &mut Outbox, mut now: Instant, limit: usize) -> Instant {
    for _ in 0..10_000 {
        let Some(batch) = outbox.next(now) else {
            let Some(later) = outbox.wake() else { return now };
            now = later;
            continue;
        };
        let fits = batch.body.len() <= limit;
        let outcome = if fits { Outcome::Sent } else { Outcome::TooLarge };
        outbox.settle(batch.id, outcome, now, 0.5);
    }
    panic!("{:?} still wait", outbox.len());
}

#[test]
fn nothing_is_dropped_while_everything_is_called_too_large() {
    let mut now = Instant::now();
    let mut outbox = Outbox::new(10_000, 7);
    let counters = (0..50).map(|flag| (key(1, "a", &flag.to_string()), counter(1)));
    let counters = counters.chain([large(1)]).collect();
    let generation = Generation { counters, ..Generation::default() };
    outbox.absorb(BTreeMap::from([(Environment::new("dev"), generation)]), now);
    let started = now;
    for attempt in 0..200 {
        let batch = loop {
            match outbox.next(now) {
                Some(batch) => break batch,
                None => now = outbox.wake().expect("it waits"),
            }
        };
        outbox.settle(batch.id, Outcome::TooLarge, now, 1.0);
        assert_eq!(outbox.totals().dropped, 0, "{attempt}");
    }
    // At most some dozen attempts without a pause, then one a minute.
    assert!(now - started > Duration::from_hours(2), "{:?}", now - started);
    flush(&mut outbox, now, MAX_BODY);
    assert!(outbox.is_empty());
    assert_eq!(outbox.totals(), &Totals { sent: 51, dropped: 0 });
}

#[test]
fn counter_that_is_too_large_once_is_kept_although_others_were_taken() {
    let mut now = Instant::now();
    let mut outbox = Outbox::new(10_000, 7);
    outbox.absorb(generation("dev", [(key(1, "a", "f"), 2)]), now);
    now = flush(&mut outbox, now, MAX_BODY);
    let generation = Generation { counters: vec![large(7)], ..Generation::default() };
    outbox.absorb(BTreeMap::from([(Environment::new("dev"), generation)]), now);
    for _ in 0..20 {
        now = outbox.wake().unwrap_or(now);
        let batch = outbox.next(now).unwrap();
        outbox.settle(batch.id, Outcome::TooLarge, now, 1.0);
        assert_eq!(outbox.totals(), &Totals { sent: 2, dropped: 0 });
    }
    flush(&mut outbox, now, MAX_BODY);
    assert_eq!(outbox.totals(), &Totals { sent: 9, dropped: 0 });
}

#[test]
fn counter_that_is_too_large_alone_is_dropped_only_after_others_were_taken() {
    let now = Instant::now();
    let mut outbox = Outbox::new(10_000, 7);
    let generation = Generation { counters: vec![large(7)], ..Generation::default() };
    outbox.absorb(BTreeMap::from([(Environment::new("dev"), generation)]), now);
    for _ in 0..3 {
        let now = outbox.wake().unwrap_or(now);
        let batch = outbox.next(now).unwrap();
        outbox.settle(batch.id, Outcome::TooLarge, now, 1.0);
    }
    assert_eq!(outbox.totals().dropped, 0);
    // What comes later is not held up by it.
    outbox.absorb(self::generation("dev", [(key(2, "a", "f"), 2)]), now);
    flush(&mut outbox, now, 10_000);
    assert!(outbox.is_empty());
    assert_eq!(outbox.totals(), &Totals { sent: 2, dropped: 7 });
}

#[test]
fn limit_on_bodies_grows_back_after_successes() {
    let now = Instant::now();
    let mut outbox = Outbox::new(100_000, 7);
    let mut send = |limit: usize| {
        let counters = (0..2000).map(|flag| (key(1, "a", &format!("{flag:0>200}")), 1));
        outbox.absorb(generation("dev", counters), now);
        let mut largest = 0;
        let mut now = now;
        while !outbox.is_empty() {
            let Some(batch) = outbox.next(now) else {
                now = outbox.wake().unwrap();
                continue;
            };
            let fits = batch.body.len() <= limit;
            largest = if fits { largest.max(batch.body.len()) } else { largest };
            let outcome = if fits { Outcome::Sent } else { Outcome::TooLarge };
            outbox.settle(batch.id, outcome, now, 0.5);
        }
        largest
    };
    assert!(send(5000) <= 5000);
    assert!(send(MAX_BODY) > MAX_BODY / 2);
}

#[test]
fn restored_registration_does_not_replace_a_newer_one() {
    let now = Instant::now();
    let application = |interval: u64, strategies: &str| {
        let body = format!(
            r#"{{"appName":"a","instanceId":"i","started":"2026-01-02T03:04:05Z",
            "interval":{interval}{strategies}}}"#
        );
        Application::parse(body.as_bytes()).unwrap()
    };
    let mut outbox = Outbox::new(100, 7);
    let applications = vec![registered(application(2, ""))];
    let generation = Generation { applications, ..Generation::default() };
    outbox.absorb(BTreeMap::from([(Environment::new("dev"), generation)]), now);
    let mut restored = Lane::default();
    restored.register(registered(application(1, r#","strategies":["x"]"#)), Age::Newer);
    outbox.restore(Environment::new("dev"), restored, now);
    let body: Value = serde_json::from_slice(&outbox.next(now).unwrap().body).unwrap();
    let [application] = &body["applications"].as_array().unwrap()[..] else { panic!("{body}") };
    assert_eq!((&application["interval"], &application["strategies"][0]), (&2.into(), &"x".into()));
}

#[test]
fn refused_instance_of_unknown_strategies_is_sent_with_an_empty_list() {
    let now = Instant::now();
    let body = br#"{"appName":"a","started":"2026-01-02T03:04:05Z","interval":1}"#;
    let applications = vec![registered(Application::parse(body).unwrap())];
    let generation = Generation { applications, ..Generation::default() };
    let mut outbox = Outbox::new(100, 7);
    outbox.absorb(BTreeMap::from([(Environment::new("dev"), generation)]), now);
    let strategies = |batch: &Dispatch| {
        let body: Value = serde_json::from_slice(&batch.body).unwrap();
        body["applications"][0].get("strategies").cloned()
    };
    let batch = outbox.next(now).unwrap();
    assert_eq!(strategies(&batch), None);
    outbox.settle(batch.id, Outcome::Rejected, now, 0.5);
    let batch = outbox.next(now).unwrap();
    assert_eq!(strategies(&batch), Some(Value::Array(Vec::new())));
    outbox.settle(batch.id, Outcome::Rejected, now, 0.5);
    assert!(outbox.is_empty());
}

#[test]
fn restored_gauge_does_not_replace_a_newer_one() {
    let piece = r#"{"part":"impact","count":0,"json":{"name":"n","help":"h","type":"gauge",
        "samples":[{"value":9.0,"labels":{"origin":"edge"}}]}}"#;
    let stored = |value: &str, times: &str, batch: &str| {
        format!(
            r#"{{"version":1,"environments":{{"dev":{{"batch":[{batch}],"pieces":[],
            "applications":[],"metrics":[],"impact":[{{"app":"a","metric":{{"name":"n",
            "help":"h","type":"gauge","samples":[{{"value":{value},"labels":{{}}}}]}}{times}}}]
            }}}}}}"#
        )
    };
    let sent = |records: &[String]| {
        let mut outbox = Outbox::new(10, 7);
        let now = Instant::now();
        for record in records {
            for (environment, lane) in
                spool::restore(record.as_bytes(), &uncharged()).unwrap().lanes
            {
                outbox.restore(environment, lane, now);
            }
        }
        let mut values = Vec::new();
        while let Some(batch) = outbox.next(now) {
            let body: Value = serde_json::from_slice(&batch.body).unwrap();
            values.push(body["impactMetrics"][0]["samples"].clone());
            outbox.settle(batch.id, Outcome::Sent, now, 0.5);
        }
        let labels = serde_json::json!({ "origin": "edge" });
        let [Value::Array(samples)] = &values[..] else { panic!("{values:?}") };
        let [sample] = &samples[..] else { panic!("{samples:?}") };
        assert_eq!(sample["labels"], labels);
        sample["value"].as_f64().unwrap()
    };
    let at = |time: &str| format!(r#","times":["2026-01-02T03:04:{time}Z"]"#);
    // The own record comes first, then those of instances that have ended.
    assert!((sent(&[stored("2.0", "", ""), stored("1.0", "", "")]) - 2.0).abs() < 0.1);
    let (early, late) = (stored("1.0", &at("05"), ""), stored("2.0", &at("06"), ""));
    assert!((sent(&[late.clone(), early.clone()]) - 2.0).abs() < 0.1);
    assert!((sent(&[early, late]) - 2.0).abs() < 0.1);
    // A gauge in the batch that was under way is older than the rest of its record.
    let both = stored("2.0", &at("06"), piece);
    assert!((sent(std::slice::from_ref(&both)) - 2.0).abs() < 0.1);
    assert!((sent(&[stored("3.0", &at("07"), ""), both]) - 3.0).abs() < 0.1);
}

/// A generation of two gauges with this value, one of them large by its labels.
fn gauges(value: u32, at: i64) -> BTreeMap<Environment, Generation> {
    let at = Some(jiff::Timestamp::from_second(at).unwrap());
    let mut generation = Generation::default();
    let labels: serde_json::Map<_, _> =
        (0..12).map(|n| (format!("l{n:0>200}"), "x".repeat(200).into())).collect();
    for (name, labels) in [("large", labels), ("small", serde_json::Map::new())] {
        let samples = serde_json::json!([{ "value": value, "labels": labels }]);
        let metric = serde_json::json!({ "name": name, "help": "h", "type": "gauge",
                                         "samples": samples });
        let metric = ImpactMetric::from_value(metric).unwrap();
        let uncharged = |_| Some(Charge::default());
        assert_eq!(generation.impact.record(&"a".into(), metric, [at], uncharged), 0);
    }
    BTreeMap::from([(Environment::new("dev"), generation)])
}

/// Sends all that waits: the values of the gauges that are taken, by name.
fn flush_gauges(outbox: &mut Outbox, mut now: Instant) -> Vec<(String, f64)> {
    let mut values = Vec::new();
    while !outbox.is_empty() {
        now = outbox.wake().unwrap_or(now);
        let Some(batch) = outbox.next(now) else { continue };
        let body: Value = serde_json::from_slice(&batch.body).unwrap();
        for metric in body["impactMetrics"].as_array().unwrap() {
            let value = metric["samples"][0]["value"].as_f64().unwrap();
            values.push((metric["name"].as_str().unwrap().to_owned(), value));
        }
        outbox.settle(batch.id, Outcome::Sent, now, 0.5);
    }
    values
}

/// What waits after the large gauge with the value 1 was refused alone.
fn refused_gauges(now: Instant) -> (Outbox, Instant) {
    let (mut outbox, mut now) = (Outbox::new(10, 7), now);
    outbox.absorb(gauges(1, 5), now);
    // Both in one body, then the large one.
    for _ in 0..2 {
        now = outbox.wake().unwrap_or(now);
        let batch = outbox.next(now).unwrap();
        outbox.settle(batch.id, Outcome::TooLarge, now, 0.5);
    }
    (outbox, now)
}

#[test]
fn refused_gauge_is_sent_unless_a_newer_one_is_known() {
    let sent = |values: &[(&str, f64)]| -> Vec<_> {
        values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    };
    let (mut outbox, now) = refused_gauges(Instant::now());
    assert_eq!(flush_gauges(&mut outbox, now), sent(&[("small", 1.0), ("large", 1.0)]));

    // Also where the clock was set back meanwhile.
    for at in [6, 4] {
        let (mut outbox, now) = refused_gauges(Instant::now());
        outbox.absorb(gauges(2, at), now);
        let values = flush_gauges(&mut outbox, now);
        let newer = sent(&[("small", 1.0), ("large", 2.0), ("small", 2.0)]);
        assert_eq!(values, newer, "{at}");
    }

    // Its time is stored with it.
    let (mut refused, now) = refused_gauges(Instant::now());
    let mut older = Outbox::new(10, 7);
    older.absorb(gauges(2, 4), now);
    let mut outbox = Outbox::new(10, 7);
    for record in [&mut refused, &mut older] {
        let record = spool::save(&record.copy()).unwrap();
        for (environment, lane) in spool::restore(&record, &uncharged()).unwrap().lanes {
            outbox.restore(environment, lane, now);
        }
    }
    let newest = sent(&[("large", 1.0), ("small", 1.0)]);
    assert_eq!(flush_gauges(&mut outbox, now), newest);
}

#[test]
fn too_many_counters_first_lose_their_applications_then_their_hours() {
    let now = Instant::now();
    let mut outbox = Outbox::new(10, 7);
    let of_hour = |hour| (0..8).map(move |app| (key(hour, &app.to_string(), "f"), 1));
    outbox.absorb(generation("dev", of_hour(1).chain(of_hour(2))), now);
    // The first hour's eight are one now, the second hour's are still apart.
    assert_eq!((outbox.len(), outbox.totals().dropped), (9, 0));
    outbox.absorb(generation("dev", (3..20).map(|hour| (key(hour, "a", "f"), 1))), now);
    assert_eq!((outbox.len(), outbox.totals().dropped), (10, 0));
    let batch = outbox.next(now).unwrap();
    let rows = metrics(&batch.body);
    // The first ten hours are one, with all that they counted.
    assert_eq!((rows.len(), rows[0].stats.yes, yes(&batch.body)), (10, 8 + 8 + 8, 16 + 17));
}

#[test]
fn shares_are_fair_to_who_wants_little() {
    let check = |total: usize, wanted: &[usize], share: usize| {
        assert_eq!(fair_share(total, wanted.iter().copied()), share, "{wanted:?}");
    };
    check(100, &[], 100);
    check(100, &[30, 70], 100);
    check(100, &[101], 100);
    check(100, &[200, 10], 90);
    check(100, &[50, 20, 60], 40);
    check(100, &[100, 100, 100], 33);
}

#[test]
fn environment_that_has_grown_costs_another_no_application() {
    let now = Instant::now();
    let mut outbox = Outbox::new(100, 7);
    let of_apps = |apps: u8| (0..apps).map(|app| (key(1, &app.to_string(), "f"), 1));
    outbox.absorb(generation("small", of_apps(20)), now);
    let flood = (0..200).map(|nth| (key(2, &nth.to_string(), &nth.to_string()), 1));
    outbox.absorb(generation("large", flood.chain([(key(1, "a", "0"), 1)])), now);
    let weight = |outbox: &Outbox, environment: &str| {
        outbox.lanes[&Environment::new(environment)].counters.weight()
    };
    assert_eq!((weight(&outbox, "small"), weight(&outbox, "large")), (20, 200));
    // It is merged as soon as it is the one that has more than its share.
    outbox.absorb(generation("small", of_apps(200)), now);
    assert_eq!(weight(&outbox, "small"), 1);
    assert_eq!(outbox.totals().dropped, 0);
}

#[test]
fn flags_of_one_hour_stay_however_many_they_are() {
    let now = Instant::now();
    let mut outbox = Outbox::new(10, 7);
    let flags = |hour| (0..50).map(move |flag| (key(hour, "a", &flag.to_string()), 1));
    outbox.absorb(generation("dev", flags(1)), now);
    outbox.absorb(generation("dev", flags(2)), now);
    assert_eq!((outbox.len(), outbox.totals().dropped), (50, 0));
    assert_eq!(yes(&outbox.next(now).unwrap().body), 100);
}

#[test]
fn a_flood_of_distinct_hours_stays_within_the_limit_and_loses_no_count() {
    let now = Instant::now();
    let mut outbox = Outbox::new(10_000, 7);
    let of_hour = |hour: i64| {
        let time = jiff::Timestamp::from_second(3600 * hour).unwrap();
        (CounterKey { hour: Hour::of(time), app: "a".into(), flag: "f".into() }, 1)
    };
    for report in 0..6 {
        let hours = 8000 * report..8000 * (report + 1);
        outbox.absorb(generation("dev", hours.map(of_hour)), now);
        assert!(outbox.len() <= 10_000);
    }
    assert_eq!((outbox.len(), outbox.totals().dropped), (10_000, 0));
    let mut arrived = 0;
    while let Some(batch) = outbox.next(now) {
        arrived += yes(&batch.body);
        outbox.settle(batch.id, Outcome::Sent, now, 0.5);
    }
    assert_eq!(arrived, 48_000);
}

#[test]
fn a_revision_lasts_as_long_as_what_waits_and_emptiness_has_one() {
    let now = Instant::now();
    let mut outbox = Outbox::new(100, 7);
    let empty = outbox.revision();
    let mut revisions = vec![empty];
    let mut changed = |outbox: &Outbox| {
        let known = revisions.contains(&outbox.revision());
        revisions.push(outbox.revision());
        !known
    };
    outbox.absorb(generation("dev", [(key(1, "a", "f"), 2), (key(1, "a", "g"), 2)]), now);
    assert!(changed(&outbox));
    outbox.absorb(BTreeMap::new(), now);
    assert!(!changed(&outbox));
    let batch = outbox.next(now).unwrap();
    assert!(changed(&outbox));
    outbox.settle(batch.id, Outcome::Later(None), now, 0.5);
    let later = outbox.wake().unwrap();
    let batch = outbox.next(later).unwrap();
    assert!(!changed(&outbox));
    outbox.settle(batch.id, Outcome::TooLarge, later, 0.5);
    assert!(changed(&outbox));
    let later = outbox.wake().unwrap();
    while let Some(batch) = outbox.next(later) {
        outbox.settle(batch.id, Outcome::Sent, later, 0.5);
    }
    assert_eq!(outbox.revision(), empty);
}

#[test]
fn without_an_upstream_everything_is_let_go() {
    let now = Instant::now();
    let mut outbox = Outbox::new(100, 7);
    outbox.absorb(generation("dev", [(key(1, "a", "f"), 2)]), now);
    outbox.discard();
    assert!(outbox.is_empty());
    assert_eq!(outbox.totals(), &Totals { sent: 0, dropped: 2 });
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        4 => Just(Outcome::Sent),
        1 => Just(Outcome::TooLarge),
        1 => Just(Outcome::Unauthorized),
        1 => Just(Outcome::Later(None)),
        1 => Just(Outcome::Later(Some(Duration::from_secs(7)))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn whatever_fails_every_count_arrives_once(
        reports in prop::collection::vec(
            (0..3_u8, 0..4_u8, "[a-c]{1,40}", "[a-z]{1,200}", 1..1000_u64), 1..150),
        outcomes in prop::collection::vec(outcome(), 0..40),
    ) {
        let mut now = Instant::now();
        let mut outbox = Outbox::new(1000, 7);
        let mut outcomes = outcomes.into_iter();
        let mut expected = BTreeMap::new();
        let mut arrived = BTreeMap::new();
        let mut step = |outbox: &mut Outbox, now: Instant| {
            let Some(batch) = outbox.next(now) else { return false };
            assert!(batch.body.len() <= MAX_BODY);
            let rows = metrics(&batch.body);
            let outcome = outcomes.next().unwrap_or(Outcome::Sent);
            if outcome == Outcome::Sent {
                for row in rows {
                    *arrived.entry((row.environment, row.app_name, row.feature_name))
                        .or_insert(0) += row.stats.yes;
                }
            }
            outbox.settle(batch.id, outcome, now, 0.3);
            true
        };
        for (environment, hour, app, flag, count) in reports {
            let environment = environment.to_string();
            outbox.absorb(generation(&environment, [(key(hour, &app, &flag), count)]), now);
            *expected.entry((environment.into(), app.into(), flag.into())).or_insert(0) += count;
            step(&mut outbox, now);
        }
        while !outbox.is_empty() {
            if !step(&mut outbox, now) {
                now = outbox.wake().unwrap();
            }
        }
        prop_assert_eq!(arrived, expected);
        prop_assert_eq!(outbox.totals().dropped, 0);
    }
}
