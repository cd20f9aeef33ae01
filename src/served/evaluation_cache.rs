//! The evaluation cache of a served snapshot, for frontend clients: evaluation results, response bodies,
//! events of streams, and the contexts that were requested more than once.
//!
//! All caches are bounded, and any entry may be evicted at any time: the next request evaluates again.
//! This module does not evaluate; `crate::evaluation` does.

use std::{hash::Hasher as _, sync::Arc};

use bytes::Bytes;
use metrics::Counter;
use siphasher::sip128::{Hasher128 as _, SipHasher13};

use super::{
    prewarm_candidates::{HotContext, PrewarmCandidates},
    recent_hashes::RecentHashes,
    result_cache::ResultCache,
};
use crate::{
    cache::{self, BoundedCache},
    engine::{Context, Outcome},
    snapshot::{
        FlagStates, Include,
        prepared_body::{PreparedBody, Reuse},
    },
    token::Projects,
};

/// Memory limit of a snapshot's cached bodies, in bytes.
const MAX_BODY_BYTES: u64 = 64 << 20;

/// Memory limit of cached deterministic outcomes, in bytes.
const MAX_OUTCOME_BYTES: u64 = 16 << 20;

/// Memory limit of cached [`FlagStates`], in bytes.
const MAX_FLAG_STATE_BYTES: u64 = 32 << 20;

/// Memory limit of cached events, in bytes.
const MAX_EVENT_BYTES: u64 = 64 << 20;

/// Key of a cached result: a keyed hash, so that clients cannot construct two contexts that collide.
#[derive(Clone, Copy, Debug)]
pub struct CacheKey(u128);

/// The caches of one snapshot. Numbers are for 350 flags.
#[derive(Debug)]
pub struct EvaluationCache {
    /// Hashes of evaluated flags by [`CacheKey`]. A hit saves the evaluation, 51,000 instructions. Shared
    /// with the snapshots before and after this one; each has its own `key_hasher`, so their entries do
    /// not mix.
    results: Arc<ResultCache>,
    /// Hits are not counted: nearly every request of a frontend is one.
    result_misses: Counter,
    key_hasher: SipHasher13,
    prewarm_candidates: PrewarmCandidates,
    /// By the hash of the evaluated flags. A hit saves writing 20 kB, 9,000 instructions, evaluating the
    /// flags for it, and compressing it.
    bodies: BoundedCache<u128, Arc<PreparedBody>>,
    /// Decides what enters `bodies` and `deterministic_outcomes`. Without it 1,600 users with
    /// results of their own would fill `bodies`.
    recently_requested: RecentHashes,
    /// By [`CacheKey`]. Users without an identifier have no cached result if any outcome is random; a hit
    /// here saves evaluating the flags that are not, up to 51,000 instructions.
    deterministic_outcomes: BoundedCache<u128, Arc<[Outcome]>>,
    /// By the hash of the evaluated flags. A stream needs them as long as it is open; those with equal
    /// results share their 32 bytes per flag.
    flag_states: BoundedCache<u128, Arc<FlagStates>>,
    /// By the hash of the flags that the client has, if any, and the hash of the current flags. Streams
    /// with equal results share the text, 20 kB if it has all flags.
    events: BoundedCache<(Option<u128>, u128), Bytes>,
}

impl EvaluationCache {
    /// The caches of a new snapshot, and of the snapshot that it replaces, if any.
    pub(super) fn new(previous: Option<&Self>) -> Self {
        Self {
            results: previous.map_or_else(Arc::default, |it| Arc::clone(&it.results)),
            result_misses: cache::miss_counter("results"),
            key_hasher: SipHasher13::new_with_key(&rand::random()),
            prewarm_candidates: PrewarmCandidates::new(previous.map(|it| &it.prewarm_candidates)),
            bodies: BoundedCache::new("bodies", MAX_BODY_BYTES, |body| body.max_memory_size()),
            recently_requested: RecentHashes::default(),
            deterministic_outcomes: BoundedCache::new(
                "deterministic_outcomes",
                MAX_OUTCOME_BYTES,
                |outcomes| size_of_val(&**outcomes),
            ),
            flag_states: BoundedCache::new("flag_states", MAX_FLAG_STATE_BYTES, |states| {
                states.memory_size()
            }),
            events: BoundedCache::new("events", MAX_EVENT_BYTES, Bytes::len),
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

    /// Caches the hash of flags that were evaluated because it was not cached.
    pub fn insert_result(&self, key: CacheKey, hash: u128) {
        self.result_misses.increment(1);
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
        self.prewarm_candidates.record(request, is_cached, hash);
    }

    /// Some of the contexts that were requested more than once, from this snapshot or an earlier one.
    pub fn prewarm_candidates(&self) -> impl Iterator<Item = &HotContext> {
        self.prewarm_candidates.iter()
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
        self.flag_states.get_or_build(&hash, || Arc::new(make()))
    }

    /// The event that brings a client from the first hash, or from nothing, to the second; from the
    /// cache or written by `make`. Concurrent calls write it once.
    pub fn event(&self, from_to: (Option<u128>, u128), make: impl FnOnce() -> Bytes) -> Bytes {
        self.events.get_or_build(&from_to, make)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

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
        assert_eq!(cache.bodies.entries().count(), 1);
    }
}
