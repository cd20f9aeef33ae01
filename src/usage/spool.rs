//! What waits to be sent, as bytes that survive a restart.
//!
//! Version 1 is JSON: for each environment the batch in hand, which must be sent again as it was,
//! and what else waits, in upstream's own shapes. Where the bytes are kept is not known here.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};

use super::{
    batch::{Batch, Item, Part},
    counter::{Counter, CounterKey, Hour},
    impact::ImpactSeries,
    lane::{BatchId, Lane},
    ledger::MAX_SAMPLES,
};
use crate::{
    token::Environment,
    wire::usage::{Application, BulkMetric, ImpactMetric, ParseError},
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
    /// An item of it cannot be read.
    #[error("the spool of usage holds an item that cannot be read")]
    Item(#[source] ParseError),
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

/// What waits for one environment.
#[derive(Deserialize, Serialize)]
struct Waiting {
    /// The batch in hand.
    batch: Vec<Piece>,
    /// Pieces that were serialised and not sent.
    pieces: Vec<Piece>,
    applications: Vec<Value>,
    metrics: Vec<Value>,
    impact: Vec<Impact>,
}

/// A piece of a body, kept byte for byte.
#[derive(Deserialize, Serialize)]
struct Piece {
    part: String,
    count: u64,
    json: Box<RawValue>,
}

#[derive(Deserialize, Serialize)]
struct Impact {
    app: Arc<str>,
    metric: Value,
}

/// Writes what the lanes hold; nothing when there is nothing.
pub(super) fn save<'a>(
    lanes: impl Iterator<Item = (&'a Environment, &'a Lane)>,
) -> Option<Vec<u8>> {
    let environments: BTreeMap<_, _> = lanes
        .filter(|(_, lane)| !lane.is_empty())
        .map(|(environment, lane)| (environment.as_str().to_owned(), waiting(environment, lane)))
        .collect();
    if environments.is_empty() {
        return None;
    }
    let spool = Spool { version: VERSION, environments };
    Some(serde_json::to_vec(&spool).expect("text keys and finite numbers are JSON"))
}

/// Reads what [`save`] wrote.
pub(super) fn restore(bytes: &[u8]) -> Result<Vec<(Environment, Lane)>, Error> {
    let Versioned { version } = serde_json::from_slice(bytes).map_err(Error::Damaged)?;
    if version != VERSION {
        return Err(Error::Version(version));
    }
    let spool: Spool = serde_json::from_slice(bytes).map_err(Error::Damaged)?;
    let lane = |(name, waiting): (String, Waiting)| Ok((Environment::new(&name), lane(waiting)?));
    spool.environments.into_iter().map(lane).collect()
}

fn waiting(environment: &Environment, lane: &Lane) -> Waiting {
    let value = |value: Result<Value, _>| value.expect("wire types with text keys are JSON");
    let metric = |(key, counter): (&CounterKey, &Counter)| {
        value(serde_json::to_value(counter.to_wire(environment.as_str(), key)))
    };
    let mut series = lane.impact.clone();
    let mut impact = Vec::new();
    while let Some((app, metric)) = series.pop_of_app() {
        impact.push(Impact { app, metric: value(serde_json::to_value(metric)) });
    }
    let in_hand = lane.hand.iter().flat_map(|(_, batch)| batch.items());
    Waiting {
        batch: in_hand.map(Piece::of).collect(),
        pieces: lane.carry.iter().map(Piece::of).collect(),
        applications: lane
            .applications
            .values()
            .map(|app| value(serde_json::to_value(app)))
            .collect(),
        metrics: lane.counters.iter().map(metric).collect(),
        impact,
    }
}

fn lane(waiting: Waiting) -> Result<Lane, Error> {
    let mut lane = Lane::default();
    let batch: Vec<_> = waiting.batch.into_iter().filter_map(Piece::into_item).collect();
    if !batch.is_empty() {
        lane.hand = Some((BatchId::default(), Batch::of(batch)));
    }
    lane.carry = waiting.pieces.into_iter().filter_map(Piece::into_item).collect::<VecDeque<_>>();
    for value in waiting.applications {
        let application = Application::from_value(value).map_err(Error::Item)?;
        let key = (Arc::clone(&application.app_name), application.instance_id.clone());
        lane.applications.insert(key, application);
    }
    for value in waiting.metrics {
        let metric = BulkMetric::from_value(value).map_err(Error::Item)?;
        let hour = Hour::of(metric.timestamp);
        let key = CounterKey { hour, app: metric.app_name, flag: metric.feature_name };
        let (counter, _) = Counter::of(metric.stats, &Arc::new(metric.metadata));
        let _ = lane.counters.add(key, counter);
    }
    let mut impact = ImpactSeries::default();
    for Impact { app, metric } in waiting.impact {
        impact.record(&app, ImpactMetric::from_value(metric).map_err(Error::Item)?, MAX_SAMPLES);
    }
    lane.impact = impact;
    Ok(lane)
}

impl Piece {
    fn of(item: &Item) -> Self {
        let part = match item.part {
            Part::Application => "application",
            Part::Metric => "metric",
            Part::Impact => "impact",
        };
        let json = RawValue::from_string(item.json.to_string()).expect("an item is JSON");
        Self { part: part.to_owned(), count: item.count, json }
    }

    /// The item; none of a kind that is unknown.
    fn into_item(self) -> Option<Item> {
        let part = match self.part.as_str() {
            "application" => Part::Application,
            "metric" => Part::Metric,
            "impact" => Part::Impact,
            _ => return None,
        };
        Some(Item { part, json: self.json.get().into(), count: self.count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As version 1 was written; never to be changed.
    const VERSION_1: &str = r#"{"version":1,"environments":{"dev":{
        "batch":[{"part":"metric","count":3,"json":{"featureName":"f","appName":"a","environment":"dev","timestamp":"2026-01-02T03:00:00Z","yes":2,"no":1,"variants":{}}}],
        "pieces":[{"part":"impact","count":0,"json":{"name":"n"}}],
        "applications":[{"appName":"a","instanceId":"i","connectVia":[],"interval":15,"started":"2026-01-02T03:04:05Z","strategies":[]}],
        "metrics":[{"featureName":"f","appName":"a","environment":"dev","timestamp":"2026-01-02T04:00:00Z","yes":5,"no":0,"variants":{"v":5},"sdkVersion":"x:1"}],
        "impact":[{"app":"a","metric":{"name":"n","help":"h","type":"counter","samples":[{"value":1.0,"labels":{"origin":"edge"}}]}}]}}}"#;

    #[test]
    fn version_1_is_read_and_written_back_as_it_was() {
        let lanes = restore(VERSION_1.as_bytes()).unwrap();
        let saved = save(lanes.iter().map(|(environment, lane)| (environment, lane))).unwrap();
        let saved: Value = serde_json::from_slice(&saved).unwrap();
        assert_eq!(saved, serde_json::from_str::<Value>(VERSION_1).unwrap());
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
        let environment = Environment::new("dev");
        assert_eq!(save([(&environment, &Lane::default())].into_iter()), None);
    }
}
