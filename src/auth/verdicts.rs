//! What is known of tokens: bounded caches keyed by digest, and their saved form.
//!
//! Valid and refused tokens live apart, so that a flood of made-up ones pushes out no real one.
//! Nobody is asked anything here.

use std::{
    collections::HashSet,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use jiff::Timestamp;
use moka::sync::Cache;
use serde::{Deserialize, Serialize};

use crate::{
    token::{Environment, Grant, Projects, Scope, Token, TokenDigest, TokenKind},
    wire::tokens::{Listed, ListedSecret},
};

/// How long a token that its issuer took back is refused without asking: longer than the issuer's
/// own caches (Unleash refreshes them every minute) may still call it valid.
const REVOKED_FOR: Duration = Duration::from_mins(10);

/// A token that its issuer called valid.
#[derive(Debug)]
pub struct Verdict {
    grant: Arc<Grant>,
    masked: Arc<str>,
    selector: Option<Box<str>>,
    /// Whether the issuer's own list has shown it, so that its absence there means revocation.
    listed: AtomicBool,
    /// When the issuer last confirmed it, in seconds of Unix time.
    checked: AtomicI64,
    /// The plaintext, once it has been presented to this process.
    token: OnceLock<Token>,
}

impl Verdict {
    /// What the token allows.
    pub fn grant(&self) -> &Arc<Grant> {
        &self.grant
    }

    /// What may be shown of the token.
    pub fn masked(&self) -> &str {
        &self.masked
    }

    /// When the issuer last confirmed the token.
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

    fn confirm(&self, now: Timestamp) {
        self.checked.store(now.as_second(), Ordering::Relaxed);
    }

    /// Makes the next revalidation ask for this one, however young it is.
    fn suspect(&self) {
        self.checked.store(0, Ordering::Relaxed);
    }
}

/// Why a token is refused without asking.
#[derive(Clone, Debug)]
struct Refusal {
    /// The public half of a v2 token, by which a list can tell that it exists by now.
    selector: Option<Box<str>>,
}

impl Refusal {
    fn of(selector: Option<&str>) -> Self {
        Self { selector: selector.map(Into::into) }
    }
}

/// What became of a token that its issuer calls valid.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Accepted {
    /// It was not known before, or allows something else now.
    New,
    /// It was known already.
    Known,
    /// It has lately been revoked and stays so.
    Revoked,
}

/// What reading a list changed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Changes {
    /// Tokens that were not known before.
    pub(super) learned: usize,
    /// Known tokens that the list no longer has.
    pub(super) revoked: usize,
    /// Known tokens that the list never had: they are asked for again.
    pub(super) suspected: usize,
}

/// Every verdict that is kept.
#[derive(Debug)]
pub(super) struct Verdicts {
    valid: Cache<TokenDigest, Arc<Verdict>, RandomState>,
    refused: Cache<TokenDigest, Refusal, RandomState>,
    revoked: Cache<TokenDigest, Refusal, RandomState>,
    unsaved: AtomicBool,
}

impl Verdicts {
    /// Room for `capacity` valid verdicts and as many refusals, which are believed for
    /// `refuse_for`.
    pub(super) fn new(capacity: u64, refuse_for: Duration) -> Self {
        let hasher = RandomState::default;
        let refusals = || Cache::builder().max_capacity(capacity);
        Self {
            valid: Cache::builder().max_capacity(capacity).build_with_hasher(hasher()),
            refused: refusals().time_to_live(refuse_for).build_with_hasher(hasher()),
            revoked: refusals().time_to_live(REVOKED_FOR).build_with_hasher(hasher()),
            unsaved: AtomicBool::new(false),
        }
    }

    /// The verdict on a valid token.
    pub(super) fn valid(&self, digest: &TokenDigest) -> Option<Arc<Verdict>> {
        self.valid.get(digest)
    }

    /// Whether the token is refused without asking.
    pub(super) fn refuses(&self, digest: &TokenDigest) -> bool {
        self.refused.contains_key(digest) || self.revoked.contains_key(digest)
    }

    /// Keeps that the issuer calls `token` valid now, unless it has lately been revoked: an answer
    /// may be older than the list that told of the revocation.
    pub(super) fn accept(&self, token: &Token, grant: Grant, now: Timestamp) -> Accepted {
        let digest = token.digest();
        if self.revoked.contains_key(&digest) {
            return Accepted::Revoked;
        }
        self.refused.invalidate(&digest);
        if let Some(known) = self.valid.get(&digest)
            && *known.grant == grant
        {
            known.confirm(now);
            if known.wants_plaintext() {
                known.learn(token.clone());
            }
            return Accepted::Known;
        }
        let verdict = Verdict {
            grant: Arc::new(grant),
            masked: token.masked(),
            selector: token.selector().map(Into::into),
            listed: AtomicBool::new(false),
            checked: AtomicI64::new(now.as_second()),
            token: OnceLock::from(token.clone()),
        };
        self.valid.insert(digest, Arc::new(verdict));
        self.unsaved.store(true, Ordering::Relaxed);
        Accepted::New
    }

    /// Keeps that the issuer does not know `token`.
    pub(super) fn refuse(&self, token: &Token) {
        let digest = token.digest();
        self.refused.insert(digest, Refusal::of(token.selector()));
        if self.valid.remove(&digest).is_some() {
            self.unsaved.store(true, Ordering::Relaxed);
        }
    }

    /// Forgets the verdict on a valid token.
    pub(super) fn forget(&self, digest: &TokenDigest) {
        if self.valid.remove(digest).is_some() {
            self.unsaved.store(true, Ordering::Relaxed);
        }
    }

    /// Takes over the issuer's own list of all its tokens.
    ///
    /// A verdict that came from such a list falls with its entry, at once and for longer than the
    /// issuer's caches live. One that never was on a list (issuers keep some to themselves) is only
    /// suspected.
    pub(super) fn take_list(&self, list: &[Listed], now: Timestamp) -> Changes {
        let mut changes = Changes::default();
        let (mut digests, mut selectors) = (HashSet::new(), HashSet::new());
        for entry in list.iter().filter(|entry| !entry.is_expired(now)) {
            match &entry.secret {
                ListedSecret::Full(token) => {
                    let digest = token.digest();
                    self.revoked.invalidate(&digest);
                    let accepted = self.accept(token, entry.grant(), now);
                    changes.learned += usize::from(accepted == Accepted::New);
                    digests.insert(digest);
                }
                ListedSecret::Selector(selector) => {
                    selectors.insert(selector.as_str());
                }
            }
        }
        for (digest, verdict) in &self.valid {
            let present = match &verdict.selector {
                Some(selector) => selectors.contains(&**selector),
                None => digests.contains(&*digest),
            };
            if present {
                if !verdict.listed.swap(true, Ordering::Relaxed) {
                    self.unsaved.store(true, Ordering::Relaxed);
                }
                verdict.confirm(now);
            } else if verdict.listed.load(Ordering::Relaxed) {
                self.revoke(*digest, verdict.selector.as_deref());
                changes.revoked += 1;
            } else {
                verdict.suspect();
                changes.suspected += 1;
            }
        }
        for refusals in [&self.refused, &self.revoked] {
            for (digest, Refusal { selector }) in refusals {
                if selector.as_deref().is_some_and(|selector| selectors.contains(selector)) {
                    refusals.invalidate(&*digest);
                }
            }
        }
        changes
    }

    /// Takes note that the issuer has just deleted a token, before any list tells.
    pub(super) fn withdraw(&self, named: &ListedSecret) -> Vec<TokenDigest> {
        let mut digests: Vec<_> = self.named(named).map(|(digest, _)| digest).collect();
        if let ListedSecret::Full(token) = named {
            digests.push(token.digest());
        }
        for digest in &digests {
            let selector = match named {
                ListedSecret::Full(token) => token.selector(),
                ListedSecret::Selector(selector) => Some(selector.as_str()),
            };
            self.revoke(*digest, selector);
        }
        digests
    }

    /// Makes the next revalidation ask for a token, however young its verdict is.
    pub(super) fn suspect(&self, named: &ListedSecret) {
        for (_, verdict) in self.named(named) {
            verdict.suspect();
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

    /// The plaintexts of valid tokens that were not confirmed since `limit`.
    ///
    /// Those whose plaintext is yet to be presented are left for then.
    pub(super) fn unconfirmed_since(&self, limit: Timestamp) -> Vec<Token> {
        let old = |verdict: &Verdict| verdict.checked() < limit;
        self.valid
            .iter()
            .filter(|(_, verdict)| old(verdict))
            .filter_map(|(_, v)| v.token.get().cloned())
            .collect()
    }

    /// Every valid verdict, for the operator's eyes.
    pub(super) fn all_valid(&self) -> Vec<Arc<Verdict>> {
        self.valid.iter().map(|(_, verdict)| verdict).collect()
    }

    /// How many tokens are refused at the moment.
    pub(super) fn refused_count(&self) -> u64 {
        self.refused.entry_count() + self.revoked.entry_count()
    }

    /// The verdicts to be stored, if there are any that the last call did not give.
    pub(super) fn save(&self) -> Option<Vec<u8>> {
        self.unsaved.swap(false, Ordering::Relaxed).then(|| {
            let verdicts = self.valid.iter().map(|(digest, verdict)| Saved::of(&digest, &verdict));
            let revoked = self.revoked.iter().map(|(digest, _)| digest.hex());
            let saved = SavedVerdicts {
                version: SAVED_VERSION,
                verdicts: verdicts.collect(),
                revoked: revoked.collect(),
            };
            serde_json::to_vec(&saved).expect("verdicts are plain text and numbers")
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
    pub(super) fn restore(&self, saved: &[u8]) -> Result<usize, RestoreError> {
        let saved: SavedVerdicts = serde_json::from_slice(saved)?;
        if saved.version != SAVED_VERSION {
            return Err(RestoreError::Version(saved.version));
        }
        let mut count = 0;
        for (digest, verdict) in saved.verdicts.iter().filter_map(Saved::verdict) {
            self.valid.insert(digest, Arc::new(verdict));
            count += 1;
        }
        for digest in saved.revoked.iter().filter_map(|hex| TokenDigest::from_hex(hex)) {
            self.revoked.insert(digest, Refusal::of(None));
        }
        Ok(count)
    }

    fn revoke(&self, digest: TokenDigest, selector: Option<&str>) {
        self.revoked.insert(digest, Refusal::of(selector));
        self.valid.invalidate(&digest);
        self.unsaved.store(true, Ordering::Relaxed);
    }
}

/// Why saved verdicts cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Not the JSON that was saved.
    #[error("saved verdicts are malformed")]
    Malformed(#[from] serde_json::Error),
    /// Written by another version of the format.
    #[error("saved verdicts have format version {0}, not {SAVED_VERSION}")]
    Version(u32),
}

const SAVED_VERSION: u32 = 1;

#[derive(Deserialize, Serialize)]
struct SavedVerdicts {
    version: u32,
    verdicts: Vec<Saved>,
    /// Digests of tokens that their issuer took back not long ago.
    #[serde(default)]
    revoked: Vec<String>,
}

/// A verdict as it is stored; never the token.
#[derive(Deserialize, Serialize)]
struct Saved {
    digest: String,
    kind: String,
    environment: String,
    projects: Vec<String>,
    masked: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    selector: Option<String>,
    #[serde(default)]
    listed: bool,
}

impl Saved {
    fn of(digest: &TokenDigest, verdict: &Verdict) -> Self {
        let scope = &verdict.grant.scope;
        Self {
            digest: digest.hex(),
            kind: verdict.grant.kind.as_str().to_owned(),
            environment: scope.environment.as_str().to_owned(),
            projects: scope.projects.to_list().into_iter().map(str::to_owned).collect(),
            masked: verdict.masked.as_ref().to_owned(),
            selector: verdict.selector.as_deref().map(str::to_owned),
            listed: verdict.listed.load(Ordering::Relaxed),
        }
    }

    /// The verdict again; `None` for an entry that cannot be read, which then is asked for anew.
    fn verdict(&self) -> Option<(TokenDigest, Verdict)> {
        let scope = Scope {
            environment: Environment::new(&self.environment),
            projects: Projects::from_list(self.projects.iter().map(String::as_str)),
        };
        let verdict = Verdict {
            grant: Arc::new(Grant { kind: TokenKind::parse(&self.kind)?, scope }),
            masked: self.masked.as_str().into(),
            selector: self.selector.as_deref().map(Into::into),
            listed: AtomicBool::new(self.listed),
            checked: AtomicI64::new(0),
            token: OnceLock::new(),
        };
        Some((TokenDigest::from_hex(&self.digest)?, verdict))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "*:dev.v2_AbCdEfGhIjKlMnOpQrStUv_0123456789_123456789-123456789_123456789ABC";

    fn token(text: &str) -> Token {
        Token::parse(text).unwrap()
    }

    fn grant() -> Grant {
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        Grant { kind: TokenKind::Client, scope }
    }

    fn listed(secret: ListedSecret) -> Listed {
        let Grant { kind, scope: Scope { environment, projects } } = grant();
        let (expires_at, created_at, seen_at) = (None, None, None);
        let name = "sdk".to_owned();
        Listed { name, kind, environment, projects, expires_at, created_at, seen_at, secret }
    }

    fn whole(token: &Token) -> Listed {
        listed(ListedSecret::Full(token.clone()))
    }

    fn selector(text: &str) -> Listed {
        listed(ListedSecret::Selector(text.to_owned()))
    }

    fn verdicts() -> Verdicts {
        Verdicts::new(100, Duration::from_secs(30))
    }

    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    #[test]
    fn a_token_that_left_the_list_is_refused_even_if_it_would_validate() {
        let verdicts = verdicts();
        let (a, b) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
        verdicts.take_list(&[whole(&a), whole(&b)], now());
        let changes = verdicts.take_list(&[whole(&b)], now());
        assert_eq!(changes, Changes { learned: 0, revoked: 1, suspected: 0 });
        assert!(verdicts.valid(&a.digest()).is_none());
        assert!(verdicts.refuses(&a.digest()));
        assert!(verdicts.valid(&b.digest()).is_some());
    }

    #[test]
    fn a_listed_token_past_its_end_is_as_good_as_gone() {
        let verdicts = verdicts();
        let (a, b) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
        verdicts.take_list(&[whole(&a), whole(&b)], now());
        let expired = Listed { expires_at: Some(now()), ..whole(&a) };
        assert_eq!(verdicts.take_list(&[expired, whole(&b)], now()).revoked, 1);
    }

    #[test]
    fn a_token_that_was_never_listed_is_only_suspected() {
        let verdicts = verdicts();
        let (own, other) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
        verdicts.accept(&own, grant(), now());
        assert!(verdicts.unconfirmed_since(now()).is_empty());
        verdicts.take_list(&[whole(&other)], now());
        assert!(verdicts.valid(&own.digest()).is_some());
        assert_eq!(verdicts.unconfirmed_since(now()), [own]);
    }

    #[test]
    fn a_v2_token_stands_and_falls_with_its_selector() {
        let verdicts = verdicts();
        let secure = token(V2);
        verdicts.accept(&secure, grant(), now());
        verdicts.take_list(&[selector(secure.selector().unwrap())], now());
        assert!(verdicts.valid(&secure.digest()).is_some());
        verdicts.take_list(&[selector("another-selector-here_")], now());
        assert!(verdicts.refuses(&secure.digest()));
    }

    #[test]
    fn a_revoked_token_stays_revoked_whatever_is_still_said_of_it() {
        let verdicts = verdicts();
        let (a, b) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
        verdicts.take_list(&[whole(&a), whole(&b)], now());
        verdicts.take_list(&[whole(&b)], now());
        assert_eq!(verdicts.accept(&a, grant(), now()), Accepted::Revoked);
        assert!(verdicts.refuses(&a.digest()));
        let after_a_restart = self::verdicts();
        after_a_restart.restore(&verdicts.save().unwrap()).unwrap();
        assert!(after_a_restart.refuses(&a.digest()));
        verdicts.take_list(&[whole(&a), whole(&b)], now());
        assert!(verdicts.valid(&a.digest()).is_some(), "the list has it again");
    }

    #[test]
    fn that_a_token_is_listed_outlives_a_restart() {
        let (old, new) = (verdicts(), verdicts());
        let (secure, other) = (token(V2), token("*:dev.bbbb"));
        old.accept(&secure, grant(), now());
        old.save().unwrap();
        old.take_list(&[selector(secure.selector().unwrap())], now());
        new.restore(&old.save().expect("it is listed now")).unwrap();
        assert_eq!(new.take_list(&[whole(&other)], now()).revoked, 1);
    }

    #[test]
    fn a_revoked_v2_token_that_is_listed_again_is_asked_for_again() {
        let verdicts = verdicts();
        let secure = token(V2);
        verdicts.revoke(secure.digest(), secure.selector());
        verdicts.take_list(&[selector(secure.selector().unwrap())], now());
        assert!(!verdicts.refuses(&secure.digest()));
    }

    #[test]
    fn a_refused_token_that_appears_on_the_list_is_no_longer_refused() {
        let verdicts = verdicts();
        let (plain, secure) = (token("*:dev.aaaa"), token(V2));
        verdicts.refuse(&plain);
        verdicts.refuse(&secure);
        let list = [whole(&plain), selector(secure.selector().unwrap())];
        verdicts.take_list(&list, now());
        assert!(verdicts.valid(&plain.digest()).is_some());
        assert!(!verdicts.refuses(&secure.digest()), "it is asked for when it comes again");
    }

    #[test]
    fn saved_verdicts_come_back_without_any_plaintext() {
        let (old, new) = (verdicts(), verdicts());
        let secure = token(V2);
        old.accept(&secure, grant(), now());
        let saved = old.save().expect("there is a new verdict");
        assert!(old.save().is_none(), "nothing changed since");
        assert!(!String::from_utf8_lossy(&saved).contains(secure.expose()));
        assert_eq!(new.restore(&saved).unwrap(), 1);
        let verdict = new.valid(&secure.digest()).unwrap();
        assert_eq!(**verdict.grant(), grant());
        assert!(verdict.wants_plaintext());
        assert!(new.unconfirmed_since(now()).is_empty(), "nobody can be asked without plaintext");
        verdict.learn(secure.clone());
        assert_eq!(new.unconfirmed_since(now()), [secure]);
    }

    /// The file format of the first release, as it was written then.
    #[test]
    fn version_1_of_the_saved_form_is_read() {
        let saved = br#"{"version":1,"verdicts":[{"digest":
            "9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0","kind":"frontend",
            "environment":"dev","projects":["web"],"masked":"web:dev.****","listed":true}]}"#;
        let verdicts = verdicts();
        assert_eq!(verdicts.restore(saved).unwrap(), 1);
        let verdict = verdicts.valid(&TokenDigest::of("aaaa")).map(|v| v.masked().to_owned());
        assert_eq!(verdict, None);
        assert!(verdicts.restore(br#"{"version":2,"verdicts":[]}"#).is_err());
    }

    #[test]
    fn made_up_tokens_push_out_no_valid_one() {
        let verdicts = verdicts();
        let real = token("*:dev.aaaa");
        verdicts.accept(&real, grant(), now());
        for i in 0..10_000 {
            verdicts.refuse(&token(&format!("*:dev.made-up-{i}")));
        }
        verdicts.refused.run_pending_tasks();
        assert!(verdicts.valid(&real.digest()).is_some());
        assert!(verdicts.refused_count() <= 100);
    }
}
