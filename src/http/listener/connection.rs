//! One connection, from its first byte to its last.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use hyper::{body::Incoming, rt::bounds::Http2ServerConnExec, service::HttpService};
use tokio::io::{AsyncRead, AsyncWrite};
use tracing::debug;

use super::{
    attended::{Attended, End},
    spoken::Spoken,
    tasks::Tasks,
    telling::Telling,
};
use crate::{http::reply::Outgoing, telemetry::report};

/// A connection, and what is done with it.
pub(super) enum Connection<I, S: HttpService<Incoming>> {
    /// Requests are answered. In a box, which a stream does without.
    Answering(Pin<Box<Attended<Spoken<I, S>>>>),
    /// A stream is told.
    Telling(Telling<I>),
}

impl<I, S> Future for Connection<I, S>
where
    I: AsyncRead + AsyncWrite + Unpin,
    S: HttpService<Incoming, ResBody = Outgoing, Error = Infallible> + Unpin,
    Tasks: Http2ServerConnExec<S::Future, Outgoing>,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match &mut *self {
                Self::Answering(attended) => match ready!(attended.as_mut().poll(cx)) {
                    Ok(None) => return Poll::Ready(()),
                    Ok(Some(telling)) => *self = Self::Telling(telling),
                    Err(End::Silence) => {
                        debug!("A client was silent for too long");
                        return Poll::Ready(());
                    }
                    Err(End::Error(error)) => {
                        debug!(error, "A connection ended early");
                        return Poll::Ready(());
                    }
                },
                Self::Telling(telling) => {
                    if let Err(error) = ready!(Pin::new(telling).poll(cx)) {
                        debug!(error = report(&error), "A stream ended early");
                    }
                    return Poll::Ready(());
                }
            }
        }
    }
}
