//! What is spoken on a connection: HTTP/1 or HTTP/2, as its first bytes tell.
//!
//! `hyper_util::server::conn::auto` does the same, at a price that every idle connection pays: it
//! reads the first 24 bytes alone, for which hyper takes twice the buffer when the rest of a head
//! comes, and its future is as large as a connection of either kind and what both are built by.

use std::{
    convert::Infallible,
    error::Error,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use hyper::{
    body::Incoming,
    rt::bounds::Http2ServerConnExec,
    server::conn::{http1, http2},
    service::HttpService,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    attended::{Graceful, HeadTimer},
    handover::Handover,
    repeats::Repeats,
    stream::Stream,
    tasks::Tasks,
    telling::Telling,
};
use crate::http::reply::Outgoing;

/// With what a client begins that speaks HTTP/2 without having agreed on it.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How much is read to begin with: the heads of most requests.
const FIRST_READ: usize = 1024;

/// How either is spoken.
#[derive(Debug)]
pub(super) struct Protocols {
    pub(super) http1: http1::Builder,
    pub(super) http2: http2::Builder<Tasks>,
}

/// What is spoken on a connection.
#[expect(clippy::large_enum_variant, reason = "connections are of the large kind, nearly all")]
pub(super) enum Spoken<I, S: HttpService<Incoming>> {
    /// Nothing has come that would tell.
    Opening(Opening<I, S>),
    Http1(http1::Connection<Stream<I>, S>, Arc<Handover>),
    Http2(Box<http2::Connection<Stream<I>, S, Tasks>>),
    Over,
}

/// A connection that has just begun.
pub(super) struct Opening<I, S> {
    io: I,
    service: S,
    protocols: Arc<Protocols>,
    repeats: Repeats,
    handover: Arc<Handover>,
    begun: Vec<u8>,
}

impl<I, S> Spoken<I, S>
where
    S: HttpService<Incoming>,
{
    /// Speaks on `io`, and lets `service` answer, which keeps streams back in `handover`.
    pub(super) fn new(
        io: I,
        service: S,
        protocols: Arc<Protocols>,
        repeats: Repeats,
        handover: Arc<Handover>,
    ) -> Self {
        Self::Opening(Opening { io, service, protocols, repeats, handover, begun: Vec::new() })
    }
}

impl<I: AsyncRead + Unpin, S> Opening<I, S> {
    /// Reads until it is clear what is spoken: whether that is HTTP/2, and `None` where the client
    /// has left without a word.
    fn poll_protocol(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<bool>>> {
        loop {
            let mut bytes = [0; FIRST_READ];
            let mut bytes = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut bytes))?;
            self.begun.extend_from_slice(bytes.filled());
            let common = self.begun.iter().zip(PREFACE).take_while(|(one, other)| one == other);
            let common = common.count();
            if common == PREFACE.len() {
                return Poll::Ready(Ok(Some(true)));
            }
            if common < self.begun.len() {
                return Poll::Ready(Ok(Some(false)));
            }
            if bytes.filled().is_empty() {
                return Poll::Ready(Ok((!self.begun.is_empty()).then_some(false)));
            }
        }
    }
}

impl<I, S> Future for Spoken<I, S>
where
    I: AsyncRead + AsyncWrite + Unpin,
    S: HttpService<Incoming, ResBody = Outgoing, Error = Infallible> + Unpin,
    Tasks: Http2ServerConnExec<S::Future, Outgoing>,
{
    /// There may be a stream left to be told.
    type Output = Result<Option<Telling<I>>, Box<dyn Error + Send + Sync>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            match &mut *self {
                Self::Opening(opening) => {
                    let is_http2 = ready!(opening.poll_protocol(cx))?;
                    let Self::Opening(opening) = std::mem::replace(&mut *self, Self::Over) else {
                        unreachable!("it has just been seen");
                    };
                    let Opening { io, service, protocols, repeats, handover, begun } = opening;
                    let start =
                        |io, repeats| Stream::new(io, begun.into(), Arc::clone(&handover), repeats);
                    *self = match is_http2 {
                        None => Self::Over,
                        Some(true) => {
                            let stream = start(io, None);
                            Self::Http2(Box::new(protocols.http2.serve_connection(stream, service)))
                        }
                        Some(false) => {
                            let mut builder = protocols.http1.clone();
                            builder.timer(HeadTimer(Arc::clone(&repeats.watch)));
                            let stream = start(io, Some(repeats));
                            Self::Http1(builder.serve_connection(stream, service), handover)
                        }
                    };
                }
                Self::Http1(connection, handover) => {
                    if let Poll::Ready(end) = Pin::new(connection).poll(cx) {
                        return Poll::Ready(end.map(|()| None).map_err(Into::into));
                    }
                    let Some((live, framing)) = handover.take() else { return Poll::Pending };
                    let Self::Http1(connection, _) = std::mem::replace(&mut *self, Self::Over)
                    else {
                        unreachable!("it has just been seen");
                    };
                    let io = connection.into_parts().io.into_inner();
                    return Poll::Ready(Ok(Some(Telling::new(io, live, framing))));
                }
                Self::Http2(connection) => {
                    let end = ready!(Pin::new(&mut **connection).poll(cx));
                    return Poll::Ready(end.map(|()| None).map_err(Into::into));
                }
                Self::Over => return Poll::Ready(Ok(None)),
            }
        }
    }
}

impl<I, S> Graceful for Spoken<I, S>
where
    I: AsyncRead + AsyncWrite + Unpin,
    S: HttpService<Incoming, ResBody = Outgoing, Error = Infallible> + Unpin,
    Tasks: Http2ServerConnExec<S::Future, Outgoing>,
{
    fn shut_down(mut self: Pin<&mut Self>) {
        match &mut *self {
            Self::Opening(_) => *self = Self::Over,
            Self::Http1(connection, _) => Pin::new(connection).graceful_shutdown(),
            Self::Http2(connection) => Pin::new(&mut **connection).graceful_shutdown(),
            Self::Over => {}
        }
    }
}
