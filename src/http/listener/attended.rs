//! A connection with somebody who watches the clock for it, and the sign to stop.
//!
//! Hyper asks its timer for a new sleep before each request's head and drops it when the head has
//! come: on a busy connection that is two visits to the runtime's timers a request, for a limit that
//! is hardly ever reached. [`HeadTimer`] only notes until when a head may take, and [`Attended`]
//! looks at the note when its one alarm rings, which then is set anew. What a request means, and what
//! its answer may take, is nothing to it.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use hyper::rt::{Sleep, Timer};
use tokio::time::Instant;
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::http::stop::Stop;

/// Until when a connection waits for the head of a request: nanoseconds after `start`, or
/// `NOTHING`.
#[derive(Debug)]
pub(super) struct Watch {
    start: Instant,
    patience: Duration,
    until: AtomicU64,
}

impl Watch {
    /// No head is waited for: a request is being answered, or the protocol has limits of its own.
    const NOTHING: u64 = u64::MAX;

    /// Waits for the first head from now on, whatever the protocol.
    pub(super) fn new(patience: Duration) -> Arc<Self> {
        let watch = Self { start: Instant::now(), patience, until: AtomicU64::new(Self::NOTHING) };
        watch.wait();
        Arc::new(watch)
    }

    /// Says that a head has come.
    pub(super) fn rest(&self) {
        self.until.store(Self::NOTHING, Ordering::Relaxed);
    }

    /// Waits for another head from now on.
    pub(super) fn wait(&self) {
        self.wait_until(Instant::now() + self.patience);
    }

    fn wait_until(&self, deadline: Instant) {
        let after = deadline.saturating_duration_since(self.start).as_nanos();
        self.until.store(u64::try_from(after).unwrap_or(Self::NOTHING), Ordering::Relaxed);
    }

    fn deadline(&self) -> Option<Instant> {
        let after = self.until.load(Ordering::Relaxed);
        (after != Self::NOTHING).then(|| self.start + Duration::from_nanos(after))
    }
}

/// Hyper's timer for one HTTP/1 connection, which uses it for the limit on heads alone.
#[derive(Clone, Debug)]
pub(super) struct HeadTimer(pub(super) Arc<Watch>);

impl Timer for HeadTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(self.now() + duration)
    }

    fn sleep_until(&self, deadline: std::time::Instant) -> Pin<Box<dyn Sleep>> {
        self.0.wait_until(deadline.into());
        Box::pin(Note(Arc::clone(&self.0)))
    }

    /// The sleep stays: its end would count as a head that has come.
    fn reset(&self, _: &mut Pin<Box<dyn Sleep>>, deadline: std::time::Instant) {
        self.0.wait_until(deadline.into());
    }

    fn now(&self) -> std::time::Instant {
        Instant::now().into_std()
    }
}

/// Stands for a deadline that is noted, until it is dropped. Nobody is woken by it: [`Attended`]
/// ends the connection instead.
#[derive(Debug)]
struct Note(Arc<Watch>);

impl Sleep for Note {}

impl Future for Note {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        self.0.rest();
    }
}

/// A connection that can be told to end.
pub(super) trait Graceful: Future {
    /// Ends it when the requests under way are answered.
    fn shut_down(self: Pin<&mut Self>);
}

/// How a connection ended that was not served to its end.
#[derive(Debug)]
pub(super) enum End<E> {
    /// The client did not send a head in time.
    Silence,
    /// The connection's own error.
    Error(E),
}

pin_project_lite::pin_project! {
    /// Serves a connection until its end, until its client is silent for too long, or, once the sign
    /// to stop was given, until the requests under way are answered.
    pub(super) struct Attended<C> {
        #[pin]
        connection: C,
        watch: Arc<Watch>,
        #[pin]
        alarm: tokio::time::Sleep,
        stop: Stop,
        #[pin]
        wake: WaitForCancellationFutureOwned,
        stage: Stage,
    }
}

#[derive(Debug)]
enum Stage {
    /// Not polled yet, so that nothing will wake it.
    New,
    Serving,
    Stopping,
}

impl<C> Attended<C> {
    /// Attends `connection`, whose requests call [`Watch::rest`] and whose timer is a [`HeadTimer`]
    /// of the same watch.
    pub(super) fn new(connection: C, watch: Arc<Watch>, stop: Stop) -> Self {
        let alarm = tokio::time::sleep(watch.patience);
        let wake = stop.wake();
        Self { connection, watch, alarm, stop, wake, stage: Stage::New }
    }
}

impl<C: Graceful<Output = Result<T, E>>, T, E> Future for Attended<C> {
    type Output = Result<T, End<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        // A task's waker stays the same, so that waiting for what seldom comes is done once, with its
        // locks and its bookkeeping; whoever is woken only looks whether it has come. It is done
        // first, as long as the task may still wait for anything (tokio's budget).
        let is_new = matches!(this.stage, Stage::New);
        if is_new || this.alarm.is_elapsed() {
            while this.alarm.as_mut().poll(cx).is_ready() {
                let now = Instant::now();
                let next = this.watch.deadline().unwrap_or(now + this.watch.patience);
                if next <= now {
                    return Poll::Ready(Err(End::Silence));
                }
                this.alarm.as_mut().reset(next);
            }
        }
        if is_new {
            let _ = this.wake.poll(cx);
            *this.stage = Stage::Serving;
        }
        if matches!(this.stage, Stage::Serving) && this.stop.is_given() {
            *this.stage = Stage::Stopping;
            this.connection.as_mut().shut_down();
        }
        this.connection.poll(cx).map_err(End::Error)
    }
}
