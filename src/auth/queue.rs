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
    /// Its issuer knows it and forbids its use, for instance because it does not serve the token's
    /// environment.
    #[error("the token is valid, but its issuer forbids its use")]
    Forbidden,
    /// Nobody can judge it at the moment.
    #[error("the token cannot be judged at the moment")]
    Unavailable,
}

/// What a waiting request is told.
pub(super) type Answer = Result<Arc<Grant>, Denied>;

/// The most tokens that wait at a time; further ones are turned away.
const CAPACITY: usize = 10_000;

/// The most that wait at a time on behalf of others: `/edge/validate` takes a thousand tokens from
/// anybody, and must not fill the line for those who present one.
const CAPACITY_FOR_OTHERS: usize = CAPACITY / 2;

/// The most tokens of one question, in number and in bytes: Unleash reads bodies up to 100 kB.
const BATCH: usize = 500;
const BATCH_BYTES: usize = 60_000;

/// What is kept of each question for those who ask on behalf of others.
const SHARE_OF_OTHERS: usize = BATCH / 4;

/// On whose behalf a verdict is wanted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Behalf {
    /// Of who presents the token.
    Bearer,
    /// Of somebody who asks about it.
    Other,
}

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
    /// Those that are not taken yet, in the order of arrival: presented ones, which are taken
    /// first except for the others' share, and those that others ask about.
    presented: Vec<TokenDigest>,
    asked_about: Vec<TokenDigest>,
}

impl Waiting {
    /// Whether no token waits to be taken.
    fn is_taken(&self) -> bool {
        self.presented.is_empty() && self.asked_about.is_empty()
    }
}

impl Queue {
    /// Waits in line with `token`; `None` when the line is full.
    pub(super) fn join(&self, token: Token, behalf: Behalf) -> Option<oneshot::Receiver<Answer>> {
        let (sender, receiver) = oneshot::channel();
        let digest = token.digest();
        let mut waiting = self.lock();
        if let Some((_, waiters)) = waiting.tokens.get_mut(&digest) {
            // Requests that gave up make room, so that retries do not pile up.
            waiters.retain(|waiter| !waiter.is_closed());
            waiters.push(sender);
        } else {
            let capacity = match behalf {
                Behalf::Bearer => CAPACITY,
                Behalf::Other => CAPACITY_FOR_OTHERS,
            };
            if waiting.tokens.len() >= capacity {
                return None;
            }
            waiting.tokens.insert(digest, (Some(token), vec![sender]));
            match behalf {
                Behalf::Bearer => waiting.presented.push(digest),
                Behalf::Other => waiting.asked_about.push(digest),
            }
            self.wake.notify_one();
        }
        Some(receiver)
    }

    /// Returns when there are tokens to be taken.
    pub(super) async fn wait(&self) {
        while self.lock().is_taken() {
            self.wake.notified().await;
        }
    }

    /// Takes the next tokens to ask for; each must be settled.
    pub(super) fn take(&self) -> Vec<Token> {
        let mut waiting = self.lock();
        let Waiting { tokens, presented, asked_about } = &mut *waiting;
        let mut bytes = 0;
        let mut batch = Vec::new();
        let share = BATCH - asked_about.len().min(SHARE_OF_OTHERS);
        for (line, most) in [(presented, share), (asked_about, BATCH)] {
            let mut seen = 0;
            for digest in line.iter().take(most - batch.len()) {
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
            line.drain(..seen);
        }
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
        let first = queue.join(token(1), Behalf::Bearer).unwrap();
        queue.wait().await;
        assert_eq!(queue.take(), [token(1)]);
        let second = queue.join(token(1), Behalf::Bearer).unwrap();
        assert!(queue.take().is_empty(), "it is being asked for already");
        queue.settle(&token(1).digest(), &Err(Denied::Unknown));
        assert_eq!(first.await.unwrap(), Err(Denied::Unknown));
        assert_eq!(second.await.unwrap(), Err(Denied::Unknown));
    }

    #[tokio::test]
    async fn a_token_whose_question_was_abandoned_can_be_asked_for_again() {
        let queue = Queue::default();
        let join = |n| queue.join(token(n), Behalf::Bearer);
        let (taken, untaken) = (join(1).unwrap(), join(2).unwrap());
        assert_eq!(queue.take().len(), 2);
        drop(untaken);
        let waiting = join(3).unwrap();
        queue.abandon();
        assert!(taken.await.is_err(), "nobody will answer");
        assert_eq!(queue.take(), [token(3)]);
        let _again = join(1).unwrap();
        assert_eq!(queue.take(), [token(1)]);
        drop(waiting);
    }

    #[test]
    fn batches_and_the_line_are_bounded() {
        let queue = Queue::default();
        let waiting: Vec<_> = (0..CAPACITY).map(|n| queue.join(token(n), Behalf::Bearer)).collect();
        assert!(waiting.iter().all(Option::is_some));
        assert!(queue.join(token(CAPACITY), Behalf::Bearer).is_none());
        let sizes: Vec<_> =
            std::iter::from_fn(|| Some(queue.take().len()).filter(|n| *n > 0)).collect();
        assert_eq!(sizes, [BATCH; CAPACITY / BATCH]);
    }

    #[test]
    fn who_presents_a_token_goes_before_those_who_ask_about_many() {
        let queue = Queue::default();
        let asked = |n| queue.join(token(n), Behalf::Other);
        let asked: Vec<_> = (0..CAPACITY).filter_map(asked).collect();
        assert_eq!(asked.len(), CAPACITY_FOR_OTHERS);
        let present = |n| queue.join(token(n), Behalf::Bearer);
        let presented: Vec<_> = (CAPACITY..CAPACITY + BATCH).map(present).collect();
        assert!(presented.iter().all(Option::is_some));
        let batch = queue.take();
        let last = BATCH - SHARE_OF_OTHERS - 1;
        assert_eq!((&batch[0], &batch[last]), (&token(CAPACITY), &token(CAPACITY + last)));
        assert_eq!((&batch[last + 1], batch.len()), (&token(0), BATCH), "others get their share");
    }

    #[test]
    fn a_batch_of_long_tokens_stays_below_what_upstream_reads() {
        let queue = Queue::default();
        let long = |n: usize| Token::parse(&format!("*:dev.{}-{n}", "x".repeat(490))).unwrap();
        let _waiting: Vec<_> = (0..300).map(|n| queue.join(long(n), Behalf::Bearer)).collect();
        let bytes = queue.take().iter().map(|token| token.expose().len()).sum::<usize>();
        assert!((50_000..=BATCH_BYTES).contains(&bytes), "{bytes}");
    }
}
