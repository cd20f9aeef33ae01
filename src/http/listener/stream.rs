//! A connection's bytes, as hyper reads and writes them.
//!
//! It differs from [`TokioIo`] in four things. It begins with what was read before, and brings what
//! came after that along, so that hyper has a whole head in its first buffer. It answers what is
//! answered from [cache](super::response_cache) itself, and hyper never learns of it: that is done only
//! where hyper waits for a request and has nothing of it, nor of an answer ([`Given`]). It writes small
//! answers plainly: hyper hands every answer over as a list of buffers, and for a list the kernel does
//! work that these do not need. And it tells the [`Handover`] when all is sent.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    gather, handover::Handover, repeats::Repeats, response_cache::CachedResponse, turn::Given,
};

/// The bytes of a connection.
pub(super) struct Stream<I> {
    io: TokioIo<I>,
    begun: Bytes,
    handover: Arc<Handover>,
    repeats: Option<Repeats>,
    given: Given,
    /// What is left to be sent of an answer that hyper knows nothing of, and how much of it was.
    rest: Option<Box<(CachedResponse, usize)>>,
}

/// How much is read at once where bytes are looked at: as much as hyper would.
const READ: usize = 8192;

impl<I> Stream<I> {
    /// Reads `begun`, and then from `inner`; writes to that. What is spoken is HTTP/1 where there are
    /// `repeats`.
    pub(super) fn new(
        inner: I,
        begun: Bytes,
        handover: Arc<Handover>,
        repeats: Option<Repeats>,
    ) -> Self {
        let given = if repeats.is_some() { Given::Nothing } else { Given::Unknown };
        let io = TokioIo::new(inner);
        Self { io, begun, handover, repeats, given, rest: None }
    }

    /// What it reads from and writes to.
    pub(super) fn into_inner(self) -> I {
        self.io.into_inner()
    }
}

impl<I: AsyncWrite + Unpin> Stream<I> {
    /// Sends what is left of an answer that hyper knows nothing of.
    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (Some(rest), Some(repeats)) = (&mut self.rest, &self.repeats) else {
            return Poll::Ready(Ok(()));
        };
        let (answer, sent) = &mut **rest;
        let Poll::Ready(done) = poll_send(Pin::new(self.io.inner_mut()), cx, answer, sent) else {
            // A client that reads slowly is not one that says nothing.
            repeats.watch.rest();
            return Poll::Pending;
        };
        self.rest = None;
        repeats.watch.wait();
        Poll::Ready(done)
    }

    /// Answers a request of these bytes, if the answer is known; whether it is. If not, hyper is to be
    /// given them, and they are `given` then.
    fn answer(&mut self, bytes: &[u8], given: Given, cx: &mut Context<'_>) -> io::Result<bool> {
        let Some(repeats) = &self.repeats else { return Ok(false) };
        let known = if given.is_a_head() { repeats.known.recall(bytes) } else { Err(None) };
        let mut answer = match known {
            Ok(answer) => answer,
            Err(key) => {
                repeats.turn.begin(key);
                return Ok(false);
            }
        };
        let mut sent = 0;
        match poll_send(Pin::new(self.io.inner_mut()), cx, &mut answer, &mut sent) {
            Poll::Ready(sent) => {
                sent?;
                repeats.watch.wait();
            }
            Poll::Pending => self.rest = Some(Box::new((answer, sent))),
        }
        Ok(true)
    }
}

/// Sends what is left of an answer after so many bytes.
fn poll_send<W: AsyncWrite>(
    mut io: Pin<&mut W>,
    cx: &mut Context<'_>,
    answer: &mut CachedResponse,
    sent: &mut usize,
) -> Poll<io::Result<()>> {
    let CachedResponse { head, body } = answer;
    while *sent < head.len() + body.len() {
        let head_left = head.get(*sent..).unwrap_or_default();
        let body_left = &body[sent.saturating_sub(head.len())..];
        let pieces = [IoSlice::new(head_left), IoSlice::new(body_left)];
        *sent += match ready!(gather::poll_write(io.as_mut(), cx, &pieces))? {
            0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            sent => sent,
        };
    }
    io.poll_flush(cx)
}

impl<I: AsyncRead + AsyncWrite + Unpin> Read for Stream<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            ready!(this.poll_rest(cx))?;
            if let Some(repeats) = &this.repeats {
                this.given = this.given.settled(&repeats.turn);
            }
            if this.given == Given::Unknown && this.begun.is_empty() {
                return Pin::new(&mut this.io).poll_read(cx, buffer);
            }
            let mut bytes = [MaybeUninit::uninit(); READ];
            let mut bytes = ReadBuf::uninit(&mut bytes);
            let mut bytes = bytes.take(buffer.remaining());
            let begun = this.begun.len().min(bytes.remaining());
            bytes.put_slice(&this.begun.split_to(begun));
            let read = Pin::new(this.io.inner_mut()).poll_read(cx, &mut bytes);
            if bytes.filled().is_empty() {
                return read;
            }
            // Of an error, the end comes as well.
            let bytes = bytes.filled();
            let given = this.given.and(bytes);
            if this.given == Given::Nothing && this.answer(bytes, given, cx)? {
                continue;
            }
            this.given = given;
            buffer.put_slice(bytes);
            return Poll::Ready(Ok(()));
        }
    }
}

impl<I: AsyncWrite + Unpin> Write for Stream<I> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_rest(cx))?;
        ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        self.handover.flushed();
        if let Some(repeats) = &self.repeats {
            repeats.turn.flushed();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_rest(cx))?;
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
        ready!(self.poll_rest(cx))?;
        if let Some(repeats) = &self.repeats {
            repeats.turn.written();
        }
        gather::poll_write(Pin::new(self.io.inner_mut()), cx, buffers)
    }
}
