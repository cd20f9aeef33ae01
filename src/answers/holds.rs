//! As of when an answer holds.

use jiff::Timestamp;

use crate::engine::Reads;

/// As of when an answer holds whose snapshot is still the current one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Holds {
    /// Always.
    Always,
    /// From the first time on, and before the second, if there is one.
    During(Timestamp, Option<Timestamp>),
}

impl Holds {
    /// As of when an answer holds that rests on what `reads`, and is of the time `asked`.
    pub fn of(reads: &Reads, asked: Timestamp) -> Self {
        if reads.is_timed() { Self::During(asked, reads.next_change(asked)) } else { Self::Always }
    }

    /// Whether it holds at this time, which is not looked at where it does not matter.
    pub fn at(self, now: impl FnOnce() -> Timestamp) -> bool {
        match self {
            Self::Always => true,
            Self::During(from, until) => {
                let now = now();
                from <= now && until.is_none_or(|until| now < until)
            }
        }
    }
}
