//! Pending usage between the threads that record it and the task that sends it.

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

/// A copy of the pending usage, for a store.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Backlog {
    /// Identifies the copied state.
    pub revision: Revision,
    /// The bytes to store; empty if nothing is pending.
    pub bytes: Vec<u8>,
}

/// All usage that upstream does not have yet.
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
            // Less than a token's quota: old pending usage is merged before new usage is.
            outbox: Mutex::new(Outbox::new(max_counters - max_counters / 4, rand::random())),
            outdated: Notify::new(),
        }
    }

    /// Moves usage from the aggregator to the delivery queue.
    ///
    /// The queue is locked from before the drain until after, so that readers of both under that lock
    /// see each counter once.
    pub(super) fn collect(&self, now: Instant) {
        let mut delivery_queue = self.lock_queue();
        delivery_queue.absorb(self.ledger.drain(now), now);
    }

    pub(super) fn next(&self, now: Instant) -> Option<Dispatch> {
        self.lock_queue().next(now)
    }

    pub(super) fn settle(&self, id: BatchId, outcome: Outcome, now: Instant, draw: f64) {
        let mut delivery_queue = self.lock_queue();
        delivery_queue.settle(id, outcome, now, draw);
        if delivery_queue.is_store_outdated() {
            self.outdated.notify_one();
        }
    }

    /// Updates the gauges of pending usage.
    pub(super) fn measure(&self, now: Instant) {
        let delivery_queue = self.lock_queue();
        meter::pending(self.ledger.len() + delivery_queue.len(), delivery_queue.oldest(now));
    }

    pub(super) fn wake(&self) -> Option<Instant> {
        self.lock_queue().wake()
    }

    pub(super) fn hurry(&self) {
        self.lock_queue().hurry();
    }

    pub(super) fn recall(&self) {
        self.lock_queue().recall();
    }

    pub(super) fn discard(&self) {
        self.lock_queue().discard();
    }

    pub(super) fn totals(&self) -> Totals {
        self.lock_queue().totals().clone()
    }

    /// The usage in the delivery queue, unless its revision is `stored`.
    ///
    /// It is copied under the lock (names are shared) and serialized outside.
    pub(super) fn backlog(&self, stored: Option<Revision>) -> Option<Backlog> {
        let (revision, queues) = {
            let mut delivery_queue = self.lock_queue();
            let revision = delivery_queue.revision();
            if stored == Some(revision) {
                return None;
            }
            (revision, delivery_queue.copy())
        };
        Some(Backlog { revision, bytes: spool::save(&queues).unwrap_or_default() })
    }

    /// Completes when a store contains usage of an environment that has nothing pending any longer.
    pub(super) async fn wait_until_store_outdated(&self) {
        self.outdated.notified().await;
    }

    pub(super) fn save(&self) -> Option<Vec<u8>> {
        let queues = self.lock_queue().copy();
        spool::save(&queues)
    }

    pub(super) fn restore(&self, bytes: &[u8], now: Instant) -> Result<(), spool::Error> {
        let registrations = self.ledger.restored_registrations();
        let Restored { lanes: queues, unreadable } = spool::restore(bytes, &registrations)?;
        meter::items_dropped("spool", unreadable);
        if unreadable > 0 {
            tracing::warn!(unreadable, "Some items of stored usage cannot be read and are lost");
        }
        let mut delivery_queue = self.lock_queue();
        for (environment, queue) in queues {
            delivery_queue.restore(environment, queue, now);
        }
        Ok(())
    }

    /// Pending usage in Unleash Edge's format of `/internal-backstage/metricsbatch`.
    pub(super) fn pending(&self, now: Instant) -> Value {
        let delivery_queue = self.lock_queue();
        let due = self.ledger.applications(now);
        let mut applications: Vec<_> = due.iter().map(|it| json!(it.application())).collect();
        let mut metrics = Vec::new();
        for ((environment, key), counter) in self.ledger.copy_counters() {
            metrics.push(shown(&metric(environment.as_str(), &key, &counter)));
        }
        for (environment, queue) in delivery_queue.queues() {
            let batches = queue.hand.iter().chain(&queue.left);
            let items = batches.flat_map(|(_, batch)| batch.items());
            for item in items.chain(&queue.carry).chain(&queue.late) {
                let value = serde_json::from_str(&item.json).unwrap_or_default();
                match item.part {
                    Part::Application | Part::Instance => applications.push(value),
                    Part::Metric => metrics.push(shown(&value)),
                    Part::Impact => {}
                }
            }
            applications.extend(queue.applications.values().map(|it| json!(it.application())));
            let counters = queue.counters.iter();
            metrics.extend(
                counters.map(|(key, counter)| shown(&metric(environment.as_str(), key, counter))),
            );
        }
        json!({ "applications": applications, "metrics": metrics })
    }

    fn lock_queue(&self) -> MutexGuard<'_, Outbox> {
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
