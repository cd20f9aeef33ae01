//! Poll interval of one source, with exponential backoff while it fails.
//!
//! Sans IO: it returns durations and never sleeps.

use std::time::Duration;

/// The delay after the first failure.
const INITIAL_DELAY: Duration = Duration::from_secs(1);

/// The longest delay between retries, unless the interval is longer.
const MAX_DELAY: Duration = Duration::from_mins(1);

/// Poll interval and failure count of one source.
#[derive(Debug)]
pub(super) struct Backoff {
    interval: Duration,
    failures: u32,
}

impl Backoff {
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, failures: 0 }
    }

    /// The delay until the next request after a success. `jitter` is between 0 and 1: it spreads the
    /// requests of a fleet that started at the same time.
    pub(super) fn after_success(&mut self, jitter: f64) -> Duration {
        self.failures = 0;
        self.interval.mul_f64(0.9 + 0.2 * jitter)
    }

    /// The delay until the next request after a failure, never shorter than the source's `Retry-After`,
    /// which `upstream::error` has capped.
    pub(super) fn after_failure(&mut self, retry_after: Option<Duration>, jitter: f64) -> Duration {
        let factor = 2_u32.saturating_pow(self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        let longest = MAX_DELAY.max(self.interval);
        let pause = INITIAL_DELAY.saturating_mul(factor).min(longest);
        pause.mul_f64(0.8 + 0.4 * jitter).max(retry_after.unwrap_or_default())
    }

    /// Consecutive failures since the last success.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delay_doubles_while_source_fails_and_resets_on_success() {
        let mut backoff = Backoff::new(Duration::from_secs(15));
        let pauses: Vec<_> = (0..8).map(|_| backoff.after_failure(None, 0.5).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(backoff.after_success(0.5), Duration::from_secs(15));
        assert_eq!(backoff.after_failure(None, 0.5).as_secs(), 1);
    }

    #[test]
    fn delay_is_never_shorter_than_retry_after() {
        let mut backoff = Backoff::new(Duration::from_secs(15));
        let retry_after = Duration::from_secs(30);
        assert_eq!(backoff.after_failure(Some(retry_after), 0.0), retry_after);
    }
}
