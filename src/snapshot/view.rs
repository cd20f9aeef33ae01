//! The flags of a set of projects, prepared for frontend evaluation.
//!
//! Most of the work does not depend on the context: selecting the flags of the scope, finding those with
//! a constant outcome, and collecting what the others read from a context. It is done once per set of
//! projects. This module does not evaluate flags for contexts.

use super::fragments::{FragmentId, Fragments};
use crate::{
    engine::{Engine, FlagId, Reads},
    token::Projects,
};

/// The flags of a set of projects.
#[derive(Debug)]
pub struct View {
    number: u64,
    projects: Projects,
    toggles: Box<[Toggle]>,
    reads: Reads,
    repeatable: Reads,
}

/// One flag of the scope.
#[derive(Clone, Copy, Debug)]
pub enum Toggle {
    /// The outcome is the same for every context, at any time.
    Fixed {
        /// Whether the flag is on.
        on: bool,
        /// Its JSON.
        fragment: FragmentId,
    },
    /// The outcome depends on the context only: equal contexts have equal outcomes.
    Varies(FlagId),
    /// For some contexts the outcome is random and valid for one request only.
    Draws(FlagId),
}

impl Toggle {
    /// The flag to evaluate; `None` if its outcome is constant.
    fn varying(self) -> Option<FlagId> {
        match self {
            Self::Fixed { .. } => None,
            Self::Varies(id) | Self::Draws(id) => Some(id),
        }
    }
}

impl View {
    /// Prepares the flags of `projects`. `id` is unique among the views of the snapshot.
    pub(super) fn of(engine: &Engine, fragments: &Fragments, projects: &Projects, id: u64) -> Self {
        let ids = engine.ids().filter(|&id| projects.contains(engine.flag(id).project()));
        let flag = |id| match engine.fixed(id) {
            Some(outcome) => {
                Toggle::Fixed { on: outcome.is_on(), fragment: fragments.id(id, outcome) }
            }
            None if engine.reads([id]).may_be_random() => Toggle::Draws(id),
            None => Toggle::Varies(id),
        };
        let flags: Box<[Toggle]> = ids.map(flag).collect();
        let inputs = engine.reads(flags.iter().filter_map(|flag| flag.varying()));
        let deterministic_inputs = engine.reads(flags.iter().filter_map(|flag| match flag {
            Toggle::Varies(id) => Some(*id),
            Toggle::Fixed { .. } | Toggle::Draws(_) => None,
        }));
        Self {
            number: id,
            projects: projects.clone(),
            toggles: flags,
            reads: inputs,
            repeatable: deterministic_inputs,
        }
    }

    /// The view's id, unique in its snapshot.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The projects whose flags these are.
    pub fn projects(&self) -> &Projects {
        &self.projects
    }

    /// The flags, sorted by name.
    pub fn toggles(&self) -> &[Toggle] {
        &self.toggles
    }

    /// The inputs of all flags that are not constant.
    pub fn reads(&self) -> &Reads {
        &self.reads
    }

    /// The inputs of the flags that are [`ScopedFlag::PerContext`].
    pub fn repeatable_reads(&self) -> &Reads {
        &self.repeatable
    }

    /// Its approximate memory in bytes.
    pub(super) fn weight(&self) -> usize {
        let inputs = self.reads.weight() + self.repeatable.weight();
        size_of::<Self>() + size_of_val(&*self.toggles) + inputs
    }
}
