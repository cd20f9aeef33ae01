//! When to try again after a failure.

use std::time::{Duration, Instant};

const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_mins(1);

/// How often in a row it went wrong, and until when to wait.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

impl Backoff {
    /// Notes a failure: waits a second, then twice as long each time up to a minute, somewhere
    /// between half of that and the whole, and never less than upstream `asked` for, which is within
    /// reason (`upstream::error`).
    pub(super) fn fail(&mut self, now: Instant, asked: Option<Duration>, draw: f64) {
        let whole = SHORTEST.saturating_mul(1 << self.failures.min(6)).min(LONGEST);
        let spread = whole.mul_f64(0.5 + draw.clamp(0.0, 1.0) / 2.0);
        let asked = asked.unwrap_or_default();
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + spread.max(asked));
    }

    pub(super) fn succeed(&mut self) {
        *self = Self::default();
    }

    /// Whether the last attempt failed.
    pub(super) fn is_failing(&self) -> bool {
        self.failures > 0
    }

    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until <= now)
    }

    /// Until when to wait, if at all.
    pub(super) fn until(&self) -> Option<Instant> {
        self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_minute_and_upstreams_wish_is_honoured() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        let mut pause = |asked, draw| {
            backoff.fail(now, asked, draw);
            assert!(!backoff.is_over(now));
            backoff.until().unwrap() - now
        };
        let seconds = Duration::from_secs;
        assert_eq!(pause(None, 1.0), seconds(1));
        assert_eq!(pause(None, 0.0), seconds(1));
        assert_eq!(pause(Some(seconds(90)), 1.0), seconds(90));
        assert_eq!(pause(Some(seconds(1)), 1.0), seconds(8));
        for _ in 0..90 {
            pause(None, 1.0);
        }
        assert_eq!(pause(None, 1.0), seconds(60));
        backoff.succeed();
        assert!(backoff.is_over(now));
    }
}
