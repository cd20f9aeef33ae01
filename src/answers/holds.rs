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
    /// As of when an answer holds that rests on what `reads`, was asked for at a time, and has been
    /// found since; `None` if nobody can tell of when it is.
    pub fn of(reads: &Reads, asked: Timestamp, now: Timestamp) -> Option<Self> {
        if !reads.is_timed() {
            return Some(Self::Always);
        }
        let during = Self::During(asked, reads.next_change(asked));
        // A date may have come meanwhile, or the clock been set.
        during.at(now).then_some(during)
    }

    /// Whether it holds at this time.
    pub fn at(self, now: Timestamp) -> bool {
        match self {
            Self::Always => true,
            Self::During(from, until) => from <= now && until.is_none_or(|until| now < until),
        }
    }
}
