//! Tests of the limits of a counter, and of merging counters.

use jiff::Timestamp;
use proptest::prelude::*;

use super::*;

/// The configuration contains the variants whose names begin with `known`.
fn name_status(variant: &str) -> NameStatus {
    if variant.starts_with("known") { NameStatus::Known } else { NameStatus::Unknown }
}

fn key(app: &str, flag: &str) -> CounterKey {
    CounterKey { hour: Hour::of(Timestamp::UNIX_EPOCH), app: app.into(), flag: flag.into() }
}

fn counter(yes: u64, no: u64, variants: &[(&str, u64)]) -> (Counter, u64) {
    let variants = variants.iter().map(|(name, count)| (Arc::from(*name), *count)).collect();
    Counter::from_stats(ToggleStats { yes, no, variants }, &Arc::default(), name_status)
}

#[test]
fn counters_saturate_at_upstream_limits_and_return_the_overflow() {
    let (mut sum, lost) = counter(u64::MAX, 1, &[("v", u64::MAX)]);
    assert_eq!((sum.yes, lost), (MAX_COUNT, u64::MAX - MAX_COUNT));
    assert_eq!(sum.add(counter(2, 3, &[("v", 1)]).0), 2);
    assert_eq!((sum.yes, sum.no, sum.variants["v"].count), (MAX_COUNT, 4, MAX_VARIANT_COUNT));
}

#[test]
fn variants_are_bounded_while_the_flag_count_stays_exact() {
    let (mut sum, _) = counter(0, 0, &[]);
    for name in 0..MAX_VARIANTS + 10 {
        let more = counter(1, 0, &[(&name.to_string(), 1), ("\0", 1)]).0;
        assert_eq!(sum.add(more), 0);
    }
    assert_eq!(sum.weight(&key("a", "f")), 1 + MAX_VARIANTS + 1);
    assert_eq!(sum.add(counter(1, 0, &[("known", 1), ("unknown", 1)]).0), 0);
    assert_eq!(sum.variants.len(), MAX_VARIANTS + 2);
    assert_eq!((sum.variants["known"].count, sum.variants[MERGED_NAME].count), (1, 10 + 1));
    assert_eq!(sum.total(), u64::try_from(MAX_VARIANTS).unwrap() + 11);
}

#[test]
fn long_texts_increase_the_weight() {
    let check = |app: usize, flag: usize, sdk: usize, weight: usize| {
        let metadata =
            SdkMetadata { sdk_version: Some("s".repeat(sdk).into()), ..SdkMetadata::default() };
        let counter =
            Counter::from_stats(ToggleStats::default(), &Arc::new(metadata), name_status).0;
        assert_eq!(counter.weight(&key(&"a".repeat(app), &"f".repeat(flag))), weight);
    };
    check(10, 30, 20, 1);
    check(255, 255, 1, 2);
    check(255, 255, 255, 3);
}

#[test]
fn new_counter_merges_variants_beyond_the_limit() {
    let names: Vec<_> = (0..MAX_VARIANTS + 10).map(|name| name.to_string()).collect();
    let variants: Vec<_> = names.iter().map(|name| (name.as_str(), 1)).collect();
    let (counter, _) = counter(1, 0, &variants);
    assert_eq!(counter.variants.len(), MAX_VARIANTS + 1);
    assert_eq!(counter.variants[MERGED_NAME].count, 10);
}

#[test]
fn hours_begin_at_the_hour() {
    let check = |time: &str, start: &str| {
        assert_eq!(Hour::of(time.parse().unwrap()).start().to_string(), start);
    };
    check("2026-01-02T03:59:59.999Z", "2026-01-02T03:00:00Z");
    check("2026-01-02T03:00:00Z", "2026-01-02T03:00:00Z");
    check("1970-01-01T00:00:01Z", "1970-01-01T00:00:00Z");
}

#[test]
fn reported_hour_is_clamped_to_a_week() {
    let check = |reported: &str, hour: &str| {
        let now = "2026-01-08T12:34:56Z".parse().unwrap();
        let counted = Hour::clamped(reported.parse().unwrap(), now);
        assert_eq!(counted.start().to_string(), hour, "{reported}");
    };
    check("2026-01-08T12:00:01Z", "2026-01-08T12:00:00Z");
    check("2026-01-08T13:59:59Z", "2026-01-08T13:00:00Z");
    check("2026-01-08T14:00:00Z", "2026-01-08T13:00:00Z");
    check("9999-12-30T00:00:00Z", "2026-01-08T13:00:00Z");
    check("2026-01-01T12:00:00Z", "2026-01-01T12:00:00Z");
    check("2026-01-01T11:59:59Z", "2026-01-01T12:00:00Z");
    check("1970-01-01T00:00:00Z", "2026-01-01T12:00:00Z");
}

#[test]
fn names_that_upstream_cannot_store_are_rejected_or_truncated() {
    assert_eq!(storable_name("flag".into()).as_deref(), Some("flag"));
    for name in ["", "a\0b", &"x".repeat(256)] {
        assert_eq!(storable_name(name.into()), None);
    }
    assert_eq!(&*truncate_app_name(&"a\0b".into()), "a b");
    assert_eq!(truncate_app_name(&"é".repeat(200).into()).len(), 254);
}

fn hour(nth: u8) -> Hour {
    Hour::of(Timestamp::from_second(3600 * i64::from(nth)).unwrap())
}

proptest! {
    #[test]
    fn weight_matches_counters_and_no_count_is_lost_after_any_operations(
        steps in prop::collection::vec((0..8_u8, 0..6_u8, "[a-c]", "[ab]", "[v-z]", 1..9_u64), 0..200),
    ) {
        let mut counters = Counters::default();
        let mut expected = 0;
        for (step, nth, app, flag, variant, yes) in steps {
            match step {
                0 => expected -= counters.pop_oldest().map_or(0, |(_, counter)| counter.total()),
                1 => prop_assert_eq!(counters.merge_hour(hour(nth), hour(nth + 1)), 0),
                2 => {
                    prop_assert_eq!(counters.merge_applications(hour(nth)), 0);
                    let mut of_hour = counters.iter().filter(|(key, _)| key.hour == hour(nth));
                    prop_assert!(of_hour.all(|(key, _)| &*key.app == MERGED_NAME));
                }
                _ => {
                    let variants = [(variant.into(), yes)].into();
                    let stats = ToggleStats { yes, no: 0, variants };
                    let counter = Counter::from_stats(stats, &Arc::default(), |_| NameStatus::Known).0;
                    let key = CounterKey { hour: hour(nth), app: app.into(), flag: flag.into() };
                    prop_assert_eq!(counters.add(key, counter), 0);
                    expected += yes;
                }
            }
            let weight: usize = counters.iter().map(|(key, counter)| counter.weight(key)).sum();
            prop_assert_eq!((counters.weight(), counters.total()), (weight, expected));
        }
    }
}
