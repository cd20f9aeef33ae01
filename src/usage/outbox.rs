//! What waits to be sent, and when to try: a state machine without clock, randomness or IO.
//!
//! Each environment has its lane, so that one that fails never delays another. A lane merges
//! generation after generation and serialises only the one batch *in hand*: an outage of hours
//! costs no more memory than its distinct counters, which are bounded. When they are too many, those
//! of the environments that have most are merged ([`Counters::shrink_to`]): no count is dropped, and
//! what waits for other environments stays as it is.
//!
//! [`Counters::shrink_to`]: super::counters::Counters::shrink_to
//!
//! A batch in hand is sent again *unchanged*, under the same name, until upstream took or refused it.
//! Where it is unknown whether upstream took it (the connection broke after it was sent) it may so be
//! counted twice, unless upstream is a registry, which knows it by its name; everywhere else exactly
//! once.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tracing::warn;

use super::{
    counter::Lost,
    lane::{BatchId, Lane},
    ledger::Generation,
    meter::{self, Reason},
};
use crate::token::Environment;

/// A batch to be sent now.
#[derive(Clone, Debug)]
pub(super) struct Dispatch {
    pub(super) id: BatchId,
    pub(super) environment: Environment,
    pub(super) body: Bytes,
    /// How many impact metrics are in it, or parts of such.
    pub(super) impact: usize,
}

/// What came of sending a batch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Outcome {
    /// Upstream took it.
    Sent,
    /// Upstream refused it for good, having perhaps stored some of it: sending it again, or parts
    /// of it, could count twice.
    Rejected,
    /// Upstream, or a proxy before it, found the body too large.
    TooLarge,
    /// Upstream refused the token, or there is none for the environment yet.
    Unauthorized,
    /// Upstream was away or busy; it may have asked for a pause.
    Later(Option<Duration>),
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Rejected => "rejected",
            Self::TooLarge => "too_large",
            Self::Unauthorized => "unauthorized",
            Self::Later(_) => "later",
        }
    }
}

/// Names a state of what waits for upstream: as long as it is the same, so is what waits.
///
/// That nothing waits is always the same state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Revision(u64);

impl Revision {
    const EMPTY: Self = Self(0);
}

/// How many evaluations have been settled.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Totals {
    /// Upstream took them.
    pub sent: u64,
    /// They were let go.
    pub dropped: u64,
}

/// Everything that waits to be sent.
#[derive(Debug)]
pub(super) struct Outbox {
    lanes: BTreeMap<Environment, Lane>,
    max_counters: usize,
    /// Tells the batches of this instance from those of others.
    instance: u64,
    /// How many batches there have been.
    batches: u64,
    /// How often what waits has changed.
    changes: u64,
    totals: Totals,
}

impl Outbox {
    /// Nothing waits; `instance` is a number that no other instance has drawn.
    pub(super) fn new(max_counters: usize, instance: u64) -> Self {
        let (lanes, totals) = (BTreeMap::new(), Totals::default());
        Self { lanes, max_counters, instance, batches: 0, changes: 0, totals }
    }

    /// Merges a generation into what waits.
    pub(super) fn absorb(&mut self, generations: BTreeMap<Environment, Generation>, now: Instant) {
        let mut lost = 0;
        self.changes += u64::from(!generations.is_empty());
        for (environment, generation) in generations {
            let lane = self.lanes.entry(environment).or_default();
            lane.since.get_or_insert(now);
            lost += lane.absorb(generation).0;
        }
        self.drop_counts(Reason::Overflow, lost);
        self.shrink();
    }

    /// Puts back what a spool held; a batch among it is sent again as it was. The store is taken to
    /// hold it still.
    pub(super) fn restore(&mut self, environment: Environment, restored: Lane, now: Instant) {
        let lane = self.lanes.entry(environment).or_default();
        lane.stored = true;
        lane.since.get_or_insert(now);
        let Lost(lost) = lane.restore(restored);
        self.changes += 1;
        self.drop_counts(Reason::Overflow, lost);
        self.shrink();
    }

    /// The next batch to send, if there is one whose time has come.
    ///
    /// At most one batch of an environment is out at a time.
    pub(super) fn next(&mut self, now: Instant) -> Option<Dispatch> {
        for (environment, lane) in &mut self.lanes {
            if lane.flying || !lane.backoff.is_over(now) {
                continue;
            }
            if lane.hand.is_none() {
                lane.hand = lane.left.pop_front();
            }
            if lane.hand.is_none() {
                self.changes += u64::from(!lane.is_empty());
                let (batch, oversized) = lane.cut(environment);
                meter::dropped(Reason::Size, oversized);
                self.totals.dropped = self.totals.dropped.saturating_add(oversized);
                lane.hand = batch.map(|batch| (BatchId::new(self.instance, self.batches), batch));
                self.batches += 1;
            }
            match &lane.hand {
                Some((id, batch)) => {
                    lane.flying = true;
                    let environment = environment.clone();
                    let (body, impact) = (batch.body(), batch.impact());
                    return Some(Dispatch { id: *id, environment, body, impact });
                }
                None => lane.since = None,
            }
        }
        None
    }

    /// Notes what came of a batch; `draw` is uniform in `0..1` and spreads the next attempt.
    pub(super) fn settle(&mut self, id: BatchId, outcome: Outcome, now: Instant, draw: f64) {
        let is_it = |(_, lane): &(&Environment, &mut Lane)| {
            lane.hand.as_ref().is_some_and(|(hand, _)| *hand == id)
        };
        let Some((environment, lane)) = self.lanes.iter_mut().find(is_it) else { return };
        meter::batch(outcome.as_str());
        lane.flying = false;
        self.changes += match outcome {
            Outcome::Unauthorized | Outcome::Later(_) => 0,
            Outcome::Sent | Outcome::Rejected | Outcome::TooLarge => 1,
        };
        match outcome {
            Outcome::Unauthorized => lane.backoff.fail(now, None, draw),
            Outcome::Later(pause) => lane.backoff.fail(now, pause, draw),
            Outcome::Sent => {
                let count = lane.complete();
                meter::sent(count);
                self.totals.sent = self.totals.sent.saturating_add(count);
            }
            Outcome::Rejected if lane.list_no_strategies() => {}
            Outcome::Rejected => {
                let count = lane.put_down();
                self.drop_counts(Reason::Rejected, count);
            }
            Outcome::TooLarge => {
                let next = BatchId::new(self.instance, self.batches);
                self.batches += 1;
                let dropped = lane.split(next, now, draw);
                if let Some(batch) = dropped {
                    let (bytes, count) = (batch.body().len(), batch.count());
                    warn!(
                        bytes,
                        count,
                        "Usage for environment {environment} is dropped: upstream has refused it \
                         as too large again, and has taken other batches since"
                    );
                    meter::items_dropped("oversized", 1);
                    self.drop_counts(Reason::Size, count);
                }
            }
        }
    }

    /// When the next batch's time comes, if there is one that waits for it.
    pub(super) fn wake(&self) -> Option<Instant> {
        let waiting = self.lanes.values().filter(|lane| !lane.flying && !lane.is_empty());
        waiting.filter_map(|lane| lane.backoff.until()).min()
    }

    /// Forgets all pauses, for the last attempt before the end.
    pub(super) fn hurry(&mut self) {
        self.lanes.values_mut().for_each(|lane| lane.backoff.succeed());
    }

    /// Forgets that batches are being sent: nobody will say what came of them.
    pub(super) fn recall(&mut self) {
        self.lanes.values_mut().for_each(|lane| lane.flying = false);
    }

    /// Lets everything go: there is no upstream.
    pub(super) fn discard(&mut self) {
        let lanes = std::mem::take(&mut self.lanes);
        let count = lanes.values().fold(0_u64, |sum, lane| sum.saturating_add(lane.total()));
        self.drop_counts(Reason::NoUpstream, count);
    }

    /// How many counters wait, variants counting as such.
    pub(super) fn len(&self) -> usize {
        self.lanes.values().map(|lane| lane.counters.weight()).sum()
    }

    fn is_empty(&self) -> bool {
        self.lanes.values().all(Lane::is_empty)
    }

    /// For how long the oldest thing has been waiting.
    pub(super) fn oldest(&self, now: Instant) -> Duration {
        let since =
            self.lanes.values().filter(|lane| !lane.is_empty()).filter_map(|lane| lane.since);
        since.min().map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    pub(super) fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Which state of what waits this is.
    pub(super) fn revision(&self) -> Revision {
        if self.is_empty() { Revision::EMPTY } else { Revision(self.changes) }
    }

    /// A copy of what waits, for a store: it is taken to hold this from here on.
    pub(super) fn copy(&mut self) -> Vec<(Environment, Lane)> {
        self.lanes.values_mut().for_each(|lane| lane.stored = !lane.is_empty());
        self.lanes().map(|(environment, lane)| (environment.clone(), lane.clone())).collect()
    }

    /// Whether a store holds something of an environment for which nothing waits any more.
    pub(super) fn is_store_outdated(&self) -> bool {
        self.lanes.values().any(|lane| lane.stored && lane.is_empty())
    }

    pub(super) fn lanes(&self) -> impl Iterator<Item = (&Environment, &Lane)> {
        self.lanes.iter()
    }

    fn drop_counts(&mut self, reason: Reason, count: u64) {
        meter::dropped(reason, count);
        self.totals.dropped = self.totals.dropped.saturating_add(count);
    }

    /// Brings the counters down to their limit, in the environments that have more than a fair share
    /// of it.
    fn shrink(&mut self) {
        let share =
            fair_share(self.max_counters, self.lanes.values().map(|lane| lane.counters.weight()));
        let shrink = |lane: &mut Lane| lane.counters.shrink_to(share).0;
        let lost = self.lanes.values_mut().map(shrink).fold(0, u64::saturating_add);
        self.drop_counts(Reason::Overflow, lost);
    }
}

/// How much each may have of `total` so that together they have no more, and whoever wants less than
/// others keeps all of it (max-min fairness); `total` where all have room.
fn fair_share(total: usize, wanted: impl Iterator<Item = usize>) -> usize {
    let mut wanted: Vec<_> = wanted.collect();
    wanted.sort_unstable();
    let mut rest = total;
    for (nth, amount) in wanted.iter().enumerate() {
        let share = rest / (wanted.len() - nth);
        if *amount > share {
            return share;
        }
        rest -= amount;
    }
    total
}

#[cfg(test)]
mod tests;
