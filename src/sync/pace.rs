//! When to ask a source again: at an interval, or after pauses that grow while it fails.
//!
//! Sans IO: it tells durations and sleeps nowhere.

use std::time::Duration;

/// The first pause after a failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause after failures, unless the interval is longer.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// The rhythm of one source.
#[derive(Debug)]
pub(super) struct Pace {
    interval: Duration,
    failures: u32,
}

impl Pace {
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, failures: 0 }
    }

    /// The time until the next question after one that succeeded, with `jitter` from 0 to 1 so that
    /// a fleet that starts together does not stay together.
    pub(super) fn after_success(&mut self, jitter: f64) -> Duration {
        self.failures = 0;
        self.interval.mul_f64(0.9 + 0.2 * jitter)
    }

    /// The time until the next question after one that failed; a source's own wish, which is within
    /// reason (`upstream::error`), counts.
    pub(super) fn after_failure(&mut self, wish: Option<Duration>, jitter: f64) -> Duration {
        let growth = 2_u32.saturating_pow(self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        let longest = LONGEST_PAUSE.max(self.interval);
        let pause = FIRST_PAUSE.saturating_mul(growth).min(longest);
        let wish = wish.unwrap_or_default();
        // Never before the time that the source named.
        pause.mul_f64(0.8 + 0.4 * jitter).max(wish)
    }

    /// Failures since the last success.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_while_a_source_fails_and_start_over_when_it_answers() {
        let mut pace = Pace::new(Duration::from_secs(15));
        let pauses: Vec<_> = (0..8).map(|_| pace.after_failure(None, 0.5).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(pace.after_success(0.5), Duration::from_secs(15));
        assert_eq!(pace.after_failure(None, 0.5).as_secs(), 1);
    }

    #[test]
    fn a_named_pause_is_kept() {
        let mut pace = Pace::new(Duration::from_secs(15));
        let wish = Duration::from_secs(30);
        assert_eq!(pace.after_failure(Some(wish), 0.0), wish);
    }
}
