//! The evaluation cache of a snapshot, for frontend clients: evaluation results, response bodies, events
//! of streams, and the contexts that were requested more than once.
//!
//! All caches are bounded, and any entry may be evicted at any time: the next request evaluates again.
//! This module does not evaluate; `crate::evaluation` does.

use std::{hash::Hasher as _, sync::Arc};

use bytes::Bytes;
use moka::sync::Cache;
use siphasher::sip128::{Hasher128 as _, SipHasher13};

use super::{
    asked::{Asked, Often, Shown},
    body::{Audience, Body},
    outcomes::Outcomes,
    recent::Recent,
    table::Table,
};
use crate::{
    engine::{Context, Outcome},
    token::Projects,
};

/// Memory limit of a snapshot's cached bodies, in bytes.
const BODIES_BYTES: u64 = 64 << 20;

/// Memory limit of cached [`FlagStates`], in bytes.
const LISTED_BYTES: u64 = 32 << 20;

/// Memory limit of cached events, in bytes.
const EVENTS_BYTES: u64 = 64 << 20;

/// Memory limit of cached deterministic outcomes, in bytes.
const REPEATABLE_BYTES: u64 = 16 << 20;

/// Approximate overhead of a cache entry besides its content, in bytes.
const ENTRY_BYTES: usize = 256;

/// Key of a cached result: a keyed hash, so that clients cannot construct two contexts that collide.
#[derive(Clone, Copy, Debug)]
pub struct KnownBy(u128);

/// The caches of one snapshot.
#[derive(Debug)]
pub struct Answers {
    /// Hashes of evaluated flags by [`CacheKey`]. Shared with the snapshots before and after this one;
    /// each has its own `key_hasher`, so their entries do not mix.
    results: Arc<Table>,
    way: SipHasher13,
    often: Often,
    bodies: Cache<u128, Arc<Body>>,
    recent: Recent,
    repeatable: Cache<u128, Arc<[Outcome]>>,
    listed: Cache<u128, Arc<Outcomes>>,
    /// By the hash of the flags that the client has, if any, and the hash of the current flags.
    events: Cache<(Option<u128>, u128), Bytes>,
}

impl Answers {
    /// The caches of a new snapshot, and of the snapshot that it replaces, if any.
    pub(super) fn new(previous: Option<&Self>) -> Self {
        let bodies = Cache::<u128, Arc<Body>>::builder()
            .max_capacity(BODIES_BYTES)
            .weigher(|_, body| saturating(body.weight()));
        let repeatable = Cache::<u128, Arc<[Outcome]>>::builder()
            .max_capacity(REPEATABLE_BYTES)
            .weigher(|_, outcomes| saturating(size_of_val(&**outcomes) + ENTRY_BYTES));
        let listed = Cache::<u128, Arc<Outcomes>>::builder()
            .max_capacity(LISTED_BYTES)
            .weigher(|_, outcomes| saturating(outcomes.weight() + ENTRY_BYTES));
        let events = Cache::<_, Bytes>::builder()
            .max_capacity(EVENTS_BYTES)
            .weigher(|_, event| saturating(event.len() + ENTRY_BYTES));
        Self {
            results: previous.map_or_else(Arc::default, |it| Arc::clone(&it.results)),
            way: SipHasher13::new_with_key(&rand::random()),
            often: previous.map_or_else(Often::default, |it| Often::after(&it.often)),
            bodies: bodies.build(),
            recent: Recent::default(),
            repeatable: repeatable.build(),
            listed: listed.build(),
            events: events.build(),
        }
    }

    /// The cache key of a context; `key` has everything that can influence its outcome.
    pub fn known_by(&self, key: &[u8]) -> KnownBy {
        let mut hasher = self.way;
        hasher.write(key);
        KnownBy(hasher.finish128().as_u128())
    }

    /// The cached hash of the evaluated flags.
    pub fn outcome(&self, key: KnownBy) -> Option<u128> {
        self.results.get(key.0)
    }

    /// Caches the hash of evaluated flags.
    pub fn remember(&self, key: KnownBy, hash: u128) {
        self.results.put(key.0, hash);
    }

    /// Records a request and the hash of the evaluated flags. `is_cached` says that the cache already
    /// had them.
    pub fn note(&self, request: (&Projects, Shown, &Context<'_>), is_cached: bool, hash: u128) {
        self.often.note(request, is_cached, hash);
    }

    /// Some of the contexts that were requested more than once, from this snapshot or an earlier one.
    pub fn often_asked(&self) -> impl Iterator<Item = &Asked> {
        self.often.all()
    }

    /// The cached body of the evaluated flags with this hash.
    pub fn kept(&self, hash: u128) -> Option<Arc<Body>> {
        self.bodies.get(&hash)
    }

    /// Caches the body of the evaluated flags with this hash.
    pub fn keep(&self, hash: u128, body: Arc<Body>) {
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
    pub fn body(&self, hash: u128, make: impl FnOnce() -> Body) -> Arc<Body> {
        if let Some(body) = self.kept(hash) {
            return body;
        }
        if self.recent.insert(hash) {
            let body = Arc::new(make());
            self.keep(hash, Arc::clone(&body));
            body
        } else {
            Arc::new(make().for_audience(Audience::One))
        }
    }

    /// The deterministic outcomes that contexts with this key share, from the cache or evaluated.
    ///
    /// Outcomes are cached from the second request on: contexts that occur once would evict those that
    /// are shared.
    pub fn repeatable(
        &self,
        key: KnownBy,
        evaluate: impl FnOnce() -> Vec<Outcome>,
    ) -> Arc<[Outcome]> {
        if let Some(outcomes) = self.repeatable.get(&key.0) {
            return outcomes;
        }
        let outcomes = Arc::<[Outcome]>::from(evaluate());
        if self.recent.insert(key.0) {
            self.repeatable.insert(key.0, Arc::clone(&outcomes));
        }
        outcomes
    }

    /// The state of each flag for the evaluated flags with this hash, from the cache or built by `make`.
    /// Concurrent calls build it once.
    pub fn outcomes(&self, hash: u128, make: impl FnOnce() -> Outcomes) -> Arc<Outcomes> {
        self.listed.get_with(hash, || Arc::new(make()))
    }

    /// The event that brings a client from the first hash, or from nothing, to the second; from the
    /// cache or written by `make`. Concurrent calls write it once.
    pub fn event(&self, from_to: (Option<u128>, u128), make: impl FnOnce() -> Bytes) -> Bytes {
        self.events.get_with(from_to, make)
    }
}

fn saturating(weight: usize) -> u32 {
    u32::try_from(weight).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn bodies_stay_within_their_memory_limit() {
        let cache = Answers::new(None);
        for n in 0..1_000_u128 {
            for _ in 0..2 {
                cache.body(n << 64 | n, || Body::new(Bytes::from(vec![b'x'; 100_000])));
            }
        }
        cache.bodies.run_pending_tasks();
        let cached = cache.bodies.iter().map(|(_, body)| body.weight() as u64);
        assert!((1..=BODIES_BYTES).contains(&cached.sum()));
    }

    #[test]
    fn results_are_separate_per_snapshot() {
        let before = Answers::new(None);
        before.remember(before.known_by(b"a"), 7);
        let after = Answers::new(Some(&before));
        assert_eq!(after.outcome(after.known_by(b"a")), None);
        after.remember(after.known_by(b"a"), 8);
        for (cache, expect) in [(&before, 7), (&after, 8)] {
            assert_eq!(cache.outcome(cache.known_by(b"a")), Some(expect));
            assert_eq!(cache.outcome(cache.known_by(b"b")), None);
        }
    }

    #[test]
    fn deterministic_outcomes_are_cached_from_the_second_request_on() {
        let cache = Answers::new(None);
        let mut evaluations = 0;
        for request in 0..10 {
            for flags in [1, 2] {
                let outcomes = cache.repeatable(cache.known_by(&[flags]), || {
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
        let cache = Answers::new(None);
        let request = |hash: u128| cache.body(hash << 64 | hash, || Body::new(Bytes::new()));
        let (first, second, third) = (request(1), request(1), request(1));
        assert!(!Arc::ptr_eq(&first, &second) && Arc::ptr_eq(&second, &third));
        for hash in 2..100 {
            request(hash);
        }
        assert!(Arc::ptr_eq(&third, &request(1)));
        assert_eq!(cache.bodies.iter().count(), 1);
    }
}
