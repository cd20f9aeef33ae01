//! Bounded caches of valid, rejected and revoked tokens, keyed by digest.
//!
//! Valid and rejected tokens are stored separately, so that a flood of made-up tokens evicts no valid
//! one. This module sends no requests.
//!
//! Upstream's responses are ordered by the start of their requests, not by their arrival: a response
//! does not override a later request or a later revocation. Writers exclude each other; reads take no
//! lock.

mod saved;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use jiff::Timestamp;
use moka::{policy::EvictionPolicy, sync::Cache};
use tokio::time::Instant;

pub use self::saved::RestoreError;
use self::saved::{Saved, SavedVerdicts};
use super::queue::Denied;
use crate::{
    token::{Environment, Grant, Token, TokenDigest, TokenKind},
    wire::tokens::{ListedToken, ListedSecret, TokenList},
};

/// How long a revoked token is rejected from the cache. Upstream's own caches may call it valid for
/// less than that (Unleash refreshes them every minute).
const REVOKED_FOR: Duration = Duration::from_mins(10);

/// The start of a request to upstream. Its response counts as of this moment, whenever it arrives.
#[derive(Clone, Copy, Debug)]
pub(super) struct RequestStart {
    /// Its position in the order of all requests and revocations.
    order: u64,
    /// Monotonic milliseconds since [`TokenCache::started`]; 0 is never.
    monotonic_ms: u64,
    /// Wall clock, for display and for the expiry of listed tokens.
    wall: Timestamp,
}

impl RequestStart {
    /// Before every request of this process.
    pub(super) const NEVER: Self = Self { order: 0, monotonic_ms: 0, wall: Timestamp::UNIX_EPOCH };
}

/// A valid token.
#[derive(Debug)]
pub struct Verdict {
    grant: Arc<Grant>,
    masked: Arc<str>,
    selector: Option<Box<str>>,
    /// Whether upstream's token list has contained it, so that its absence there means revocation.
    listed: AtomicBool,
    /// The sequence number of the latest request that confirmed it.
    confirmed: AtomicU64,
    /// The start of that request in monotonic milliseconds; 0 is never.
    confirmed_ms: AtomicU64,
    /// The start of that request by the wall clock, in seconds of Unix time.
    confirmed_unix_secs: AtomicI64,
    /// The sequence number of the latest event that made it stale.
    doubted: AtomicU64,
    /// The sequence number of the latest request that denied it.
    denied: AtomicU64,
    /// The time of its last revalidation, or the earliest time of the next one, in monotonic
    /// milliseconds.
    ask_after_ms: AtomicU64,
    /// Set once the token has been presented to this process.
    token: OnceLock<Token>,
}

impl Verdict {
    fn unconfirmed(grant: Arc<Grant>, masked: Arc<str>, selector: Option<&str>) -> Self {
        Self {
            grant,
            masked,
            selector: selector.map(Into::into),
            listed: AtomicBool::new(false),
            confirmed: AtomicU64::new(0),
            confirmed_ms: AtomicU64::new(0),
            confirmed_unix_secs: AtomicI64::new(0),
            doubted: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            ask_after_ms: AtomicU64::new(0),
            token: OnceLock::new(),
        }
    }

    /// Kind, environment and projects of the token.
    pub fn grant(&self) -> &Arc<Grant> {
        &self.grant
    }

    /// The token without its secret part, for display.
    pub fn masked(&self) -> &str {
        &self.masked
    }

    /// The last confirmation by upstream, by the wall clock.
    pub fn checked(&self) -> Timestamp {
        Timestamp::from_second(self.confirmed_unix_secs.load(Ordering::Relaxed))
            .unwrap_or(Timestamp::UNIX_EPOCH)
    }

    /// Whether the token has not been presented to this process yet.
    pub fn wants_plaintext(&self) -> bool {
        self.token.get().is_none()
    }

    /// Adds the plaintext of a token that was cached by its digest only.
    pub fn learn(&self, token: Token) {
        // A concurrent request may have set the same plaintext.
        let _ = self.token.set(token);
    }

    fn is_listed(&self) -> bool {
        self.listed.load(Ordering::Relaxed)
    }

    /// Whether a request that began after `start` has confirmed the token.
    fn is_newer_than(&self, start: RequestStart) -> bool {
        self.confirmed.load(Ordering::Relaxed) > start.order
    }

    fn confirm(&self, start: RequestStart) {
        if !self.is_newer_than(start) {
            self.confirmed.store(start.order, Ordering::Relaxed);
            self.confirmed_ms.store(start.monotonic_ms, Ordering::Relaxed);
            self.confirmed_unix_secs.store(start.wall.as_second(), Ordering::Relaxed);
        }
    }

    /// Makes the token due for revalidation at any age, unless a request that began after `order` has
    /// confirmed it.
    fn doubt(&self, order: u64) {
        self.doubted.fetch_max(order, Ordering::Relaxed);
    }

    /// Whether the token is stale, or was last confirmed before `limit_ms`.
    fn is_due(&self, limit_ms: Option<u64>) -> bool {
        let confirmed_ms = self.confirmed_ms.load(Ordering::Relaxed);
        confirmed_ms == 0
            || self.doubted.load(Ordering::Relaxed) > self.confirmed.load(Ordering::Relaxed)
            || limit_ms.is_some_and(|limit| confirmed_ms < limit)
    }

    /// Records a denial; true if an earlier request denied the token too and none has confirmed it
    /// since.
    fn deny(&self, start: RequestStart) -> bool {
        let before = self.denied.swap(start.order, Ordering::Relaxed);
        before > self.confirmed.load(Ordering::Relaxed)
    }

    /// The same token with another grant.
    fn with_grant(&self, grant: Grant, start: RequestStart) -> Self {
        let changed =
            Self::unconfirmed(Arc::new(grant), Arc::clone(&self.masked), self.selector.as_deref());
        changed.confirm(start);
        changed.doubt(self.doubted.load(Ordering::Relaxed));
        changed.listed.store(self.is_listed(), Ordering::Relaxed);
        if let Some(token) = self.token.get() {
            changed.learn(token.clone());
        }
        changed
    }
}

/// A token that upstream does not know or whose use it forbids.
#[derive(Debug)]
struct Refusal {
    /// The sequence number of the request that rejected it.
    order: u64,
    /// The public half of a v2 token, to recognize it in a list if it has been created since.
    selector: Option<Box<str>>,
    /// The grant of the token, if upstream knows it and forbids its use.
    forbidden: Option<Arc<Grant>>,
}

/// The outcome of recording a valid token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Accepted {
    /// The token is new in the cache, or has another grant.
    New,
    /// The token is cached already.
    Known,
    /// A later request has rejected the token.
    Outdated,
    /// The token was revoked within [`REVOCATION_TTL`] and stays revoked.
    Revoked,
}

/// The outcome of recording a rejected token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Rejected {
    /// The token is rejected from now on.
    Refused,
    /// The token was valid and stays valid until it is denied again.
    Doubted,
    /// A later request has confirmed the token.
    Outdated,
}

/// The changes made by a token list.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Changes {
    /// Tokens that are new in the cache, or have another grant.
    pub(super) learned: usize,
    /// Cached tokens that the list no longer contains.
    pub(super) revoked: usize,
    /// Cached tokens about which the list is inconclusive; they are revalidated.
    pub(super) suspected: usize,
}

/// The caches of valid, rejected and revoked tokens.
#[derive(Debug)]
pub(super) struct Verdicts {
    valid: Cache<TokenDigest, Arc<Verdict>, RandomState>,
    refused: Cache<TokenDigest, Arc<Refusal>, RandomState>,
    /// Tokens revoked within [`REVOCATION_TTL`], with the sequence number of the revocation: v2 tokens
    /// by their selector, which also covers tokens never presented; all others by their digest.
    revoked: Cache<TokenDigest, u64, RandomState>,
    revoked_selectors: Cache<Box<str>, u64, RandomState>,
    unsaved: AtomicBool,
    started: Instant,
    /// Locked during each change.
    changing: Mutex<Changing>,
    capacity: usize,
}

/// State that only writers use.
#[derive(Debug, Default)]
struct Changing {
    order: u64,
    /// The contents of the latest list. A token missing in the next list has been revoked, whether or
    /// not it is cached.
    listed: HashSet<TokenDigest>,
    /// The same for v2 tokens.
    listed_selectors: HashSet<Box<str>>,
}

impl Changing {
    /// The sequence number of the current event.
    fn next(&mut self) -> u64 {
        self.order += 1;
        self.order
    }
}

impl Verdicts {
    /// A cache for `capacity` valid tokens and as many rejected ones, which expire after `refuse_for`.
    pub(super) fn new(capacity: u64, refuse_for: Duration) -> Self {
        let hasher = RandomState::default;
        Self {
            valid: Cache::builder().max_capacity(capacity).build_with_hasher(hasher()),
            refused: Cache::builder()
                .max_capacity(capacity)
                .time_to_live(refuse_for)
                .build_with_hasher(hasher()),
            revoked: Cache::builder()
                .max_capacity(capacity)
                .time_to_live(REVOKED_FOR)
                // The latest revocations matter most, even of tokens not presented yet.
                .eviction_policy(EvictionPolicy::lru())
                .build_with_hasher(hasher()),
            revoked_selectors: Cache::builder()
                .max_capacity(capacity)
                .time_to_live(REVOKED_FOR)
                .eviction_policy(EvictionPolicy::lru())
                .build_with_hasher(hasher()),
            unsaved: AtomicBool::new(false),
            started: Instant::now(),
            changing: Mutex::default(),
            capacity: usize::try_from(capacity).unwrap_or(usize::MAX),
        }
    }

    /// Starts a request to upstream.
    pub(super) fn start_request(&self) -> RequestStart {
        RequestStart {
            order: self.lock().next(),
            monotonic_ms: self.millis(Instant::now()).max(1),
            wall: Timestamp::now(),
        }
    }

    /// The valid token with this digest.
    pub(super) fn valid(&self, digest: &TokenDigest) -> Option<Arc<Verdict>> {
        self.valid.get(digest)
    }

    /// Why the token with this digest is rejected, if it is.
    pub(super) fn refusal(&self, digest: &TokenDigest) -> Option<Denied> {
        if self.revoked.contains_key(digest) {
            return Some(Denied::Unknown);
        }
        let refusal = self.refused.get(digest)?;
        Some(if refusal.forbidden.is_some() { Denied::Forbidden } else { Denied::Unknown })
    }

    /// Whether `token` is a v2 token that was revoked by its selector, perhaps before it was ever
    /// presented. For revocations by digest see [`TokenCache::rejection`].
    pub(super) fn is_revoked_by_selector(&self, token: &Token) -> bool {
        let is_revoked = |selector: &str| self.revoked_selectors.contains_key(selector);
        token.selector().is_some_and(is_revoked)
    }

    /// Whether `token` was revoked within [`REVOCATION_TTL`].
    fn is_revoked(&self, token: &Token) -> bool {
        // An earlier release saved v2 tokens by their digests too.
        self.is_revoked_by_selector(token) || self.revoked.contains_key(&token.digest())
    }

    /// The cached state of `token`: its grant, or why it is rejected; `None` if it is not cached.
    pub(super) fn known(&self, token: &Token) -> Option<Result<Arc<Grant>, Denied>> {
        let digest = token.digest();
        if let Some(cached) = self.valid.get(&digest) {
            return Some(Ok(Arc::clone(cached.grant())));
        }
        if self.is_revoked(token) {
            return Some(Err(Denied::Unknown));
        }
        self.refusal(&digest).map(Err)
    }

    /// The grant of a token whose use upstream forbids.
    pub(super) fn forbidden(&self, digest: &TokenDigest) -> Option<Arc<Grant>> {
        self.refused.get(digest)?.forbidden.clone()
    }

    /// Records that upstream calls `token` valid, unless it was revoked recently: upstream's caches may
    /// be older than the list that revoked it.
    pub(super) fn accept(&self, token: &Token, grant: Grant, start: RequestStart) -> Accepted {
        let _changing = self.lock();
        self.admit(token, grant, start)
    }

    fn admit(&self, token: &Token, grant: Grant, start: RequestStart) -> Accepted {
        let digest = token.digest();
        if self.is_revoked(token) {
            return Accepted::Revoked;
        }
        if self.refused.get(&digest).is_some_and(|it| it.order > start.order) {
            return Accepted::Outdated;
        }
        self.refused.invalidate(&digest);
        let cached = match self.valid.get(&digest) {
            Some(known) if known.is_newer_than(start) || *known.grant == grant => {
                known.confirm(start);
                if known.wants_plaintext() {
                    known.learn(token.clone());
                }
                return Accepted::Known;
            }
            Some(known) => known.with_grant(grant, start),
            None => {
                let cached =
                    Verdict::unconfirmed(Arc::new(grant), token.masked(), token.selector());
                cached.confirm(start);
                cached
            }
        };
        if cached.wants_plaintext() {
            cached.learn(token.clone());
        }
        self.valid.insert(digest, Arc::new(cached));
        self.unsaved.store(true, Ordering::Relaxed);
        Accepted::New
    }

    /// Records that upstream does not know `token`.
    pub(super) fn refuse(&self, token: &Token, start: RequestStart) -> Rejected {
        let _changing = self.lock();
        self.reject(token, None, start)
    }

    /// Records that upstream does not know `token`. If the token was valid before, it is rejected only
    /// at the second denial.
    pub(super) fn deny(&self, token: &Token, start: RequestStart) -> Rejected {
        let _changing = self.lock();
        match self.valid.get(&token.digest()) {
            Some(known) if !known.is_newer_than(start) && !known.deny(start) => Rejected::Doubted,
            _ => self.reject(token, None, start),
        }
    }

    /// Records that upstream knows `token` and forbids its use.
    ///
    /// A cached valid token stays valid: only an upstream that no longer knows it has revoked it.
    pub(super) fn forbid(&self, token: &Token, grant: Grant, start: RequestStart) {
        let _changing = self.lock();
        if self.valid.contains_key(&token.digest()) {
            self.admit(token, grant, start);
        } else {
            self.reject(token, Some(Arc::new(grant)), start);
        }
    }

    fn reject(
        &self,
        token: &Token,
        forbidden: Option<Arc<Grant>>,
        start: RequestStart,
    ) -> Rejected {
        let digest = token.digest();
        let known = self.valid.get(&digest);
        if known.as_ref().is_some_and(|known| known.is_newer_than(start)) {
            return Rejected::Outdated;
        }
        if self.refused.get(&digest).is_none_or(|it| it.order <= start.order) {
            let selector = token.selector().map(Into::into);
            let refusal = Refusal { order: start.order, selector, forbidden };
            self.refused.insert(digest, Arc::new(refusal));
        }
        if known.is_some() {
            self.valid.invalidate(&digest);
            self.unsaved.store(true, Ordering::Relaxed);
        }
        Rejected::Refused
    }

    /// Removes a valid token.
    pub(super) fn forget(&self, digest: &TokenDigest) {
        let _changing = self.lock();
        if self.valid.remove(digest).is_some() {
            self.unsaved.store(true, Ordering::Relaxed);
        }
    }

    /// Applies upstream's list of all its tokens.
    ///
    /// A cached token that was on a list is revoked as soon as its entry is missing, for longer than
    /// upstream's own caches live. A token that was never on a list (upstream omits some) is only marked
    /// as stale, and so is one that an unreadable item may stand for.
    ///
    /// A listed token is accepted only for `served` environments: upstream may forbid the use of others,
    /// so these are validated when they are presented.
    pub(super) fn take_list(
        &self,
        list: &TokenList,
        served: &BTreeSet<Environment>,
        start: RequestStart,
    ) -> Changes {
        let unreadable = list.unreadable_tokens();
        let mut changing = self.lock();
        let mut changes = Changes::default();
        let (mut digests, mut selectors) = (HashSet::new(), HashMap::new());
        for entry in list.tokens.iter().filter(|entry| !entry.is_expired(start.wall)) {
            match &entry.secret {
                ListedSecret::Full(token) => {
                    let digest = token.digest();
                    if self.revoked.get(&digest).is_some_and(|revoked| revoked < start.order) {
                        self.revoked.invalidate(&digest);
                        self.unsaved.store(true, Ordering::Relaxed);
                    }
                    digests.insert(digest);
                    if self.is_admitted_by_list(&digest, entry, served) {
                        let accepted = self.admit(token, entry.grant(), start);
                        changes.learned += usize::from(accepted == Accepted::New);
                    } else {
                        self.take_back_refusal(&digest, entry, start);
                    }
                }
                ListedSecret::Selector(selector) => {
                    self.reinstate(selector, start);
                    selectors.insert(selector.as_str(), entry);
                }
            }
        }
        let now_listed = selectors.keys().take(self.capacity).map(|it| (*it).into()).collect();
        let mut gone_selectors = std::mem::replace(&mut changing.listed_selectors, now_listed);
        gone_selectors
            .retain(|it| !selectors.contains_key(&**it) && !unreadable.may_include_selector(it));
        for selector in &gone_selectors {
            self.revoke_selector(selector, start.order);
        }
        let now_listed = digests.iter().take(self.capacity).copied().collect();
        let mut gone = std::mem::replace(&mut changing.listed, now_listed);
        gone.retain(|it| !digests.contains(it) && !unreadable.may_include(it, None));
        for digest in &gone {
            self.revoked.insert(*digest, start.order);
            self.unsaved.store(true, Ordering::Relaxed);
        }
        for (digest, refusal) in &self.refused {
            let selector = refusal.selector.as_deref();
            if refusal.order < start.order && selector.is_some_and(|it| selectors.contains_key(it))
            {
                self.refused.invalidate(&*digest);
            }
        }
        for (digest, cached) in &self.valid {
            let digest = *digest;
            let selector = cached.selector.as_deref();
            let entry = selector.and_then(|it| selectors.get(it));
            if let Some(entry) = entry {
                changes.learned += usize::from(self.follow_entry(digest, &cached, entry, start));
            } else if digests.contains(&digest) {
                self.show(&cached);
            } else if (cached.is_listed() && !unreadable.may_include(&digest, selector))
                || selector.map_or(gone.contains(&digest), |it| gone_selectors.contains(it))
            {
                self.revoke(digest, selector, start.order);
                changes.revoked += 1;
            } else {
                cached.doubt(start.order);
                changes.suspected += 1;
            }
        }
        changes
    }

    /// Whether a listed token is accepted without validation.
    fn is_admitted_by_list(
        &self,
        digest: &TokenDigest,
        entry: &ListedToken,
        served: &BTreeSet<Environment>,
    ) -> bool {
        let is_served = entry.kind == TokenKind::Admin || served.contains(&entry.environment);
        self.valid.contains_key(digest)
            || (is_served && self.forbidden(digest).is_none_or(|it| *it != entry.grant()))
    }

    /// Makes a listed token eligible for validation again, unless its use is known to be forbidden.
    fn take_back_refusal(&self, digest: &TokenDigest, entry: &ListedToken, start: RequestStart) {
        let is_taken_back = |refusal: &Refusal| {
            refusal.order < start.order
                && refusal.forbidden.as_deref().is_none_or(|it| *it != entry.grant())
        };
        if self.refused.get(digest).is_some_and(|it| is_taken_back(&it)) {
            self.refused.invalidate(digest);
        }
    }

    /// Makes a listed v2 token eligible for validation again.
    fn reinstate(&self, selector: &str, start: RequestStart) {
        if self.revoked_selectors.get(selector).is_some_and(|revoked| revoked < start.order) {
            self.revoked_selectors.invalidate(selector);
            self.unsaved.store(true, Ordering::Relaxed);
        }
    }

    /// Confirms a cached v2 token that is listed; true if its grant has changed.
    fn follow_entry(
        &self,
        digest: TokenDigest,
        known: &Arc<Verdict>,
        entry: &ListedToken,
        start: RequestStart,
    ) -> bool {
        self.show(known);
        let grant = entry.grant();
        if known.is_newer_than(start) || *known.grant == grant {
            known.confirm(start);
            return false;
        }
        self.valid.insert(digest, Arc::new(known.with_grant(grant, start)));
        self.unsaved.store(true, Ordering::Relaxed);
        true
    }

    /// Marks a token as contained in the list.
    fn show(&self, known: &Verdict) {
        if !known.listed.swap(true, Ordering::Relaxed) {
            self.unsaved.store(true, Ordering::Relaxed);
        }
    }

    /// Revokes a token that has just been deleted at upstream, before a list shows it. Returns the
    /// digests of the affected tokens.
    pub(super) fn withdraw(&self, named: &ListedSecret) -> Vec<TokenDigest> {
        let mut changing = self.lock();
        let order = changing.next();
        let mut digests: Vec<_> = self.named(named).map(|(digest, _)| digest).collect();
        let selector = match named {
            ListedSecret::Full(token) => {
                digests.push(token.digest());
                token.selector()
            }
            ListedSecret::Selector(selector) => {
                self.revoke_selector(selector, order);
                Some(selector.as_str())
            }
        };
        for digest in &digests {
            self.revoke(*digest, selector, order);
        }
        digests
    }

    /// Makes a token due for revalidation at any age.
    pub(super) fn suspect(&self, named: &ListedSecret) {
        let mut changing = self.lock();
        let order = changing.next();
        for (_, cached) in self.named(named) {
            cached.doubt(order);
        }
    }

    fn named<'a>(
        &'a self,
        named: &'a ListedSecret,
    ) -> impl Iterator<Item = (TokenDigest, Arc<Verdict>)> + 'a {
        let is_named = |digest: &TokenDigest, cached: &Verdict| match named {
            ListedSecret::Full(token) => token.digest() == *digest,
            ListedSecret::Selector(selector) => cached.selector.as_deref() == Some(selector),
        };
        let known = self.valid.iter().filter(move |(digest, cached)| is_named(digest, cached));
        known.map(|(digest, cached)| (*digest, cached))
    }

    /// Takes at most `most` valid tokens that are stale or were confirmed longer than `age` ago, the
    /// longest waiting first, counted from their last confirmation or revalidation.
    ///
    /// Tokens not presented to this process yet are skipped, and so are postponed ones.
    pub(super) fn take_unconfirmed_for(&self, age: Duration, most: usize) -> Vec<Token> {
        let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        let now_ms = self.millis(Instant::now());
        let limit_ms = now_ms.checked_sub(age_ms);
        let is_ready = |cached: &Verdict| {
            !cached.wants_plaintext()
                && cached.is_due(limit_ms)
                && cached.ask_after_ms.load(Ordering::Relaxed) <= now_ms
        };
        let due = self.valid.iter().map(|(_, cached)| cached);
        let mut due: Vec<_> = due.filter(|cached| is_ready(cached)).collect();
        due.sort_by_cached_key(|cached| {
            let confirmed_ms = cached.confirmed_ms.load(Ordering::Relaxed);
            confirmed_ms.max(cached.ask_after_ms.load(Ordering::Relaxed))
        });
        due.truncate(most);
        for cached in &due {
            cached.ask_after_ms.store(now_ms, Ordering::Relaxed);
        }
        due.iter().filter_map(|cached| cached.token.get().cloned()).collect()
    }

    /// Excludes a valid token from revalidation for the duration of `pause`.
    pub(super) fn postpone(&self, digest: &TokenDigest, pause: Duration) {
        if let Some(cached) = self.valid.get(digest) {
            let until_ms = self.millis(Instant::now() + pause);
            cached.ask_after_ms.fetch_max(until_ms, Ordering::Relaxed);
        }
    }

    /// Every valid token, for display to operators.
    pub(super) fn all_valid(&self) -> Vec<Arc<Verdict>> {
        self.valid.iter().map(|(_, cached)| cached).collect()
    }

    /// Every valid token with its digest.
    pub(super) fn all_valid_by_digest(&self) -> impl Iterator<Item = (TokenDigest, Arc<Verdict>)> {
        self.valid.iter().map(|(digest, cached)| (*digest, cached))
    }

    /// The number of rejected and revoked tokens.
    pub(super) fn refused_count(&self) -> u64 {
        let revoked = self.revoked.entry_count() + self.revoked_selectors.entry_count();
        self.refused.entry_count() + revoked
    }

    /// The cache in its stored form; `None` if it has not changed since the last call.
    pub(super) fn save(&self) -> Option<Vec<u8>> {
        self.unsaved.swap(false, Ordering::Relaxed).then(|| {
            let saved = |(digest, cached): (Arc<TokenDigest>, Arc<Verdict>)| Saved {
                digest: *digest,
                grant: Arc::clone(&cached.grant),
                masked: Arc::clone(&cached.masked),
                selector: cached.selector.clone(),
                is_listed: cached.is_listed(),
            };
            let saved = SavedVerdicts {
                valid: self.valid.iter().map(saved).collect(),
                revoked: self.revoked.iter().map(|(digest, _)| *digest).collect(),
                revoked_selectors: self
                    .revoked_selectors
                    .iter()
                    .map(|(selector, _)| (*selector).clone())
                    .collect(),
            };
            saved.to_json()
        })
    }

    /// Reports that the bytes of [`TokenCache::serialize_if_changed`] could not be stored.
    pub(super) fn not_saved(&self) {
        self.unsaved.store(true, Ordering::Relaxed);
    }

    /// Loads what [`TokenCache::serialize_if_changed`] returned to an earlier process; returns the
    /// number of valid tokens.
    ///
    /// They are valid but unconfirmed: each is revalidated once it has been presented.
    pub(super) fn restore(&self, json: &[u8]) -> Result<usize, RestoreError> {
        let saved = SavedVerdicts::parse(json)?;
        let count = saved.valid.len();
        let _changing = self.lock();
        for Saved { digest, grant, masked, selector, is_listed } in saved.valid {
            let cached = Verdict::unconfirmed(grant, masked, selector.as_deref());
            cached.listed.store(is_listed, Ordering::Relaxed);
            self.valid.insert(digest, Arc::new(cached));
        }
        for digest in saved.revoked {
            self.revoked.insert(digest, RequestStart::NEVER.order);
        }
        for selector in saved.revoked_selectors {
            self.revoked_selectors.insert(selector, RequestStart::NEVER.order);
        }
        Ok(count)
    }

    fn revoke(&self, digest: TokenDigest, selector: Option<&str>, order: u64) {
        match selector {
            Some(selector) => self.revoke_selector(selector, order),
            None => self.revoked.insert(digest, order),
        }
        self.valid.invalidate(&digest);
        self.unsaved.store(true, Ordering::Relaxed);
    }

    fn revoke_selector(&self, selector: &str, order: u64) {
        self.revoked_selectors.insert(selector.into(), order);
        self.unsaved.store(true, Ordering::Relaxed);
    }

    fn millis(&self, instant: Instant) -> u64 {
        let elapsed = instant.saturating_duration_since(self.started);
        u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
    }

    /// A panic under this lock leaves each cache usable as it is.
    fn lock(&self) -> MutexGuard<'_, Changing> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
