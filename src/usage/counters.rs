//! The pending counters of one environment, oldest hour first, with their total weight.
//!
//! The weight is a running sum. Operations touch only the counters that they change, except for
//! [`Counters::shrink_to`] and [`Counters::total`], because clients decide how many counters there are.
//! The limit is set elsewhere.

use std::collections::{
    BTreeMap, BTreeSet,
    btree_map::{self, Entry},
};

use super::counter::{Counter, CounterKey, Hour, MERGED_NAME, Overflow};

/// Counters by key.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters {
    by_key: BTreeMap<CounterKey, Counter>,
    weight: usize,
}

impl Counters {
    /// Adds to the counter of a key; returns what exceeds the counter's limits.
    pub(super) fn add(&mut self, key: CounterKey, counter: Counter) -> Overflow {
        match self.by_key.entry(key) {
            Entry::Vacant(place) => {
                self.weight += counter.weight(place.key());
                place.insert(counter);
                Overflow(0)
            }
            Entry::Occupied(mut present) => {
                let before = present.get().weight(present.key());
                let lost = present.get_mut().add(counter);
                self.weight += present.get().weight(present.key()) - before;
                lost
            }
        }
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
    pub(super) fn shrink_to(&mut self, limit: usize) -> Overflow {
        let mut lost = 0_u64;
        if self.weight <= limit {
            return Overflow(lost);
        }
        let hours: BTreeSet<_> = self.by_key.keys().map(|key| key.hour).collect();
        for hour in &hours {
            lost = lost.saturating_add(self.merge_applications(*hour).0);
            if self.weight <= limit {
                return Overflow(lost);
            }
        }
        for (hour, next) in hours.iter().zip(hours.iter().skip(1)) {
            lost = lost.saturating_add(self.merge_hour(*hour, *next).0);
            if self.weight <= limit {
                break;
            }
        }
        Overflow(lost)
    }

    /// Merges the applications of an hour into one; returns what exceeds the counters' limits.
    fn merge_applications(&mut self, hour: Hour) -> Overflow {
        let named = |key: &CounterKey, _: &mut Counter| &*key.app != MERGED_NAME;
        let separate: Vec<_> =
            self.by_key.extract_if(CounterKey::hour_range(hour), named).collect();
        self.rekey(separate, |key| CounterKey { app: MERGED_NAME.into(), ..key })
    }

    /// Merges an hour into another one; returns what exceeds the counters' limits.
    fn merge_hour(&mut self, hour: Hour, into: Hour) -> Overflow {
        let moved = self.by_key.extract_if(CounterKey::hour_range(hour), |_, _| true).collect();
        self.rekey(moved, |key| CounterKey { hour: into, ..key })
    }

    /// Adds counters under other keys after they were removed from the map without adjusting the weight.
    fn rekey(
        &mut self,
        removed: Vec<(CounterKey, Counter)>,
        to: impl Fn(CounterKey) -> CounterKey,
    ) -> Overflow {
        let mut lost = 0_u64;
        for (key, counter) in removed {
            self.weight -= counter.weight(&key);
            lost = lost.saturating_add(self.add(to(key), counter).0);
        }
        Overflow(lost)
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;
    use proptest::prelude::*;

    use super::*;
    use crate::{protocol::usage::ToggleStats, usage::counter::NameStatus};

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
                    1 => prop_assert_eq!(counters.merge_hour(hour(nth), hour(nth + 1)), Overflow(0)),
                    2 => {
                        prop_assert_eq!(counters.merge_applications(hour(nth)), Overflow(0));
                        let mut of_hour = counters.iter().filter(|(key, _)| key.hour == hour(nth));
                        prop_assert!(of_hour.all(|(key, _)| &*key.app == MERGED_NAME));
                    }
                    _ => {
                        let variants = [(variant.into(), yes)].into();
                        let stats = ToggleStats { yes, no: 0, variants };
                        let counter = Counter::from_stats(stats, &Arc::default(), |_| NameStatus::Known).0;
                        let key = CounterKey { hour: hour(nth), app: app.into(), flag: flag.into() };
                        prop_assert_eq!(counters.add(key, counter), Overflow(0));
                        expected += yes;
                    }
                }
                let weight: usize = counters.iter().map(|(key, counter)| counter.weight(key)).sum();
                prop_assert_eq!((counters.weight(), counters.total()), (weight, expected));
            }
        }
    }
}
