//! First-seen tokens that wait for validation: one validation per token, shared by all requests that
//! present it.
//!
//! This is only the queue: [`first_validation`](super::first_validation) takes batches from it, validates
//! them and resolves them. It is made by hand, because a cache that computes missing entries once, such
//! as moka, computes each by itself and neither batches nor orders them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{Notify, oneshot};

use super::error::AuthError;
use crate::token::{Grant, Token, TokenDigest};

/// The answer to a request that waits for a validation.
pub(super) type GrantResult = Result<Arc<Grant>, AuthError>;

/// The maximum number of waiting tokens; further ones are rejected as unavailable.
const CAPACITY: usize = 10_000;

/// The maximum number of waiting tokens at which delegated ones are still queued: `/edge/validate`
/// takes a thousand tokens from any client and must not fill the queue for presented tokens.
const DELEGATED_CAPACITY: usize = CAPACITY / 2;

/// The maximum size of a batch, in tokens and in bytes: Unleash reads bodies up to 100 kB.
const MAX_BATCH_LEN: usize = 500;
const MAX_BATCH_BYTES: usize = 60_000;

/// The part of each batch that is reserved for delegated tokens, if there are any.
const DELEGATED_SHARE: usize = MAX_BATCH_LEN / 4;

/// The priority of a validation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Priority {
    /// A client presents the token to authenticate itself.
    Presented,
    /// A client asks whether the token is valid (`/edge/validate`).
    Delegated,
}

/// The waiting tokens, and the requests that wait for them.
#[derive(Debug, Default)]
pub(super) struct PendingValidations {
    state: Mutex<State>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// By digest: the token until it is taken into a batch, and the waiting requests.
    tokens: HashMap<TokenDigest, (Option<Token>, Vec<oneshot::Sender<GrantResult>>)>,
    /// Tokens not yet taken, in the order of arrival. Presented ones are taken first, except for the
    /// share that is reserved for delegated ones.
    presented: Vec<TokenDigest>,
    delegated: Vec<TokenDigest>,
}

impl State {
    /// Whether there is no token left to take; batches may still be in flight.
    fn is_drained(&self) -> bool {
        self.presented.is_empty() && self.delegated.is_empty()
    }
}

impl PendingValidations {
    /// Queues `token`, or joins the validation that is queued already; `None` when the queue is full.
    pub(super) fn enqueue(
        &self,
        token: Token,
        priority: Priority,
    ) -> Option<oneshot::Receiver<GrantResult>> {
        let (sender, receiver) = oneshot::channel();
        let digest = token.digest();
        let mut waiting = self.lock();
        if let Some((_, waiters)) = waiting.tokens.get_mut(&digest) {
            // Cancelled requests are removed, so that retries do not accumulate.
            waiters.retain(|waiter| !waiter.is_closed());
            waiters.push(sender);
        } else {
            let capacity = match priority {
                Priority::Presented => CAPACITY,
                Priority::Delegated => DELEGATED_CAPACITY,
            };
            if waiting.tokens.len() >= capacity {
                return None;
            }
            waiting.tokens.insert(digest, (Some(token), vec![sender]));
            match priority {
                Priority::Presented => waiting.presented.push(digest),
                Priority::Delegated => waiting.delegated.push(digest),
            }
            self.wake.notify_one();
        }
        Some(receiver)
    }

    /// Waits until there are tokens to take.
    pub(super) async fn wait(&self) {
        while self.lock().is_drained() {
            self.wake.notified().await;
        }
    }

    /// Takes the next tokens to validate; the caller must resolve each of them.
    pub(super) fn next_batch(&self) -> Vec<Token> {
        let mut waiting = self.lock();
        let State { tokens, presented, delegated } = &mut *waiting;
        let mut bytes = 0;
        let mut batch = Vec::new();
        let share = MAX_BATCH_LEN - delegated.len().min(DELEGATED_SHARE);
        for (queued, most) in [(presented, share), (delegated, MAX_BATCH_LEN)] {
            let mut seen = 0;
            for digest in queued.iter().take(most - batch.len()) {
                let Some(token) = tokens.get(digest).and_then(|(token, _)| token.as_ref()) else {
                    seen += 1;
                    continue;
                };
                bytes += token.expose().len();
                if bytes > MAX_BATCH_BYTES && !batch.is_empty() {
                    break;
                }
                seen += 1;
                batch.extend(tokens.get_mut(digest).and_then(|(token, _)| token.take()));
            }
            queued.drain(..seen);
        }
        batch
    }

    /// Fails all requests that wait for tokens which were taken and never resolved, because the task
    /// that took them has ended.
    pub(super) fn drop_in_flight(&self) {
        self.lock().tokens.retain(|_, (untaken, _)| untaken.is_some());
    }

    /// Answers all requests that wait for a token.
    pub(super) fn resolve(&self, digest: &TokenDigest, answer: &GrantResult) {
        let settled = self.lock().tokens.remove(digest);
        for waiter in settled.into_iter().flat_map(|(_, waiters)| waiters) {
            // A cancelled request needs no answer.
            let _ = waiter.send(answer.clone());
        }
    }

    /// A panic under this lock leaves plain collections, usable as they are.
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(n: usize) -> Token {
        Token::parse(&format!("*:dev.secret-{n}")).unwrap()
    }

    #[tokio::test]
    async fn concurrent_requests_with_one_token_share_one_validation() {
        let queue = PendingValidations::default();
        let first = queue.enqueue(token(1), Priority::Presented).unwrap();
        queue.wait().await;
        assert_eq!(queue.next_batch(), [token(1)]);
        let second = queue.enqueue(token(1), Priority::Presented).unwrap();
        assert!(queue.next_batch().is_empty(), "it is in flight already");
        queue.resolve(&token(1).digest(), &Err(AuthError::Unknown));
        assert_eq!(first.await.unwrap(), Err(AuthError::Unknown));
        assert_eq!(second.await.unwrap(), Err(AuthError::Unknown));
    }

    #[tokio::test]
    async fn a_token_with_a_dropped_validation_can_be_queued_again() {
        let queue = PendingValidations::default();
        let join = |n| queue.enqueue(token(n), Priority::Presented);
        let (taken, untaken) = (join(1).unwrap(), join(2).unwrap());
        assert_eq!(queue.next_batch().len(), 2);
        drop(untaken);
        let waiting = join(3).unwrap();
        queue.drop_in_flight();
        assert!(taken.await.is_err(), "the validation was dropped");
        assert_eq!(queue.next_batch(), [token(3)]);
        let _again = join(1).unwrap();
        assert_eq!(queue.next_batch(), [token(1)]);
        drop(waiting);
    }

    #[test]
    fn batches_and_the_queue_are_bounded() {
        let queue = PendingValidations::default();
        let waiting: Vec<_> =
            (0..CAPACITY).map(|n| queue.enqueue(token(n), Priority::Presented)).collect();
        assert!(waiting.iter().all(Option::is_some));
        assert!(queue.enqueue(token(CAPACITY), Priority::Presented).is_none());
        let sizes: Vec<_> =
            std::iter::from_fn(|| Some(queue.next_batch().len()).filter(|n| *n > 0)).collect();
        assert_eq!(sizes, [MAX_BATCH_LEN; CAPACITY / MAX_BATCH_LEN]);
    }

    #[test]
    fn presented_tokens_are_taken_before_delegated_ones() {
        let queue = PendingValidations::default();
        let delegate = |n| queue.enqueue(token(n), Priority::Delegated);
        let delegated: Vec<_> = (0..CAPACITY).filter_map(delegate).collect();
        assert_eq!(delegated.len(), DELEGATED_CAPACITY);
        let present = |n| queue.enqueue(token(n), Priority::Presented);
        let presented: Vec<_> = (CAPACITY..CAPACITY + MAX_BATCH_LEN).map(present).collect();
        assert!(presented.iter().all(Option::is_some));
        let batch = queue.next_batch();
        let last = MAX_BATCH_LEN - DELEGATED_SHARE - 1;
        assert_eq!((&batch[0], &batch[last]), (&token(CAPACITY), &token(CAPACITY + last)));
        assert_eq!(
            (&batch[last + 1], batch.len()),
            (&token(0), MAX_BATCH_LEN),
            "delegated tokens get their share"
        );
    }

    #[test]
    fn a_batch_of_long_tokens_stays_below_what_upstream_reads() {
        let queue = PendingValidations::default();
        let long = |n: usize| Token::parse(&format!("*:dev.{}-{n}", "x".repeat(490))).unwrap();
        let _waiting: Vec<_> =
            (0..300).map(|n| queue.enqueue(long(n), Priority::Presented)).collect();
        let bytes = queue.next_batch().iter().map(|token| token.expose().len()).sum::<usize>();
        assert!((50_000..=MAX_BATCH_BYTES).contains(&bytes), "{bytes}");
    }
}
