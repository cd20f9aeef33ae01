//! Pending usage between the threads that record it and the task that sends it.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use serde_json::{Value, json};
use tokio::sync::Notify;

use super::{
    aggregator::Aggregator,
    batch::{BatchId, ItemKind, OutgoingBatch, SendOutcome},
    counter::{Counter, CounterKey},
    delivery_queue::{DeliveryQueue, DeliveryTotals, Revision},
    spool::{self, Restored},
    usage_metrics,
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
    pub(super) aggregator: Aggregator,
    queue: Mutex<DeliveryQueue>,
    stored_usage_delivered: Notify,
}

impl Pipeline {
    pub(super) fn new(max_counters: usize) -> Self {
        Self {
            aggregator: Aggregator::new(max_counters),
            // Less than a token's quota: old pending usage is merged before new usage is.
            queue: Mutex::new(DeliveryQueue::new(max_counters - max_counters / 4, rand::random())),
            stored_usage_delivered: Notify::new(),
        }
    }

    /// Moves usage from the aggregator to the delivery queue.
    ///
    /// The queue is locked from before the drain until after, so that readers of both under that lock
    /// see each counter once.
    pub(super) fn drain(&self, now: Instant) {
        let mut delivery_queue = self.lock_queue();
        delivery_queue.enqueue(self.aggregator.drain(now), now);
    }

    pub(super) fn next_batch(&self, now: Instant) -> Option<OutgoingBatch> {
        self.lock_queue().next_batch(now)
    }

    pub(super) fn record_outcome(
        &self,
        id: BatchId,
        outcome: SendOutcome,
        now: Instant,
        draw: f64,
    ) {
        let mut delivery_queue = self.lock_queue();
        delivery_queue.record_outcome(id, outcome, now, draw);
        if delivery_queue.has_delivered_stored_usage() {
            self.stored_usage_delivered.notify_one();
        }
    }

    /// Updates the gauges of pending usage.
    pub(super) fn update_gauges(&self, now: Instant) {
        let delivery_queue = self.lock_queue();
        usage_metrics::set_pending(
            self.aggregator.counter_weight() + delivery_queue.counter_weight(),
            delivery_queue.oldest_age(now),
        );
    }

    pub(super) fn next_retry_at(&self) -> Option<Instant> {
        self.lock_queue().next_retry_at()
    }

    pub(super) fn reset_backoff(&self) {
        self.lock_queue().reset_backoff();
    }

    pub(super) fn requeue_in_flight(&self) {
        self.lock_queue().requeue_in_flight();
    }

    pub(super) fn discard_all(&self) {
        self.lock_queue().discard_all();
    }

    pub(super) fn totals(&self) -> DeliveryTotals {
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
            (revision, delivery_queue.copy_for_store())
        };
        Some(Backlog { revision, bytes: spool::encode(&queues).unwrap_or_default() })
    }

    /// Completes when a store contains usage of an environment that has nothing pending any longer.
    pub(super) async fn wait_until_stored_usage_delivered(&self) {
        self.stored_usage_delivered.notified().await;
    }

    pub(super) fn serialize(&self) -> Option<Vec<u8>> {
        let queues = self.lock_queue().copy_for_store();
        spool::encode(&queues)
    }

    pub(super) fn restore(&self, bytes: &[u8], now: Instant) -> Result<(), spool::RestoreError> {
        let registrations = self.aggregator.unowned_registrations_quota();
        let Restored { queues, unreadable } = spool::decode(bytes, &registrations)?;
        usage_metrics::count_dropped_items("spool", unreadable);
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
        let due = self.aggregator.due_registrations(now);
        let mut applications: Vec<_> = due.iter().map(|it| json!(it.application())).collect();
        let mut metrics = Vec::new();
        for ((environment, key), counter) in self.aggregator.copy_counters() {
            metrics.push(with_key(&metric_json(environment.as_str(), &key, &counter)));
        }
        for (environment, queue) in delivery_queue.queues() {
            let batches = queue.in_flight.iter().chain(&queue.restored_batches);
            let items = batches.flat_map(|(_, batch)| batch.items());
            for item in items.chain(&queue.serialized).chain(&queue.deferred) {
                let value = serde_json::from_str(&item.json).unwrap_or_default();
                match item.kind {
                    ItemKind::Application | ItemKind::ApplicationWithoutStrategies => {
                        applications.push(value);
                    }
                    ItemKind::Metric => metrics.push(with_key(&value)),
                    ItemKind::ImpactMetric => {}
                }
            }
            applications.extend(queue.applications.values().map(|it| json!(it.application())));
            let counters = queue.counters.iter();
            metrics.extend(
                counters.map(|(key, counter)| {
                    with_key(&metric_json(environment.as_str(), key, counter))
                }),
            );
        }
        json!({ "applications": applications, "metrics": metrics })
    }

    fn lock_queue(&self) -> MutexGuard<'_, DeliveryQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn metric_json(environment: &str, key: &CounterKey, counter: &Counter) -> Value {
    json!(counter.to_bulk_metric(environment, key))
}

/// A metric with its key beside it.
fn with_key(metric: &Value) -> Value {
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
