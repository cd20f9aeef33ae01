//! Decides whether the token of a request is valid.
//!
//! A cached token is found by its digest, without a lock or a request. Only a first-seen token waits.
//! This module also owns everything that the background work changes, and runs it; it does not itself
//! speak to upstream.

use std::{sync::Arc, time::Duration};

use metrics::{Counter, counter, describe_counter};

use super::{
    error::AuthError,
    first_validation,
    local_tokens::LocalTokens,
    pending_validations::{PendingValidations, Priority},
    revalidation,
    token_cache::{CachedToken, InsertOutcome, RequestStart, RestoreError, TokenCache},
    token_list_poller::TokenListPoller,
    upstream_validator::UpstreamValidator,
};
use crate::{
    protocol::tokens::ListedSecret,
    token::{Grant, Token, TokenDigest},
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
    token_list: TokenListPoller,
    metrics: Metrics,
}

impl Authenticator {
    /// Accepts the static `tokens`, and those that the validator accepts.
    pub fn new(
        config: Config,
        validator: Validator,
        tokens: impl IntoIterator<Item = (TokenDigest, Grant)>,
    ) -> Self {
        Self(Arc::new(Inner {
            token_cache: TokenCache::new(config.capacity, config.forget_invalid_after),
            local_tokens: LocalTokens::new(tokens),
            pending: PendingValidations::default(),
            token_list: TokenListPoller::new(config.list_interval),
            metrics: Metrics::new(),
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
        let accept = |grant| {
            inner.metrics.known.increment(1);
            CacheLookup::Decided(Ok(AuthenticatedToken { grant, digest, first_seen: false }))
        };
        if let Some(grant) = inner.local_tokens.get_and_mark_used(&digest) {
            return accept(grant);
        }
        if let Some(cached) = inner.token_cache.valid(&digest) {
            if cached.is_missing_plaintext() {
                return CacheLookup::Restored(cached, digest);
            }
            return accept(Arc::clone(cached.grant()));
        }
        if let Some(denied) = inner.token_cache.rejection(&digest) {
            inner.metrics.refused.increment(1);
            return CacheLookup::Decided(Err(denied));
        }
        let Ok(token) = Token::from_header(header) else {
            inner.metrics.malformed.increment(1);
            return CacheLookup::Decided(Err(AuthError::Unknown));
        };
        if inner.token_cache.is_selector_revoked(&token) {
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
                Ok(authenticated) => Ok(Some(authenticated.grant)),
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
        let Inner { config, token_cache, pending, token_list, .. } = &*self.0;
        let Some(validator) = self.0.upstream_validator() else {
            return std::future::pending().await;
        };
        tokio::join!(
            first_validation::run(pending, token_cache, validator, config.deadline),
            revalidation::run(token_cache, validator, token_list, config.revalidate_after),
            token_list.run(token_cache, validator),
        );
    }

    /// Rejects the token that is `named` from now on, because it has just been deleted at upstream;
    /// upstream's list and caches may still contain it.
    pub fn revoke(&self, named: &ListedSecret) {
        let digests = self.0.token_cache.revoke_token(named);
        if let Some(validator) = self.0.upstream_validator() {
            for digest in &digests {
                validator.credentials.revoke(digest);
            }
        }
        self.0.token_list.refresh();
    }

    /// Polls upstream's token list and revalidates the token that is `named`, because a token has just
    /// been created or changed at upstream.
    pub fn revalidate(&self, named: Option<&ListedSecret>) {
        if let Some(named) = named {
            self.0.token_cache.mark_stale(named);
        }
        self.0.token_list.refresh();
    }

    /// Removes a token that the operator no longer configures from the cache and from the credentials.
    /// If it is presented again, it is validated like a first-seen token.
    pub fn remove_token(&self, token: &TokenDigest) {
        self.0.token_cache.remove(token);
        if let Some(validator) = self.0.upstream_validator() {
            validator.remove_credential(token);
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
        if let Some(validator) = self.0.upstream_validator() {
            for (digest, cached) in self.0.token_cache.valid_entries() {
                validator.credentials.expect_token(digest, cached.grant());
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

impl Inner {
    fn upstream_validator(&self) -> Option<&UpstreamValidator> {
        match &self.validator {
            Validator::StaticOnly => None,
            Validator::Upstream(validator) => Some(validator),
        }
    }

    /// Completes a cache entry of an earlier process with the token's plaintext.
    fn record_plaintext(&self, cached: &CachedToken, header: &str) {
        if let Ok(token) = Token::from_header(header) {
            self.offer_credential(&token, cached.grant());
            cached.set_plaintext(token);
        }
    }

    fn offer_credential(&self, token: &Token, grant: &Grant) {
        if let Some(validator) = self.upstream_validator() {
            validator.offer_credential(token, grant);
        }
    }
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
