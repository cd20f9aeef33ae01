//! Validates cached tokens again when they are due; their state does not change while upstream fails.
//!
//! This is rare while the token list is polled successfully. While the list is unavailable, tokens are
//! revalidated at the interval of the list.
//!
//! A token is rejected only when its denial is repeated: one response of a faulty upstream, for instance
//! an empty list of valid tokens, rejects no token.

use std::time::Duration;

use tracing::info;

use super::{
    token_cache::{InsertOutcome, RejectOutcome, TokenCache},
    token_list_poller::TokenListPoller,
    upstream_validator::{RECHECK_DELAY, UpstreamValidator, ValidationBatch, ValidationResult},
};

pub(super) const INTERVAL: Duration = Duration::from_secs(1);

/// The maximum number of tokens that are revalidated at once.
pub(super) const MAX_BATCH_LEN: usize = 50;

/// Revalidates tokens that are older than `revalidate_after`, until dropped.
pub(super) async fn run(
    cache: &TokenCache,
    validator: &UpstreamValidator,
    token_list: &TokenListPoller,
    revalidate_after: Duration,
) {
    let mut pause = INTERVAL;
    loop {
        tokio::time::sleep(pause).await;
        let age = revalidate_after.min(token_list.max_unconfirmed_age());
        pause = revalidate_due(cache, validator, age).await;
    }
}

/// Revalidates one batch of tokens that were confirmed longer than `age` ago; returns the pause before
/// the next batch.
///
/// A token whose validation fails is postponed by itself and does not delay others.
pub(super) async fn revalidate_due(
    cache: &TokenCache,
    validator: &UpstreamValidator,
    age: Duration,
) -> Duration {
    let due = cache.take_due_for_revalidation(age, MAX_BATCH_LEN);
    if due.is_empty() {
        return INTERVAL;
    }
    let ValidationBatch { start, mut results, pause } = validator.validate(&due, cache).await;
    for token in &due {
        let digest = token.digest();
        match results.remove(&digest) {
            Some(ValidationResult::Valid(grant)) => {
                let accepted = cache.record_valid(token, grant.clone(), start);
                // The grant has changed.
                if accepted == InsertOutcome::New {
                    validator.offer_credential(token, &grant);
                }
            }
            Some(ValidationResult::Forbidden(grant)) => {
                cache.record_forbidden(token, grant, start);
            }
            Some(ValidationResult::Invalid) => match cache.record_denial(token, start) {
                RejectOutcome::NeedsRecheck => cache.postpone_revalidation(&digest, RECHECK_DELAY),
                // The rejection expires soon: if upstream was wrong, the token is validated again
                // after that.
                RejectOutcome::Rejected => {
                    info!(token = %token.masked(), "A token is no longer valid");
                    validator.credentials.revoke(&digest);
                }
                RejectOutcome::Outdated => {}
            },
            Some(ValidationResult::Failed { pause }) => {
                cache.postpone_revalidation(&digest, pause);
            }
            None => {}
        }
    }
    pause.max(INTERVAL)
}
