//! Tracks the state that downstream edges report about themselves, for operators.
//!
//! An edge is identified by the name that it chose and its token. No token can replace the report of
//! another token's edge or use its memory quota. An edge that stops reporting is removed.
//!
//! The usage that edges report is not stored here.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    counter::MAX_NAME,
    meter,
    pool::{Charge, Pool},
};
use crate::{token::TokenDigest, wire::usage::EdgeInstance};

/// The number of edges to track: each reserves at least this fraction of the pool.
const MAX_EDGES: usize = 1000;
/// Memory for the reports, in bytes.
const EDGE_BYTES: usize = 8 * 1024 * 1024;
/// The largest report, in bytes of JSON.
const MAX_EDGE: usize = 64 * 1024;
/// Time without a report after which an edge is removed; edges report every minute.
const FORGET_EDGE: Duration = Duration::from_mins(10);

/// The edges that reported recently.
#[derive(Debug)]
pub(super) struct Edges {
    held: Mutex<BTreeMap<Key, Edge>>,
    bytes: Pool,
}

/// The name that an edge chose, and its token.
type Key = (Arc<str>, TokenDigest);

#[derive(Debug)]
struct Edge {
    seen: Instant,
    /// The latest report as JSON.
    told: Box<str>,
    charge: Charge,
}

impl Edges {
    pub(super) fn new() -> Self {
        Self { held: Mutex::default(), bytes: Pool::new(EDGE_BYTES) }
    }

    /// Stores the report of an edge. False, and the previous report is kept, if it would exceed the
    /// token's quota.
    ///
    /// A report larger than [`MAX_REPORT_BYTES`] is dropped and counted.
    pub(super) fn record(&self, edge: &EdgeInstance, token: &TokenDigest, now: Instant) -> bool {
        let report: Box<str> = edge.value().to_string().into();
        if edge.identifier().len() > MAX_NAME || report.len() > MAX_EDGE {
            meter::items_dropped("edge_instance", 1);
            return true;
        }
        let key = (Arc::clone(edge.identifier()), *token);
        let size_of_edge = size(&key, &report);
        let mut edges = self.lock();
        edges.retain(|_, edge| now.saturating_duration_since(edge.seen) < FORGET_EDGE);
        if let Some(edge) = edges.get_mut(&key) {
            if !edge.charge.try_replace(size(&key, &edge.told), size_of_edge) {
                return false;
            }
            (edge.seen, edge.told) = (now, report);
            return true;
        }
        self.bytes.sweep();
        let Some(reservation) = self.bytes.account(token).try_charge(size_of_edge) else {
            return false;
        };
        edges.insert(key, Edge { seen: now, told: report, charge: reservation });
        true
    }

    /// The latest reports, in order of the edges' names.
    pub(super) fn told(&self) -> Vec<Value> {
        let report = |edge: &Edge| serde_json::from_str(&edge.told).unwrap_or_default();
        self.lock().values().map(report).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Edge>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes to reserve for an edge.
fn size((identifier, _): &Key, report: &str) -> usize {
    let size = size_of::<(Key, Edge)>() + identifier.len() + report.len();
    size.max(EDGE_BYTES / MAX_EDGES)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reports as an edge of this token, with `bytes` of content; whether it was accepted.
    fn record(edges: &Edges, token: &str, identifier: &str, bytes: usize, now: Instant) -> bool {
        let body = serde_json::json!({ "identifier": identifier, "told": "x".repeat(bytes) });
        let edge = EdgeInstance::parse(body.to_string().as_bytes()).unwrap();
        edges.record(&edge, &TokenDigest::of(token), now)
    }

    #[test]
    fn edge_is_removed_when_it_stops_reporting() {
        let (edges, now) = (Edges::new(), Instant::now());
        assert!(record(&edges, "token", "one", 1, now));
        assert!(record(&edges, "token", "two", 1, now + FORGET_EDGE / 2));
        assert_eq!(edges.told().len(), 2);
        assert!(record(&edges, "token", "two", 2, now + FORGET_EDGE));
        assert_eq!(edges.told(), [serde_json::json!({ "identifier": "two", "told": "xx" })]);
    }

    #[test]
    fn edges_of_one_token_leave_room_for_other_tokens() {
        let (edges, now) = (Edges::new(), Instant::now());
        let flood = |token: &str| {
            let names = (0..2 * MAX_EDGES).map(|name| name.to_string());
            names.take_while(|name| record(&edges, token, name, 1, now)).count()
        };
        assert_eq!([flood("flood"), flood("second"), flood("third")], [800, 160, 32]);
        assert_eq!(edges.told().len(), 800 + 160 + 32);
        let later = now + FORGET_EDGE;
        assert!(record(&edges, "flood", "later", 1, later));
        assert_eq!(edges.told().len(), 1);
    }

    #[test]
    fn tracked_edge_reserves_only_the_growth_of_its_report() {
        let (edges, now) = (Edges::new(), Instant::now());
        let large = MAX_EDGE - 100;
        let names = (0..MAX_EDGES).map(|name| name.to_string());
        let accepted = names.take_while(|name| record(&edges, "token", name, large, now)).count();
        assert!((100..110).contains(&accepted), "{accepted}");
        assert!(record(&edges, "token", "0", large, now));
        assert!(record(&edges, "token", "0", 1, now));
        assert!(record(&edges, "token", "0", large, now));
        assert_eq!(edges.told().len(), accepted);
    }

    #[test]
    fn edge_does_not_replace_same_named_edge_of_another_token() {
        let (edges, now) = (Edges::new(), Instant::now());
        assert!(record(&edges, "token", "one", 1, now) && record(&edges, "other", "one", 2, now));
        assert_eq!(edges.told().len(), 2);
    }
}
