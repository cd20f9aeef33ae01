//! A concurrent cache that is bounded by the memory of its values and counts its hits and misses.
//!
//! For values that several requests share. Beyond the limit the least used are evicted, and built again
//! on their next use. Values do not expire here. Callers may insert some in advance.

use std::{hash::Hash, sync::Arc};

use metrics::{Counter, counter, describe_counter};
use moka::sync::Cache;

const HITS: &str = "parapet_cache_hits_total";
const MISSES: &str = "parapet_cache_misses_total";

/// Approximate memory of an entry besides its value, in bytes.
const ENTRY_OVERHEAD_BYTES: usize = 256;

/// Maps keys to values that are cheap to clone.
#[derive(Debug)]
pub struct BoundedCache<K, V>
where
    K: Eq + Hash + Send + Sync + 'static,
    V: Clone + Send + Sync + 'static,
{
    entries: Cache<K, V>,
    hits: Counter,
    misses: Counter,
}

impl<K, V> BoundedCache<K, V>
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// A cache of at most `max_bytes`, where `weight` is the maximum memory that a value will have, in
    /// bytes. Caches of the same name share their counters.
    pub fn new(name: &'static str, max_bytes: u64, weight: fn(&V) -> usize) -> Self {
        let weigher = move |_: &K, value: &V| {
            u32::try_from(weight(value) + ENTRY_OVERHEAD_BYTES).unwrap_or(u32::MAX)
        };
        describe_counter!(HITS, "Values found in a cache, by cache");
        Self {
            entries: Cache::builder().max_capacity(max_bytes).weigher(weigher).build(),
            hits: counter!(HITS, "cache" => name),
            misses: miss_counter(name),
        }
    }

    /// The value of a key, unless it was evicted.
    pub fn get(&self, key: &K) -> Option<V> {
        let found = self.entries.get(key);
        if found.is_some() { &self.hits } else { &self.misses }.increment(1);
        found
    }

    /// Inserts a value, or replaces it.
    pub fn insert(&self, key: K, value: V) {
        self.entries.insert(key, value);
    }

    /// The value of a key, from the cache or built. Concurrent calls build it once.
    pub fn get_or_build(&self, key: &K, build: impl FnOnce() -> V) -> V {
        let mut is_hit = true;
        let value = self.entries.get_with_by_ref(key, || {
            is_hit = false;
            build()
        });
        if is_hit { &self.hits } else { &self.misses }.increment(1);
        value
    }

    /// All entries. This counts no hits.
    pub fn entries(&self) -> impl Iterator<Item = (Arc<K>, V)> {
        self.entries.iter()
    }
}

/// The counter of values that were not in the cache of this name. For a cache without a counter of hits,
/// because counting them would cost as much as the look-up.
pub fn miss_counter(name: &'static str) -> Counter {
    describe_counter!(MISSES, "Values that were not in a cache, by cache");
    counter!(MISSES, "cache" => name)
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;

    #[test]
    fn values_stay_within_the_memory_limit() {
        let cache = BoundedCache::new("test", 1 << 20, |size: &usize| *size);
        for n in 0..1_000 {
            assert_eq!(cache.get_or_build(&n, || 10_000), 10_000);
        }
        cache.entries.run_pending_tasks();
        let cached: usize = cache.entries().map(|(_, size)| size + ENTRY_OVERHEAD_BYTES).sum();
        assert!((1..=1 << 20).contains(&cached));
    }

    #[test]
    fn hits_and_misses_are_counted() {
        let recorder = PrometheusBuilder::new().build_recorder();
        metrics::with_local_recorder(&recorder, || {
            let cache = BoundedCache::new("test", 1 << 20, |_: &u8| 1);
            assert_eq!(cache.get(&'a'), None);
            assert_eq!(cache.get_or_build(&'a', || 1), 1);
            for _ in 0..3 {
                assert_eq!(cache.get_or_build(&'a', || 2), 1);
            }
            assert_eq!(cache.get(&'a'), Some(1));
        });
        let text = recorder.handle().render();
        for line in [
            "parapet_cache_hits_total{cache=\"test\"} 4",
            "parapet_cache_misses_total{cache=\"test\"} 2",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
