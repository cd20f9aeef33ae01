//! Keeps snapshots current: one loop per environment.

use std::time::Duration;

/// How snapshots are kept current.
#[derive(Clone, Debug)]
pub struct Config {
    /// The time between two fetches of an environment's flags.
    pub interval: Duration,
}
