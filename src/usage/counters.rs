//! Counters of evaluations by hour of UTC, application and flag, within the limits of upstream's
//! storage.
//!
//! A [`Counter`] has the counts of one [`CounterKey`]; [`Counters`] are the pending ones of an
//! environment. Clients decide how many there are, so operations touch only the counters that they
//! change, except for [`Counters::shrink_to`] and [`Counters::total`]. The limit is set elsewhere.
//!
//! The limits are those of Unleash 7.5.1 and 8.2.0. Its name columns are `varchar(255)`, and it inserts
//! many rows at once, so that one name that is too long or contains a NUL would lose the whole batch.

use std::{
    collections::{
        BTreeMap, BTreeSet,
        btree_map::{self, Entry},
    },
    ops::Range,
    sync::Arc,
};

use jiff::Timestamp;

use super::quota_pool::{Quota, Reservation};
use crate::protocol::usage::{BulkMetric, MAX_INTEGER, SdkMetadata, ToggleStats};

/// The longest accepted name, in bytes. Upstream's limit is 255 characters, but its index over four
/// names allows 2704 bytes in total.
pub(super) const MAX_NAME_BYTES: usize = 255;
/// Number of variants of a flag that are counted separately. Further variants in its configuration are
/// too, and further unknown ones are counted together.
pub(super) const MAX_VARIANTS: usize = 256;
/// The application, flag or variant name under which counters without room of their own are merged.
pub(super) const MERGED_NAME: &str = "parapet-merged";
/// Bytes of names and metadata that add 1 to a counter's weight.
const BYTES_PER_WEIGHT: usize = 256;
/// The largest `yes` or `no`, which is the largest integer that upstream's JSON parser accepts.
pub(super) const MAX_COUNT: u64 = MAX_INTEGER;
/// The largest count of a variant: upstream's column is a 32-bit integer.
pub(super) const MAX_VARIANT_COUNT: u64 = (1 << 31) - 1;

/// The oldest accepted hour, relative to the present one. A downstream edge may have been disconnected
/// this long.
const MAX_HOURS_PAST: i64 = 7 * 24;
/// The newest accepted hour, relative to the present one, to allow for clock differences.
const MAX_HOURS_AHEAD: i64 = 1;

/// An hour of UTC, counted from the epoch.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct Hour(i64);

impl Hour {
    pub(super) fn of(time: Timestamp) -> Self {
        Self(time.as_second().div_euclid(3600))
    }

    /// The hour in which to count evaluations that a client dates `reported`.
    ///
    /// Times more than seven days ago or later than the next hour are moved to the nearest hour in that
    /// range. A client with a wrong clock therefore loses no counts, and cannot create more than 170
    /// counters for one flag.
    pub(super) fn clamped(reported: Timestamp, now: Timestamp) -> Self {
        let now = Self::of(now).0;
        Self(Self::of(reported).0.clamp(now - MAX_HOURS_PAST, now + MAX_HOURS_AHEAD))
    }

    pub(super) fn start(self) -> Timestamp {
        Timestamp::from_second(self.0 * 3600).expect("an hour near a timestamp is in range")
    }
}

/// The dimensions that are counted separately within an environment. Sorts by hour, oldest first.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct CounterKey {
    pub(super) hour: Hour,
    pub(super) app: Arc<str>,
    pub(super) flag: Arc<str>,
}

impl CounterKey {
    /// The range of all keys of an hour.
    pub(super) fn hour_range(hour: Hour) -> Range<Self> {
        let first = |hour| Self { hour, app: "".into(), flag: "".into() };
        first(hour)..first(Hour(hour.0 + 1))
    }
}

/// Whether a flag or variant is in the reporter's snapshot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum NameStatus {
    Known,
    /// Invented, deleted, or newer than the snapshot.
    Unknown,
}

impl NameStatus {
    pub(super) fn from_known(is_known: bool) -> Self {
        if is_known { Self::Known } else { Self::Unknown }
    }
}

/// The counts of one key, with their memory reservations.
#[derive(Clone, Debug, Default)]
pub(super) struct Counter {
    yes: u64,
    no: u64,
    variants: BTreeMap<Arc<str>, Variant>,
    metadata: Arc<SdkMetadata>,
    /// Reservation for the counter without its variants.
    reservation: Reservation,
}

#[derive(Clone, Debug)]
struct Variant {
    count: u64,
    name_status: NameStatus,
    reservation: Reservation,
}

impl Counter {
    /// The counter for one report, and the evaluations that exceed the limits. `name` returns whether a
    /// variant is known.
    pub(super) fn from_stats(
        stats: ToggleStats,
        metadata: &Arc<SdkMetadata>,
        name: impl Fn(&str) -> NameStatus,
    ) -> (Self, u64) {
        let mut counter = Self { metadata: Arc::clone(metadata), ..Self::default() };
        let lost = counter.add_counts(stats.yes, stats.no);
        for (variant, count) in stats.variants {
            if let Some(variant) = storable_name(variant) {
                let name_status = name(&variant);
                counter.add_variant(
                    variant,
                    Variant { count, name_status, reservation: Reservation::default() },
                );
            }
        }
        (counter, lost)
    }

    /// Adds another counter of the same key. SDK metadata of the first report is kept.
    #[must_use]
    pub(super) fn add(&mut self, other: Self) -> u64 {
        let lost = self.add_counts(other.yes, other.no);
        for (name, variant) in other.variants {
            self.add_variant(name, variant);
        }
        lost
    }

    /// Its share of the counter limit; variants count too.
    pub(super) fn weight(&self, key: &CounterKey) -> usize {
        self.base_weight(key) + self.variants.len()
    }

    /// Its weight without variants; long texts add to it.
    pub(super) fn base_weight(&self, key: &CounterKey) -> usize {
        let metadata = self.metadata.values().map(|text| text.len()).sum::<usize>();
        1 + (key.app.len() + key.flag.len() + metadata) / BYTES_PER_WEIGHT
    }

    /// Number of variants that are counted separately.
    pub(super) fn distinct_variant_count(&self) -> usize {
        self.variants.len()
    }

    /// Sets the reservation for the counter without its variants.
    pub(super) fn set_reservation(&mut self, reservation: Reservation) {
        self.reservation = reservation;
    }

    pub(super) fn has_reservation(&self) -> bool {
        !self.reservation.is_empty()
    }

    /// Reserves memory for variants without a reservation, even beyond the quota.
    pub(super) fn reserve_variants(&mut self, known: &Quota, unknown: &Quota) {
        for variant in self.variants.values_mut().filter(|it| it.reservation.is_empty()) {
            let quota = match variant.name_status {
                NameStatus::Known => known,
                NameStatus::Unknown => unknown,
            };
            variant.reservation = quota.reserve_unchecked(1);
        }
    }

    /// Reserves memory for unknown variants that `present` lacks. Variants that exceed the quota are
    /// merged.
    pub(super) fn reserve_unknown_variants(&mut self, present: Option<&Self>, quota: &Quota) {
        let is_present = |name: &Arc<str>| present.is_some_and(|it| it.variants.contains_key(name));
        let has_no_room = |name: &Arc<str>, variant: &mut Variant| {
            if variant.name_status == NameStatus::Known || is_present(name) {
                return false;
            }
            let Some(reservation) = quota.try_reserve(1) else { return true };
            variant.reservation = reservation;
            false
        };
        let merged: Vec<_> = self.variants.extract_if(.., has_no_room).collect();
        for (_, variant) in merged {
            self.add_variant(MERGED_NAME.into(), variant);
        }
    }

    /// Its counts without variants and SDK metadata, which are meaningless once flags are merged.
    pub(super) fn counts_only(self) -> Self {
        Self { yes: self.yes, no: self.no, ..Self::default() }
    }

    pub(super) fn has_unknown_variants(&self) -> bool {
        self.variants.values().any(|variant| variant.name_status == NameStatus::Unknown)
    }

    /// Number of evaluations.
    pub(super) fn total(&self) -> u64 {
        self.yes + self.no
    }

    /// Whether it has nothing to send.
    pub(super) fn is_zero(&self) -> bool {
        self.total() == 0 && self.variants.values().all(|variant| variant.count == 0)
    }

    /// The counter in upstream's format.
    pub(super) fn to_bulk_metric(&self, environment: &str, key: &CounterKey) -> BulkMetric {
        let count = |(name, variant): (&Arc<str>, &Variant)| (Arc::clone(name), variant.count);
        let variants = self.variants.iter().map(count).collect();
        BulkMetric {
            feature_name: Arc::clone(&key.flag),
            app_name: Arc::clone(&key.app),
            environment: environment.into(),
            timestamp: key.hour.start(),
            stats: ToggleStats { yes: self.yes, no: self.no, variants },
            metadata: SdkMetadata::clone(&self.metadata),
        }
    }

    #[must_use]
    fn add_counts(&mut self, yes: u64, no: u64) -> u64 {
        let lost = add_capped(&mut self.yes, yes, MAX_COUNT);
        lost.saturating_add(add_capped(&mut self.no, no, MAX_COUNT))
    }

    /// Adds to a variant. Unknown variants beyond the limit are merged.
    fn add_variant(&mut self, name: Arc<str>, variant: Variant) {
        let is_full =
            self.variants.len() >= MAX_VARIANTS && variant.name_status == NameStatus::Unknown;
        let is_separate = !is_full || self.variants.contains_key(&name);
        match self.variants.entry(if is_separate { name } else { MERGED_NAME.into() }) {
            Entry::Occupied(present) => {
                add_capped(&mut present.into_mut().count, variant.count, MAX_VARIANT_COUNT);
            }
            Entry::Vacant(place) => {
                let count = variant.count.min(MAX_VARIANT_COUNT);
                place.insert(Variant { count, ..variant });
            }
        }
    }
}

/// The pending counters of one environment, oldest hour first, with their total weight.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters {
    by_key: BTreeMap<CounterKey, Counter>,
    weight: usize,
}

impl Counters {
    /// Adds to the counter of a key; returns what exceeds the counter's limits.
    #[must_use]
    pub(super) fn add(&mut self, key: CounterKey, counter: Counter) -> u64 {
        match self.by_key.entry(key) {
            Entry::Vacant(place) => {
                self.weight += counter.weight(place.key());
                place.insert(counter);
                0
            }
            Entry::Occupied(mut present) => {
                let before = present.get().weight(present.key());
                let lost = present.get_mut().add(counter);
                self.weight += present.get().weight(present.key()) - before;
                lost
            }
        }
    }

    /// Adds counters; returns what exceeds the limits of each.
    #[must_use]
    pub(super) fn extend(
        &mut self,
        counters: impl IntoIterator<Item = (CounterKey, Counter)>,
    ) -> u64 {
        let lost = counters.into_iter().map(|(key, counter)| self.add(key, counter));
        lost.fold(0, u64::saturating_add)
    }

    /// Removes the oldest counter.
    pub(super) fn pop_oldest(&mut self) -> Option<(CounterKey, Counter)> {
        let (key, counter) = self.by_key.pop_first()?;
        self.weight -= counter.weight(&key);
        Some((key, counter))
    }

    /// Reduces the weight to a limit: first merges applications, starting with the oldest hour, then
    /// merges the oldest hour into the next one. The flags of a single hour cannot be merged and remain.
    /// Returns what exceeds the counters' limits.
    #[must_use]
    pub(super) fn shrink_to(&mut self, limit: usize) -> u64 {
        let mut lost = 0_u64;
        if self.weight <= limit {
            return lost;
        }
        let hours: BTreeSet<_> = self.by_key.keys().map(|key| key.hour).collect();
        for hour in &hours {
            lost = lost.saturating_add(self.merge_applications(*hour));
            if self.weight <= limit {
                return lost;
            }
        }
        for (hour, next) in hours.iter().zip(hours.iter().skip(1)) {
            lost = lost.saturating_add(self.merge_hour(*hour, *next));
            if self.weight <= limit {
                break;
            }
        }
        lost
    }

    /// Merges the applications of an hour into one; returns what exceeds the counters' limits.
    fn merge_applications(&mut self, hour: Hour) -> u64 {
        let named = |key: &CounterKey, _: &mut Counter| &*key.app != MERGED_NAME;
        let separate: Vec<_> =
            self.by_key.extract_if(CounterKey::hour_range(hour), named).collect();
        self.rekey(separate, |key| CounterKey { app: MERGED_NAME.into(), ..key })
    }

    /// Merges an hour into another one; returns what exceeds the counters' limits.
    fn merge_hour(&mut self, hour: Hour, into: Hour) -> u64 {
        let moved = self.by_key.extract_if(CounterKey::hour_range(hour), |_, _| true).collect();
        self.rekey(moved, |key| CounterKey { hour: into, ..key })
    }

    /// Adds counters under other keys after they were removed from the map without adjusting the weight.
    fn rekey(
        &mut self,
        removed: Vec<(CounterKey, Counter)>,
        to: impl Fn(CounterKey) -> CounterKey,
    ) -> u64 {
        self.weight -= removed.iter().map(|(key, counter)| counter.weight(key)).sum::<usize>();
        self.extend(removed.into_iter().map(|(key, counter)| (to(key), counter)))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&CounterKey, &Counter)> {
        self.by_key.iter()
    }

    /// The weight of all counters, which counts toward the counter limit.
    pub(super) fn weight(&self) -> usize {
        self.weight
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// Number of evaluations in all counters.
    pub(super) fn total(&self) -> u64 {
        self.by_key.values().map(Counter::total).fold(0, u64::saturating_add)
    }
}

impl IntoIterator for Counters {
    type Item = (CounterKey, Counter);
    type IntoIter = btree_map::IntoIter<CounterKey, Counter>;

    fn into_iter(self) -> Self::IntoIter {
        self.by_key.into_iter()
    }
}

/// Adds `count` up to `max` and returns the excess.
fn add_capped(sum: &mut u64, count: u64, max: u64) -> u64 {
    let added = count.min(max - *sum);
    *sum += added;
    count - added
}

/// The name of a flag or variant, if upstream can store it.
pub(super) fn storable_name(name: Arc<str>) -> Option<Arc<str>> {
    let fits = !name.is_empty() && name.len() <= MAX_NAME_BYTES && !name.contains('\0');
    fits.then_some(name)
}

/// The name of an application, truncated to what upstream can store. It is not rejected, because flags'
/// counts depend on it.
pub(super) fn truncate_app_name(name: &Arc<str>) -> Arc<str> {
    if name.len() <= MAX_NAME_BYTES && !name.contains('\0') {
        return Arc::clone(name);
    }
    name[..name.floor_char_boundary(MAX_NAME_BYTES)].replace('\0', " ").into()
}

#[cfg(test)]
mod tests;
