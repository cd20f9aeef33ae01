//! One open stream, from its first piece to its end.

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use tokio::{sync::watch, time::Instant};

use super::{seats::Seat, teller::Teller};
use crate::{
    http::reply::Live,
    wire::{delta::EventId, sse},
};

/// How often a comment is sent at least: Node's SDK gives up after 60 s of silence.
const COMMENT_EVERY: Duration = Duration::from_secs(25);

/// After how many milliseconds clients come back after an orderly end.
const COME_BACK: std::ops::Range<u64> = 500..5_000;

pub(super) struct Follower<T> {
    seat: Seat,
    states: watch::Receiver<EventId>,
    teller: T,
    stage: Stage,
    comment_at: Instant,
    over_at: Instant,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// There may be something to tell.
    Telling,
    /// All has been told.
    Waiting,
    Over,
}

impl<T: Teller> Follower<T> {
    /// One that lasts for `age` at most.
    pub(super) fn new(
        seat: Seat,
        states: watch::Receiver<EventId>,
        teller: T,
        age: Duration,
    ) -> Self {
        let now = Instant::now();
        let (comment_at, over_at) = (now + between_comments(), now + age);
        Self { seat, states, teller, stage: Stage::Telling, comment_at, over_at }
    }

    pub(super) fn into_stream(self) -> Live {
        Box::pin(stream::unfold(self, |mut follower| async {
            let bytes = follower.next().await?;
            follower.seat.tally().bytes.increment(bytes.len() as u64);
            Some((bytes, follower))
        }))
    }

    /// The next piece, when there is one; `None` when the stream is over.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let over = self.seat.over();
            match self.stage {
                Stage::Over => return None,
                Stage::Telling if !over.is_cancelled() => {
                    if let Some(piece) = self.teller.tell() {
                        self.seat.tally().count(piece.told);
                        return Some(piece.bytes);
                    }
                    self.stage = Stage::Waiting;
                }
                Stage::Telling | Stage::Waiting => {}
            }
            let tally = self.seat.tally();
            let timer = self.comment_at.min(self.over_at);
            let timer = self.teller.wakes_at().map_or(timer, |wake| wake.min(timer));
            tokio::select! {
                biased;
                () = over.cancelled() => return self.end().await,
                changed = self.states.changed() => {
                    if changed.is_err() {
                        tally.gone.increment(1);
                        return None;
                    }
                    self.stage = Stage::Telling;
                }
                () = tokio::time::sleep_until(timer) => {
                    let now = Instant::now();
                    if self.over_at <= now {
                        tally.aged.increment(1);
                        return None;
                    }
                    if self.comment_at <= now {
                        self.comment_at = now + between_comments();
                        tally.comments.increment(1);
                        return Some(Bytes::from_static(sse::COMMENT));
                    }
                    self.stage = Stage::Telling;
                }
            }
        }
    }

    /// Says good-bye where the client may come back.
    async fn end(&mut self) -> Option<Bytes> {
        let tally = self.seat.tally();
        let Some(stagger) = self.seat.stagger() else {
            tally.revoked.increment(1);
            return None;
        };
        tally.shut.increment(1);
        self.stage = Stage::Over;
        tokio::time::sleep(stagger.mul_f64(rand::random())).await;
        Some(sse::retry(rand::random_range(COME_BACK)).into())
    }
}

/// Spread, so that comments do not go out all at once.
fn between_comments() -> Duration {
    COMMENT_EVERY.mul_f64(rand::random_range(0.6..1.0))
}
