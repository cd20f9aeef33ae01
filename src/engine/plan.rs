//! The evaluation plan of a flag: its conditions on other flags, its strategies, its variants.

use std::sync::Arc;

use super::context::BoundContext;
use super::flag::{FlagId, Outcome};
use super::inputs::EvaluationInputs;
use super::strategy::Strategy;
use super::variant::VariantSelection;

/// How a flag is evaluated.
#[derive(Debug, Clone)]
pub(super) enum FlagPlan {
    /// The outcome is the same for every context.
    Constant(Outcome),
    /// The outcome depends on the context.
    Conditional(Arc<Conditions>),
}

/// A flag is on if all parents are satisfied and a strategy matches. The first that matches counts.
#[derive(Debug, Clone)]
pub(super) struct Conditions {
    pub(super) parents: Box<[Parent]>,
    pub(super) strategies: Box<[Strategy]>,
    pub(super) variants: VariantSelection,
}

/// A condition on another flag's outcome.
#[derive(Debug, Clone)]
pub(super) struct Parent {
    pub(super) flag: FlagId,
    /// The outcomes that satisfy the condition, by ordinal.
    pub(super) accepted_outcomes: Box<[bool]>,
}

impl FlagPlan {
    /// The outcome for a context; `plans` are those of all flags.
    pub(super) fn evaluate(&self, plans: &[Self], bound: &BoundContext<'_>) -> Outcome {
        match self {
            Self::Constant(outcome) => *outcome,
            Self::Conditional(conditions) => {
                // Recursion depth is one: parents have no parents.
                let is_satisfied = |parent: &Parent| {
                    parent.is_satisfied_by(plans[parent.flag.index()].evaluate(plans, bound))
                };
                if conditions.parents.iter().all(is_satisfied) {
                    conditions.evaluate(bound)
                } else {
                    Outcome::Off
                }
            }
        }
    }

    /// Adds conditions on other flags.
    pub(super) fn add_parents(&mut self, parents: Vec<Parent>) {
        let own = std::mem::replace(self, Self::Constant(Outcome::Off));
        *self = match own {
            Self::Constant(Outcome::Off) => return,
            Self::Constant(outcome) => Self::Conditional(Arc::new(Conditions {
                parents: parents.into(),
                strategies: [Strategy::unconditional()].into(),
                variants: match outcome {
                    Outcome::Off | Outcome::On => VariantSelection::None,
                    Outcome::Variant(index) => VariantSelection::Always(index),
                },
            })),
            Self::Conditional(mut conditions) => {
                Arc::make_mut(&mut conditions).parents = parents.into();
                Self::Conditional(conditions)
            }
        };
    }

    /// The outcome, if it is the same for every context at any time.
    pub(super) fn constant_outcome(&self) -> Option<Outcome> {
        match self {
            Self::Constant(outcome) => Some(*outcome),
            Self::Conditional(_) => None,
        }
    }

    /// Whether the outcome may depend on a bucket, parents aside.
    pub(super) fn is_bucketed(&self) -> bool {
        let Self::Conditional(conditions) = self else { return false };
        conditions.variants.is_bucketed() || conditions.strategies.iter().any(Strategy::is_bucketed)
    }

    /// Adds everything that the outcome depends on to `inputs`; `plans` are those of all flags.
    pub(super) fn collect_inputs(&self, plans: &[Self], inputs: &mut EvaluationInputs) {
        let Self::Conditional(conditions) = self else { return };
        for parent in &conditions.parents {
            plans[parent.flag.index()].collect_inputs(plans, inputs);
        }
        for strategy in &conditions.strategies {
            strategy.collect_inputs(inputs);
        }
        conditions.variants.collect_inputs(inputs);
    }
}

impl Parent {
    /// Whether the other flag's outcome satisfies the condition.
    pub(super) fn is_satisfied_by(&self, outcome: Outcome) -> bool {
        self.accepted_outcomes.get(outcome.ordinal()).copied().unwrap_or(false)
    }
}

impl Conditions {
    /// The outcome once the parents are satisfied.
    fn evaluate(&self, bound: &BoundContext<'_>) -> Outcome {
        let Some(strategy) = self.strategies.iter().find(|strategy| strategy.matches(bound)) else {
            return Outcome::Off;
        };
        let own = strategy.variants().select(bound);
        own.or_else(|| self.variants.select(bound)).map_or(Outcome::On, Outcome::Variant)
    }

    /// Drops conditions that cannot make a difference. The plan is constant if none is left.
    pub(super) fn simplify(mut self) -> FlagPlan {
        if let Some(last) = self.strategies.iter().position(Strategy::is_unconditional) {
            let mut strategies = self.strategies.into_vec();
            strategies.truncate(last + 1);
            self.strategies = strategies.into();
        }
        match &self.strategies[..] {
            [] => FlagPlan::Constant(Outcome::Off),
            [only] if self.parents.is_empty() && only.is_unconditional() => {
                match (only.variants(), &self.variants) {
                    (VariantSelection::Always(index), _)
                    | (VariantSelection::None, VariantSelection::Always(index)) => {
                        FlagPlan::Constant(Outcome::Variant(*index))
                    }
                    (VariantSelection::None, VariantSelection::None) => {
                        FlagPlan::Constant(Outcome::On)
                    }
                    (VariantSelection::Weighted(_), _)
                    | (VariantSelection::None, VariantSelection::Weighted(_)) => {
                        FlagPlan::Conditional(Arc::new(self))
                    }
                }
            }
            [_, ..] => FlagPlan::Conditional(Arc::new(self)),
        }
    }
}
