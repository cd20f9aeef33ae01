//! The open event streams of one environment, and those being opened: at most one for each token.
//!
//! This module does not decide when a stream is opened (`environment_state` does) and does not apply
//! events.

use std::{fmt, pin::Pin};

use futures_util::future::{pending, select_all};
use metrics::{counter, describe_counter};

use super::reconnect::{CloseReason, StreamUnavailable};
use crate::{
    protocol::{delta::EventId, sse::DecodedEvent},
    telemetry::error_chain,
    token::{Token, TokenDigest},
    upstream::{Error, Upstream, UpstreamEventStream},
};

const STREAMS_ENDED: &str = "parapet_upstream_streams_ended_total";

/// Describes the metrics of this module.
pub(super) fn describe_metrics() {
    describe_counter!(STREAMS_ENDED, "Upstream streams that ended, by reason.");
}

/// An event on one token's stream.
#[derive(Debug)]
pub(super) enum StreamEvent {
    /// Upstream has accepted the request.
    Opened,
    /// The stream could not be opened; with the error's text if there was one.
    Unavailable(StreamUnavailable, Option<String>),
    /// Data arrived, with these complete events; none if it was a comment.
    Received(Vec<DecodedEvent>),
    /// The stream has ended; with the error's text if there was one.
    Closed(CloseReason, Option<String>),
}

/// The connections of one environment's streams.
#[derive(Debug)]
pub(super) struct StreamPool {
    upstream: Upstream,
    connections: Vec<(TokenDigest, Connection)>,
}

enum Connection {
    Opening(Pin<Box<dyn Future<Output = Result<Option<UpstreamEventStream>, Error>> + Send>>),
    Open(Box<UpstreamEventStream>),
}

impl StreamPool {
    pub(super) fn new(upstream: Upstream) -> Self {
        Self { upstream, connections: Vec::new() }
    }

    /// Opens the stream of a token, resuming after the event `last` if given.
    pub(super) fn open(&mut self, token: Token, last: Option<EventId>) {
        let (upstream, digest) = (self.upstream.clone(), token.digest());
        let response = Box::pin(async move { upstream.open_stream(&token, last).await });
        self.connections.push((digest, Connection::Opening(response)));
    }

    /// Closes the streams of all other tokens.
    pub(super) fn retain(&mut self, is_connected: impl Fn(&TokenDigest) -> bool) {
        self.connections.retain(|(token, _)| is_connected(token));
    }

    /// Closes the stream of a token, or counts that it has ended.
    pub(super) fn close(&mut self, token: &TokenDigest, reason: CloseReason) {
        counter!(STREAMS_ENDED, "why" => reason.as_str()).increment(1);
        self.retain(|it| it != token);
    }

    /// Waits for the next event on any stream. Cancel-safe.
    pub(super) async fn next_event(&mut self) -> (TokenDigest, StreamEvent) {
        if self.connections.is_empty() {
            return pending().await;
        }
        let each = self.connections.iter_mut().map(|(_, it)| Box::pin(it.next_event()));
        let (event, at, _) = select_all(each).await;
        let token = self.connections[at].0;
        if matches!(event, StreamEvent::Unavailable(..) | StreamEvent::Closed(..)) {
            self.connections.remove(at);
        }
        (token, event)
    }
}

impl Connection {
    /// Waits for the next event. Cancel-safe.
    async fn next_event(&mut self) -> StreamEvent {
        match self {
            Self::Opening(response) => match response.await {
                Ok(Some(stream)) => {
                    *self = Self::Open(Box::new(stream));
                    StreamEvent::Opened
                }
                Ok(None) => StreamEvent::Unavailable(StreamUnavailable::NotSupported, None),
                Err(error) => {
                    StreamEvent::Unavailable(classify_open_error(&error), Some(error_chain(&error)))
                }
            },
            Self::Open(stream) => match stream.next_events().await {
                Ok(Some(events)) => StreamEvent::Received(events),
                Ok(None) => StreamEvent::Closed(CloseReason::Ended(stream.retry_delay()), None),
                Err(error) => {
                    StreamEvent::Closed(classify_stream_error(&error), Some(error_chain(&error)))
                }
            },
        }
    }
}

fn classify_open_error(error: &Error) -> StreamUnavailable {
    match error.retry().retry_after() {
        _ if error.is_token_refused() => StreamUnavailable::Unauthorized,
        retry_after if error.is_throttled() => StreamUnavailable::Throttled(retry_after),
        retry_after => StreamUnavailable::Failed(retry_after),
    }
}

fn classify_stream_error(error: &Error) -> CloseReason {
    match error {
        Error::StreamTimeout(_) => CloseReason::TimedOut,
        Error::TooLarge { .. } => CloseReason::Unreadable,
        _ => CloseReason::Broken,
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Opening(_) => f.debug_tuple("Opening").finish_non_exhaustive(),
            Self::Open(stream) => stream.fmt(f),
        }
    }
}
