//! The body of a response while it is sent to a client.
//!
//! An HTTP/2 client decides how much of each response it reads, and when. A body is therefore sent in
//! chunks, the remaining bytes are counted, and a response that the client does not read for 30 s is
//! aborted ([`StallTimer::run_until_stalled`]), which resets its HTTP/2 stream. An HTTP/1 client that
//! reads nothing blocks its whole connection; `close_policy` closes that.

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

use super::{
    connection_activity::InFlightResponse,
    connection_limits::STALL_TIMEOUT,
    response_body::{HttpResponse, ResponseBody},
};

/// The largest chunk of an HTTP/2 body, in bytes: one frame. As soon as the client reads a byte of a
/// chunk, the rest of it moves to the connection's buffer and is no longer counted.
const CHUNK_BYTES: usize = 16 << 10;

/// A response body whose progress is tracked.
#[derive(Debug)]
pub(super) struct TrackedBody {
    body: ResponseBody,
    in_flight: Option<InFlightResponse>,
    /// Present over HTTP/2 only.
    stall_timer: Option<Arc<StallTimer>>,
}

impl TrackedBody {
    /// Wraps the body of an HTTP/1 response, which is sent in one chunk.
    pub(super) fn for_http1(
        reply: HttpResponse,
        in_flight: Option<InFlightResponse>,
    ) -> hyper::Response<Self> {
        reply.map(|body| Self { body, in_flight, stall_timer: None })
    }

    /// Wraps the body of an HTTP/2 response, which is sent in chunks.
    pub(super) fn for_http2(
        reply: HttpResponse,
        mut in_flight: InFlightResponse,
    ) -> hyper::Response<Self> {
        let stall_timer = STALL_TIMER.try_with(Arc::clone).ok();
        let bytes = usize::try_from(reply.body().size_hint().lower()).unwrap_or(usize::MAX);
        if let Some(progress) = stall_timer.as_ref().filter(|_| bytes > 0) {
            progress.start();
        }
        in_flight.set_pending(bytes);
        reply.map(|body| Self { body, in_flight: Some(in_flight), stall_timer })
    }

    /// Takes the next chunk of a complete body.
    fn next_chunk(bytes: &mut Option<Bytes>) -> Option<Bytes> {
        let rest = bytes.as_mut()?;
        if rest.len() > CHUNK_BYTES { Some(rest.split_to(CHUNK_BYTES)) } else { bytes.take() }
    }
}

impl Body for TrackedBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        let Some(progress) = &this.stall_timer else {
            return Pin::new(&mut this.body).poll_frame(cx);
        };
        let frame = match &mut this.body {
            ResponseBody::Full(bytes) => {
                let chunk = Self::next_chunk(bytes);
                if let Some(in_flight) = &mut this.in_flight {
                    in_flight.set_pending(bytes.as_ref().map_or(0, Bytes::len));
                }
                Poll::Ready(chunk.map(|chunk| Ok(Frame::data(chunk))))
            }
            live @ ResponseBody::Stream(_) => Pin::new(live).poll_frame(cx),
        };
        match frame {
            Poll::Ready(_) => progress.start(),
            Poll::Pending => progress.stop(),
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
    /// The stall timer of the response that the current task produces.
    static STALL_TIMER: Arc<StallTimer>;
}

/// Measures how long a response has waited for its client. `None` while it does not wait.
#[derive(Debug, Default)]
pub(super) struct StallTimer(Mutex<Option<Instant>>);

impl StallTimer {
    fn start(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn stop(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn deadline(&self) -> Option<Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).map(|since| since + STALL_TIMEOUT)
    }

    /// Runs a task that produces and sends a response. Stops it when the client reads nothing for
    /// [`STALL_TIMEOUT`].
    pub(super) async fn run_until_stalled(task: impl Future) {
        let progress = Arc::<Self>::default();
        let mut task = pin!(STALL_TIMER.scope(Arc::clone(&progress), task));
        let mut timer: Option<Pin<Box<Sleep>>> = None;
        poll_fn(|cx| {
            if task.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            let Some(deadline) = progress.deadline() else { return Poll::Pending };
            let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
            if timer.deadline() != deadline {
                timer.as_mut().reset(deadline);
            }
            if timer.as_mut().poll(cx).is_ready() {
                debug!("A client read nothing of a response for 30 s; its stream is reset");
                return Poll::Ready(());
            }
            Poll::Pending
        })
        .await;
    }
}
