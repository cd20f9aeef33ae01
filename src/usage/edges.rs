//! What edges behind this one tell of themselves, for an operator to see.
//!
//! An edge is known by the name that it chose and the token that it shows: no token can replace what is kept for
//! another one's edge, nor use its share of the memory. An edge that is silent is forgotten.
//!
//! What edges count is not kept here.

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

/// How many edges are remembered: each is charged with at least this part of the memory.
const MAX_EDGES: usize = 1000;
/// The memory for what they tell, in bytes.
const EDGE_BYTES: usize = 8 * 1024 * 1024;
/// How much an edge may tell, in bytes of JSON.
const MAX_EDGE: usize = 64 * 1024;
/// After which time an edge that is silent is forgotten; they report every minute.
const FORGET_EDGE: Duration = Duration::from_mins(10);

/// The edges that reported lately.
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
    /// JSON.
    told: Box<str>,
    charge: Charge,
}

impl Edges {
    pub(super) fn new() -> Self {
        Self { held: Mutex::default(), bytes: Pool::new(EDGE_BYTES) }
    }

    /// Remembers what an edge tells; false, and what it told before stays, when its token has no room for it.
    ///
    /// A report that is too large by itself is dropped and counted.
    pub(super) fn record(&self, edge: &EdgeInstance, token: &TokenDigest, now: Instant) -> bool {
        let told: Box<str> = edge.value().to_string().into();
        if edge.identifier().len() > MAX_NAME || told.len() > MAX_EDGE {
            meter::items_dropped("edge_instance", 1);
            return true;
        }
        let key = (Arc::clone(edge.identifier()), *token);
        let size_of_edge = size(&key, &told);
        let mut held = self.held();
        held.retain(|_, edge| now.saturating_duration_since(edge.seen) < FORGET_EDGE);
        if let Some(edge) = held.get_mut(&key) {
            if !edge.charge.try_replace(size(&key, &edge.told), size_of_edge) {
                return false;
            }
            (edge.seen, edge.told) = (now, told);
            return true;
        }
        self.bytes.sweep();
        let Some(charge) = self.bytes.account(token).try_charge(size_of_edge) else { return false };
        held.insert(key, Edge { seen: now, told, charge });
        true
    }

    /// What they last told, by their names.
    pub(super) fn told(&self) -> Vec<Value> {
        let told = |edge: &Edge| serde_json::from_str(&edge.told).unwrap_or_default();
        self.held().values().map(told).collect()
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<Key, Edge>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The memory that an edge is charged with, in bytes.
fn size((identifier, _): &Key, told: &str) -> usize {
    let size = size_of::<(Key, Edge)>() + identifier.len() + told.len();
    size.max(EDGE_BYTES / MAX_EDGES)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reports as an edge of a token that tells this much in bytes; whether there was room.
    fn record(edges: &Edges, token: &str, identifier: &str, bytes: usize, now: Instant) -> bool {
        let body = serde_json::json!({ "identifier": identifier, "told": "x".repeat(bytes) });
        let edge = EdgeInstance::parse(body.to_string().as_bytes()).unwrap();
        edges.record(&edge, &TokenDigest::of(token), now)
    }

    #[test]
    fn edges_are_remembered_while_they_report() {
        let (edges, now) = (Edges::new(), Instant::now());
        assert!(record(&edges, "token", "one", 1, now));
        assert!(record(&edges, "token", "two", 1, now + FORGET_EDGE / 2));
        assert_eq!(edges.told().len(), 2);
        assert!(record(&edges, "token", "two", 2, now + FORGET_EDGE));
        assert_eq!(edges.told(), [serde_json::json!({ "identifier": "two", "told": "xx" })]);
    }

    #[test]
    fn edges_of_one_token_leave_room_for_those_of_others() {
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
    fn known_edge_needs_no_more_room_than_it_tells_more() {
        let (edges, now) = (Edges::new(), Instant::now());
        let large = MAX_EDGE - 100;
        let names = (0..MAX_EDGES).map(|name| name.to_string());
        let taken = names.take_while(|name| record(&edges, "token", name, large, now)).count();
        assert!((100..110).contains(&taken), "{taken}");
        assert!(record(&edges, "token", "0", large, now));
        assert!(record(&edges, "token", "0", 1, now));
        assert!(record(&edges, "token", "0", large, now));
        assert_eq!(edges.told().len(), taken);
    }

    #[test]
    fn edge_of_one_token_does_not_replace_that_of_another() {
        let (edges, now) = (Edges::new(), Instant::now());
        assert!(record(&edges, "token", "one", 1, now) && record(&edges, "other", "one", 2, now));
        assert_eq!(edges.told().len(), 2);
    }
}
