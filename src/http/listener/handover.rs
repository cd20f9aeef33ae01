//! How a stream comes out of hyper's hands.
//!
//! A connection on which a stream is told has no other use until its end, and yet hyper keeps for it
//! what requests need: buffers of 16 KiB, and room for answering. So hyper is given a body that only
//! notes that it is asked for, and when the response's head is sent, the connection is taken from
//! hyper, which goes with all that it holds; [`Telling`](super::telling::Telling) sends the rest.
//! Streams over HTTP/2, of which a connection may have many, stay with hyper.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::Stream;
use hyper::{
    Response, Version,
    header::{CONNECTION, HeaderValue},
};
use tokio::time::Instant;

use crate::http::reply::{Flow, Live, Outgoing, Reply};

/// How pieces of a body are told from what follows it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Framing {
    /// Each says how long it is.
    Chunked,
    /// Nothing follows: the connection ends with the body, as HTTP/1.0 has it.
    Plain,
}

/// A stream that one HTTP/1 connection is to tell, if there is one.
#[derive(Default)]
pub(super) struct Handover {
    stage: AtomicU8,
    stream: Mutex<Option<(Live, Framing)>>,
}

/// What hyper is given in a stream's place: it never tells anything.
struct Kept(Arc<Handover>);

impl Stream for Kept {
    type Item = Bytes;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Bytes>> {
        // Nobody is to be woken: who polls the connection takes it away.
        self.0.advance(NOT_ASKED, ASKED);
        Poll::Pending
    }
}

impl Flow for Kept {
    fn poll_over(self: Pin<&mut Self>, _: &mut Context<'_>, _: Instant) -> Poll<()> {
        Poll::Pending
    }
}

/// Hyper has not asked for what follows a head; it has, when it had written that; and then all that it
/// had written was sent.
const NOT_ASKED: u8 = 0;
const ASKED: u8 = 1;
const SENT: u8 = 2;

impl Handover {
    /// Keeps the body of a reply back, to a request of this version, if it is one to be handed over.
    pub(super) fn keep(self: &Arc<Self>, version: Version, reply: Reply) -> Reply {
        let (mut head, body) = reply.into_parts();
        let framing = match version {
            Version::HTTP_2 => None,
            Version::HTTP_11 => Some(Framing::Chunked),
            _ => Some(Framing::Plain),
        };
        let body = match (body, framing) {
            (Outgoing::Live(live), Some(framing)) => {
                head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
                // A panic under this lock cannot leave a part of it.
                *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = Some((live, framing));
                let handover = Arc::clone(self);
                Outgoing::Live(Box::pin(Kept(handover)))
            }
            (body, _) => body,
        };
        Response::from_parts(head, body)
    }

    /// Notes that all that was written is sent.
    pub(super) fn flushed(&self) {
        self.advance(ASKED, SENT);
    }

    /// All stages are seen by the task of the connection alone.
    fn advance(&self, from: u8, to: u8) {
        if self.stage.load(Ordering::Relaxed) == from {
            self.stage.store(to, Ordering::Relaxed);
        }
    }

    /// The stream, if its response's head is sent.
    pub(super) fn take(&self) -> Option<(Live, Framing)> {
        if self.stage.load(Ordering::Relaxed) != SENT {
            return None;
        }
        self.stream.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
