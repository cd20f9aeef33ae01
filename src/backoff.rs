//! How long to wait before the next request: an interval with jitter, and exponential backoff.
//!
//! It has no clock, no randomness and no tasks: the caller passes a random number and waits. The caller
//! decides what counts as a failure, and how long to wait after a success.

use std::time::Duration;

/// The delay until the next request after a success: 0.9 to 1.1 of the interval, by `jitter` (0 to 1). It
/// spreads the requests of a fleet that started at the same time.
pub fn jittered(interval: Duration, jitter: f64) -> Duration {
    interval.mul_f64(0.9 + 0.2 * jitter)
}

/// The delays between failed tries. They double from an initial delay up to a maximum.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    /// Delays between `initial` and `max`, before any failure.
    pub const fn new(initial: Duration, max: Duration) -> Self {
        Self { initial, max, failures: 0 }
    }

    /// Records a failure, and returns the delay before the next try.
    ///
    /// `jitter`, from 0 to 1, picks a delay between half and all of the current one, so that instances
    /// that failed together do not retry together. The delay is never shorter than `retry_after`, the
    /// time that the other side asked for.
    pub fn next_delay(&mut self, retry_after: Option<Duration>, jitter: f64) -> Duration {
        let factor = 2_u32.saturating_pow(self.failures);
        self.failures = self.failures.saturating_add(1);
        let delay = self.initial.saturating_mul(factor).min(self.max);
        delay.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0).max(retry_after.unwrap_or_default())
    }

    /// Records a success: the next delay is the initial one.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// The number of failures since the last success.
    pub const fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backoff() -> Backoff {
        Backoff::new(Duration::from_secs(1), Duration::from_mins(1))
    }

    #[test]
    fn delay_doubles_up_to_the_maximum_and_resets_on_success() {
        let mut backoff = backoff();
        let delays: Vec<_> = (0..8).map(|_| backoff.next_delay(None, 1.0).as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(backoff.failures(), 8);
        backoff.reset();
        assert_eq!(backoff.failures(), 0);
        assert_eq!(backoff.next_delay(None, 1.0), Duration::from_secs(1));
    }

    #[test]
    fn delay_stays_at_the_maximum_after_any_number_of_failures() {
        let mut backoff = backoff();
        for _ in 0..100 {
            backoff.next_delay(None, 0.0);
        }
        assert_eq!(backoff.next_delay(None, 1.0), Duration::from_mins(1));
    }

    #[test]
    fn jitter_takes_off_up_to_half() {
        let mut backoff = backoff();
        assert_eq!(backoff.next_delay(None, 0.0), Duration::from_millis(500));
        assert_eq!(backoff.next_delay(None, 0.5), Duration::from_millis(1500));
    }

    #[test]
    fn delay_is_never_shorter_than_retry_after() {
        let retry_after = Duration::from_secs(90);
        assert_eq!(backoff().next_delay(Some(retry_after), 0.0), retry_after);
        let shorter = Duration::from_millis(10);
        assert_eq!(backoff().next_delay(Some(shorter), 1.0), Duration::from_secs(1));
    }
}
