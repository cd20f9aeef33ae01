//! One open stream, from its first piece to its end.
//!
//! Thousands are woken by one change, so that what each then does counts: what a stream waits for
//! stays in place from wake to wake, and only what has come is looked at.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::Stream;
use tokio::{
    sync::watch,
    task::coop::{Unconstrained, unconstrained},
    time::{Instant, Sleep, sleep_until},
};
use tokio_util::sync::{ReusableBoxFuture, WaitForCancellationFutureOwned};

use super::{seats::Seat, teller::Teller};
use crate::{feed::Number, wire::sse};

/// How often a comment is sent at least: Node's SDK gives up after 60 s of silence.
const COMMENT_EVERY: Duration = Duration::from_secs(25);

/// Comments go out at multiples of this after a time that is the same for all: waking up costs more
/// than sending what is short, and is done once for several.
const TOGETHER: Duration = Duration::from_millis(100);

/// After how many milliseconds clients come back after an orderly end.
const COME_BACK: std::ops::Range<u64> = 500..5_000;

pin_project_lite::pin_project! {
    /// The stream that a seat is for.
    pub(super) struct Follower<T> {
        seat: Seat,
        // Always to be polled in full: it is polled once.
        #[pin]
        over: Unconstrained<WaitForCancellationFutureOwned>,
        states: States,
        teller: T,
        stage: Stage,
        comment_at: Instant,
        over_at: Instant,
        // Rings when the next thing is due, or before.
        #[pin]
        alarm: Sleep,
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// Not polled yet, so that nothing will wake it.
    New,
    /// There may be something to tell.
    Telling,
    /// All has been told.
    Waiting,
    /// To be over when the alarm rings, with a good-bye.
    Leaving,
    Over,
}

impl<T: Teller> Follower<T> {
    /// One that lasts for `age` at most.
    pub(super) fn new(
        seat: Seat,
        states: watch::Receiver<Number>,
        teller: T,
        age: Duration,
    ) -> Self {
        let now = Instant::now();
        let (comment_at, over_at) = (next_comment(now, seat.epoch()), now + age);
        let (over, alarm) = (unconstrained(seat.over().wake()), sleep_until(over_at));
        let (states, stage) = (States::new(states), Stage::New);
        Self { seat, over, states, teller, stage, comment_at, over_at, alarm }
    }
}

impl<T: Teller> Stream for Follower<T> {
    type Item = Bytes;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let mut this = self.project();
        let tally = this.seat.tally();
        if *this.stage == Stage::New {
            let _ = this.over.poll(cx);
            *this.stage = Stage::Telling;
        }
        if matches!(this.stage, Stage::Telling | Stage::Waiting) && this.seat.over().is_given() {
            let Some(stagger) = this.seat.stagger() else {
                tally.revoked.increment(1);
                *this.stage = Stage::Over;
                return Poll::Ready(None);
            };
            tally.shut.increment(1);
            this.alarm.as_mut().reset(Instant::now() + stagger.mul_f64(rand::random()));
            *this.stage = Stage::Leaving;
        }
        loop {
            match this.stage {
                Stage::New | Stage::Telling => {
                    if let Some(piece) = this.teller.tell() {
                        tally.count(piece.told);
                        tally.bytes.increment(piece.bytes.len() as u64);
                        return Poll::Ready(Some(piece.bytes));
                    }
                    if this.teller.is_over() {
                        tally.incomplete.increment(1);
                        this.alarm.as_mut().reset(Instant::now());
                        *this.stage = Stage::Leaving;
                    } else {
                        *this.stage = Stage::Waiting;
                    }
                }
                Stage::Waiting => {
                    match this.states.poll_changed(cx) {
                        Poll::Ready(Ok(())) => {
                            *this.stage = Stage::Telling;
                            continue;
                        }
                        Poll::Ready(Err(_)) => {
                            tally.gone.increment(1);
                            *this.stage = Stage::Over;
                            return Poll::Ready(None);
                        }
                        Poll::Pending => {}
                    }
                    let due = (*this.comment_at).min(*this.over_at);
                    let due = this.teller.wakes_at().map_or(due, |wake| wake.min(due));
                    if due < this.alarm.deadline() || this.alarm.is_elapsed() {
                        this.alarm.as_mut().reset(due);
                    }
                    ready!(this.alarm.as_mut().poll(cx));
                    let now = Instant::now();
                    if *this.over_at <= now {
                        tally.aged.increment(1);
                        *this.stage = Stage::Over;
                        return Poll::Ready(None);
                    }
                    if *this.comment_at <= now {
                        *this.comment_at = next_comment(now, this.seat.epoch());
                        let comment = Bytes::from_static(sse::COMMENT);
                        tally.comments.increment(1);
                        tally.bytes.increment(comment.len() as u64);
                        return Poll::Ready(Some(comment));
                    }
                    *this.stage = Stage::Telling;
                }
                Stage::Leaving => {
                    ready!(this.alarm.as_mut().poll(cx));
                    *this.stage = Stage::Over;
                    let good_bye = Bytes::from(sse::retry(rand::random_range(COME_BACK)));
                    tally.bytes.increment(good_bye.len() as u64);
                    return Poll::Ready(Some(good_bye));
                }
                Stage::Over => return Poll::Ready(None),
            }
        }
    }
}

/// The numbers of an environment's states, waited for in one place.
struct States(ReusableBoxFuture<'static, (Changed, watch::Receiver<Number>)>);

type Changed = Result<(), watch::error::RecvError>;

impl States {
    fn new(states: watch::Receiver<Number>) -> Self {
        Self(ReusableBoxFuture::new(next(states)))
    }

    /// Ready when there is another number; fails when there will be none.
    fn poll_changed(&mut self, cx: &mut Context<'_>) -> Poll<Changed> {
        let (changed, states) = ready!(self.0.poll(cx));
        self.0.set(next(states));
        Poll::Ready(changed)
    }
}

async fn next(mut states: watch::Receiver<Number>) -> (Changed, watch::Receiver<Number>) {
    (states.changed().await, states)
}

/// When to send a comment next: spread, so that not all go out at once.
fn next_comment(now: Instant, epoch: Instant) -> Instant {
    let due = now + COMMENT_EVERY.mul_f64(rand::random_range(0.6..1.0));
    let after = due.saturating_duration_since(epoch);
    let early = after.as_nanos() % TOGETHER.as_nanos();
    due - Duration::from_nanos_u128(early)
}
