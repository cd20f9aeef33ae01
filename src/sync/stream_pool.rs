//! The event streams of one environment: one for each token in use, reopened after each end.
//!
//! Each stream reconnects on its own schedule ([`super::reconnect`]). This module does not apply events
//! and does not poll for tokens without a synced stream.

use std::{collections::BTreeSet, fmt, pin::Pin, time::Duration};

use futures_util::future::{pending, select_all};
use metrics::{counter, describe_counter};
use tokio::time::{Instant, sleep_until};

use super::reconnect::{CloseReason, Reconnect, ReconnectPolicy, StreamUnavailable, UpstreamMode};
use crate::{
    protocol::{delta::EventId, sse::Event},
    token::TokenDigest,
    upstream::{Credential, Error, Upstream, UpstreamEventStream},
};

const STREAMS_ENDED: &str = "parapet_upstream_streams_ended_total";

/// Describes the metrics of this module.
pub(super) fn describe() {
    describe_counter!(STREAMS_ENDED, "Upstream streams that ended, by reason.");
}

/// An event on one token's stream.
#[derive(Debug)]
pub(super) enum StreamEvent {
    /// Data arrived, with these complete events; none if it was a comment.
    Received(Vec<Event>),
    /// The stream could not be opened; with the error if there was one.
    Unavailable(StreamUnavailable, Reconnect, Option<Error>),
    /// The stream was closed; with the error if there was one.
    Closed(CloseReason, Reconnect, Option<Error>),
}

/// The streams of one environment.
#[derive(Debug)]
pub(super) struct StreamPool {
    mode: UpstreamMode,
    upstream: Upstream,
    /// The tokens passed to the last [`StreamPool::set_tokens`].
    tokens_in_use: Vec<Credential>,
    streams: Vec<TokenStream>,
}

/// The stream of one token, with its reconnect state.
#[derive(Debug)]
pub(super) struct TokenStream {
    credential: Credential,
    policy: ReconnectPolicy,
    state: State,
}

enum State {
    Closed {
        closed_at: Instant,
        /// When to open it again.
        reopen_at: Instant,
    },
    Opening {
        resume_from: Option<EventId>,
        response: Pin<Box<dyn Future<Output = Result<Option<UpstreamEventStream>, Error>> + Send>>,
    },
    Open(Box<OpenStream>),
}

#[derive(Debug)]
struct OpenStream {
    stream: UpstreamEventStream,
    opened_at: Instant,
    /// The `Last-Event-ID` that it was opened with.
    resumed_from: Option<EventId>,
    /// Whether it has delivered its state. Until then its token is polled.
    is_synced: bool,
    last_activity: Instant,
}

impl StreamPool {
    pub(super) fn new(mode: UpstreamMode, upstream: Upstream) -> Self {
        Self { mode, upstream, tokens_in_use: Vec::new(), streams: Vec::new() }
    }

    /// Keeps one stream for each token `in_use` that is `ready` for one; closes all others.
    pub(super) fn set_tokens(
        &mut self,
        in_use: Vec<Credential>,
        ready: impl Fn(&TokenDigest) -> bool,
    ) {
        // A credential with other projects than before is a different one.
        self.streams.retain(|stream| in_use.contains(&stream.credential));
        for credential in &in_use {
            let has_stream = self.streams.iter().any(|stream| stream.credential == *credential);
            if self.mode != UpstreamMode::Poll && !has_stream && ready(&credential.token.digest()) {
                self.streams.push(TokenStream::new(credential.clone(), self.mode));
            }
        }
        self.tokens_in_use = in_use;
    }

    /// The tokens passed to the last [`StreamPool::set_tokens`].
    pub(super) fn tokens_in_use(&self) -> &[Credential] {
        &self.tokens_in_use
    }

    /// The tokens with a synced stream, which need no polling.
    pub(super) fn synced_tokens(&self) -> BTreeSet<TokenDigest> {
        let synced = self.streams.iter().filter(|stream| stream.is_synced());
        synced.map(|stream| stream.credential.token.digest()).collect()
    }

    /// Whether there is at least one token in use and each has a synced stream.
    pub(super) fn is_synced_for_all_tokens(&self) -> bool {
        !self.tokens_in_use.is_empty()
            && self.streams.len() == self.tokens_in_use.len()
            && self.streams.iter().all(TokenStream::is_synced)
    }

    /// When data last arrived on each synced stream.
    pub(super) fn last_activity_by_token(&self) -> impl Iterator<Item = (TokenDigest, Instant)> {
        self.streams.iter().filter_map(|stream| match &stream.state {
            State::Open(open) if open.is_synced => {
                Some((stream.credential.token.digest(), open.last_activity))
            }
            _ => None,
        })
    }

    /// The time at which the flags of all tokens in use were known to be current: the oldest last
    /// activity. `None` unless each token has a synced stream.
    pub(super) fn confirmed_at(&self) -> Option<Instant> {
        self.last_activity_by_token()
            .map(|(_, at)| at)
            .min()
            .filter(|_| self.is_synced_for_all_tokens())
    }

    /// Reopens streams that upstream had declined sooner, because it now hints at streaming.
    pub(super) fn expedite_declined(&mut self) {
        for stream in &mut self.streams {
            if let State::Closed { closed_at, reopen_at } = &mut stream.state
                && let Some(pause) = stream.policy.delay_after_hint()
            {
                *reopen_at = (*reopen_at).min(*closed_at + pause);
            }
        }
    }

    /// Waits for the next event on any stream; returns it with the stream's index. Streams are opened
    /// with `last` of their token as `Last-Event-ID`.
    ///
    /// Cancel-safe.
    pub(super) async fn next_event(
        &mut self,
        last: impl Fn(&TokenDigest) -> Option<EventId>,
    ) -> (usize, StreamEvent) {
        if self.streams.is_empty() {
            return pending().await;
        }
        let (upstream, last) = (&self.upstream, &last);
        let each =
            self.streams.iter_mut().map(|stream| Box::pin(stream.next_event(upstream, last)));
        let (event, at, _) = select_all(each).await;
        (at, event)
    }

    /// The credential of a stream.
    pub(super) fn credential(&self, at: usize) -> &Credential {
        &self.streams[at].credential
    }

    /// Whether deltas on this stream apply to the state with the event id `known`.
    pub(super) fn can_apply_deltas(&self, at: usize, known: Option<EventId>) -> bool {
        match &self.streams[at].state {
            State::Open(open) => {
                open.is_synced || (open.resumed_from.is_some() && open.resumed_from == known)
            }
            State::Closed { .. } | State::Opening { .. } => false,
        }
    }

    /// Records that the events of a stream have been applied.
    pub(super) fn mark_synced(&mut self, at: usize) {
        let stream = &mut self.streams[at];
        if let State::Open(open) = &mut stream.state {
            open.is_synced = true;
            stream.policy.on_synced();
        }
    }

    /// Closes a stream because of an event on it.
    pub(super) fn close(&mut self, at: usize, end: CloseReason) -> Reconnect {
        self.streams[at].close(end)
    }
}

impl TokenStream {
    fn new(credential: Credential, mode: UpstreamMode) -> Self {
        let now = Instant::now();
        let state = State::Closed { closed_at: now, reopen_at: now };
        Self { credential, policy: ReconnectPolicy::new(mode), state }
    }

    fn is_synced(&self) -> bool {
        matches!(&self.state, State::Open(open) if open.is_synced)
    }

    /// Waits for the next event. Cancel-safe.
    async fn next_event(
        &mut self,
        upstream: &Upstream,
        last: impl Fn(&TokenDigest) -> Option<EventId>,
    ) -> StreamEvent {
        loop {
            match &mut self.state {
                State::Closed { reopen_at, .. } => {
                    sleep_until(*reopen_at).await;
                    let token = self.credential.token.clone();
                    let (upstream, resume_from) = (upstream.clone(), last(&token.digest()));
                    let response =
                        Box::pin(async move { upstream.open_stream(&token, resume_from).await });
                    self.state = State::Opening { resume_from, response };
                }
                State::Opening { resume_from, response } => {
                    let resume_from = *resume_from;
                    let (refusal, error) = match response.await {
                        Ok(Some(stream)) => {
                            let now = Instant::now();
                            let open = OpenStream {
                                stream,
                                opened_at: now,
                                resumed_from: resume_from,
                                is_synced: false,
                                last_activity: now,
                            };
                            self.state = State::Open(Box::new(open));
                            continue;
                        }
                        Ok(None) => (StreamUnavailable::NotSupported, None),
                        Err(error) => (classify_open_error(&error), Some(error)),
                    };
                    let next = self.policy.on_unavailable(refusal, rand::random());
                    self.schedule_reopen(next);
                    return StreamEvent::Unavailable(refusal, next, error);
                }
                State::Open(open) => {
                    let (end, error) = match open.stream.next_events().await {
                        Ok(Some(events)) => {
                            open.last_activity = Instant::now();
                            return StreamEvent::Received(events);
                        }
                        Ok(None) if open.is_synced => {
                            (CloseReason::Ended(open.stream.retry_delay()), None)
                        }
                        Ok(None) => (CloseReason::Broken, None),
                        Err(error) => (classify_stream_error(&error), Some(error)),
                    };
                    let next = self.close(end);
                    return StreamEvent::Closed(end, next, error);
                }
            }
        }
    }

    fn close(&mut self, end: CloseReason) -> Reconnect {
        let lifetime = match &self.state {
            State::Open(open) => open.opened_at.elapsed(),
            State::Closed { .. } | State::Opening { .. } => Duration::ZERO,
        };
        counter!(STREAMS_ENDED, "why" => end.as_str()).increment(1);
        let next = self.policy.on_closed(end, lifetime, rand::random());
        self.schedule_reopen(next);
        next
    }

    fn schedule_reopen(&mut self, next: Reconnect) {
        let now = Instant::now();
        self.state = State::Closed { closed_at: now, reopen_at: now + next.delay };
    }
}

fn classify_open_error(error: &Error) -> StreamUnavailable {
    match error.retry().retry_after() {
        _ if error.is_unauthorized() => StreamUnavailable::Unauthorized,
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

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { closed_at, reopen_at } => f
                .debug_struct("Closed")
                .field("closed_at", closed_at)
                .field("reopen_at", reopen_at)
                .finish(),
            Self::Opening { resume_from, .. } => {
                f.debug_struct("Opening").field("resume_from", resume_from).finish_non_exhaustive()
            }
            Self::Open(open) => open.fmt(f),
        }
    }
}
