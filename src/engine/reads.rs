//! What flags' outcomes depend on, for those who cache them.
//!
//! Flags ask little of a context: whether a value is one of a few, which bucket an identifier falls
//! into, whether an instant has passed. What they can tell apart is the key of a cached answer, so
//! that users who differ elsewhere share it. Keys hold what was told itself and no hash of it:
//! contexts come from strangers, and no collision that they find may hand one user another's answer.

use jiff::Timestamp;
use smallvec::SmallVec;

use super::context::{FieldId, Fields, Values};

/// Bytes that identify what some flags can tell of a context; short ones need no allocation.
pub type Key = SmallVec<[u8; 256]>;

/// Whatever can change the outcomes of some flags, their parents and segments included.
#[derive(Debug, Clone, Default)]
pub struct Reads {
    uses: Vec<Use>,
    /// Each is one source of chance, which draws only where all its fields are missing or empty.
    chances: Vec<Box<[FieldId]>>,
    changes: Vec<Timestamp>,
}

/// What is asked of one field.
#[derive(Debug, Clone, Copy)]
struct Use {
    field: FieldId,
    /// Which of the texts that flags name it is.
    symbol: bool,
    /// Whether it is there and not empty.
    presence: bool,
    /// The very text, which tells the former two as well.
    text: Text,
}

/// How much of a field's value matters for the outcomes of some flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relevance {
    /// Nothing.
    None,
    /// Whether it is there, and which of the texts that flags name it is.
    Membership,
    /// The very text.
    Text,
}

/// When the very text of a field matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Text {
    Never,
    /// Where all of these, which are read themselves, are missing or empty.
    Without(&'static [FieldId]),
    Always,
}

impl Reads {
    /// The context fields whose values matter, in the order of their ids.
    pub fn fields(&self) -> impl Iterator<Item = FieldId> {
        self.uses.iter().map(|it| it.field)
    }

    /// How much of this field's value matters for a context of which `lacks` says what is missing or
    /// empty; where that is not known, it is to say so of everything.
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

    /// Whether the time of the evaluation matters, unless the context tells its own.
    pub fn is_timed(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Whether there is a context for which the outcomes are good for one evaluation only: because lots
    /// are drawn, or because the text of a `sessionId` matters, which may be made up.
    pub fn may_be_random(&self) -> bool {
        let session = || self.relevance(FieldId::SESSION_ID, |_| true) == Relevance::Text;
        !self.chances.is_empty() || session()
    }

    /// Whether evaluating the flags for this context may draw lots or depends on a `sessionId` that was
    /// made up, so that the outcomes are good for this evaluation only.
    pub fn is_random(&self, values: &Values<'_>) -> bool {
        let session = FieldId::SESSION_ID;
        let depends_on_session =
            || self.relevance(session, |field| values.lacks(field)) == Relevance::Text;
        self.chances.iter().any(|fields| fields.iter().all(|&field| values.lacks(field)))
            || (values.is_made_up(session) && depends_on_session())
    }

    /// The first instant after `after` at which an outcome may change by itself.
    pub fn next_change(&self, after: Timestamp) -> Option<Timestamp> {
        self.changes.get(self.era(after)).copied()
    }

    /// Whether nothing matters: the flags have the same outcomes for everybody, always.
    pub fn is_empty(&self) -> bool {
        self.uses.is_empty() && self.chances.is_empty() && self.changes.is_empty()
    }

    /// The memory that it holds, roughly, in bytes.
    pub fn weight(&self) -> usize {
        let chances = self.chances.iter().map(|it| size_of_val(it) + size_of_val(&**it));
        size_of_val(&*self.uses) + size_of_val(&*self.changes) + chances.sum::<usize>()
    }

    /// How many of the changes have come to pass at `now`.
    fn era(&self, now: Timestamp) -> usize {
        self.changes.partition_point(|&change| change <= now)
    }

    /// Appends to `key` what can be told of a context: the flags have equal outcomes for contexts of
    /// equal keys, unless they draw lots.
    ///
    /// The time is told by how many changes lie behind it, so that a key stands for one stretch
    /// between two of them: what was kept under it is found until the next change, and again should
    /// the clock be set back.
    pub(super) fn tell(&self, fields: &Fields, values: &Values<'_>, key: &mut Key) {
        for it in &self.uses {
            let value = values.text(it.field);
            let in_full = it.is_read_in_full(|field| values.lacks(field));
            // Nothing here says which form follows, as the fields before it do: `others` are read in
            // full where they come first, as in every list of identifiers.
            if in_full {
                push(key, value.map_or(0, |text| text.len() + 1));
                key.extend_from_slice(value.unwrap_or_default().as_bytes());
                continue;
            }
            if it.presence {
                key.push(u8::from(!values.lacks(it.field)));
            }
            if it.symbol {
                push(key, value.and_then(|text| fields.known(text)).map_or(0, |known| known + 1));
            }
        }
        if self.is_timed() {
            push(key, values.clock().map_or(0, |clock| self.era(clock) + 1));
        }
    }

    /// Notes that a field is compared with texts of [`Fields::symbol`], and nothing else.
    pub(super) fn symbol(&mut self, field: FieldId) {
        self.uses.push(Use { field, symbol: true, presence: false, text: Text::Never });
    }

    /// Notes that it matters whether a field is there and not empty, and nothing else.
    pub(super) fn presence(&mut self, field: FieldId) {
        self.uses.push(Use { field, symbol: false, presence: true, text: Text::Never });
    }

    /// Notes that everything about a field matters.
    pub(super) fn text(&mut self, field: FieldId) {
        self.uses.push(Use { field, symbol: false, presence: false, text: Text::Always });
    }

    /// Notes that the first of these fields that is there and not empty matters; their ids ascend.
    pub(super) fn first_of(&mut self, fields: &'static [FieldId]) {
        for (place, &field) in fields.iter().enumerate() {
            let text = if place == 0 { Text::Always } else { Text::Without(&fields[..place]) };
            self.uses.push(Use { field, symbol: false, presence: false, text });
        }
    }

    /// Notes that lots are drawn where all these fields, which are noted apart, are missing or empty.
    pub(super) fn chance(&mut self, without: &[FieldId]) {
        self.chances.push(without.into());
    }

    pub(super) fn change(&mut self, at: Timestamp) {
        self.changes.push(at);
    }

    /// Puts everything in order and drops repetitions.
    pub(super) fn finish(mut self) -> Self {
        self.uses.sort_by_key(|it| it.field);
        self.uses.dedup_by(|next, kept| kept.absorb(*next));
        self.chances.sort_unstable();
        self.chances.dedup();
        self.changes.sort_unstable();
        self.changes.dedup();
        self
    }
}

impl Use {
    /// Whether the very text matters for a context of which `lacks` says what is missing or empty.
    fn is_read_in_full(&self, lacks: impl Fn(FieldId) -> bool) -> bool {
        match self.text {
            Text::Never => false,
            Text::Without(others) => others.iter().all(|&other| lacks(other)),
            Text::Always => true,
        }
    }

    /// Takes over what `other` asks, if it asks it of the same field.
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

/// Seven bits a byte, the last without the eighth: a length or a symbol mostly takes one.
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
