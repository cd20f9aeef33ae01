//! What is followed.

use crate::{
    snapshot::Filter,
    token::{Environment, Projects},
};

/// What somebody follows: an environment, cut as a listing is.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Topic {
    /// Whose flags.
    pub environment: Environment,
    /// The projects that the token sees.
    pub projects: Projects,
    /// What the request narrows that to.
    pub filter: Filter,
}
