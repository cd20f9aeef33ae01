//! Validates tokens at upstream, and hands the valid ones to the credentials.
//!
//! This module interprets upstream's responses. It changes no cached token: the callers record the
//! results. How often it is called is up to them too, but it sends nothing before a `Retry-After` of
//! upstream has passed.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use tokio::{sync::Notify, time::Instant};
use tracing::{info, warn};

use super::token_cache::{RequestStart, TokenCache};
use crate::{
    event_log::EventLog,
    fleet::Fleet,
    protocol::tokens::ValidatedToken,
    telemetry::error_chain,
    token::{Grant, Token, TokenDigest, TokenKind},
    upstream::{AdminToken, EnvironmentTokens, TokenAccess, Upstream},
};

/// A token that upstream has denied once is checked again after this delay; it is rejected if it is
/// denied again.
pub(super) const RECHECK_DELAY: Duration = Duration::from_secs(5);

/// The pause after upstream did not answer, or for a single token after its probe failed.
pub(super) const FAILURE_PAUSE: Duration = Duration::from_secs(15);

const MAX_CONCURRENT_PROBES: usize = 8;

/// Validates tokens at upstream.
#[derive(Debug)]
pub struct UpstreamValidator {
    pub(super) upstream: Upstream,
    pub(super) admin: Option<AdminToken>,
    pub(super) credentials: EnvironmentTokens,
    credentials_changed: Arc<Notify>,
    pub(super) event_log: EventLog,
    pub(super) fleet: Option<Fleet>,
    /// Whether the latest validation request failed.
    is_failing: AtomicBool,
    /// No validation request is sent before this time (`Retry-After` of upstream).
    paused_until: Mutex<Instant>,
}

/// The results of validating one batch of tokens.
#[derive(Debug)]
pub(super) struct ValidationBatch {
    pub(super) start: RequestStart,
    /// Empty if upstream has not answered.
    pub(super) results: HashMap<TokenDigest, ValidationResult>,
    /// How long cached tokens are not to be validated.
    pub(super) pause: Duration,
}

/// The result of validating one token at upstream.
#[derive(Debug)]
pub(super) enum ValidationResult {
    Valid(Grant),
    Forbidden(Grant),
    Invalid,
    /// Upstream has not answered the probe; the token is not to be validated for the duration of `pause`.
    Failed {
        pause: Duration,
    },
}

impl UpstreamValidator {
    /// A validator that uses upstream's token list if it has an `admin` token; `event_log` tells when that
    /// list changed. In a `fleet` one instance reads that list for all.
    ///
    /// Each valid client token is offered to `credentials`, to fetch flags with where the edge has no
    /// token configured; `credentials_changed` is notified when that extends the set of flags that can be
    /// fetched.
    pub fn new(
        upstream: Upstream,
        admin: Option<AdminToken>,
        credentials: EnvironmentTokens,
        credentials_changed: Arc<Notify>,
        event_log: EventLog,
        fleet: Option<Fleet>,
    ) -> Self {
        Self {
            upstream,
            admin,
            credentials,
            credentials_changed,
            event_log,
            fleet,
            is_failing: AtomicBool::new(false),
            paused_until: Mutex::new(Instant::now()),
        }
    }

    /// Offers a valid token to the credentials.
    pub(super) fn offer_credential(&self, token: &Token, grant: &Grant) {
        if grant.kind == TokenKind::Client && self.credentials.offer(token, grant) {
            self.credentials_changed.notify_one();
        }
    }

    /// Removes a token from the credentials, because it is no longer configured.
    pub(super) fn remove_credential(&self, token: &TokenDigest) {
        self.credentials.revoke(token);
        self.credentials_changed.notify_one();
    }

    /// Validates `tokens`.
    ///
    /// A token counts as valid only if a probe with it succeeds too: upstream's validation cache keeps
    /// a deleted token for long, and a token that was created and deleted between two polls never
    /// appears in the list. A token in the `cache` that does not validate is denied only if its probe
    /// fails too: upstream caches for minutes that it did not know a token, and the list may have shown it
    /// since.
    pub(super) async fn validate(&self, tokens: &[Token], cache: &TokenCache) -> ValidationBatch {
        let start = cache.start_request();
        let unanswered = |retry_after: Duration| ValidationBatch {
            start,
            results: HashMap::new(),
            pause: retry_after.max(FAILURE_PAUSE),
        };
        if let Some(pause) = self.remaining_pause() {
            return unanswered(pause);
        }
        let valid = match self.upstream.validate_tokens(tokens).await {
            Ok(valid) => valid,
            Err(error) => {
                if !self.is_failing.swap(true, Ordering::Relaxed) {
                    warn!(
                        error = error_chain(&error),
                        "Token validation at upstream failed; requests with first-seen tokens get 503"
                    );
                }
                let retry_after = error.retry().retry_after().unwrap_or_default();
                self.pause(retry_after);
                return unanswered(retry_after);
            }
        };
        if self.is_failing.swap(false, Ordering::Relaxed) {
            info!("Upstream validates tokens again");
        }
        // Tokens in the response that were not requested are ignored.
        let mut results: HashMap<_, _> =
            tokens.iter().map(|token| (token.digest(), ValidationResult::Invalid)).collect();
        let valid = valid.into_iter().filter(|it| results.contains_key(&it.token.digest()));
        let mut probed: HashMap<_, _> = valid.map(|it| (it.token.digest(), (it, true))).collect();
        for token in tokens {
            if let Some(known) = cache.valid(&token.digest()) {
                let grant = Grant::clone(known.grant());
                let known = ValidatedToken { token: token.clone(), grant };
                probed.entry(token.digest()).or_insert((known, false));
            }
        }
        let probes: Vec<_> = stream::iter(probed)
            .map(|(digest, (ValidatedToken { token, grant }, is_validated))| async move {
                let access = self.upstream.probe_access(&token, grant.kind).await;
                (digest, grant, is_validated, access)
            })
            .buffer_unordered(MAX_CONCURRENT_PROBES)
            .collect()
            .await;
        let mut pause = Duration::ZERO;
        for (digest, grant, is_validated, access) in probes {
            let result = match access {
                Ok(TokenAccess::Granted) => ValidationResult::Valid(grant),
                Ok(TokenAccess::Forbidden) if is_validated => ValidationResult::Forbidden(grant),
                Ok(TokenAccess::Forbidden | TokenAccess::Unauthorized) => ValidationResult::Invalid,
                Err(error) => {
                    let retry_after = error.retry().retry_after().unwrap_or_default();
                    // A failure in one environment does not pause validation of the others.
                    if error.is_throttled() {
                        pause = pause.max(retry_after);
                    }
                    ValidationResult::Failed { pause: retry_after.max(FAILURE_PAUSE) }
                }
            };
            results.insert(digest, result);
        }
        self.pause(pause);
        ValidationBatch { start, results, pause }
    }

    /// Sends no validation request for the duration of `pause`.
    fn pause(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut paused_until = self.paused_until.lock().unwrap_or_else(PoisonError::into_inner);
        *paused_until = until.max(*paused_until);
    }

    /// The rest of the current pause; `None` if there is none.
    pub(super) fn remaining_pause(&self) -> Option<Duration> {
        let paused_until = *self.paused_until.lock().unwrap_or_else(PoisonError::into_inner);
        paused_until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }
}
