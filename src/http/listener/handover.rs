//! How a stream comes out of hyper's hands.
//!
//! A connection on which a stream is told has no other use until its end, and yet hyper keeps for it
//! what requests need: buffers of 16 KiB, and room for answering. So hyper is given a body that only
//! notes that it is asked for, and when the response's head is sent, the connection is taken from
//! hyper, which goes with all that it holds; [`Telling`](super::telling::Telling) sends the rest.
//! Streams over HTTP/2, of which a connection may have many, stay with hyper.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::{
    Response, Version,
    body::{Body, Frame, SizeHint},
    header::{CONNECTION, HeaderValue},
};

use crate::http::reply::{Live, Outgoing, Reply};

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

/// Hyper has not asked for what follows a head; it has, when it had written that; and then all that it
/// had written was sent.
const NOT_ASKED: u8 = 0;
const ASKED: u8 = 1;
const SENT: u8 = 2;

impl Handover {
    /// Keeps the body of a reply back, to a request of this version, if it is one to be handed over.
    pub(super) fn keep(self: &Arc<Self>, version: Version, reply: Reply) -> Response<Sent> {
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
                Sent::Elsewhere(Arc::clone(self))
            }
            (body, _) => Sent::Here(body),
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

/// The body of a response, as hyper has it.
pub(super) enum Sent {
    /// Hyper sends it.
    Here(Outgoing),
    /// Somebody else will.
    Elsewhere(Arc<Handover>),
}

impl Body for Sent {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Here(body) => Pin::new(body).poll_frame(cx),
            // Nobody is to be woken: who polls the connection takes it away.
            Self::Elsewhere(handover) => {
                handover.advance(NOT_ASKED, ASKED);
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Here(body) => body.is_end_stream(),
            Self::Elsewhere(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Here(body) => body.size_hint(),
            Self::Elsewhere(_) => SizeHint::default(),
        }
    }
}
