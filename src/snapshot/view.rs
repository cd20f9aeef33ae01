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
    /// It depends on the context.
    Varies(FlagId),
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
            None => Toggle::Varies(id),
        };
        let toggles: Box<[Toggle]> = seen.map(toggle).collect();
        let varying = toggles.iter().filter_map(|toggle| match toggle {
            Toggle::Varies(id) => Some(*id),
            Toggle::Fixed { .. } => None,
        });
        let reads = engine.reads(varying);
        Self { number, projects: projects.clone(), toggles, reads }
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

    /// The memory that it holds, roughly, in bytes.
    pub(super) fn weight(&self) -> usize {
        size_of::<Self>() + size_of_val(&*self.toggles) + self.reads.weight()
    }
}
