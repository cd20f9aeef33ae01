//! The counters that wait in one environment, the oldest hour first, and what they weigh.
//!
//! The weight is kept as a running sum and nothing here looks at more counters than it changes,
//! [`Counters::shrink_to`] and [`Counters::total`] excepted: how many there are is the clients' choice.
//! How many there may be is not decided here.

use std::collections::{
    BTreeMap, BTreeSet,
    btree_map::{self, Entry},
};

use super::counter::{Counter, CounterKey, Hour, Lost, MERGED};

/// Counters by key.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters {
    held: BTreeMap<CounterKey, Counter>,
    weight: usize,
}

impl Counters {
    /// Adds to the counter of a key; returns what it could not hold.
    pub(super) fn add(&mut self, key: CounterKey, counter: Counter) -> Lost {
        match self.held.entry(key) {
            Entry::Vacant(place) => {
                self.weight += counter.weight(place.key());
                place.insert(counter);
                Lost(0)
            }
            Entry::Occupied(mut present) => {
                let before = present.get().weight(present.key());
                let lost = present.get_mut().add(counter);
                self.weight += present.get().weight(present.key()) - before;
                lost
            }
        }
    }

    /// Takes out the oldest.
    pub(super) fn pop(&mut self) -> Option<(CounterKey, Counter)> {
        let (key, counter) = self.held.pop_first()?;
        self.weight -= counter.weight(&key);
        Some((key, counter))
    }

    /// Brings the weight down to a limit: first by merging applications, the oldest hour first, then
    /// by counting the oldest hour under the next. What cannot be merged, one hour of the flags that
    /// there are, stays. Returns what no counter could hold.
    pub(super) fn shrink_to(&mut self, limit: usize) -> Lost {
        let mut lost = 0_u64;
        if self.weight <= limit {
            return Lost(lost);
        }
        let hours: BTreeSet<_> = self.held.keys().map(|key| key.hour).collect();
        for hour in &hours {
            lost = lost.saturating_add(self.merge_applications(*hour).0);
            if self.weight <= limit {
                return Lost(lost);
            }
        }
        for (hour, next) in hours.iter().zip(hours.iter().skip(1)) {
            lost = lost.saturating_add(self.merge_hour(*hour, *next).0);
            if self.weight <= limit {
                break;
            }
        }
        Lost(lost)
    }

    /// Merges the applications of an hour into one; returns what no counter could hold.
    fn merge_applications(&mut self, hour: Hour) -> Lost {
        let named = |key: &CounterKey, _: &mut Counter| &*key.app != MERGED;
        let apart: Vec<_> = self.held.extract_if(CounterKey::range(hour), named).collect();
        self.move_all(apart, |key| CounterKey { app: MERGED.into(), ..key })
    }

    /// Counts what belongs to an hour under another; returns what no counter could hold.
    fn merge_hour(&mut self, hour: Hour, into: Hour) -> Lost {
        let moved = self.held.extract_if(CounterKey::range(hour), |_, _| true).collect();
        self.move_all(moved, |key| CounterKey { hour: into, ..key })
    }

    /// Adds counters that were taken out without notice under other keys.
    fn move_all(
        &mut self,
        taken: Vec<(CounterKey, Counter)>,
        to: impl Fn(CounterKey) -> CounterKey,
    ) -> Lost {
        let mut lost = 0_u64;
        for (key, counter) in taken {
            self.weight -= counter.weight(&key);
            lost = lost.saturating_add(self.add(to(key), counter).0);
        }
        Lost(lost)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&CounterKey, &Counter)> {
        self.held.iter()
    }

    /// How much all of them count towards the number of counters held.
    pub(super) fn weight(&self) -> usize {
        self.weight
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// How many evaluations they count.
    pub(super) fn total(&self) -> u64 {
        self.held.values().map(Counter::total).fold(0, u64::saturating_add)
    }
}

impl IntoIterator for Counters {
    type Item = (CounterKey, Counter);
    type IntoIter = btree_map::IntoIter<CounterKey, Counter>;

    fn into_iter(self) -> Self::IntoIter {
        self.held.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;
    use proptest::prelude::*;

    use super::*;
    use crate::{usage::counter::Name, wire::usage::ToggleStats};

    fn hour(nth: u8) -> Hour {
        Hour::of(Timestamp::from_second(3600 * i64::from(nth)).unwrap())
    }

    proptest! {
        #[test]
        fn whatever_is_done_the_weight_is_that_of_what_is_held_and_no_count_is_lost(
            steps in prop::collection::vec((0..8_u8, 0..6_u8, "[a-c]", "[ab]", "[v-z]", 1..9_u64), 0..200),
        ) {
            let mut counters = Counters::default();
            let mut expected = 0;
            for (step, nth, app, flag, variant, yes) in steps {
                match step {
                    0 => expected -= counters.pop().map_or(0, |(_, counter)| counter.total()),
                    1 => prop_assert_eq!(counters.merge_hour(hour(nth), hour(nth + 1)), Lost(0)),
                    2 => {
                        prop_assert_eq!(counters.merge_applications(hour(nth)), Lost(0));
                        let mut of_hour = counters.iter().filter(|(key, _)| key.hour == hour(nth));
                        prop_assert!(of_hour.all(|(key, _)| &*key.app == MERGED));
                    }
                    _ => {
                        let variants = [(variant.into(), yes)].into();
                        let stats = ToggleStats { yes, no: 0, variants };
                        let counter = Counter::of(stats, &Arc::default(), |_| Name::Known).0;
                        let key = CounterKey { hour: hour(nth), app: app.into(), flag: flag.into() };
                        prop_assert_eq!(counters.add(key, counter), Lost(0));
                        expected += yes;
                    }
                }
                let weight: usize = counters.iter().map(|(key, counter)| counter.weight(key)).sum();
                prop_assert_eq!((counters.weight(), counters.total()), (weight, expected));
            }
        }
    }
}
