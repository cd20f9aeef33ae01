//! Event source of a frontend SDK's stream: the flags enabled for one context, then their changes.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use super::evaluation_request::Subscriber;
use crate::{
    engine::EvaluationInputs,
    evaluation::subscription::{FrontendUpdate, Subscription},
    http::streaming::{ChunkKind, EventSource, SseChunk},
    served::Snapshots,
};

/// Evaluated flags of one context, sent again when they change.
#[derive(Debug)]
pub struct FlagEvents {
    snapshots: Snapshots,
    subscriber: Subscriber,
    subscription: Subscription,
    date_trigger: DateTrigger,
    /// The client must reconnect with its full context.
    needs_reconnect: bool,
}

impl FlagEvents {
    /// Starts with all flags, unless their hash is `last`, which the client already has.
    pub fn new(snapshots: Snapshots, subscriber: Subscriber, last: Option<u128>) -> Self {
        let (subscription, date_trigger) = (Subscription::New(last), DateTrigger::default());
        Self { snapshots, subscriber, subscription, date_trigger, needs_reconnect: false }
    }
}

impl EventSource for FlagEvents {
    fn try_next_event(&mut self) -> Option<SseChunk> {
        let Self { snapshots, subscriber, subscription, date_trigger, needs_reconnect } = self;
        let snapshot = snapshots.load_for_scope(subscriber.scope())?;
        let view = snapshot.frontend_view(&subscriber.scope().projects);
        let since = date_trigger.reschedule(view.inputs(), snapshot.received_at());
        let Some(request) = subscriber.evaluation_request(&snapshot, &view) else {
            *needs_reconnect = true;
            return None;
        };
        let update = request
            .with_context(&view, |context| subscription.next_update(&snapshot, &view, context))?;
        let (bytes, kind) = match update {
            FrontendUpdate::Snapshot(bytes) => (bytes, ChunkKind::Hydration),
            FrontendUpdate::Unchanged(bytes) => (bytes, ChunkKind::Replay),
            FrontendUpdate::Delta(bytes) => (bytes, ChunkKind::Changes(since)),
        };
        Some(SseChunk { bytes, kind })
    }

    fn next_reevaluation_at(&self) -> Option<Instant> {
        self.date_trigger.deadline()
    }

    fn is_finished(&self) -> bool {
        self.needs_reconnect
    }
}

/// The next time at which a date in a flag's constraints may change the outcomes.
#[derive(Debug, Default)]
pub struct DateTrigger(Option<(Timestamp, Instant)>);

impl DateTrigger {
    /// Computes the next time. Returns since when the outcomes may differ: since the flags were
    /// received, or since a later date that has passed.
    pub fn reschedule(&mut self, reads: &EvaluationInputs, received: Instant) -> Instant {
        let (now, instant) = (Timestamp::now(), Instant::now());
        let passed = self.0.map(|(date, _)| date).filter(|date| *date <= now);
        self.0 = reads.next_change(now).map(|date| {
            // One millisecond later: evaluating too early would find no change.
            let wait = Duration::try_from(date.duration_since(now)).unwrap_or_default();
            let wait = wait.min(MAX_WAIT) + Duration::from_millis(1);
            (date, instant + wait)
        });
        let passed_at = passed.and_then(|date| {
            let elapsed = Duration::try_from(now.duration_since(date)).ok()?;
            instant.checked_sub(elapsed)
        });
        passed_at.map_or(received, |at| at.max(received))
    }

    /// The next time, if there is one.
    pub fn deadline(&self) -> Option<Instant> {
        self.0.map(|(_, at)| at)
    }
}

/// Longer than a stream's default lifetime, and safe from overflow in clock arithmetic.
const MAX_WAIT: Duration = Duration::from_hours(24);
