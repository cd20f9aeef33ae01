//! What was asked before, word for word, and the hash of what it came to.
//!
//! Clients that poll ask the same again and again, and a question that is found here need not even
//! be read. A table of fixed size, in which a question takes the place of another: what is gone is
//! read and answered anew. Nobody waits for a lock here. What the words mean is not known here.

use std::{
    hash::BuildHasher as _,
    sync::{Arc, OnceLock},
};

use arc_swap::ArcSwapOption;
use foldhash::quality::RandomState;
use jiff::Timestamp;

/// How many questions are remembered at most.
const PLACES: usize = 4096;

/// The longest question that is remembered, in bytes.
const LONGEST: usize = 1024;

/// The questions that were asked of one snapshot.
#[derive(Debug)]
pub struct Verbatim {
    // Made when there is a question to remember: many snapshots are asked none.
    places: OnceLock<Box<[ArcSwapOption<Known>]>>,
    // Strangers cannot tell whose place a question takes.
    hasher: RandomState,
}

#[derive(Debug)]
struct Known {
    words: Box<[u8]>,
    hash: u128,
    holds: Holds,
}

/// As of when an answer holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Holds {
    /// As long as its snapshot.
    Always,
    /// From the first time on, and before the second, if there is one.
    During(Timestamp, Option<Timestamp>),
}

impl Holds {
    /// Whether it holds at this time, which is not looked at where it does not matter.
    fn at(self, now: Option<Timestamp>) -> bool {
        match (self, now) {
            (Self::Always, _) => true,
            (Self::During(..), None) => false,
            (Self::During(from, until), Some(now)) => {
                from <= now && until.is_none_or(|until| now < until)
            }
        }
    }
}

impl Verbatim {
    pub(super) fn new() -> Self {
        Self { places: OnceLock::new(), hasher: RandomState::default() }
    }

    /// The hash of what was answered to these words, if that holds now.
    pub fn find(&self, words: &[u8], now: Option<Timestamp>) -> Option<u128> {
        let known = self.places.get()?[self.place(words)].load();
        let known = known.as_deref()?;
        (*known.words == *words && known.holds.at(now)).then_some(known.hash)
    }

    /// Remembers the hash of what is answered to these words.
    pub fn remember(&self, words: &[u8], hash: u128, holds: Holds) {
        if words.len() <= LONGEST {
            let known = Known { words: words.into(), hash, holds };
            let make = || (0..PLACES).map(|_| ArcSwapOption::empty()).collect();
            self.places.get_or_init(make)[self.place(words)].store(Some(Arc::new(known)));
        }
    }

    fn place(&self, words: &[u8]) -> usize {
        let [low, high, ..] = self.hasher.hash_one(words).to_le_bytes();
        usize::from(u16::from_le_bytes([low, high])) % PLACES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn an_answer_is_found_by_the_very_same_words_while_it_holds() {
        let during = Holds::During(at(10), Some(at(20)));
        let since = Holds::During(at(10), None);
        for (holds, now, expect) in [
            (Holds::Always, None, true),
            (Holds::Always, Some(at(0)), true),
            (during, Some(at(9)), false),
            (during, Some(at(10)), true),
            (during, Some(at(19)), true),
            (during, Some(at(20)), false),
            (during, None, false),
            (since, Some(at(1_000_000)), true),
            (since, Some(at(9)), false),
        ] {
            // Each has a table of its own, as any question may take another's place.
            let verbatim = Verbatim::new();
            assert_eq!(verbatim.find(b"asked", now), None);
            verbatim.remember(b"asked", 1, holds);
            assert_eq!(verbatim.find(b"asked", now), expect.then_some(1), "{holds:?} at {now:?}");
            assert_eq!(verbatim.find(b"ask", now), None);
            verbatim.remember(b"asked", 2, holds);
            assert_eq!(verbatim.find(b"asked", now), expect.then_some(2));
        }
    }

    #[test]
    fn a_flood_of_questions_takes_no_more_than_the_places() {
        let verbatim = Verbatim::new();
        for n in 0..50_000_u32 {
            verbatim.remember(&n.to_le_bytes(), u128::from(n), Holds::Always);
        }
        let found = (0..50_000_u32).filter(|n| verbatim.find(&n.to_le_bytes(), None).is_some());
        assert!((PLACES / 2..=PLACES).contains(&found.count()));
        let long = [b'x'; LONGEST + 1];
        verbatim.remember(&long, 1, Holds::Always);
        assert_eq!(verbatim.find(&long, None), None);
        verbatim.remember(&long[1..], 1, Holds::Always);
        assert_eq!(verbatim.find(&long[1..], None), Some(1));
    }
}
