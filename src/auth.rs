//! Who may read: verdicts on tokens, cached.

use std::time::Duration;

/// How verdicts are kept.
#[derive(Clone, Debug)]
pub struct Config {
    /// How old a valid verdict may become before upstream is asked again.
    pub revalidate_after: Duration,
    /// How long an invalid verdict is believed.
    pub forget_invalid_after: Duration,
    /// How often upstream's token list is read (with an admin token).
    pub list_interval: Duration,
    /// The longest that a request waits for the verdict on a first-seen token.
    pub deadline: Duration,
    /// How many valid verdicts, and apart from them how many invalid ones, are kept.
    pub capacity: u64,
}
