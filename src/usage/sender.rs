//! The loop that sends pending usage, and the final flush at shutdown.
//!
//! The caller provides the function that sends; the delivery queue decides when to retry.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::time::{MissedTickBehavior, interval_at, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::{
    delivery_queue::{OutgoingBatch, SendOutcome},
    environment_queue::BatchId,
    pipeline::Pipeline,
};

/// How long to wait after the grace period for responses to batches in flight.
const FINAL_RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for them when shutdown is forced.
const FORCED_RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How to end sending.
#[derive(Clone, Debug)]
pub struct Shutdown {
    /// Cancelled when usage is no longer reported.
    pub requested: CancellationToken,
    /// The longest time to then send the remaining usage.
    pub grace: Duration,
    /// Cancelled to end the grace period early.
    pub forced: CancellationToken,
}

/// Sends usage after each `interval` until shutdown is requested, then the rest within the grace period.
///
/// Usage that could not be sent remains in the pipeline. Dropping the future loses only the results of
/// batches in flight, which are therefore resent.
pub(super) async fn run<F>(
    pipeline: &Pipeline,
    interval: Duration,
    ending: &Shutdown,
    send: impl Fn(OutgoingBatch) -> F,
) where
    F: Future<Output = (BatchId, SendOutcome)>,
{
    pipeline.requeue_in_flight();
    let mut ticks = interval_at(tokio::time::Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut in_flight = FuturesUnordered::new();
    loop {
        send_ready_batches(pipeline, &in_flight, &send);
        tokio::select! {
            () = ending.requested.cancelled() => break,
            _ = ticks.tick() => pipeline.drain(monotonic_now()),
            Some((id, outcome)) = in_flight.next() => record_outcome(pipeline, id, outcome),
            () = wait_for_retry(pipeline) => {}
        }
    }
    pipeline.drain(monotonic_now());
    pipeline.reset_backoff();
    let flush = async {
        loop {
            send_ready_batches(pipeline, &in_flight, &send);
            if in_flight.is_empty() && pipeline.next_retry_at().is_none() {
                break;
            }
            tokio::select! {
                Some((id, outcome)) = in_flight.next() => record_outcome(pipeline, id, outcome),
                () = wait_for_retry(pipeline) => {}
            }
        }
    };
    let grace = ending.grace;
    let flushed = tokio::select! {
        flushed = timeout(grace, flush) => flushed.map_err(|_| FINAL_RESPONSE_TIMEOUT),
        () = ending.forced.cancelled() => Err(FORCED_RESPONSE_TIMEOUT),
    };
    if let Err(response_timeout) = flushed {
        tracing::warn!(?grace, "Shutdown ended before all usage was sent");
        // Nothing more is sent, but responses to batches in flight are awaited briefly: without its
        // response, a batch that upstream accepted would be sent again by the next run.
        let responses = async {
            while let Some((id, outcome)) = in_flight.next().await {
                record_outcome(pipeline, id, outcome);
            }
        };
        let _ = timeout(response_timeout, responses).await;
    }
}

/// Drops usage after each `interval` until `shutdown`, because there is no destination.
pub(super) async fn discard_at_interval(
    pipeline: &Pipeline,
    interval: Duration,
    shutdown: &CancellationToken,
) {
    let mut ticks = interval_at(tokio::time::Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !shutdown.is_cancelled() {
        tokio::select! {
            () = shutdown.cancelled() => {}
            _ = ticks.tick() => {}
        }
        pipeline.drain(monotonic_now());
        pipeline.discard_all();
    }
}

fn send_ready_batches<F>(
    pipeline: &Pipeline,
    in_flight: &FuturesUnordered<F>,
    send: &impl Fn(OutgoingBatch) -> F,
) {
    while let Some(batch) = pipeline.next_batch(monotonic_now()) {
        in_flight.push(send(batch));
    }
}

fn record_outcome(pipeline: &Pipeline, id: BatchId, outcome: SendOutcome) {
    pipeline.record_outcome(id, outcome, monotonic_now(), rand::random());
}

/// Waits until a retry is due; forever if none is scheduled.
async fn wait_for_retry(pipeline: &Pipeline) {
    match pipeline.next_retry_at() {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// The runtime's clock, which tests can pause.
fn monotonic_now() -> Instant {
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
        protocol::usage::ToggleStats,
        token::{Environment, TokenDigest},
        usage::{
            aggregator::ReportedCounter,
            counter::{Counter, CounterKey, Hour, NameStatus, Overflow},
        },
    };

    const MINUTE: Duration = Duration::from_mins(1);

    fn count(pipeline: &Pipeline, yes: u64) {
        let stats = ToggleStats { yes, ..ToggleStats::default() };
        let (counter, _) = Counter::from_stats(stats, &Arc::default(), |_| NameStatus::Known);
        let hour = Hour::of(Timestamp::UNIX_EPOCH);
        let key = CounterKey { hour, app: "a".into(), flag: "f".into() };
        let counted = vec![ReportedCounter { key, name_status: NameStatus::Known, counter }];
        let token = TokenDigest::of("token");
        let result =
            pipeline.aggregator.record_counters(&Environment::new("dev"), counted, &token, hour);
        assert_eq!(result, Ok(Overflow(0)));
    }

    fn shutdown() -> Shutdown {
        let (requested, forced) = (CancellationToken::new(), CancellationToken::new());
        Shutdown { requested, grace: MINUTE, forced }
    }

    /// Runs the loop for a while. Each batch gets the next of the outcomes, and `Sent` after the last.
    async fn attempts(
        pipeline: &Pipeline,
        run_for: Duration,
        outcomes: &[SendOutcome],
    ) -> Vec<(u64, SendOutcome)> {
        let start = monotonic_now();
        let attempts = RefCell::new(Vec::new());
        let send = |batch: OutgoingBatch| {
            let mut attempts = attempts.borrow_mut();
            let outcome = outcomes.get(attempts.len()).copied().unwrap_or(SendOutcome::Sent);
            attempts.push(((monotonic_now() - start).as_secs(), outcome));
            async move { (batch.id, outcome) }
        };
        let ending = shutdown();
        tokio::join!(run(pipeline, MINUTE, &ending, send), async {
            tokio::time::sleep(run_for).await;
            ending.requested.cancel();
        });
        attempts.into_inner()
    }

    #[tokio::test(start_paused = true)]
    async fn usage_is_sent_at_each_interval_and_at_shutdown() {
        let pipeline = Pipeline::new(10);
        count(&pipeline, 1);
        assert_eq!(
            attempts(&pipeline, 2 * MINUTE + MINUTE / 2, &[]).await,
            [(60, SendOutcome::Sent)]
        );
        count(&pipeline, 1);
        assert_eq!(attempts(&pipeline, MINUTE / 2, &[]).await, [(30, SendOutcome::Sent)]);
        assert_eq!(
            pipeline.totals(),
            crate::usage::delivery_queue::DeliveryTotals { sent: 2, dropped: 0 }
        );
    }

    #[tokio::test(start_paused = true)]
    async fn failed_batch_is_retried_after_its_delay() {
        let pipeline = Pipeline::new(10);
        count(&pipeline, 1);
        let delay = SendOutcome::Retry(Some(Duration::from_secs(100)));
        let made = attempts(&pipeline, 5 * MINUTE, &[delay]).await;
        assert_eq!(made, [(60, delay), (160, SendOutcome::Sent)]);
    }

    #[tokio::test(start_paused = true)]
    async fn batch_in_flight_is_resent_after_a_panic() {
        let pipeline = Pipeline::new(10);
        count(&pipeline, 3);
        let ending = shutdown();
        let panics = |_| async { panic!("a batch that cannot be sent") };
        let panicked = AssertUnwindSafe(run(&pipeline, MINUTE, &ending, panics)).catch_unwind();
        assert!(panicked.await.is_err());
        count(&pipeline, 4);
        assert_eq!(
            attempts(&pipeline, MINUTE * 3 / 2, &[]).await,
            [(0, SendOutcome::Sent), (60, SendOutcome::Sent)]
        );
        assert_eq!(
            pipeline.totals(),
            crate::usage::delivery_queue::DeliveryTotals { sent: 7, dropped: 0 }
        );
    }

    #[tokio::test(start_paused = true)]
    async fn usage_is_dropped_at_each_interval_without_an_upstream() {
        let pipeline = Pipeline::new(10);
        count(&pipeline, 3);
        let shutdown = CancellationToken::new();
        tokio::join!(discard_at_interval(&pipeline, MINUTE, &shutdown), async {
            tokio::time::sleep(MINUTE * 3 / 2).await;
            assert_eq!(pipeline.totals().dropped, 3);
            count(&pipeline, 4);
            shutdown.cancel();
        });
        assert_eq!(pipeline.totals().dropped, 7);
        assert_eq!(pipeline.serialize(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn usage_that_is_not_flushed_in_time_is_saved_and_restored() {
        let pipeline = Pipeline::new(10);
        count(&pipeline, 7);
        let ending = shutdown();
        ending.requested.cancel();
        let tries = Cell::new(0);
        run(&pipeline, MINUTE, &ending, |_| {
            tries.set(tries.get() + 1);
            pending()
        })
        .await;
        assert_eq!(tries.get(), 1);
        let saved = pipeline.serialize().unwrap();
        let restarted = Pipeline::new(10);
        restarted.restore(&saved, monotonic_now()).unwrap();
        assert_eq!(attempts(&restarted, MINUTE, &[]).await, [(0, SendOutcome::Sent)]);
        assert_eq!(restarted.totals().sent, 7);
        assert_eq!(restarted.serialize(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn forced_shutdown_waits_for_responses_in_flight_and_retains_the_rest() {
        let pipeline = Pipeline::new(10);
        count(&pipeline, 7);
        let ending = shutdown();
        ending.requested.cancel();
        let start = monotonic_now();
        let slow = |batch: OutgoingBatch| async move {
            tokio::time::sleep(FORCED_RESPONSE_TIMEOUT / 2).await;
            (batch.id, SendOutcome::Retry(None))
        };
        tokio::join!(run(&pipeline, MINUTE, &ending, slow), async { ending.forced.cancel() });
        assert_eq!(monotonic_now() - start, FORCED_RESPONSE_TIMEOUT / 2);
        assert!(pipeline.serialize().is_some());
    }
}
