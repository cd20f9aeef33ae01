//! Open streams: how many there may be, how long they last, and what ends them.
//!
//! A stream's connection asks for its next piece when it has sent the last, so that a client which
//! reads slowly holds one piece and delays nobody. What there is to tell is the business of
//! [`crate::feed`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use jiff::Timestamp;
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::reply::{self, Failure, Reply};
use crate::{
    auth::Authenticator,
    feed::{Feed, News, Topic},
    token::{Grant, TokenDigest},
    wire::{delta::EventId, sse},
};

/// Where SDKs that can do both are to go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FetchMode {
    /// Those that follow a stream are told to poll.
    Polling,
    /// Those that poll are told to follow a stream.
    Streaming,
}

impl FetchMode {
    /// Reads a mode's name.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "polling" => Some(Self::Polling),
            "streaming" => Some(Self::Streaming),
            _ => None,
        }
    }
}

/// How streams are kept.
#[derive(Clone, Debug)]
pub struct Config {
    /// How many may be open at once.
    pub most: usize,
    /// About how long one lasts, so that clients spread over instances anew.
    pub max_age: Duration,
    /// Where SDKs are sent; as they are set up themselves when there is none.
    pub fetch_mode: Option<FetchMode>,
}

/// How often a comment is sent at least: Node's SDK gives up after 60 s of silence.
const COMMENT_EVERY: Duration = Duration::from_secs(25);

/// How often it is looked whether the tokens of open streams still hold.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// When a client that found no room is told to try again.
const CROWDED_FOR: Duration = Duration::from_mins(1);

/// The longest that streams take to end one by one, so that not all clients come back at once.
const LONGEST_STAGGER: Duration = Duration::from_secs(5);

/// After how many milliseconds clients come back after an orderly end.
const COME_BACK: std::ops::Range<u64> = 500..5_000;

/// Every open stream. A cheap handle.
#[derive(Clone, Debug)]
pub struct Streams(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: Config,
    feed: Feed,
    auth: Authenticator,
    room: Arc<Semaphore>,
    /// Of each token with a stream.
    lives: Mutex<HashMap<TokenDigest, Weak<Life>>>,
    ending: CancellationToken,
    /// Over how long they end.
    stagger: OnceLock<Duration>,
    tally: Tally,
}

/// How long the streams of one token may last.
#[derive(Debug)]
struct Life {
    grant: Arc<Grant>,
    over: CancellationToken,
}

impl Streams {
    /// Tells of what `feed` numbers, as long as `auth` admits the tokens.
    pub fn new(config: Config, feed: Feed, auth: Authenticator) -> Self {
        let room = Arc::new(Semaphore::new(config.most.min(Semaphore::MAX_PERMITS)));
        let (lives, stagger) = Default::default();
        let (ending, tally) = (CancellationToken::new(), Tally::new());
        Self(Arc::new(Inner { config, feed, auth, room, lives, ending, stagger, tally }))
    }

    /// Whether SDKs that poll are to be told to follow a stream instead.
    pub fn are_preferred(&self) -> bool {
        self.0.config.fetch_mode == Some(FetchMode::Streaming)
    }

    /// Ends the streams of tokens that hold no more, or allow something else now, until dropped.
    pub async fn run(&self) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            self.0.lives().retain(|digest, life| {
                let Some(life) = life.upgrade() else { return false };
                let stands = self.0.auth.standing(digest).is_some_and(|it| it == life.grant);
                if !stands {
                    life.over.cancel();
                }
                stands
            });
        }
    }

    /// Ends all streams, one by one within a few seconds, and at most within half of `grace`. There
    /// will be no others.
    pub fn end(&self, grace: Duration) {
        self.0.stagger.get_or_init(|| (grace / 2).min(LONGEST_STAGGER));
        self.0.ending.cancel();
    }

    /// Opens a stream of what changes of `topic`, for the bearer of a token that grants it; it begins
    /// with all that was missed since the state `last`.
    ///
    /// # Errors
    /// When there is no room, or no state.
    pub fn follow(
        &self,
        digest: TokenDigest,
        grant: Arc<Grant>,
        topic: Topic,
        last: Option<EventId>,
    ) -> Result<Option<Reply>, Failure> {
        let Some(numbers) = self.0.feed.follow(&topic.environment) else { return Ok(None) };
        let seat = self.take_seat(digest, grant)?;
        let age = self.0.config.max_age.mul_f64(rand::random_range(0.9..1.1));
        let follower = Follower {
            streams: self.clone(),
            topic: Arc::new(topic),
            numbers,
            last,
            stage: Stage::Connecting,
            seat,
            comment_at: Instant::now() + between_comments(),
            over_at: Instant::now() + age,
        };
        let told = stream::unfold(follower, |mut follower| async {
            let bytes = follower.next().await?;
            follower.tally().bytes.increment(bytes.len() as u64);
            Some((bytes, follower))
        });
        Ok(Some(reply::event_stream(Box::pin(told))))
    }

    fn take_seat(&self, digest: TokenDigest, grant: Arc<Grant>) -> Result<Seat, Failure> {
        let inner = &self.0;
        let Ok(permit) = Arc::clone(&inner.room).try_acquire_owned() else {
            inner.tally.refused.increment(1);
            return Err(Failure::Crowded(CROWDED_FOR));
        };
        let mut lives = inner.lives();
        let life = match lives.get(&digest).and_then(Weak::upgrade) {
            Some(life) if life.grant == grant => life,
            other => {
                if let Some(outdated) = other {
                    outdated.over.cancel();
                }
                let life = Arc::new(Life { grant, over: inner.ending.child_token() });
                lives.insert(digest, Arc::downgrade(&life));
                life
            }
        };
        inner.tally.open.increment(1);
        Ok(Seat { life, open: inner.tally.open.clone(), _permit: permit })
    }
}

impl Inner {
    /// A panic under this lock leaves a whole map.
    fn lives(&self) -> MutexGuard<'_, HashMap<TokenDigest, Weak<Life>>> {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream's place among all, free again when it is dropped.
#[derive(Debug)]
struct Seat {
    life: Arc<Life>,
    open: Gauge,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.open.decrement(1);
    }
}

/// One stream of delta events.
#[derive(Debug)]
struct Follower {
    streams: Streams,
    topic: Arc<Topic>,
    numbers: watch::Receiver<EventId>,
    /// The state that the client has.
    last: Option<EventId>,
    stage: Stage,
    seat: Seat,
    comment_at: Instant,
    over_at: Instant,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    Connecting,
    /// It is to be told where to go.
    Directing(FetchMode),
    Following,
    Over,
}

impl Follower {
    /// The next piece, when there is one; `None` when the stream is over.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.stage == Stage::Over {
                return None;
            }
            if !self.seat.life.over.is_cancelled()
                && let Some(bytes) = self.news()
            {
                return Some(bytes);
            }
            tokio::select! {
                biased;
                () = self.seat.life.over.cancelled() => return self.end().await,
                changed = self.numbers.changed() => if changed.is_err() {
                    self.tally().gone.increment(1);
                    return None;
                },
                () = tokio::time::sleep_until(self.comment_at.min(self.over_at)) => {
                    if self.over_at <= Instant::now() {
                        self.tally().aged.increment(1);
                        return None;
                    }
                    self.comment_at = Instant::now() + between_comments();
                    self.tally().comments.increment(1);
                    return Some(Bytes::from_static(sse::COMMENT));
                }
            }
        }
    }

    fn tally(&self) -> &Tally {
        &self.streams.0.tally
    }

    /// What there is to tell at once.
    fn news(&mut self) -> Option<Bytes> {
        let Inner { feed, tally, config, .. } = &*self.streams.0;
        if let Stage::Directing(mode) = self.stage {
            self.stage = Stage::Following;
            let FetchMode::Polling = mode else { return None };
            return Some(sse::event("fetch-mode", None, "polling").into());
        }
        let is_first = self.stage == Stage::Connecting;
        let current = *self.numbers.borrow_and_update();
        if !is_first && self.last == Some(current) {
            return None;
        }
        let frame = feed.since(&self.topic, self.last)?;
        self.last = Some(frame.id());
        if is_first {
            self.stage = config.fetch_mode.map_or(Stage::Following, Stage::Directing);
            match frame.news() {
                News::Everything => tally.hydrations.increment(1),
                News::Changes | News::Nothing => tally.replays.increment(1),
            }
            return Some(frame.connected());
        }
        match frame.news() {
            News::Nothing => return None,
            News::Everything => tally.overtaken.increment(1),
            News::Changes => tally.changes.increment(1),
        }
        let delay = Timestamp::now().duration_since(frame.told()).as_secs_f64();
        tally.delay.record(delay.max(0.0));
        Some(frame.updated())
    }

    /// Says good-bye where the client may come back.
    async fn end(&mut self) -> Option<Bytes> {
        let Inner { tally, ending, stagger, .. } = &*self.streams.0;
        if !ending.is_cancelled() {
            tally.revoked.increment(1);
            return None;
        }
        tally.shut.increment(1);
        self.stage = Stage::Over;
        let stagger = stagger.get().copied().unwrap_or_default();
        tokio::time::sleep(stagger.mul_f64(rand::random())).await;
        Some(sse::retry(rand::random_range(COME_BACK)).into())
    }
}

/// Spread, so that comments do not go out all at once.
fn between_comments() -> Duration {
    COMMENT_EVERY.mul_f64(rand::random_range(0.6..1.0))
}

/// What is counted of streams.
#[derive(Debug)]
struct Tally {
    open: Gauge,
    refused: Counter,
    bytes: Counter,
    hydrations: Counter,
    replays: Counter,
    changes: Counter,
    overtaken: Counter,
    comments: Counter,
    revoked: Counter,
    aged: Counter,
    gone: Counter,
    shut: Counter,
    delay: Histogram,
}

impl Tally {
    fn new() -> Self {
        const OPEN: &str = "parapet_streams";
        const REFUSED: &str = "parapet_streams_refused_total";
        const ENDED: &str = "parapet_streams_ended_total";
        const FRAMES: &str = "parapet_stream_frames_total";
        const BYTES: &str = "parapet_stream_bytes_total";
        const DELAY: &str = "parapet_propagation_delay_seconds";
        describe_gauge!(OPEN, "Open streams");
        describe_counter!(REFUSED, "Streams that found no room");
        describe_counter!(ENDED, "Streams that were ended here, by why");
        describe_counter!(FRAMES, "Pieces sent on streams, by what they told");
        describe_counter!(BYTES, "Bytes sent on streams");
        describe_histogram!(DELAY, "Time from the source's telling of a change to sending it on");
        let frames = |told: &'static str| counter!(FRAMES, "told" => told);
        let ended = |why: &'static str| counter!(ENDED, "why" => why);
        Self {
            open: gauge!(OPEN),
            refused: counter!(REFUSED),
            bytes: counter!(BYTES),
            hydrations: frames("hydration"),
            replays: frames("replay"),
            changes: frames("changes"),
            overtaken: frames("overtaken"),
            comments: frames("comment"),
            revoked: ended("token"),
            aged: ended("age"),
            gone: ended("environment"),
            shut: ended("shutdown"),
            delay: histogram!(DELAY),
        }
    }
}
