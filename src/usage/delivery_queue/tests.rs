//! Tests of which batches are sent, when, and what remains after each outcome.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::{
    protocol::usage::{BulkMetric, ClientApplication, ImpactMetric, ToggleStats},
    usage::{
        batch::MAX_BODY_BYTES,
        counters::{Counter, CounterKey, Hour, MAX_NAME_BYTES, MAX_VARIANTS, NameStatus},
        instances::Registration,
        quota_pool::{Quota, QuotaPool, Reservation},
        spool,
    },
};

fn counter(yes: u64) -> Counter {
    let stats = ToggleStats { yes, ..ToggleStats::default() };
    Counter::from_stats(stats, &Arc::default(), |_| NameStatus::Known).0
}

fn key(hour: u8, app: &str, flag: &str) -> CounterKey {
    let time = format!("2026-01-02T{hour:02}:00:00Z").parse().unwrap();
    CounterKey { hour: Hour::of(time), app: app.into(), flag: flag.into() }
}

fn drained(
    environment: &str,
    counters: impl IntoIterator<Item = (CounterKey, u64)>,
) -> BTreeMap<Environment, Drained> {
    let counters = counters.into_iter().map(|(key, yes)| (key, counter(yes))).collect();
    let drained = Drained { counters, ..Drained::default() };
    BTreeMap::from([(Environment::new(environment), drained)])
}

/// A counter that is large because of its variants' names.
fn large(yes: u64) -> (CounterKey, Counter) {
    let long = "x".repeat(MAX_NAME_BYTES - 4);
    let variants = (0..MAX_VARIANTS).map(|n| (format!("{n}{long}").into(), 1)).collect();
    let stats = ToggleStats { yes, no: 0, variants };
    (key(1, "a", "large"), Counter::from_stats(stats, &Arc::default(), |_| NameStatus::Known).0)
}

fn registration(application: ClientApplication) -> Arc<Registration> {
    Arc::new(Registration::restored(application, &uncharged()))
}

fn uncharged() -> Quota {
    QuotaPool::new(0).unowned_quota()
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
fn batch_is_retried_unchanged_while_new_counts_wait() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(100, 7);
    queue.enqueue(drained("dev", [(key(1, "a", "f"), 2)]), now);
    let first = queue.next_batch(now).unwrap();
    assert!(queue.next_batch(now).is_none());
    queue.record_outcome(first.id, SendOutcome::Retry(None), now, 0.5);
    queue.enqueue(drained("dev", [(key(1, "a", "f"), 5)]), now);
    assert!(queue.next_batch(now).is_none());
    let later = queue.next_retry_at().unwrap();
    let again = queue.next_batch(later).unwrap();
    assert_eq!(again.body, first.body);
    queue.record_outcome(again.id, SendOutcome::Sent, later, 0.5);
    let rest = queue.next_batch(later).unwrap();
    assert_eq!(yes(&rest.body), 5);
    queue.record_outcome(rest.id, SendOutcome::Sent, later, 0.5);
    assert!(queue.is_empty());
    assert_eq!(queue.totals(), &DeliveryTotals { sent: 7, dropped: 0 });
}

const CHECK: Duration = Duration::from_secs(5);

/// Parks everything that is due.
fn park_all(queue: &mut DeliveryQueue, now: Instant) -> Vec<OutgoingBatch> {
    let mut parked = Vec::new();
    while let Some(batch) = queue.next_batch(now) {
        queue.record_outcome(batch.id, SendOutcome::Parked(CHECK), now, 0.5);
        parked.push(batch);
    }
    parked
}

#[test]
fn parked_batch_is_kept_and_asked_about_while_others_are_sent() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(100, 7);
    queue.enqueue(drained("dev", [(key(1, "a", "f"), 2)]), now);
    let first = queue.next_batch(now).unwrap();
    assert!(!first.may_be_parked);
    queue.record_outcome(first.id, SendOutcome::Parked(CHECK), now, 0.5);
    assert!((queue.next_retry_at(), queue.next_check_at()) == (None, Some(now + CHECK)));

    let later = now + Duration::from_secs(1);
    queue.enqueue(drained("dev", [(key(1, "a", "f"), 5)]), later);
    let second = queue.next_batch(later).unwrap();
    assert_eq!((yes(&second.body), second.may_be_parked), (5, false));
    queue.record_outcome(second.id, SendOutcome::Sent, later, 0.5);
    assert!(queue.next_batch(later).is_none());
    assert!(queue.oldest_age(later) == Duration::from_secs(1));

    for checks in 1..3 {
        let at = now + CHECK * checks;
        let check = queue.next_batch(at).unwrap();
        assert_eq!((check.id, check.may_be_parked), (first.id, true));
        assert_eq!(check.body, first.body);
        assert_eq!(queue.next_check_at(), None);
        queue.record_outcome(check.id, SendOutcome::Parked(CHECK), at, 0.5);
        assert_eq!(queue.next_check_at(), Some(at + CHECK));
    }
    let at = now + CHECK * 3;
    let check = queue.next_batch(at).unwrap();
    queue.record_outcome(check.id, SendOutcome::Sent, at, 0.5);
    assert!(queue.is_empty());
    assert_eq!(queue.totals(), &DeliveryTotals { sent: 7, dropped: 0 });
}

#[test]
fn parked_batch_that_is_too_large_or_rejected_is_treated_like_others() {
    for outcome in [SendOutcome::TooLarge, SendOutcome::Rejected] {
        let now = Instant::now();
        let mut queue = DeliveryQueue::new(100, 7);
        let flags = ["f", "g"].map(|flag| (key(1, "a", flag), 3));
        queue.enqueue(drained("dev", flags), now);
        let [parked] = &park_all(&mut queue, now)[..] else { panic!("one batch") };
        let at = now + CHECK;
        assert_eq!(queue.next_batch(at).unwrap().id, parked.id);
        queue.record_outcome(parked.id, outcome, at, 0.5);
        if outcome == SendOutcome::TooLarge {
            let later = queue.next_retry_at().unwrap();
            let half = queue.next_batch(later).unwrap();
            assert_eq!((yes(&half.body), half.may_be_parked), (3, false));
            assert_ne!(half.id, parked.id);
        } else {
            assert_eq!(queue.totals(), &DeliveryTotals { sent: 0, dropped: 6 });
        }
    }
}

#[test]
fn usage_waits_while_too_many_batches_are_parked() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(1000, 7);
    let mut parked = Vec::new();
    for _ in 0..40 {
        queue.enqueue(drained("dev", [(key(1, "a", "f"), 1)]), now);
        parked.extend(park_all(&mut queue, now));
    }
    assert_eq!((parked.len(), queue.parked_count()), (32, 32));
    assert_eq!(queue.next_retry_at(), Some(now + CHECK), "the rest is delayed");
    let at = now + CHECK;
    let check = queue.next_batch(at).unwrap();
    queue.record_outcome(check.id, SendOutcome::Sent, at, 0.5);
    let ids: Vec<_> = park_all(&mut queue, at).iter().map(|batch| batch.id).collect();
    assert_eq!(ids.len(), 32, "the others are asked about, and the rest is parked");
    assert!(!parked.iter().any(|batch| batch.id == *ids.last().unwrap()));
}

#[test]
fn parked_batches_are_stored_and_may_be_parked_after_a_restart() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(100, 7);
    queue.enqueue(drained("dev", [(key(1, "a", "f"), 2)]), now);
    let parked = park_all(&mut queue, now);
    let revision = queue.revision();
    assert_eq!(queue.next_batch(now).map(|batch| batch.id), None);
    assert_eq!(queue.revision(), revision, "nothing has changed");

    let saved = spool::encode(&queue.copy_for_store()).unwrap();
    let mut queue = DeliveryQueue::new(100, 8);
    for (environment, restored) in spool::decode(&saved, &uncharged()).unwrap().queues {
        queue.restore(environment, restored, now);
    }
    let restored = queue.next_batch(now).unwrap();
    assert_eq!((restored.id, restored.may_be_parked), (parked[0].id, true));
    assert_eq!(restored.body, parked[0].body);
}

#[test]
fn batch_whose_outcome_was_lost_may_be_parked() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(100, 7);
    queue.enqueue(drained("dev", [(key(1, "a", "f"), 2)]), now);
    let first = queue.next_batch(now).unwrap();
    queue.requeue_in_flight();
    let again = queue.next_batch(now).unwrap();
    assert_eq!((again.id, again.may_be_parked), (first.id, true));
}

#[test]
fn failing_environment_does_not_delay_another() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(100, 7);
    queue.enqueue(drained("a", [(key(1, "a", "f"), 1)]), now);
    let first = queue.next_batch(now).unwrap();
    let pause = Duration::from_mins(5);
    queue.record_outcome(first.id, SendOutcome::Retry(Some(pause)), now, 0.0);
    assert!(queue.next_retry_at().unwrap() >= now + pause);
    queue.enqueue(drained("b", [(key(1, "a", "f"), 1)]), now);
    assert_eq!(queue.next_batch(now).unwrap().environment.as_str(), "b");
}

#[test]
fn rejected_batch_is_dropped_and_counted() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(100, 7);
    queue.enqueue(drained("dev", [(key(1, "a", "f"), 2)]), now);
    let batch = queue.next_batch(now).unwrap();
    queue.record_outcome(batch.id, SendOutcome::Rejected, now, 0.5);
    assert!(queue.is_empty());
    assert_eq!(queue.totals(), &DeliveryTotals { sent: 0, dropped: 2 });
}

#[test]
fn batch_that_is_too_large_is_split_until_accepted() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(10_000, 7);
    let counters = (0..900).map(|flag| (key(1, "a", &format!("{flag:0>90}")), 1));
    queue.enqueue(drained("dev", counters), now);
    let mut sent = 0;
    let mut rejected = 0;
    while let Some(batch) = queue.next_batch(now) {
        let fits = batch.body.len() <= 10_000;
        (sent, rejected) =
            if fits { (sent + yes(&batch.body), rejected) } else { (sent, rejected + 1) };
        let outcome = if fits { SendOutcome::Sent } else { SendOutcome::TooLarge };
        queue.record_outcome(batch.id, outcome, now, 0.5);
    }
    // Four to find a size, and one each time that a larger one is tried.
    assert_eq!((sent, rejected), (900, 7));
}

/// Sends all pending usage; bodies larger than `limit` are rejected as too large.
fn flush(queue: &mut DeliveryQueue, mut now: Instant, limit: usize) -> Instant {
    for _ in 0..10_000 {
        let Some(batch) = queue.next_batch(now) else {
            let Some(later) = queue.next_retry_at() else { return now };
            now = later;
            continue;
        };
        let fits = batch.body.len() <= limit;
        let outcome = if fits { SendOutcome::Sent } else { SendOutcome::TooLarge };
        queue.record_outcome(batch.id, outcome, now, 0.5);
    }
    panic!("{:?} are still pending", queue.counter_weight());
}

#[test]
fn nothing_is_dropped_while_everything_is_rejected_as_too_large() {
    let mut now = Instant::now();
    let mut queue = DeliveryQueue::new(10_000, 7);
    let counters = (0..50).map(|flag| (key(1, "a", &flag.to_string()), counter(1)));
    let counters = counters.chain([large(1)]).collect();
    let drained = Drained { counters, ..Drained::default() };
    queue.enqueue(BTreeMap::from([(Environment::new("dev"), drained)]), now);
    let started = now;
    for attempt in 0..200 {
        let batch = loop {
            match queue.next_batch(now) {
                Some(batch) => break batch,
                None => now = queue.next_retry_at().expect("a delay"),
            }
        };
        queue.record_outcome(batch.id, SendOutcome::TooLarge, now, 1.0);
        assert_eq!(queue.totals().dropped, 0, "{attempt}");
    }
    // At most some dozen attempts without a delay, then one a minute.
    assert!(now - started > Duration::from_hours(2), "{:?}", now - started);
    flush(&mut queue, now, MAX_BODY_BYTES);
    assert!(queue.is_empty());
    assert_eq!(queue.totals(), &DeliveryTotals { sent: 51, dropped: 0 });
}

#[test]
fn counter_that_is_too_large_is_retried_until_another_batch_is_accepted() {
    let mut now = Instant::now();
    let mut queue = DeliveryQueue::new(10_000, 7);
    queue.enqueue(drained("dev", [(key(1, "a", "f"), 2)]), now);
    now = flush(&mut queue, now, MAX_BODY_BYTES);
    let counters = Drained { counters: vec![large(7)], ..Drained::default() };
    queue.enqueue(BTreeMap::from([(Environment::new("dev"), counters)]), now);
    for _ in 0..20 {
        now = queue.next_retry_at().unwrap_or(now);
        let batch = queue.next_batch(now).unwrap();
        queue.record_outcome(batch.id, SendOutcome::TooLarge, now, 1.0);
        assert_eq!(queue.totals(), &DeliveryTotals { sent: 2, dropped: 0 });
    }
    flush(&mut queue, now, MAX_BODY_BYTES);
    assert_eq!(queue.totals(), &DeliveryTotals { sent: 9, dropped: 0 });
}

#[test]
fn single_counter_that_is_too_large_is_dropped_after_another_batch_is_accepted() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(10_000, 7);
    let counters = Drained { counters: vec![large(7)], ..Drained::default() };
    queue.enqueue(BTreeMap::from([(Environment::new("dev"), counters)]), now);
    for _ in 0..3 {
        let now = queue.next_retry_at().unwrap_or(now);
        let batch = queue.next_batch(now).unwrap();
        queue.record_outcome(batch.id, SendOutcome::TooLarge, now, 1.0);
    }
    assert_eq!(queue.totals().dropped, 0);
    // The large item does not delay later ones.
    queue.enqueue(drained("dev", [(key(2, "a", "f"), 2)]), now);
    flush(&mut queue, now, 10_000);
    assert!(queue.is_empty());
    assert_eq!(queue.totals(), &DeliveryTotals { sent: 2, dropped: 7 });
}

#[test]
fn body_limit_grows_back_after_successes() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(100_000, 7);
    let mut send = |limit: usize| {
        let counters = (0..2000).map(|flag| (key(1, "a", &format!("{flag:0>200}")), 1));
        queue.enqueue(drained("dev", counters), now);
        let mut largest = 0;
        let mut now = now;
        while !queue.is_empty() {
            let Some(batch) = queue.next_batch(now) else {
                now = queue.next_retry_at().unwrap();
                continue;
            };
            let fits = batch.body.len() <= limit;
            largest = if fits { largest.max(batch.body.len()) } else { largest };
            let outcome = if fits { SendOutcome::Sent } else { SendOutcome::TooLarge };
            queue.record_outcome(batch.id, outcome, now, 0.5);
        }
        largest
    };
    assert!(send(5000) <= 5000);
    assert!(send(MAX_BODY_BYTES) > MAX_BODY_BYTES / 2);
}

#[test]
fn restored_registration_does_not_replace_a_newer_one() {
    let now = Instant::now();
    let application = |interval: u64, strategies: &str| {
        let body = format!(
            r#"{{"appName":"a","instanceId":"i","started":"2026-01-02T03:04:05Z",
            "interval":{interval}{strategies}}}"#
        );
        ClientApplication::parse(body.as_bytes()).unwrap()
    };
    let mut queue = DeliveryQueue::new(100, 7);
    let applications = vec![registration(application(2, ""))];
    let drained = Drained { applications, ..Drained::default() };
    queue.enqueue(BTreeMap::from([(Environment::new("dev"), drained)]), now);
    let mut restored = EnvironmentQueue::default();
    restored.applications.add(registration(application(1, r#","strategies":["x"]"#)));
    queue.restore(Environment::new("dev"), restored, now);
    let body: Value = serde_json::from_slice(&queue.next_batch(now).unwrap().body).unwrap();
    let [application] = &body["applications"].as_array().unwrap()[..] else { panic!("{body}") };
    assert_eq!((&application["interval"], &application["strategies"][0]), (&2.into(), &"x".into()));
}

#[test]
fn rejected_instance_with_unknown_strategies_is_retried_with_an_empty_list() {
    let now = Instant::now();
    let body = br#"{"appName":"a","started":"2026-01-02T03:04:05Z","interval":1}"#;
    let applications = vec![registration(ClientApplication::parse(body).unwrap())];
    let drained = Drained { applications, ..Drained::default() };
    let mut queue = DeliveryQueue::new(100, 7);
    queue.enqueue(BTreeMap::from([(Environment::new("dev"), drained)]), now);
    let strategies = |batch: &OutgoingBatch| {
        let body: Value = serde_json::from_slice(&batch.body).unwrap();
        body["applications"][0].get("strategies").cloned()
    };
    let batch = queue.next_batch(now).unwrap();
    assert_eq!(strategies(&batch), None);
    queue.record_outcome(batch.id, SendOutcome::Rejected, now, 0.5);
    let batch = queue.next_batch(now).unwrap();
    assert_eq!(strategies(&batch), Some(Value::Array(Vec::new())));
    queue.record_outcome(batch.id, SendOutcome::Rejected, now, 0.5);
    assert!(queue.is_empty());
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
        let mut queue = DeliveryQueue::new(10, 7);
        let now = Instant::now();
        for record in records {
            for (environment, restored) in
                spool::decode(record.as_bytes(), &uncharged()).unwrap().queues
            {
                queue.restore(environment, restored, now);
            }
        }
        let mut values = Vec::new();
        while let Some(batch) = queue.next_batch(now) {
            let body: Value = serde_json::from_slice(&batch.body).unwrap();
            values.push(body["impactMetrics"][0]["samples"].clone());
            queue.record_outcome(batch.id, SendOutcome::Sent, now, 0.5);
        }
        let labels = serde_json::json!({ "origin": "edge" });
        let [Value::Array(samples)] = &values[..] else { panic!("{values:?}") };
        let [sample] = &samples[..] else { panic!("{samples:?}") };
        assert_eq!(sample["labels"], labels);
        sample["value"].as_f64().unwrap()
    };
    let at = |time: &str| format!(r#","times":["2026-01-02T03:04:{time}Z"]"#);
    // An instance's own record is restored before those of ended instances.
    assert!((sent(&[stored("2.0", "", ""), stored("1.0", "", "")]) - 2.0).abs() < 0.1);
    let (early, late) = (stored("1.0", &at("05"), ""), stored("2.0", &at("06"), ""));
    assert!((sent(&[late.clone(), early.clone()]) - 2.0).abs() < 0.1);
    assert!((sent(&[early, late]) - 2.0).abs() < 0.1);
    // A gauge in the batch in flight is older than the rest of its record.
    let both = stored("2.0", &at("06"), piece);
    assert!((sent(std::slice::from_ref(&both)) - 2.0).abs() < 0.1);
    assert!((sent(&[stored("3.0", &at("07"), ""), both]) - 3.0).abs() < 0.1);
}

/// Two gauges with this value, one of them large because of its labels.
fn gauges(value: u32, at: i64) -> BTreeMap<Environment, Drained> {
    let at = Some(jiff::Timestamp::from_second(at).unwrap());
    let mut drained = Drained::default();
    let labels: serde_json::Map<_, _> =
        (0..12).map(|n| (format!("l{n:0>200}"), "x".repeat(200).into())).collect();
    for (name, labels) in [("large", labels), ("small", serde_json::Map::new())] {
        let samples = serde_json::json!([{ "value": value, "labels": labels }]);
        let metric = serde_json::json!({ "name": name, "help": "h", "type": "gauge",
                                         "samples": samples });
        let metric = ImpactMetric::from_value(metric).unwrap();
        let uncharged = |_| Some(Reservation::default());
        assert_eq!(drained.impact.record(&"a".into(), metric, [at], uncharged), 0);
    }
    BTreeMap::from([(Environment::new("dev"), drained)])
}

/// Sends all pending usage; returns the values of the gauges by name.
fn flush_gauges(queue: &mut DeliveryQueue, mut now: Instant) -> Vec<(String, f64)> {
    let mut values = Vec::new();
    while !queue.is_empty() {
        now = queue.next_retry_at().unwrap_or(now);
        let Some(batch) = queue.next_batch(now) else { continue };
        let body: Value = serde_json::from_slice(&batch.body).unwrap();
        for metric in body["impactMetrics"].as_array().unwrap() {
            let value = metric["samples"][0]["value"].as_f64().unwrap();
            values.push((metric["name"].as_str().unwrap().to_owned(), value));
        }
        queue.record_outcome(batch.id, SendOutcome::Sent, now, 0.5);
    }
    values
}

/// A queue after the large gauge with the value 1 was rejected alone.
fn rejected_gauges(now: Instant) -> (DeliveryQueue, Instant) {
    let (mut queue, mut now) = (DeliveryQueue::new(10, 7), now);
    queue.enqueue(gauges(1, 5), now);
    // Both in one body, then the large one.
    for _ in 0..2 {
        now = queue.next_retry_at().unwrap_or(now);
        let batch = queue.next_batch(now).unwrap();
        queue.record_outcome(batch.id, SendOutcome::TooLarge, now, 0.5);
    }
    (queue, now)
}

#[test]
fn deferred_gauge_is_sent_unless_a_newer_one_exists() {
    let sent = |values: &[(&str, f64)]| -> Vec<_> {
        values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    };
    let (mut queue, now) = rejected_gauges(Instant::now());
    assert_eq!(flush_gauges(&mut queue, now), sent(&[("small", 1.0), ("large", 1.0)]));

    // Also if the clock was set back meanwhile.
    for at in [6, 4] {
        let (mut queue, now) = rejected_gauges(Instant::now());
        queue.enqueue(gauges(2, at), now);
        let values = flush_gauges(&mut queue, now);
        let newer = sent(&[("small", 1.0), ("large", 2.0), ("small", 2.0)]);
        assert_eq!(values, newer, "{at}");
    }

    // Its time is stored with it.
    let (mut rejected, now) = rejected_gauges(Instant::now());
    let mut older = DeliveryQueue::new(10, 7);
    older.enqueue(gauges(2, 4), now);
    let mut queue = DeliveryQueue::new(10, 7);
    for record in [&mut rejected, &mut older] {
        let record = spool::encode(&record.copy_for_store()).unwrap();
        for (environment, restored) in spool::decode(&record, &uncharged()).unwrap().queues {
            queue.restore(environment, restored, now);
        }
    }
    let newest = sent(&[("large", 1.0), ("small", 1.0)]);
    assert_eq!(flush_gauges(&mut queue, now), newest);
}

#[test]
fn excess_counters_are_merged_by_application_and_then_by_hour() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(10, 7);
    let of_hour = |hour| (0..8).map(move |app| (key(hour, &app.to_string(), "f"), 1));
    queue.enqueue(drained("dev", of_hour(1).chain(of_hour(2))), now);
    // The eight counters of the first hour are merged, those of the second are not yet.
    assert_eq!((queue.counter_weight(), queue.totals().dropped), (9, 0));
    queue.enqueue(drained("dev", (3..20).map(|hour| (key(hour, "a", "f"), 1))), now);
    assert_eq!((queue.counter_weight(), queue.totals().dropped), (10, 0));
    let batch = queue.next_batch(now).unwrap();
    let rows = metrics(&batch.body);
    // The first ten hours are merged, with all of their counts.
    assert_eq!((rows.len(), rows[0].stats.yes, yes(&batch.body)), (10, 8 + 8 + 8, 16 + 17));
}

#[test]
fn growing_environment_does_not_merge_applications_of_another() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(100, 7);
    let of_apps = |apps: u8| (0..apps).map(|app| (key(1, &app.to_string(), "f"), 1));
    queue.enqueue(drained("small", of_apps(20)), now);
    let flood = (0..200).map(|nth| (key(2, &nth.to_string(), &nth.to_string()), 1));
    queue.enqueue(drained("large", flood.chain([(key(1, "a", "0"), 1)])), now);
    let weight = |queue: &DeliveryQueue, environment: &str| {
        queue.queues[&Environment::new(environment)].counters.weight()
    };
    assert_eq!((weight(&queue, "small"), weight(&queue, "large")), (20, 200));
    // It is merged as soon as it is the one that exceeds its fair share.
    queue.enqueue(drained("small", of_apps(200)), now);
    assert_eq!(weight(&queue, "small"), 1);
    assert_eq!(queue.totals().dropped, 0);
}

#[test]
fn flags_of_one_hour_are_never_merged() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(10, 7);
    let flags = |hour| (0..50).map(move |flag| (key(hour, "a", &flag.to_string()), 1));
    queue.enqueue(drained("dev", flags(1)), now);
    queue.enqueue(drained("dev", flags(2)), now);
    assert_eq!((queue.counter_weight(), queue.totals().dropped), (50, 0));
    assert_eq!(yes(&queue.next_batch(now).unwrap().body), 100);
}

#[test]
fn flood_of_distinct_hours_stays_within_the_limit_and_loses_no_count() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(10_000, 7);
    let of_hour = |hour: i64| {
        let time = jiff::Timestamp::from_second(3600 * hour).unwrap();
        (CounterKey { hour: Hour::of(time), app: "a".into(), flag: "f".into() }, 1)
    };
    for report in 0..6 {
        let hours = 8000 * report..8000 * (report + 1);
        queue.enqueue(drained("dev", hours.map(of_hour)), now);
        assert!(queue.counter_weight() <= 10_000);
    }
    assert_eq!((queue.counter_weight(), queue.totals().dropped), (10_000, 0));
    let mut arrived = 0;
    while let Some(batch) = queue.next_batch(now) {
        arrived += yes(&batch.body);
        queue.record_outcome(batch.id, SendOutcome::Sent, now, 0.5);
    }
    assert_eq!(arrived, 48_000);
}

#[test]
fn revision_changes_only_with_pending_usage_and_is_constant_when_empty() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(100, 7);
    let empty = queue.revision();
    let mut revisions = vec![empty];
    let mut changed = |queue: &DeliveryQueue| {
        let is_new = !revisions.contains(&queue.revision());
        revisions.push(queue.revision());
        is_new
    };
    queue.enqueue(drained("dev", [(key(1, "a", "f"), 2), (key(1, "a", "g"), 2)]), now);
    assert!(changed(&queue));
    queue.enqueue(BTreeMap::new(), now);
    assert!(!changed(&queue));
    let batch = queue.next_batch(now).unwrap();
    assert!(changed(&queue));
    queue.record_outcome(batch.id, SendOutcome::Retry(None), now, 0.5);
    let later = queue.next_retry_at().unwrap();
    let batch = queue.next_batch(later).unwrap();
    assert!(!changed(&queue));
    queue.record_outcome(batch.id, SendOutcome::TooLarge, later, 0.5);
    assert!(changed(&queue));
    let later = queue.next_retry_at().unwrap();
    while let Some(batch) = queue.next_batch(later) {
        queue.record_outcome(batch.id, SendOutcome::Sent, later, 0.5);
    }
    assert_eq!(queue.revision(), empty);
}

#[test]
fn discard_drops_and_counts_everything() {
    let now = Instant::now();
    let mut queue = DeliveryQueue::new(100, 7);
    queue.enqueue(drained("dev", [(key(1, "a", "f"), 2)]), now);
    queue.discard_all();
    assert!(queue.is_empty());
    assert_eq!(queue.totals(), &DeliveryTotals { sent: 0, dropped: 2 });
}

fn outcome() -> impl Strategy<Value = SendOutcome> {
    prop_oneof![
        4 => Just(SendOutcome::Sent),
        1 => Just(SendOutcome::TooLarge),
        1 => Just(SendOutcome::Unauthorized),
        1 => Just(SendOutcome::Retry(None)),
        1 => Just(SendOutcome::Retry(Some(Duration::from_secs(7)))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_count_arrives_once_despite_any_failures(
        reports in prop::collection::vec(
            (0..3_u8, 0..4_u8, "[a-c]{1,40}", "[a-z]{1,200}", 1..1000_u64), 1..150),
        outcomes in prop::collection::vec(outcome(), 0..40),
    ) {
        let mut now = Instant::now();
        let mut queue = DeliveryQueue::new(1000, 7);
        let mut outcomes = outcomes.into_iter();
        let mut expected = BTreeMap::new();
        let mut arrived = BTreeMap::new();
        let mut step = |queue: &mut DeliveryQueue, now: Instant| {
            let Some(batch) = queue.next_batch(now) else { return false };
            assert!(batch.body.len() <= MAX_BODY_BYTES);
            let rows = metrics(&batch.body);
            let outcome = outcomes.next().unwrap_or(SendOutcome::Sent);
            if outcome == SendOutcome::Sent {
                for row in rows {
                    *arrived.entry((row.environment, row.app_name, row.feature_name))
                        .or_insert(0) += row.stats.yes;
                }
            }
            queue.record_outcome(batch.id, outcome, now, 0.3);
            true
        };
        for (environment, hour, app, flag, count) in reports {
            let environment = environment.to_string();
            queue.enqueue(drained(&environment, [(key(hour, &app, &flag), count)]), now);
            *expected.entry((environment.into(), app.into(), flag.into())).or_insert(0) += count;
            step(&mut queue, now);
        }
        while !queue.is_empty() {
            if !step(&mut queue, now) {
                now = queue.next_retry_at().unwrap();
            }
        }
        prop_assert_eq!(arrived, expected);
        prop_assert_eq!(queue.totals().dropped, 0);
    }
}

#[test]
fn fair_share_meets_small_demands_in_full() {
    let check = |total: usize, demands: &[usize], share: usize| {
        assert_eq!(fair_share(total, demands.iter().copied()), share, "{demands:?}");
    };
    check(100, &[], 100);
    check(100, &[30, 70], 100);
    check(100, &[101], 100);
    check(100, &[200, 10], 90);
    check(100, &[50, 20, 60], 40);
    check(100, &[100, 100, 100], 33);
}
