//! Validates first-seen tokens in batches, and answers the requests that wait for them.
//!
//! Results go to the token cache and valid client tokens to the credentials. Cached tokens are validated
//! again by [`revalidation`](super::revalidation).

use std::{sync::Arc, time::Duration};

use super::{
    error::AuthError,
    pending_validations::PendingValidations,
    token_cache::{InsertOutcome, TokenCache},
    upstream_validator::{UpstreamValidator, ValidationBatch, ValidationResult},
};
use crate::rate_limit::{Rate, RateLimiter};

/// A batch is sent this long after its first token arrived, so that a fleet of clients which starts
/// at once is validated together.
const BATCH_WINDOW: Duration = Duration::from_millis(3);

/// Rate limit of validation requests for first-seen tokens.
const VALIDATION_RATE: Rate = Rate { burst: 20, interval: Duration::from_millis(100) };

/// Validates the pending tokens as they arrive, until dropped.
pub(super) async fn run(
    pending: &PendingValidations,
    cache: &TokenCache,
    validator: &UpstreamValidator,
) {
    pending.drop_in_flight();
    let mut limiter = RateLimiter::new(VALIDATION_RATE);
    loop {
        pending.wait().await;
        tokio::time::sleep(BATCH_WINDOW).await;
        if validator.remaining_pause().is_none() {
            while let Err(wait) = limiter.acquire() {
                tokio::time::sleep(wait).await;
            }
        }
        validate_batch(pending, cache, validator).await;
    }
}

/// Validates one batch of pending tokens and answers the requests that wait for them.
async fn validate_batch(
    pending: &PendingValidations,
    cache: &TokenCache,
    validator: &UpstreamValidator,
) {
    let tokens = pending.next_batch();
    let ValidationBatch { start, mut results, .. } = validator.validate(&tokens, cache).await;
    for token in &tokens {
        let digest = token.digest();
        let fallback = match results.remove(&digest) {
            Some(ValidationResult::Valid(grant)) => {
                match cache.record_valid(token, grant.clone(), start) {
                    InsertOutcome::New | InsertOutcome::Unchanged => {
                        validator.offer_credential(token, &grant);
                        Ok(Arc::new(grant))
                    }
                    InsertOutcome::Outdated | InsertOutcome::Revoked => Err(AuthError::Unknown),
                }
            }
            Some(ValidationResult::Forbidden(grant)) => {
                cache.record_forbidden(token, grant, start);
                Err(AuthError::Forbidden)
            }
            Some(ValidationResult::Invalid) => {
                cache.record_invalid(token, start);
                Err(AuthError::Unknown)
            }
            Some(ValidationResult::Failed { .. }) | None => Err(AuthError::Unavailable),
        };
        // The cache may have a newer result by now; a full cache may not have taken this one.
        let answer = cache.lookup(token).unwrap_or(fallback);
        pending.resolve(&digest, &answer);
    }
}
