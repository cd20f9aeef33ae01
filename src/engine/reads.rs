//! The inputs that the outcomes of flags depend on, from which cache keys are made.
//!
//! Flags use little of a context: whether a value is in a list, the bucket of an identifier, whether a
//! date has passed. A cache key has only these, so that users who differ in other fields share results.
//! Keys have the values themselves and no hashes: contexts come from untrusted clients, and a collision
//! must not give one user the flags of another. This module does not cache anything.

use jiff::Timestamp;
use smallvec::SmallVec;

use super::context::{FieldId, Fields, Values};

/// Everything that some flags read from a context, as bytes. Up to 256 bytes need no allocation.
pub type Key = SmallVec<[u8; 256]>;

/// Everything that can change the outcomes of some flags, including their parents and segments.
#[derive(Debug, Clone, Default)]
pub struct Reads {
    uses: Vec<Use>,
    /// Each is a random draw that happens only if all of its fields are missing or empty.
    chances: Vec<Box<[FieldId]>>,
    /// The times at which an outcome may change.
    changes: Vec<Timestamp>,
}

/// How flags use one field.
#[derive(Debug, Clone, Copy)]
struct Use {
    field: FieldId,
    /// Flags compare the field with texts for equality.
    symbol: bool,
    /// Flags test whether the field is present and not empty.
    presence: bool,
    /// Flags use the full text, which implies the other two.
    text: Text,
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
enum Text {
    Never,
    /// If all of these fields, which are inputs as well, are missing or empty.
    Without(&'static [FieldId]),
    Always,
}

impl Reads {
    /// The context fields whose values matter, in the order of their ids.
    pub fn fields(&self) -> impl Iterator<Item = FieldId> {
        self.uses.iter().map(|it| it.field)
    }

    /// How much of this field's value matters. `lacks` returns whether a field of the context is missing
    /// or empty; if the caller does not know, it returns true.
    pub fn relevance(&self, field: FieldId, lacks: impl Fn(FieldId) -> bool) -> Relevance {
        let Ok(at) = self.uses.binary_search_by_key(&field, |it| it.field) else {
            return Relevance::None;
        };
        let it = &self.uses[at];
        if it.is_read_in_full(lacks) {
            Relevance::Text
        } else if it.symbol || it.presence {
            Relevance::Membership
        } else {
            Relevance::None
        }
    }

    /// Whether the time of the evaluation matters, unless the context has its own.
    pub fn is_timed(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Whether outcomes are valid for one evaluation only for at least one context: because they are
    /// random, or because they read the text of a `sessionId`, which may be generated.
    pub fn may_be_random(&self) -> bool {
        let session = || self.relevance(FieldId::SESSION_ID, |_| true) == Relevance::Text;
        !self.chances.is_empty() || session()
    }

    /// Whether the outcomes for this context are valid for one evaluation only: because they may be
    /// random, or because they read a generated `sessionId`.
    pub fn is_random(&self, values: &Values<'_>) -> bool {
        let session = FieldId::SESSION_ID;
        let depends_on_session =
            || self.relevance(session, |field| values.lacks(field)) == Relevance::Text;
        self.chances.iter().any(|fields| fields.iter().all(|&field| values.lacks(field)))
            || (values.is_made_up(session) && depends_on_session())
    }

    /// The first time after `after` at which an outcome may change without a change of flags.
    pub fn next_change(&self, after: Timestamp) -> Option<Timestamp> {
        self.changes.get(self.era(after)).copied()
    }

    /// Whether the outcomes are the same for every context at any time.
    pub fn is_empty(&self) -> bool {
        self.uses.is_empty() && self.chances.is_empty() && self.changes.is_empty()
    }

    /// Its approximate memory in bytes.
    pub fn weight(&self) -> usize {
        let chances = self.chances.iter().map(|it| size_of_val(it) + size_of_val(&**it));
        size_of_val(&*self.uses) + size_of_val(&*self.changes) + chances.sum::<usize>()
    }

    /// The number of time boundaries up to `now`, which identifies the interval between two of them.
    fn era(&self, now: Timestamp) -> usize {
        self.changes.partition_point(|&change| change <= now)
    }

    /// Appends everything that the flags read from a context to `key`. The flags have equal outcomes for
    /// contexts with equal keys, unless they are random.
    ///
    /// The time is represented by its interval between two time boundaries. A cached result is found
    /// until the next boundary, and again if the clock is set back.
    pub(super) fn tell(&self, schema: &Fields, values: &Values<'_>, key: &mut Key) {
        for it in &self.uses {
            let value = values.text(it.field);
            let in_full = it.is_read_in_full(|field| values.lacks(field));
            // The key has no tag for the form that follows. It is determined by the `others`, which come
            // earlier in every list of identifiers and are written in full.
            if in_full {
                push(key, value.map_or(0, |text| text.len() + 1));
                key.extend_from_slice(value.unwrap_or_default().as_bytes());
                continue;
            }
            if it.presence {
                key.push(u8::from(!values.lacks(it.field)));
            }
            if it.symbol {
                push(key, value.and_then(|text| schema.known(text)).map_or(0, |index| index + 1));
            }
        }
        if self.is_timed() {
            push(key, values.clock().map_or(0, |clock| self.era(clock) + 1));
        }
    }

    /// Adds a field that is compared for equality with interned strings.
    pub(super) fn symbol(&mut self, field: FieldId) {
        self.uses.push(Use { field, symbol: true, presence: false, text: Text::Never });
    }

    /// Adds a field of which only presence matters, that is whether it is present and not empty.
    pub(super) fn presence(&mut self, field: FieldId) {
        self.uses.push(Use { field, symbol: false, presence: true, text: Text::Never });
    }

    /// Adds a field of which the full text matters.
    pub(super) fn text(&mut self, field: FieldId) {
        self.uses.push(Use { field, symbol: false, presence: false, text: Text::Always });
    }

    /// Adds fields of which the first that is present and not empty matters. Their ids ascend.
    pub(super) fn first_of(&mut self, fields: &'static [FieldId]) {
        for (place, &field) in fields.iter().enumerate() {
            let text = if place == 0 { Text::Always } else { Text::Without(&fields[..place]) };
            self.uses.push(Use { field, symbol: false, presence: false, text });
        }
    }

    /// Adds a random draw that happens if all of these fields are missing or empty. The fields must be
    /// added separately.
    pub(super) fn chance(&mut self, without: &[FieldId]) {
        self.chances.push(without.into());
    }

    /// Adds a time at which an outcome may change.
    pub(super) fn change(&mut self, at: Timestamp) {
        self.changes.push(at);
    }

    /// Sorts and merges the inputs.
    pub(super) fn finish(mut self) -> Self {
        self.uses.sort_by_key(|it| it.field);
        self.uses.dedup_by(|next, merged| merged.absorb(*next));
        self.chances.sort_unstable();
        self.chances.dedup();
        self.changes.sort_unstable();
        self.changes.dedup();
        self
    }
}

impl Use {
    /// Whether the full text matters. `lacks` returns whether a field is missing or empty.
    fn is_read_in_full(&self, lacks: impl Fn(FieldId) -> bool) -> bool {
        match self.text {
            Text::Never => false,
            Text::Without(others) => others.iter().all(|&other| lacks(other)),
            Text::Always => true,
        }
    }

    /// Merges `other` into this if it is for the same field, and returns whether it is.
    fn absorb(&mut self, other: Self) -> bool {
        if self.field != other.field {
            return false;
        }
        self.symbol |= other.symbol;
        self.presence |= other.presence;
        self.text = match (self.text, other.text) {
            (Text::Never, text) | (text, Text::Never) => text,
            (ours, theirs) if ours == theirs => ours,
            _ => Text::Always,
        };
        true
    }
}

/// Writes seven bits per byte, with the eighth set in all but the last (LEB128). Most lengths and
/// indexes take one byte.
fn push(key: &mut Key, mut number: usize) {
    while number > 0x7f {
        key.push(low_byte(number) | 0x80);
        number >>= 7;
    }
    key.push(low_byte(number));
}

fn low_byte(number: usize) -> u8 {
    number.to_le_bytes()[0]
}
