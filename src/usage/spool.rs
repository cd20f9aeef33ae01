//! The format of stored pending usage.
//!
//! Version 1 is JSON. For each environment it contains the batch in flight, which must be resent
//! unchanged, and the other pending usage in upstream's own formats. An item that cannot be read is
//! skipped and counted without affecting others. A batch in flight keeps its ID, so that the destination
//! can recognize it. This module does no IO.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use super::{
    batch::{Batch, BatchId, to_raw_json},
    counters::{Counter, CounterKey, Hour, NameStatus},
    delivery_queue::{EnvironmentQueue, IssuedBatch},
    impact_metrics::AppMetric,
    instances::Registration,
    quota_pool::{Quota, Reservation},
};
use crate::{
    protocol::usage::{BulkMetric, ClientApplication, ImpactMetric, Samples},
    token::Environment,
};

const VERSION: u32 = 1;

/// Why stored usage cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It is not JSON of the expected shape.
    #[error("the stored usage is damaged")]
    Damaged(#[source] serde_json::Error),
    /// It was written in an unknown version of the format.
    #[error("the stored usage has the unknown format version {0}")]
    Version(u32),
}

#[derive(Deserialize)]
struct VersionHeader {
    version: u32,
}

#[derive(Deserialize, Serialize)]
struct Spool {
    version: u32,
    environments: BTreeMap<String, EnvironmentRecord>,
}

/// The pending usage of one environment. Items are stored as separate JSON values.
#[derive(Deserialize, Serialize)]
struct EnvironmentRecord {
    /// The items of the batch in flight, each an [`Item`](super::batch::Item).
    batch: Vec<Box<RawValue>>,
    /// The ID of that batch; earlier versions wrote none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    batch_id: Option<String>,
    /// Parked batches, and batches of earlier runs that have not been resent yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    left: Vec<BatchRecord>,
    /// Serialized items that were not sent, each an [`Item`](super::batch::Item).
    pieces: Vec<Box<RawValue>>,
    /// Each a [`ClientApplication`].
    applications: Vec<Box<RawValue>>,
    /// Each a [`BulkMetric`].
    metrics: Vec<Box<RawValue>>,
    /// Each an [`ImpactRecord`].
    impact: Vec<Box<RawValue>>,
}

/// A batch that was in flight in an earlier run.
#[derive(Deserialize, Serialize)]
struct BatchRecord {
    id: String,
    /// Each an [`Item`](super::batch::Item).
    batch: Vec<Box<RawValue>>,
}

#[derive(Deserialize, Serialize)]
struct ImpactRecord {
    app: Arc<str>,
    metric: Box<RawValue>,
    /// When each sample of a gauge was reported.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    times: Vec<Option<Timestamp>>,
}

/// Restored usage.
#[derive(Debug)]
pub(super) struct Restored {
    pub(super) queues: Vec<(Environment, EnvironmentQueue)>,
    /// Number of items that could not be read.
    pub(super) unreadable: usize,
}

/// Encodes the queues; `None` if they are empty.
pub(super) fn encode(queues: &[(Environment, EnvironmentQueue)]) -> Option<Vec<u8>> {
    let environments: BTreeMap<_, _> = queues
        .iter()
        .filter(|(_, queue)| !queue.is_empty())
        .map(|(name, queue)| (name.as_str().to_owned(), encode_environment(name, queue)))
        .collect();
    if environments.is_empty() {
        return None;
    }
    let spool = Spool { version: VERSION, environments };
    Some(serde_json::to_vec(&spool).expect("text keys and finite numbers are JSON"))
}

/// Decodes bytes from [`encode`]. Registrations are charged to `registrations`.
pub(super) fn decode(bytes: &[u8], registrations: &Quota) -> Result<Restored, RestoreError> {
    let VersionHeader { version } = serde_json::from_slice(bytes).map_err(RestoreError::Damaged)?;
    if version != VERSION {
        return Err(RestoreError::Version(version));
    }
    let spool: Spool = serde_json::from_slice(bytes).map_err(RestoreError::Damaged)?;
    let mut unreadable = 0;
    let environments = spool.environments.into_iter();
    let queues = environments
        .map(|(name, record)| {
            (Environment::new(&name), decode_environment(&record, registrations, &mut unreadable))
        })
        .collect();
    Ok(Restored { queues, unreadable })
}

fn encode_environment(environment: &Environment, queue: &EnvironmentQueue) -> EnvironmentRecord {
    let metric = |(key, counter): (&CounterKey, &Counter)| {
        to_raw_json(&counter.to_bulk_metric(environment.as_str(), key))
    };
    let mut series = queue.impact.clone();
    let mut impact = Vec::new();
    while let Some(AppMetric { app, metric, mut reported_at }) = series.pop_for_app() {
        if !matches!(metric.samples, Samples::Gauge(_)) {
            reported_at.clear();
        }
        impact.push(to_raw_json(&ImpactRecord {
            app,
            metric: to_raw_json(&metric),
            times: reported_at,
        }));
    }
    let pieces = |batch: &Batch| batch.items().iter().map(to_raw_json).collect();
    let left = |it: &IssuedBatch| BatchRecord { id: it.id.to_string(), batch: pieces(&it.batch) };
    EnvironmentRecord {
        batch: queue.in_flight.as_ref().map(|it| pieces(&it.batch)).unwrap_or_default(),
        batch_id: queue.in_flight.as_ref().map(|it| it.id.to_string()),
        left: queue.parked.iter().chain(&queue.restored_batches).map(left).collect(),
        pieces: queue.serialized.iter().chain(&queue.deferred).map(to_raw_json).collect(),
        applications: queue.applications.iter().map(|it| to_raw_json(it.application())).collect(),
        metrics: queue.counters.iter().map(metric).collect(),
        impact,
    }
}

/// Decodes an environment, skipping and counting unreadable items.
fn decode_environment(
    record: &EnvironmentRecord,
    registrations: &Quota,
    unreadable: &mut usize,
) -> EnvironmentQueue {
    let mut queue = EnvironmentQueue::default();
    queue.in_flight = decode_batch(record.batch_id.as_deref(), &record.batch, unreadable);
    let left = record.left.iter();
    queue.restored_batches =
        left.filter_map(|it| decode_batch(Some(&it.id), &it.batch, unreadable)).collect();
    queue.serialized = decode_items(&record.pieces, decode_json, unreadable).into();
    for application in decode_items(&record.applications, decode_application, unreadable) {
        let registration = Registration::restored(application, registrations);
        queue.applications.add(Arc::new(registration));
    }
    for metric in decode_items(&record.metrics, decode_metric, unreadable) {
        let hour = Hour::of(metric.timestamp);
        let key = CounterKey { hour, app: metric.app_name, flag: metric.feature_name };
        // Everything stored has been accepted before, so its names count as known.
        let (counter, _) =
            Counter::from_stats(metric.stats, &Arc::new(metric.metadata), |_| NameStatus::Known);
        let _ = queue.counters.add(key, counter);
    }
    for (app, metric, times) in decode_items(&record.impact, decode_impact, unreadable) {
        queue.impact.record(&app, metric, times, |_| Some(Reservation::default()));
    }
    queue
}

/// Decodes a batch; `None` if no item is readable.
fn decode_batch(
    id: Option<&str>,
    items: &[Box<RawValue>],
    unreadable: &mut usize,
) -> Option<IssuedBatch> {
    let items = decode_items(items, decode_json, unreadable);
    if items.is_empty() {
        return None;
    }
    let id = id.and_then(BatchId::parse).unwrap_or_else(BatchId::random);
    Some(IssuedBatch::restored(id, Batch::new(items)))
}

/// Decodes items, skipping and counting unreadable ones.
fn decode_items<T>(
    items: &[Box<RawValue>],
    read: impl Fn(&str) -> Option<T>,
    unreadable: &mut usize,
) -> Vec<T> {
    let read: Vec<_> = items.iter().filter_map(|item| read(item.get())).collect();
    *unreadable += items.len() - read.len();
    read
}

fn decode_json<T: DeserializeOwned>(json: &str) -> Option<T> {
    serde_json::from_str(json).ok()
}

fn decode_application(json: &str) -> Option<ClientApplication> {
    ClientApplication::parse(json.as_bytes()).ok()
}

fn decode_metric(json: &str) -> Option<BulkMetric> {
    BulkMetric::from_value(decode_json(json)?).ok()
}

fn decode_impact(json: &str) -> Option<(Arc<str>, ImpactMetric, Vec<Option<Timestamp>>)> {
    let ImpactRecord { app, metric, times } = decode_json(json)?;
    Some((app, ImpactMetric::from_value(decode_json(metric.get())?).ok()?, times))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::usage::{
        batch::{Item, ItemKind},
        quota_pool::QuotaPool,
    };

    fn decode(bytes: &[u8]) -> Result<Restored, RestoreError> {
        super::decode(bytes, &QuotaPool::new(0).unowned_quota())
    }

    /// Written by version 1; must never change.
    const VERSION_1: &str = r#"{"version":1,"environments":{"dev":{
        "batch":[{"part":"metric","count":3,"json":{"featureName":"f","appName":"a","environment":"dev","timestamp":"2026-01-02T03:00:00Z","yes":2,"no":1,"variants":{}}}],
        "pieces":[{"part":"impact","count":0,"json":{"name":"n"}}],
        "applications":[{"appName":"a","instanceId":"i","connectVia":[],"interval":15,"started":"2026-01-02T03:04:05Z","strategies":[]}],
        "metrics":[{"featureName":"f","appName":"a","environment":"dev","timestamp":"2026-01-02T04:00:00Z","yes":5,"no":0,"variants":{"v":5},"sdkVersion":"x:1"}],
        "impact":[{"app":"a","metric":{"name":"n","help":"h","type":"counter","samples":[{"value":1.0,"labels":{"origin":"edge"}}]}}]}}}"#;

    #[test]
    fn version_1_round_trips() {
        let Restored { queues, unreadable } = decode(VERSION_1.as_bytes()).unwrap();
        assert_eq!(unreadable, 0);
        assert_eq!(without_ids(&encode(&queues).unwrap()), from_version_1());
    }

    /// The saved JSON without batch IDs, which version 1 initially lacked.
    fn without_ids(saved: &[u8]) -> Value {
        let mut saved: Value = serde_json::from_slice(saved).unwrap();
        let waiting = saved["environments"]["dev"].as_object_mut().unwrap();
        assert_eq!(waiting.remove("batch_id").unwrap().as_str().unwrap().len(), 32);
        saved
    }

    fn from_version_1() -> Value {
        serde_json::from_str(VERSION_1).unwrap()
    }

    #[test]
    fn batches_keep_their_ids() {
        let dev = || Environment::new("dev");
        let Restored { queues, .. } = decode(VERSION_1.as_bytes()).unwrap();
        let again = decode(VERSION_1.as_bytes()).unwrap().queues;
        // Without IDs, two identical batches may count different evaluations.
        let id = |queue: &EnvironmentQueue| queue.in_flight.as_ref().unwrap().id;
        assert_ne!(id(&queues[0].1), id(&again[0].1));

        let mut queue = EnvironmentQueue::default();
        let _ = queue.restore(queues[0].1.clone());
        let item = Item::new(ItemKind::Metric, to_raw_json(&Value::Null), 1);
        let other = IssuedBatch::new(BatchId::new(7, 1), Batch::new(vec![item]));
        queue.in_flight = Some(other.clone());
        let saved = encode(&[(dev(), queue)]).unwrap();
        let restored = &decode(&saved).unwrap().queues[0].1;
        let parts = |it: &IssuedBatch| (it.id, it.batch.body(), it.batch.evaluations());
        assert_eq!(restored.in_flight.as_ref().map(parts), Some(parts(&other)));
        let earlier = queues[0].1.in_flight.as_ref().map(parts);
        assert_eq!(
            restored.restored_batches.iter().map(parts).collect::<Vec<_>>(),
            [earlier.unwrap()]
        );
    }

    #[test]
    fn unreadable_item_does_not_affect_others() {
        let mut spool: Value = serde_json::from_str(VERSION_1).unwrap();
        let lists = spool["environments"]["dev"].as_object_mut().unwrap();
        for list in lists.values_mut() {
            list.as_array_mut().unwrap().insert(0, serde_json::json!({ "metric": "?" }));
        }
        let Restored { queues, unreadable } = decode(spool.to_string().as_bytes()).unwrap();
        assert_eq!(unreadable, 5);
        assert_eq!(without_ids(&encode(&queues).unwrap()), from_version_1());
    }

    #[test]
    fn damaged_or_newer_record_is_rejected_with_the_reason() {
        let check = |bytes: &str, message: &str| {
            assert_eq!(decode(bytes.as_bytes()).unwrap_err().to_string(), message);
        };
        check("{", "the stored usage is damaged");
        check(r#"{"version":1}"#, "the stored usage is damaged");
        check(r#"{"version":9,"new":true}"#, "the stored usage has the unknown format version 9");
    }

    #[test]
    fn empty_queue_is_not_saved() {
        assert_eq!(encode(&[(Environment::new("dev"), EnvironmentQueue::default())]), None);
    }
}
