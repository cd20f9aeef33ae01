//! The event streams of one environment: one for each token in use, reopened after each end.
//!
//! Each stream reconnects on its own schedule ([`super::reconnect`]). This module does not apply events
//! and does not poll for tokens without a synced stream.

use std::{collections::BTreeSet, fmt, pin::Pin, time::Duration};

use futures_util::future::{pending, select_all};
use metrics::{counter, describe_counter};
use tokio::time::{Instant, sleep_until};

use super::course::{Course, End, Mode, Next, Refusal};
use crate::{
    token::TokenDigest,
    upstream::{Credential, Error, Stream, Upstream},
    wire::{delta::EventId, sse::Event},
};

const ENDED: &str = "parapet_upstream_streams_ended_total";

/// Describes the metrics of this module.
pub(super) fn describe() {
    describe_counter!(ENDED, "Upstream streams that ended, by reason.");
}

/// An event on one token's stream.
#[derive(Debug)]
pub(super) enum Happened {
    /// Data arrived, with these complete events; none if it was a comment.
    Told(Vec<Event>),
    /// The stream could not be opened; with the error if there was one.
    Refused(Refusal, Next, Option<Error>),
    /// The stream was closed; with the error if there was one.
    Ended(End, Next, Option<Error>),
}

/// The streams of one environment.
#[derive(Debug)]
pub(super) struct Lines {
    mode: Mode,
    upstream: Upstream,
    /// The tokens passed to the last [`StreamPool::set_tokens`].
    in_use: Vec<Credential>,
    all: Vec<Line>,
}

/// The stream of one token, with its reconnect state.
#[derive(Debug)]
pub(super) struct Line {
    credential: Credential,
    course: Course,
    state: State,
}

enum State {
    Closed {
        since: Instant,
        /// When to open it again.
        until: Instant,
    },
    Opening {
        last: Option<EventId>,
        answer: Pin<Box<dyn Future<Output = Result<Option<Stream>, Error>> + Send>>,
    },
    Open(Box<Open>),
}

#[derive(Debug)]
struct Open {
    stream: Stream,
    since: Instant,
    /// The `Last-Event-ID` that it was opened with.
    last: Option<EventId>,
    /// Whether it has delivered its state. Until then its token is polled.
    speaks: bool,
    heard: Instant,
}

impl Lines {
    pub(super) fn new(mode: Mode, upstream: Upstream) -> Self {
        Self { mode, upstream, in_use: Vec::new(), all: Vec::new() }
    }

    /// Keeps one stream for each token `in_use` that is `ready` for one; closes all others.
    pub(super) fn keep(&mut self, in_use: Vec<Credential>, ready: impl Fn(&TokenDigest) -> bool) {
        // A credential with other projects than before is a different one.
        self.all.retain(|stream| in_use.contains(&stream.credential));
        for credential in &in_use {
            let has_stream = self.all.iter().any(|stream| stream.credential == *credential);
            if self.mode != Mode::Poll && !has_stream && ready(&credential.token.digest()) {
                self.all.push(Line::new(credential.clone(), self.mode));
            }
        }
        self.in_use = in_use;
    }

    /// The tokens passed to the last [`StreamPool::set_tokens`].
    pub(super) fn tokens_in_use(&self) -> &[Credential] {
        &self.in_use
    }

    /// The tokens with a synced stream, which need no polling.
    pub(super) fn speak_for(&self) -> BTreeSet<TokenDigest> {
        let synced = self.all.iter().filter(|stream| stream.speaks());
        synced.map(|stream| stream.credential.token.digest()).collect()
    }

    /// Whether there is at least one token in use and each has a synced stream.
    pub(super) fn speak_for_all(&self) -> bool {
        !self.in_use.is_empty()
            && self.all.len() == self.in_use.len()
            && self.all.iter().all(Line::speaks)
    }

    /// When data last arrived on each synced stream.
    pub(super) fn last_signs(&self) -> impl Iterator<Item = (TokenDigest, Instant)> {
        self.all.iter().filter_map(|stream| match &stream.state {
            State::Open(open) if open.speaks => {
                Some((stream.credential.token.digest(), open.heard))
            }
            _ => None,
        })
    }

    /// The time at which the flags of all tokens in use were known to be current: the oldest last
    /// activity. `None` unless each token has a synced stream.
    pub(super) fn heard(&self) -> Option<Instant> {
        self.last_signs().map(|(_, at)| at).min().filter(|_| self.speak_for_all())
    }

    /// Reopens streams that upstream had declined sooner, because it now hints at streaming.
    pub(super) fn hint(&mut self) {
        for stream in &mut self.all {
            if let State::Closed { since: closed_at, until: reopen_at } = &mut stream.state
                && let Some(pause) = stream.course.hinted()
            {
                *reopen_at = (*reopen_at).min(*closed_at + pause);
            }
        }
    }

    /// Waits for the next event on any stream; returns it with the stream's index. Streams are opened
    /// with `last` of their token as `Last-Event-ID`.
    ///
    /// Cancel-safe.
    pub(super) async fn next(
        &mut self,
        last: impl Fn(&TokenDigest) -> Option<EventId>,
    ) -> (usize, Happened) {
        if self.all.is_empty() {
            return pending().await;
        }
        let (upstream, last) = (&self.upstream, &last);
        let each = self.all.iter_mut().map(|stream| Box::pin(stream.next(upstream, last)));
        let (event, at, _) = select_all(each).await;
        (at, event)
    }

    /// The credential of a stream.
    pub(super) fn credential(&self, at: usize) -> &Credential {
        &self.all[at].credential
    }

    /// Whether deltas on this stream apply to the state with the event id `known`.
    pub(super) fn goes_on(&self, at: usize, known: Option<EventId>) -> bool {
        match &self.all[at].state {
            State::Open(open) => open.speaks || (open.last.is_some() && open.last == known),
            State::Closed { .. } | State::Opening { .. } => false,
        }
    }

    /// Records that the events of a stream have been applied.
    pub(super) fn understood(&mut self, at: usize) {
        let stream = &mut self.all[at];
        if let State::Open(open) = &mut stream.state {
            open.speaks = true;
            stream.course.told();
        }
    }

    /// Closes a stream because of an event on it.
    pub(super) fn close(&mut self, at: usize, end: End) -> Next {
        self.all[at].end(end)
    }
}

impl Line {
    fn new(credential: Credential, mode: Mode) -> Self {
        let now = Instant::now();
        let state = State::Closed { since: now, until: now };
        Self { credential, course: Course::new(mode), state }
    }

    fn speaks(&self) -> bool {
        matches!(&self.state, State::Open(open) if open.speaks)
    }

    /// Waits for the next event. Cancel-safe.
    async fn next(
        &mut self,
        upstream: &Upstream,
        last: impl Fn(&TokenDigest) -> Option<EventId>,
    ) -> Happened {
        loop {
            match &mut self.state {
                State::Closed { until: reopen_at, .. } => {
                    sleep_until(*reopen_at).await;
                    let token = self.credential.token.clone();
                    let (upstream, resume_from) = (upstream.clone(), last(&token.digest()));
                    let response =
                        Box::pin(async move { upstream.follow(&token, resume_from).await });
                    self.state = State::Opening { last: resume_from, answer: response };
                }
                State::Opening { last: resume_from, answer: response } => {
                    let resume_from = *resume_from;
                    let (refusal, error) = match response.await {
                        Ok(Some(stream)) => {
                            let now = Instant::now();
                            let open = Open {
                                stream,
                                since: now,
                                last: resume_from,
                                speaks: false,
                                heard: now,
                            };
                            self.state = State::Open(Box::new(open));
                            continue;
                        }
                        Ok(None) => (Refusal::NotOffered, None),
                        Err(error) => (refusal(&error), Some(error)),
                    };
                    let next = self.course.refused(refusal, rand::random());
                    self.close(next);
                    return Happened::Refused(refusal, next, error);
                }
                State::Open(open) => {
                    let (end, error) = match open.stream.next().await {
                        Ok(Some(events)) => {
                            open.heard = Instant::now();
                            return Happened::Told(events);
                        }
                        Ok(None) if open.speaks => (End::Over(open.stream.retry()), None),
                        Ok(None) => (End::Broken, None),
                        Err(error) => (end(&error), Some(error)),
                    };
                    let next = self.end(end);
                    return Happened::Ended(end, next, error);
                }
            }
        }
    }

    fn end(&mut self, end: End) -> Next {
        let lifetime = match &self.state {
            State::Open(open) => open.since.elapsed(),
            State::Closed { .. } | State::Opening { .. } => Duration::ZERO,
        };
        counter!(ENDED, "why" => end.as_str()).increment(1);
        let next = self.course.ended(end, lifetime, rand::random());
        self.close(next);
        next
    }

    fn close(&mut self, next: Next) {
        let now = Instant::now();
        self.state = State::Closed { since: now, until: now + next.open_after };
    }
}

fn refusal(error: &Error) -> Refusal {
    match error.retry().wish() {
        _ if error.is_unauthorized() => Refusal::NotAdmitted,
        retry_after if error.is_crowded() => Refusal::Crowded(retry_after),
        retry_after => Refusal::Failed(retry_after),
    }
}

fn end(error: &Error) -> End {
    match error {
        Error::Silent(_) => End::Silent,
        Error::TooLarge { .. } => End::Unreadable,
        _ => End::Broken,
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { since: closed_at, until: reopen_at } => f
                .debug_struct("Closed")
                .field("closed_at", closed_at)
                .field("reopen_at", reopen_at)
                .finish(),
            Self::Opening { last: resume_from, .. } => {
                f.debug_struct("Opening").field("resume_from", resume_from).finish_non_exhaustive()
            }
            Self::Open(open) => open.fmt(f),
        }
    }
}
