//! Event source of a frontend SDK's stream: the flags enabled for one context, then their changes.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use super::question::Asker;
use crate::{
    answers::followed::{Subscription, FrontendUpdate},
    engine::EvaluationInputs,
    http::streaming::{Piece, Teller, Told},
    snapshot::Snapshots,
};

/// Evaluated flags of one context, sent again when they change.
#[derive(Debug)]
pub struct Changes {
    snapshots: Snapshots,
    asker: Asker,
    follower: Subscription,
    wake: Wake,
    /// The client must reconnect with its full context.
    needs_reconnect: bool,
}

impl Changes {
    /// Starts with all flags, unless their hash is `last`, which the client already has.
    pub fn new(snapshots: Snapshots, asker: Asker, last: Option<u128>) -> Self {
        let (follower, wake) = (Subscription::New(last), Wake::default());
        Self { snapshots, asker, follower, wake, needs_reconnect: false }
    }
}

impl Teller for Changes {
    fn tell(&mut self) -> Option<Piece> {
        let Self { snapshots, asker, follower, wake, needs_reconnect } = self;
        let snapshot = snapshots.load_for(asker.scope())?;
        let view = snapshot.frontend_view(&asker.scope().projects);
        let since = wake.set(view.inputs(), snapshot.received_at());
        let Some(question) = asker.question(&snapshot, &view) else {
            *needs_reconnect = true;
            return None;
        };
        let update =
            question.answer(&view, |context| follower.next_update(&snapshot, &view, context))?;
        let (bytes, kind) = match update {
            FrontendUpdate::Snapshot(bytes) => (bytes, Told::Whole),
            FrontendUpdate::Unchanged(bytes) => (bytes, Told::Missed),
            FrontendUpdate::Delta(bytes) => (bytes, Told::Changed(since)),
        };
        Some(Piece { bytes, told: kind })
    }

    fn wakes_at(&self) -> Option<Instant> {
        self.wake.at()
    }

    fn is_over(&self) -> bool {
        self.needs_reconnect
    }
}

/// The next time at which a date in a flag's constraints may change the outcomes.
#[derive(Debug, Default)]
pub struct Wake(Option<(Timestamp, Instant)>);

impl Wake {
    /// Computes the next time. Returns since when the outcomes may differ: since the flags were
    /// received, or since a later date that has passed.
    pub fn set(&mut self, reads: &EvaluationInputs, received: Instant) -> Instant {
        let (now, instant) = (Timestamp::now(), Instant::now());
        let passed = self.0.map(|(date, _)| date).filter(|date| *date <= now);
        self.0 = reads.next_change(now).map(|date| {
            // One millisecond later: evaluating too early would find no change.
            let wait = Duration::try_from(date.duration_since(now)).unwrap_or_default();
            let wait = wait.min(LONGEST_WAIT) + Duration::from_millis(1);
            (date, instant + wait)
        });
        let passed_at = passed.and_then(|date| {
            let elapsed = Duration::try_from(now.duration_since(date)).ok()?;
            instant.checked_sub(elapsed)
        });
        passed_at.map_or(received, |at| at.max(received))
    }

    /// The next time, if there is one.
    pub fn at(&self) -> Option<Instant> {
        self.0.map(|(_, at)| at)
    }
}

/// Longer than a stream's default lifetime, and safe from overflow in clock arithmetic.
const LONGEST_WAIT: Duration = Duration::from_hours(24);
