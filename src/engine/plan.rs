//! The evaluation plan of a flag: its conditions on other flags, its strategies, its variants.

use std::sync::Arc;

use super::context::Bound;
use super::flag::{FlagId, Outcome};
use super::reads::Reads;
use super::strategy::Strategy;
use super::variant::Choice;

/// How a flag is evaluated.
#[derive(Debug, Clone)]
pub(super) enum Plan {
    /// The outcome is the same for every context.
    Fixed(Outcome),
    /// The outcome depends on the context.
    Depends(Arc<Conditions>),
}

/// A flag is on if all parents are satisfied and a strategy matches. The first that matches counts.
#[derive(Debug, Clone)]
pub(super) struct Conditions {
    pub(super) parents: Box<[Parent]>,
    pub(super) strategies: Box<[Strategy]>,
    pub(super) variants: Choice,
}

/// A condition on another flag's outcome.
#[derive(Debug, Clone)]
pub(super) struct Parent {
    pub(super) flag: FlagId,
    /// The outcomes that satisfy the condition, by ordinal.
    pub(super) admitted: Box<[bool]>,
}

impl Plan {
    /// The outcome for a context; `plans` are those of all flags.
    pub(super) fn decide(&self, plans: &[Self], bound: &Bound<'_>) -> Outcome {
        match self {
            Self::Fixed(outcome) => *outcome,
            Self::Depends(conditions) => {
                // Recursion depth is one: parents have no parents.
                let is_satisfied = |parent: &Parent| {
                    parent.admits(plans[parent.flag.index()].decide(plans, bound))
                };
                if conditions.parents.iter().all(is_satisfied) {
                    conditions.decide(bound)
                } else {
                    Outcome::Off
                }
            }
        }
    }

    /// Adds conditions on other flags.
    pub(super) fn depend_on(&mut self, parents: Vec<Parent>) {
        let own = std::mem::replace(self, Self::Fixed(Outcome::Off));
        *self = match own {
            Self::Fixed(Outcome::Off) => return,
            Self::Fixed(outcome) => Self::Depends(Arc::new(Conditions {
                parents: parents.into(),
                strategies: [Strategy::everybody()].into(),
                variants: match outcome {
                    Outcome::Off | Outcome::On => Choice::Nobody,
                    Outcome::Variant(index) => Choice::Everybody(index),
                },
            })),
            Self::Depends(mut conditions) => {
                Arc::make_mut(&mut conditions).parents = parents.into();
                Self::Depends(conditions)
            }
        };
    }

    /// The outcome, if it is the same for every context at any time.
    pub(super) fn fixed(&self) -> Option<Outcome> {
        match self {
            Self::Fixed(outcome) => Some(*outcome),
            Self::Depends(_) => None,
        }
    }

    /// Whether the outcome may depend on a bucket, parents aside.
    pub(super) fn splits(&self) -> bool {
        let Self::Depends(conditions) = self else { return false };
        conditions.variants.splits() || conditions.strategies.iter().any(Strategy::splits)
    }

    /// Adds everything that the outcome depends on to `inputs`; `plans` are those of all flags.
    pub(super) fn note_reads(&self, plans: &[Self], inputs: &mut Reads) {
        let Self::Depends(conditions) = self else { return };
        for parent in &conditions.parents {
            plans[parent.flag.index()].note_reads(plans, inputs);
        }
        for strategy in &conditions.strategies {
            strategy.note_reads(inputs);
        }
        conditions.variants.note_reads(inputs);
    }
}

impl Parent {
    /// Whether the other flag's outcome satisfies the condition.
    pub(super) fn admits(&self, outcome: Outcome) -> bool {
        self.admitted.get(outcome.ordinal()).copied().unwrap_or(false)
    }
}

impl Conditions {
    /// The outcome once the parents are satisfied.
    fn decide(&self, bound: &Bound<'_>) -> Outcome {
        let Some(strategy) = self.strategies.iter().find(|strategy| strategy.matches(bound)) else {
            return Outcome::Off;
        };
        let own = strategy.variants().choose(bound);
        own.or_else(|| self.variants.choose(bound)).map_or(Outcome::On, Outcome::Variant)
    }

    /// Drops conditions that cannot make a difference. The plan is constant if none is left.
    pub(super) fn simplify(mut self) -> Plan {
        if let Some(last) = self.strategies.iter().position(Strategy::is_unconditional) {
            let mut strategies = self.strategies.into_vec();
            strategies.truncate(last + 1);
            self.strategies = strategies.into();
        }
        match &self.strategies[..] {
            [] => Plan::Fixed(Outcome::Off),
            [only] if self.parents.is_empty() && only.is_unconditional() => {
                match (only.variants(), &self.variants) {
                    (Choice::Everybody(index), _) | (Choice::Nobody, Choice::Everybody(index)) => {
                        Plan::Fixed(Outcome::Variant(*index))
                    }
                    (Choice::Nobody, Choice::Nobody) => Plan::Fixed(Outcome::On),
                    (Choice::Lots(_), _) | (Choice::Nobody, Choice::Lots(_)) => {
                        Plan::Depends(Arc::new(self))
                    }
                }
            }
            [_, ..] => Plan::Depends(Arc::new(self)),
        }
    }
}
