//! What waits to be sent, as bytes that survive a restart.
//!
//! Version 1 is JSON: for each environment the batch in hand, which must be sent again as it was,
//! and what else waits, in upstream's own shapes. An item that cannot be read is left out and
//! counted: it costs no other. A batch in hand keeps its name, by which a registry knows it again.
//! Where the bytes are kept is not known here.

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
    wire::usage::{Application, BulkMetric, ImpactMetric, Samples},
};

const VERSION: u32 = 1;

/// Why a spool cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not JSON of the right shape.
    #[error("the spool of usage is damaged")]
    Damaged(#[source] serde_json::Error),
    /// It was written by a version that this one does not know.
    #[error("the spool of usage has the unknown version {0}")]
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

/// What waits for one environment, each item as JSON of its own.
#[derive(Deserialize, Serialize)]
struct Waiting {
    /// The [`Piece`]s of the batch in hand.
    batch: Vec<Box<RawValue>>,
    /// The name of that batch; earlier versions wrote none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    batch_id: Option<String>,
    /// Batches of earlier runs, which were not sent again yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    left: Vec<Left>,
    /// [`Piece`]s that were serialised and not sent.
    pieces: Vec<Box<RawValue>>,
    /// Each an [`Application`].
    applications: Vec<Box<RawValue>>,
    /// Each a [`BulkMetric`].
    metrics: Vec<Box<RawValue>>,
    /// Each an [`Impact`].
    impact: Vec<Box<RawValue>>,
}

/// A batch that another run had in hand.
#[derive(Deserialize, Serialize)]
struct Left {
    id: String,
    /// [`Piece`]s.
    batch: Vec<Box<RawValue>>,
}

/// A piece of a body, kept byte for byte.
#[derive(Deserialize, Serialize)]
struct Piece {
    part: String,
    count: u64,
    json: Box<RawValue>,
    /// Of an impact metric: when each sample was reported.
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

/// What a spool held.
#[derive(Debug)]
pub(super) struct Restored {
    pub(super) lanes: Vec<(Environment, Lane)>,
    /// How many items could not be read.
    pub(super) unreadable: usize,
}

/// Writes what the lanes hold; nothing when there is nothing.
pub(super) fn save(lanes: &[(Environment, Lane)]) -> Option<Vec<u8>> {
    let environments: BTreeMap<_, _> = lanes
        .iter()
        .filter(|(_, lane)| !lane.is_empty())
        .map(|(environment, lane)| (environment.as_str().to_owned(), waiting(environment, lane)))
        .collect();
    if environments.is_empty() {
        return None;
    }
    let spool = Spool { version: VERSION, environments };
    Some(serde_json::to_vec(&spool).expect("text keys and finite numbers are JSON"))
}

/// Reads what [`save`] wrote; `registrations` is charged with those among it.
pub(super) fn restore(bytes: &[u8], registrations: &Account) -> Result<Restored, Error> {
    let Versioned { version } = serde_json::from_slice(bytes).map_err(Error::Damaged)?;
    if version != VERSION {
        return Err(Error::Version(version));
    }
    let spool: Spool = serde_json::from_slice(bytes).map_err(Error::Damaged)?;
    let mut unreadable = 0;
    let environments = spool.environments.into_iter();
    let lanes = environments
        .map(|(name, waiting)| {
            (Environment::new(&name), lane(&waiting, registrations, &mut unreadable))
        })
        .collect();
    Ok(Restored { lanes, unreadable })
}

fn waiting(environment: &Environment, lane: &Lane) -> Waiting {
    let metric =
        |(key, counter): (&CounterKey, &Counter)| json(&counter.to_wire(environment.as_str(), key));
    let mut series = lane.impact.clone();
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
        batch: lane.hand.as_ref().map(|(_, batch)| pieces(batch)).unwrap_or_default(),
        batch_id: lane.hand.as_ref().map(|(id, _)| id.to_string()),
        left: lane.left.iter().map(left).collect(),
        pieces: lane.carry.iter().chain(&lane.late).map(piece).collect(),
        applications: lane.applications.values().map(|it| json(it.application())).collect(),
        metrics: lane.counters.iter().map(metric).collect(),
        impact,
    }
}

fn json(item: &impl Serialize) -> Box<RawValue> {
    to_raw_value(item).expect("wire types with text keys are JSON")
}

/// A lane of what can be read, counting the rest.
fn lane(waiting: &Waiting, registrations: &Account, unreadable: &mut usize) -> Lane {
    let mut lane = Lane::default();
    lane.hand = batch(waiting.batch_id.as_deref(), &waiting.batch, unreadable);
    let left = waiting.left.iter();
    lane.left = left.filter_map(|it| batch(Some(&it.id), &it.batch, unreadable)).collect();
    lane.carry = readable(&waiting.pieces, piece, unreadable).into();
    for application in readable(&waiting.applications, application, unreadable) {
        let registration = Registration::restored(application, registrations);
        lane.register(Arc::new(registration), Age::Newer);
    }
    for metric in readable(&waiting.metrics, metric, unreadable) {
        let hour = Hour::of(metric.timestamp);
        let key = CounterKey { hour, app: metric.app_name, flag: metric.feature_name };
        // Whatever it was, it has been let in.
        let (counter, _) = Counter::of(metric.stats, &Arc::new(metric.metadata), |_| Name::Known);
        let _ = lane.counters.add(key, counter);
    }
    for (app, metric, times) in readable(&waiting.impact, impact, unreadable) {
        lane.impact.record(&app, metric, times, |_| Some(Charge::default()));
    }
    lane
}

/// A batch of what can be read; `None` where that is nothing.
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

/// Those of `items` that `read` can read, counting the others.
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

fn application(json: &str) -> Option<Application> {
    Application::parse(json.as_bytes()).ok()
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

    /// The item; none of a kind that is unknown.
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

    /// As version 1 was written; never to be changed.
    const VERSION_1: &str = r#"{"version":1,"environments":{"dev":{
        "batch":[{"part":"metric","count":3,"json":{"featureName":"f","appName":"a","environment":"dev","timestamp":"2026-01-02T03:00:00Z","yes":2,"no":1,"variants":{}}}],
        "pieces":[{"part":"impact","count":0,"json":{"name":"n"}}],
        "applications":[{"appName":"a","instanceId":"i","connectVia":[],"interval":15,"started":"2026-01-02T03:04:05Z","strategies":[]}],
        "metrics":[{"featureName":"f","appName":"a","environment":"dev","timestamp":"2026-01-02T04:00:00Z","yes":5,"no":0,"variants":{"v":5},"sdkVersion":"x:1"}],
        "impact":[{"app":"a","metric":{"name":"n","help":"h","type":"counter","samples":[{"value":1.0,"labels":{"origin":"edge"}}]}}]}}}"#;

    #[test]
    fn version_1_is_read_and_written_back_as_it_was() {
        let Restored { lanes, unreadable } = restore(VERSION_1.as_bytes()).unwrap();
        assert_eq!(unreadable, 0);
        assert_eq!(without_ids(&save(&lanes).unwrap()), from_version_1());
    }

    /// What was saved, without the names that batches have got since.
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
    fn batches_keep_their_names() {
        let dev = || Environment::new("dev");
        let Restored { lanes, .. } = restore(VERSION_1.as_bytes()).unwrap();
        let again = restore(VERSION_1.as_bytes()).unwrap().lanes;
        // Without names, two that say the same may count different evaluations.
        let id = |lane: &Lane| lane.hand.as_ref().unwrap().0;
        assert_ne!(id(&lanes[0].1), id(&again[0].1));

        let mut lane = Lane::default();
        let _ = lane.restore(lanes[0].1.clone());
        let item = Item::new(Part::Metric, "{}".into(), 1);
        let other = (BatchId::new(7, 1), Batch::of(vec![item]));
        lane.hand = Some(other.clone());
        let saved = save(&[(dev(), lane)]).unwrap();
        let restored = &restore(&saved).unwrap().lanes[0].1;
        assert_eq!(restored.hand, Some(other));
        assert_eq!(restored.left, [lanes[0].1.hand.clone().unwrap()]);
    }

    #[test]
    fn an_item_that_cannot_be_read_costs_only_itself() {
        let mut spool: Value = serde_json::from_str(VERSION_1).unwrap();
        let lists = spool["environments"]["dev"].as_object_mut().unwrap();
        for list in lists.values_mut() {
            list.as_array_mut().unwrap().insert(0, serde_json::json!({ "metric": "?" }));
        }
        let Restored { lanes, unreadable } = restore(spool.to_string().as_bytes()).unwrap();
        assert_eq!(unreadable, 5);
        assert_eq!(without_ids(&save(&lanes).unwrap()), from_version_1());
    }

    #[test]
    fn a_damaged_or_foreign_spool_is_refused_with_the_reason() {
        let check = |bytes: &str, message: &str| {
            assert_eq!(restore(bytes.as_bytes()).unwrap_err().to_string(), message);
        };
        check("{", "the spool of usage is damaged");
        check(r#"{"version":1}"#, "the spool of usage is damaged");
        check(r#"{"version":9,"new":true}"#, "the spool of usage has the unknown version 9");
    }

    #[test]
    fn nothing_waiting_is_nothing_saved() {
        assert_eq!(save(&[(Environment::new("dev"), Lane::default())]), None);
    }
}
