//! Delays between attempts after failures.

use std::time::{Duration, Instant};

const MIN_DELAY: Duration = Duration::from_secs(1);
const MAX_DELAY: Duration = Duration::from_mins(1);

/// Number of consecutive failures, and the time of the next attempt.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
    retry_at: Option<Instant>,
}

impl Backoff {
    /// Schedules the next attempt. The delay is one second after the first failure and doubles up to a
    /// minute; the actual delay is between half of it and the whole, chosen by `draw` in `0..1`. It is
    /// never less than the `retry_after` that upstream requests (which `upstream::error` limits).
    pub(super) fn record_failure(
        &mut self,
        now: Instant,
        retry_after: Option<Duration>,
        draw: f64,
    ) {
        let whole = MIN_DELAY.saturating_mul(1 << self.failures.min(6)).min(MAX_DELAY);
        let spread = whole.mul_f64(0.5 + draw.clamp(0.0, 1.0) / 2.0);
        let retry_after = retry_after.unwrap_or_default();
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(now + spread.max(retry_after));
    }

    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Whether the last attempt failed.
    pub(super) fn is_failing(&self) -> bool {
        self.failures > 0
    }

    pub(super) fn is_elapsed(&self, now: Instant) -> bool {
        self.retry_at.is_none_or(|at| at <= now)
    }

    /// Time of the next attempt, if there is a delay.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delay_doubles_up_to_a_minute_and_respects_retry_after() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        let mut delay = |retry_after, draw| {
            backoff.record_failure(now, retry_after, draw);
            assert!(!backoff.is_elapsed(now));
            backoff.retry_at().unwrap() - now
        };
        let seconds = Duration::from_secs;
        assert_eq!(delay(None, 1.0), seconds(1));
        assert_eq!(delay(None, 0.0), seconds(1));
        assert_eq!(delay(Some(seconds(90)), 1.0), seconds(90));
        assert_eq!(delay(Some(seconds(1)), 1.0), seconds(8));
        for _ in 0..90 {
            delay(None, 1.0);
        }
        assert_eq!(delay(None, 1.0), seconds(60));
        backoff.reset();
        assert!(backoff.is_elapsed(now));
    }
}
