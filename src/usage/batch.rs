//! Batches of usage, and the [`UsageSink`] that takes them.
//!
//! A batch has the body of upstream's `/metrics/bulk`, assembled from serialized items of known size.
//! The contents of batches and the time of sending are decided elsewhere.

use std::{fmt, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use xxhash_rust::xxh3::xxh3_128;

use crate::token::Environment;

/// The largest body to send, in bytes. Upstream's limit is 100 KiB, excluding headers.
pub(super) const MAX_BODY_BYTES: usize = 95 * 1024;
/// Fixed parts of the body around the items.
const BODY_START: &str = r#"{"applications":["#;
const METRICS_START: &str = r#"],"metrics":["#;
const IMPACT_START: &str = r#"],"impactMetrics":["#;
const BODY_END: &str = "]}";

/// A destination of usage.
pub trait UsageSink: fmt::Debug + Send + Sync {
    /// Sends a batch. If the future is dropped, it is unknown whether the destination accepted it.
    fn send(&self, batch: OutgoingBatch) -> BoxFuture<'_, SendOutcome>;

    /// This instance ends: every batch is sent for the last time, so that waiting for a better way to send
    /// it has no use.
    fn begin_shutdown(&self) {}
}

/// A batch to send now.
#[derive(Clone, Debug)]
pub struct OutgoingBatch {
    /// Identifies the batch: a retry has the same ID and the same body.
    pub id: BatchId,
    /// The environment of its usage.
    pub environment: Environment,
    /// The body in the format of `/api/client/metrics/bulk`.
    pub body: Bytes,
    /// Whether the destination may hold it already: it was parked, or sent by an earlier run.
    pub may_be_parked: bool,
}

/// The result of sending a batch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SendOutcome {
    /// The destination accepted it.
    Sent,
    /// The destination rejected it permanently, but may have stored some of it: resending it, or parts
    /// of it, could count twice.
    Rejected,
    /// The destination, or a proxy in front of it, rejected the body as too large.
    TooLarge,
    /// The destination rejected the token, or there is no token for the environment yet.
    Unauthorized,
    /// The destination was unavailable or busy; it may have requested a delay.
    Retry(Option<Duration>),
    /// The destination holds the batch, or may hold it, and has not passed it on yet. The batch is kept,
    /// others are sent meanwhile, and it is sent again after this time to learn its outcome.
    Parked(Duration),
}

impl SendOutcome {
    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Rejected => "rejected",
            Self::TooLarge => "too_large",
            Self::Unauthorized => "unauthorized",
            Self::Retry(_) => "later",
            Self::Parked(_) => "parked",
        }
    }
}

/// Identifies a batch across attempts, restarts and instances.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BatchId(u128);

impl BatchId {
    /// The `n`-th batch of an instance with this random number.
    pub(super) fn new(instance: u64, n: u64) -> Self {
        Self(u128::from(instance) << 64 | u128::from(n))
    }

    /// For a batch that was merged from several others. It depends on them and their order only.
    pub(super) fn merged(batches: &[Self]) -> Self {
        let ids: Vec<_> = batches.iter().map(|batch| batch.0.to_be_bytes()).collect();
        Self(xxh3_128(ids.as_flattened()))
    }

    /// For a batch that was stored without an ID and therefore was never sent with one.
    pub(super) fn random() -> Self {
        Self(rand::random())
    }

    /// Parses the output of `Display`: 32 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let is_id = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_id { u128::from_str_radix(text, 16).ok().map(Self) } else { None }
    }
}

impl fmt::Display for BatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The list of the body that an item belongs to, in body order. Serializes to its name in the store.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub(super) enum ItemKind {
    #[serde(rename = "application")]
    Application,
    /// An application known only from its reports, whose strategies are unknown. Unleash Edge rejects
    /// these, so they are sent apart from other applications.
    #[serde(rename = "instance")]
    ApplicationWithoutStrategies,
    #[serde(rename = "metric")]
    Metric,
    #[serde(rename = "impact")]
    ImpactMetric,
}

/// A serialized item of a body, stored with its JSON byte for byte.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Item {
    #[serde(rename = "part")]
    pub(super) kind: ItemKind,
    /// Number of evaluations that it counts.
    #[serde(rename = "count")]
    pub(super) evaluations: u64,
    pub(super) json: Box<RawValue>,
    /// For impact metrics: when each sample was reported, if known.
    #[serde(rename = "times", default, skip_serializing_if = "Vec::is_empty")]
    pub(super) reported_at: Vec<Option<Timestamp>>,
    /// Whether upstream rejected it as too large when it was alone in a body.
    #[serde(skip)]
    pub(super) was_too_large: bool,
}

impl Item {
    pub(super) fn new(kind: ItemKind, json: Box<RawValue>, evaluations: u64) -> Self {
        Self { kind, evaluations, json, reported_at: Vec::new(), was_too_large: false }
    }
}

/// The items of one request.
#[derive(Clone, Debug, Default)]
pub(super) struct Batch {
    items: Vec<Item>,
}

impl Batch {
    pub(super) fn new(items: Vec<Item>) -> Self {
        Self { items }
    }

    pub(super) fn items(&self) -> &[Item] {
        &self.items
    }

    /// Records that upstream rejected the batch as too large. True if it is a single item that was
    /// rejected before.
    pub(super) fn mark_too_large(&mut self) -> bool {
        match &mut self.items[..] {
            [item] => std::mem::replace(&mut item.was_too_large, true),
            _ => false,
        }
    }

    pub(super) fn into_items(self) -> Vec<Item> {
        self.items
    }

    /// Number of evaluations that it counts.
    pub(super) fn evaluations(&self) -> u64 {
        self.items.iter().fold(0, |sum, item| sum.saturating_add(item.evaluations))
    }

    /// Splits it into a batch of the first half and the remaining items.
    pub(super) fn split(mut self) -> (Self, Vec<Item>) {
        let back = self.items.split_off(self.items.len() / 2);
        (self, back)
    }

    /// Adds an empty list to applications with unknown strategies, for an upstream that requires one.
    /// False if there are no such applications.
    pub(super) fn add_empty_strategies(&mut self) -> bool {
        let mut any = false;
        for item in
            self.items.iter_mut().filter(|item| item.kind == ItemKind::ApplicationWithoutStrategies)
        {
            let open = item.json.get().strip_suffix('}').expect("an application is an object");
            let json = format!("{open},\"strategies\":[]}}");
            item.json = RawValue::from_string(json).expect("an object with one more field is JSON");
            item.kind = ItemKind::Application;
            any = true;
        }
        any
    }

    /// The body, with the items of each list in order.
    pub(super) fn body(&self) -> Bytes {
        let mut body = String::with_capacity(body_size(&self.items));
        body.push_str(BODY_START);
        self.push_items(
            &[ItemKind::Application, ItemKind::ApplicationWithoutStrategies],
            &mut body,
        );
        body.push_str(METRICS_START);
        self.push_items(&[ItemKind::Metric], &mut body);
        if self.items.iter().any(|item| item.kind == ItemKind::ImpactMetric) {
            body.push_str(IMPACT_START);
            self.push_items(&[ItemKind::ImpactMetric], &mut body);
        }
        body.push_str(BODY_END);
        body.into()
    }

    fn push_items(&self, parts: &[ItemKind], body: &mut String) {
        let mut comma = "";
        for item in self.items.iter().filter(|item| parts.contains(&item.kind)) {
            body.push_str(comma);
            body.push_str(item.json.get());
            comma = ",";
        }
    }
}

/// Collects items up to a size limit.
#[derive(Debug)]
pub(super) struct BatchBuilder {
    batch: Batch,
    size: usize,
    limit: usize,
}

impl BatchBuilder {
    pub(super) fn new(limit: usize) -> Self {
        Self { batch: Batch::default(), size: body_size(&[]), limit }
    }

    /// Adds an item. Returns it if the body would become too large, or if it belongs to another list
    /// than the items before: upstream rejects a request as a whole, and an invalid registration or
    /// impact metric must not cost counts.
    ///
    /// The first item only has to fit into [`MAX_BODY_BYTES`]; otherwise it could never be sent.
    pub(super) fn push(&mut self, item: Item) -> Result<(), Item> {
        let size = self.size + 1 + item.json.get().len();
        let (limit, fits) = match self.batch.items.first() {
            None => (MAX_BODY_BYTES, true),
            Some(first) => (self.limit, first.kind == item.kind),
        };
        if size > limit || !fits {
            return Err(item);
        }
        self.size = size;
        self.batch.items.push(item);
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.batch.items.is_empty()
    }

    /// The batch, if it has any items.
    pub(super) fn finish(self) -> Option<Batch> {
        (!self.batch.items.is_empty()).then_some(self.batch)
    }
}

/// The size of a body of these items, at most three commas too large.
fn body_size(items: &[Item]) -> usize {
    let fixed = BODY_START.len() + METRICS_START.len() + IMPACT_START.len() + BODY_END.len();
    items.iter().fold(fixed, |size, item| size + 1 + item.json.get().len())
}

/// The JSON of a value in upstream's format.
pub(super) fn to_raw_json(value: &impl Serialize) -> Box<RawValue> {
    to_raw_value(value).expect("wire types with text keys are JSON")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn item(part: ItemKind, length: usize) -> Item {
        Item::new(part, to_raw_json(&"x".repeat(length)), 1)
    }

    #[test]
    fn body_lists_applications_then_metrics_then_impact_metrics() {
        let check = |parts: &[ItemKind], expected: &str| {
            let items = parts.iter().map(|part| item(*part, 1)).collect();
            assert_eq!(Batch::new(items).body(), expected);
        };
        check(&[ItemKind::Metric], r#"{"applications":[],"metrics":["x"]}"#);
        check(
            &[ItemKind::Metric, ItemKind::ImpactMetric, ItemKind::Application, ItemKind::Metric],
            r#"{"applications":["x"],"metrics":["x","x"],"impactMetrics":["x"]}"#,
        );
    }

    #[test]
    fn item_larger_than_a_body_is_returned() {
        let mut builder = BatchBuilder::new(100);
        assert!(builder.push(item(ItemKind::Metric, MAX_BODY_BYTES)).is_err());
        assert!(builder.is_empty());
        assert!(builder.push(item(ItemKind::Metric, 1000)).is_ok());
        assert!(builder.push(item(ItemKind::Metric, 1)).is_err());
    }

    #[test]
    fn batch_contains_items_of_one_list() {
        let mut builder = BatchBuilder::new(MAX_BODY_BYTES);
        let parts = [
            ItemKind::Application,
            ItemKind::Application,
            ItemKind::ApplicationWithoutStrategies,
            ItemKind::Metric,
            ItemKind::ImpactMetric,
        ];
        let accepted = parts.map(|part| builder.push(item(part, 1)).is_ok());
        assert_eq!(accepted, [true, true, false, false, false]);
    }

    #[test]
    fn empty_strategies_turn_instances_into_applications() {
        let json = to_raw_json(&serde_json::json!({ "appName": "a" }));
        let mut batch =
            Batch::new(vec![Item::new(ItemKind::ApplicationWithoutStrategies, json, 0)]);
        assert_eq!(batch.body(), r#"{"applications":[{"appName":"a"}],"metrics":[]}"#);
        assert!(batch.add_empty_strategies());
        let body = r#"{"applications":[{"appName":"a","strategies":[]}],"metrics":[]}"#;
        assert_eq!(batch.body(), body);
        assert!(!batch.add_empty_strategies());
    }

    proptest! {
        #[test]
        fn no_body_is_larger_than_its_limit(
            lengths in prop::collection::vec(0_usize..3000, 1..200),
            limit in 4096..MAX_BODY_BYTES,
        ) {
            let mut builder = BatchBuilder::new(limit);
            let parts = [ItemKind::Application, ItemKind::Metric, ItemKind::ImpactMetric].into_iter().cycle();
            let mut refused = 0;
            for (length, part) in lengths.iter().zip(parts) {
                refused += usize::from(builder.push(item(part, *length)).is_err());
            }
            let batch = builder.finish().unwrap();
            prop_assert!(batch.body().len() <= limit);
            prop_assert_eq!(batch.items().len() + refused, lengths.len());
            prop_assert!(serde_json::from_slice::<serde_json::Value>(&batch.body()).is_ok());
        }
    }
}
