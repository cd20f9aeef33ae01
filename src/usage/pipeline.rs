//! From the ledger to the outbox: what the recording threads and the sending task share.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use serde_json::{Value, json};
use tokio::sync::Notify;

use super::{
    batch::Part,
    counter::{Counter, CounterKey},
    lane::BatchId,
    ledger::Ledger,
    meter,
    outbox::{Dispatch, Outbox, Outcome, Revision, Totals},
    spool::{self, Restored},
};

/// What waits for upstream at a time, for a store.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Backlog {
    /// Which state of it this is.
    pub revision: Revision,
    /// What to store; empty when nothing waits.
    pub bytes: Vec<u8>,
}

/// Everything counted that upstream does not have yet.
#[derive(Debug)]
pub(super) struct Pipeline {
    pub(super) ledger: Ledger,
    outbox: Mutex<Outbox>,
    outdated: Notify,
}

impl Pipeline {
    pub(super) fn new(max_counters: usize) -> Self {
        Self {
            ledger: Ledger::new(max_counters),
            // Less than a token's share: what waits for long is merged before what is reported now.
            outbox: Mutex::new(Outbox::new(max_counters - max_counters / 4, rand::random())),
            outdated: Notify::new(),
        }
    }

    /// Moves a generation from the ledger to the outbox.
    ///
    /// The outbox stays locked from before the drain until after, so that whoever looks into both
    /// under that lock sees each counter once.
    pub(super) fn collect(&self, now: Instant) {
        let mut outbox = self.outbox();
        outbox.absorb(self.ledger.drain(now), now);
    }

    pub(super) fn next(&self, now: Instant) -> Option<Dispatch> {
        self.outbox().next(now)
    }

    pub(super) fn settle(&self, id: BatchId, outcome: Outcome, now: Instant, draw: f64) {
        let mut outbox = self.outbox();
        outbox.settle(id, outcome, now, draw);
        if outbox.is_store_outdated() {
            self.outdated.notify_one();
        }
    }

    /// Tells the metrics what waits at this moment.
    pub(super) fn measure(&self, now: Instant) {
        let outbox = self.outbox();
        meter::pending(self.ledger.len() + outbox.len(), outbox.oldest(now));
    }

    pub(super) fn wake(&self) -> Option<Instant> {
        self.outbox().wake()
    }

    pub(super) fn hurry(&self) {
        self.outbox().hurry();
    }

    pub(super) fn recall(&self) {
        self.outbox().recall();
    }

    pub(super) fn discard(&self) {
        self.outbox().discard();
    }

    pub(super) fn totals(&self) -> Totals {
        self.outbox().totals().clone()
    }

    /// What waits in the outbox, unless it is what it was at the revision that is `stored`.
    ///
    /// It is copied under the lock, names being shared, and serialised outside.
    pub(super) fn backlog(&self, stored: Option<Revision>) -> Option<Backlog> {
        let (revision, lanes) = {
            let mut outbox = self.outbox();
            let revision = outbox.revision();
            if stored == Some(revision) {
                return None;
            }
            (revision, outbox.copy())
        };
        Some(Backlog { revision, bytes: spool::save(&lanes).unwrap_or_default() })
    }

    /// Completes when a store holds something of an environment for which nothing waits any more.
    pub(super) async fn outdated(&self) {
        self.outdated.notified().await;
    }

    pub(super) fn save(&self) -> Option<Vec<u8>> {
        let lanes = self.outbox().copy();
        spool::save(&lanes)
    }

    pub(super) fn restore(&self, bytes: &[u8], now: Instant) -> Result<(), spool::Error> {
        let registrations = self.ledger.restored_registrations();
        let Restored { lanes, unreadable } = spool::restore(bytes, &registrations)?;
        meter::items_dropped("spool", unreadable);
        if unreadable > 0 {
            tracing::warn!(unreadable, "Items of the spool of usage cannot be read and are lost");
        }
        let mut outbox = self.outbox();
        for (environment, lane) in lanes {
            outbox.restore(environment, lane, now);
        }
        Ok(())
    }

    /// What waits, as Unleash Edge's `/internal-backstage/metricsbatch` shows it.
    pub(super) fn pending(&self, now: Instant) -> Value {
        let outbox = self.outbox();
        let waiting = self.ledger.applications(now);
        let mut applications: Vec<_> = waiting.iter().map(|it| json!(it.application())).collect();
        let mut metrics = Vec::new();
        for ((environment, key), counter) in self.ledger.counters() {
            metrics.push(shown(&metric(environment.as_str(), &key, &counter)));
        }
        for (environment, lane) in outbox.lanes() {
            let batches = lane.hand.iter().chain(&lane.left);
            let items = batches.flat_map(|(_, batch)| batch.items());
            for item in items.chain(&lane.carry).chain(&lane.late) {
                let value = serde_json::from_str(&item.json).unwrap_or_default();
                match item.part {
                    Part::Application | Part::Instance => applications.push(value),
                    Part::Metric => metrics.push(shown(&value)),
                    Part::Impact => {}
                }
            }
            applications.extend(lane.applications.values().map(|it| json!(it.application())));
            let waiting = lane.counters.iter();
            metrics.extend(
                waiting.map(|(key, counter)| shown(&metric(environment.as_str(), key, counter))),
            );
        }
        json!({ "applications": applications, "metrics": metrics })
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn metric(environment: &str, key: &CounterKey, counter: &Counter) -> Value {
    json!(counter.to_wire(environment, key))
}

/// A metric with its key beside it.
fn shown(metric: &Value) -> Value {
    json!({
        "key": {
            "app_name": metric["appName"],
            "feature_name": metric["featureName"],
            "environment": metric["environment"],
            "timestamp": metric["timestamp"],
        },
        "bucket": metric,
    })
}
