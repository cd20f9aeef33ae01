//! Merges the batches of several instances into fewer ones.
//!
//! Counts of the same flag, application, environment and hour are summed, the last registration of each
//! instance of an application is kept, and impact metrics are merged as in
//! [`impact_metrics`](super::impact_metrics). Batches are merged whole, so that each is sent in exactly
//! one merged batch.
//!
//! The result depends only on the batches, not on their order: they are taken in the order of their ids,
//! which is the order of time for the batches of one instance. A batch is sent alone and unchanged if
//! merging would lose anything of it: a field that this version does not know, or a count beyond what
//! upstream can store.
//!
//! Pure: it performs no IO.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use serde_json::Value;

use super::{
    batch::{Batch, BatchId, Item, ItemKind, MAX_BODY_BYTES, to_raw_json},
    counters::{Hour, MAX_COUNT, MAX_VARIANT_COUNT, MAX_VARIANTS},
    impact_metrics::ImpactSeries,
    quota_pool::Reservation,
};
use crate::protocol::usage::{
    BulkMetric, BulkReport, ClientApplication, ImpactMetric, SdkMetadata, ToggleStats,
};

/// A batch of one instance, to be merged with others of its environment.
#[derive(Clone, Debug)]
pub struct QueuedBatch {
    /// Its id.
    pub id: BatchId,
    /// Its body in the format of `/api/client/metrics/bulk`.
    pub body: Bytes,
}

/// A batch to send in place of others.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MergedBatch {
    /// Its id: always the same for the same batches, and the id of the batch itself if there is only one.
    pub id: BatchId,
    /// The batches that it contains, in the order of their ids.
    pub parts: Vec<BatchId>,
    /// The body. Within the limit, unless it is the body of a single batch that is not.
    pub body: Bytes,
}

/// Merges batches of one environment into bodies of at most `max_body` bytes, and never more than 95 KiB.
/// Each batch is contained in exactly one of the results.
pub fn merge_batches(mut batches: Vec<QueuedBatch>, max_body: usize) -> Vec<MergedBatch> {
    let max_body = max_body.min(MAX_BODY_BYTES);
    batches.sort_by_key(|batch| batch.id);
    let mut merged = Vec::new();
    let mut open: BTreeMap<ItemKind, Group> = BTreeMap::new();
    for QueuedBatch { id, body } in batches {
        let Some((kind, content)) = Content::parse(&body) else {
            merged.push(MergedBatch { id, parts: vec![id], body });
            continue;
        };
        match open.get_mut(&kind) {
            Some(group) => {
                if let Err(content) = group.try_add(kind, id, content, max_body) {
                    let full = std::mem::replace(group, Group::new(id, content, body));
                    merged.push(full.finish());
                }
            }
            None => {
                open.insert(kind, Group::new(id, content, body));
            }
        }
    }
    merged.extend(open.into_values().map(Group::finish));
    merged
}

/// Batches that are merged already, with the body that they have together.
struct Group {
    parts: Vec<BatchId>,
    content: Content,
    body: Bytes,
}

impl Group {
    fn new(id: BatchId, content: Content, body: Bytes) -> Self {
        Self { parts: vec![id], content, body }
    }

    /// Adds a batch; returns its content if it does not fit.
    fn try_add(
        &mut self,
        kind: ItemKind,
        id: BatchId,
        content: Content,
        max_body: usize,
    ) -> Result<(), Content> {
        let Some(sum) = self.content.clone().add(content.clone()) else { return Err(content) };
        let body = Batch::new(sum.to_items(kind)).body();
        if body.len() > max_body {
            return Err(content);
        }
        self.parts.push(id);
        (self.content, self.body) = (sum, body);
        Ok(())
    }

    fn finish(self) -> MergedBatch {
        let Self { parts, body, .. } = self;
        let id = match &parts[..] {
            [id] => *id,
            several => BatchId::merged(several),
        };
        MergedBatch { id, parts, body }
    }
}

/// The contents of a batch, which are all of one kind.
#[derive(Clone)]
enum Content {
    Applications(BTreeMap<ApplicationKey, ClientApplication>),
    Metrics(BTreeMap<MetricKey, (ToggleStats, SdkMetadata)>),
    ImpactMetrics(ImpactSeries),
}

/// An instance of an application: environment, application and instance.
type ApplicationKey = (Option<Arc<str>>, Arc<str>, Option<Arc<str>>);

/// What is counted separately, oldest hour first: hour, environment, application and flag.
type MetricKey = (Hour, Arc<str>, Arc<str>, Arc<str>);

impl Content {
    /// Parses a body. `None` if it has items of several kinds, or something that would be lost.
    fn parse(body: &[u8]) -> Option<(ItemKind, Self)> {
        let report = BulkReport::parse(body).ok()?;
        if report.malformed > 0 || !is_complete(&report, body) {
            return None;
        }
        let BulkReport { applications, metrics, impact_metrics, malformed: _ } = report;
        match (&applications[..], &metrics[..], &impact_metrics[..]) {
            ([first, ..], [], []) => {
                let has_strategies = first.strategies.is_some();
                if applications.iter().any(|it| it.strategies.is_some() != has_strategies) {
                    return None;
                }
                let kind = if has_strategies {
                    ItemKind::Application
                } else {
                    ItemKind::ApplicationWithoutStrategies
                };
                let keyed = applications.into_iter().map(|it| (application_key(&it), it));
                Some((kind, Self::Applications(keyed.collect())))
            }
            ([], [_, ..], []) => {
                let none = Self::Metrics(BTreeMap::new());
                let sum = metrics.into_iter().try_fold(none, |sum, metric| {
                    let (key, counts) = keyed_counts(metric);
                    sum.add(Self::Metrics(BTreeMap::from([(key, counts)])))
                });
                Some((ItemKind::Metric, sum?))
            }
            ([], [], [_, ..]) => {
                let series = ImpactSeries::default();
                let sum = add_impact_metrics(series, impact_metrics)?;
                Some((ItemKind::ImpactMetric, Self::ImpactMetrics(sum)))
            }
            _ => None,
        }
    }

    /// The sum with the contents of a later batch; `None` if they cannot be merged without a loss.
    fn add(self, later: Self) -> Option<Self> {
        match (self, later) {
            (Self::Applications(mut all), Self::Applications(later)) => {
                all.extend(later);
                Some(Self::Applications(all))
            }
            (Self::Metrics(mut all), Self::Metrics(later)) => {
                for (key, (stats, metadata)) in later {
                    let (sum, _) = all.entry(key).or_insert((ToggleStats::default(), metadata));
                    add_counts(sum, stats)?;
                }
                Some(Self::Metrics(all))
            }
            (Self::ImpactMetrics(all), Self::ImpactMetrics(mut later)) => {
                let mut metrics = Vec::new();
                while let Some(metric) = later.pop_for_app() {
                    metrics.push(metric.metric);
                }
                add_impact_metrics(all, metrics).map(Self::ImpactMetrics)
            }
            _ => None,
        }
    }

    fn to_items(&self, kind: ItemKind) -> Vec<Item> {
        match self {
            Self::Applications(all) => {
                all.values().map(|it| Item::new(kind, to_raw_json(it), 0)).collect()
            }
            Self::Metrics(all) => {
                let metric = |(key, counts)| to_raw_json(&bulk_metric(key, counts));
                all.iter().map(|entry| Item::new(kind, metric(entry), 0)).collect()
            }
            Self::ImpactMetrics(all) => {
                let mut rest = all.clone();
                std::iter::from_fn(|| Some(rest.pop_items()).filter(|it| !it.is_empty()))
                    .flatten()
                    .collect()
            }
        }
    }
}

/// Whether a report contains everything that is in the body that it was parsed from.
fn is_complete(report: &BulkReport, body: &[u8]) -> bool {
    let BulkReport { applications, metrics, impact_metrics, malformed: _ } = report;
    let applications = applications.iter().map(|it| (ItemKind::Application, to_raw_json(it)));
    let metrics = metrics.iter().map(|it| (ItemKind::Metric, to_raw_json(it)));
    let impact_metrics = impact_metrics.iter().map(|it| (ItemKind::ImpactMetric, to_raw_json(it)));
    let items = applications.chain(metrics).chain(impact_metrics);
    let again = Batch::new(items.map(|(kind, json)| Item::new(kind, json, 0)).collect()).body();
    let parse = |body: &[u8]| serde_json::from_slice::<Value>(body).ok();
    again == body || parse(&again) == parse(body)
}

fn application_key(application: &ClientApplication) -> ApplicationKey {
    let ClientApplication { environment, app_name, instance_id, .. } = application;
    (environment.clone(), Arc::clone(app_name), instance_id.clone())
}

fn keyed_counts(metric: BulkMetric) -> (MetricKey, (ToggleStats, SdkMetadata)) {
    let BulkMetric { feature_name, app_name, environment, timestamp, stats, metadata } = metric;
    ((Hour::of(timestamp), environment, app_name, feature_name), (stats, metadata))
}

fn bulk_metric(key: &MetricKey, counts: &(ToggleStats, SdkMetadata)) -> BulkMetric {
    let ((hour, environment, app_name, feature_name), (stats, metadata)) = (key, counts);
    BulkMetric {
        feature_name: Arc::clone(feature_name),
        app_name: Arc::clone(app_name),
        environment: Arc::clone(environment),
        timestamp: hour.start(),
        stats: stats.clone(),
        metadata: metadata.clone(),
    }
}

/// Adds counts. `None` if the sums exceed what upstream can store.
fn add_counts(sum: &mut ToggleStats, more: ToggleStats) -> Option<()> {
    let checked = |sum: u64, more: u64, max: u64| sum.checked_add(more).filter(|sum| *sum <= max);
    sum.yes = checked(sum.yes, more.yes, MAX_COUNT)?;
    sum.no = checked(sum.no, more.no, MAX_COUNT)?;
    for (variant, more) in more.variants {
        let count = sum.variants.entry(variant).or_default();
        *count = checked(*count, more, MAX_VARIANT_COUNT)?;
    }
    (sum.variants.len() <= MAX_VARIANTS).then_some(())
}

/// Adds impact metrics. `None` if observations would be lost, for instance in a histogram with too many
/// buckets.
fn add_impact_metrics(mut sum: ImpactSeries, metrics: Vec<ImpactMetric>) -> Option<ImpactSeries> {
    let mut expected = sum.observations();
    for metric in metrics {
        let mut alone = ImpactSeries::default();
        for series in [&mut alone, &mut sum] {
            series.record(&"".into(), metric.clone(), [], |_| Some(Reservation::default()));
        }
        expected += alone.observations();
    }
    (sum.observations() == expected).then_some(sum)
}

#[cfg(test)]
mod tests;
