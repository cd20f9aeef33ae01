//! The streams of one environment: one for each token in use, opened and opened again.
//!
//! Each is on a course of its own ([`super::course`]). What they tell is followed elsewhere, and so is
//! polling for the tokens whose streams do not speak for them.

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

/// Tells the metric registry what the metrics of this module mean.
pub(super) fn describe() {
    describe_counter!(ENDED, "Streams of upstream that ended, by why.");
}

/// What happened on a line.
#[derive(Debug)]
pub(super) enum Happened {
    /// Upstream gave a sign of life, and told these.
    Told(Vec<Event>),
    /// There is no stream; why, where that is a failure.
    Refused(Refusal, Next, Option<Error>),
    /// The stream ended; why, where that is a failure.
    Ended(End, Next, Option<Error>),
}

/// The lines of one environment.
#[derive(Debug)]
pub(super) struct Lines {
    mode: Mode,
    upstream: Upstream,
    /// The tokens that were in use when that was looked at last.
    in_use: Vec<Credential>,
    all: Vec<Line>,
}

/// The line of one token.
#[derive(Debug)]
pub(super) struct Line {
    credential: Credential,
    course: Course,
    state: State,
}

enum State {
    Closed {
        since: Instant,
        /// When it is to be opened.
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
    /// The state that it was asked to go on from.
    last: Option<EventId>,
    /// Whether it has told the state of things, without which it speaks for nobody.
    speaks: bool,
    heard: Instant,
}

impl Lines {
    pub(super) fn new(mode: Mode, upstream: Upstream) -> Self {
        Self { mode, upstream, in_use: Vec::new(), all: Vec::new() }
    }

    /// Has a line for each of the tokens `in_use` that is `ready` for one, and for no other.
    pub(super) fn keep(&mut self, in_use: Vec<Credential>, ready: impl Fn(&TokenDigest) -> bool) {
        // One that sees something else than before is as good as another.
        self.all.retain(|line| in_use.contains(&line.credential));
        for credential in &in_use {
            let has_line = self.all.iter().any(|line| line.credential == *credential);
            if self.mode != Mode::Poll && !has_line && ready(&credential.token.digest()) {
                self.all.push(Line::new(credential.clone(), self.mode));
            }
        }
        self.in_use = in_use;
    }

    /// The tokens that were in use when [`Lines::keep`] was told.
    pub(super) fn in_use(&self) -> &[Credential] {
        &self.in_use
    }

    /// The tokens of which upstream tells by itself what changes of what they see.
    pub(super) fn speak_for(&self) -> BTreeSet<TokenDigest> {
        let speaking = self.all.iter().filter(|line| line.speaks());
        speaking.map(|line| line.credential.token.digest()).collect()
    }

    /// Whether these are all tokens in use, of which there is one at least.
    pub(super) fn speak_for_all(&self) -> bool {
        !self.in_use.is_empty()
            && self.all.len() == self.in_use.len()
            && self.all.iter().all(Line::speaks)
    }

    /// When upstream last gave a sign of life on the stream of each token that it tells changes of.
    pub(super) fn last_signs(&self) -> impl Iterator<Item = (TokenDigest, Instant)> {
        self.all.iter().filter_map(|line| match &line.state {
            State::Open(open) if open.speaks => Some((line.credential.token.digest(), open.heard)),
            _ => None,
        })
    }

    /// Since when all of what the tokens in use see is known to be current, if upstream tells by itself.
    pub(super) fn heard(&self) -> Option<Instant> {
        self.last_signs().map(|(_, at)| at).min().filter(|_| self.speak_for_all())
    }

    /// Opens those soon that upstream declined, now that it hints at streams.
    pub(super) fn hint(&mut self) {
        for line in &mut self.all {
            if let State::Closed { since, until } = &mut line.state
                && let Some(pause) = line.course.hinted()
            {
                *until = (*until).min(*since + pause);
            }
        }
    }

    /// Waits until something happens on one of them, and says on which. They go on from the state of
    /// which `last` is the number for each token.
    ///
    /// Dropping the future loses nothing.
    pub(super) async fn next(
        &mut self,
        last: impl Fn(&TokenDigest) -> Option<EventId>,
    ) -> (usize, Happened) {
        if self.all.is_empty() {
            return pending().await;
        }
        let (upstream, last) = (&self.upstream, &last);
        let each = self.all.iter_mut().map(|line| Box::pin(line.next(upstream, last)));
        let (happened, at, _) = select_all(each).await;
        (at, happened)
    }

    /// The token of a line.
    pub(super) fn credential(&self, at: usize) -> &Credential {
        &self.all[at].credential
    }

    /// Whether what a line tells goes on from the state that is `known`, by its number.
    pub(super) fn goes_on(&self, at: usize, known: Option<EventId>) -> bool {
        match &self.all[at].state {
            State::Open(open) => open.speaks || (open.last.is_some() && open.last == known),
            State::Closed { .. } | State::Opening { .. } => false,
        }
    }

    /// Takes note that what a line told is known now.
    pub(super) fn understood(&mut self, at: usize) {
        let line = &mut self.all[at];
        if let State::Open(open) = &mut line.state {
            open.speaks = true;
            line.course.told();
        }
    }

    /// Closes a line for something that it told.
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

    /// Waits until something happens; dropping the future loses nothing.
    async fn next(
        &mut self,
        upstream: &Upstream,
        last: impl Fn(&TokenDigest) -> Option<EventId>,
    ) -> Happened {
        loop {
            match &mut self.state {
                State::Closed { until, .. } => {
                    sleep_until(*until).await;
                    let token = self.credential.token.clone();
                    let (upstream, last) = (upstream.clone(), last(&token.digest()));
                    let answer = Box::pin(async move { upstream.follow(&token, last).await });
                    self.state = State::Opening { last, answer };
                }
                State::Opening { last, answer } => {
                    let last = *last;
                    let (refusal, error) = match answer.await {
                        Ok(Some(stream)) => {
                            let since = Instant::now();
                            let open = Open { stream, since, last, speaks: false, heard: since };
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
        let lived = match &self.state {
            State::Open(open) => open.since.elapsed(),
            State::Closed { .. } | State::Opening { .. } => Duration::ZERO,
        };
        counter!(ENDED, "why" => end.as_str()).increment(1);
        let next = self.course.ended(end, lived, rand::random());
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
        wish if error.is_crowded() => Refusal::Crowded(wish),
        wish => Refusal::Failed(wish),
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
            Self::Closed { since, until } => {
                f.debug_struct("Closed").field("since", since).field("until", until).finish()
            }
            Self::Opening { last, .. } => {
                f.debug_struct("Opening").field("last", last).finish_non_exhaustive()
            }
            Self::Open(open) => open.fmt(f),
        }
    }
}
