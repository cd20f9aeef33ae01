//! The flags of a set of projects, prepared for frontend evaluation.
//!
//! Most of the work does not depend on the context: selecting the flags of the scope, finding those with
//! a constant outcome, and collecting what the others read from a context. It is done once per set of
//! projects. This module does not evaluate flags for contexts.

use super::fragments::{FragmentId, Fragments};
use crate::{
    engine::{Engine, EvaluationInputs, FlagId},
    token::Projects,
};

/// The flags that a response includes.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Include {
    /// Only flags that are on for the context.
    Enabled,
    /// Every flag of the scope.
    All,
}

/// The flags of a set of projects.
#[derive(Debug)]
pub struct FrontendView {
    id: u64,
    projects: Projects,
    flags: Box<[ScopedFlag]>,
    inputs: EvaluationInputs,
    deterministic_inputs: EvaluationInputs,
}

/// One flag of the scope.
#[derive(Clone, Copy, Debug)]
pub enum ScopedFlag {
    /// The outcome is the same for every context, at any time.
    Constant {
        /// Whether the flag is on.
        on: bool,
        /// Its JSON.
        fragment: FragmentId,
    },
    /// The outcome depends on the context only: equal contexts have equal outcomes.
    PerContext(FlagId),
    /// For some contexts the outcome is random and valid for one request only.
    PerRequest(FlagId),
}

impl ScopedFlag {
    /// The flag to evaluate; `None` if its outcome is constant.
    fn id_to_evaluate(self) -> Option<FlagId> {
        match self {
            Self::Constant { .. } => None,
            Self::PerContext(id) | Self::PerRequest(id) => Some(id),
        }
    }
}

impl FrontendView {
    /// Prepares the flags of `projects`. `id` is unique among the views of the snapshot.
    pub(super) fn build(
        engine: &Engine,
        fragments: &Fragments,
        projects: &Projects,
        id: u64,
    ) -> Self {
        let ids = engine.ids().filter(|&id| projects.contains(engine.flag(id).project()));
        let flag = |id| match engine.constant_outcome(id) {
            Some(outcome) => {
                ScopedFlag::Constant { on: outcome.is_on(), fragment: fragments.id(id, outcome) }
            }
            None if engine.inputs([id]).can_be_random() => ScopedFlag::PerRequest(id),
            None => ScopedFlag::PerContext(id),
        };
        let flags: Box<[ScopedFlag]> = ids.map(flag).collect();
        let inputs = engine.inputs(flags.iter().filter_map(|flag| flag.id_to_evaluate()));
        let deterministic_inputs = engine.inputs(flags.iter().filter_map(|flag| match flag {
            ScopedFlag::PerContext(id) => Some(*id),
            ScopedFlag::Constant { .. } | ScopedFlag::PerRequest(_) => None,
        }));
        Self { id, projects: projects.clone(), flags, inputs, deterministic_inputs }
    }

    /// The view's id, unique in its snapshot.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The projects whose flags these are.
    pub fn projects(&self) -> &Projects {
        &self.projects
    }

    /// The flags, sorted by name.
    pub fn flags(&self) -> &[ScopedFlag] {
        &self.flags
    }

    /// The inputs of all flags that are not constant.
    pub fn inputs(&self) -> &EvaluationInputs {
        &self.inputs
    }

    /// The inputs of the flags that are [`ScopedFlag::PerContext`].
    pub fn deterministic_inputs(&self) -> &EvaluationInputs {
        &self.deterministic_inputs
    }

    /// Its approximate memory in bytes.
    pub fn memory_size(&self) -> usize {
        let inputs = self.inputs.memory_size() + self.deterministic_inputs.memory_size();
        size_of::<Self>() + size_of_val(&*self.flags) + inputs
    }
}
