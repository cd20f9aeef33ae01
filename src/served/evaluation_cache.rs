//! The evaluation cache of a served snapshot, for frontend clients: evaluation results, response bodies, events
//! of streams, and the contexts that were requested more than once.
//!
//! All caches are bounded, and any entry may be evicted at any time: the next request evaluates again.
//! This module does not evaluate; `crate::evaluation` does.

use std::{hash::Hasher as _, sync::Arc};

use bytes::Bytes;
use moka::sync::Cache;
use siphasher::sip128::{Hasher128 as _, SipHasher13};

use super::{
    hot_contexts::{HotContext, HotContexts},
    recent_hashes::RecentHashes,
    result_cache::ResultCache,
};
use crate::{
    engine::{Context, Outcome},
    snapshot::{
        FlagStates, Include,
        body::{PreparedBody, Reuse},
    },
    token::Projects,
};

/// Memory limit of a snapshot's cached bodies, in bytes.
const MAX_BODY_BYTES: u64 = 64 << 20;

/// Memory limit of cached [`FlagStates`], in bytes.
const MAX_FLAG_STATE_BYTES: u64 = 32 << 20;

/// Memory limit of cached events, in bytes.
const MAX_EVENT_BYTES: u64 = 64 << 20;

/// Memory limit of cached deterministic outcomes, in bytes.
const MAX_OUTCOME_BYTES: u64 = 16 << 20;

/// Approximate overhead of a cache entry besides its content, in bytes.
const ENTRY_OVERHEAD_BYTES: usize = 256;

/// Key of a cached result: a keyed hash, so that clients cannot construct two contexts that collide.
#[derive(Clone, Copy, Debug)]
pub struct CacheKey(u128);

/// The caches of one snapshot.
#[derive(Debug)]
pub struct EvaluationCache {
    /// Hashes of evaluated flags by [`CacheKey`]. Shared with the snapshots before and after this one;
    /// each has its own `key_hasher`, so their entries do not mix.
    results: Arc<ResultCache>,
    key_hasher: SipHasher13,
    hot_contexts: HotContexts,
    bodies: Cache<u128, Arc<PreparedBody>>,
    recently_requested: RecentHashes,
    deterministic_outcomes: Cache<u128, Arc<[Outcome]>>,
    flag_states: Cache<u128, Arc<FlagStates>>,
    /// By the hash of the flags that the client has, if any, and the hash of the current flags.
    events: Cache<(Option<u128>, u128), Bytes>,
}

impl EvaluationCache {
    /// The caches of a new snapshot, and of the snapshot that it replaces, if any.
    pub(super) fn new(previous: Option<&Self>) -> Self {
        let bodies = Cache::<u128, Arc<PreparedBody>>::builder()
            .max_capacity(MAX_BODY_BYTES)
            .weigher(|_, body| saturating_u32(body.weight()));
        let repeatable = Cache::<u128, Arc<[Outcome]>>::builder()
            .max_capacity(MAX_OUTCOME_BYTES)
            .weigher(|_, outcomes| saturating_u32(size_of_val(&**outcomes) + ENTRY_OVERHEAD_BYTES));
        let listed = Cache::<u128, Arc<FlagStates>>::builder()
            .max_capacity(MAX_FLAG_STATE_BYTES)
            .weigher(|_, outcomes| saturating_u32(outcomes.weight() + ENTRY_OVERHEAD_BYTES));
        let events = Cache::<_, Bytes>::builder()
            .max_capacity(MAX_EVENT_BYTES)
            .weigher(|_, event| saturating_u32(event.len() + ENTRY_OVERHEAD_BYTES));
        Self {
            results: previous.map_or_else(Arc::default, |it| Arc::clone(&it.results)),
            key_hasher: SipHasher13::new_with_key(&rand::random()),
            hot_contexts: previous
                .map_or_else(HotContexts::default, |it| HotContexts::inherit(&it.hot_contexts)),
            bodies: bodies.build(),
            recently_requested: RecentHashes::default(),
            deterministic_outcomes: repeatable.build(),
            flag_states: listed.build(),
            events: events.build(),
        }
    }

    /// The cache key of a context; `key` has everything that can influence its outcome.
    pub fn cache_key(&self, key: &[u8]) -> CacheKey {
        let mut hasher = self.key_hasher;
        hasher.write(key);
        CacheKey(hasher.finish128().as_u128())
    }

    /// The cached hash of the evaluated flags.
    pub fn result(&self, key: CacheKey) -> Option<u128> {
        self.results.get(key.0)
    }

    /// Caches the hash of evaluated flags.
    pub fn insert_result(&self, key: CacheKey, hash: u128) {
        self.results.insert(key.0, hash);
    }

    /// Records a request and the hash of the evaluated flags. `is_cached` says that the cache already
    /// had them.
    pub fn record_request(
        &self,
        request: (&Projects, Include, &Context<'_>),
        is_cached: bool,
        hash: u128,
    ) {
        self.hot_contexts.record(request, is_cached, hash);
    }

    /// Some of the contexts that were requested more than once, from this snapshot or an earlier one.
    pub fn hot_contexts(&self) -> impl Iterator<Item = &HotContext> {
        self.hot_contexts.iter()
    }

    /// The cached body of the evaluated flags with this hash.
    pub fn cached_body(&self, hash: u128) -> Option<Arc<PreparedBody>> {
        self.bodies.get(&hash)
    }

    /// Caches the body of the evaluated flags with this hash.
    pub fn insert_body(&self, hash: u128, body: Arc<PreparedBody>) {
        self.bodies.insert(hash, body);
    }

    /// The body of the evaluated flags with this hash, from the cache or built by `make`.
    ///
    /// A body is cached from its second request on. Where every user gets different flags, caching all
    /// bodies would only evict those that are shared. The first body is for one response.
    ///
    /// Equal hashes mean equal bodies, here as for every client that sends a hash back as an entity
    /// tag. Clients cannot produce a collision: contexts choose among a few fragments per flag, and only
    /// upstream writes those.
    pub fn body(&self, hash: u128, make: impl FnOnce() -> PreparedBody) -> Arc<PreparedBody> {
        if let Some(body) = self.cached_body(hash) {
            return body;
        }
        if self.recently_requested.contains_or_insert(hash) {
            let body = Arc::new(make());
            self.insert_body(hash, Arc::clone(&body));
            body
        } else {
            Arc::new(make().with_reuse(Reuse::Once))
        }
    }

    /// The deterministic outcomes that contexts with this key share, from the cache or evaluated.
    ///
    /// Outcomes are cached from the second request on: contexts that occur once would evict those that
    /// are shared.
    pub fn deterministic_outcomes(
        &self,
        key: CacheKey,
        evaluate: impl FnOnce() -> Vec<Outcome>,
    ) -> Arc<[Outcome]> {
        if let Some(outcomes) = self.deterministic_outcomes.get(&key.0) {
            return outcomes;
        }
        let outcomes = Arc::<[Outcome]>::from(evaluate());
        if self.recently_requested.contains_or_insert(key.0) {
            self.deterministic_outcomes.insert(key.0, Arc::clone(&outcomes));
        }
        outcomes
    }

    /// The state of each flag for the evaluated flags with this hash, from the cache or built by `make`.
    /// Concurrent calls build it once.
    pub fn flag_states(&self, hash: u128, make: impl FnOnce() -> FlagStates) -> Arc<FlagStates> {
        self.flag_states.get_with(hash, || Arc::new(make()))
    }

    /// The event that brings a client from the first hash, or from nothing, to the second; from the
    /// cache or written by `make`. Concurrent calls write it once.
    pub fn event(&self, from_to: (Option<u128>, u128), make: impl FnOnce() -> Bytes) -> Bytes {
        self.events.get_with(from_to, make)
    }
}

fn saturating_u32(weight: usize) -> u32 {
    u32::try_from(weight).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn bodies_stay_within_their_memory_limit() {
        let cache = EvaluationCache::new(None);
        for n in 0..1_000_u128 {
            for _ in 0..2 {
                cache.body(n << 64 | n, || PreparedBody::new(Bytes::from(vec![b'x'; 100_000])));
            }
        }
        cache.bodies.run_pending_tasks();
        let cached = cache.bodies.iter().map(|(_, body)| body.weight() as u64);
        assert!((1..=MAX_BODY_BYTES).contains(&cached.sum()));
    }

    #[test]
    fn results_are_separate_per_snapshot() {
        let before = EvaluationCache::new(None);
        before.insert_result(before.cache_key(b"a"), 7);
        let after = EvaluationCache::new(Some(&before));
        assert_eq!(after.result(after.cache_key(b"a")), None);
        after.insert_result(after.cache_key(b"a"), 8);
        for (cache, expect) in [(&before, 7), (&after, 8)] {
            assert_eq!(cache.result(cache.cache_key(b"a")), Some(expect));
            assert_eq!(cache.result(cache.cache_key(b"b")), None);
        }
    }

    #[test]
    fn deterministic_outcomes_are_cached_from_the_second_request_on() {
        let cache = EvaluationCache::new(None);
        let mut evaluations = 0;
        for request in 0..10 {
            for flags in [1, 2] {
                let outcomes = cache.deterministic_outcomes(cache.cache_key(&[flags]), || {
                    evaluations += 1;
                    vec![Outcome::On; flags.into()]
                });
                assert_eq!(outcomes.len(), usize::from(flags), "request {request}");
            }
        }
        assert_eq!(evaluations, 4, "twice for each key");
    }

    #[test]
    fn body_is_cached_from_the_second_request_on() {
        let cache = EvaluationCache::new(None);
        let request =
            |hash: u128| cache.body(hash << 64 | hash, || PreparedBody::new(Bytes::new()));
        let (first, second, third) = (request(1), request(1), request(1));
        assert!(!Arc::ptr_eq(&first, &second) && Arc::ptr_eq(&second, &third));
        for hash in 2..100 {
            request(hash);
        }
        assert!(Arc::ptr_eq(&third, &request(1)));
        assert_eq!(cache.bodies.iter().count(), 1);
    }
}
