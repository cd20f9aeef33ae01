//! A lock-free filter that tells whether a hash was inserted recently.

use super::atomic::{AtomicU64, Ordering};

/// Maximum number of hashes.
const CAPACITY: usize = 4096;

/// Some of the latest hashes. A new hash overwrites an older one; there is no lock.
#[derive(Debug)]
pub(super) struct RecentHashes(Box<[AtomicU64]>);

impl Default for RecentHashes {
    fn default() -> Self {
        Self((0..CAPACITY).map(|_| AtomicU64::new(0)).collect())
    }
}

impl RecentHashes {
    /// Inserts a hash. Returns whether it was present.
    pub(super) fn contains_or_insert(&self, hash: u128) -> bool {
        // The lower half of the hash selects the slot, the upper half is stored in it.
        let (slot, mark) = ((hash % CAPACITY as u128) as usize, (hash >> 64) as u64);
        self.0[slot].swap(mark, Ordering::Relaxed) == mark
    }
}
