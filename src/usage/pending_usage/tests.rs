//! Tests of when batches are sent, and of the end of sending.

use std::{
    collections::VecDeque,
    future::pending,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex},
};

use jiff::Timestamp;

use super::*;
use crate::{
    protocol::usage::ToggleStats,
    token::{Environment, TokenDigest},
    usage::{
        aggregator::ReportedCounter,
        batch::OutgoingBatch,
        counters::{Hour, NameStatus},
        delivery_queue::DeliveryTotals,
    },
};

const MINUTE: Duration = Duration::from_mins(1);

fn count(pending: &PendingUsage, yes: u64) {
    let stats = ToggleStats { yes, ..ToggleStats::default() };
    let (counter, _) = Counter::from_stats(stats, &Arc::default(), |_| NameStatus::Known);
    let hour = Hour::of(Timestamp::UNIX_EPOCH);
    let key = CounterKey { hour, app: "a".into(), flag: "f".into() };
    let counted = vec![ReportedCounter { key, name_status: NameStatus::Known, counter }];
    let token = TokenDigest::of("token");
    let result =
        pending.aggregator.record_counters(&Environment::new("dev"), counted, &token, hour);
    assert_eq!(result, Ok(0));
}

fn shutdown() -> Shutdown {
    let (requested, forced) = (CancellationToken::new(), CancellationToken::new());
    Shutdown { requested, grace: MINUTE, forced }
}

/// How a [`MemorySink`] responds to a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Response {
    At(Duration, SendOutcome),
    Never,
    Panic,
}

const SENT: Response = Response::At(Duration::ZERO, SendOutcome::Sent);

fn retry(after: Option<Duration>) -> Response {
    Response::At(Duration::ZERO, SendOutcome::Retry(after))
}

/// Gives each batch the next response, and [`SENT`] after the last.
#[derive(Debug)]
struct MemorySink {
    start: Instant,
    responses: Mutex<VecDeque<Response>>,
    /// Second and response of each attempt.
    attempts: Mutex<Vec<(u64, Response)>>,
}

impl MemorySink {
    fn new(responses: &[Response]) -> Self {
        let responses = Mutex::new(responses.iter().copied().collect());
        Self { start: monotonic_now(), responses, attempts: Mutex::default() }
    }
}

impl UsageSink for MemorySink {
    fn send(&self, _: OutgoingBatch) -> BoxFuture<'_, SendOutcome> {
        let response = self.responses.lock().unwrap().pop_front().unwrap_or(SENT);
        let second = (monotonic_now() - self.start).as_secs();
        self.attempts.lock().unwrap().push((second, response));
        Box::pin(async move {
            match response {
                Response::At(delay, outcome) => {
                    tokio::time::sleep(delay).await;
                    outcome
                }
                Response::Never => pending().await,
                Response::Panic => panic!("a batch that cannot be sent"),
            }
        })
    }
}

/// Runs the loop for a while, and returns the attempts.
async fn attempts(
    pending: &PendingUsage,
    run_for: Duration,
    responses: &[Response],
) -> Vec<(u64, Response)> {
    let (sink, ending) = (MemorySink::new(responses), shutdown());
    tokio::join!(pending.run(MINUTE, &ending, &sink), async {
        tokio::time::sleep(run_for).await;
        ending.requested.cancel();
    });
    sink.attempts.into_inner().unwrap()
}

#[tokio::test(start_paused = true)]
async fn usage_is_sent_at_each_interval_and_at_shutdown() {
    let pending = PendingUsage::new(10);
    count(&pending, 1);
    assert_eq!(attempts(&pending, 2 * MINUTE + MINUTE / 2, &[]).await, [(60, SENT)]);
    count(&pending, 1);
    assert_eq!(attempts(&pending, MINUTE / 2, &[]).await, [(30, SENT)]);
    assert_eq!(*pending.queue().totals(), DeliveryTotals { sent: 2, dropped: 0 });
}

#[tokio::test(start_paused = true)]
async fn failed_batch_is_retried_after_its_delay() {
    let pending = PendingUsage::new(10);
    count(&pending, 1);
    let delay = retry(Some(Duration::from_secs(100)));
    let made = attempts(&pending, 5 * MINUTE, &[delay]).await;
    assert_eq!(made, [(60, delay), (160, SENT)]);
}

#[tokio::test(start_paused = true)]
async fn batch_in_flight_is_resent_after_a_panic() {
    let pending = PendingUsage::new(10);
    count(&pending, 3);
    let ending = shutdown();
    let panics = MemorySink::new(&[Response::Panic]);
    let panicked = AssertUnwindSafe(pending.run(MINUTE, &ending, &panics)).catch_unwind();
    assert!(panicked.await.is_err());
    count(&pending, 4);
    assert_eq!(attempts(&pending, MINUTE * 3 / 2, &[]).await, [(0, SENT), (60, SENT)]);
    assert_eq!(*pending.queue().totals(), DeliveryTotals { sent: 7, dropped: 0 });
}

#[tokio::test(start_paused = true)]
async fn usage_is_dropped_at_each_interval_without_an_upstream() {
    let pending = PendingUsage::new(10);
    count(&pending, 3);
    let shutdown = CancellationToken::new();
    tokio::join!(pending.discard_at_interval(MINUTE, &shutdown), async {
        tokio::time::sleep(MINUTE * 3 / 2).await;
        assert_eq!(pending.queue().totals().dropped, 3);
        count(&pending, 4);
        shutdown.cancel();
    });
    assert_eq!(pending.queue().totals().dropped, 7);
    assert_eq!(pending.serialize(), None);
}

#[tokio::test(start_paused = true)]
async fn usage_that_is_not_flushed_in_time_is_saved_and_restored() {
    let pending = PendingUsage::new(10);
    count(&pending, 7);
    let ending = shutdown();
    ending.requested.cancel();
    let sink = MemorySink::new(&[Response::Never]);
    pending.run(MINUTE, &ending, &sink).await;
    assert_eq!(sink.attempts.into_inner().unwrap(), [(0, Response::Never)]);
    let saved = pending.serialize().unwrap();
    let restarted = PendingUsage::new(10);
    restarted.restore(&saved, monotonic_now()).unwrap();
    assert_eq!(attempts(&restarted, MINUTE, &[]).await, [(0, SENT)]);
    assert_eq!(restarted.queue().totals().sent, 7);
    assert_eq!(restarted.serialize(), None);
}

#[tokio::test(start_paused = true)]
async fn forced_shutdown_waits_for_responses_in_flight_and_retains_the_rest() {
    let pending = PendingUsage::new(10);
    count(&pending, 7);
    let ending = shutdown();
    ending.requested.cancel();
    let start = monotonic_now();
    let delay = FORCED_RESPONSE_TIMEOUT / 2;
    let slow = MemorySink::new(&[Response::At(delay, SendOutcome::Retry(None))]);
    tokio::join!(pending.run(MINUTE, &ending, &slow), async { ending.forced.cancel() });
    assert_eq!(monotonic_now() - start, delay);
    assert!(pending.serialize().is_some());
}
