//! What is wrong with a flag's definition.
//!
//! A problem never stops a flag set from compiling: the strategy it concerns never matches, or
//! the part it concerns is left out, and the problem is reported beside the engine. Its text shows
//! excerpts only of what the definition holds.

use std::fmt;
use std::sync::Arc;

use crate::wire::excerpt::Excerpt;

/// One thing wrong with one flag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The flag concerned; `#4` is the fourth of its list where that has no name to be read.
    pub flag: Arc<str>,
    /// What is wrong with it.
    pub defect: Defect,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "flag `{}`: {}", Excerpt::of(&self.flag), self.defect)
    }
}

/// What can be wrong with a definition, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Defect {
    /// The name is defined more than once.
    #[error("defined more than once; the last definition counts")]
    DefinedTwice,
    /// Not even the name can be read.
    #[error("unreadable, so it is left out: {}", Excerpt::of(.0))]
    LeftOut(String),
    /// The definition as a whole cannot be read.
    #[error("unreadable, so it is off: {}", Excerpt::of(.0))]
    Unreadable(String),
    /// There is no list of strategies.
    #[error("no list of strategies, so it is off; one that is empty is for everybody")]
    NoStrategies,
    /// One part has the wrong shape.
    #[error("malformed {0}")]
    Malformed(Part),
    /// A strategy of a kind that this program does not know.
    #[error("unknown strategy `{}` never matches", Excerpt::of(.0))]
    UnknownStrategy(String),
    /// A strategy refers to a segment that is not there.
    #[error("segment {0} is missing, so its strategy never matches")]
    MissingSegment(i64),
    /// A constraint's operator is not known.
    #[error("unknown operator `{}`, so its strategy never matches", Excerpt::of(.0))]
    UnknownOperator(String),
    /// A constraint's operand cannot be read as its operator needs it.
    #[error("{operator} cannot compare with `{}`", Excerpt::of(operand))]
    Operand {
        /// The operator.
        operator: &'static str,
        /// What it was to compare with.
        operand: String,
    },
    /// A rollout's percentage is not a number.
    #[error("`{}` is no percentage, so its strategy never matches", Excerpt::of(.0))]
    Percentage(String),
    /// The flag depends on one that is not there.
    #[error("depends on `{}`, which is missing, so it is off", Excerpt::of(.0))]
    MissingParent(String),
    /// The flag depends on one that has dependencies itself.
    #[error("depends on `{}`, which has dependencies itself, so it is off", Excerpt::of(.0))]
    NestedParent(String),
}

/// The parts of a definition that can have the wrong shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
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
    /// A variant, which then nobody gets.
    Variant,
    /// A variant's payload, which is then left out.
    Payload,
    /// A variant's override, which is then left out.
    Override,
    /// A dependency, which then never holds.
    Dependency,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enabled => "`enabled`: the flag is off",
            Self::Strategies => "list of strategies: the flag is off",
            Self::Strategy => "strategy never matches",
            Self::Constraint => "constraint: its strategy never matches",
            Self::Segment => "segment: its strategies never match",
            Self::Variant => "variant: nobody gets it",
            Self::Payload => "payload is left out",
            Self::Override => "override is left out",
            Self::Dependency => "dependency: the flag is off",
        })
    }
}
