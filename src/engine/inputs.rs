//! The inputs that the outcomes of flags depend on, from which cache keys are made.
//!
//! Flags use little of a context: whether a value is in a list, the bucket of an identifier, whether a
//! date has passed. A cache key has only these, so that users who differ in other fields share results.
//! Keys have the values themselves and no hashes: contexts come from untrusted clients, and a collision
//! must not give one user the flags of another. This module does not cache anything.

use jiff::Timestamp;
use smallvec::SmallVec;

use super::context::{ContextSchema, ContextValues, FieldId};

/// Everything that some flags read from a context, as bytes. Up to 256 bytes need no allocation.
pub type ContextKey = SmallVec<[u8; 256]>;

/// Everything that can change the outcomes of some flags, including their parents and segments.
#[derive(Debug, Clone, Default)]
pub struct EvaluationInputs {
    field_uses: Vec<FieldUse>,
    /// Each is a random draw that happens only if all of its fields are missing or empty.
    random_sources: Vec<Box<[FieldId]>>,
    /// The times at which an outcome may change.
    time_boundaries: Vec<Timestamp>,
}

/// How flags use one field.
#[derive(Debug, Clone, Copy)]
struct FieldUse {
    field: FieldId,
    /// Flags compare the field with texts for equality.
    membership: bool,
    /// Flags test whether the field is present and not empty.
    presence: bool,
    /// Flags use the full text, which implies the other two.
    text: TextUse,
}

/// How much of a field's value matters for the outcomes of some flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relevance {
    /// The value does not matter.
    None,
    /// Only its presence matters, and which of the texts in flags it equals.
    Membership,
    /// The full text matters.
    Text,
}

/// When the full text of a field matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TextUse {
    Never,
    /// If all of these fields, which are inputs as well, are missing or empty.
    WhenMissing(&'static [FieldId]),
    Always,
}

impl EvaluationInputs {
    /// The context fields whose values matter, in the order of their ids.
    pub fn fields(&self) -> impl Iterator<Item = FieldId> {
        self.field_uses.iter().map(|it| it.field)
    }

    /// How much of this field's value matters. `lacks` returns whether a field of the context is missing
    /// or empty; if the caller does not know, it returns true.
    pub fn relevance(&self, field: FieldId, lacks: impl Fn(FieldId) -> bool) -> Relevance {
        let Ok(at) = self.field_uses.binary_search_by_key(&field, |it| it.field) else {
            return Relevance::None;
        };
        let it = &self.field_uses[at];
        if it.needs_full_text(lacks) {
            Relevance::Text
        } else if it.membership || it.presence {
            Relevance::Membership
        } else {
            Relevance::None
        }
    }

    /// Whether the time of the evaluation matters, unless the context has its own.
    pub fn is_time_dependent(&self) -> bool {
        !self.time_boundaries.is_empty()
    }

    /// Whether outcomes are valid for one evaluation only for at least one context: because they are
    /// random, or because they read the text of a `sessionId`, which may be generated.
    pub fn can_be_random(&self) -> bool {
        let session = || self.relevance(FieldId::SESSION_ID, |_| true) == Relevance::Text;
        !self.random_sources.is_empty() || session()
    }

    /// Whether the outcomes for this context are valid for one evaluation only: because they may be
    /// random, or because they read a generated `sessionId`.
    pub fn is_random_for(&self, values: &ContextValues<'_>) -> bool {
        let session = FieldId::SESSION_ID;
        let depends_on_session = || {
            self.relevance(session, |field| values.is_missing_or_empty(field)) == Relevance::Text
        };
        self.random_sources
            .iter()
            .any(|fields| fields.iter().all(|&field| values.is_missing_or_empty(field)))
            || (values.is_generated(session) && depends_on_session())
    }

    /// The first time after `after` at which an outcome may change without a change of flags.
    pub fn next_change(&self, after: Timestamp) -> Option<Timestamp> {
        self.time_boundaries.get(self.time_window_index(after)).copied()
    }

    /// Whether the outcomes are the same for every context at any time.
    pub fn is_empty(&self) -> bool {
        self.field_uses.is_empty()
            && self.random_sources.is_empty()
            && self.time_boundaries.is_empty()
    }

    /// Its approximate memory in bytes.
    pub fn memory_size(&self) -> usize {
        let chances = self.random_sources.iter().map(|it| size_of_val(it) + size_of_val(&**it));
        size_of_val(&*self.field_uses)
            + size_of_val(&*self.time_boundaries)
            + chances.sum::<usize>()
    }

    /// The number of time boundaries up to `now`, which identifies the interval between two of them.
    fn time_window_index(&self, now: Timestamp) -> usize {
        self.time_boundaries.partition_point(|&change| change <= now)
    }

    /// Appends everything that the flags read from a context to `key`. The flags have equal outcomes for
    /// contexts with equal keys, unless they are random.
    ///
    /// The time is represented by its interval between two time boundaries. A cached result is found
    /// until the next boundary, and again if the clock is set back.
    pub(super) fn write_context_key(
        &self,
        schema: &ContextSchema,
        values: &ContextValues<'_>,
        key: &mut ContextKey,
    ) {
        for it in &self.field_uses {
            let value = values.text(it.field);
            let in_full = it.needs_full_text(|field| values.is_missing_or_empty(field));
            // The key has no tag for the form that follows. It is determined by the `others`, which come
            // earlier in every list of identifiers and are written in full.
            if in_full {
                push_varint(key, value.map_or(0, |text| text.len() + 1));
                key.extend_from_slice(value.unwrap_or_default().as_bytes());
                continue;
            }
            if it.presence {
                key.push(u8::from(!values.is_missing_or_empty(it.field)));
            }
            if it.membership {
                push_varint(
                    key,
                    value.and_then(|text| schema.string_index(text)).map_or(0, |index| index + 1),
                );
            }
        }
        if self.is_time_dependent() {
            push_varint(
                key,
                values.evaluation_time().map_or(0, |clock| self.time_window_index(clock) + 1),
            );
        }
    }

    /// Adds a field that is compared for equality with interned strings.
    pub(super) fn add_membership(&mut self, field: FieldId) {
        self.field_uses.push(FieldUse {
            field,
            membership: true,
            presence: false,
            text: TextUse::Never,
        });
    }

    /// Adds a field of which only presence matters, that is whether it is present and not empty.
    pub(super) fn add_presence(&mut self, field: FieldId) {
        self.field_uses.push(FieldUse {
            field,
            membership: false,
            presence: true,
            text: TextUse::Never,
        });
    }

    /// Adds a field of which the full text matters.
    pub(super) fn add_text(&mut self, field: FieldId) {
        self.field_uses.push(FieldUse {
            field,
            membership: false,
            presence: false,
            text: TextUse::Always,
        });
    }

    /// Adds fields of which the first that is present and not empty matters. Their ids ascend.
    pub(super) fn add_first_of(&mut self, fields: &'static [FieldId]) {
        for (place, &field) in fields.iter().enumerate() {
            let text =
                if place == 0 { TextUse::Always } else { TextUse::WhenMissing(&fields[..place]) };
            self.field_uses.push(FieldUse { field, membership: false, presence: false, text });
        }
    }

    /// Adds a random draw that happens if all of these fields are missing or empty. The fields must be
    /// added separately.
    pub(super) fn add_random_source(&mut self, without: &[FieldId]) {
        self.random_sources.push(without.into());
    }

    /// Adds a time at which an outcome may change.
    pub(super) fn add_time_boundary(&mut self, at: Timestamp) {
        self.time_boundaries.push(at);
    }

    /// Sorts and merges the inputs.
    pub(super) fn normalize(mut self) -> Self {
        self.field_uses.sort_by_key(|it| it.field);
        self.field_uses.dedup_by(|next, merged| merged.merge(*next));
        self.random_sources.sort_unstable();
        self.random_sources.dedup();
        self.time_boundaries.sort_unstable();
        self.time_boundaries.dedup();
        self
    }
}

impl FieldUse {
    /// Whether the full text matters. `lacks` returns whether a field is missing or empty.
    fn needs_full_text(&self, lacks: impl Fn(FieldId) -> bool) -> bool {
        match self.text {
            TextUse::Never => false,
            TextUse::WhenMissing(others) => others.iter().all(|&other| lacks(other)),
            TextUse::Always => true,
        }
    }

    /// Merges `other` into this if it is for the same field, and returns whether it is.
    fn merge(&mut self, other: Self) -> bool {
        if self.field != other.field {
            return false;
        }
        self.membership |= other.membership;
        self.presence |= other.presence;
        self.text = match (self.text, other.text) {
            (TextUse::Never, text) | (text, TextUse::Never) => text,
            (ours, theirs) if ours == theirs => ours,
            _ => TextUse::Always,
        };
        true
    }
}

/// Writes seven bits per byte, with the eighth set in all but the last (LEB128). Most lengths and
/// indexes take one byte.
fn push_varint(key: &mut ContextKey, mut number: usize) {
    while number > 0x7f {
        key.push(low_byte(number) | 0x80);
        number >>= 7;
    }
    key.push(low_byte(number));
}

fn low_byte(number: usize) -> u8 {
    number.to_le_bytes()[0]
}
