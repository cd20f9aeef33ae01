//! What happens on a connection, told by those who see it to those who judge it.
//!
//! All of it is counters and signs that cost a request some plain loads and stores: no clock, no lock and
//! no addition that other processors have to agree to. They are written by the connection's own task,
//! but for what is under way, which over HTTP/2 has tasks of its own.

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

/// What happens on a connection.
#[derive(Debug, Default)]
pub(super) struct Activity {
    requests: AtomicU32,
    writes: AtomicU32,
    /// Whether bytes have come after the last request.
    has_bytes: AtomicBool,
    /// Whether such bytes may be of the last request's body, which need not be read before its answer.
    has_body: AtomicBool,
    /// Whether the client takes nothing of what it is sent.
    is_blocked: AtomicBool,
    is_last: AtomicBool,
    is_evicted: AtomicBool,
    open: AtomicUsize,
    waiting_bytes: AtomicUsize,
    /// Told when bytes or answers are on their way no more.
    room: Notify,
    /// The connection's task.
    task: AtomicWaker,
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Waiting {
    /// The next request.
    Request,
    /// The rest of a request's head.
    Head,
    /// An answer.
    Answer,
    /// The client, who does not take what it is sent.
    Client,
}

/// How much has happened: equal where nothing has happened between.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Seen {
    /// How many requests have come.
    pub(super) requests: u32,
    /// How often the client has taken bytes, those of pings among them.
    pub(super) writes: u32,
}

impl Activity {
    /// What the connection waits for now.
    pub(super) fn waiting(&self) -> Waiting {
        if self.is_blocked.load(Relaxed) {
            Waiting::Client
        } else if self.open.load(Relaxed) > 0 {
            Waiting::Answer
        } else if self.has_bytes.load(Relaxed) {
            Waiting::Head
        } else {
            Waiting::Request
        }
    }

    /// How much has happened.
    pub(super) fn seen(&self) -> Seen {
        Seen { requests: self.requests.load(Relaxed), writes: self.writes.load(Relaxed) }
    }

    /// Whether there was a request.
    pub(super) fn has_requests(&self) -> bool {
        self.requests.load(Relaxed) > 0
    }

    /// Says that a request has come, whose head is complete.
    pub(super) fn note_request(&self, has_body: bool) {
        self.requests.store(self.requests.load(Relaxed).wrapping_add(1), Relaxed);
        self.has_bytes.store(false, Relaxed);
        self.has_body.store(has_body, Relaxed);
    }

    /// Says that bytes have come: those of a head, unless a request is under way or has a body.
    pub(super) fn note_bytes(&self) {
        if !self.has_body.load(Relaxed) {
            self.has_bytes.store(true, Relaxed);
        }
    }

    /// Says whether the client has taken what it was sent.
    pub(super) fn note_write(&self, was_taken: bool) {
        self.is_blocked.store(!was_taken, Relaxed);
        if was_taken {
            self.writes.store(self.writes.load(Relaxed).wrapping_add(1), Relaxed);
        }
    }

    /// Says whether the client has taken all that it was sent.
    pub(super) fn note_flush(&self, was_taken: bool) {
        self.is_blocked.store(!was_taken, Relaxed);
    }

    /// Whether answers are to say that the connection ends.
    pub(super) fn is_last(&self) -> bool {
        self.is_last.load(Relaxed) || self.is_evicted()
    }

    /// From now on answers say that the connection ends.
    pub(super) fn retire(&self) {
        self.is_last.store(true, Relaxed);
    }

    /// Whether the connection is to make room for another.
    pub(super) fn is_evicted(&self) -> bool {
        self.is_evicted.load(Relaxed)
    }

    /// Makes the connection end, as long as nothing is under way on it.
    pub(super) fn evict(&self) {
        self.is_evicted.store(true, Relaxed);
        self.task.wake();
    }

    /// Has the calling task woken by [`Activity::evict`].
    pub(super) fn register_task(&self, cx: &Context<'_>) {
        self.task.register(cx.waker());
    }

    /// Says that an answer is under way, until that is dropped.
    pub(super) fn open(self: &Arc<Self>) -> OpenAnswer {
        self.open.fetch_add(1, Relaxed);
        OpenAnswer { activity: Arc::clone(self), bytes: 0 }
    }
}

/// An answer that is under way.
#[derive(Debug)]
pub(super) struct OpenAnswer {
    activity: Arc<Activity>,
    /// How much of it waits for the client.
    bytes: usize,
}

impl OpenAnswer {
    /// Sets so many bytes aside, once no more than `most` are on their way with them.
    pub(super) async fn reserve(&mut self, bytes: usize, most: usize) {
        let waiting = &self.activity.waiting_bytes;
        loop {
            let mut room = pin!(self.activity.room.notified());
            room.as_mut().enable();
            let reserve = |waiting: usize| waiting.checked_add(bytes).filter(|sum| *sum <= most);
            if waiting.fetch_update(Relaxed, Relaxed, reserve).is_ok() {
                self.bytes = bytes;
                return;
            }
            room.await;
        }
    }

    /// Says how many bytes of it wait for the client.
    pub(super) fn set_waiting(&mut self, bytes: usize) {
        let waiting = &self.activity.waiting_bytes;
        waiting.fetch_add(bytes, Relaxed);
        waiting.fetch_sub(self.bytes, Relaxed);
        if bytes < self.bytes {
            self.activity.room.notify_waiters();
        }
        self.bytes = bytes;
    }
}

impl Drop for OpenAnswer {
    fn drop(&mut self) {
        self.set_waiting(0);
        let activity = &self.activity;
        if activity.open.fetch_sub(1, Relaxed) == 1 {
            // What has come meanwhile belonged to the request.
            activity.has_bytes.store(false, Relaxed);
        }
    }
}

/// Waits until the connection is to make room for another.
pub(super) async fn evicted(activity: &Activity) {
    poll_fn(|cx| {
        activity.register_task(cx);
        if activity.is_evicted() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}
