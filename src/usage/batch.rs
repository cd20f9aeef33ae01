//! Bodies for upstream's `/metrics/bulk`, put together from ready pieces of measured size.

use bytes::Bytes;
use jiff::Timestamp;

/// The largest body that is sent: upstream's limit is 100 KiB, and headers are not counted there.
pub(super) const MAX_BODY: usize = 95 * 1024;
/// What surrounds the pieces.
const OPEN: &str = r#"{"applications":["#;
const METRICS: &str = r#"],"metrics":["#;
const IMPACT: &str = r#"],"impactMetrics":["#;
const CLOSE: &str = "]}";

/// Which list of the body a piece belongs to, in their order.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Part {
    Application,
    /// An application of which only reports are known, and not its strategies. Unleash Edge refuses
    /// such, which shall not cost others.
    Instance,
    Metric,
    Impact,
}

/// A piece of a body, serialised.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Item {
    pub(super) part: Part,
    pub(super) json: Box<str>,
    /// How many evaluations it counts.
    pub(super) count: u64,
    /// Whether upstream has found it too large, alone in a body.
    pub(super) refused: bool,
    /// Of impact metrics: when each sample was reported, if that is known.
    pub(super) times: Vec<Option<Timestamp>>,
}

impl Item {
    pub(super) fn new(part: Part, json: Box<str>, count: u64) -> Self {
        Self { part, json, count, refused: false, times: Vec::new() }
    }
}

/// The pieces of one request.
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

    /// Notes that upstream found it too large; true if it is one piece that was refused before.
    pub(super) fn refuse(&mut self) -> bool {
        match &mut self.items[..] {
            [item] => std::mem::replace(&mut item.refused, true),
            _ => false,
        }
    }

    pub(super) fn into_items(self) -> Vec<Item> {
        self.items
    }

    /// How many evaluations it counts.
    pub(super) fn count(&self) -> u64 {
        self.items.iter().fold(0, |sum, item| sum.saturating_add(item.count))
    }

    /// How many of its pieces are impact metrics.
    pub(super) fn impact(&self) -> usize {
        self.items.iter().filter(|item| item.part == Part::Impact).count()
    }

    /// The first half of the pieces as a batch, and the others.
    pub(super) fn halves(mut self) -> (Self, Vec<Item>) {
        let back = self.items.split_off(self.items.len() / 2);
        (self, back)
    }

    /// Gives the applications of unknown strategies an empty list, for an upstream that insists on
    /// one; false where there are none.
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

    /// The body, the pieces of each list in their order.
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

/// Gathers pieces up to a size.
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

    /// Takes a piece, or gives it back when the body would be too large with it, or when it belongs
    /// to another list than those before: upstream refuses a request whole, and neither a
    /// registration nor an impact metric that it dislikes shall cost counts.
    ///
    /// The first piece only has to fit into [`MAX_BODY`], else it could never be sent.
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

    /// The batch, if there is anything in it.
    pub(super) fn finish(self) -> Option<Batch> {
        (!self.batch.items.is_empty()).then_some(self.batch)
    }
}

/// The size of a body of these pieces, with at most three commas too many.
fn size(items: &[Item]) -> usize {
    let around = OPEN.len() + METRICS.len() + IMPACT.len() + CLOSE.len();
    items.iter().fold(around, |size, item| size + 1 + item.json.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn item(part: Part, length: usize) -> Item {
        Item::new(part, format!("\"{}\"", "x".repeat(length)).into(), 1)
    }

    #[test]
    fn a_body_lists_applications_then_metrics_then_impact_metrics() {
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
    fn a_piece_that_could_never_be_sent_is_given_back() {
        let mut packer = Packer::new(100);
        assert!(packer.push(item(Part::Metric, MAX_BODY)).is_err());
        assert!(packer.is_empty());
        assert!(packer.push(item(Part::Metric, 1000)).is_ok());
        assert!(packer.push(item(Part::Metric, 1)).is_err());
    }

    #[test]
    fn a_batch_gathers_pieces_of_one_list() {
        let mut packer = Packer::new(MAX_BODY);
        let parts =
            [Part::Application, Part::Application, Part::Instance, Part::Metric, Part::Impact];
        let taken = parts.map(|part| packer.push(item(part, 1)).is_ok());
        assert_eq!(taken, [true, true, false, false, false]);
    }

    #[test]
    fn instances_are_applications_that_can_be_given_an_empty_list() {
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
