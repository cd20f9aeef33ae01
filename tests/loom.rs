//! Tries every order of memory accesses of the lock-free structures that are made by hand, within a number
//! of preemptions. `cargo test --test loom` runs it in about a second.

use loom::{model::Builder, sync::Arc, thread};

mod atomic {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
}
#[allow(dead_code, unused_imports, reason = "their unit tests and what only these use")]
#[path = "../src/served/recent_hashes.rs"]
mod recent_hashes;
#[allow(dead_code, unused_imports, reason = "their unit tests and what only these use")]
#[path = "../src/served/result_cache.rs"]
mod result_cache;

fn main() {
    concurrent_insertions_never_give_a_key_the_value_of_another();
    concurrent_hits_move_an_entry_without_mixing_it_with_another();
    one_of_two_concurrent_insertions_of_a_hash_is_the_first();
}

fn check(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// A key and its value, which differ from those of other numbers in each half.
fn entry(number: u64) -> (u128, u128) {
    let halves = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    (halves(number << 8, number << 16), halves(number << 24, number << 32))
}

fn concurrent_insertions_never_give_a_key_the_value_of_another() {
    check(2, || {
        let pair = Arc::new(result_cache::EntryPair::default());
        let writers = [1, 2].map(|number| {
            let pair = Arc::clone(&pair);
            thread::spawn(move || {
                let (key, value) = entry(number);
                pair.insert(key, value);
            })
        });
        let check_each = || {
            for (key, value) in [1, 2].map(entry) {
                assert!(pair.get(key).is_none_or(|it| it == value));
            }
        };
        check_each();
        for writer in writers {
            writer.join().expect("the thread does not panic");
        }
        check_each();
    });
}

fn concurrent_hits_move_an_entry_without_mixing_it_with_another() {
    check(2, || {
        let pair = Arc::new(result_cache::EntryPair::default());
        let [(first, its_value), (second, other_value)] = [1, 2].map(entry);
        pair.insert(first, its_value);
        assert_eq!(pair.get(first), Some(its_value));
        pair.insert(second, other_value);
        let reader = {
            let pair = Arc::clone(&pair);
            thread::spawn(move || assert!(pair.get(first).is_none_or(|it| it == its_value)))
        };
        // Moves the second entry to the place of the first.
        assert!(pair.get(second).is_none_or(|it| it == other_value));
        reader.join().expect("the thread does not panic");
    });
}

fn one_of_two_concurrent_insertions_of_a_hash_is_the_first() {
    check(3, || {
        let hashes = Arc::new(recent_hashes::RecentHashes::default());
        let (hash, _) = entry(1);
        let other = {
            let hashes = Arc::clone(&hashes);
            thread::spawn(move || hashes.contains_or_insert(hash))
        };
        assert_ne!(
            hashes.contains_or_insert(hash),
            other.join().expect("the thread does not panic")
        );
    });
}
