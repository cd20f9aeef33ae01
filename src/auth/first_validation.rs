//! Validates first-seen tokens in batches, and answers the requests that wait for them.
//!
//! In a fleet another instance may know the result, or be validating the token: then it is validated here only
//! if that one has no result in time.
//!
//! Results go to the token cache and valid client tokens to the credentials. Cached tokens are validated
//! again by [`revalidation`](super::revalidation).

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::{sync::mpsc, time::sleep};

use super::{
    error::AuthError,
    pending_validations::PendingValidations,
    shared_verdicts::{self, SharedVerdicts},
    token_cache::{InsertOutcome, RequestStart, TokenCache},
    upstream_validator::{UpstreamValidator, ValidationBatch, ValidationResult},
};
use crate::{
    fleet::{Fleet, SharedAnswers},
    rate_limit::{Rate, RateLimiter},
    token::Token,
};

/// A batch is sent this long after its first token arrived, so that a fleet of clients which starts
/// at once is validated together.
const BATCH_WINDOW: Duration = Duration::from_millis(3);

/// Rate limit of validation requests for first-seen tokens.
const VALIDATION_RATE: Rate = Rate { burst: 20, interval: Duration::from_millis(100) };

/// Validates the pending tokens as they arrive, until dropped. `deadline` is the longest that a request
/// waits.
pub(super) async fn run(
    pending: &PendingValidations,
    cache: &TokenCache,
    validator: &UpstreamValidator,
    deadline: Duration,
) {
    pending.drop_in_flight();
    let limiter = Mutex::new(RateLimiter::new(VALIDATION_RATE));
    let answers = validator.fleet.as_ref().map(Fleet::answers);
    let validation = FirstValidation { pending, cache, validator, limiter, answers };
    // Bounded by the number of pending tokens.
    let (sender, claimed) = mpsc::unbounded_channel();
    tokio::join!(
        validation.validate_pending(&sender),
        validation.wait_for_others(claimed, deadline)
    );
}

struct FirstValidation<'a> {
    pending: &'a PendingValidations,
    cache: &'a TokenCache,
    validator: &'a UpstreamValidator,
    limiter: Mutex<RateLimiter>,
    /// The answers that a fleet shares, if this instance is in one.
    answers: Option<SharedAnswers>,
}

impl FirstValidation<'_> {
    /// Validates the pending tokens, except for those that other instances validate.
    async fn validate_pending(&self, claimed: &mpsc::UnboundedSender<Vec<Token>>) {
        loop {
            self.pending.wait().await;
            sleep(BATCH_WINDOW).await;
            self.wait_for_rate().await;
            let tokens = self.pending.next_batch();
            let Some(answers) = &self.answers else {
                self.validate_batch(tokens).await;
                continue;
            };
            let verdicts = shared_verdicts::claim(answers, tokens).await;
            let (open, others) = self.use_known(verdicts);
            if !others.is_empty() {
                // The receiver lives as long as this loop.
                let _ = claimed.send(others);
            }
            self.validate_batch(open).await;
        }
    }

    /// Waits for the verdicts of other instances, and validates the tokens without one.
    async fn wait_for_others(
        &self,
        mut claimed: mpsc::UnboundedReceiver<Vec<Token>>,
        deadline: Duration,
    ) {
        let mut waiting = FuturesUnordered::new();
        loop {
            tokio::select! {
                Some(tokens) = claimed.recv() => {
                    let Some(answers) = &self.answers else { continue };
                    waiting.push(async move {
                        let verdicts =
                            shared_verdicts::wait_for_others(answers, tokens, deadline).await;
                        let (open, _) = self.use_known(verdicts);
                        if !open.is_empty() {
                            self.wait_for_rate().await;
                            self.validate_batch(open).await;
                        }
                    });
                }
                Some(()) = waiting.next() => {}
                else => std::future::pending().await,
            }
        }
    }

    async fn wait_for_rate(&self) {
        if self.validator.remaining_pause().is_some() {
            return;
        }
        loop {
            let acquired = self.limiter.lock().unwrap_or_else(PoisonError::into_inner).acquire();
            match acquired {
                Ok(()) => return,
                Err(wait) => sleep(wait).await,
            }
        }
    }

    /// Answers the requests for tokens that other instances have validated. Returns the tokens to validate
    /// here, and those that others are validating.
    fn use_known(
        &self,
        SharedVerdicts { known, claimed, mut open }: SharedVerdicts,
    ) -> (Vec<Token>, Vec<Token>) {
        for (token, result, asked_at) in known {
            let start = self.cache.request_started_at(asked_at);
            if self.cache.is_superseded_by_list(&token, start) {
                open.push(token);
            } else {
                self.conclude(&token, Some(result), start);
            }
        }
        (open, claimed)
    }

    /// Validates one batch of pending tokens and answers the requests that wait for them.
    async fn validate_batch(&self, tokens: Vec<Token>) {
        if tokens.is_empty() {
            return;
        }
        let ValidationBatch { start, mut results, .. } =
            self.validator.validate(&tokens, self.cache).await;
        let mut shared = Vec::new();
        for token in &tokens {
            let result = results.remove(&token.digest());
            if self.answers.is_some() {
                shared.push(shared_verdicts::share(token, result.as_ref()));
            }
            self.conclude(token, result, start);
        }
        if let (Some(answers), Some(asked_at)) = (&self.answers, start.requested_at()) {
            answers.settle(&shared, asked_at).await;
        }
    }

    /// Records a result, and answers the requests that wait for it.
    fn conclude(&self, token: &Token, result: Option<ValidationResult>, start: RequestStart) {
        let fallback = match result {
            Some(ValidationResult::Valid(grant)) => {
                match self.cache.record_valid(token, grant.clone(), start) {
                    InsertOutcome::New | InsertOutcome::Unchanged => {
                        self.validator.offer_credential(token, &grant);
                        Ok(Arc::new(grant))
                    }
                    InsertOutcome::Outdated | InsertOutcome::Revoked => Err(AuthError::Unknown),
                }
            }
            Some(ValidationResult::Forbidden(grant)) => {
                self.cache.record_forbidden(token, grant, start);
                Err(AuthError::Forbidden)
            }
            Some(ValidationResult::Invalid) => {
                self.cache.record_invalid(token, start);
                Err(AuthError::Unknown)
            }
            Some(ValidationResult::Failed { .. }) | None => Err(AuthError::Unavailable),
        };
        // The cache may have a newer result by now; a full cache may not have taken this one.
        let answer = self.cache.lookup(token).unwrap_or(fallback);
        self.pending.resolve(&token.digest(), &answer);
    }
}
