//! What a set of projects sees of an environment's flags, prepared for answering frontends.
//!
//! Most of what an answer needs to know does not depend on who asks: which flags are seen, which of
//! them have one outcome for everybody, and what the others read of a context. It is found out once
//! per set of projects.

use super::fragments::{FragmentId, Fragments};
use crate::{
    engine::{Engine, FlagId, Reads},
    token::Projects,
};

/// The flags that a set of projects sees.
#[derive(Debug)]
pub struct View {
    number: u64,
    projects: Projects,
    toggles: Box<[Toggle]>,
    reads: Reads,
    repeatable: Reads,
}

/// One of the flags that are seen.
#[derive(Clone, Copy, Debug)]
pub enum Toggle {
    /// On or off for everybody, always.
    Fixed {
        /// Whether it is on.
        on: bool,
        /// Its JSON.
        fragment: FragmentId,
    },
    /// It depends on the context alone: equal contexts have equal outcomes.
    Varies(FlagId),
    /// For some contexts its outcome is good for one evaluation only.
    Draws(FlagId),
}

impl Toggle {
    /// The flag, unless it has one outcome for everybody.
    fn varying(self) -> Option<FlagId> {
        match self {
            Self::Fixed { .. } => None,
            Self::Varies(id) | Self::Draws(id) => Some(id),
        }
    }
}

impl View {
    /// Finds out what `projects` see; `number` is not that of another view of the same snapshot.
    pub(super) fn of(
        engine: &Engine,
        fragments: &Fragments,
        projects: &Projects,
        number: u64,
    ) -> Self {
        let seen = engine.ids().filter(|&id| projects.contains(engine.flag(id).project()));
        let toggle = |id| match engine.fixed(id) {
            Some(outcome) => {
                Toggle::Fixed { on: outcome.is_on(), fragment: fragments.id(id, outcome) }
            }
            None if engine.reads([id]).may_be_random() => Toggle::Draws(id),
            None => Toggle::Varies(id),
        };
        let toggles: Box<[Toggle]> = seen.map(toggle).collect();
        let reads = engine.reads(toggles.iter().filter_map(|toggle| toggle.varying()));
        let repeatable = engine.reads(toggles.iter().filter_map(|toggle| match toggle {
            Toggle::Varies(id) => Some(*id),
            Toggle::Fixed { .. } | Toggle::Draws(_) => None,
        }));
        Self { number, projects: projects.clone(), toggles, reads, repeatable }
    }

    /// What tells it from the other views of its snapshot.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whose flags are seen.
    pub fn projects(&self) -> &Projects {
        &self.projects
    }

    /// The flags, sorted by name.
    pub fn toggles(&self) -> &[Toggle] {
        &self.toggles
    }

    /// What the flags that vary depend on.
    pub fn reads(&self) -> &Reads {
        &self.reads
    }

    /// What those flags depend on that equal contexts always have equal outcomes of, [`Toggle::Varies`].
    pub fn repeatable_reads(&self) -> &Reads {
        &self.repeatable
    }

    /// The memory that it holds, roughly, in bytes.
    pub(super) fn weight(&self) -> usize {
        let reads = self.reads.weight() + self.repeatable.weight();
        size_of::<Self>() + size_of_val(&*self.toggles) + reads
    }
}
