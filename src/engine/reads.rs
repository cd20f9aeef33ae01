//! What a flag's answer depends on, for those who cache it.

use jiff::Timestamp;

use super::context::{Bound, FieldId};

/// Whatever can change the outcome of one flag, its parents and segments included.
#[derive(Debug, Clone, Default)]
pub struct Reads {
    fields: Vec<FieldId>,
    /// Each is one source of chance, which draws only where all its fields are missing or empty.
    chances: Vec<Vec<FieldId>>,
    changes: Vec<Timestamp>,
}

impl Reads {
    /// The context fields whose values matter, sorted.
    pub fn fields(&self) -> &[FieldId] {
        &self.fields
    }

    /// Whether evaluating the flag for this context may draw lots, so that the answer holds once.
    pub fn is_random(&self, bound: &Bound<'_>) -> bool {
        let known = |&field: &FieldId| bound.text(field).is_some_and(|text| !text.is_empty());
        self.chances.iter().any(|fields| !fields.iter().any(known))
    }

    /// The first instant after `after` at which the answer may change by itself.
    pub fn next_change(&self, after: Timestamp) -> Option<Timestamp> {
        let later = self.changes.partition_point(|&change| change <= after);
        self.changes.get(later).copied()
    }

    /// Whether nothing matters: the flag has the same outcome for everybody, always.
    pub fn is_empty(&self) -> bool {
        self.fields.is_empty() && self.chances.is_empty() && self.changes.is_empty()
    }

    pub(super) fn field(&mut self, field: FieldId) {
        self.fields.push(field);
    }

    pub(super) fn chance(&mut self, unless: &[FieldId]) {
        self.fields.extend(unless);
        self.chances.push(unless.to_vec());
    }

    pub(super) fn change(&mut self, at: Timestamp) {
        self.changes.push(at);
    }

    pub(super) fn all_of(&mut self, other: &Self) {
        self.fields.extend(&other.fields);
        self.chances.extend_from_slice(&other.chances);
        self.changes.extend(&other.changes);
    }

    /// Puts everything in order and drops repetitions.
    pub(super) fn finish(mut self) -> Self {
        self.fields.sort_unstable();
        self.fields.dedup();
        self.chances.sort_unstable();
        self.chances.dedup();
        self.changes.sort_unstable();
        self.changes.dedup();
        self
    }
}
