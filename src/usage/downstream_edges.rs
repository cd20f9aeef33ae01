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
    counter::MAX_NAME_BYTES,
    memory_pool::{MemoryPool, Reservation},
    usage_metrics,
};
use crate::{protocol::usage::EdgeInstance, token::TokenDigest};

/// The number of edges to track: each reserves at least this fraction of the pool.
const MAX_EDGES: usize = 1000;
/// Memory for the reports, in bytes.
const POOL_BYTES: usize = 8 * 1024 * 1024;
/// The largest report, in bytes of JSON.
const MAX_REPORT_BYTES: usize = 64 * 1024;
/// Time without a report after which an edge is removed; edges report every minute.
const EDGE_TTL: Duration = Duration::from_mins(10);

/// The edges that reported recently.
#[derive(Debug)]
pub(super) struct DownstreamEdges {
    by_key: Mutex<BTreeMap<EdgeKey, TrackedEdge>>,
    pool: MemoryPool,
}

/// The name that an edge chose, and its token.
type EdgeKey = (Arc<str>, TokenDigest);

#[derive(Debug)]
struct TrackedEdge {
    last_seen: Instant,
    /// The latest report as JSON.
    report: Box<str>,
    reservation: Reservation,
}

impl DownstreamEdges {
    pub(super) fn new() -> Self {
        Self { by_key: Mutex::default(), pool: MemoryPool::new(POOL_BYTES) }
    }

    /// Stores the report of an edge. False, and the previous report is kept, if it would exceed the
    /// token's quota.
    ///
    /// A report larger than [`MAX_REPORT_BYTES`] is dropped and counted.
    pub(super) fn record(&self, edge: &EdgeInstance, token: &TokenDigest, now: Instant) -> bool {
        let report: Box<str> = edge.value().to_string().into();
        if edge.identifier().len() > MAX_NAME_BYTES || report.len() > MAX_REPORT_BYTES {
            usage_metrics::count_dropped_items("edge_instance", 1);
            return true;
        }
        let key = (Arc::clone(edge.identifier()), *token);
        let size_of_edge = memory_size(&key, &report);
        let mut edges = self.lock();
        edges.retain(|_, edge| now.saturating_duration_since(edge.last_seen) < EDGE_TTL);
        if let Some(edge) = edges.get_mut(&key) {
            if !edge.reservation.try_resize(memory_size(&key, &edge.report), size_of_edge) {
                return false;
            }
            (edge.last_seen, edge.report) = (now, report);
            return true;
        }
        self.pool.remove_unused();
        let Some(reservation) = self.pool.quota_of(token).try_reserve(size_of_edge) else {
            return false;
        };
        edges.insert(key, TrackedEdge { last_seen: now, report, reservation });
        true
    }

    /// The latest reports, in order of the edges' names.
    pub(super) fn reports(&self) -> Vec<Value> {
        let report = |edge: &TrackedEdge| serde_json::from_str(&edge.report).unwrap_or_default();
        self.lock().values().map(report).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<EdgeKey, TrackedEdge>> {
        self.by_key.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes to reserve for an edge.
fn memory_size((identifier, _): &EdgeKey, report: &str) -> usize {
    let size = size_of::<(EdgeKey, TrackedEdge)>() + identifier.len() + report.len();
    size.max(POOL_BYTES / MAX_EDGES)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reports as an edge of this token, with `bytes` of content; whether it was accepted.
    fn record(
        edges: &DownstreamEdges,
        token: &str,
        identifier: &str,
        bytes: usize,
        now: Instant,
    ) -> bool {
        let body = serde_json::json!({ "identifier": identifier, "told": "x".repeat(bytes) });
        let edge = EdgeInstance::parse(body.to_string().as_bytes()).unwrap();
        edges.record(&edge, &TokenDigest::of(token), now)
    }

    #[test]
    fn edge_is_removed_when_it_stops_reporting() {
        let (edges, now) = (DownstreamEdges::new(), Instant::now());
        assert!(record(&edges, "token", "one", 1, now));
        assert!(record(&edges, "token", "two", 1, now + EDGE_TTL / 2));
        assert_eq!(edges.reports().len(), 2);
        assert!(record(&edges, "token", "two", 2, now + EDGE_TTL));
        assert_eq!(edges.reports(), [serde_json::json!({ "identifier": "two", "told": "xx" })]);
    }

    #[test]
    fn edges_of_one_token_leave_room_for_other_tokens() {
        let (edges, now) = (DownstreamEdges::new(), Instant::now());
        let flood = |token: &str| {
            let names = (0..2 * MAX_EDGES).map(|name| name.to_string());
            names.take_while(|name| record(&edges, token, name, 1, now)).count()
        };
        assert_eq!([flood("flood"), flood("second"), flood("third")], [800, 160, 32]);
        assert_eq!(edges.reports().len(), 800 + 160 + 32);
        let later = now + EDGE_TTL;
        assert!(record(&edges, "flood", "later", 1, later));
        assert_eq!(edges.reports().len(), 1);
    }

    #[test]
    fn tracked_edge_reserves_only_the_growth_of_its_report() {
        let (edges, now) = (DownstreamEdges::new(), Instant::now());
        let large = MAX_REPORT_BYTES - 100;
        let names = (0..MAX_EDGES).map(|name| name.to_string());
        let accepted = names.take_while(|name| record(&edges, "token", name, large, now)).count();
        assert!((100..110).contains(&accepted), "{accepted}");
        assert!(record(&edges, "token", "0", large, now));
        assert!(record(&edges, "token", "0", 1, now));
        assert!(record(&edges, "token", "0", large, now));
        assert_eq!(edges.reports().len(), accepted);
    }

    #[test]
    fn edge_does_not_replace_same_named_edge_of_another_token() {
        let (edges, now) = (DownstreamEdges::new(), Instant::now());
        assert!(record(&edges, "token", "one", 1, now) && record(&edges, "other", "one", 2, now));
        assert_eq!(edges.reports().len(), 2);
    }
}
