//! Authentication of API tokens, with a cache of validated ones.
//!
//! Cached tokens are answered from memory. Only a first-seen token waits: all requests that present
//! it share one validation, which is batched with those of other tokens, rate limited and subject to
//! a deadline. While upstream is unreachable, cached tokens keep their state.
//!
//! This module returns what a token grants. It does not know which route needs which kind of token.

mod local_tokens;
mod pending;
#[cfg(test)]
mod tests;
mod token_cache;

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
    local_tokens::LocalTokens,
    pending::{PendingValidations, Priority},
    token_cache::{InsertOutcome, RejectOutcome, RequestStart, TokenCache},
};
pub use self::{
    pending::AuthError,
    token_cache::{CachedToken, RestoreError},
};
use crate::{
    protocol::tokens::{ListedSecret, TokenList, ValidatedToken},
    rate_limit::{Rate, RateLimiter},
    telemetry::error_chain,
    token::{Environment, Grant, Token, TokenDigest, TokenKind},
    upstream::{AdminToken, Credentials, TokenAccess, Upstream},
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
pub struct AuthenticatedToken {
    /// Kind, environment and projects of the token.
    pub grant: Arc<Grant>,
    /// The digest of the token.
    pub digest: TokenDigest,
    /// Whether this request is the first of this process to present it.
    pub first_seen: bool,
}

/// The result of looking a token up without a request to upstream.
enum CacheLookup {
    /// The token is cached as valid or rejected, or is malformed.
    Decided(Result<AuthenticatedToken, AuthError>),
    /// The token is valid according to an earlier process and is presented to this one for the first
    /// time.
    Restored(Arc<CachedToken>, TokenDigest),
    /// The token is not cached.
    Miss(Token, TokenDigest),
}

/// Where tokens are validated that are not cached.
#[derive(Debug)]
pub enum Validator {
    /// Nowhere: only static tokens are valid.
    StaticOnly,
    /// At upstream.
    Upstream(Box<UpstreamValidator>),
}

/// Validates tokens at upstream.
#[derive(Debug)]
pub struct UpstreamValidator {
    /// The client of upstream's API.
    pub upstream: Upstream,
    /// Authorizes reading upstream's token list.
    pub admin: Option<AdminToken>,
    /// Receives each valid client token, to fetch flags with where the edge has no token configured.
    pub credentials: Credentials,
    /// Notified when a new credential extends the set of flags that can be fetched.
    pub credentials_changed: Arc<Notify>,
}

/// Authenticates tokens. A cheap handle.
#[derive(Clone, Debug)]
pub struct Authenticator(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: Config,
    validator: Validator,
    local_tokens: LocalTokens,
    token_cache: TokenCache,
    pending: PendingValidations,
    metrics: Metrics,
    /// Requests a poll of upstream's token list before the next interval.
    list_refresh: Notify,
    /// Whether the latest validation request to upstream failed.
    is_validation_failing: AtomicBool,
    /// Whether the latest poll of upstream's token list failed.
    is_list_unavailable: AtomicBool,
    /// No validation request is sent before this time (`Retry-After` of upstream).
    validation_paused_until: Mutex<Instant>,
}

impl Authenticator {
    /// Accepts the `given` static tokens, and those that the validator accepts.
    pub fn new(
        config: Config,
        validator: Validator,
        tokens: impl IntoIterator<Item = (TokenDigest, Grant)>,
    ) -> Self {
        Self(Arc::new(Inner {
            token_cache: TokenCache::new(config.capacity, config.forget_invalid_after),
            local_tokens: LocalTokens::new(tokens),
            pending: PendingValidations::default(),
            metrics: Metrics::new(),
            list_refresh: Notify::new(),
            is_validation_failing: AtomicBool::new(false),
            is_list_unavailable: AtomicBool::new(false),
            validation_paused_until: Mutex::new(Instant::now()),
            validator,
            config,
        }))
    }

    /// Authenticates the token of an authorization header, with or without `Bearer`.
    ///
    /// Waits for a first-seen token only, at most for the configured deadline. The future is
    /// cancel-safe: a validation in flight still completes for other requests.
    pub async fn authenticate(&self, header: &str) -> Result<AuthenticatedToken, AuthError> {
        self.authenticate_with_priority(header, Priority::Presented).await
    }

    /// Like [`Self::authenticate`], from the cache only; `None` for a token that has to be validated or
    /// is presented for the first time.
    pub fn authenticate_cached(
        &self,
        header: &str,
    ) -> Option<Result<AuthenticatedToken, AuthError>> {
        match self.lookup_cached(header) {
            CacheLookup::Decided(result) => Some(result),
            CacheLookup::Restored(..) | CacheLookup::Miss(..) => None,
        }
    }

    async fn authenticate_with_priority(
        &self,
        header: &str,
        priority: Priority,
    ) -> Result<AuthenticatedToken, AuthError> {
        match self.lookup_cached(header) {
            CacheLookup::Decided(result) => result,
            CacheLookup::Restored(cached, digest) => {
                self.0.metrics.known.increment(1);
                self.0.record_plaintext(&cached, header);
                Ok(AuthenticatedToken {
                    grant: Arc::clone(cached.grant()),
                    digest,
                    first_seen: true,
                })
            }
            CacheLookup::Miss(token, digest) => {
                self.validate_uncached(token, digest, priority).await
            }
        }
    }

    /// Looks up the token of an authorization header without a request to upstream.
    fn lookup_cached(&self, header: &str) -> CacheLookup {
        let inner = &*self.0;
        let digest = TokenDigest::of(Token::strip_bearer(header));
        if let Some(grant) = inner.local_tokens.get_and_mark_used(&digest) {
            inner.metrics.known.increment(1);
            return CacheLookup::Decided(Ok(AuthenticatedToken {
                grant,
                digest,
                first_seen: false,
            }));
        }
        if let Some(cached) = inner.token_cache.valid(&digest) {
            if cached.is_missing_plaintext() {
                return CacheLookup::Restored(cached, digest);
            }
            inner.metrics.known.increment(1);
            let grant = Arc::clone(cached.grant());
            return CacheLookup::Decided(Ok(AuthenticatedToken {
                grant,
                digest,
                first_seen: false,
            }));
        }
        if let Some(denied) = inner.token_cache.rejection(&digest) {
            inner.metrics.refused.increment(1);
            return CacheLookup::Decided(Err(denied));
        }
        let Ok(token) = Token::from_header(header) else {
            inner.metrics.malformed.increment(1);
            return CacheLookup::Decided(Err(AuthError::Unknown));
        };
        if inner.token_cache.is_revoked(&token) {
            inner.metrics.refused.increment(1);
            return CacheLookup::Decided(Err(AuthError::Unknown));
        }
        CacheLookup::Miss(token, digest)
    }

    /// The current grant of a token that was accepted before; `None` once it is no longer valid. Counts
    /// as a use of the token.
    pub fn current_grant(&self, digest: &TokenDigest) -> Option<Arc<Grant>> {
        let cached = || Some(Arc::clone(self.0.token_cache.valid(digest)?.grant()));
        self.0.local_tokens.get_and_mark_used(digest).or_else(cached)
    }

    /// Replaces all static tokens.
    ///
    /// Takes time linear in the number of tokens; concurrent requests see the previous set until then.
    pub fn set_local_tokens(&self, tokens: impl IntoIterator<Item = (TokenDigest, Grant)>) {
        self.0.local_tokens.replace(tokens);
    }

    /// The static tokens that were presented since the last call.
    pub fn take_used_local_tokens(&self) -> Vec<TokenDigest> {
        self.0.local_tokens.take_used()
    }

    /// Validates tokens on behalf of another client, for instance another edge. The results are in the
    /// order of `tokens`, `None` for invalid ones. A token whose use upstream forbids counts as valid,
    /// as it does at upstream.
    pub async fn validate(&self, tokens: &[Token]) -> Result<Vec<Option<Arc<Grant>>>, AuthError> {
        let results = tokens.iter().map(|token| async {
            match self.authenticate_with_priority(token.expose(), Priority::Delegated).await {
                Ok(admission) => Ok(Some(admission.grant)),
                Err(AuthError::Unknown) => Ok(None),
                Err(AuthError::Forbidden) => {
                    let grant = self.0.token_cache.forbidden_grant(&token.digest());
                    grant.map(Some).ok_or(AuthError::Unavailable)
                }
                Err(AuthError::Unavailable) => Err(AuthError::Unavailable),
            }
        });
        futures_util::future::join_all(results).await.into_iter().collect()
    }

    async fn validate_uncached(
        &self,
        token: Token,
        digest: TokenDigest,
        priority: Priority,
    ) -> Result<AuthenticatedToken, AuthError> {
        let inner = &*self.0;
        if matches!(inner.validator, Validator::StaticOnly) {
            inner.metrics.refused.increment(1);
            return Err(AuthError::Unknown);
        }
        let Some(answer) = inner.pending.enqueue(token, priority) else {
            inner.metrics.unavailable.increment(1);
            return Err(AuthError::Unavailable);
        };
        let answer = match tokio::time::timeout(inner.config.deadline, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(AuthError::Unavailable),
        };
        match &answer {
            Ok(_) => inner.metrics.accepted.increment(1),
            Err(AuthError::Unknown | AuthError::Forbidden) => inner.metrics.rejected.increment(1),
            Err(AuthError::Unavailable) => inner.metrics.unavailable.increment(1),
        }
        answer.map(|grant| AuthenticatedToken { grant, digest, first_seen: true })
    }

    /// Runs the background work until dropped: validates first-seen tokens as they arrive, revalidates
    /// cached ones when they are due, and polls upstream's token list at the configured interval.
    pub async fn run(&self) {
        let Validator::Upstream(issuer) = &self.0.validator else {
            return std::future::pending().await;
        };
        tokio::join!(
            self.0.validate_first_seen(issuer),
            self.0.run_revalidation(issuer),
            self.0.poll_token_list(issuer),
        );
    }

    /// Rejects the token that is `named` from now on, because it has just been deleted at upstream;
    /// upstream's list and caches may still contain it.
    pub fn revoke(&self, named: &ListedSecret) {
        let digests = self.0.token_cache.revoke_token(named);
        if let Validator::Upstream(issuer) = &self.0.validator {
            for digest in &digests {
                issuer.credentials.revoke(digest);
            }
        }
        self.0.list_refresh.notify_one();
    }

    /// Polls upstream's token list and revalidates the token that is `named`, because a token has just
    /// been created or changed at upstream.
    pub fn revalidate(&self, named: Option<&ListedSecret>) {
        if let Some(named) = named {
            self.0.token_cache.mark_stale(named);
        }
        self.0.list_refresh.notify_one();
    }

    /// Removes a token that the operator no longer configures from the cache and from the credentials.
    /// If it is presented again, it is validated like a first-seen token.
    pub fn remove_token(&self, token: &TokenDigest) {
        self.0.token_cache.remove(token);
        if let Validator::Upstream(issuer) = &self.0.validator {
            issuer.credentials.revoke(token);
            issuer.credentials_changed.notify_one();
        }
    }

    /// The token cache in its stored form; `None` if it has not changed since the last call.
    pub fn serialize_if_changed(&self) -> Option<Vec<u8>> {
        self.0.token_cache.serialize_if_changed()
    }

    /// Reports that the bytes of [`Authenticator::serialize_if_changed`] could not be stored.
    pub fn mark_unsaved(&self) {
        self.0.token_cache.mark_unsaved();
    }

    /// Loads the cache that an earlier process saved; returns the number of valid tokens in it.
    pub fn restore(&self, saved: &[u8]) -> Result<usize, RestoreError> {
        let count = self.0.token_cache.restore(saved)?;
        if let Validator::Upstream(issuer) = &self.0.validator {
            for (digest, cached) in self.0.token_cache.valid_entries() {
                issuer.credentials.expect_token(digest, cached.grant());
            }
        }
        Ok(count)
    }

    /// Adds a token that was validated elsewhere, for instance one from a backup of another edge.
    pub fn import(&self, token: &Token, grant: &Grant) {
        let accepted = self.0.token_cache.record_valid(token, grant.clone(), RequestStart::NEVER);
        if matches!(accepted, InsertOutcome::New | InsertOutcome::Unchanged) {
            self.0.offer_credential(token, grant);
        }
    }

    /// Every valid token in the cache, for display to operators.
    pub fn cached_tokens(&self) -> Vec<Arc<CachedToken>> {
        self.0.token_cache.valid_tokens()
    }

    /// The grant of each static token, for display to operators.
    pub fn static_grants(&self) -> Vec<Arc<Grant>> {
        self.0.local_tokens.grants()
    }

    /// The number of tokens that are currently rejected from the cache.
    pub fn rejected_count(&self) -> u64 {
        self.0.token_cache.rejected_count()
    }
}

/// A batch is sent this long after its first token arrived, so that a fleet of clients which starts
/// at once is validated together.
const BATCH_WINDOW: Duration = Duration::from_millis(3);

/// Rate limit of validation requests for first-seen tokens.
const VALIDATION_RATE: Rate = Rate { burst: 20, interval: Duration::from_millis(100) };

/// The interval between revalidations, and the pause after upstream did not answer. The pause also
/// applies to a single token whose probe failed.
const REVALIDATION_INTERVAL: Duration = Duration::from_secs(1);
const REVALIDATION_BACKOFF: Duration = Duration::from_secs(15);

/// The interval at which is checked whether the edge now serves a further environment of listed tokens.
const SERVED_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// A cached token that was denied once is validated again after this delay; it is rejected if it is
/// denied again.
const RECHECK_DELAY: Duration = Duration::from_secs(5);

const MAX_REVALIDATIONS_PER_SECOND: usize = 50;

const MAX_CONCURRENT_PROBES: usize = 8;

impl Inner {
    /// Completes a cache entry of an earlier process with the token's plaintext.
    fn record_plaintext(&self, cached: &CachedToken, header: &str) {
        if let Ok(token) = Token::from_header(header) {
            self.offer_credential(&token, cached.grant());
            cached.set_plaintext(token);
        }
    }

    fn offer_credential(&self, token: &Token, grant: &Grant) {
        if let Validator::Upstream(issuer) = &self.validator
            && grant.kind == TokenKind::Client
            && issuer.credentials.offer(token, grant)
        {
            issuer.credentials_changed.notify_one();
        }
    }

    async fn validate_first_seen(&self, issuer: &UpstreamValidator) {
        self.pending.drop_in_flight();
        let mut limiter = RateLimiter::new(VALIDATION_RATE);
        loop {
            self.pending.wait().await;
            tokio::time::sleep(BATCH_WINDOW).await;
            if self.remaining_pause().is_none() {
                while let Err(wait) = limiter.acquire() {
                    tokio::time::sleep(wait).await;
                }
            }
            let tokens = self.pending.next_batch();
            self.validate_and_resolve(issuer, &tokens).await;
        }
    }

    /// Validates `tokens` and answers the requests that wait for them.
    async fn validate_and_resolve(&self, issuer: &UpstreamValidator, tokens: &[Token]) {
        let ValidationBatch { start, mut results, .. } = self.validate_batch(issuer, tokens).await;
        for token in tokens {
            let digest = token.digest();
            let fallback = match results.remove(&digest) {
                Some(ValidationResult::Valid(grant)) => self.record_valid(token, grant, start),
                Some(ValidationResult::Forbidden(grant)) => {
                    self.token_cache.record_forbidden(token, grant, start);
                    Err(AuthError::Forbidden)
                }
                Some(ValidationResult::Invalid) => {
                    self.token_cache.record_invalid(token, start);
                    Err(AuthError::Unknown)
                }
                None => Err(AuthError::Unavailable),
            };
            // The cache may have a newer result by now; a full cache may not have taken this one.
            let answer = self.token_cache.lookup(token).unwrap_or(fallback);
            self.pending.resolve(&digest, &answer);
        }
    }

    /// Caches a token that upstream calls valid.
    fn record_valid(
        &self,
        token: &Token,
        grant: Grant,
        start: RequestStart,
    ) -> Result<Arc<Grant>, AuthError> {
        let grant = Arc::new(grant);
        match self.token_cache.record_valid(token, (*grant).clone(), start) {
            InsertOutcome::New | InsertOutcome::Unchanged => {
                self.offer_credential(token, &grant);
                Ok(grant)
            }
            InsertOutcome::Outdated | InsertOutcome::Revoked => Err(AuthError::Unknown),
        }
    }

    /// Revalidates cached tokens that are due; their state does not change while upstream fails.
    ///
    /// This is rare while the token list is polled successfully. While the list is unavailable, tokens
    /// are revalidated at the interval of the list.
    ///
    /// A token is rejected only when its denial is repeated: one response of a faulty upstream, for
    /// instance an empty list of valid tokens, rejects no token.
    async fn run_revalidation(&self, issuer: &UpstreamValidator) {
        let mut pause = REVALIDATION_INTERVAL;
        loop {
            tokio::time::sleep(pause).await;
            pause = self.revalidate_due(issuer).await;
        }
    }

    /// Revalidates one batch of due tokens; returns the pause before the next one.
    ///
    /// A token whose validation fails is postponed by itself and does not delay others.
    async fn revalidate_due(&self, issuer: &UpstreamValidator) -> Duration {
        let due = self.take_due();
        if due.is_empty() {
            return REVALIDATION_INTERVAL;
        }
        let ValidationBatch { start, mut results, is_answered, retry_after } =
            self.validate_batch(issuer, &due).await;
        for token in &due {
            match results.remove(&token.digest()) {
                Some(ValidationResult::Valid(grant)) => {
                    let accepted = self.token_cache.record_valid(token, grant.clone(), start);
                    // The grant has changed.
                    if accepted == InsertOutcome::New {
                        self.offer_credential(token, &grant);
                    }
                }
                Some(ValidationResult::Forbidden(grant)) => {
                    self.token_cache.record_forbidden(token, grant, start);
                }
                Some(ValidationResult::Invalid) => {
                    match self.token_cache.record_denial(token, start) {
                        RejectOutcome::NeedsRecheck => {
                            self.token_cache.postpone_revalidation(&token.digest(), RECHECK_DELAY);
                        }
                        // The rejection expires soon: if upstream was wrong, the token is validated
                        // again after that.
                        RejectOutcome::Rejected => {
                            info!(token = %token.masked(), "A token is no longer valid");
                            issuer.credentials.revoke(&token.digest());
                        }
                        RejectOutcome::Outdated => {}
                    }
                }
                None => {}
            }
        }
        let pause = if is_answered { REVALIDATION_INTERVAL } else { REVALIDATION_BACKOFF };
        pause.max(retry_after.unwrap_or_default())
    }

    /// Takes the cached tokens that are due for revalidation.
    fn take_due(&self) -> Vec<Token> {
        let Config { revalidate_after, list_interval, .. } = self.config;
        let age = if self.is_list_unavailable.load(Ordering::Relaxed) {
            list_interval.min(revalidate_after)
        } else {
            revalidate_after
        };
        self.token_cache.take_due_for_revalidation(age, MAX_REVALIDATIONS_PER_SECOND)
    }

    /// Validates `tokens` at upstream. Tokens for which upstream fails are missing in the results.
    ///
    /// A token counts as valid only if a probe with it succeeds too: upstream's validation cache keeps
    /// a deleted token for long, and a token that was created and deleted between two polls never
    /// appears in the list. A cached token that does not validate is denied only if its probe fails
    /// too: upstream caches for minutes that it did not know a token, and the list may have shown it
    /// since.
    async fn validate_batch(
        &self,
        issuer: &UpstreamValidator,
        tokens: &[Token],
    ) -> ValidationBatch {
        let start = self.token_cache.start_request();
        if let Some(pause) = self.remaining_pause() {
            return ValidationBatch::unanswered(start, Some(pause));
        }
        let valid = match issuer.upstream.validate_tokens(tokens).await {
            Ok(valid) => valid,
            Err(error) => {
                if !self.is_validation_failing.swap(true, Ordering::Relaxed) {
                    warn!(
                        error = error_chain(&error),
                        "Token validation at upstream failed; requests with first-seen tokens get 503"
                    );
                }
                let retry_after = error.retry().retry_after();
                self.pause_validation(retry_after);
                return ValidationBatch::unanswered(start, retry_after);
            }
        };
        if self.is_validation_failing.swap(false, Ordering::Relaxed) {
            info!("Upstream validates tokens again");
        }
        // Tokens in the response that were not requested are ignored.
        let mut results: HashMap<_, _> =
            tokens.iter().map(|token| (token.digest(), ValidationResult::Invalid)).collect();
        let valid = valid.into_iter().filter(|it| results.contains_key(&it.token.digest()));
        let mut probed: HashMap<_, _> = valid.map(|it| (it.token.digest(), (it, true))).collect();
        for token in tokens {
            if let Some(known) = self.token_cache.valid(&token.digest()) {
                let grant = Grant::clone(known.grant());
                let known = ValidatedToken { token: token.clone(), grant };
                probed.entry(token.digest()).or_insert((known, false));
            }
        }
        let probes: Vec<_> = stream::iter(probed)
            .map(|(digest, (ValidatedToken { token, grant }, is_validated))| async move {
                let access = issuer.upstream.probe_access(&token, grant.kind).await;
                (digest, grant, is_validated, access)
            })
            .buffer_unordered(MAX_CONCURRENT_PROBES)
            .collect()
            .await;
        let mut retry_after = None;
        for (digest, grant, is_validated, access) in probes {
            match access {
                Ok(TokenAccess::Granted) => {
                    drop(results.insert(digest, ValidationResult::Valid(grant)));
                }
                Ok(TokenAccess::Forbidden) if is_validated => {
                    results.insert(digest, ValidationResult::Forbidden(grant));
                }
                Ok(TokenAccess::Forbidden | TokenAccess::Unauthorized) => {}
                Err(error) => {
                    let requested = error.retry().retry_after();
                    // A failure in one environment does not pause validation of the others.
                    if error.is_throttled() {
                        retry_after = retry_after.max(requested);
                    }
                    let pause = requested.unwrap_or_default().max(REVALIDATION_BACKOFF);
                    self.token_cache.postpone_revalidation(&digest, pause);
                    results.remove(&digest);
                }
            }
        }
        self.pause_validation(retry_after);
        ValidationBatch { start, results, is_answered: true, retry_after }
    }

    /// Sends no validation request for the duration of `pause`.
    fn pause_validation(&self, pause: Option<Duration>) {
        if let Some(pause) = pause {
            let until = Instant::now() + pause;
            let mut not_before =
                self.validation_paused_until.lock().unwrap_or_else(PoisonError::into_inner);
            *not_before = until.max(*not_before);
        }
    }

    /// The rest of the current validation pause; `None` if there is none.
    fn remaining_pause(&self) -> Option<Duration> {
        let not_before =
            *self.validation_paused_until.lock().unwrap_or_else(PoisonError::into_inner);
        not_before.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    async fn poll_token_list(&self, issuer: &UpstreamValidator) {
        let Some(admin) = &issuer.admin else { return std::future::pending().await };
        let unreadable_items = unreadable_items_gauge();
        let mut step = tokio::time::interval(self.config.list_interval);
        step.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut not_before = Instant::now();
        let mut is_complete = true;
        let mut unserved = BTreeSet::new();
        let mut admin_check = AdminTokenCheck::default();
        loop {
            tokio::select! {
                _ = step.tick() => {}
                () = self.list_refresh.notified() => {}
                () = wait_until_served(&issuer.credentials, &unserved) => {}
            }
            unserved.clear();
            tokio::time::sleep_until(not_before).await;
            let start = self.token_cache.start_request();
            let list = match issuer.upstream.list_api_tokens(admin).await {
                Ok(list) => list,
                Err(error) => {
                    if let Some(retry_after) = error.retry().retry_after() {
                        not_before = Instant::now() + retry_after;
                    }
                    self.report_list_unavailable(&error_chain(&error));
                    // The client has already recorded a 401 as a rejection of the admin token.
                    let is_refusal = error.status().is_some_and(|it| it.as_u16() == 401);
                    if !is_refusal && admin_check.needs_recheck(&issuer.upstream, admin).await {
                        step.reset_after(self.config.list_interval.min(RECHECK_DELAY));
                    }
                    continue;
                }
            };
            admin_check = AdminTokenCheck::default();
            let unreadable = list.unreadable.len();
            unreadable_items.set(f64::from(u32::try_from(unreadable).unwrap_or(u32::MAX)));
            if let Some(why) = unusable_list_reason(&list) {
                self.report_list_unavailable(why);
                continue;
            }
            if self.is_list_unavailable.swap(false, Ordering::Relaxed) {
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
            let changes = self.token_cache.apply_token_list(&list, &served, start);
            unserved.extend(list.tokens.into_iter().map(|it| it.environment));
            unserved.retain(|it| !served.contains(it));
            if changes.learned + changes.revoked > 0 {
                info!(changes.learned, changes.revoked, "Upstream's tokens changed");
            }
        }
    }

    /// Switches to revalidation of single tokens because the list is unavailable.
    fn report_list_unavailable(&self, why: &str) {
        if !self.is_list_unavailable.swap(true, Ordering::Relaxed) {
            warn!(
                error = why,
                "Upstream's token list could not be read; known tokens are validated one by one"
            );
        }
    }
}

/// Checks whether upstream rejects the admin token while its token list is unavailable.
#[derive(Debug, Default)]
struct AdminTokenCheck {
    /// The token that upstream did not know at the previous check.
    denied: Option<Arc<Token>>,
    /// The token that was marked as refused by this check.
    refused: Option<Arc<Token>>,
}

impl AdminTokenCheck {
    /// Checks whether upstream's admin API knows the token; true if the check is to be repeated soon.
    ///
    /// The token is marked as refused after two denials in a row. A later success reverts that.
    async fn needs_recheck(&mut self, upstream: &Upstream, admin: &AdminToken) -> bool {
        let token = admin.current();
        match upstream.probe_access(&token, TokenKind::Admin).await {
            Ok(TokenAccess::Unauthorized) if self.denied.as_ref() == Some(&token) => {
                admin.mark_refused(&token);
                self.refused = Some(token);
                false
            }
            Ok(TokenAccess::Unauthorized) => {
                self.denied = Some(token);
                true
            }
            Ok(TokenAccess::Granted) => {
                self.denied = None;
                if self.refused.take().as_ref() == Some(&token) {
                    admin.mark_accepted(&token);
                }
                false
            }
            Ok(TokenAccess::Forbidden) | Err(_) => false,
        }
    }
}

/// Waits until the edge has a token of one of these environments.
async fn wait_until_served(credentials: &Credentials, unserved: &BTreeSet<Environment>) {
    if unserved.is_empty() {
        return std::future::pending().await;
    }
    while credentials.environments().is_disjoint(unserved) {
        tokio::time::sleep(SERVED_CHECK_INTERVAL).await;
    }
}

/// Why a token list must be ignored, if it must: it always contains the edge's own admin token, so an
/// empty list is a fault and does not revoke all tokens.
fn unusable_list_reason(list: &TokenList) -> Option<&'static str> {
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
struct ValidationBatch {
    start: RequestStart,
    results: HashMap<TokenDigest, ValidationResult>,
    /// Whether upstream has answered; the results may be empty even then.
    is_answered: bool,
    /// The longest `Retry-After` of upstream.
    retry_after: Option<Duration>,
}

impl ValidationBatch {
    /// No response from upstream.
    fn unanswered(start: RequestStart, retry_after: Option<Duration>) -> Self {
        Self { start, results: HashMap::new(), is_answered: false, retry_after }
    }
}

/// The result of validating one token at upstream.
#[derive(Debug)]
enum ValidationResult {
    Valid(Grant),
    Forbidden(Grant),
    Invalid,
}

fn unreadable_items_gauge() -> Gauge {
    const NAME: &str = "parapet_token_list_items_unreadable";
    describe_gauge!(
        NAME,
        "Items of upstream's token list that cannot be read, at its last reading"
    );
    gauge!(NAME)
}

/// Counters of presented tokens by outcome.
#[derive(Debug)]
struct Metrics {
    known: Counter,
    refused: Counter,
    malformed: Counter,
    accepted: Counter,
    rejected: Counter,
    unavailable: Counter,
}

impl Metrics {
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
