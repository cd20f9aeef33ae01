//! The byte stream of a connection, which records its reads and writes in the connection's activity.
//!
//! It first returns the bytes that were read to detect the HTTP version. It does not parse HTTP.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{connection_activity::ConnectionActivity, http_version::HttpVersion};

/// The byte stream of a connection.
#[derive(Debug)]
pub(super) struct TrackedIo<I> {
    io: I,
    prefix: Bytes,
    activity: Arc<ConnectionActivity>,
    /// Whether bytes between requests are the start of another one. Over HTTP/2 they may be any frame.
    tracks_heads: bool,
}

impl<I> TrackedIo<I> {
    /// Reads from `prefix` first and then from `io`. Writes to `io`.
    pub(super) fn new(
        io: I,
        prefix: Bytes,
        activity: Arc<ConnectionActivity>,
        protocol: HttpVersion,
    ) -> Self {
        Self { io, prefix, activity, tracks_heads: protocol == HttpVersion::Http1 }
    }

    fn record_read(&self) {
        if self.tracks_heads {
            self.activity.record_read();
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for TrackedIo<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
            if buffer.filled().len() > before {
                self.record_read();
            }
        } else {
            let length = self.prefix.len().min(buffer.remaining());
            buffer.put_slice(&self.prefix[..length]);
            self.prefix.advance(length);
            if self.prefix.is_empty() {
                // Frees its memory.
                self.prefix = Bytes::new();
            }
            self.record_read();
        }
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for TrackedIo<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.activity.record_write(written.is_ready());
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // A response without a body: a plain write costs less in the kernel.
        if let [head] = buffers {
            return self.poll_write(cx, head);
        }
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, buffers);
        self.activity.record_write(written.is_ready());
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The TLS layer buffers bytes before the client reads them.
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.activity.record_flush(flushed.is_ready());
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
