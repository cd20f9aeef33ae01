//! The intervals of a fleet.

use std::time::Duration;

/// The intervals of a fleet. All of its instances use the same.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How often the leader renews its lease, and the others look whether there is a leader and a newer
    /// document.
    pub heartbeat: Duration,
    /// How long a lease lasts without renewal: three heartbeats, so that two of them may be lost.
    pub lease: Duration,
    /// How long without a leader until an instance synchronises alone. A random part of a time that
    /// grows with the fleet is added.
    pub patience: Duration,
    /// How long after the start, without a reply from Redis.
    pub start_patience: Duration,
}

impl Default for Timing {
    /// Another instance leads at most 8 s after the end of a leader: the rest of its lease, and one
    /// heartbeat.
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(2),
            lease: Duration::from_secs(6),
            patience: Duration::from_secs(10),
            start_patience: Duration::from_secs(2),
        }
    }
}

impl Timing {
    /// The longest that a request to Redis takes. A leader must notice the end of its lease although a
    /// request hangs.
    pub(super) fn request_timeout(&self) -> Duration {
        self.lease / 2
    }

    /// The time until the next heartbeat: 0.9 to 1 of the interval, by `jitter` (0 to 1).
    pub(super) fn next_heartbeat(&self, jitter: f64) -> Duration {
        self.heartbeat.mul_f64(0.9 + 0.1 * jitter.clamp(0.0, 1.0))
    }
}
