//! A connection's bytes, as hyper reads and writes them, with notes of what happens.
//!
//! It begins with what was read to find out the protocol. It knows nothing of HTTP.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{activity::Activity, protocol::Protocol};

/// The bytes of a connection.
#[derive(Debug)]
pub(super) struct Watched<I> {
    io: I,
    begun: Bytes,
    activity: Arc<Activity>,
    /// Whether bytes that come between requests begin another: over HTTP/2 they may be anything.
    begins_heads: bool,
}

impl<I> Watched<I> {
    /// Reads `begun`, and then from `io`; writes to that.
    pub(super) fn new(io: I, begun: Bytes, activity: Arc<Activity>, protocol: Protocol) -> Self {
        Self { io, begun, activity, begins_heads: protocol == Protocol::Http1 }
    }

    fn note_bytes(&self) {
        if self.begins_heads {
            self.activity.note_bytes();
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Watched<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.begun.is_empty() {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
            if buffer.filled().len() > before {
                self.note_bytes();
            }
        } else {
            let length = self.begun.len().min(buffer.remaining());
            buffer.put_slice(&self.begun[..length]);
            self.begun.advance(length);
            if self.begun.is_empty() {
                // Gives its memory back.
                self.begun = Bytes::new();
            }
            self.note_bytes();
        }
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Watched<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.activity.note_write(written.is_ready());
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // An answer without a body; to write it plainly costs the system less.
        if let [head] = buffers {
            return self.poll_write(cx, head);
        }
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, buffers);
        self.activity.note_write(written.is_ready());
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What encrypts takes bytes before the client does.
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.activity.note_flush(flushed.is_ready());
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
