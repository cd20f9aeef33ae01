//! A connection's bytes, as hyper reads and writes them.
//!
//! It differs from [`TokioIo`] in one thing: a single buffer is written plainly. Hyper hands every
//! answer over as a list of buffers, and for a list the kernel does work that an answer without a
//! body, or one that is not sent whole, does not need.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

/// The bytes of a connection.
#[derive(Debug)]
pub(super) struct Stream<I>(TokioIo<I>);

impl<I> Stream<I> {
    /// Reads from and writes to `inner`.
    pub(super) fn new(inner: I) -> Self {
        Self(TokioIo::new(inner))
    }
}

impl<I: AsyncRead + Unpin> Read for Stream<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl<I: AsyncWrite + Unpin> Write for Stream<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut stream = Pin::new(&mut self.0);
        match buffers {
            [only] => stream.as_mut().poll_write(cx, only),
            _ => stream.poll_write_vectored(cx, buffers),
        }
    }
}
