//! Pending usage between the threads that record it and the [`UsageSink`], and the loop that sends it.
//!
//! The delivery queue decides what to send and when to retry.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use serde_json::{Value, json};
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval_at, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    aggregator::Aggregator,
    batch::{BatchId, ItemKind, OutgoingBatch, SendOutcome, UsageSink},
    counters::{Counter, CounterKey},
    delivery_queue::{DeliveryQueue, Revision},
    spool::{self, Restored},
    usage_metrics,
};

/// How long to wait after the grace period for responses to batches in flight.
const FINAL_RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for them when shutdown is forced.
const FORCED_RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How to end sending.
#[derive(Clone, Debug)]
pub struct Shutdown {
    /// Cancelled when usage is no longer reported.
    pub requested: CancellationToken,
    /// The longest time to then send the remaining usage.
    pub grace: Duration,
    /// Cancelled to end the grace period early.
    pub forced: CancellationToken,
}

/// The batches in flight.
type InFlight<'a> = FuturesUnordered<BoxFuture<'a, (BatchId, SendOutcome)>>;

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
pub(super) struct PendingUsage {
    pub(super) aggregator: Aggregator,
    queue: Mutex<DeliveryQueue>,
    /// Notified when a store contains usage of an environment that has nothing pending any longer.
    pub(super) stored_usage_delivered: Notify,
}

impl PendingUsage {
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
        let mut delivery_queue = self.queue();
        delivery_queue.enqueue(self.aggregator.drain(now), now);
    }

    /// Sends usage to `sink` after each `interval` until shutdown is requested, then the rest within the
    /// grace period.
    ///
    /// Usage that could not be sent remains here. Dropping the future loses only the results of batches
    /// in flight, which are therefore resent.
    pub(super) async fn run(&self, interval: Duration, ending: &Shutdown, sink: &dyn UsageSink) {
        self.queue().requeue_in_flight();
        let mut ticks = interval_at(tokio::time::Instant::now() + interval, interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut in_flight = InFlight::new();
        loop {
            self.send_ready_batches(&in_flight, sink);
            tokio::select! {
                () = ending.requested.cancelled() => break,
                _ = ticks.tick() => self.drain(monotonic_now()),
                Some((id, outcome)) = in_flight.next() => self.record_sent(id, outcome),
                () = wait_until(self.next_due_at()) => {}
            }
        }
        sink.begin_shutdown();
        self.drain(monotonic_now());
        self.queue().reset_backoff();
        let flush = async {
            loop {
                self.send_ready_batches(&in_flight, sink);
                if in_flight.is_empty() && self.next_retry_at().is_none() {
                    break;
                }
                tokio::select! {
                    Some((id, outcome)) = in_flight.next() => self.record_sent(id, outcome),
                    () = wait_until(self.next_retry_at()) => {}
                }
            }
        };
        let grace = ending.grace;
        let flushed = tokio::select! {
            flushed = timeout(grace, flush) => flushed.map_err(|_| FINAL_RESPONSE_TIMEOUT),
            () = ending.forced.cancelled() => Err(FORCED_RESPONSE_TIMEOUT),
        };
        if let Err(response_timeout) = flushed {
            tracing::warn!(?grace, "Shutdown ended before all usage was sent");
            // Nothing more is sent, but responses to batches in flight are awaited briefly: without its
            // response, a batch that upstream accepted would be sent again by the next run.
            let responses = async {
                while let Some((id, outcome)) = in_flight.next().await {
                    self.record_sent(id, outcome);
                }
            };
            let _ = timeout(response_timeout, responses).await;
        }
    }

    /// Drops usage after each `interval` until `shutdown`, because there is no destination.
    pub(super) async fn discard_at_interval(
        &self,
        interval: Duration,
        shutdown: &CancellationToken,
    ) {
        let mut ticks = interval_at(tokio::time::Instant::now() + interval, interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !shutdown.is_cancelled() {
            tokio::select! {
                () = shutdown.cancelled() => {}
                _ = ticks.tick() => {}
            }
            self.drain(monotonic_now());
            self.queue().discard_all();
        }
    }

    fn send_ready_batches<'a>(&self, in_flight: &InFlight<'a>, sink: &'a dyn UsageSink) {
        while let Some(batch) = self.next_batch(monotonic_now()) {
            let id = batch.id;
            in_flight.push(sink.send(batch).map(move |outcome| (id, outcome)).boxed());
        }
    }

    fn record_sent(&self, id: BatchId, outcome: SendOutcome) {
        self.record_outcome(id, outcome, monotonic_now(), rand::random());
    }

    // These three are functions so that the lock is released before a caller acts on the result.

    pub(super) fn next_batch(&self, now: Instant) -> Option<OutgoingBatch> {
        self.queue().next_batch(now)
    }

    pub(super) fn next_retry_at(&self) -> Option<Instant> {
        self.queue().next_retry_at()
    }

    /// When a batch is to be retried, or asked about, next.
    fn next_due_at(&self) -> Option<Instant> {
        let delivery_queue = self.queue();
        let due = [delivery_queue.next_retry_at(), delivery_queue.next_check_at()];
        due.into_iter().flatten().min()
    }

    pub(super) fn record_outcome(
        &self,
        id: BatchId,
        outcome: SendOutcome,
        now: Instant,
        draw: f64,
    ) {
        let mut delivery_queue = self.queue();
        delivery_queue.record_outcome(id, outcome, now, draw);
        if delivery_queue.has_delivered_stored_usage() {
            self.stored_usage_delivered.notify_one();
        }
    }

    /// Updates the gauges of pending usage.
    pub(super) fn update_gauges(&self, now: Instant) {
        let delivery_queue = self.queue();
        usage_metrics::set_pending(
            self.aggregator.counter_weight() + delivery_queue.counter_weight(),
            delivery_queue.parked_count(),
            delivery_queue.oldest_age(now),
        );
    }

    /// The usage in the delivery queue, unless its revision is `stored`.
    ///
    /// It is copied under the lock (names are shared) and serialized outside.
    pub(super) fn backlog(&self, stored: Option<Revision>) -> Option<Backlog> {
        let (revision, queues) = {
            let mut delivery_queue = self.queue();
            let revision = delivery_queue.revision();
            if stored == Some(revision) {
                return None;
            }
            (revision, delivery_queue.copy_for_store())
        };
        Some(Backlog { revision, bytes: spool::encode(&queues).unwrap_or_default() })
    }

    pub(super) fn serialize(&self) -> Option<Vec<u8>> {
        let queues = self.queue().copy_for_store();
        spool::encode(&queues)
    }

    pub(super) fn restore(&self, bytes: &[u8], now: Instant) -> Result<(), spool::RestoreError> {
        let registrations = self.aggregator.unowned_registrations_quota();
        let Restored { queues, unreadable } = spool::decode(bytes, &registrations)?;
        usage_metrics::count_dropped_items("spool", unreadable);
        if unreadable > 0 {
            tracing::warn!(unreadable, "Some items of stored usage cannot be read and are lost");
        }
        let mut delivery_queue = self.queue();
        for (environment, queue) in queues {
            delivery_queue.restore(environment, queue, now);
        }
        Ok(())
    }

    /// Pending usage in Unleash Edge's format of `/internal-backstage/metricsbatch`.
    pub(super) fn pending(&self, now: Instant) -> Value {
        let delivery_queue = self.queue();
        let due = self.aggregator.due_registrations(now);
        let mut applications: Vec<_> = due.iter().map(|it| json!(it.application())).collect();
        let mut metrics = Vec::new();
        for ((environment, key), counter) in self.aggregator.copy_counters() {
            metrics.push(with_key(&metric_json(environment.as_str(), &key, &counter)));
        }
        for (environment, queue) in delivery_queue.queues() {
            for item in queue.items() {
                let value = serde_json::from_str(item.json.get()).unwrap_or_default();
                match item.kind {
                    ItemKind::Application | ItemKind::ApplicationWithoutStrategies => {
                        applications.push(value);
                    }
                    ItemKind::Metric => metrics.push(with_key(&value)),
                    ItemKind::ImpactMetric => {}
                }
            }
            applications.extend(queue.applications.iter().map(|it| json!(it.application())));
            let counters = queue.counters.iter();
            metrics.extend(
                counters.map(|(key, counter)| {
                    with_key(&metric_json(environment.as_str(), key, counter))
                }),
            );
        }
        json!({ "applications": applications, "metrics": metrics })
    }

    pub(super) fn queue(&self) -> MutexGuard<'_, DeliveryQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until a time; forever without one.
async fn wait_until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time.into()).await,
        None => std::future::pending().await,
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

/// The runtime's clock, which tests can pause, so that waiting times agree with the loop's.
pub(super) fn monotonic_now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests;
