//! The parts of a document whose states change independently, and hashes of these states.
//!
//! Pure.

use std::{collections::HashMap, sync::Arc};

use xxhash_rust::xxh3::xxh3_128;

use crate::protocol::features::Document;

/// A part of a document whose state changes independently.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) enum DocumentPart {
    /// All flags of a project.
    Project(Arc<str>),
    /// A segment, by its id.
    Segment(i64),
}

/// A hash of a document part; [`EMPTY_STATE`] if the document has no flag of the project.
pub(super) type StateHash = u128;

pub(super) const EMPTY_STATE: StateHash = 0;

/// The state of each project and segment of a document.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct PartHashes(pub(super) HashMap<DocumentPart, StateHash>);

impl PartHashes {
    /// Hashes a document, in time linear in its text.
    pub(super) fn from_document(document: &Document) -> Self {
        let mut states = HashMap::<DocumentPart, StateHash>::new();
        for feature in document.features() {
            let hash = xxh3_128(feature.raw().as_bytes());
            let part = DocumentPart::Project(Arc::clone(feature.project()));
            // Flag names are unique, so the sum does not depend on their order.
            let state = states.entry(part).or_default();
            *state = state.wrapping_add(hash);
        }
        for segment in document.segments() {
            states.insert(DocumentPart::Segment(segment.id()), xxh3_128(segment.raw().as_bytes()));
        }
        Self(states)
    }
}
