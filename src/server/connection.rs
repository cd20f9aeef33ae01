//! Serves one connection from its first byte to its last.
//!
//! Hyper handles the protocol. This module polls it, and closes the connection when the policy
//! ([`ConnectionPolicy`]) or the shutdown ([`Drain`]) requires it.

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
    close_policy::{ConnectionPolicy, PolicyAction},
    connection_activity::{ConnectionActivity, ConnectionState, wait_for_eviction},
    connection_limits::{ConnectionLimits, FIRST_REQUEST_TIMEOUT, SHUTDOWN_TIMEOUT},
    drain::Drain,
    http_version::{self, HttpVersion},
};
use crate::telemetry::error_chain;

/// The resolution of the runtime's timers.
const TIMER_RESOLUTION: Duration = Duration::from_millis(1);

/// How a connection announces that it closes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum CloseAnnouncement {
    /// HTTP/1: by `Connection: close` in the next response, so that it stays open until there is one.
    ConnectionCloseHeader,
    /// HTTP/2: by a GOAWAY frame, at any time.
    GoAway,
}

/// Runs the setup of a connection and returns its result, or `None` if the connection must close first.
/// When the listener closes, a connection has [`FIRST_REQUEST_TIMEOUT`] from its start to finish its
/// setup.
pub(super) async fn until_shutdown<T>(
    setup: impl Future<Output = T>,
    activity: &ConnectionActivity,
    drain: &Drain,
) -> Option<T> {
    let since = Instant::now();
    let closed = async {
        drain.closing.subscribe().await;
        sleep_until(since + FIRST_REQUEST_TIMEOUT).await;
    };
    tokio::select! {
        biased;
        result = setup => Some(result),
        () = closed => None,
        () = wait_for_eviction(activity) => None,
    }
}

/// Detects the HTTP version from the first bytes, which are left in `prefix`.
///
/// Waits for the first byte as long as for a request on an idle connection, and for the following ones
/// as long as for a request's head. Returns `None` if the connection is closed or timed out.
pub(super) async fn detect_http_version<I: AsyncRead + Unpin>(
    io: &mut I,
    prefix: &mut Vec<u8>,
    activity: &ConnectionActivity,
    limits: &ConnectionLimits,
    drain: &Drain,
) -> Option<HttpVersion> {
    let mut timer = pin!(sleep(limits.idle_timeout_with_margin()));
    loop {
        let read = tokio::select! {
            biased;
            read = until_shutdown(http_version::read_available(io, prefix), activity, drain) => read?,
            () = &mut timer => return None,
        };
        let is_first = matches!(read, Ok(read) if read == prefix.len());
        match (read, http_version::detect(prefix)) {
            (Err(error), _) => {
                debug!(error = error_chain(&error), "A connection failed before its first request");
                return None;
            }
            (_, Some(protocol)) => return Some(protocol),
            // Hyper reports the error in the incomplete head.
            (Ok(0), None) => return (!prefix.is_empty()).then_some(HttpVersion::Http1),
            (Ok(_), None) if is_first => {
                timer.as_mut().reset(Instant::now() + limits.header_read_timeout);
            }
            (Ok(_), None) => {}
        }
    }
}

/// Sets a timer that wakes the calling task. It is polled only here until it fires, so it must ignore
/// the task's cooperative budget, which the connection may have used up.
fn set_alarm(mut timer: Pin<&mut Sleep>, at: Instant, cx: &mut Context<'_>) {
    timer.as_mut().reset(at);
    if pin!(unconstrained(timer)).poll(cx).is_ready() {
        cx.waker().wake_by_ref();
    }
}

/// Polls hyper's connection until it closes.
pub(super) async fn serve_until_closed<C: GracefulConnection<Error = hyper::Error>>(
    connection: C,
    activity: Arc<ConnectionActivity>,
    mut policy: ConnectionPolicy,
    drain: Drain,
    announcement: CloseAnnouncement,
) {
    let mut connection = pin!(connection);
    let mut timer = pin!(sleep_until(policy.first_check()));
    let (mut draining, mut closing) =
        (pin!(drain.draining.subscribe()), pin!(drain.closing.subscribe()));
    let (mut is_first_poll, mut has_sent_close) = (true, false);
    let mut waited = ConnectionState::Idle;
    let end = poll_fn(|cx| {
        // The waker of a task does not change. So the rare events are registered once, with their locks
        // and bookkeeping, and later polls only check flags.
        if std::mem::take(&mut is_first_poll) {
            activity.register_waker(cx);
            let _ = closing.as_mut().poll(cx);
            if announcement == CloseAnnouncement::GoAway {
                let _ = draining.as_mut().poll(cx);
            }
            set_alarm(timer.as_mut(), policy.first_check(), cx);
        }
        // Comes first, so that a request which has arrived meanwhile is answered.
        if let Poll::Ready(end) = connection.as_mut().poll(cx) {
            return Poll::Ready(Some(end));
        }
        let mut must_close = activity.is_evicted();
        if activity.has_requests() {
            must_close |= drain.is_closing()
                || (announcement == CloseAnnouncement::GoAway && drain.is_draining());
        } else if drain.is_closing() {
            // A new client gets a response that announces the close.
            must_close |= policy.first_request_deadline() <= Instant::now();
        }
        let waiting = activity.state();
        let has_begun = waiting != waited
            && matches!(waiting, ConnectionState::ReadingHead | ConnectionState::WriteBlocked);
        waited = waiting;
        if has_begun || timer.is_elapsed() {
            let now = Instant::now();
            let next = match policy.next_action(&activity, now) {
                PolicyAction::KeepOpen(next) => next,
                PolicyAction::CloseAfterResponse(next) => {
                    activity.close_after_response();
                    must_close |= announcement == CloseAnnouncement::GoAway;
                    next
                }
                PolicyAction::ShutDown(next) => {
                    must_close = true;
                    next
                }
                PolicyAction::Abort => return Poll::Ready(None),
            };
            // At least one tick from now: a timer does not fire for a time that has passed.
            set_alarm(timer.as_mut(), next.max(now + TIMER_RESOLUTION), cx);
        }
        if must_close && !std::mem::replace(&mut has_sent_close, true) {
            let now = Instant::now();
            policy.start_closing(now);
            let next = timer.deadline().min(now + SHUTDOWN_TIMEOUT);
            set_alarm(timer.as_mut(), next.max(now + TIMER_RESOLUTION), cx);
            connection.as_mut().graceful_shutdown();
            return connection.as_mut().poll(cx).map(Some);
        }
        if drain.is_closing()
            && !has_sent_close
            && timer.deadline() > policy.first_request_deadline()
        {
            set_alarm(timer.as_mut(), policy.first_request_deadline(), cx);
        }
        Poll::Pending
    });
    match end.await {
        Some(Ok(())) => {}
        Some(Err(error)) => {
            debug!(error = error_chain(&error), "A connection closed early");
        }
        None => debug!(?waited, "A connection timed out and was closed"),
    }
}
