//! What is asked again and again, so that a new snapshot can be asked it before it is served.

use std::{
    hash::BuildHasher,
    sync::{Arc, OnceLock},
};

use foldhash::fast::RandomState;

use super::recent::Recent;
use crate::{
    engine::{Context, KeptContext},
    token::Projects,
};

/// How many questions are kept at most: each costs one evaluation of all flags at the next change of
/// them.
const PLACES: usize = 64;

/// In how many places, one behind the other, a question may stand: one alone would be taken by another
/// of a few questions often enough to matter.
const TRIED: usize = 4;

/// Which flags an answer lists.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Shown {
    /// Only those that are on for the context.
    Enabled,
    /// Every flag of the scope.
    All,
}

/// A question, and what was answered.
#[derive(Debug)]
pub struct Asked {
    /// Whose flags.
    pub projects: Projects,
    /// Which of them.
    pub shown: Shown,
    /// Who asked.
    pub context: KeptContext,
    /// What identifies the answer.
    pub hash: u128,
}

/// Some of the questions that one snapshot was asked, and that were asked before, of it or of one
/// before it.
///
/// The first has the place, until the snapshot goes: it is likely to be one that is asked most, and
/// nothing is written where requests read.
#[derive(Debug)]
pub(super) struct Often {
    /// With the hash of the question.
    places: Box<[OnceLock<(u64, Asked)>]>,
    heard: Arc<Heard>,
}

/// Which questions were asked lately, of one snapshot after the other.
#[derive(Debug, Default)]
struct Heard {
    recent: Recent,
    hasher: RandomState,
}

impl Default for Often {
    fn default() -> Self {
        Self::with(Arc::default())
    }
}

impl Often {
    fn with(heard: Arc<Heard>) -> Self {
        Self { places: (0..PLACES).map(|_| OnceLock::new()).collect(), heard }
    }

    /// Those of a snapshot that takes the place of another.
    pub(super) fn after(previous: &Self) -> Self {
        Self::with(Arc::clone(&previous.heard))
    }

    /// Takes note of a question, which was asked before if `is_known` or if that was heard.
    pub(super) fn note(
        &self,
        (projects, shown, context): (&Projects, Shown, &Context<'_>),
        is_known: bool,
        hash: u128,
    ) {
        let asked = self.heard.hasher.hash_one((projects, shown, context));
        let Some(place) = self.place(asked) else { return };
        let both_halves = u128::from(asked) << 64 | u128::from(asked);
        if !(self.heard.recent.insert(both_halves) || is_known) {
            return;
        }
        if let Some(context) = KeptContext::of(context) {
            let projects = projects.clone();
            // Somebody else may have been faster.
            let _ = place.set((asked, Asked { projects, shown, context, hash }));
        }
    }

    /// Where a question of this hash may be kept; `None` if it is already, or there is no room.
    fn place(&self, asked: u64) -> Option<&OnceLock<(u64, Asked)>> {
        let first = (u128::from(asked) % PLACES as u128) as usize;
        for n in first..first + TRIED {
            let place = &self.places[n % PLACES];
            match place.get() {
                None => return Some(place),
                Some((kept, _)) if *kept == asked => return None,
                Some(_) => {}
            }
        }
        None
    }

    /// Those that are kept.
    pub(super) fn all(&self) -> impl Iterator<Item = &Asked> {
        self.places.iter().filter_map(OnceLock::get).map(|(_, asked)| asked)
    }
}
