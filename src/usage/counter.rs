//! One counter: how often a flag was used in one UTC hour, within what upstream can store.
//!
//! The limits are those of Unleash 7.5.1 and 8.2.0. Its columns for names are `varchar(255)`, and
//! it inserts many rows at once, so that one name too long or with a NUL loses everybody's.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Range,
    sync::Arc,
};

use jiff::Timestamp;

use super::pool::{Account, Charge};
use crate::wire::usage::{BulkMetric, MAX_INTEGER, Metadata, ToggleStats};

/// The longest name that is kept, in bytes; upstream's limit is as many characters, but its index
/// over four of them allows 2704 bytes altogether.
pub(super) const MAX_NAME: usize = 255;
/// How many variants of a flag are told apart; more where its configuration has more, and one besides
/// for all others.
pub(super) const MAX_VARIANTS: usize = 256;
/// The application, flag or variant under which those are counted together that have no room apart.
pub(super) const MERGED: &str = "parapet-merged";
/// How many bytes of names and metadata make a counter count twice.
const WEIGHT_BYTES: usize = 256;
/// The largest `yes` or `no`: upstream's JSON reader takes no integer above.
const MAX_COUNT: u64 = MAX_INTEGER;
/// The largest count of a variant, upstream's column being a 32-bit integer.
const MAX_VARIANT_COUNT: u64 = (1 << 31) - 1;

/// How many hours before the present one something may be counted: as long as an edge behind this
/// one may have been cut off.
const OLDEST: i64 = 7 * 24;
/// How many hours after it: clocks differ.
const NEWEST: i64 = 1;

/// An hour of UTC, counted from the epoch.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct Hour(i64);

impl Hour {
    pub(super) fn of(time: Timestamp) -> Self {
        Self(time.as_second().div_euclid(3600))
    }

    /// The hour in which something is counted that was reported `now`, for the time that the client
    /// tells.
    ///
    /// Seven days ago is the oldest and the next hour the newest; what is told to be beyond is
    /// counted under the nearest of these. A client can so neither lose counts by a wrong clock nor
    /// make more than 170 counters of one.
    pub(super) fn reported(told: Timestamp, now: Timestamp) -> Self {
        let now = Self::of(now).0;
        Self(Self::of(told).0.clamp(now - OLDEST, now + NEWEST))
    }

    pub(super) fn start(self) -> Timestamp {
        Timestamp::from_second(self.0 * 3600).expect("an hour near a timestamp is in range")
    }
}

/// What is counted apart within an environment, the oldest first.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct CounterKey {
    pub(super) hour: Hour,
    pub(super) app: Arc<str>,
    pub(super) flag: Arc<str>,
}

impl CounterKey {
    /// All keys of an hour.
    pub(super) fn range(hour: Hour) -> Range<Self> {
        let first = |hour| Self { hour, app: "".into(), flag: "".into() };
        first(hour)..first(Hour(hour.0 + 1))
    }
}

/// Whether a flag or variant is in the snapshot of whoever reports it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Name {
    Known,
    /// Made up, deleted, or newer than the snapshot.
    Unknown,
}

impl Name {
    pub(super) fn of(is_known: bool) -> Self {
        if is_known { Self::Known } else { Self::Unknown }
    }
}

/// The counts of one key, and the memory that they take.
#[derive(Clone, Debug, Default)]
pub(super) struct Counter {
    yes: u64,
    no: u64,
    variants: BTreeMap<Arc<str>, Variant>,
    metadata: Arc<Metadata>,
    /// For the counter without its variants.
    charge: Charge,
}

#[derive(Clone, Debug)]
struct Variant {
    count: u64,
    name: Name,
    charge: Charge,
}

/// How many evaluations found no room.
#[must_use]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Lost(pub(super) u64);

impl Counter {
    /// The counter of one report, and what of it exceeds the limits. `name` tells which variants are
    /// known.
    pub(super) fn of(
        stats: ToggleStats,
        metadata: &Arc<Metadata>,
        name: impl Fn(&str) -> Name,
    ) -> (Self, Lost) {
        let mut counter = Self { metadata: Arc::clone(metadata), ..Self::default() };
        let lost = counter.add_counts(stats.yes, stats.no);
        for (variant, count) in stats.variants {
            if let Some(variant) = storable(variant) {
                let name = name(&variant);
                counter.add_variant(variant, Variant { count, name, charge: Charge::default() });
            }
        }
        (counter, lost)
    }

    /// Adds another counter of the same key. What the first told of the SDK stays.
    pub(super) fn add(&mut self, other: Self) -> Lost {
        let lost = self.add_counts(other.yes, other.no);
        for (name, variant) in other.variants {
            self.add_variant(name, variant);
        }
        lost
    }

    /// How much it counts towards the number of counters held: its variants take memory too.
    pub(super) fn weight(&self, key: &CounterKey) -> usize {
        self.own_weight(key) + self.variants.len()
    }

    /// The same without its variants; long texts count again and again.
    pub(super) fn own_weight(&self, key: &CounterKey) -> usize {
        let metadata = self.metadata.texts().map(|text| text.len()).sum::<usize>();
        1 + (key.app.len() + key.flag.len() + metadata) / WEIGHT_BYTES
    }

    /// How many variants it tells apart.
    pub(super) fn variants(&self) -> usize {
        self.variants.len()
    }

    /// Charges it without its variants.
    pub(super) fn set_charge(&mut self, charge: Charge) {
        self.charge = charge;
    }

    pub(super) fn is_charged(&self) -> bool {
        !self.charge.is_none()
    }

    /// Charges those of its variants that are not charged yet, whether there is room or not.
    pub(super) fn charge_variants(&mut self, known: &Account, unknown: &Account) {
        for variant in self.variants.values_mut().filter(|it| it.charge.is_none()) {
            let account = match variant.name {
                Name::Known => known,
                Name::Unknown => unknown,
            };
            variant.charge = account.charge(1);
        }
    }

    /// Charges its unknown variants, except those that `present` has; those without room are counted
    /// together.
    pub(super) fn charge_unknown_variants(&mut self, present: Option<&Self>, account: &Account) {
        let is_present = |name: &Arc<str>| present.is_some_and(|it| it.variants.contains_key(name));
        let has_no_room = |name: &Arc<str>, variant: &mut Variant| {
            if variant.name == Name::Known || is_present(name) {
                return false;
            }
            let Some(charge) = account.try_charge(1) else { return true };
            variant.charge = charge;
            false
        };
        let apart: Vec<_> = self.variants.extract_if(.., has_no_room).collect();
        for (_, variant) in apart {
            self.add_variant(MERGED.into(), variant);
        }
    }

    /// What it counts, without the variants and the SDK, which mean nothing beside other flags' counts.
    pub(super) fn anonymous(self) -> Self {
        Self { yes: self.yes, no: self.no, ..Self::default() }
    }

    pub(super) fn has_unknown_variants(&self) -> bool {
        self.variants.values().any(|variant| variant.name == Name::Unknown)
    }

    /// How many evaluations it counts.
    pub(super) fn total(&self) -> u64 {
        self.yes + self.no
    }

    /// Whether upstream would take nothing from it.
    pub(super) fn is_zero(&self) -> bool {
        self.total() == 0 && self.variants.values().all(|variant| variant.count == 0)
    }

    /// The counter as upstream takes it.
    pub(super) fn to_wire(&self, environment: &str, key: &CounterKey) -> BulkMetric {
        let count = |(name, variant): (&Arc<str>, &Variant)| (Arc::clone(name), variant.count);
        let variants = self.variants.iter().map(count).collect();
        BulkMetric {
            feature_name: Arc::clone(&key.flag),
            app_name: Arc::clone(&key.app),
            environment: environment.into(),
            timestamp: key.hour.start(),
            stats: ToggleStats { yes: self.yes, no: self.no, variants },
            metadata: Metadata::clone(&self.metadata),
        }
    }

    fn add_counts(&mut self, yes: u64, no: u64) -> Lost {
        let lost = saturate(&mut self.yes, yes, MAX_COUNT);
        Lost(lost.saturating_add(saturate(&mut self.no, no, MAX_COUNT)))
    }

    /// Adds to a variant. Beyond the limit unknown ones are counted together.
    fn add_variant(&mut self, name: Arc<str>, variant: Variant) {
        let is_full = self.variants.len() >= MAX_VARIANTS && variant.name == Name::Unknown;
        let is_apart = !is_full || self.variants.contains_key(&name);
        match self.variants.entry(if is_apart { name } else { MERGED.into() }) {
            Entry::Occupied(present) => {
                saturate(&mut present.into_mut().count, variant.count, MAX_VARIANT_COUNT);
            }
            Entry::Vacant(place) => {
                let count = variant.count.min(MAX_VARIANT_COUNT);
                place.insert(Variant { count, ..variant });
            }
        }
    }
}

/// Adds `count` up to `max` and returns what did not fit.
fn saturate(sum: &mut u64, count: u64, max: u64) -> u64 {
    let added = count.min(max - *sum);
    *sum += added;
    count - added
}

/// The name of a flag or variant, if upstream can store it.
pub(super) fn storable(name: Arc<str>) -> Option<Arc<str>> {
    let fits = !name.is_empty() && name.len() <= MAX_NAME && !name.contains('\0');
    fits.then_some(name)
}

/// The name of an application, cut to what upstream can store: its counts belong to flags too.
pub(super) fn shortened(name: &Arc<str>) -> Arc<str> {
    if name.len() <= MAX_NAME && !name.contains('\0') {
        return Arc::clone(name);
    }
    name[..name.floor_char_boundary(MAX_NAME)].replace('\0', " ").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The configuration has the variants whose names begin with `known`.
    fn name(variant: &str) -> Name {
        if variant.starts_with("known") { Name::Known } else { Name::Unknown }
    }

    fn key(app: &str, flag: &str) -> CounterKey {
        CounterKey { hour: Hour::of(Timestamp::UNIX_EPOCH), app: app.into(), flag: flag.into() }
    }

    fn counter(yes: u64, no: u64, variants: &[(&str, u64)]) -> (Counter, Lost) {
        let variants = variants.iter().map(|(name, count)| (Arc::from(*name), *count)).collect();
        Counter::of(ToggleStats { yes, no, variants }, &Arc::default(), name)
    }

    #[test]
    fn counters_saturate_at_what_upstream_can_store_and_tell_what_was_lost() {
        let (mut sum, lost) = counter(u64::MAX, 1, &[("v", u64::MAX)]);
        assert_eq!((sum.yes, lost), (MAX_COUNT, Lost(u64::MAX - MAX_COUNT)));
        assert_eq!(sum.add(counter(2, 3, &[("v", 1)]).0), Lost(2));
        assert_eq!((sum.yes, sum.no, sum.variants["v"].count), (MAX_COUNT, 4, MAX_VARIANT_COUNT));
    }

    #[test]
    fn variants_are_bounded_and_the_flags_count_stays_exact() {
        let (mut sum, _) = counter(0, 0, &[]);
        for name in 0..MAX_VARIANTS + 10 {
            let more = counter(1, 0, &[(&name.to_string(), 1), ("\0", 1)]).0;
            assert_eq!(sum.add(more), Lost(0));
        }
        assert_eq!(sum.weight(&key("a", "f")), 1 + MAX_VARIANTS + 1);
        assert_eq!(sum.add(counter(1, 0, &[("known", 1), ("unknown", 1)]).0), Lost(0));
        assert_eq!(sum.variants.len(), MAX_VARIANTS + 2);
        assert_eq!((sum.variants["known"].count, sum.variants[MERGED].count), (1, 10 + 1));
        assert_eq!(sum.total(), u64::try_from(MAX_VARIANTS).unwrap() + 11);
    }

    #[test]
    fn long_texts_make_a_counter_heavier() {
        let check = |app: usize, flag: usize, sdk: usize, weight: usize| {
            let metadata =
                Metadata { sdk_version: Some("s".repeat(sdk).into()), ..Metadata::default() };
            let counter = Counter::of(ToggleStats::default(), &Arc::new(metadata), name).0;
            assert_eq!(counter.weight(&key(&"a".repeat(app), &"f".repeat(flag))), weight);
        };
        check(10, 30, 20, 1);
        check(255, 255, 1, 2);
        check(255, 255, 255, 3);
    }

    #[test]
    fn a_new_counter_has_no_more_variants_than_are_told_apart() {
        let names: Vec<_> = (0..MAX_VARIANTS + 10).map(|name| name.to_string()).collect();
        let variants: Vec<_> = names.iter().map(|name| (name.as_str(), 1)).collect();
        let (counter, _) = counter(1, 0, &variants);
        assert_eq!(counter.variants.len(), MAX_VARIANTS + 1);
        assert_eq!(counter.variants[MERGED].count, 10);
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
    fn what_is_told_to_be_long_ago_or_to_come_is_counted_at_the_edge_of_a_week() {
        let check = |told: &str, hour: &str| {
            let now = "2026-01-08T12:34:56Z".parse().unwrap();
            let counted = Hour::reported(told.parse().unwrap(), now);
            assert_eq!(counted.start().to_string(), hour, "{told}");
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
    fn names_that_upstream_cannot_store_are_refused_or_cut() {
        assert_eq!(storable("flag".into()).as_deref(), Some("flag"));
        for name in ["", "a\0b", &"x".repeat(256)] {
            assert_eq!(storable(name.into()), None);
        }
        assert_eq!(&*shortened(&"a\0b".into()), "a b");
        assert_eq!(shortened(&"é".repeat(200).into()).len(), 254);
    }
}
