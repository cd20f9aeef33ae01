//! The loop that sends what waits, and the last flush.
//!
//! It knows the timer and the shutdown; whom it sends to is its caller's affair, when to try again
//! the outbox's.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::time::{MissedTickBehavior, interval_at, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::{
    lane::BatchId,
    outbox::{Dispatch, Outcome},
    pipeline::Pipeline,
};

/// How long after the grace the answers to batches under way are waited for.
const LAST_ANSWERS: Duration = Duration::from_secs(5);
/// How long they are waited for where the end is hurried.
const HURRIED_ANSWERS: Duration = Duration::from_secs(1);

/// How sending ends.
#[derive(Clone, Debug)]
pub struct Ending {
    /// Told when nothing more is reported.
    pub begins: CancellationToken,
    /// The longest that what is left may then take to be sent.
    pub grace: Duration,
    /// Told when that is not to be waited for.
    pub hurries: CancellationToken,
}

/// Sends a generation after each `interval` until the ending begins, then what is left within its
/// grace.
///
/// What could not be sent stays in the pipeline. Dropping the future loses nothing either, except
/// the knowledge of what came of batches that were under way: those will be sent again.
pub(super) async fn run<F>(
    pipeline: &Pipeline,
    interval: Duration,
    ending: &Ending,
    send: impl Fn(Dispatch) -> F,
) where
    F: Future<Output = (BatchId, Outcome)>,
{
    pipeline.recall();
    let mut ticks = interval_at(tokio::time::Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut under_way = FuturesUnordered::new();
    loop {
        dispatch(pipeline, &under_way, &send);
        tokio::select! {
            () = ending.begins.cancelled() => break,
            _ = ticks.tick() => pipeline.collect(now()),
            Some((id, outcome)) = under_way.next() => settle(pipeline, id, outcome),
            () = wake(pipeline) => {}
        }
    }
    pipeline.collect(now());
    pipeline.hurry();
    let flush = async {
        loop {
            dispatch(pipeline, &under_way, &send);
            if under_way.is_empty() && pipeline.wake().is_none() {
                break;
            }
            tokio::select! {
                Some((id, outcome)) = under_way.next() => settle(pipeline, id, outcome),
                () = wake(pipeline) => {}
            }
        }
    };
    let grace = ending.grace;
    let flushed = tokio::select! {
        flushed = timeout(grace, flush) => flushed.map_err(|_| LAST_ANSWERS),
        () = ending.hurries.cancelled() => Err(HURRIED_ANSWERS),
    };
    if let Err(patience) = flushed {
        tracing::warn!("Usage could not all be sent within {grace:?}, or until told to hurry");
        // No more is sent, but what is under way is waited for a little: what upstream took without
        // our knowing is sent again by the next run.
        let answers = async {
            while let Some((id, outcome)) = under_way.next().await {
                settle(pipeline, id, outcome);
            }
        };
        let _ = timeout(patience, answers).await;
    }
}

/// Lets a generation go after each `interval` until `shutdown`: there is nobody to send it to.
pub(super) async fn discard(pipeline: &Pipeline, interval: Duration, shutdown: &CancellationToken) {
    let mut ticks = interval_at(tokio::time::Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !shutdown.is_cancelled() {
        tokio::select! {
            () = shutdown.cancelled() => {}
            _ = ticks.tick() => {}
        }
        pipeline.collect(now());
        pipeline.discard();
    }
}

fn dispatch<F>(
    pipeline: &Pipeline,
    under_way: &FuturesUnordered<F>,
    send: &impl Fn(Dispatch) -> F,
) {
    while let Some(batch) = pipeline.next(now()) {
        under_way.push(send(batch));
    }
}

fn settle(pipeline: &Pipeline, id: BatchId, outcome: Outcome) {
    pipeline.settle(id, outcome, now(), rand::random());
}

/// Waits until a batch may be tried again; for ever when none waits for that.
async fn wake(pipeline: &Pipeline) {
    match pipeline.wake() {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// The runtime's clock, which tests can stop.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use std::{
        cell::{Cell, RefCell},
        future::pending,
        panic::AssertUnwindSafe,
        sync::Arc,
    };

    use futures_util::FutureExt as _;
    use jiff::Timestamp;

    use super::*;
    use crate::{
        token::{Environment, TokenDigest},
        usage::{
            counter::{Counter, CounterKey, Hour, Lost, Name},
            ledger::Counted,
        },
        wire::usage::ToggleStats,
    };

    const MINUTE: Duration = Duration::from_mins(1);

    fn count(pipeline: &Pipeline, yes: u64) {
        let stats = ToggleStats { yes, ..ToggleStats::default() };
        let (counter, _) = Counter::of(stats, &Arc::default(), |_| Name::Known);
        let hour = Hour::of(Timestamp::UNIX_EPOCH);
        let key = CounterKey { hour, app: "a".into(), flag: "f".into() };
        let counted = vec![Counted { key, name: Name::Known, counter }];
        let token = TokenDigest::of("token");
        let taken = pipeline.ledger.count(&Environment::new("dev"), counted, &token, hour);
        assert_eq!(taken, Ok(Lost(0)));
    }

    fn ending() -> Ending {
        let (begins, hurries) = (CancellationToken::new(), CancellationToken::new());
        Ending { begins, grace: MINUTE, hurries }
    }

    /// Runs the loop for a while; each batch has the next of the outcomes, at last `Sent`.
    async fn attempts(
        pipeline: &Pipeline,
        run_for: Duration,
        outcomes: &[Outcome],
    ) -> Vec<(u64, Outcome)> {
        let start = now();
        let attempts = RefCell::new(Vec::new());
        let send = |batch: Dispatch| {
            let mut attempts = attempts.borrow_mut();
            let outcome = outcomes.get(attempts.len()).copied().unwrap_or(Outcome::Sent);
            attempts.push(((now() - start).as_secs(), outcome));
            async move { (batch.id, outcome) }
        };
        let ending = ending();
        tokio::join!(run(pipeline, MINUTE, &ending, send), async {
            tokio::time::sleep(run_for).await;
            ending.begins.cancel();
        });
        attempts.into_inner()
    }

    #[tokio::test(start_paused = true)]
    async fn a_generation_is_sent_at_each_interval_and_the_last_at_shutdown() {
        let pipeline = Pipeline::new(10);
        count(&pipeline, 1);
        assert_eq!(attempts(&pipeline, 2 * MINUTE + MINUTE / 2, &[]).await, [(60, Outcome::Sent)]);
        count(&pipeline, 1);
        assert_eq!(attempts(&pipeline, MINUTE / 2, &[]).await, [(30, Outcome::Sent)]);
        assert_eq!(pipeline.totals(), crate::usage::outbox::Totals { sent: 2, dropped: 0 });
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_batch_is_tried_again_when_its_time_has_come() {
        let pipeline = Pipeline::new(10);
        count(&pipeline, 1);
        let pause = Outcome::Later(Some(Duration::from_secs(100)));
        let made = attempts(&pipeline, 5 * MINUTE, &[pause]).await;
        assert_eq!(made, [(60, pause), (160, Outcome::Sent)]);
    }

    #[tokio::test(start_paused = true)]
    async fn run_again_after_a_panic_it_sends_what_was_under_way() {
        let pipeline = Pipeline::new(10);
        count(&pipeline, 3);
        let ending = ending();
        let dies = |_| async { panic!("a batch that cannot be sent") };
        let died = AssertUnwindSafe(run(&pipeline, MINUTE, &ending, dies)).catch_unwind();
        assert!(died.await.is_err());
        count(&pipeline, 4);
        assert_eq!(
            attempts(&pipeline, MINUTE * 3 / 2, &[]).await,
            [(0, Outcome::Sent), (60, Outcome::Sent)]
        );
        assert_eq!(pipeline.totals(), crate::usage::outbox::Totals { sent: 7, dropped: 0 });
    }

    #[tokio::test(start_paused = true)]
    async fn without_an_upstream_nothing_piles_up() {
        let pipeline = Pipeline::new(10);
        count(&pipeline, 3);
        let shutdown = CancellationToken::new();
        tokio::join!(discard(&pipeline, MINUTE, &shutdown), async {
            tokio::time::sleep(MINUTE * 3 / 2).await;
            assert_eq!(pipeline.totals().dropped, 3);
            count(&pipeline, 4);
            shutdown.cancel();
        });
        assert_eq!(pipeline.totals().dropped, 7);
        assert_eq!(pipeline.save(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_flushed_in_time_is_saved_and_restored() {
        let pipeline = Pipeline::new(10);
        count(&pipeline, 7);
        let ending = ending();
        ending.begins.cancel();
        let tries = Cell::new(0);
        run(&pipeline, MINUTE, &ending, |_| {
            tries.set(tries.get() + 1);
            pending()
        })
        .await;
        assert_eq!(tries.get(), 1);
        let saved = pipeline.save().unwrap();
        let restarted = Pipeline::new(10);
        restarted.restore(&saved, now()).unwrap();
        assert_eq!(attempts(&restarted, MINUTE, &[]).await, [(0, Outcome::Sent)]);
        assert_eq!(restarted.totals().sent, 7);
        assert_eq!(restarted.save(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_hurried_end_waits_for_answers_under_way_and_keeps_the_rest() {
        let pipeline = Pipeline::new(10);
        count(&pipeline, 7);
        let ending = ending();
        ending.begins.cancel();
        let start = now();
        let slow = |batch: Dispatch| async move {
            tokio::time::sleep(HURRIED_ANSWERS / 2).await;
            (batch.id, Outcome::Later(None))
        };
        tokio::join!(run(&pipeline, MINUTE, &ending, slow), async { ending.hurries.cancel() });
        assert_eq!(now() - start, HURRIED_ANSWERS / 2);
        assert!(pipeline.save().is_some());
    }
}
