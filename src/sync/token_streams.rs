//! The event streams of one environment: whether the stream of each token is open, whether it has
//! delivered its state, and when it is opened again.
//!
//! Pure: times and random numbers are arguments. `stream_pool` has the connections, and `reconnect` the
//! delays.

use std::collections::BTreeSet;

use tokio::time::Instant;

use super::reconnect::{CloseReason, Reconnect, ReconnectPolicy, StreamUnavailable, UpstreamMode};
use crate::{protocol::delta::EventId, token::TokenDigest, upstream::Credential};

/// The streams of one environment.
#[derive(Debug)]
pub(super) struct TokenStreams {
    mode: UpstreamMode,
    /// The tokens passed to the last [`TokenStreams::set_tokens`].
    tokens_in_use: Vec<Credential>,
    streams: Vec<TokenStream>,
}

/// The stream of one token, with its reconnect state.
#[derive(Debug)]
struct TokenStream {
    credential: Credential,
    policy: ReconnectPolicy,
    state: State,
}

#[derive(Debug)]
enum State {
    Closed {
        closed_at: Instant,
        /// When to open it again.
        reopen_at: Instant,
    },
    Opening {
        /// The `Last-Event-ID` of the request.
        resumed_from: Option<EventId>,
    },
    Open {
        opened_at: Instant,
        resumed_from: Option<EventId>,
        /// Whether it has delivered its state. Until then its token is polled.
        is_synced: bool,
        last_activity: Instant,
    },
}

impl TokenStreams {
    pub(super) fn new(mode: UpstreamMode) -> Self {
        Self { mode, tokens_in_use: Vec::new(), streams: Vec::new() }
    }

    /// Keeps one stream for each token `in_use` that is `ready` for one; forgets all others.
    pub(super) fn set_tokens(
        &mut self,
        in_use: Vec<Credential>,
        ready: impl Fn(&TokenDigest) -> bool,
        now: Instant,
    ) {
        // A credential with other projects than before is a different one.
        self.streams.retain(|stream| in_use.contains(&stream.credential));
        for credential in &in_use {
            let has_stream = self.streams.iter().any(|stream| stream.credential == *credential);
            if self.mode != UpstreamMode::Poll && !has_stream && ready(&credential.token.digest()) {
                self.streams.push(TokenStream {
                    credential: credential.clone(),
                    policy: ReconnectPolicy::new(self.mode),
                    state: State::Closed { closed_at: now, reopen_at: now },
                });
            }
        }
        self.tokens_in_use = in_use;
    }

    /// The tokens passed to the last [`TokenStreams::set_tokens`].
    pub(super) fn tokens_in_use(&self) -> &[Credential] {
        &self.tokens_in_use
    }

    /// The tokens with a synced stream, which need no polling.
    pub(super) fn synced_tokens(&self) -> BTreeSet<TokenDigest> {
        self.last_activity_by_token().map(|(token, _)| token).collect()
    }

    /// Whether there is at least one token in use and each has a synced stream.
    pub(super) fn is_synced_for_all_tokens(&self) -> bool {
        let is_synced =
            |stream: &TokenStream| matches!(stream.state, State::Open { is_synced: true, .. });
        !self.tokens_in_use.is_empty()
            && self.streams.len() == self.tokens_in_use.len()
            && self.streams.iter().all(is_synced)
    }

    /// When data last arrived on each synced stream.
    pub(super) fn last_activity_by_token(&self) -> impl Iterator<Item = (TokenDigest, Instant)> {
        self.streams.iter().filter_map(|stream| match stream.state {
            State::Open { is_synced: true, last_activity, .. } => {
                Some((stream.credential.token.digest(), last_activity))
            }
            _ => None,
        })
    }

    /// The credential of a token's stream.
    pub(super) fn credential(&self, token: &TokenDigest) -> &Credential {
        &self.stream(token).credential
    }

    /// Whether a token has a stream that is open or about to be.
    pub(super) fn is_connected(&self, token: &TokenDigest) -> bool {
        let mut streams = self.streams.iter().filter(|it| it.credential.token.digest() == *token);
        streams.any(|stream| !matches!(stream.state, State::Closed { .. }))
    }

    /// Whether deltas on a token's stream apply to the state with the event id `known`.
    pub(super) fn can_apply_deltas(&self, token: &TokenDigest, known: Option<EventId>) -> bool {
        match self.stream(token).state {
            State::Open { is_synced, resumed_from, .. } => {
                is_synced || (resumed_from.is_some() && resumed_from == known)
            }
            State::Closed { .. } | State::Opening { .. } => false,
        }
    }

    /// When to call [`TokenStreams::open_next`] next.
    pub(super) fn next_opening(&self) -> Option<Instant> {
        let times = self.streams.iter().filter_map(|stream| match stream.state {
            State::Closed { reopen_at, .. } => Some(reopen_at),
            State::Opening { .. } | State::Open { .. } => None,
        });
        times.min()
    }

    /// A stream to open now, with the event to resume after: the `last` one of its token.
    pub(super) fn open_next(
        &mut self,
        now: Instant,
        last: impl Fn(&TokenDigest) -> Option<EventId>,
    ) -> Option<(&Credential, Option<EventId>)> {
        let is_due = |it: &&mut TokenStream| matches!(it.state, State::Closed { reopen_at, .. } if reopen_at <= now);
        let stream = self.streams.iter_mut().find(is_due)?;
        let resumed_from = last(&stream.credential.token.digest());
        stream.state = State::Opening { resumed_from };
        Some((&stream.credential, resumed_from))
    }

    /// Records that upstream has accepted the request for a token's stream, or has sent something on it.
    pub(super) fn on_activity(&mut self, token: &TokenDigest, now: Instant) {
        let state = &mut self.stream_mut(token).state;
        match state {
            State::Opening { resumed_from } => {
                let resumed_from = *resumed_from;
                *state = State::Open {
                    opened_at: now,
                    resumed_from,
                    is_synced: false,
                    last_activity: now,
                };
            }
            State::Open { last_activity, .. } => *last_activity = now,
            State::Closed { .. } => {}
        }
    }

    /// Records that a token's stream has delivered its state.
    pub(super) fn mark_synced(&mut self, token: &TokenDigest) {
        let stream = self.stream_mut(token);
        if let State::Open { is_synced, .. } = &mut stream.state {
            *is_synced = true;
            stream.policy.on_synced();
        }
    }

    /// Records that a token's stream could not be opened, and schedules the next attempt.
    pub(super) fn on_unavailable(
        &mut self,
        token: &TokenDigest,
        refusal: StreamUnavailable,
        now: Instant,
        jitter: f64,
    ) -> Reconnect {
        let stream = self.stream_mut(token);
        let next = stream.policy.on_unavailable(refusal, jitter);
        stream.state = State::Closed { closed_at: now, reopen_at: now + next.delay };
        next
    }

    /// Records that a token's stream was closed, and schedules the next attempt. Also returns the reason:
    /// a stream that ended before it delivered its state counts as broken.
    pub(super) fn on_closed(
        &mut self,
        token: &TokenDigest,
        reason: CloseReason,
        now: Instant,
        jitter: f64,
    ) -> (CloseReason, Reconnect) {
        let stream = self.stream_mut(token);
        let (lifetime, is_synced) = match stream.state {
            State::Open { opened_at, is_synced, .. } => {
                (now.saturating_duration_since(opened_at), is_synced)
            }
            State::Closed { .. } | State::Opening { .. } => Default::default(),
        };
        let reason = match reason {
            CloseReason::Ended(_) if !is_synced => CloseReason::Broken,
            reason => reason,
        };
        let next = stream.policy.on_closed(reason, lifetime, jitter);
        stream.state = State::Closed { closed_at: now, reopen_at: now + next.delay };
        (reason, next)
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

    fn stream(&self, token: &TokenDigest) -> &TokenStream {
        let mut streams = self.streams.iter();
        let stream = streams.find(|it| it.credential.token.digest() == *token);
        stream.expect("only connected streams have events")
    }

    fn stream_mut(&mut self, token: &TokenDigest) -> &mut TokenStream {
        let mut streams = self.streams.iter_mut();
        let stream = streams.find(|it| it.credential.token.digest() == *token);
        stream.expect("only connected streams have events")
    }
}
