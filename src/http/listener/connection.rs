//! One connection, from its first byte to its last.
//!
//! Hyper speaks; this lets it, and ends what the policy ([`Lifetime`]) or the listener wants ended.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::server::graceful::GracefulConnection;
use tokio::{
    io::AsyncRead,
    task::coop::unconstrained,
    time::{Instant, Sleep, sleep, sleep_until},
};
use tracing::debug;

use super::{
    activity::{Activity, Waiting, evicted},
    drain::Drain,
    lifetime::{Action, Lifetime},
    limits::{FIRST_REQUEST_TIMEOUT, Limits, SHUTDOWN_TIMEOUT},
    protocol::{self, Protocol},
};
use crate::telemetry::report;

/// The shortest time that the runtime's clock tells apart.
const TICK: Duration = Duration::from_millis(1);

/// How a connection says that it ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Farewell {
    /// By its next answer, so that it is not told to end before there is one (HTTP/1).
    NextAnswer,
    /// By itself, at any time (HTTP/2).
    AtOnce,
}

/// What comes of the beginning of a connection, unless the connection is to end before. When the listener
/// closes, one that has only just begun has a moment left.
pub(super) async fn until_shutdown<T>(
    beginning: impl Future<Output = T>,
    activity: &Activity,
    drain: &Drain,
) -> Option<T> {
    let since = Instant::now();
    let closed = async {
        drain.closing.wake().await;
        sleep_until(since + FIRST_REQUEST_TIMEOUT).await;
    };
    tokio::select! {
        biased;
        begun = beginning => Some(begun),
        () = closed => None,
        () = evicted(activity) => None,
    }
}

/// Finds out what is spoken, within the time that an idle connection has, and the time for a head once
/// there is a byte. What was read is in `begun`. `None` where the connection is over.
pub(super) async fn detect_protocol<I: AsyncRead + Unpin>(
    io: &mut I,
    begun: &mut Vec<u8>,
    activity: &Activity,
    limits: &Limits,
    drain: &Drain,
) -> Option<Protocol> {
    let mut alarm = pin!(sleep(limits.idle_for()));
    loop {
        let read = tokio::select! {
            biased;
            read = until_shutdown(protocol::read(io, begun), activity, drain) => read?,
            () = &mut alarm => return None,
        };
        let is_first = matches!(read, Ok(read) if read == begun.len());
        match (read, protocol::detect(begun)) {
            (Err(error), _) => {
                debug!(error = report(&error), "A connection broke before its first request");
                return None;
            }
            (_, Some(protocol)) => return Some(protocol),
            // Hyper says what is wrong with what there is.
            (Ok(0), None) => return (!begun.is_empty()).then_some(Protocol::Http1),
            (Ok(_), None) if is_first => {
                alarm.as_mut().reset(Instant::now() + limits.header_read_timeout);
            }
            (Ok(_), None) => {}
        }
    }
}

/// Sets an alarm that wakes the calling task. It is polled here and no more until it rings, so that the task's
/// budget, which the connection may have used up, must not stand against it.
fn set(mut alarm: Pin<&mut Sleep>, at: Instant, cx: &mut Context<'_>) {
    alarm.as_mut().reset(at);
    if pin!(unconstrained(alarm)).poll(cx).is_ready() {
        cx.waker().wake_by_ref();
    }
}

/// Lets hyper serve a connection to its end.
pub(super) async fn drive<C: GracefulConnection<Error = hyper::Error>>(
    connection: C,
    activity: Arc<Activity>,
    mut lifetime: Lifetime,
    drain: Drain,
    farewell: Farewell,
) {
    let mut connection = pin!(connection);
    let mut alarm = pin!(sleep_until(lifetime.first_check()));
    let (mut draining, mut closing) = (pin!(drain.draining.wake()), pin!(drain.closing.wake()));
    let (mut is_new, mut is_told) = (true, false);
    let mut waited = Waiting::Request;
    let end = poll_fn(|cx| {
        // A task's waker stays the same, so that waiting for what seldom comes is done once, with its
        // locks and its bookkeeping; whoever is woken only looks whether it has come.
        if std::mem::take(&mut is_new) {
            activity.register_task(cx);
            let _ = closing.as_mut().poll(cx);
            if farewell == Farewell::AtOnce {
                let _ = draining.as_mut().poll(cx);
            }
            set(alarm.as_mut(), lifetime.first_check(), cx);
        }
        // First, so that a request which has come meanwhile is answered and not cut off.
        if let Poll::Ready(end) = connection.as_mut().poll(cx) {
            return Poll::Ready(Some(end));
        }
        let mut leaves = activity.is_evicted();
        if activity.has_requests() {
            leaves |= drain.is_closing() || (farewell == Farewell::AtOnce && drain.has_begun());
        } else if drain.is_closing() {
            // A client that has only just come gets its answer and is told then.
            leaves |= lifetime.begins_by() <= Instant::now();
        }
        let waiting = activity.waiting();
        let has_begun = waiting != waited && matches!(waiting, Waiting::Head | Waiting::Client);
        waited = waiting;
        if has_begun || alarm.is_elapsed() {
            let now = Instant::now();
            let next = match lifetime.check(&activity, now) {
                Action::Keep(next) => next,
                Action::CloseAfterNext(next) => {
                    activity.retire();
                    leaves |= farewell == Farewell::AtOnce;
                    next
                }
                Action::ShutDown(next) => {
                    leaves = true;
                    next
                }
                Action::Abort => return Poll::Ready(None),
            };
            // Later than now by what the runtime's clock tells apart: it rings at no time that is over.
            set(alarm.as_mut(), next.max(now + TICK), cx);
        }
        if leaves && !std::mem::replace(&mut is_told, true) {
            let now = Instant::now();
            lifetime.leave(now);
            let next = alarm.deadline().min(now + SHUTDOWN_TIMEOUT);
            set(alarm.as_mut(), next.max(now + TICK), cx);
            connection.as_mut().graceful_shutdown();
            return connection.as_mut().poll(cx).map(Some);
        }
        if drain.is_closing() && !is_told && alarm.deadline() > lifetime.begins_by() {
            set(alarm.as_mut(), lifetime.begins_by(), cx);
        }
        Poll::Pending
    });
    match end.await {
        Some(Ok(())) => {}
        Some(Err(error)) => {
            debug!(error = report(&error), "A connection ended early");
        }
        None => debug!(?waited, "A connection was closed: its client took too long"),
    }
}
