//! Recognises batches of other edges that were recorded already, by their ids.
//!
//! An edge that received no response sends its batch again, unchanged and with the same id. A batch is
//! remembered only once it is recorded: an edge whose batch was rejected may send it again.
//!
//! The ids are in memory only, the latest [`MAX_BATCHES`] of them. A batch that is repeated later, after
//! a restart, or to another instance is counted again.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Mutex, PoisonError},
};

use xxhash_rust::xxh3::xxh3_128;

use super::batch::BatchId;
use crate::token::Environment;

/// The maximum number of ids. At one batch a minute from each of 100 edges, these are the batches of 10
/// hours.
const MAX_BATCHES: usize = 65_536;
/// The number of batches that can be recorded at the same time, if no two are in the same shard.
const SHARDS: usize = 16;

/// The ids of the latest batches.
#[derive(Debug)]
pub(super) struct ReceivedBatches([Mutex<Shard>; SHARDS]);

/// Some of the ids, the oldest first. An id is a hash of the environment and the batch's id.
#[derive(Debug, Default)]
struct Shard {
    known: HashSet<u128>,
    oldest_first: VecDeque<u128>,
}

impl ReceivedBatches {
    /// Remembers no batch yet.
    pub(super) fn new() -> Self {
        Self(std::array::from_fn(|_| Mutex::default()))
    }

    /// Records a batch with `record`, unless it was recorded before; returns whether it was recorded now.
    ///
    /// Of the same batch from two requests at the same time, the second waits for the first, because it
    /// must not be acknowledged before the first is recorded.
    pub(super) fn record_once<E>(
        &self,
        environment: &Environment,
        id: BatchId,
        record: impl FnOnce() -> Result<(), E>,
    ) -> Result<bool, E> {
        let hash = xxh3_128(format!("{id} {environment}").as_bytes());
        let shard = &self.0[(hash % SHARDS as u128) as usize];
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if shard.known.contains(&hash) {
            return Ok(false);
        }
        record()?;
        shard.insert(hash);
        Ok(true)
    }
}

impl Shard {
    fn insert(&mut self, hash: u128) {
        if self.oldest_first.len() == MAX_BATCHES / SHARDS
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            self.known.remove(&oldest);
        }
        self.known.insert(hash);
        self.oldest_first.push_back(hash);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(batches: &ReceivedBatches, environment: &str, n: u64) -> bool {
        let environment = Environment::new(environment);
        batches.record_once(&environment, BatchId::new(7, n), || Ok::<_, ()>(())).unwrap()
    }

    #[test]
    fn batch_is_recorded_once_per_environment() {
        let batches = ReceivedBatches::new();
        assert!(record(&batches, "dev", 1));
        assert!(!record(&batches, "dev", 1));
        assert!(record(&batches, "prod", 1));
        assert!(record(&batches, "dev", 2));
    }

    #[test]
    fn rejected_batch_is_recorded_when_it_is_sent_again() {
        let batches = ReceivedBatches::new();
        let (environment, id) = (Environment::new("dev"), BatchId::new(7, 1));
        assert_eq!(batches.record_once(&environment, id, || Err("full")), Err("full"));
        assert!(record(&batches, "dev", 1));
    }

    #[test]
    fn oldest_batches_are_forgotten_beyond_the_limit() {
        let batches = ReceivedBatches::new();
        let count = 2 * MAX_BATCHES as u64;
        assert!((0..count).all(|n| record(&batches, "dev", n)));
        let remembered: usize =
            batches.0.iter().map(|shard| shard.lock().unwrap().known.len()).sum();
        assert_eq!(remembered, MAX_BATCHES);
        assert!(!record(&batches, "dev", count - 1));
        assert!(record(&batches, "dev", 0));
    }
}
