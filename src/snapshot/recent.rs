//! Whether something was there lately, known by a hash of it.

use std::sync::atomic::{AtomicU64, Ordering};

/// How many hashes are known at most.
const PLACES: usize = 4096;

/// Some of the hashes that were seen last: each pushes out another, and none waits for a lock.
#[derive(Debug)]
pub(super) struct Recent(Box<[AtomicU64]>);

impl Default for Recent {
    fn default() -> Self {
        Self((0..PLACES).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Recent {
    /// Adds a hash; whether it was among them.
    pub(super) fn insert(&self, hash: u128) -> bool {
        // Two halves of the hash: the place, and what tells it from others of that place.
        let (place, mark) = ((hash % PLACES as u128) as usize, (hash >> 64) as u64);
        self.0[place].swap(mark, Ordering::Relaxed) == mark
    }
}
