//! Authentication of API tokens, with a cache of validated ones.
//!
//! Cached tokens are answered from memory. Only a first-seen token waits: all requests that present
//! it share one validation, which is batched with those of other tokens, rate limited and subject to
//! a deadline. While upstream is unreachable, cached tokens keep their state.
//!
//! This module returns what a token grants. It does not know which route needs which kind of token.

mod given;
mod queue;
#[cfg(test)]
mod tests;
mod verdicts;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};
use tokio::{sync::Notify, time::Instant};
use tracing::{info, warn};

use self::{
    given::Given,
    queue::{Behalf, Queue},
    verdicts::{Accepted, Rejected, RequestStart, Verdicts},
};
pub use self::{
    queue::Denied,
    verdicts::{RestoreError, Verdict},
};
use crate::{
    telemetry::error_chain,
    token::{Environment, Grant, Token, TokenDigest, TokenKind},
    upstream::{Access, AdminToken, Credentials, Upstream},
    wire::tokens::{ListedSecret, TokenList, ValidatedToken},
};

/// How validated and rejected tokens are cached.
#[derive(Clone, Debug)]
pub struct Config {
    /// The age at which a valid token is validated again.
    pub revalidate_after: Duration,
    /// How long a token that upstream does not know is rejected from the cache.
    pub forget_invalid_after: Duration,
    /// The interval at which upstream's token list is polled (with an admin token).
    pub list_interval: Duration,
    /// The longest that a request waits for the validation of a first-seen token.
    pub deadline: Duration,
    /// The maximum number of valid tokens, and separately of rejected ones, in the cache.
    pub capacity: u64,
}

/// The accepted token of a request.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Kind, environment and projects of the token.
    pub grant: Arc<Grant>,
    /// The digest of the token.
    pub digest: TokenDigest,
    /// Whether this request is the first of this process to present it.
    pub first_seen: bool,
}

/// The result of looking a token up without a request to upstream.
enum Known {
    /// The token is cached as valid or rejected, or is malformed.
    Judged(Result<Admission, Denied>),
    /// The token is valid according to an earlier process and is presented to this one for the first
    /// time.
    FirstSeen(Arc<Verdict>, TokenDigest),
    /// The token is not cached.
    Not(Token, TokenDigest),
}

/// Where tokens are validated that are not cached.
#[derive(Debug)]
pub enum Authority {
    /// Nowhere: only static tokens are valid.
    Nobody,
    /// At upstream.
    Upstream(Box<Issuer>),
}

/// Validates tokens at upstream.
#[derive(Debug)]
pub struct Issuer {
    /// The client of upstream's API.
    pub upstream: Upstream,
    /// Authorizes reading upstream's token list.
    pub admin: Option<AdminToken>,
    /// Receives each valid client token, to fetch flags with where the edge has no token configured.
    pub credentials: Credentials,
    /// Notified when a new credential extends the set of flags that can be fetched.
    pub discovered: Arc<Notify>,
}

/// Authenticates tokens. A cheap handle.
#[derive(Clone, Debug)]
pub struct Authenticator(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: Config,
    authority: Authority,
    given: Given,
    verdicts: Verdicts,
    queue: Queue,
    tally: Tally,
    /// Requests a poll of upstream's token list before the next interval.
    relist: Notify,
    /// Whether the latest validation request to upstream failed.
    unanswered: AtomicBool,
    /// Whether the latest poll of upstream's token list failed.
    is_list_unread: AtomicBool,
    /// No validation request is sent before this time (`Retry-After` of upstream).
    ask_not_before: Mutex<Instant>,
}

impl Authenticator {
    /// Accepts the `given` static tokens, and those that the validator accepts.
    pub fn new(
        config: Config,
        authority: Authority,
        given: impl IntoIterator<Item = (TokenDigest, Grant)>,
    ) -> Self {
        Self(Arc::new(Inner {
            verdicts: Verdicts::new(config.capacity, config.forget_invalid_after),
            given: Given::new(given),
            queue: Queue::default(),
            tally: Tally::new(),
            relist: Notify::new(),
            unanswered: AtomicBool::new(false),
            is_list_unread: AtomicBool::new(false),
            ask_not_before: Mutex::new(Instant::now()),
            authority,
            config,
        }))
    }

    /// Authenticates the token of an authorization header, with or without `Bearer`.
    ///
    /// Waits for a first-seen token only, at most for the configured deadline. The future is
    /// cancel-safe: a validation in flight still completes for other requests.
    pub async fn authenticate(&self, header: &str) -> Result<Admission, Denied> {
        self.admit(header, Behalf::Bearer).await
    }

    /// Like [`Self::authenticate`], from the cache only; `None` for a token that has to be validated or
    /// is presented for the first time.
    pub fn authenticate_known(&self, header: &str) -> Option<Result<Admission, Denied>> {
        match self.recall(header) {
            Known::Judged(result) => Some(result),
            Known::FirstSeen(..) | Known::Not(..) => None,
        }
    }

    async fn admit(&self, header: &str, priority: Behalf) -> Result<Admission, Denied> {
        match self.recall(header) {
            Known::Judged(result) => result,
            Known::FirstSeen(cached, digest) => {
                self.0.tally.known.increment(1);
                self.0.learn(&cached, header);
                Ok(Admission { grant: Arc::clone(cached.grant()), digest, first_seen: true })
            }
            Known::Not(token, digest) => self.ask(token, digest, priority).await,
        }
    }

    /// Looks up the token of an authorization header without a request to upstream.
    fn recall(&self, header: &str) -> Known {
        let inner = &*self.0;
        let digest = TokenDigest::of(Token::strip_bearer(header));
        if let Some(grant) = inner.given.admit(&digest) {
            inner.tally.known.increment(1);
            return Known::Judged(Ok(Admission { grant, digest, first_seen: false }));
        }
        if let Some(cached) = inner.verdicts.valid(&digest) {
            if cached.wants_plaintext() {
                return Known::FirstSeen(cached, digest);
            }
            inner.tally.known.increment(1);
            let grant = Arc::clone(cached.grant());
            return Known::Judged(Ok(Admission { grant, digest, first_seen: false }));
        }
        if let Some(denied) = inner.verdicts.refusal(&digest) {
            inner.tally.refused.increment(1);
            return Known::Judged(Err(denied));
        }
        let Ok(token) = Token::from_header(header) else {
            inner.tally.malformed.increment(1);
            return Known::Judged(Err(Denied::Unknown));
        };
        if inner.verdicts.is_revoked_by_selector(&token) {
            inner.tally.refused.increment(1);
            return Known::Judged(Err(Denied::Unknown));
        }
        Known::Not(token, digest)
    }

    /// The current grant of a token that was accepted before; `None` once it is no longer valid. Counts
    /// as a use of the token.
    pub fn standing(&self, digest: &TokenDigest) -> Option<Arc<Grant>> {
        let cached = || Some(Arc::clone(self.0.verdicts.valid(digest)?.grant()));
        self.0.given.admit(digest).or_else(cached)
    }

    /// Replaces all static tokens.
    ///
    /// Takes time linear in the number of tokens; concurrent requests see the previous set until then.
    pub fn set_given(&self, given: impl IntoIterator<Item = (TokenDigest, Grant)>) {
        self.0.given.replace(given);
    }

    /// The static tokens that were presented since the last call.
    pub fn take_used(&self) -> Vec<TokenDigest> {
        self.0.given.take_used()
    }

    /// Validates tokens on behalf of another client, for instance another edge. The results are in the
    /// order of `tokens`, `None` for invalid ones. A token whose use upstream forbids counts as valid,
    /// as it does at upstream.
    pub async fn judge(&self, tokens: &[Token]) -> Result<Vec<Option<Arc<Grant>>>, Denied> {
        let results = tokens.iter().map(|token| async {
            match self.admit(token.expose(), Behalf::Other).await {
                Ok(admission) => Ok(Some(admission.grant)),
                Err(Denied::Unknown) => Ok(None),
                Err(Denied::Forbidden) => {
                    let grant = self.0.verdicts.forbidden(&token.digest());
                    grant.map(Some).ok_or(Denied::Unavailable)
                }
                Err(Denied::Unavailable) => Err(Denied::Unavailable),
            }
        });
        futures_util::future::join_all(results).await.into_iter().collect()
    }

    async fn ask(
        &self,
        token: Token,
        digest: TokenDigest,
        priority: Behalf,
    ) -> Result<Admission, Denied> {
        let inner = &*self.0;
        if matches!(inner.authority, Authority::Nobody) {
            inner.tally.refused.increment(1);
            return Err(Denied::Unknown);
        }
        let Some(answer) = inner.queue.join(token, priority) else {
            inner.tally.unavailable.increment(1);
            return Err(Denied::Unavailable);
        };
        let answer = match tokio::time::timeout(inner.config.deadline, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(Denied::Unavailable),
        };
        match &answer {
            Ok(_) => inner.tally.accepted.increment(1),
            Err(Denied::Unknown | Denied::Forbidden) => inner.tally.rejected.increment(1),
            Err(Denied::Unavailable) => inner.tally.unavailable.increment(1),
        }
        answer.map(|grant| Admission { grant, digest, first_seen: true })
    }

    /// Runs the background work until dropped: validates first-seen tokens as they arrive, revalidates
    /// cached ones when they are due, and polls upstream's token list at the configured interval.
    pub async fn run(&self) {
        let Authority::Upstream(issuer) = &self.0.authority else {
            return std::future::pending().await;
        };
        tokio::join!(
            self.0.ask_about_first_seen(issuer),
            self.0.revalidate(issuer),
            self.0.follow_list(issuer),
        );
    }

    /// Rejects the token that is `named` from now on, because it has just been deleted at upstream;
    /// upstream's list and caches may still contain it.
    pub fn withdraw(&self, named: &ListedSecret) {
        let digests = self.0.verdicts.withdraw(named);
        if let Authority::Upstream(issuer) = &self.0.authority {
            for digest in &digests {
                issuer.credentials.withdraw(digest);
            }
        }
        self.0.relist.notify_one();
    }

    /// Polls upstream's token list and revalidates the token that is `named`, because a token has just
    /// been created or changed at upstream.
    pub fn reconsider(&self, named: Option<&ListedSecret>) {
        if let Some(named) = named {
            self.0.verdicts.suspect(named);
        }
        self.0.relist.notify_one();
    }

    /// Removes a token that the operator no longer configures from the cache and from the credentials.
    /// If it is presented again, it is validated like a first-seen token.
    pub fn forget(&self, token: &TokenDigest) {
        self.0.verdicts.forget(token);
        if let Authority::Upstream(issuer) = &self.0.authority {
            issuer.credentials.withdraw(token);
            issuer.discovered.notify_one();
        }
    }

    /// The token cache in its stored form; `None` if it has not changed since the last call.
    pub fn save(&self) -> Option<Vec<u8>> {
        self.0.verdicts.save()
    }

    /// Reports that the bytes of [`Authenticator::serialize_if_changed`] could not be stored.
    pub fn not_saved(&self) {
        self.0.verdicts.not_saved();
    }

    /// Loads the cache that an earlier process saved; returns the number of valid tokens in it.
    pub fn restore(&self, saved: &[u8]) -> Result<usize, RestoreError> {
        let count = self.0.verdicts.restore(saved)?;
        if let Authority::Upstream(issuer) = &self.0.authority {
            for (digest, cached) in self.0.verdicts.all_valid_by_digest() {
                issuer.credentials.expect(digest, cached.grant());
            }
        }
        Ok(count)
    }

    /// Adds a token that was validated elsewhere, for instance one from a backup of another edge.
    pub fn import(&self, token: &Token, grant: &Grant) {
        let accepted = self.0.verdicts.accept(token, grant.clone(), RequestStart::NEVER);
        if matches!(accepted, Accepted::New | Accepted::Known) {
            self.0.offer(token, grant);
        }
    }

    /// Every valid token in the cache, for display to operators.
    pub fn verdicts(&self) -> Vec<Arc<Verdict>> {
        self.0.verdicts.all_valid()
    }

    /// The grant of each static token, for display to operators.
    pub fn given(&self) -> Vec<Arc<Grant>> {
        self.0.given.grants()
    }

    /// The number of tokens that are currently rejected from the cache.
    pub fn refused_count(&self) -> u64 {
        self.0.verdicts.refused_count()
    }
}

/// A batch is sent this long after its first token arrived, so that a fleet of clients which starts
/// at once is validated together.
const GATHER: Duration = Duration::from_millis(3);

/// Rate limit of validation requests for first-seen tokens: a burst, then a rate per second.
const BURST: f64 = 20.0;
const PER_SECOND: f64 = 10.0;

/// The interval between revalidations, and the pause after upstream did not answer. The pause also
/// applies to a single token whose probe failed.
const REVALIDATION_STEP: Duration = Duration::from_secs(1);
const REVALIDATION_PAUSE: Duration = Duration::from_secs(15);

/// The interval at which is checked whether the edge now serves a further environment of listed tokens.
const SERVED_STEP: Duration = Duration::from_secs(1);

/// A cached token that was denied once is validated again after this delay; it is rejected if it is
/// denied again.
const DOUBT: Duration = Duration::from_secs(5);

const REVALIDATION_RATE: usize = 50;

const PROBES_AT_ONCE: usize = 8;

impl Inner {
    /// Completes a cache entry of an earlier process with the token's plaintext.
    fn learn(&self, cached: &Verdict, header: &str) {
        if let Ok(token) = Token::from_header(header) {
            self.offer(&token, cached.grant());
            cached.learn(token);
        }
    }

    fn offer(&self, token: &Token, grant: &Grant) {
        if let Authority::Upstream(issuer) = &self.authority
            && grant.kind == TokenKind::Client
            && issuer.credentials.offer(token, grant)
        {
            issuer.discovered.notify_one();
        }
    }

    async fn ask_about_first_seen(&self, issuer: &Issuer) {
        self.queue.abandon();
        let mut allowance = Allowance::new(Instant::now());
        loop {
            self.queue.wait().await;
            tokio::time::sleep(GATHER).await;
            if self.pause_left().is_none() {
                allowance.one().await;
            }
            let tokens = self.queue.take();
            self.settle(issuer, &tokens).await;
        }
    }

    /// Validates `tokens` and answers the requests that wait for them.
    async fn settle(&self, issuer: &Issuer, tokens: &[Token]) {
        let Validation { start, mut results, .. } = self.judge(issuer, tokens).await;
        for token in tokens {
            let digest = token.digest();
            let fallback = match results.remove(&digest) {
                Some(Judgement::Valid(grant)) => self.accept(token, grant, start),
                Some(Judgement::Forbidden(grant)) => {
                    self.verdicts.forbid(token, grant, start);
                    Err(Denied::Forbidden)
                }
                Some(Judgement::Invalid) => {
                    self.verdicts.refuse(token, start);
                    Err(Denied::Unknown)
                }
                None => Err(Denied::Unavailable),
            };
            // The cache may have a newer result by now; a full cache may not have taken this one.
            let answer = self.verdicts.known(token).unwrap_or(fallback);
            self.queue.settle(&digest, &answer);
        }
    }

    /// Caches a token that upstream calls valid.
    fn accept(
        &self,
        token: &Token,
        grant: Grant,
        start: RequestStart,
    ) -> Result<Arc<Grant>, Denied> {
        let grant = Arc::new(grant);
        match self.verdicts.accept(token, (*grant).clone(), start) {
            Accepted::New | Accepted::Known => {
                self.offer(token, &grant);
                Ok(grant)
            }
            Accepted::Outdated | Accepted::Revoked => Err(Denied::Unknown),
        }
    }

    /// Revalidates cached tokens that are due; their state does not change while upstream fails.
    ///
    /// This is rare while the token list is polled successfully. While the list is unavailable, tokens
    /// are revalidated at the interval of the list.
    ///
    /// A token is rejected only when its denial is repeated: one response of a faulty upstream, for
    /// instance an empty list of valid tokens, rejects no token.
    async fn revalidate(&self, issuer: &Issuer) {
        let mut pause = REVALIDATION_STEP;
        loop {
            tokio::time::sleep(pause).await;
            pause = self.revalidate_due(issuer).await;
        }
    }

    /// Revalidates one batch of due tokens; returns the pause before the next one.
    ///
    /// A token whose validation fails is postponed by itself and does not delay others.
    async fn revalidate_due(&self, issuer: &Issuer) -> Duration {
        let due = self.take_due();
        if due.is_empty() {
            return REVALIDATION_STEP;
        }
        let Validation { start, mut results, is_answered, retry_after } =
            self.judge(issuer, &due).await;
        for token in &due {
            match results.remove(&token.digest()) {
                Some(Judgement::Valid(grant)) => {
                    let accepted = self.verdicts.accept(token, grant.clone(), start);
                    // The grant has changed.
                    if accepted == Accepted::New {
                        self.offer(token, &grant);
                    }
                }
                Some(Judgement::Forbidden(grant)) => {
                    self.verdicts.forbid(token, grant, start);
                }
                Some(Judgement::Invalid) => match self.verdicts.deny(token, start) {
                    Rejected::Doubted => self.verdicts.postpone(&token.digest(), DOUBT),
                    // The rejection expires soon: if upstream was wrong, the token is validated
                    // again after that.
                    Rejected::Refused => {
                        info!(token = %token.masked(), "A token is no longer valid");
                        issuer.credentials.withdraw(&token.digest());
                    }
                    Rejected::Outdated => {}
                },
                None => {}
            }
        }
        let pause = if is_answered { REVALIDATION_STEP } else { REVALIDATION_PAUSE };
        pause.max(retry_after.unwrap_or_default())
    }

    /// Takes the cached tokens that are due for revalidation.
    fn take_due(&self) -> Vec<Token> {
        let Config { revalidate_after, list_interval, .. } = self.config;
        let age = if self.is_list_unread.load(Ordering::Relaxed) {
            list_interval.min(revalidate_after)
        } else {
            revalidate_after
        };
        self.verdicts.take_unconfirmed_for(age, REVALIDATION_RATE)
    }

    /// Validates `tokens` at upstream. Tokens for which upstream fails are missing in the results.
    ///
    /// A token counts as valid only if a probe with it succeeds too: upstream's validation cache keeps
    /// a deleted token for long, and a token that was created and deleted between two polls never
    /// appears in the list. A cached token that does not validate is denied only if its probe fails
    /// too: upstream caches for minutes that it did not know a token, and the list may have shown it
    /// since.
    async fn judge(&self, issuer: &Issuer, tokens: &[Token]) -> Validation {
        let start = self.verdicts.start_request();
        if let Some(pause) = self.pause_left() {
            return Validation::unanswered(start, Some(pause));
        }
        let valid = match issuer.upstream.validate(tokens).await {
            Ok(valid) => valid,
            Err(error) => {
                if !self.unanswered.swap(true, Ordering::Relaxed) {
                    warn!(
                        error = error_chain(&error),
                        "Token validation at upstream failed; requests with first-seen tokens get 503"
                    );
                }
                let retry_after = error.retry().wish();
                self.pause_for(retry_after);
                return Validation::unanswered(start, retry_after);
            }
        };
        if self.unanswered.swap(false, Ordering::Relaxed) {
            info!("Upstream validates tokens again");
        }
        // Tokens in the response that were not requested are ignored.
        let mut results: HashMap<_, _> =
            tokens.iter().map(|token| (token.digest(), Judgement::Invalid)).collect();
        let valid = valid.into_iter().filter(|it| results.contains_key(&it.token.digest()));
        let mut probed: HashMap<_, _> = valid.map(|it| (it.token.digest(), (it, true))).collect();
        for token in tokens {
            if let Some(known) = self.verdicts.valid(&token.digest()) {
                let grant = Grant::clone(known.grant());
                let known = ValidatedToken { token: token.clone(), grant };
                probed.entry(token.digest()).or_insert((known, false));
            }
        }
        let probes: Vec<_> = stream::iter(probed)
            .map(|(digest, (ValidatedToken { token, grant }, is_validated))| async move {
                let access = issuer.upstream.admits(&token, grant.kind).await;
                (digest, grant, is_validated, access)
            })
            .buffer_unordered(PROBES_AT_ONCE)
            .collect()
            .await;
        let mut retry_after = None;
        for (digest, grant, is_validated, access) in probes {
            match access {
                Ok(Access::Granted) => drop(results.insert(digest, Judgement::Valid(grant))),
                Ok(Access::Forbidden) if is_validated => {
                    results.insert(digest, Judgement::Forbidden(grant));
                }
                Ok(Access::Forbidden | Access::Unknown) => {}
                Err(error) => {
                    let requested = error.retry().wish();
                    // A failure in one environment does not pause validation of the others.
                    if error.is_crowded() {
                        retry_after = retry_after.max(requested);
                    }
                    let pause = requested.unwrap_or_default().max(REVALIDATION_PAUSE);
                    self.verdicts.postpone(&digest, pause);
                    results.remove(&digest);
                }
            }
        }
        self.pause_for(retry_after);
        Validation { start, results, is_answered: true, retry_after }
    }

    /// Sends no validation request for the duration of `pause`.
    fn pause_for(&self, pause: Option<Duration>) {
        if let Some(pause) = pause {
            let until = Instant::now() + pause;
            let mut not_before = self.ask_not_before.lock().unwrap_or_else(PoisonError::into_inner);
            *not_before = until.max(*not_before);
        }
    }

    /// The rest of the current validation pause; `None` if there is none.
    fn pause_left(&self) -> Option<Duration> {
        let not_before = *self.ask_not_before.lock().unwrap_or_else(PoisonError::into_inner);
        not_before.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    async fn follow_list(&self, issuer: &Issuer) {
        let Some(admin) = &issuer.admin else { return std::future::pending().await };
        let unreadable_items = unreadable_items();
        let mut step = tokio::time::interval(self.config.list_interval);
        step.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut not_before = Instant::now();
        let mut is_complete = true;
        let mut unserved = BTreeSet::new();
        let mut admin_check = AdminCheck::default();
        loop {
            tokio::select! {
                _ = step.tick() => {}
                () = self.relist.notified() => {}
                () = serves_one_of(&issuer.credentials, &unserved) => {}
            }
            unserved.clear();
            tokio::time::sleep_until(not_before).await;
            let start = self.verdicts.start_request();
            let list = match issuer.upstream.api_tokens(admin).await {
                Ok(list) => list,
                Err(error) => {
                    if let Some(retry_after) = error.retry().wish() {
                        not_before = Instant::now() + retry_after;
                    }
                    self.list_is_unread(&error_chain(&error));
                    // The client has already recorded a 401 as a rejection of the admin token.
                    let is_refusal = error.status().is_some_and(|it| it.as_u16() == 401);
                    if !is_refusal && admin_check.is_in_doubt(&issuer.upstream, admin).await {
                        step.reset_after(self.config.list_interval.min(DOUBT));
                    }
                    continue;
                }
            };
            admin_check = AdminCheck::default();
            let unreadable = list.unreadable.len();
            unreadable_items.set(f64::from(u32::try_from(unreadable).unwrap_or(u32::MAX)));
            if let Some(why) = why_unusable(&list) {
                self.list_is_unread(why);
                continue;
            }
            if self.is_list_unread.swap(false, Ordering::Relaxed) {
                info!("Upstream's token list is read again");
            }
            if std::mem::replace(&mut is_complete, unreadable == 0) && unreadable > 0 {
                warn!(
                    unreadable,
                    "Some items of upstream's token list cannot be read; the tokens they may stand \
                     for are validated one by one"
                );
            }
            let served = issuer.credentials.environments();
            let changes = self.verdicts.take_list(&list, &served, start);
            unserved.extend(list.tokens.into_iter().map(|it| it.environment));
            unserved.retain(|it| !served.contains(it));
            if changes.learned + changes.revoked > 0 {
                info!(changes.learned, changes.revoked, "Upstream's tokens changed");
            }
        }
    }

    /// Switches to revalidation of single tokens because the list is unavailable.
    fn list_is_unread(&self, why: &str) {
        if !self.is_list_unread.swap(true, Ordering::Relaxed) {
            warn!(
                error = why,
                "Upstream's token list could not be read; known tokens are validated one by one"
            );
        }
    }
}

/// Checks whether upstream rejects the admin token while its token list is unavailable.
#[derive(Debug, Default)]
struct AdminCheck {
    /// The token that upstream did not know at the previous check.
    denied: Option<Arc<Token>>,
    /// The token that was marked as refused by this check.
    refused: Option<Arc<Token>>,
}

impl AdminCheck {
    /// Checks whether upstream's admin API knows the token; true if the check is to be repeated soon.
    ///
    /// The token is marked as refused after two denials in a row. A later success reverts that.
    async fn is_in_doubt(&mut self, upstream: &Upstream, admin: &AdminToken) -> bool {
        let token = admin.current();
        match upstream.admits(&token, TokenKind::Admin).await {
            Ok(Access::Unknown) if self.denied.as_ref() == Some(&token) => {
                admin.refuse(&token);
                self.refused = Some(token);
                false
            }
            Ok(Access::Unknown) => {
                self.denied = Some(token);
                true
            }
            Ok(Access::Granted) => {
                self.denied = None;
                if self.refused.take().as_ref() == Some(&token) {
                    admin.accept(&token);
                }
                false
            }
            Ok(Access::Forbidden) | Err(_) => false,
        }
    }
}

/// Waits until the edge has a token of one of these environments.
async fn serves_one_of(credentials: &Credentials, unserved: &BTreeSet<Environment>) {
    if unserved.is_empty() {
        return std::future::pending().await;
    }
    while credentials.environments().is_disjoint(unserved) {
        tokio::time::sleep(SERVED_STEP).await;
    }
}

/// Why a token list must be ignored, if it must: it always contains the edge's own admin token, so an
/// empty list is a fault and does not revoke all tokens.
fn why_unusable(list: &TokenList) -> Option<&'static str> {
    if !list.tokens.is_empty() {
        None
    } else if list.unreadable.is_empty() {
        Some("it is empty, although it must contain the admin token it was read with")
    } else {
        Some("none of its items can be read")
    }
}

/// The results of validating one batch of tokens.
#[derive(Debug)]
struct Validation {
    start: RequestStart,
    results: HashMap<TokenDigest, Judgement>,
    /// Whether upstream has answered; the results may be empty even then.
    is_answered: bool,
    /// The longest `Retry-After` of upstream.
    retry_after: Option<Duration>,
}

impl Validation {
    /// No response from upstream.
    fn unanswered(start: RequestStart, retry_after: Option<Duration>) -> Self {
        Self { start, results: HashMap::new(), is_answered: false, retry_after }
    }
}

/// The result of validating one token at upstream.
#[derive(Debug)]
enum Judgement {
    Valid(Grant),
    Forbidden(Grant),
    Invalid,
}

fn unreadable_items() -> Gauge {
    const NAME: &str = "parapet_token_list_items_unreadable";
    describe_gauge!(
        NAME,
        "Items of upstream's token list that cannot be read, at its last reading"
    );
    gauge!(NAME)
}

/// A token bucket for validation requests.
struct Allowance {
    left: f64,
    as_of: Instant,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self { left: BURST, as_of: now }
    }

    /// Waits until one more request may be sent.
    async fn one(&mut self) {
        loop {
            let now = Instant::now();
            let earned = now.duration_since(self.as_of).as_secs_f64() * PER_SECOND;
            self.left = (self.left + earned).min(BURST);
            self.as_of = now;
            if self.left >= 1.0 {
                self.left -= 1.0;
                return;
            }
            tokio::time::sleep(Duration::from_secs_f64((1.0 - self.left) / PER_SECOND)).await;
        }
    }
}

/// Counters of presented tokens by outcome.
#[derive(Debug)]
struct Tally {
    known: Counter,
    refused: Counter,
    malformed: Counter,
    accepted: Counter,
    rejected: Counter,
    unavailable: Counter,
}

impl Tally {
    fn new() -> Self {
        const NAME: &str = "parapet_token_verdicts_total";
        describe_counter!(
            NAME,
            "Tokens presented, by verdict: known and refused come from the cache, accepted and \
             rejected from upstream, malformed could not be parsed, unavailable got no result"
        );
        let of = |verdict: &'static str| counter!(NAME, "verdict" => verdict);
        Self {
            known: of("known"),
            refused: of("refused"),
            malformed: of("malformed"),
            accepted: of("accepted"),
            rejected: of("rejected"),
            unavailable: of("unavailable"),
        }
    }
}
