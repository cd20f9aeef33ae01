//! The format of stored pending usage.
//!
//! Version 1 is JSON. For each environment it contains the batch in flight, which must be resent
//! unchanged, and the other pending usage in upstream's own formats. An item that cannot be read is
//! skipped and counted without affecting others. A batch in flight keeps its ID, so that a registry can
//! recognize it. This module does no IO.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::{
    applications::Registration,
    batch::{Batch, Item, Part},
    counter::{Counter, CounterKey, Hour, Name},
    impact::OfApp,
    lane::{Age, BatchId, Lane},
    pool::{Account, Charge},
};
use crate::{
    token::Environment,
    wire::usage::{ClientApplication, BulkMetric, ImpactMetric, Samples},
};

const VERSION: u32 = 1;

/// Why stored usage cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not JSON of the expected shape.
    #[error("the stored usage is damaged")]
    Damaged(#[source] serde_json::Error),
    /// It was written in an unknown version of the format.
    #[error("the stored usage has the unknown format version {0}")]
    Version(u32),
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

#[derive(Deserialize, Serialize)]
struct Spool {
    version: u32,
    environments: BTreeMap<String, Waiting>,
}

/// The pending usage of one environment. Items are stored as separate JSON values.
#[derive(Deserialize, Serialize)]
struct Waiting {
    /// The items of the batch in flight, each an [`ItemRecord`].
    batch: Vec<Box<RawValue>>,
    /// The ID of that batch; earlier versions wrote none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    batch_id: Option<String>,
    /// Batches of earlier runs that have not been resent yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    left: Vec<Left>,
    /// Serialized items that were not sent, each an [`ItemRecord`].
    pieces: Vec<Box<RawValue>>,
    /// Each an [`Application`].
    applications: Vec<Box<RawValue>>,
    /// Each a [`BulkMetric`].
    metrics: Vec<Box<RawValue>>,
    /// Each an [`ImpactRecord`].
    impact: Vec<Box<RawValue>>,
}

/// A batch that was in flight in an earlier run.
#[derive(Deserialize, Serialize)]
struct Left {
    id: String,
    /// Each an [`ItemRecord`].
    batch: Vec<Box<RawValue>>,
}

/// An item of a body, preserved byte for byte.
#[derive(Deserialize, Serialize)]
struct Piece {
    part: String,
    count: u64,
    json: Box<RawValue>,
    /// For impact metrics: when each sample was reported.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    times: Vec<Option<Timestamp>>,
}

#[derive(Deserialize, Serialize)]
struct Impact {
    app: Arc<str>,
    metric: Box<RawValue>,
    /// When each sample of a gauge was reported.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    times: Vec<Option<Timestamp>>,
}

/// Restored usage.
#[derive(Debug)]
pub(super) struct Restored {
    pub(super) lanes: Vec<(Environment, Lane)>,
    /// Number of items that could not be read.
    pub(super) unreadable: usize,
}

/// Encodes the queues; `None` if they are empty.
pub(super) fn save(queues: &[(Environment, Lane)]) -> Option<Vec<u8>> {
    let environments: BTreeMap<_, _> = queues
        .iter()
        .filter(|(_, queue)| !queue.is_empty())
        .map(|(name, queue)| (name.as_str().to_owned(), waiting(name, queue)))
        .collect();
    if environments.is_empty() {
        return None;
    }
    let spool = Spool { version: VERSION, environments };
    Some(serde_json::to_vec(&spool).expect("text keys and finite numbers are JSON"))
}

/// Decodes bytes from [`encode`]. Registrations are charged to `registrations`.
pub(super) fn restore(bytes: &[u8], registrations: &Account) -> Result<Restored, Error> {
    let Versioned { version } = serde_json::from_slice(bytes).map_err(Error::Damaged)?;
    if version != VERSION {
        return Err(Error::Version(version));
    }
    let spool: Spool = serde_json::from_slice(bytes).map_err(Error::Damaged)?;
    let mut unreadable = 0;
    let environments = spool.environments.into_iter();
    let queues = environments
        .map(|(name, record)| {
            (Environment::new(&name), lane(&record, registrations, &mut unreadable))
        })
        .collect();
    Ok(Restored { lanes: queues, unreadable })
}

fn waiting(environment: &Environment, queue: &Lane) -> Waiting {
    let metric =
        |(key, counter): (&CounterKey, &Counter)| json(&counter.to_wire(environment.as_str(), key));
    let mut series = queue.impact.clone();
    let mut impact = Vec::new();
    while let Some(OfApp { app, metric, mut times }) = series.pop_of_app() {
        if !matches!(metric.samples, Samples::Gauge(_)) {
            times.clear();
        }
        impact.push(json(&Impact { app, metric: json(&metric), times }));
    }
    let piece = |item: &Item| json(&Piece::of(item));
    let pieces = |batch: &Batch| batch.items().iter().map(piece).collect();
    let left = |(id, batch): &(BatchId, Batch)| Left { id: id.to_string(), batch: pieces(batch) };
    Waiting {
        batch: queue.hand.as_ref().map(|(_, batch)| pieces(batch)).unwrap_or_default(),
        batch_id: queue.hand.as_ref().map(|(id, _)| id.to_string()),
        left: queue.left.iter().map(left).collect(),
        pieces: queue.carry.iter().chain(&queue.late).map(piece).collect(),
        applications: queue.applications.values().map(|it| json(it.application())).collect(),
        metrics: queue.counters.iter().map(metric).collect(),
        impact,
    }
}

fn json(item: &impl Serialize) -> Box<RawValue> {
    to_raw_value(item).expect("wire types with text keys are JSON")
}

/// Decodes an environment, skipping and counting unreadable items.
fn lane(record: &Waiting, registrations: &Account, unreadable: &mut usize) -> Lane {
    let mut queue = Lane::default();
    queue.hand = batch(record.batch_id.as_deref(), &record.batch, unreadable);
    let left = record.left.iter();
    queue.left = left.filter_map(|it| batch(Some(&it.id), &it.batch, unreadable)).collect();
    queue.carry = readable(&record.pieces, piece, unreadable).into();
    for application in readable(&record.applications, application, unreadable) {
        let registration = Registration::restored(application, registrations);
        queue.register(Arc::new(registration), Age::Newer);
    }
    for metric in readable(&record.metrics, metric, unreadable) {
        let hour = Hour::of(metric.timestamp);
        let key = CounterKey { hour, app: metric.app_name, flag: metric.feature_name };
        // Everything stored has been accepted before, so its names count as known.
        let (counter, _) = Counter::of(metric.stats, &Arc::new(metric.metadata), |_| Name::Known);
        let _ = queue.counters.add(key, counter);
    }
    for (app, metric, times) in readable(&record.impact, impact, unreadable) {
        queue.impact.record(&app, metric, times, |_| Some(Charge::default()));
    }
    queue
}

/// Decodes a batch; `None` if no item is readable.
fn batch(
    id: Option<&str>,
    items: &[Box<RawValue>],
    unreadable: &mut usize,
) -> Option<(BatchId, Batch)> {
    let items = readable(items, piece, unreadable);
    if items.is_empty() {
        return None;
    }
    let id = id.and_then(BatchId::parse).unwrap_or_else(BatchId::random);
    Some((id, Batch::of(items)))
}

/// Decodes items, skipping and counting unreadable ones.
fn readable<T>(
    items: &[Box<RawValue>],
    read: impl Fn(&str) -> Option<T>,
    unreadable: &mut usize,
) -> Vec<T> {
    let read: Vec<_> = items.iter().filter_map(|item| read(item.get())).collect();
    *unreadable += items.len() - read.len();
    read
}

fn piece(json: &str) -> Option<Item> {
    serde_json::from_str::<Piece>(json).ok()?.into_item()
}

fn application(json: &str) -> Option<ClientApplication> {
    ClientApplication::parse(json.as_bytes()).ok()
}

fn metric(json: &str) -> Option<BulkMetric> {
    BulkMetric::from_value(serde_json::from_str(json).ok()?).ok()
}

fn impact(json: &str) -> Option<(Arc<str>, ImpactMetric, Vec<Option<Timestamp>>)> {
    let Impact { app, metric, times } = serde_json::from_str(json).ok()?;
    Some((app, ImpactMetric::from_value(serde_json::from_str(metric.get()).ok()?).ok()?, times))
}

impl Piece {
    fn of(item: &Item) -> Self {
        let part = match item.part {
            Part::Application => "application",
            Part::Instance => "instance",
            Part::Metric => "metric",
            Part::Impact => "impact",
        };
        let json = RawValue::from_string(item.json.to_string()).expect("an item is JSON");
        Self { part: part.to_owned(), count: item.count, json, times: item.times.clone() }
    }

    /// The item; `None` if its kind is unknown.
    fn into_item(self) -> Option<Item> {
        let part = match self.part.as_str() {
            "application" => Part::Application,
            "instance" => Part::Instance,
            "metric" => Part::Metric,
            "impact" => Part::Impact,
            _ => return None,
        };
        Some(Item { times: self.times, ..Item::new(part, self.json.get().into(), self.count) })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::usage::pool::Pool;

    fn restore(bytes: &[u8]) -> Result<Restored, Error> {
        super::restore(bytes, &Pool::new(0).anonymous())
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
        let Restored { lanes: queues, unreadable } = restore(VERSION_1.as_bytes()).unwrap();
        assert_eq!(unreadable, 0);
        assert_eq!(without_ids(&save(&queues).unwrap()), from_version_1());
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
        let Restored { lanes: queues, .. } = restore(VERSION_1.as_bytes()).unwrap();
        let again = restore(VERSION_1.as_bytes()).unwrap().lanes;
        // Without IDs, two identical batches may count different evaluations.
        let id = |queue: &Lane| queue.hand.as_ref().unwrap().0;
        assert_ne!(id(&queues[0].1), id(&again[0].1));

        let mut queue = Lane::default();
        let _ = queue.restore(queues[0].1.clone());
        let item = Item::new(Part::Metric, "{}".into(), 1);
        let other = (BatchId::new(7, 1), Batch::of(vec![item]));
        queue.hand = Some(other.clone());
        let saved = save(&[(dev(), queue)]).unwrap();
        let restored = &restore(&saved).unwrap().lanes[0].1;
        assert_eq!(restored.hand, Some(other));
        assert_eq!(restored.left, [queues[0].1.hand.clone().unwrap()]);
    }

    #[test]
    fn unreadable_item_does_not_affect_others() {
        let mut spool: Value = serde_json::from_str(VERSION_1).unwrap();
        let lists = spool["environments"]["dev"].as_object_mut().unwrap();
        for list in lists.values_mut() {
            list.as_array_mut().unwrap().insert(0, serde_json::json!({ "metric": "?" }));
        }
        let Restored { lanes: queues, unreadable } = restore(spool.to_string().as_bytes()).unwrap();
        assert_eq!(unreadable, 5);
        assert_eq!(without_ids(&save(&queues).unwrap()), from_version_1());
    }

    #[test]
    fn damaged_or_newer_record_is_rejected_with_the_reason() {
        let check = |bytes: &str, message: &str| {
            assert_eq!(restore(bytes.as_bytes()).unwrap_err().to_string(), message);
        };
        check("{", "the stored usage is damaged");
        check(r#"{"version":1}"#, "the stored usage is damaged");
        check(r#"{"version":9,"new":true}"#, "the stored usage has the unknown format version 9");
    }

    #[test]
    fn empty_queue_is_not_saved() {
        assert_eq!(save(&[(Environment::new("dev"), Lane::default())]), None);
    }
}
