//! Bounded caches of valid, rejected and revoked tokens, keyed by digest.
//!
//! Valid and rejected tokens are stored separately, so that a flood of made-up tokens evicts no valid
//! one. This module sends no requests.
//!
//! Upstream's responses are ordered by the start of their requests, not by their arrival: a response
//! does not override a later request or a later revocation. Writers exclude each other, because one
//! change concerns several caches; reads take no lock.

mod cached_token;
mod saved_cache;
#[cfg(test)]
mod tests;
mod token_id;
mod token_listing;

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
pub(super) use self::token_listing::TokenListing;
pub use self::{cached_token::CachedToken, saved_cache::RestoreError};
use self::{saved_cache::SavedCache, token_id::TokenId, token_listing::WholeToken};
use super::error::AuthError;
use crate::{
    protocol::tokens::ListedSecret,
    token::{Environment, Grant, Token, TokenDigest, TokenKind},
};

/// How long a revoked token is rejected from the cache. Upstream's own caches may call it valid for
/// less than that (Unleash refreshes them every minute).
const REVOCATION_TTL: Duration = Duration::from_mins(10);

/// How long before the creation of the cache the requests of other instances can have been sent whose
/// results it applies; longer than such results are kept.
const MAX_EVENT_AGE: Duration = Duration::from_hours(2);

/// A token that upstream does not know or whose use it forbids.
#[derive(Debug)]
struct RejectedToken {
    /// The sequence number of the request that rejected it.
    sequence: u64,
    /// To recognize the token in a list if it has been created since.
    id: TokenId,
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
    /// Tokens revoked within [`REVOCATION_TTL`], with the sequence number of the revocation.
    revoked: Cache<TokenId, u64, RandomState>,
    unsaved: AtomicBool,
    /// Locked during each change.
    writer: Mutex<WriterState>,
    created: Instant,
    max_listed: usize,
}

/// State that only writers use.
#[derive(Debug, Default)]
struct WriterState {
    last_sequence: u64,
    /// The contents of the latest list. A token missing in the next list has been revoked, whether or
    /// not it is cached.
    listed: HashSet<TokenId>,
    /// The sequence number of the request for the latest list; 0 before the first one.
    listed_sequence: u64,
}

impl WriterState {
    /// The sequence number of an event that happens at `time`, which is now, by
    /// [`TokenCache::sequence_at`].
    fn next_sequence(&mut self, time: u64) -> u64 {
        self.last_sequence = time.max(self.last_sequence + 1);
        self.last_sequence
    }
}

impl TokenCache {
    /// A cache for `capacity` valid tokens and as many rejected ones, which expire after `rejection_ttl`.
    pub(super) fn new(capacity: u64, rejection_ttl: Duration) -> Self {
        let hasher = RandomState::default;
        // Upstream may list, and delete, as many tokens as both caches hold.
        let max_listed = capacity.saturating_mul(2);
        Self {
            valid: Cache::builder().max_capacity(capacity).build_with_hasher(hasher()),
            rejected: Cache::builder()
                .max_capacity(capacity)
                .time_to_live(rejection_ttl)
                .build_with_hasher(hasher()),
            revoked: Cache::builder()
                .max_capacity(max_listed)
                .time_to_live(REVOCATION_TTL)
                // The latest revocations matter most, even of tokens not presented yet.
                .eviction_policy(EvictionPolicy::lru())
                .build_with_hasher(hasher()),
            unsaved: AtomicBool::new(false),
            writer: Mutex::default(),
            created: Instant::now(),
            max_listed: usize::try_from(max_listed).unwrap_or(usize::MAX),
        }
    }

    /// Starts a request to upstream.
    pub(super) fn start_request(&self) -> RequestStart {
        let now = Instant::now();
        RequestStart {
            sequence: self.lock().next_sequence(self.sequence_at(now)),
            at: Some(now),
            wall: Timestamp::now(),
        }
    }

    /// The start of a request that another instance has sent at this time.
    pub(super) fn request_started_at(&self, at: Instant) -> RequestStart {
        let wall = Timestamp::now().checked_sub(at.elapsed()).unwrap_or(Timestamp::UNIX_EPOCH);
        RequestStart { sequence: self.sequence_at(at), at: Some(at), wall }
    }

    /// The sequence number of an event at this time: the nanoseconds since [`MAX_EVENT_AGE`] before this
    /// cache was created, so that requests of other instances take their place in the order.
    fn sequence_at(&self, time: Instant) -> u64 {
        let since = match time.checked_duration_since(self.created) {
            Some(since) => MAX_EVENT_AGE + since,
            None => MAX_EVENT_AGE.saturating_sub(self.created.duration_since(time)),
        };
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }

    /// The valid token with this digest.
    pub(super) fn valid(&self, digest: &TokenDigest) -> Option<Arc<CachedToken>> {
        self.valid.get(digest)
    }

    /// Why the token with this digest is rejected, if it is.
    pub(super) fn rejection(&self, digest: &TokenDigest) -> Option<AuthError> {
        if self.revoked.contains_key(&TokenId::Digest(*digest)) {
            return Some(AuthError::Unknown);
        }
        let rejected = self.rejected.get(digest)?;
        Some(match rejected.forbidden_grant {
            Some(_) => AuthError::Forbidden,
            None => AuthError::Unknown,
        })
    }

    /// Whether a v2 token was revoked by its selector within [`REVOCATION_TTL`], perhaps before it was
    /// ever presented. Other tokens are revoked by their digests: see [`rejection`](Self::rejection).
    pub(super) fn is_selector_revoked(&self, token: &Token) -> bool {
        let is_revoked =
            |selector: &str| self.revoked.contains_key(&TokenId::Selector(selector.into()));
        token.selector().is_some_and(is_revoked)
    }

    /// The cached state of `token`: its grant, or why it is rejected; `None` if it is not cached.
    pub(super) fn lookup(&self, token: &Token) -> Option<Result<Arc<Grant>, AuthError>> {
        let digest = token.digest();
        if let Some(cached) = self.valid.get(&digest) {
            return Some(Ok(Arc::clone(cached.grant())));
        }
        if self.is_selector_revoked(token) {
            return Some(Err(AuthError::Unknown));
        }
        self.rejection(&digest).map(Err)
    }

    /// The grant of a token whose use upstream forbids.
    pub(super) fn forbidden_grant(&self, digest: &TokenDigest) -> Option<Arc<Grant>> {
        self.rejected.get(digest)?.forbidden_grant.clone()
    }

    /// Whether a list that was requested after `start` does not contain `token`: it may have been revoked
    /// since another instance validated it.
    pub(super) fn is_superseded_by_list(&self, token: &Token, start: RequestStart) -> bool {
        let writer = self.lock();
        writer.listed_sequence > start.sequence && !writer.listed.contains(&TokenId::of(token))
    }

    /// Records that upstream calls `token` valid, unless it was revoked recently: upstream's caches may
    /// be older than the list that revoked it.
    pub(super) fn record_valid(
        &self,
        token: &Token,
        grant: Grant,
        start: RequestStart,
    ) -> InsertOutcome {
        let _writer = self.lock();
        self.insert_valid(&WholeToken::of(token), &TokenId::of(token), grant, start)
    }

    fn insert_valid(
        &self,
        token: &WholeToken,
        id: &TokenId,
        grant: Grant,
        start: RequestStart,
    ) -> InsertOutcome {
        let digest = token.digest;
        // An earlier release saved v2 tokens by their digests too.
        if self.revoked.contains_key(&TokenId::Digest(digest)) || self.revoked.contains_key(id) {
            return InsertOutcome::Revoked;
        }
        if self.rejected.get(&digest).is_some_and(|it| it.sequence > start.sequence) {
            return InsertOutcome::Outdated;
        }
        self.rejected.invalidate(&digest);
        let cached = if let Some(known) = self.valid.get(&digest) {
            if let Some(plaintext) = &token.plaintext
                && known.is_missing_plaintext()
            {
                known.set_plaintext(plaintext.clone());
            }
            if known.is_confirmed_after(start) || **known.grant() == grant {
                known.confirm(start);
                return InsertOutcome::Unchanged;
            }
            known.with_grant(grant, start)
        } else {
            CachedToken::confirmed(token, id.clone(), grant, start)
        };
        self.valid.insert(digest, Arc::new(cached));
        self.mark_unsaved();
        InsertOutcome::New
    }

    /// Records that upstream does not know `token`.
    pub(super) fn record_invalid(&self, token: &Token, start: RequestStart) -> RejectOutcome {
        let _writer = self.lock();
        self.insert_rejected(token, None, start)
    }

    /// Records that upstream does not know `token`. If the token was valid before, it is rejected only
    /// at the second denial.
    pub(super) fn record_denial(&self, token: &Token, start: RequestStart) -> RejectOutcome {
        let _writer = self.lock();
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
        let _writer = self.lock();
        if self.valid.contains_key(&token.digest()) {
            self.insert_valid(&WholeToken::of(token), &TokenId::of(token), grant, start);
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
            let (sequence, id) = (start.sequence, TokenId::new(digest, token.selector()));
            self.rejected.insert(digest, Arc::new(RejectedToken { sequence, id, forbidden_grant }));
        }
        if known.is_some() {
            self.valid.invalidate(&digest);
            self.mark_unsaved();
        }
        RejectOutcome::Rejected
    }

    /// Removes a valid token.
    pub(super) fn remove(&self, digest: &TokenDigest) {
        let _writer = self.lock();
        if self.valid.remove(digest).is_some() {
            self.mark_unsaved();
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
        list: &TokenListing,
        served: &BTreeSet<Environment>,
        start: RequestStart,
    ) -> ListChanges {
        let unreadable = &list.unreadable;
        let may_be_unreadable = |id: &TokenId| match id {
            TokenId::Selector(selector) => unreadable.may_include_selector(selector),
            TokenId::Digest(digest) => unreadable.may_include(digest, None),
        };
        let mut writer = self.lock();
        let mut changes = ListChanges::default();
        let mut listed = HashMap::new();
        for entry in &list.tokens {
            let (id, grant) = (&entry.id, &entry.grant);
            self.clear_revocation(id, start);
            if let Some(token) = &entry.whole {
                if self.is_admitted_by_list(&token.digest, grant, served) {
                    let accepted = self.insert_valid(token, id, grant.clone(), start);
                    changes.learned += usize::from(accepted == InsertOutcome::New);
                } else {
                    self.clear_rejection(&token.digest, grant, start);
                }
            }
            listed.insert(id.clone(), entry);
        }
        writer.listed_sequence = writer.listed_sequence.max(start.sequence);
        let now_listed = listed.keys().take(self.max_listed).cloned().collect();
        let mut gone = std::mem::replace(&mut writer.listed, now_listed);
        gone.retain(|id| !listed.contains_key(id) && !may_be_unreadable(id));
        for id in &gone {
            self.insert_revoked(id.clone(), start.sequence);
        }
        for (digest, rejected) in &self.rejected {
            let is_v2 = rejected.id.selector().is_some();
            if is_v2 && rejected.sequence < start.sequence && listed.contains_key(&rejected.id) {
                self.rejected.invalidate(&*digest);
            }
        }
        for (digest, cached) in &self.valid {
            let id = cached.id();
            if let Some(entry) = listed.get(id) {
                if cached.mark_listed() {
                    self.mark_unsaved();
                }
                // The grants of tokens that are listed in full were applied above.
                if entry.whole.is_none() {
                    let is_new = self.update_grant(*digest, &cached, entry.grant.clone(), start);
                    changes.learned += usize::from(is_new);
                }
            } else if gone.contains(id)
                || (cached.is_listed() && !unreadable.may_include(&digest, id.selector()))
            {
                self.insert_revoked(id.clone(), start.sequence);
                self.valid.invalidate(&*digest);
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
        grant: &Grant,
        served: &BTreeSet<Environment>,
    ) -> bool {
        let is_served = grant.kind == TokenKind::Admin || served.contains(&grant.scope.environment);
        self.valid.contains_key(digest)
            || (is_served && self.forbidden_grant(digest).is_none_or(|it| *it != *grant))
    }

    /// Makes a listed token eligible for validation again, unless its use is known to be forbidden.
    fn clear_rejection(&self, digest: &TokenDigest, grant: &Grant, start: RequestStart) {
        let is_taken_back = |rejected: &RejectedToken| {
            rejected.sequence < start.sequence
                && rejected.forbidden_grant.as_deref().is_none_or(|it| it != grant)
        };
        if self.rejected.get(digest).is_some_and(|it| is_taken_back(&it)) {
            self.rejected.invalidate(digest);
        }
    }

    /// Makes a listed token eligible for validation again.
    fn clear_revocation(&self, id: &TokenId, start: RequestStart) {
        if self.revoked.get(id).is_some_and(|revoked| revoked < start.sequence) {
            self.revoked.invalidate(id);
            self.mark_unsaved();
        }
    }

    /// Confirms a cached token with this grant; true if its grant was another one.
    fn update_grant(
        &self,
        digest: TokenDigest,
        known: &CachedToken,
        grant: Grant,
        start: RequestStart,
    ) -> bool {
        if known.is_confirmed_after(start) || **known.grant() == grant {
            known.confirm(start);
            return false;
        }
        self.valid.insert(digest, Arc::new(known.with_grant(grant, start)));
        self.mark_unsaved();
        true
    }

    /// Revokes a token that has just been deleted at upstream, before a list shows it. Returns the
    /// digests of the affected tokens.
    pub(super) fn revoke_token(&self, named: &ListedSecret) -> Vec<TokenDigest> {
        let mut writer = self.lock();
        let order = writer.next_sequence(self.sequence_at(Instant::now()));
        let id = TokenId::of_listed(named);
        let mut digests: Vec<_> = self.matching(&id).map(|(digest, _)| digest).collect();
        if let ListedSecret::Full(token) = named {
            digests.push(token.digest());
        }
        // Readers take no lock: in between, the token is still valid and not unknown.
        self.insert_revoked(id, order);
        for digest in &digests {
            self.valid.invalidate(digest);
        }
        digests
    }

    /// Makes a token due for revalidation at any age.
    pub(super) fn mark_stale(&self, named: &ListedSecret) {
        let mut writer = self.lock();
        let order = writer.next_sequence(self.sequence_at(Instant::now()));
        for (_, cached) in self.matching(&TokenId::of_listed(named)) {
            cached.mark_stale(order);
        }
    }

    fn matching(&self, id: &TokenId) -> impl Iterator<Item = (TokenDigest, Arc<CachedToken>)> {
        self.valid_entries().filter(move |(_, cached)| cached.id() == id)
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
        self.rejected.entry_count() + self.revoked.entry_count()
    }

    /// The cache in its stored form; `None` if it has not changed since the last call.
    pub(super) fn serialize_if_changed(&self) -> Option<Vec<u8>> {
        self.unsaved.swap(false, Ordering::Relaxed).then(|| {
            let revoked = self.revoked.iter().map(|(id, _)| (*id).clone()).collect();
            SavedCache { valid: self.valid_entries().collect(), revoked }.to_json()
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
        let _writer = self.lock();
        for (digest, cached) in saved.valid {
            self.valid.insert(digest, cached);
        }
        for id in saved.revoked {
            self.revoked.insert(id, RequestStart::NEVER.sequence);
        }
        Ok(count)
    }

    fn insert_revoked(&self, id: TokenId, order: u64) {
        self.revoked.insert(id, order);
        self.mark_unsaved();
    }

    /// A panic under this lock leaves each cache usable as it is.
    fn lock(&self) -> MutexGuard<'_, WriterState> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
