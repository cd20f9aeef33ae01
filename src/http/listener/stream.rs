//! A connection's bytes, as hyper reads and writes them.
//!
//! It differs from [`TokioIo`] in three things. It begins with what was read before, and brings what
//! came after that along, so that hyper has a whole head in its first buffer. And a single buffer is
//! written plainly: hyper hands every answer over as a list of buffers, and for a list the kernel
//! does work that an answer without a body, or one that is not sent whole, does not need. And it
//! tells the [`Handover`] when all is sent.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::handover::Handover;

/// The bytes of a connection.
pub(super) struct Stream<I> {
    io: TokioIo<I>,
    begun: Bytes,
    handover: Arc<Handover>,
}

impl<I> Stream<I> {
    /// Reads `begun`, and then from `inner`; writes to that.
    pub(super) fn new(inner: I, begun: Bytes, handover: Arc<Handover>) -> Self {
        Self { io: TokioIo::new(inner), begun, handover }
    }

    /// What it reads from and writes to.
    pub(super) fn into_inner(self) -> I {
        self.io.into_inner()
    }
}

impl<I: AsyncRead + Unpin> Read for Stream<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if self.begun.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buffer);
        }
        let length = self.begun.len().min(buffer.remaining());
        buffer.put_slice(&self.begun.split_to(length));
        // An error comes again when nothing else does.
        let _ = Pin::new(&mut self.io).poll_read(cx, buffer);
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> Write for Stream<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        if let Poll::Ready(Ok(())) = flushed {
            self.handover.flushed();
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut stream = Pin::new(&mut self.io);
        match buffers {
            [only] => stream.as_mut().poll_write(cx, only),
            _ => stream.poll_write_vectored(cx, buffers),
        }
    }
}
