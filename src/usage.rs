//! Usage that SDKs report: merged, batched and sent upstream.

use std::time::Duration;

/// How usage is kept and sent.
#[derive(Clone, Debug)]
pub struct Config {
    /// How often a generation is drained and sent.
    pub interval: Duration,
    /// How many distinct counters are held before they are merged harder.
    pub max_counters: usize,
}
