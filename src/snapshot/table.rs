//! What contexts came to, by hashes, in a table of fixed size.
//!
//! A place has room for two: for who came last, and for who was asked for again. Whoever asks once and
//! never again, however many they are, pushes out nobody who comes back.
//!
//! Nobody waits for a lock, and nothing is allocated but the table, when something is first put into
//! it. An entry may be read while it is written, and be written by two at once: its key is stored mixed
//! with its value, so that a mixture of two entries has the key of neither (Hyatt and Mann, "A Lockless
//! Transposition-Table Implementation for Parallel Search", ICGA Journal 25, 2002).

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering},
};

/// How many places there are: 4 MiB.
const PLACES: usize = 1 << 16;

/// Values of 128 bits by keys of 128 bits, both of which are hashes.
#[derive(Debug, Default)]
pub(super) struct Table(OnceLock<Box<[Place]>>);

/// As long as a line of the processor's cache, and in one.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Place {
    stays: Entry,
    comes: Entry,
}

/// The halves of a key, each mixed with that of the value, and those of the value.
#[derive(Debug, Default)]
struct Entry([AtomicU64; 4]);

impl Table {
    /// The value of a key, if it is there still.
    pub(super) fn get(&self, key: u128) -> Option<u128> {
        let Place { stays, comes } = &self.0.get()?[index(key)];
        if let Some(value) = stays.get(key) {
            return Some(value);
        }
        let value = comes.get(key)?;
        comes.copy(stays);
        stays.put(key, value);
        Some(value)
    }

    /// Puts a key with its value where the last stands that came to its place and was not asked for.
    pub(super) fn put(&self, key: u128, value: u128) {
        let places = self.0.get_or_init(|| (0..PLACES).map(|_| Place::default()).collect());
        places[index(key)].comes.put(key, value);
    }
}

fn index(key: u128) -> usize {
    (key % PLACES as u128) as usize
}

impl Entry {
    fn get(&self, key: u128) -> Option<u128> {
        let [mixed, value] = self.halves();
        (mixed ^ value == key).then_some(value)
    }

    fn put(&self, key: u128, value: u128) {
        self.store([key ^ value, value]);
    }

    fn copy(&self, other: &Self) {
        self.store(other.halves());
    }

    fn halves(&self) -> [u128; 2] {
        let [a, b, c, d] = self.0.each_ref().map(|it| u128::from(it.load(Ordering::Relaxed)));
        [a << 64 | b, c << 64 | d]
    }

    #[expect(clippy::cast_possible_truncation, reason = "each half of it is stored")]
    fn store(&self, [mixed, value]: [u128; 2]) {
        let halves = [mixed >> 64, mixed, value >> 64, value];
        for (word, half) in self.0.iter().zip(halves) {
            word.store(half as u64, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// A key of the same place as all others.
    fn key(number: u64) -> u128 {
        u128::from(number) << 64 | u128::from(number) << 16 | 7
    }

    #[test]
    fn who_is_asked_for_again_stays_while_others_come_once() {
        let table = Table::default();
        assert_eq!(table.get(key(1)), None);
        table.put(key(1), 11);
        assert_eq!((table.get(key(1)), table.get(key(2))), (Some(11), None));
        for stranger in 100..200 {
            table.put(key(stranger), 0);
            assert_eq!(table.get(key(1)), Some(11));
        }
        // Two who come back have room beside each other.
        table.put(key(2), 22);
        for _ in 0..3 {
            assert_eq!((table.get(key(1)), table.get(key(2))), (Some(11), Some(22)));
        }
        // A third takes the place of one of them.
        table.put(key(3), 33);
        assert_eq!((table.get(key(3)), table.get(key(2))), (Some(33), Some(22)));
        assert_eq!(table.get(key(1)), None);
    }

    #[test]
    fn what_is_read_while_others_write_is_what_was_put() {
        let table = Table::default();
        let value = |number: u64| u128::from(number) << 64 | u128::from(!number);
        thread::scope(|scope| {
            for first in [0, 1] {
                let table = &table;
                scope.spawn(move || {
                    for number in (0..200_000).map(|n| (2 * n + first) % 5) {
                        table.put(key(number), value(number));
                    }
                });
            }
            scope.spawn(|| {
                for number in (0..400_000).map(|n| n % 5) {
                    assert!(table.get(key(number)).is_none_or(|it| it == value(number)));
                }
            });
        });
        table.put(key(0), value(0));
        assert_eq!(table.get(key(0)), Some(value(0)));
    }
}
