//! What is known of tokens: bounded caches keyed by digest.
//!
//! Valid and refused tokens live apart, so that a flood of made-up ones pushes out no real one.
//! Nobody is asked anything here.
//!
//! Responses of the issuer are ordered by when their requests began, not by when they arrive: a
//! response changes nothing that a later request, or a later withdrawal, has established. Changes
//! exclude each other; reading takes no lock.

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
    wire::tokens::{Listed, ListedSecret, TokenList},
};

/// How long a token that its issuer took back is refused without asking: longer than the issuer's
/// own caches (Unleash refreshes them every minute) may still call it valid.
const REVOKED_FOR: Duration = Duration::from_mins(10);

/// When a request to the issuer began: its response is as old as that, whenever it arrives.
#[derive(Clone, Copy, Debug)]
pub(super) struct RequestStart {
    /// Its place in the order of all requests and withdrawals.
    order: u64,
    /// Monotonic, since [`Verdicts::started`]; 0 is never.
    monotonic_ms: u64,
    /// For what is displayed, and for the expiry of listed tokens.
    wall: Timestamp,
}

impl RequestStart {
    /// Before every request of this process.
    pub(super) const NEVER: Self = Self { order: 0, monotonic_ms: 0, wall: Timestamp::UNIX_EPOCH };
}

/// A token that its issuer called valid.
#[derive(Debug)]
pub struct Verdict {
    grant: Arc<Grant>,
    masked: Arc<str>,
    selector: Option<Box<str>>,
    /// Whether the issuer's own list has shown it, so that its absence there means revocation.
    listed: AtomicBool,
    /// The order of the latest request that confirmed it.
    confirmed: AtomicU64,
    /// When that request began, in monotonic milliseconds; 0 is never.
    confirmed_ms: AtomicU64,
    /// The same by the wall clock, in seconds of Unix time.
    checked: AtomicI64,
    /// The order of the latest event that made it doubtful.
    doubted: AtomicU64,
    /// The order of the latest request that denied it.
    denied: AtomicU64,
    /// When it was last taken to be asked about, or when it may be next, in monotonic milliseconds.
    ask_after_ms: AtomicU64,
    /// The plaintext, once it has been presented to this process.
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
            checked: AtomicI64::new(0),
            doubted: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            ask_after_ms: AtomicU64::new(0),
            token: OnceLock::new(),
        }
    }

    /// What the token allows.
    pub fn grant(&self) -> &Arc<Grant> {
        &self.grant
    }

    /// What may be shown of the token.
    pub fn masked(&self) -> &str {
        &self.masked
    }

    /// When the issuer last confirmed the token, by the wall clock.
    pub fn checked(&self) -> Timestamp {
        Timestamp::from_second(self.checked.load(Ordering::Relaxed))
            .unwrap_or(Timestamp::UNIX_EPOCH)
    }

    /// Whether this process has yet to see the token's plaintext.
    pub fn wants_plaintext(&self) -> bool {
        self.token.get().is_none()
    }

    /// Keeps the plaintext of a token that was known by its digest only.
    pub fn learn(&self, token: Token) {
        // Losing the race against another request that learns the same token changes nothing.
        let _ = self.token.set(token);
    }

    fn is_listed(&self) -> bool {
        self.listed.load(Ordering::Relaxed)
    }

    /// Whether a request that began after `start` has confirmed it.
    fn is_newer_than(&self, start: RequestStart) -> bool {
        self.confirmed.load(Ordering::Relaxed) > start.order
    }

    fn confirm(&self, start: RequestStart) {
        if !self.is_newer_than(start) {
            self.confirmed.store(start.order, Ordering::Relaxed);
            self.confirmed_ms.store(start.monotonic_ms, Ordering::Relaxed);
            self.checked.store(start.wall.as_second(), Ordering::Relaxed);
        }
    }

    /// Makes the next revalidation ask for this one, however young it is, unless a request that
    /// began after `order` has confirmed it.
    fn doubt(&self, order: u64) {
        self.doubted.fetch_max(order, Ordering::Relaxed);
    }

    /// Whether it is doubtful, or was last confirmed before `limit_ms`.
    fn is_due(&self, limit_ms: Option<u64>) -> bool {
        let confirmed_ms = self.confirmed_ms.load(Ordering::Relaxed);
        confirmed_ms == 0
            || self.doubted.load(Ordering::Relaxed) > self.confirmed.load(Ordering::Relaxed)
            || limit_ms.is_some_and(|limit| confirmed_ms < limit)
    }

    /// Notes that a request denied it; true if one before did so as well, and none has confirmed it
    /// since.
    fn deny(&self, start: RequestStart) -> bool {
        let before = self.denied.swap(start.order, Ordering::Relaxed);
        before > self.confirmed.load(Ordering::Relaxed)
    }

    /// The verdict on the same token with another grant.
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

/// Why a token is refused without asking.
#[derive(Debug)]
struct Refusal {
    /// The order of the request that told so.
    order: u64,
    /// The public half of a v2 token, by which a list can tell that it exists by now.
    selector: Option<Box<str>>,
    /// What the token would allow, if the issuer knows it and forbids its use.
    forbidden: Option<Arc<Grant>>,
}

/// What became of a token that its issuer calls valid.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Accepted {
    /// It was not known before, or allows something else now.
    New,
    /// It was known already.
    Known,
    /// A later request has told that it is not valid.
    Outdated,
    /// It has lately been revoked and stays so.
    Revoked,
}

/// What became of a token that its issuer does not call valid.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Rejected {
    /// It is refused from now on.
    Refused,
    /// It was valid and remains so until it is denied again.
    Doubted,
    /// A later request has confirmed it.
    Outdated,
}

/// What reading a list changed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Changes {
    /// Tokens that were not known before, or allow something else now.
    pub(super) learned: usize,
    /// Known tokens that the list no longer has.
    pub(super) revoked: usize,
    /// Known tokens of which the list proves nothing: they are asked for again.
    pub(super) suspected: usize,
}

/// Every verdict that is kept.
#[derive(Debug)]
pub(super) struct Verdicts {
    valid: Cache<TokenDigest, Arc<Verdict>, RandomState>,
    refused: Cache<TokenDigest, Arc<Refusal>, RandomState>,
    /// Tokens that have lately been revoked, with the order of that: v2 tokens by their selector,
    /// by which they can be revoked unseen, all others by their digest.
    revoked: Cache<TokenDigest, u64, RandomState>,
    revoked_selectors: Cache<Box<str>, u64, RandomState>,
    unsaved: AtomicBool,
    started: Instant,
    /// Whoever changes anything holds it.
    changing: Mutex<Changing>,
    capacity: usize,
}

/// What only changes read.
#[derive(Debug, Default)]
struct Changing {
    /// The order of the latest event.
    order: u64,
    /// What the latest list had: a token that the next list lacks has been revoked, whether or not it
    /// is known here.
    listed: HashSet<TokenDigest>,
    /// The same of v2 tokens.
    listed_selectors: HashSet<Box<str>>,
}

impl Changing {
    /// The order of what happens now.
    fn next(&mut self) -> u64 {
        self.order += 1;
        self.order
    }
}

impl Verdicts {
    /// Room for `capacity` valid verdicts and as many refusals, which are believed for
    /// `refuse_for`.
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
                // What was revoked last counts most, although nobody has presented it yet.
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

    /// Notes that a request to the issuer begins now.
    pub(super) fn start_request(&self) -> RequestStart {
        RequestStart {
            order: self.lock().next(),
            monotonic_ms: self.millis(Instant::now()).max(1),
            wall: Timestamp::now(),
        }
    }

    /// The verdict on a valid token.
    pub(super) fn valid(&self, digest: &TokenDigest) -> Option<Arc<Verdict>> {
        self.valid.get(digest)
    }

    /// Why a token of this digest is refused without asking, if it is.
    pub(super) fn refusal(&self, digest: &TokenDigest) -> Option<Denied> {
        if self.revoked.contains_key(digest) {
            return Some(Denied::Unknown);
        }
        let refusal = self.refused.get(digest)?;
        Some(if refusal.forbidden.is_some() { Denied::Forbidden } else { Denied::Unknown })
    }

    /// Whether `token` is a v2 token that has lately been revoked by its selector, perhaps before anybody
    /// presented it. What is known by digest, [`Verdicts::refusal`] tells.
    pub(super) fn is_revoked_by_selector(&self, token: &Token) -> bool {
        let is_revoked = |selector: &str| self.revoked_selectors.contains_key(selector);
        token.selector().is_some_and(is_revoked)
    }

    /// Whether `token` has lately been revoked.
    fn is_revoked(&self, token: &Token) -> bool {
        // An earlier release has saved v2 tokens by their digests, too.
        self.is_revoked_by_selector(token) || self.revoked.contains_key(&token.digest())
    }

    /// What is known of `token`: its grant, or why it is refused.
    pub(super) fn known(&self, token: &Token) -> Option<Result<Arc<Grant>, Denied>> {
        let digest = token.digest();
        if let Some(verdict) = self.valid.get(&digest) {
            return Some(Ok(Arc::clone(verdict.grant())));
        }
        if self.is_revoked(token) {
            return Some(Err(Denied::Unknown));
        }
        self.refusal(&digest).map(Err)
    }

    /// What a token would allow whose use the issuer forbids.
    pub(super) fn forbidden(&self, digest: &TokenDigest) -> Option<Arc<Grant>> {
        self.refused.get(digest)?.forbidden.clone()
    }

    /// Keeps that the issuer calls `token` valid, unless it has lately been revoked: the issuer's
    /// caches may be older than the list that told of the revocation.
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
        let verdict = match self.valid.get(&digest) {
            Some(known) if known.is_newer_than(start) || *known.grant == grant => {
                known.confirm(start);
                if known.wants_plaintext() {
                    known.learn(token.clone());
                }
                return Accepted::Known;
            }
            Some(known) => known.with_grant(grant, start),
            None => {
                let verdict =
                    Verdict::unconfirmed(Arc::new(grant), token.masked(), token.selector());
                verdict.confirm(start);
                verdict
            }
        };
        if verdict.wants_plaintext() {
            verdict.learn(token.clone());
        }
        self.valid.insert(digest, Arc::new(verdict));
        self.unsaved.store(true, Ordering::Relaxed);
        Accepted::New
    }

    /// Keeps that the issuer does not know `token`.
    pub(super) fn refuse(&self, token: &Token, start: RequestStart) -> Rejected {
        let _changing = self.lock();
        self.reject(token, None, start)
    }

    /// Keeps that the issuer does not know `token`, which it may have called valid before: then a
    /// denial counts when it is repeated.
    pub(super) fn deny(&self, token: &Token, start: RequestStart) -> Rejected {
        let _changing = self.lock();
        match self.valid.get(&token.digest()) {
            Some(known) if !known.is_newer_than(start) && !known.deny(start) => Rejected::Doubted,
            _ => self.reject(token, None, start),
        }
    }

    /// Keeps that the issuer knows `token` and forbids its use.
    ///
    /// One that is in use stays so: only who does not know it any more has revoked it.
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

    /// Forgets the verdict on a valid token.
    pub(super) fn forget(&self, digest: &TokenDigest) {
        let _changing = self.lock();
        if self.valid.remove(digest).is_some() {
            self.unsaved.store(true, Ordering::Relaxed);
        }
    }

    /// Takes over the issuer's own list of all its tokens.
    ///
    /// A verdict that came from such a list falls with its entry, at once and for longer than the
    /// issuer's caches live. One that never was on a list (issuers keep some to themselves) is only
    /// suspected, and so is one that an item stands for which cannot be read.
    ///
    /// Being listed admits a token only to `served` environments: the issuer may forbid the use of
    /// others, which is found out when they are presented.
    pub(super) fn take_list(
        &self,
        list: &TokenList,
        served: &BTreeSet<Environment>,
        start: RequestStart,
    ) -> Changes {
        let unreadable = list.unreadable_names();
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
            .retain(|it| !selectors.contains_key(&**it) && !unreadable.may_have_selector(it));
        for selector in &gone_selectors {
            self.revoke_selector(selector, start.order);
        }
        let now_listed = digests.iter().take(self.capacity).copied().collect();
        let mut gone = std::mem::replace(&mut changing.listed, now_listed);
        gone.retain(|it| !digests.contains(it) && !unreadable.may_have(it, None));
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
        for (digest, verdict) in &self.valid {
            let digest = *digest;
            let selector = verdict.selector.as_deref();
            let entry = selector.and_then(|it| selectors.get(it));
            if let Some(entry) = entry {
                changes.learned += usize::from(self.follow_entry(digest, &verdict, entry, start));
            } else if digests.contains(&digest) {
                self.show(&verdict);
            } else if (verdict.is_listed() && !unreadable.may_have(&digest, selector))
                || selector.map_or(gone.contains(&digest), |it| gone_selectors.contains(it))
            {
                self.revoke(digest, selector, start.order);
                changes.revoked += 1;
            } else {
                verdict.doubt(start.order);
                changes.suspected += 1;
            }
        }
        changes
    }

    /// Whether a listed token needs no other proof that its issuer lets it be used.
    fn is_admitted_by_list(
        &self,
        digest: &TokenDigest,
        entry: &Listed,
        served: &BTreeSet<Environment>,
    ) -> bool {
        let is_served = entry.kind == TokenKind::Admin || served.contains(&entry.environment);
        self.valid.contains_key(digest)
            || (is_served && self.forbidden(digest).is_none_or(|it| *it != entry.grant()))
    }

    /// Lets a listed token be asked for again, unless it is known that its use is forbidden.
    fn take_back_refusal(&self, digest: &TokenDigest, entry: &Listed, start: RequestStart) {
        let is_taken_back = |refusal: &Refusal| {
            refusal.order < start.order
                && refusal.forbidden.as_deref().is_none_or(|it| *it != entry.grant())
        };
        if self.refused.get(digest).is_some_and(|it| is_taken_back(&it)) {
            self.refused.invalidate(digest);
        }
    }

    /// Lets a listed v2 token be asked for again.
    fn reinstate(&self, selector: &str, start: RequestStart) {
        if self.revoked_selectors.get(selector).is_some_and(|revoked| revoked < start.order) {
            self.revoked_selectors.invalidate(selector);
            self.unsaved.store(true, Ordering::Relaxed);
        }
    }

    /// Confirms a known v2 token that is listed; true if it allows something else now.
    fn follow_entry(
        &self,
        digest: TokenDigest,
        known: &Arc<Verdict>,
        entry: &Listed,
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

    /// Keeps that the list shows a token.
    fn show(&self, known: &Verdict) {
        if !known.listed.swap(true, Ordering::Relaxed) {
            self.unsaved.store(true, Ordering::Relaxed);
        }
    }

    /// Takes note that the issuer has just deleted a token, before any list tells.
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

    /// Makes the next revalidation ask for a token, however young its verdict is.
    pub(super) fn suspect(&self, named: &ListedSecret) {
        let mut changing = self.lock();
        let order = changing.next();
        for (_, verdict) in self.named(named) {
            verdict.doubt(order);
        }
    }

    fn named<'a>(
        &'a self,
        named: &'a ListedSecret,
    ) -> impl Iterator<Item = (TokenDigest, Arc<Verdict>)> + 'a {
        let is_named = |digest: &TokenDigest, verdict: &Verdict| match named {
            ListedSecret::Full(token) => token.digest() == *digest,
            ListedSecret::Selector(selector) => verdict.selector.as_deref() == Some(selector),
        };
        let known = self.valid.iter().filter(move |(digest, verdict)| is_named(digest, verdict));
        known.map(|(digest, verdict)| (*digest, verdict))
    }

    /// The plaintexts of valid tokens that are doubtful or were last confirmed longer than `age`
    /// ago, at most `most`: those first that have waited longest since they were confirmed or taken
    /// by this.
    ///
    /// Those whose plaintext is yet to be presented are left for then, and those that are postponed
    /// until their time.
    pub(super) fn take_unconfirmed_for(&self, age: Duration, most: usize) -> Vec<Token> {
        let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        let now_ms = self.millis(Instant::now());
        let limit_ms = now_ms.checked_sub(age_ms);
        let is_ready = |verdict: &Verdict| {
            !verdict.wants_plaintext()
                && verdict.is_due(limit_ms)
                && verdict.ask_after_ms.load(Ordering::Relaxed) <= now_ms
        };
        let due = self.valid.iter().map(|(_, verdict)| verdict);
        let mut due: Vec<_> = due.filter(|verdict| is_ready(verdict)).collect();
        due.sort_by_cached_key(|verdict| {
            let confirmed_ms = verdict.confirmed_ms.load(Ordering::Relaxed);
            confirmed_ms.max(verdict.ask_after_ms.load(Ordering::Relaxed))
        });
        due.truncate(most);
        for verdict in &due {
            verdict.ask_after_ms.store(now_ms, Ordering::Relaxed);
        }
        due.iter().filter_map(|verdict| verdict.token.get().cloned()).collect()
    }

    /// Lets a valid token not be asked about again before `pause` is over.
    pub(super) fn postpone(&self, digest: &TokenDigest, pause: Duration) {
        if let Some(verdict) = self.valid.get(digest) {
            let until_ms = self.millis(Instant::now() + pause);
            verdict.ask_after_ms.fetch_max(until_ms, Ordering::Relaxed);
        }
    }

    /// Every valid verdict, for the operator's eyes.
    pub(super) fn all_valid(&self) -> Vec<Arc<Verdict>> {
        self.valid.iter().map(|(_, verdict)| verdict).collect()
    }

    /// The same with the digests of their tokens.
    pub(super) fn all_valid_by_digest(&self) -> impl Iterator<Item = (TokenDigest, Arc<Verdict>)> {
        self.valid.iter().map(|(digest, verdict)| (*digest, verdict))
    }

    /// How many tokens are refused at the moment.
    pub(super) fn refused_count(&self) -> u64 {
        let revoked = self.revoked.entry_count() + self.revoked_selectors.entry_count();
        self.refused.entry_count() + revoked
    }

    /// The verdicts to be stored, if there are any that the last call did not give.
    pub(super) fn save(&self) -> Option<Vec<u8>> {
        self.unsaved.swap(false, Ordering::Relaxed).then(|| {
            let saved = |(digest, verdict): (Arc<TokenDigest>, Arc<Verdict>)| Saved {
                digest: *digest,
                grant: Arc::clone(&verdict.grant),
                masked: Arc::clone(&verdict.masked),
                selector: verdict.selector.clone(),
                is_listed: verdict.is_listed(),
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

    /// Says that what [`Verdicts::save`] gave could not be stored.
    pub(super) fn not_saved(&self) {
        self.unsaved.store(true, Ordering::Relaxed);
    }

    /// Takes over what [`Verdicts::save`] gave to an earlier process; tells how many there were.
    ///
    /// They count as unconfirmed: each is asked for as soon as its token is presented, and serves
    /// meanwhile.
    pub(super) fn restore(&self, json: &[u8]) -> Result<usize, RestoreError> {
        let saved = SavedVerdicts::parse(json)?;
        let count = saved.valid.len();
        let _changing = self.lock();
        for Saved { digest, grant, masked, selector, is_listed } in saved.valid {
            let verdict = Verdict::unconfirmed(grant, masked, selector.as_deref());
            verdict.listed.store(is_listed, Ordering::Relaxed);
            self.valid.insert(digest, Arc::new(verdict));
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
