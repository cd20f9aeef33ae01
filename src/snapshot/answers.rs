//! What a snapshot remembers of its answers to frontends: what a context came to, bodies, and what it
//! told those who follow; and what it was asked more than once.
//!
//! All are bounded, and everything may be forgotten at any time: who asks evaluates again.
//! How an answer comes about is for `crate::answers` to know.

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

/// The most memory that a snapshot's bodies may hold, in bytes.
const BODIES_BYTES: u64 = 64 << 20;

/// The same of what each flag came to for those who follow, and of the events that were written.
const LISTED_BYTES: u64 = 32 << 20;
const EVENTS_BYTES: u64 = 64 << 20;

/// The same of outcomes that are repeated in answers which are good for one request only.
const REPEATABLE_BYTES: u64 = 16 << 20;

/// What remembering anything takes besides its content, in bytes, roughly.
const ENTRY_BYTES: usize = 256;

/// What an outcome is remembered by: a hash that is keyed, so that nobody can make up two contexts that
/// are taken for one.
#[derive(Clone, Copy, Debug)]
pub struct KnownBy(u128);

/// What a snapshot remembers of its answers.
#[derive(Debug)]
pub struct Answers {
    /// Of one snapshot after the other, each of which hashes in its own way.
    outcomes: Arc<Table>,
    way: SipHasher13,
    often: Often,
    bodies: Cache<u128, Arc<Body>>,
    recent: Recent,
    repeatable: Cache<u128, Arc<[Outcome]>>,
    listed: Cache<u128, Arc<Outcomes>>,
    /// By what was told before and what is told.
    events: Cache<(Option<u128>, u128), Bytes>,
}

impl Answers {
    /// Those of a snapshot that takes the place of another, if there is one.
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
            outcomes: previous.map_or_else(Arc::default, |it| Arc::clone(&it.outcomes)),
            way: SipHasher13::new_with_key(&rand::random()),
            often: previous.map_or_else(Often::default, |it| Often::after(&it.often)),
            bodies: bodies.build(),
            recent: Recent::default(),
            repeatable: repeatable.build(),
            listed: listed.build(),
            events: events.build(),
        }
    }

    /// What the outcome for a context is remembered by, whose `key` is all that makes a difference.
    pub fn known_by(&self, key: &[u8]) -> KnownBy {
        let mut hasher = self.way;
        hasher.write(key);
        KnownBy(hasher.finish128().as_u128())
    }

    /// The hash of what was answered.
    pub fn outcome(&self, known_by: KnownBy) -> Option<u128> {
        self.outcomes.get(known_by.0)
    }

    /// Remembers the hash of what is answered.
    pub fn remember(&self, known_by: KnownBy, hash: u128) {
        self.outcomes.put(known_by.0, hash);
    }

    /// Takes note of a question about the flags of some projects, and of what identifies the answer,
    /// which was at hand if `is_known`.
    pub fn note(&self, question: (&Projects, Shown, &Context<'_>), is_known: bool, hash: u128) {
        self.often.note(question, is_known, hash);
    }

    /// Some of what was asked more than once, of this snapshot or of one before it.
    pub fn often_asked(&self) -> impl Iterator<Item = &Asked> {
        self.often.all()
    }

    /// The body of the answers that `hash` identifies, if it is kept.
    pub fn kept(&self, hash: u128) -> Option<Arc<Body>> {
        self.bodies.get(&hash)
    }

    /// Keeps the body of the answers that `hash` identifies.
    pub fn keep(&self, hash: u128, body: Arc<Body>) {
        self.bodies.insert(hash, body);
    }

    /// The body of the answers that `hash` identifies, made unless it is kept.
    ///
    /// It is kept once it is asked for again: where every user sees flags of their own, keeping all
    /// bodies would only push out those that are shared. Until then it is for one response.
    ///
    /// Equal hashes are taken for equal bodies, here as by every client that sends a hash back as an
    /// entity tag. A stranger cannot bring about two that collide: contexts choose among fragments,
    /// a few of each flag, and only upstream writes those.
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

    /// The outcomes of some flags that contexts of this key share, evaluated unless they are kept.
    ///
    /// They are kept from the second request on: users who differ in what those flags read would push
    /// out what is shared.
    pub fn repeatable(
        &self,
        known_by: KnownBy,
        evaluate: impl FnOnce() -> Vec<Outcome>,
    ) -> Arc<[Outcome]> {
        if let Some(outcomes) = self.repeatable.get(&known_by.0) {
            return outcomes;
        }
        let outcomes = Arc::<[Outcome]>::from(evaluate());
        if self.recent.insert(known_by.0) {
            self.repeatable.insert(known_by.0, Arc::clone(&outcomes));
        }
        outcomes
    }

    /// What each flag came to in the answers that `hash` identifies, found out unless it is kept: once,
    /// however many ask at the same time.
    pub fn outcomes(&self, hash: u128, make: impl FnOnce() -> Outcomes) -> Arc<Outcomes> {
        self.listed.get_with(hash, || Arc::new(make()))
    }

    /// What those are told who have the first of two answers, or none, and are to have the second;
    /// written unless it is kept, once for all who ask at the same time.
    pub fn event(&self, way: (Option<u128>, u128), make: impl FnOnce() -> Bytes) -> Bytes {
        self.events.get_with(way, make)
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
    fn what_strangers_make_up_is_forgotten_within_bounds() {
        let answers = Answers::new(None);
        for n in 0..1_000_u128 {
            for _ in 0..2 {
                answers.body(n << 64 | n, || Body::new(Bytes::from(vec![b'x'; 100_000])));
            }
        }
        answers.bodies.run_pending_tasks();
        let kept = answers.bodies.iter().map(|(_, body)| body.weight() as u64);
        assert!((1..=BODIES_BYTES).contains(&kept.sum()));
    }

    #[test]
    fn outcomes_are_those_of_one_snapshot() {
        let before = Answers::new(None);
        before.remember(before.known_by(b"a"), 7);
        let after = Answers::new(Some(&before));
        assert_eq!(after.outcome(after.known_by(b"a")), None);
        after.remember(after.known_by(b"a"), 8);
        for (answers, expect) in [(&before, 7), (&after, 8)] {
            assert_eq!(answers.outcome(answers.known_by(b"a")), Some(expect));
            assert_eq!(answers.outcome(answers.known_by(b"b")), None);
        }
    }

    #[test]
    fn repeatable_outcomes_are_evaluated_once_more_and_then_cached() {
        let answers = Answers::new(None);
        let mut evaluations = 0;
        for request in 0..10 {
            for flags in [1, 2] {
                let outcomes = answers.repeatable(answers.known_by(&[flags]), || {
                    evaluations += 1;
                    vec![Outcome::On; flags.into()]
                });
                assert_eq!(outcomes.len(), usize::from(flags), "request {request}");
            }
        }
        assert_eq!(evaluations, 4, "twice for each key");
    }

    #[test]
    fn a_body_is_kept_when_it_is_asked_for_again() {
        let answers = Answers::new(None);
        let ask = |hash: u128| answers.body(hash << 64 | hash, || Body::new(Bytes::new()));
        let (first, second, third) = (ask(1), ask(1), ask(1));
        assert!(!Arc::ptr_eq(&first, &second) && Arc::ptr_eq(&second, &third));
        for hash in 2..100 {
            ask(hash);
        }
        assert!(Arc::ptr_eq(&third, &ask(1)));
        assert_eq!(answers.bodies.iter().count(), 1);
    }
}
