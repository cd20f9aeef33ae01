//! Bodies for upstream's `/metrics/bulk`, assembled from serialized items of known size.

use bytes::Bytes;
use jiff::Timestamp;

/// The largest body to send, in bytes. Upstream's limit is 100 KiB, excluding headers.
pub(super) const MAX_BODY: usize = 95 * 1024;
/// Fixed parts of the body around the items.
const OPEN: &str = r#"{"applications":["#;
const METRICS: &str = r#"],"metrics":["#;
const IMPACT: &str = r#"],"impactMetrics":["#;
const CLOSE: &str = "]}";

/// The list of the body that an item belongs to, in body order.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Part {
    Application,
    /// An application known only from its reports, whose strategies are unknown. Unleash Edge rejects
    /// these, so they are sent apart from other applications.
    Instance,
    Metric,
    Impact,
}

/// A serialized item of a body.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Item {
    pub(super) part: Part,
    pub(super) json: Box<str>,
    /// Number of evaluations that it counts.
    pub(super) count: u64,
    /// Whether upstream rejected it as too large when it was alone in a body.
    pub(super) refused: bool,
    /// For impact metrics: when each sample was reported, if known.
    pub(super) times: Vec<Option<Timestamp>>,
}

impl Item {
    pub(super) fn new(part: Part, json: Box<str>, count: u64) -> Self {
        Self { part, json, count, refused: false, times: Vec::new() }
    }
}

/// The items of one request.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Batch {
    items: Vec<Item>,
}

impl Batch {
    pub(super) fn of(items: Vec<Item>) -> Self {
        Self { items }
    }

    pub(super) fn items(&self) -> &[Item] {
        &self.items
    }

    /// Records that upstream rejected the batch as too large. True if it is a single item that was
    /// rejected before.
    pub(super) fn refuse(&mut self) -> bool {
        match &mut self.items[..] {
            [item] => std::mem::replace(&mut item.refused, true),
            _ => false,
        }
    }

    pub(super) fn into_items(self) -> Vec<Item> {
        self.items
    }

    /// Number of evaluations that it counts.
    pub(super) fn count(&self) -> u64 {
        self.items.iter().fold(0, |sum, item| sum.saturating_add(item.count))
    }

    /// Number of its items that are impact metrics.
    pub(super) fn impact(&self) -> usize {
        self.items.iter().filter(|item| item.part == Part::Impact).count()
    }

    /// Splits it into a batch of the first half and the remaining items.
    pub(super) fn halves(mut self) -> (Self, Vec<Item>) {
        let back = self.items.split_off(self.items.len() / 2);
        (self, back)
    }

    /// Adds an empty list to applications with unknown strategies, for an upstream that requires one.
    /// False if there are no such applications.
    pub(super) fn list_no_strategies(&mut self) -> bool {
        let mut any = false;
        for item in self.items.iter_mut().filter(|item| item.part == Part::Instance) {
            let open = item.json.strip_suffix('}').expect("an application is an object");
            item.json = format!("{open},\"strategies\":[]}}").into();
            item.part = Part::Application;
            any = true;
        }
        any
    }

    /// The body, with the items of each list in order.
    pub(super) fn body(&self) -> Bytes {
        let mut body = String::with_capacity(size(&self.items));
        body.push_str(OPEN);
        self.list(&[Part::Application, Part::Instance], &mut body);
        body.push_str(METRICS);
        self.list(&[Part::Metric], &mut body);
        if self.items.iter().any(|item| item.part == Part::Impact) {
            body.push_str(IMPACT);
            self.list(&[Part::Impact], &mut body);
        }
        body.push_str(CLOSE);
        body.into()
    }

    fn list(&self, parts: &[Part], body: &mut String) {
        let mut comma = "";
        for item in self.items.iter().filter(|item| parts.contains(&item.part)) {
            body.push_str(comma);
            body.push_str(&item.json);
            comma = ",";
        }
    }
}

/// Collects items up to a size limit.
#[derive(Debug)]
pub(super) struct Packer {
    batch: Batch,
    size: usize,
    limit: usize,
}

impl Packer {
    pub(super) fn new(limit: usize) -> Self {
        Self { batch: Batch::default(), size: size(&[]), limit }
    }

    /// Adds an item. Returns it if the body would become too large, or if it belongs to another list
    /// than the items before: upstream rejects a request as a whole, and an invalid registration or
    /// impact metric must not cost counts.
    ///
    /// The first item only has to fit into [`MAX_BODY_BYTES`]; otherwise it could never be sent.
    pub(super) fn push(&mut self, item: Item) -> Result<(), Item> {
        let size = self.size + 1 + item.json.len();
        let (limit, fits) = match self.batch.items.first() {
            None => (MAX_BODY, true),
            Some(first) => (self.limit, first.part == item.part),
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
fn size(items: &[Item]) -> usize {
    let fixed = OPEN.len() + METRICS.len() + IMPACT.len() + CLOSE.len();
    items.iter().fold(fixed, |size, item| size + 1 + item.json.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn item(part: Part, length: usize) -> Item {
        Item::new(part, format!("\"{}\"", "x".repeat(length)).into(), 1)
    }

    #[test]
    fn body_lists_applications_then_metrics_then_impact_metrics() {
        let check = |parts: &[Part], expected: &str| {
            let items = parts.iter().map(|part| item(*part, 1)).collect();
            assert_eq!(Batch::of(items).body(), expected);
        };
        check(&[Part::Metric], r#"{"applications":[],"metrics":["x"]}"#);
        check(
            &[Part::Metric, Part::Impact, Part::Application, Part::Metric],
            r#"{"applications":["x"],"metrics":["x","x"],"impactMetrics":["x"]}"#,
        );
    }

    #[test]
    fn item_larger_than_a_body_is_returned() {
        let mut packer = Packer::new(100);
        assert!(packer.push(item(Part::Metric, MAX_BODY)).is_err());
        assert!(packer.is_empty());
        assert!(packer.push(item(Part::Metric, 1000)).is_ok());
        assert!(packer.push(item(Part::Metric, 1)).is_err());
    }

    #[test]
    fn batch_contains_items_of_one_list() {
        let mut packer = Packer::new(MAX_BODY);
        let parts =
            [Part::Application, Part::Application, Part::Instance, Part::Metric, Part::Impact];
        let accepted = parts.map(|part| packer.push(item(part, 1)).is_ok());
        assert_eq!(accepted, [true, true, false, false, false]);
    }

    #[test]
    fn empty_strategies_turn_instances_into_applications() {
        let json: Box<str> = r#"{"appName":"a"}"#.into();
        let mut batch = Batch::of(vec![Item::new(Part::Instance, json, 0)]);
        assert_eq!(batch.body(), r#"{"applications":[{"appName":"a"}],"metrics":[]}"#);
        assert!(batch.list_no_strategies());
        let body = r#"{"applications":[{"appName":"a","strategies":[]}],"metrics":[]}"#;
        assert_eq!(batch.body(), body);
        assert!(!batch.list_no_strategies());
    }

    proptest! {
        #[test]
        fn no_body_is_larger_than_its_limit(
            lengths in prop::collection::vec(0_usize..3000, 1..200),
            limit in 4096..MAX_BODY,
        ) {
            let mut packer = Packer::new(limit);
            let parts = [Part::Application, Part::Metric, Part::Impact].into_iter().cycle();
            let mut refused = 0;
            for (length, part) in lengths.iter().zip(parts) {
                refused += usize::from(packer.push(item(part, *length)).is_err());
            }
            let batch = packer.finish().unwrap();
            prop_assert!(batch.body().len() <= limit);
            prop_assert_eq!(batch.items().len() + refused, lengths.len());
            prop_assert!(serde_json::from_slice::<serde_json::Value>(&batch.body()).is_ok());
        }
    }
}
