//! The body of an answer on its way to a client.
//!
//! An HTTP/2 client decides how much of which answer it takes, and when. So a body is handed on in pieces,
//! what is left is counted, and an answer of which nothing is taken for too long is given up
//! ([`Progress::supervise`]); its client is told by a reset of its stream. An HTTP/1 client that takes
//! nothing blocks its whole connection, which is the business of `lifetime`.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tracing::debug;

use super::{activity::OpenAnswer, limits::STALL_TIMEOUT};
use crate::http::reply::{Outgoing, Reply};

/// How much of a body is handed on at once where its client may take part of it: a frame. As soon as the client
/// takes a byte of a piece the whole of it is out of sight, and waits in the connection's own buffer.
const PIECE: usize = 16 << 10;

/// The body of an answer on its way.
#[derive(Debug)]
pub(super) struct AnswerBody {
    body: Outgoing,
    open: Option<OpenAnswer>,
    /// Where the client takes it in pieces.
    progress: Option<Arc<Progress>>,
}

impl AnswerBody {
    /// Of an answer that goes out whole.
    pub(super) fn whole(reply: Reply, open: Option<OpenAnswer>) -> hyper::Response<Self> {
        reply.map(|body| Self { body, open, progress: None })
    }

    /// Of an answer that the client takes piece by piece.
    pub(super) fn in_pieces(reply: Reply, mut open: OpenAnswer) -> hyper::Response<Self> {
        let progress = PROGRESS.try_with(Arc::clone).ok();
        let bytes = usize::try_from(crate::http::reply::length(&reply)).unwrap_or(usize::MAX);
        if let Some(progress) = progress.as_ref().filter(|_| bytes > 0) {
            progress.waits_for_client();
        }
        open.set_waiting(bytes);
        reply.map(|body| Self { body, open: Some(open), progress })
    }

    /// Takes the next piece of a body that is there.
    fn take_piece(bytes: &mut Option<Bytes>) -> Option<Bytes> {
        let rest = bytes.as_mut()?;
        if rest.len() > PIECE { Some(rest.split_to(PIECE)) } else { bytes.take() }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        let Some(progress) = &this.progress else {
            return Pin::new(&mut this.body).poll_frame(cx);
        };
        let frame = match &mut this.body {
            Outgoing::Whole(bytes) => {
                let piece = Self::take_piece(bytes);
                if let Some(open) = &mut this.open {
                    open.set_waiting(bytes.as_ref().map_or(0, Bytes::len));
                }
                Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
            }
            live @ Outgoing::Live(_) => Pin::new(live).poll_frame(cx),
        };
        match frame {
            Poll::Ready(_) => progress.waits_for_client(),
            Poll::Pending => progress.waits_for_us(),
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

tokio::task_local! {
    /// Of the answer that the task is about.
    static PROGRESS: Arc<Progress>;
}

/// Since when an answer waits for its client.
#[derive(Debug, Default)]
pub(super) struct Progress(Mutex<Option<Instant>>);

impl Progress {
    fn waits_for_client(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn waits_for_us(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn deadline(&self) -> Option<Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).map(|since| since + STALL_TIMEOUT)
    }

    /// Runs a task that makes an answer and sends it, and ends it when its client takes nothing of that for
    /// too long.
    pub(super) async fn supervise(task: impl Future) {
        let progress = Arc::<Self>::default();
        let mut task = pin!(PROGRESS.scope(Arc::clone(&progress), task));
        let mut alarm: Option<Pin<Box<Sleep>>> = None;
        poll_fn(|cx| {
            if task.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            let Some(deadline) = progress.deadline() else { return Poll::Pending };
            let alarm = alarm.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
            if alarm.deadline() != deadline {
                alarm.as_mut().reset(deadline);
            }
            if alarm.as_mut().poll(cx).is_ready() {
                debug!("A client took nothing of an answer for too long");
                return Poll::Ready(());
            }
            Poll::Pending
        })
        .await;
    }
}
