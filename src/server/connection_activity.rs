//! Activity of one connection: written where bytes and requests pass, read by the connection policy.
//!
//! The state consists of counters and flags, so that a request costs a few plain loads and stores: no
//! clock, no lock and no atomic read-modify-write. The connection's task writes them. The exception is
//! responses in flight, which run in tasks of their own over HTTP/2 and use atomic additions.

use std::{
    future::poll_fn,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

/// Counters and flags of one connection.
#[derive(Debug, Default)]
pub(super) struct ConnectionActivity {
    requests: AtomicU32,
    writes: AtomicU32,
    /// Whether bytes arrived after the last request.
    has_partial_head: AtomicBool,
    /// Whether such bytes may belong to the last request's body, which may be read after its response.
    has_body: AtomicBool,
    /// Whether the client does not read what is sent to it.
    is_write_blocked: AtomicBool,
    closes_after_response: AtomicBool,
    is_evicted: AtomicBool,
    responses_in_flight: AtomicUsize,
    pending_bytes: AtomicUsize,
    /// Notified when pending bytes are sent or a response is dropped.
    bytes_released: Notify,
    /// The connection's task.
    waker: AtomicWaker,
}

/// The state of a connection, named after the event that it waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum ConnectionState {
    /// It waits for the next request.
    Idle,
    /// It waits for the rest of a request's head.
    ReadingHead,
    /// It waits for a response of this server.
    Responding,
    /// It waits for the client to read what was sent.
    WriteBlocked,
}

/// Counters of activity. Two equal readings mean that nothing happened in between.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct ActivityCounters {
    /// The number of requests received.
    pub(super) requests: u32,
    /// The number of successful writes, responses to pings included.
    pub(super) writes: u32,
}

impl ConnectionActivity {
    /// The current state.
    pub(super) fn state(&self) -> ConnectionState {
        if self.is_write_blocked.load(Relaxed) {
            ConnectionState::WriteBlocked
        } else if self.responses_in_flight.load(Relaxed) > 0 {
            ConnectionState::Responding
        } else if self.has_partial_head.load(Relaxed) {
            ConnectionState::ReadingHead
        } else {
            ConnectionState::Idle
        }
    }

    /// The current counters.
    pub(super) fn counters(&self) -> ActivityCounters {
        ActivityCounters {
            requests: self.requests.load(Relaxed),
            writes: self.writes.load(Relaxed),
        }
    }

    /// Whether at least one request was received.
    pub(super) fn has_requests(&self) -> bool {
        self.requests.load(Relaxed) > 0
    }

    /// Records a request whose head is complete.
    pub(super) fn record_request(&self, has_body: bool) {
        self.requests.store(self.requests.load(Relaxed).wrapping_add(1), Relaxed);
        self.has_partial_head.store(false, Relaxed);
        self.has_body.store(has_body, Relaxed);
    }

    /// Records received bytes. They start a head, unless a request is in flight or has a body.
    pub(super) fn record_read(&self) {
        if !self.has_body.load(Relaxed) {
            self.has_partial_head.store(true, Relaxed);
        }
    }

    /// Records a write, and whether the client accepted it.
    pub(super) fn record_write(&self, was_taken: bool) {
        self.is_write_blocked.store(!was_taken, Relaxed);
        if was_taken {
            self.writes.store(self.writes.load(Relaxed).wrapping_add(1), Relaxed);
        }
    }

    /// Records a flush, and whether the client accepted all bytes.
    pub(super) fn record_flush(&self, was_taken: bool) {
        self.is_write_blocked.store(!was_taken, Relaxed);
    }

    /// Whether responses must announce that the connection closes.
    pub(super) fn is_closing_after_response(&self) -> bool {
        self.closes_after_response.load(Relaxed) || self.is_evicted()
    }

    /// Makes all further responses announce that the connection closes.
    pub(super) fn close_after_response(&self) {
        self.closes_after_response.store(true, Relaxed);
    }

    /// Whether the connection must make room for another.
    pub(super) fn is_evicted(&self) -> bool {
        self.is_evicted.load(Relaxed)
    }

    /// Closes the connection to make room for another, unless a request is in flight on it.
    pub(super) fn evict(&self) {
        self.is_evicted.store(true, Relaxed);
        self.waker.wake();
    }

    /// Registers the calling task to be woken by [`ConnectionActivity::evict`].
    pub(super) fn register_waker(&self, cx: &Context<'_>) {
        self.waker.register(cx.waker());
    }

    /// Counts a response as in flight until the returned guard is dropped.
    pub(super) fn begin_response(self: &Arc<Self>) -> InFlightResponse {
        self.responses_in_flight.fetch_add(1, Relaxed);
        InFlightResponse { activity: Arc::clone(self), pending_bytes: 0 }
    }
}

/// A guard for a response in flight.
#[derive(Debug)]
pub(super) struct InFlightResponse {
    activity: Arc<ConnectionActivity>,
    /// The number of its bytes that the client has not read yet.
    pending_bytes: usize,
}

impl InFlightResponse {
    /// Reserves `bytes` pending bytes. Waits until the total of the connection stays within `most`.
    pub(super) async fn reserve(&mut self, bytes: usize, most: usize) {
        let waiting = &self.activity.pending_bytes;
        loop {
            let mut room = pin!(self.activity.bytes_released.notified());
            room.as_mut().enable();
            let reserve = |waiting: usize| waiting.checked_add(bytes).filter(|sum| *sum <= most);
            if waiting.fetch_update(Relaxed, Relaxed, reserve).is_ok() {
                self.pending_bytes = bytes;
                return;
            }
            room.await;
        }
    }

    /// Sets the number of bytes that the client has not read yet.
    pub(super) fn set_pending(&mut self, bytes: usize) {
        let waiting = &self.activity.pending_bytes;
        waiting.fetch_add(bytes, Relaxed);
        waiting.fetch_sub(self.pending_bytes, Relaxed);
        if bytes < self.pending_bytes {
            self.activity.bytes_released.notify_waiters();
        }
        self.pending_bytes = bytes;
    }
}

impl Drop for InFlightResponse {
    fn drop(&mut self) {
        self.set_pending(0);
        let activity = &self.activity;
        if activity.responses_in_flight.fetch_sub(1, Relaxed) == 1 {
            // Bytes that arrived meanwhile belong to the request.
            activity.has_partial_head.store(false, Relaxed);
        }
    }
}

/// Waits until the connection must make room for another.
pub(super) async fn wait_for_eviction(activity: &ConnectionActivity) {
    poll_fn(|cx| {
        activity.register_waker(cx);
        if activity.is_evicted() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}
