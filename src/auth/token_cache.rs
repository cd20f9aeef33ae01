//! Bounded caches of valid, rejected and revoked tokens, keyed by digest.
//!
//! Valid and rejected tokens are stored separately, so that a flood of made-up tokens evicts no valid
//! one. This module sends no requests.
//!
//! Upstream's responses are ordered by the start of their requests, not by their arrival: a response
//! does not override a later request or a later revocation. Writers exclude each other; reads take no
//! lock.

mod cached_token;
mod saved;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use jiff::Timestamp;
use moka::{policy::EvictionPolicy, sync::Cache};
use tokio::time::Instant;

pub(super) use self::cached_token::RequestStart;
use self::saved::{SavedCache, SavedToken};
pub use self::{cached_token::CachedToken, saved::RestoreError};
use super::pending::AuthError;
use crate::{
    protocol::tokens::{ListedSecret, ListedToken, TokenList},
    token::{Environment, Grant, Token, TokenDigest, TokenKind},
};

/// How long a revoked token is rejected from the cache. Upstream's own caches may call it valid for
/// less than that (Unleash refreshes them every minute).
const REVOCATION_TTL: Duration = Duration::from_mins(10);

/// A token that upstream does not know or whose use it forbids.
#[derive(Debug)]
struct RejectedToken {
    /// The sequence number of the request that rejected it.
    sequence: u64,
    /// The public half of a v2 token, to recognize it in a list if it has been created since.
    selector: Option<Box<str>>,
    /// The grant of the token, if upstream knows it and forbids its use.
    forbidden_grant: Option<Arc<Grant>>,
}

/// The outcome of recording a valid token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum InsertOutcome {
    /// The token is new in the cache, or has another grant.
    New,
    /// The token is cached already.
    Unchanged,
    /// A later request has rejected the token.
    Outdated,
    /// The token was revoked within [`REVOCATION_TTL`] and stays revoked.
    Revoked,
}

/// The outcome of recording a rejected token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum RejectOutcome {
    /// The token is rejected from now on.
    Rejected,
    /// The token was valid and stays valid until it is denied again.
    NeedsRecheck,
    /// A later request has confirmed the token.
    Outdated,
}

/// The changes made by a token list.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct ListChanges {
    /// Tokens that are new in the cache, or have another grant.
    pub(super) learned: usize,
    /// Cached tokens that the list no longer contains.
    pub(super) revoked: usize,
    /// Cached tokens about which the list is inconclusive; they are revalidated.
    pub(super) marked_stale: usize,
}

/// The caches of valid, rejected and revoked tokens.
#[derive(Debug)]
pub(super) struct TokenCache {
    valid: Cache<TokenDigest, Arc<CachedToken>, RandomState>,
    rejected: Cache<TokenDigest, Arc<RejectedToken>, RandomState>,
    /// Tokens revoked within [`REVOCATION_TTL`], with the sequence number of the revocation: v2 tokens
    /// by their selector, which also covers tokens never presented; all others by their digest.
    revoked: Cache<TokenDigest, u64, RandomState>,
    revoked_selectors: Cache<Box<str>, u64, RandomState>,
    unsaved: AtomicBool,
    /// Locked during each change.
    writer: Mutex<WriterState>,
    capacity: usize,
}

/// State that only writers use.
#[derive(Debug, Default)]
struct WriterState {
    last_sequence: u64,
    /// The contents of the latest list. A token missing in the next list has been revoked, whether or
    /// not it is cached.
    listed: HashSet<TokenDigest>,
    /// The same for v2 tokens.
    listed_selectors: HashSet<Box<str>>,
}

impl WriterState {
    /// The sequence number of the current event.
    fn next_sequence(&mut self) -> u64 {
        self.last_sequence += 1;
        self.last_sequence
    }
}

impl TokenCache {
    /// A cache for `capacity` valid tokens and as many rejected ones, which expire after `refuse_for`.
    pub(super) fn new(capacity: u64, refuse_for: Duration) -> Self {
        let hasher = RandomState::default;
        Self {
            valid: Cache::builder().max_capacity(capacity).build_with_hasher(hasher()),
            rejected: Cache::builder()
                .max_capacity(capacity)
                .time_to_live(refuse_for)
                .build_with_hasher(hasher()),
            revoked: Cache::builder()
                .max_capacity(capacity)
                .time_to_live(REVOCATION_TTL)
                // The latest revocations matter most, even of tokens not presented yet.
                .eviction_policy(EvictionPolicy::lru())
                .build_with_hasher(hasher()),
            revoked_selectors: Cache::builder()
                .max_capacity(capacity)
                .time_to_live(REVOCATION_TTL)
                .eviction_policy(EvictionPolicy::lru())
                .build_with_hasher(hasher()),
            unsaved: AtomicBool::new(false),
            writer: Mutex::default(),
            capacity: usize::try_from(capacity).unwrap_or(usize::MAX),
        }
    }

    /// Starts a request to upstream.
    pub(super) fn start_request(&self) -> RequestStart {
        RequestStart {
            sequence: self.lock().next_sequence(),
            at: Some(Instant::now()),
            wall: Timestamp::now(),
        }
    }

    /// The valid token with this digest.
    pub(super) fn valid(&self, digest: &TokenDigest) -> Option<Arc<CachedToken>> {
        self.valid.get(digest)
    }

    /// Why the token with this digest is rejected, if it is.
    pub(super) fn rejection(&self, digest: &TokenDigest) -> Option<AuthError> {
        if self.revoked.contains_key(digest) {
            return Some(AuthError::Unknown);
        }
        let refusal = self.rejected.get(digest)?;
        Some(if refusal.forbidden_grant.is_some() {
            AuthError::Forbidden
        } else {
            AuthError::Unknown
        })
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
    pub(super) fn lookup(&self, token: &Token) -> Option<Result<Arc<Grant>, AuthError>> {
        let digest = token.digest();
        if let Some(cached) = self.valid.get(&digest) {
            return Some(Ok(Arc::clone(cached.grant())));
        }
        if self.is_revoked(token) {
            return Some(Err(AuthError::Unknown));
        }
        self.rejection(&digest).map(Err)
    }

    /// The grant of a token whose use upstream forbids.
    pub(super) fn forbidden_grant(&self, digest: &TokenDigest) -> Option<Arc<Grant>> {
        self.rejected.get(digest)?.forbidden_grant.clone()
    }

    /// Records that upstream calls `token` valid, unless it was revoked recently: upstream's caches may
    /// be older than the list that revoked it.
    pub(super) fn record_valid(
        &self,
        token: &Token,
        grant: Grant,
        start: RequestStart,
    ) -> InsertOutcome {
        let _changing = self.lock();
        self.insert_valid(token, grant, start)
    }

    fn insert_valid(&self, token: &Token, grant: Grant, start: RequestStart) -> InsertOutcome {
        let digest = token.digest();
        if self.is_revoked(token) {
            return InsertOutcome::Revoked;
        }
        if self.rejected.get(&digest).is_some_and(|it| it.sequence > start.sequence) {
            return InsertOutcome::Outdated;
        }
        self.rejected.invalidate(&digest);
        let cached = match self.valid.get(&digest) {
            Some(known) => {
                if known.is_missing_plaintext() {
                    known.set_plaintext(token.clone());
                }
                if known.is_confirmed_after(start) || **known.grant() == grant {
                    known.confirm(start);
                    return InsertOutcome::Unchanged;
                }
                known.with_grant(grant, start)
            }
            None => CachedToken::confirmed(token, grant, start),
        };
        self.valid.insert(digest, Arc::new(cached));
        self.unsaved.store(true, Ordering::Relaxed);
        InsertOutcome::New
    }

    /// Records that upstream does not know `token`.
    pub(super) fn record_invalid(&self, token: &Token, start: RequestStart) -> RejectOutcome {
        let _changing = self.lock();
        self.insert_rejected(token, None, start)
    }

    /// Records that upstream does not know `token`. If the token was valid before, it is rejected only
    /// at the second denial.
    pub(super) fn record_denial(&self, token: &Token, start: RequestStart) -> RejectOutcome {
        let _changing = self.lock();
        match self.valid.get(&token.digest()) {
            Some(known) if !known.is_confirmed_after(start) && !known.record_denial(start) => {
                RejectOutcome::NeedsRecheck
            }
            _ => self.insert_rejected(token, None, start),
        }
    }

    /// Records that upstream knows `token` and forbids its use.
    ///
    /// A cached valid token stays valid: only an upstream that no longer knows it has revoked it.
    pub(super) fn record_forbidden(&self, token: &Token, grant: Grant, start: RequestStart) {
        let _changing = self.lock();
        if self.valid.contains_key(&token.digest()) {
            self.insert_valid(token, grant, start);
        } else {
            self.insert_rejected(token, Some(Arc::new(grant)), start);
        }
    }

    fn insert_rejected(
        &self,
        token: &Token,
        forbidden_grant: Option<Arc<Grant>>,
        start: RequestStart,
    ) -> RejectOutcome {
        let digest = token.digest();
        let known = self.valid.get(&digest);
        if known.as_ref().is_some_and(|known| known.is_confirmed_after(start)) {
            return RejectOutcome::Outdated;
        }
        if self.rejected.get(&digest).is_none_or(|it| it.sequence <= start.sequence) {
            let selector = token.selector().map(Into::into);
            let refusal = RejectedToken { sequence: start.sequence, selector, forbidden_grant };
            self.rejected.insert(digest, Arc::new(refusal));
        }
        if known.is_some() {
            self.valid.invalidate(&digest);
            self.unsaved.store(true, Ordering::Relaxed);
        }
        RejectOutcome::Rejected
    }

    /// Removes a valid token.
    pub(super) fn remove(&self, digest: &TokenDigest) {
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
    pub(super) fn apply_token_list(
        &self,
        list: &TokenList,
        served: &BTreeSet<Environment>,
        start: RequestStart,
    ) -> ListChanges {
        let unreadable = list.unreadable_tokens();
        let mut changing = self.lock();
        let mut changes = ListChanges::default();
        let (mut digests, mut selectors) = (HashSet::new(), HashMap::new());
        for entry in list.tokens.iter().filter(|entry| !entry.is_expired(start.wall)) {
            match &entry.secret {
                ListedSecret::Full(token) => {
                    let digest = token.digest();
                    if self.revoked.get(&digest).is_some_and(|revoked| revoked < start.sequence) {
                        self.revoked.invalidate(&digest);
                        self.unsaved.store(true, Ordering::Relaxed);
                    }
                    digests.insert(digest);
                    if self.is_admitted_by_list(&digest, entry, served) {
                        let accepted = self.insert_valid(token, entry.grant(), start);
                        changes.learned += usize::from(accepted == InsertOutcome::New);
                    } else {
                        self.clear_rejection(&digest, entry, start);
                    }
                }
                ListedSecret::Selector(selector) => {
                    self.clear_revocation(selector, start);
                    selectors.insert(selector.as_str(), entry);
                }
            }
        }
        let now_listed = selectors.keys().take(self.capacity).map(|it| (*it).into()).collect();
        let mut gone_selectors = std::mem::replace(&mut changing.listed_selectors, now_listed);
        gone_selectors
            .retain(|it| !selectors.contains_key(&**it) && !unreadable.may_include_selector(it));
        for selector in &gone_selectors {
            self.insert_revoked_selector(selector, start.sequence);
        }
        let now_listed = digests.iter().take(self.capacity).copied().collect();
        let mut gone = std::mem::replace(&mut changing.listed, now_listed);
        gone.retain(|it| !digests.contains(it) && !unreadable.may_include(it, None));
        for digest in &gone {
            self.revoked.insert(*digest, start.sequence);
            self.unsaved.store(true, Ordering::Relaxed);
        }
        for (digest, refusal) in &self.rejected {
            let selector = refusal.selector.as_deref();
            if refusal.sequence < start.sequence
                && selector.is_some_and(|it| selectors.contains_key(it))
            {
                self.rejected.invalidate(&*digest);
            }
        }
        for (digest, cached) in &self.valid {
            let digest = *digest;
            let selector = cached.selector();
            let entry = selector.and_then(|it| selectors.get(it));
            if let Some(entry) = entry {
                changes.learned +=
                    usize::from(self.apply_list_entry(digest, &cached, entry, start));
            } else if digests.contains(&digest) {
                self.mark_listed(&cached);
            } else if (cached.is_listed() && !unreadable.may_include(&digest, selector))
                || selector.map_or(gone.contains(&digest), |it| gone_selectors.contains(it))
            {
                self.insert_revoked(digest, selector, start.sequence);
                changes.revoked += 1;
            } else {
                cached.mark_stale(start.sequence);
                changes.marked_stale += 1;
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
            || (is_served && self.forbidden_grant(digest).is_none_or(|it| *it != entry.grant()))
    }

    /// Makes a listed token eligible for validation again, unless its use is known to be forbidden.
    fn clear_rejection(&self, digest: &TokenDigest, entry: &ListedToken, start: RequestStart) {
        let is_taken_back = |refusal: &RejectedToken| {
            refusal.sequence < start.sequence
                && refusal.forbidden_grant.as_deref().is_none_or(|it| *it != entry.grant())
        };
        if self.rejected.get(digest).is_some_and(|it| is_taken_back(&it)) {
            self.rejected.invalidate(digest);
        }
    }

    /// Makes a listed v2 token eligible for validation again.
    fn clear_revocation(&self, selector: &str, start: RequestStart) {
        if self.revoked_selectors.get(selector).is_some_and(|revoked| revoked < start.sequence) {
            self.revoked_selectors.invalidate(selector);
            self.unsaved.store(true, Ordering::Relaxed);
        }
    }

    /// Confirms a cached v2 token that is listed; true if its grant has changed.
    fn apply_list_entry(
        &self,
        digest: TokenDigest,
        known: &Arc<CachedToken>,
        entry: &ListedToken,
        start: RequestStart,
    ) -> bool {
        self.mark_listed(known);
        let grant = entry.grant();
        if known.is_confirmed_after(start) || **known.grant() == grant {
            known.confirm(start);
            return false;
        }
        self.valid.insert(digest, Arc::new(known.with_grant(grant, start)));
        self.unsaved.store(true, Ordering::Relaxed);
        true
    }

    /// Marks a token as contained in the list.
    fn mark_listed(&self, known: &CachedToken) {
        if known.mark_listed() {
            self.unsaved.store(true, Ordering::Relaxed);
        }
    }

    /// Revokes a token that has just been deleted at upstream, before a list shows it. Returns the
    /// digests of the affected tokens.
    pub(super) fn revoke_token(&self, named: &ListedSecret) -> Vec<TokenDigest> {
        let mut changing = self.lock();
        let order = changing.next_sequence();
        let mut digests: Vec<_> = self.matching(named).map(|(digest, _)| digest).collect();
        let selector = match named {
            ListedSecret::Full(token) => {
                digests.push(token.digest());
                token.selector()
            }
            ListedSecret::Selector(selector) => {
                self.insert_revoked_selector(selector, order);
                Some(selector.as_str())
            }
        };
        for digest in &digests {
            self.insert_revoked(*digest, selector, order);
        }
        digests
    }

    /// Makes a token due for revalidation at any age.
    pub(super) fn mark_stale(&self, named: &ListedSecret) {
        let mut changing = self.lock();
        let order = changing.next_sequence();
        for (_, cached) in self.matching(named) {
            cached.mark_stale(order);
        }
    }

    fn matching<'a>(
        &'a self,
        named: &'a ListedSecret,
    ) -> impl Iterator<Item = (TokenDigest, Arc<CachedToken>)> + 'a {
        let is_named = |digest: &TokenDigest, cached: &CachedToken| match named {
            ListedSecret::Full(token) => token.digest() == *digest,
            ListedSecret::Selector(selector) => cached.selector() == Some(selector),
        };
        let known = self.valid.iter().filter(move |(digest, cached)| is_named(digest, cached));
        known.map(|(digest, cached)| (*digest, cached))
    }

    /// Takes at most `most` valid tokens that are stale or were confirmed longer than `age` ago, the
    /// longest waiting first, counted from their last confirmation or revalidation.
    ///
    /// Tokens not presented to this process yet are skipped, and so are postponed ones.
    pub(super) fn take_due_for_revalidation(&self, age: Duration, most: usize) -> Vec<Token> {
        let now = Instant::now();
        let limit = now.checked_sub(age);
        let due = self.valid.iter().map(|(_, cached)| cached);
        let mut due: Vec<_> = due.filter(|cached| cached.is_due(now, limit)).collect();
        due.sort_by_cached_key(|cached| cached.last_checked());
        due.truncate(most);
        for cached in &due {
            cached.postpone_recheck(now);
        }
        due.iter().filter_map(|cached| cached.plaintext().cloned()).collect()
    }

    /// Excludes a valid token from revalidation for the duration of `pause`.
    pub(super) fn postpone_revalidation(&self, digest: &TokenDigest, pause: Duration) {
        if let Some(cached) = self.valid.get(digest) {
            cached.postpone_recheck(Instant::now() + pause);
        }
    }

    /// Every valid token, for display to operators.
    pub(super) fn valid_tokens(&self) -> Vec<Arc<CachedToken>> {
        self.valid.iter().map(|(_, cached)| cached).collect()
    }

    /// Every valid token with its digest.
    pub(super) fn valid_entries(&self) -> impl Iterator<Item = (TokenDigest, Arc<CachedToken>)> {
        self.valid.iter().map(|(digest, cached)| (*digest, cached))
    }

    /// The number of rejected and revoked tokens.
    pub(super) fn rejected_count(&self) -> u64 {
        let revoked = self.revoked.entry_count() + self.revoked_selectors.entry_count();
        self.rejected.entry_count() + revoked
    }

    /// The cache in its stored form; `None` if it has not changed since the last call.
    pub(super) fn serialize_if_changed(&self) -> Option<Vec<u8>> {
        self.unsaved.swap(false, Ordering::Relaxed).then(|| {
            let saved = |(digest, cached): (Arc<TokenDigest>, Arc<CachedToken>)| SavedToken {
                digest: *digest,
                grant: Arc::clone(cached.grant()),
                masked: cached.masked().into(),
                selector: cached.selector().map(Into::into),
                is_listed: cached.is_listed(),
            };
            let saved = SavedCache {
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
    pub(super) fn mark_unsaved(&self) {
        self.unsaved.store(true, Ordering::Relaxed);
    }

    /// Loads what [`TokenCache::serialize_if_changed`] returned to an earlier process; returns the
    /// number of valid tokens.
    ///
    /// They are valid but unconfirmed: each is revalidated once it has been presented.
    pub(super) fn restore(&self, json: &[u8]) -> Result<usize, RestoreError> {
        let saved = SavedCache::parse(json)?;
        let count = saved.valid.len();
        let _changing = self.lock();
        for SavedToken { digest, grant, masked, selector, is_listed } in saved.valid {
            let cached = CachedToken::unconfirmed(grant, masked, selector.as_deref(), is_listed);
            self.valid.insert(digest, Arc::new(cached));
        }
        for digest in saved.revoked {
            self.revoked.insert(digest, RequestStart::NEVER.sequence);
        }
        for selector in saved.revoked_selectors {
            self.revoked_selectors.insert(selector, RequestStart::NEVER.sequence);
        }
        Ok(count)
    }

    fn insert_revoked(&self, digest: TokenDigest, selector: Option<&str>, order: u64) {
        match selector {
            Some(selector) => self.insert_revoked_selector(selector, order),
            None => self.revoked.insert(digest, order),
        }
        self.valid.invalidate(&digest);
        self.unsaved.store(true, Ordering::Relaxed);
    }

    fn insert_revoked_selector(&self, selector: &str, order: u64) {
        self.revoked_selectors.insert(selector.into(), order);
        self.unsaved.store(true, Ordering::Relaxed);
    }

    /// A panic under this lock leaves each cache usable as it is.
    fn lock(&self) -> MutexGuard<'_, WriterState> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
