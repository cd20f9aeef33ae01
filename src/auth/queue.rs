//! First-seen tokens that wait for a verdict: each asked for once, however many requests wait.
//!
//! It neither asks nor judges; whoever does takes batches from it and settles them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{Notify, oneshot};

use crate::token::{Grant, Token, TokenDigest};

/// Why a token is not admitted.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Denied {
    /// No issuer knows it, or it is no token at all.
    #[error("the token is not valid")]
    Unknown,
    /// Nobody can judge it at the moment.
    #[error("the token cannot be judged at the moment")]
    Unavailable,
}

/// What a waiting request is told.
pub(super) type Answer = Result<Arc<Grant>, Denied>;

/// The most tokens that wait at a time; further ones are turned away.
const CAPACITY: usize = 10_000;

/// The most tokens of one question, in number and in bytes: Unleash reads bodies up to 100 kB.
const BATCH: usize = 500;
const BATCH_BYTES: usize = 60_000;

/// Tokens that wait, and the requests that wait for them.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    /// By digest: the token until it is taken, and who wants to know.
    tokens: HashMap<TokenDigest, (Option<Token>, Vec<oneshot::Sender<Answer>>)>,
    /// The order of arrival of those that are not taken yet.
    untaken: Vec<TokenDigest>,
}

impl Queue {
    /// Waits in line with `token`; `None` when the line is full.
    pub(super) fn join(&self, token: Token) -> Option<oneshot::Receiver<Answer>> {
        let (sender, receiver) = oneshot::channel();
        let digest = token.digest();
        let mut waiting = self.lock();
        if let Some((_, waiters)) = waiting.tokens.get_mut(&digest) {
            // Requests that gave up make room, so that retries do not pile up.
            waiters.retain(|waiter| !waiter.is_closed());
            waiters.push(sender);
        } else {
            if waiting.tokens.len() >= CAPACITY {
                return None;
            }
            waiting.tokens.insert(digest, (Some(token), vec![sender]));
            waiting.untaken.push(digest);
            self.wake.notify_one();
        }
        Some(receiver)
    }

    /// Returns when there are tokens to be taken.
    pub(super) async fn wait(&self) {
        while self.lock().untaken.is_empty() {
            self.wake.notified().await;
        }
    }

    /// Takes the next tokens to ask for; each must be settled.
    pub(super) fn take(&self) -> Vec<Token> {
        let mut waiting = self.lock();
        let Waiting { tokens, untaken } = &mut *waiting;
        let mut bytes = 0;
        let mut batch = Vec::new();
        let mut seen = 0;
        for digest in untaken.iter().take(BATCH) {
            let Some(token) = tokens.get(digest).and_then(|(token, _)| token.as_ref()) else {
                seen += 1;
                continue;
            };
            bytes += token.expose().len();
            if bytes > BATCH_BYTES && !batch.is_empty() {
                break;
            }
            seen += 1;
            batch.extend(tokens.get_mut(digest).and_then(|(token, _)| token.take()));
        }
        untaken.drain(..seen);
        batch
    }

    /// Turns away all who wait for tokens that were taken and never settled, because whoever took
    /// them died.
    pub(super) fn abandon(&self) {
        self.lock().tokens.retain(|_, (untaken, _)| untaken.is_some());
    }

    /// Tells all who wait for a token.
    pub(super) fn settle(&self, digest: &TokenDigest, answer: &Answer) {
        let settled = self.lock().tokens.remove(digest);
        for waiter in settled.into_iter().flat_map(|(_, waiters)| waiters) {
            // A request that gave up in the meantime needs no answer.
            let _ = waiter.send(answer.clone());
        }
    }

    /// A panic under this lock leaves plain collections, usable as they are.
    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(n: usize) -> Token {
        Token::parse(&format!("*:dev.secret-{n}")).unwrap()
    }

    #[tokio::test]
    async fn many_requests_with_one_token_ask_once_and_all_are_told() {
        let queue = Queue::default();
        let first = queue.join(token(1)).unwrap();
        queue.wait().await;
        assert_eq!(queue.take(), [token(1)]);
        let second = queue.join(token(1)).unwrap();
        assert!(queue.take().is_empty(), "it is being asked for already");
        queue.settle(&token(1).digest(), &Err(Denied::Unknown));
        assert_eq!(first.await.unwrap(), Err(Denied::Unknown));
        assert_eq!(second.await.unwrap(), Err(Denied::Unknown));
    }

    #[tokio::test]
    async fn a_token_whose_question_was_abandoned_can_be_asked_for_again() {
        let queue = Queue::default();
        let (taken, untaken) = (queue.join(token(1)).unwrap(), queue.join(token(2)).unwrap());
        assert_eq!(queue.take().len(), 2);
        drop(untaken);
        let waiting = queue.join(token(3)).unwrap();
        queue.abandon();
        assert!(taken.await.is_err(), "nobody will answer");
        assert_eq!(queue.take(), [token(3)]);
        let _again = queue.join(token(1)).unwrap();
        assert_eq!(queue.take(), [token(1)]);
        drop(waiting);
    }

    #[test]
    fn batches_and_the_line_are_bounded() {
        let queue = Queue::default();
        let waiting: Vec<_> = (0..CAPACITY).map(|n| queue.join(token(n))).collect();
        assert!(waiting.iter().all(Option::is_some));
        assert!(queue.join(token(CAPACITY)).is_none());
        let sizes: Vec<_> =
            std::iter::from_fn(|| Some(queue.take().len()).filter(|n| *n > 0)).collect();
        assert_eq!(sizes, [BATCH; CAPACITY / BATCH]);
    }

    #[test]
    fn a_batch_of_long_tokens_stays_below_what_upstream_reads() {
        let queue = Queue::default();
        let long = |n: usize| Token::parse(&format!("*:dev.{}-{n}", "x".repeat(490))).unwrap();
        let _waiting: Vec<_> = (0..300).map(|n| queue.join(long(n))).collect();
        let bytes = queue.take().iter().map(|token| token.expose().len()).sum::<usize>();
        assert!((50_000..=BATCH_BYTES).contains(&bytes), "{bytes}");
    }
}
