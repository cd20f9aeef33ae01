//! One connection, from its first byte to its last.
//!
//! Hyper speaks; this lets it, and ends what the policy ([`Lifetime`]) or the listener wants ended.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use hyper_util::server::graceful::GracefulConnection;
use tokio::{
    io::AsyncRead,
    time::{Instant, sleep, sleep_until},
};
use tracing::debug;

use super::{
    activity::{Activity, Waiting, evicted},
    drain::Drain,
    lifetime::{Lifetime, Verdict},
    limits::{BEGIN_WITHIN, LEAVE_WITHIN, Limits},
    protocol::{self, Protocol},
};
use crate::telemetry::report;

/// The shortest time that the runtime's clock tells apart.
const TICK: Duration = Duration::from_millis(1);

/// How a connection says that it ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Farewell {
    /// By its next answer, so that it is not told to end before there is one (HTTP/1).
    WithAnswer,
    /// By itself, at any time (HTTP/2).
    AtOnce,
}

/// What comes of the beginning of a connection, unless the connection is to end before. When the listener
/// closes, one that has only just begun has a moment left.
pub(super) async fn unless_ended<T>(
    beginning: impl Future<Output = T>,
    activity: &Activity,
    drain: &Drain,
) -> Option<T> {
    let since = Instant::now();
    let closed = async {
        drain.closing.wake().await;
        sleep_until(since + BEGIN_WITHIN).await;
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
pub(super) async fn open<I: AsyncRead + Unpin>(
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
            read = unless_ended(protocol::read(io, begun), activity, drain) => read?,
            () = &mut alarm => return None,
        };
        let is_first = matches!(read, Ok(read) if read == begun.len());
        match (read, protocol::spoken(begun)) {
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

/// Lets hyper serve a connection to its end.
pub(super) async fn attend<C: GracefulConnection<Error = hyper::Error>>(
    connection: C,
    activity: Arc<Activity>,
    mut lifetime: Lifetime,
    drain: Drain,
    farewell: Farewell,
) {
    let mut connection = pin!(connection);
    let mut alarm = pin!(sleep_until(lifetime.first_look()));
    let (mut draining, mut closing) = (pin!(drain.draining.wake()), pin!(drain.closing.wake()));
    let (mut is_new, mut is_told) = (true, false);
    let mut waited = Waiting::Request;
    let end = poll_fn(|cx| {
        // A task's waker stays the same, so that waiting for what seldom comes is done once, with its
        // locks and its bookkeeping; whoever is woken only looks whether it has come.
        if std::mem::take(&mut is_new) {
            activity.attend(cx);
            let _ = closing.as_mut().poll(cx);
            if farewell == Farewell::AtOnce {
                let _ = draining.as_mut().poll(cx);
            }
            let _ = alarm.as_mut().poll(cx);
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
            let next = match lifetime.look(&activity, now) {
                Verdict::Stay(next) => next,
                Verdict::Retire(next) => {
                    activity.retire();
                    leaves |= farewell == Farewell::AtOnce;
                    next
                }
                Verdict::Leave(next) => {
                    leaves = true;
                    next
                }
                Verdict::Close => return Poll::Ready(None),
            };
            // Later than now by what the runtime's clock tells apart: it rings at no time that is over.
            alarm.as_mut().reset(next.max(now + TICK));
            let _ = alarm.as_mut().poll(cx);
        }
        if leaves && !std::mem::replace(&mut is_told, true) {
            let now = Instant::now();
            lifetime.leave(now);
            let next = alarm.deadline().min(now + LEAVE_WITHIN);
            alarm.as_mut().reset(next.max(now + TICK));
            let _ = alarm.as_mut().poll(cx);
            connection.as_mut().graceful_shutdown();
            return connection.as_mut().poll(cx).map(Some);
        }
        if drain.is_closing() && !is_told && alarm.deadline() > lifetime.begins_by() {
            alarm.as_mut().reset(lifetime.begins_by());
            let _ = alarm.as_mut().poll(cx);
        }
        Poll::Pending
    });
    match end.await {
        Some(Ok(())) => {}
        Some(Err(error)) => {
            debug!(error = report(&error), "A connection ended early");
        }
        None => debug!(?waited, "A client was waited for in vain"),
    }
}
