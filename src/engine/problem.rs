//! Problems in the definitions of flags.
//!
//! A problem does not fail the compilation: the strategy in question never matches, or the part in
//! question is left out, and the problem is reported beside the engine. Its text has only excerpts of
//! the definition.

use std::fmt;
use std::sync::Arc;

use crate::protocol::excerpt::Excerpt;

/// One problem of one flag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The name of the flag; `#4` for the fourth flag of the document if its name is unreadable.
    pub flag: Arc<str>,
    /// The defect of its definition.
    pub defect: Defect,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "flag `{}`: {}", Excerpt::of(&self.flag), self.defect)
    }
}

/// A defect of a definition, and its consequence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Defect {
    /// Several flags have this name.
    #[error("defined more than once; the last definition is used")]
    DuplicateName,
    /// The name of the flag cannot be read.
    #[error("unreadable, so it is left out: {}", Excerpt::of(.0))]
    UnreadableName(String),
    /// The definition as a whole cannot be read.
    #[error("unreadable, so it is off: {}", Excerpt::of(.0))]
    UnreadableDefinition(String),
    /// There is no list of strategies.
    #[error("no list of strategies, so it is off; an empty list turns it on for everybody")]
    NoStrategies,
    /// One part has the wrong shape.
    #[error("malformed {0}")]
    Malformed(DefinitionPart),
    /// The kind of a strategy is unknown.
    #[error("unknown strategy `{}` never matches", Excerpt::of(.0))]
    UnknownStrategy(String),
    /// A strategy refers to a missing segment.
    #[error("segment {0} is missing, so its strategy never matches")]
    MissingSegment(i64),
    /// A constraint's operator is unknown.
    #[error("unknown operator `{}`, so its strategy never matches", Excerpt::of(.0))]
    UnknownOperator(String),
    /// A constraint's operand is not valid for its operator.
    #[error("{operator} cannot compare with `{}`", Excerpt::of(operand))]
    InvalidOperand {
        /// The operator.
        operator: &'static str,
        /// The operand.
        operand: String,
    },
    /// A rollout's percentage is not a number.
    #[error("`{}` is not a percentage, so its strategy never matches", Excerpt::of(.0))]
    InvalidPercentage(String),
    /// The flag depends on a missing flag.
    #[error("depends on `{}`, which is missing, so it is off", Excerpt::of(.0))]
    MissingParent(String),
    /// The flag depends on a flag that has dependencies itself.
    #[error("depends on `{}`, which has dependencies itself, so it is off", Excerpt::of(.0))]
    NestedParent(String),
}

/// The parts of a definition that can have the wrong shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DefinitionPart {
    /// `enabled`, without which a flag is off.
    Enabled,
    /// The list of strategies, without which a flag is off.
    Strategies,
    /// A strategy, which then never matches.
    Strategy,
    /// A constraint, whose strategy then never matches.
    Constraint,
    /// A segment, whose strategies then never match.
    Segment,
    /// A variant, which is then never selected.
    Variant,
    /// A variant's payload, which is then left out.
    Payload,
    /// A variant's override, which is then left out.
    Override,
    /// A dependency, without which the flag is off.
    Dependency,
}

impl fmt::Display for DefinitionPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enabled => "`enabled`: the flag is off",
            Self::Strategies => "list of strategies: the flag is off",
            Self::Strategy => "strategy never matches",
            Self::Constraint => "constraint: its strategy never matches",
            Self::Segment => "segment: its strategies never match",
            Self::Variant => "variant: it is never selected",
            Self::Payload => "payload is left out",
            Self::Override => "override is left out",
            Self::Dependency => "dependency: the flag is off",
        })
    }
}
