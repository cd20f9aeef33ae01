//! What a frontend's stream tells: the flags that are on for its context, and what changes of that.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use super::question::Asker;
use crate::{
    answers::followed::{Follower, News},
    engine::Reads,
    http::streaming::{Piece, Teller, Told},
    snapshot::Snapshots,
};

/// Tells what changes for one context.
#[derive(Debug)]
pub struct Changes {
    snapshots: Snapshots,
    asker: Asker,
    follower: Follower,
    wake: Wake,
    /// The client must say more of its context.
    is_over: bool,
}

impl Changes {
    /// Begins with everything, unless that is the answer of the hash `last`, which the client has.
    pub fn new(snapshots: Snapshots, asker: Asker, last: Option<u128>) -> Self {
        let (follower, wake) = (Follower::New(last), Wake::default());
        Self { snapshots, asker, follower, wake, is_over: false }
    }
}

impl Teller for Changes {
    fn tell(&mut self) -> Option<Piece> {
        let Self { snapshots, asker, follower, wake, is_over } = self;
        let snapshot = snapshots.load_for(asker.scope())?;
        let view = snapshot.view(&asker.scope().projects);
        let since = wake.set(view.reads(), snapshot.received());
        let Some(question) = asker.question(&snapshot, &view) else {
            *is_over = true;
            return None;
        };
        let news =
            question.answer(&view, |context| follower.catch_up(&snapshot, &view, context))?;
        let (bytes, told) = match news {
            News::Whole(bytes) => (bytes, Told::Whole),
            News::Current(bytes) => (bytes, Told::Missed),
            News::Changed(bytes) => (bytes, Told::Changed(since)),
        };
        Some(Piece { bytes, told })
    }

    fn wakes_at(&self) -> Option<Instant> {
        self.wake.at()
    }

    fn is_over(&self) -> bool {
        self.is_over
    }
}

/// When flags may come to something else by themselves, because a date of theirs comes.
#[derive(Debug, Default)]
pub struct Wake(Option<(Timestamp, Instant)>);

impl Wake {
    /// Finds out anew, and tells since when there may be something new: the source sent the flags at
    /// `received`, a date may have come later.
    pub fn set(&mut self, reads: &Reads, received: Instant) -> Instant {
        let (now, instant) = (Timestamp::now(), Instant::now());
        let came = self.0.map(|(date, _)| date).filter(|date| *date <= now);
        self.0 = reads.next_change(now).map(|date| {
            // Not before: what is evaluated a moment too early is as it was.
            let wait = Duration::try_from(date.duration_since(now)).unwrap_or_default();
            let wait = wait.min(LONGEST_WAIT) + Duration::from_millis(1);
            (date, instant + wait)
        });
        let came = came.and_then(|date| {
            let past = Duration::try_from(now.duration_since(date)).ok()?;
            instant.checked_sub(past)
        });
        came.map_or(received, |at| at.max(received))
    }

    /// The next time.
    pub fn at(&self) -> Option<Instant> {
        self.0.map(|(_, at)| at)
    }
}

/// Longer than any stream lasts by default, and far from what clocks cannot count.
const LONGEST_WAIT: Duration = Duration::from_hours(24);
