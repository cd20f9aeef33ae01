//! One open stream as the body of a response: sends events and keep-alive comments until it closes.
//!
//! One change wakes thousands of streams, so each poll has to be cheap: the timer and the futures stay
//! registered between polls, and a poll checks only what may be due.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::Stream;
use tokio::{
    sync::watch,
    task::coop::{Unconstrained, unconstrained},
    time::{Instant, Sleep, sleep_until},
};
use tokio_util::sync::{ReusableBoxFuture, WaitForCancellationFutureOwned};

use super::{event_source::EventSource, stream_limiter::StreamPermit};
use crate::{protocol::sse, served::StateId};

/// Longest interval between keep-alive comments: Node's SDK reconnects after 60 s without data.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(25);

/// Keep-alive comments are aligned to multiples of this, so that one wake-up serves several streams: the
/// wake-up costs more than sending a comment.
const TIMER_COALESCING: Duration = Duration::from_millis(100);

/// The reconnect delay sent to clients when a stream closes, in milliseconds.
const RECONNECT_DELAY: std::ops::Range<u64> = 500..5_000;

pin_project_lite::pin_project! {
    /// A stream of server-sent events, which holds a permit until it closes.
    pub(super) struct SseStream<T> {
        permit: StreamPermit,
        // Unconstrained by the task budget: it is polled only once.
        #[pin]
        closed: Unconstrained<WaitForCancellationFutureOwned>,
        states: StateChangeWaiter,
        source: T,
        phase: Phase,
        keep_alive_at: Instant,
        expires_at: Instant,
        // Fires at the next deadline or before it.
        #[pin]
        timer: Sleep,
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    /// Not polled yet, so no waker is registered.
    New,
    /// The source may have an event.
    Sending,
    /// The source has no event; waits for a change or a deadline.
    Waiting,
    /// Sends a reconnect delay when the timer fires, then closes.
    Closing,
    Closed,
}

impl<T: EventSource> SseStream<T> {
    /// A stream that closes after `age` at the latest.
    pub(super) fn new(
        permit: StreamPermit,
        states: watch::Receiver<StateId>,
        source: T,
        age: Duration,
    ) -> Self {
        let now = Instant::now();
        let (keep_alive_at, expires_at) = (next_keep_alive(now, permit.epoch()), now + age);
        let (closed, timer) =
            (unconstrained(permit.close_signal().subscribe()), sleep_until(expires_at));
        let (states, phase) = (StateChangeWaiter::new(states), Phase::New);
        Self { permit, closed, states, source, phase, keep_alive_at, expires_at, timer }
    }
}

impl<T: EventSource> Stream for SseStream<T> {
    type Item = Bytes;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let mut this = self.project();
        let metrics = this.permit.metrics();
        if *this.phase == Phase::New {
            let _ = this.closed.poll(cx);
            *this.phase = Phase::Sending;
        }
        if matches!(this.phase, Phase::Sending | Phase::Waiting)
            && this.permit.close_signal().is_triggered()
        {
            let Some(stagger) = this.permit.stagger() else {
                metrics.revoked.increment(1);
                *this.phase = Phase::Closed;
                return Poll::Ready(None);
            };
            metrics.shutdown.increment(1);
            this.timer.as_mut().reset(Instant::now() + stagger.mul_f64(rand::random()));
            *this.phase = Phase::Closing;
        }
        loop {
            match this.phase {
                Phase::New | Phase::Sending => {
                    if let Some(chunk) = this.source.try_next_event() {
                        metrics.record(chunk.kind);
                        metrics.bytes.increment(chunk.bytes.len() as u64);
                        return Poll::Ready(Some(chunk.bytes));
                    }
                    if this.source.is_finished() {
                        metrics.context_incomplete.increment(1);
                        this.timer.as_mut().reset(Instant::now());
                        *this.phase = Phase::Closing;
                    } else {
                        *this.phase = Phase::Waiting;
                    }
                }
                Phase::Waiting => {
                    match this.states.poll_changed(cx) {
                        Poll::Ready(Ok(())) => {
                            *this.phase = Phase::Sending;
                            continue;
                        }
                        Poll::Ready(Err(_)) => {
                            metrics.environment_removed.increment(1);
                            *this.phase = Phase::Closed;
                            return Poll::Ready(None);
                        }
                        Poll::Pending => {}
                    }
                    let due = (*this.keep_alive_at).min(*this.expires_at);
                    let due = this
                        .source
                        .next_reevaluation_at()
                        .map_or(due, |deadline| deadline.min(due));
                    if due < this.timer.deadline() || this.timer.is_elapsed() {
                        this.timer.as_mut().reset(due);
                    }
                    ready!(this.timer.as_mut().poll(cx));
                    let now = Instant::now();
                    if *this.expires_at <= now {
                        metrics.expired.increment(1);
                        *this.phase = Phase::Closed;
                        return Poll::Ready(None);
                    }
                    if *this.keep_alive_at <= now {
                        *this.keep_alive_at = next_keep_alive(now, this.permit.epoch());
                        let comment = Bytes::from_static(sse::KEEP_ALIVE_COMMENT);
                        metrics.keep_alives.increment(1);
                        metrics.bytes.increment(comment.len() as u64);
                        return Poll::Ready(Some(comment));
                    }
                    *this.phase = Phase::Sending;
                }
                Phase::Closing => {
                    ready!(this.timer.as_mut().poll(cx));
                    *this.phase = Phase::Closed;
                    let retry_hint =
                        Bytes::from(sse::encode_retry(rand::random_range(RECONNECT_DELAY)));
                    metrics.bytes.increment(retry_hint.len() as u64);
                    return Poll::Ready(Some(retry_hint));
                }
                Phase::Closed => return Poll::Ready(None),
            }
        }
    }
}

/// Waits for the next state id of an environment, without allocating for each wait.
struct StateChangeWaiter(ReusableBoxFuture<'static, (Changed, watch::Receiver<StateId>)>);

type Changed = Result<(), watch::error::RecvError>;

impl StateChangeWaiter {
    fn new(states: watch::Receiver<StateId>) -> Self {
        Self(ReusableBoxFuture::new(wait_for_change(states)))
    }

    /// Ready when there is a new id; an error when the sender is gone.
    fn poll_changed(&mut self, cx: &mut Context<'_>) -> Poll<Changed> {
        let (changed, states) = ready!(self.0.poll(cx));
        self.0.set(wait_for_change(states));
        Poll::Ready(changed)
    }
}

async fn wait_for_change(
    mut states: watch::Receiver<StateId>,
) -> (Changed, watch::Receiver<StateId>) {
    (states.changed().await, states)
}

/// The time of the next keep-alive comment, randomised so that not all are sent at once.
fn next_keep_alive(now: Instant, epoch: Instant) -> Instant {
    let due = now + KEEP_ALIVE_INTERVAL.mul_f64(rand::random_range(0.6..1.0));
    let after = due.saturating_duration_since(epoch);
    let early = after.as_nanos() % TIMER_COALESCING.as_nanos();
    due - Duration::from_nanos_u128(early)
}
