//! Limits how often a repeated event is logged: the first occurrence at once, later ones at most once a
//! minute with the number of suppressed ones.
//!
//! The caller chooses the event and its level, and logs it.

use std::time::Duration;

use crate::rate_limit::{Rate, RateLimiter};

/// The shortest interval between two log entries of one event.
const INTERVAL: Duration = Duration::from_mins(1);

/// Decides which occurrences of one event are logged.
#[derive(Debug)]
pub struct LogLimiter {
    limiter: RateLimiter,
    suppressed: u64,
}

impl Default for LogLimiter {
    fn default() -> Self {
        let limiter = RateLimiter::new(Rate { burst: 1, interval: INTERVAL });
        Self { limiter, suppressed: 0 }
    }
}

impl LogLimiter {
    /// Records an occurrence. `Some` if it should be logged, with the number of occurrences suppressed
    /// before it.
    pub fn admit(&mut self) -> Option<u64> {
        if self.limiter.acquire().is_err() {
            self.suppressed += 1;
            return None;
        }
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn first_occurrence_is_logged_at_once_and_later_ones_once_per_interval_with_a_count() {
        let mut limiter = LogLimiter::default();
        let mut logged = Vec::new();
        for _ in 0..25 {
            logged.extend(limiter.admit());
            tokio::time::advance(INTERVAL / 10).await;
        }
        assert_eq!(logged, [0, 9, 9]);
    }
}
