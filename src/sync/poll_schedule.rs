//! Decides when an environment is polled next. Pure: times and random numbers are arguments.
//!
//! While upstream's event log is read, an environment is polled when its flags changed. The log shows a
//! change as soon as it is committed; a replica of Unleash may still serve the flags before it, because it
//! looks for new events every second. So the environment is polled once more after [`REPLICA_DELAY`].

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    backoff::{Backoff, jittered},
    event_log::{Observed, RECONCILE_INTERVAL},
};

/// The delay after the first failed poll.
const INITIAL_RETRY_DELAY: Duration = Duration::from_secs(1);

/// The longest delay between retries, unless the poll interval is longer.
const MAX_RETRY_DELAY: Duration = Duration::from_mins(1);

/// How long after a change some replica of upstream may serve the flags before it.
pub(super) const REPLICA_DELAY: Duration = Duration::from_secs(3);

/// When to poll an environment.
#[derive(Debug)]
pub(super) struct PollSchedule {
    interval: Duration,
    backoff: Backoff,
    next: Instant,
    /// The start of the last poll.
    started: Instant,
    /// Whether the event log shows when the flags of the last poll become outdated.
    trusts_log: bool,
    /// What upstream's event log shows about the flags; `None` while it is not read.
    observed: Option<Observed>,
}

/// How a poll ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum PollOutcome {
    /// Upstream responded.
    Complete {
        /// Whether the flags of every token are now known to be current.
        is_confirmed: bool,
        /// Whether they come from the server whose event log is read, and not from an edge before it.
        is_from_unleash: bool,
        /// When to poll again because a response does not count yet.
        recheck: Option<Instant>,
    },
    /// The poll failed.
    Failed {
        /// The `Retry-After` of upstream.
        retry_after: Option<Duration>,
        /// Whether some tokens got a response: the failure of one must not make the flags of others stale.
        is_partial: bool,
    },
}

impl PollSchedule {
    /// A schedule that begins with a poll.
    pub(super) fn new(interval: Duration, now: Instant) -> Self {
        Self {
            interval,
            backoff: Backoff::new(INITIAL_RETRY_DELAY, MAX_RETRY_DELAY.max(interval)),
            next: now,
            started: now,
            trusts_log: false,
            observed: None,
        }
    }

    /// When to poll next.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// The number of consecutive polls that failed.
    pub(super) fn failures(&self) -> u32 {
        self.backoff.failures()
    }

    /// Earlier failures no longer matter.
    pub(super) fn reset_failures(&mut self) {
        self.backoff.reset();
    }

    /// Polls as soon as possible.
    pub(super) fn poll_now(&mut self, now: Instant) {
        self.next = now;
    }

    /// Polls one interval from now.
    pub(super) fn poll_after_interval(&mut self, now: Instant, jitter: f64) {
        self.next = now + jittered(self.interval, jitter);
    }

    /// Records the start of a poll.
    pub(super) fn begin(&mut self, now: Instant) {
        self.started = now;
    }

    /// Records the end of a poll, and schedules the next one.
    pub(super) fn end(&mut self, outcome: PollOutcome, now: Instant, jitter: f64) {
        self.trusts_log = matches!(
            outcome,
            PollOutcome::Complete { is_confirmed: true, is_from_unleash: true, .. }
        );
        self.next = match outcome {
            PollOutcome::Complete { recheck, .. } => {
                self.backoff.reset();
                let next = match self.observed {
                    Some(observed) if self.trusts_log => self
                        .missing_change(observed)
                        .unwrap_or_else(|| now + jittered(RECONCILE_INTERVAL, jitter)),
                    _ => now + jittered(self.interval, jitter),
                };
                let recheck = recheck.filter(|at| *at >= now);
                recheck.map_or(next, |recheck| next.min(recheck))
            }
            PollOutcome::Failed { retry_after, is_partial } => {
                let delay = self.backoff.next_delay(retry_after, jitter);
                let is_partial = is_partial && retry_after.is_none();
                now + if is_partial { delay.min(self.interval) } else { delay }
            }
        };
    }

    /// Records what upstream's event log shows. Returns until when it shows that the flags of the last
    /// poll are current, if it does.
    pub(super) fn observe(&mut self, observed: Option<Observed>, now: Instant) -> Option<Instant> {
        let was_observed = std::mem::replace(&mut self.observed, observed).is_some();
        if !self.trusts_log {
            return None;
        }
        match observed {
            Some(observed) => {
                let Some(at) = self.missing_change(observed) else {
                    return Some(observed.checked_at);
                };
                self.next = self.next.min(at);
            }
            // The log no longer shows changes.
            None if was_observed => self.next = self.next.min(now),
            None => {}
        }
        None
    }

    /// When to poll because the last poll may have missed a change; `None` if it has not.
    fn missing_change(&self, Observed { changed_at, .. }: Observed) -> Option<Instant> {
        let times = [changed_at, changed_at + REPLICA_DELAY];
        times.into_iter().find(|at| self.started < *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(15);
    const SECOND: Duration = Duration::from_secs(1);

    /// Picks exactly the interval, and three quarters of a backoff's delay.
    const JITTER: f64 = 0.5;

    const CONFIRMED: PollOutcome =
        PollOutcome::Complete { is_confirmed: true, is_from_unleash: true, recheck: None };

    struct Fixture {
        schedule: PollSchedule,
        start: Instant,
    }

    impl Fixture {
        /// Times are seconds since the start. The first poll took a second and confirmed the flags.
        fn polled() -> Self {
            let start = Instant::now();
            let mut fixture = Self { schedule: PollSchedule::new(INTERVAL, start), start };
            fixture.poll(0, CONFIRMED);
            fixture
        }

        fn at(&self, seconds: u32) -> Instant {
            self.start + SECOND * seconds
        }

        fn poll(&mut self, at: u32, outcome: PollOutcome) {
            self.schedule.begin(self.at(at));
            self.schedule.end(outcome, self.at(at + 1), JITTER);
        }

        /// Returns until when the log confirms the flags.
        fn observe(&mut self, changed: u32, checked: u32) -> Option<u64> {
            let (changed_at, checked_at) = (self.at(changed), self.at(checked));
            let observed = Observed { changed_at, checked_at };
            let confirmed = self.schedule.observe(Some(observed), self.at(checked));
            confirmed.map(|at| (at - self.start).as_secs())
        }

        fn next(&self) -> u64 {
            (self.schedule.next() - self.start).as_secs()
        }
    }

    #[test]
    fn without_an_event_log_polls_follow_the_interval() {
        let fixture = Fixture::polled();
        assert_eq!(fixture.next(), 1 + 15);
    }

    #[test]
    fn a_log_is_trusted_after_a_poll_that_began_after_it_was_first_read() {
        let mut fixture = Fixture::polled();
        assert_eq!(fixture.observe(2, 2), None);
        assert_eq!(fixture.next(), 2);
        fixture.poll(2, CONFIRMED);
        assert_eq!(fixture.next(), 5, "a replica may be late");
        fixture.poll(5, CONFIRMED);
        assert_eq!(fixture.next(), 6 + 600);
        assert_eq!(fixture.observe(2, 17), Some(17));
        assert_eq!(fixture.next(), 6 + 600, "nothing changed");
    }

    #[test]
    fn a_change_is_polled_at_once_and_again_after_the_replica_delay() {
        let mut fixture = Fixture::polled();
        fixture.observe(2, 2);
        fixture.poll(5, CONFIRMED);
        assert_eq!(fixture.observe(30, 30), None);
        assert_eq!(fixture.next(), 30);
        fixture.poll(30, CONFIRMED);
        assert_eq!(fixture.next(), 33);
        assert_eq!(fixture.observe(30, 32), None, "not yet confirmed");
        fixture.poll(33, CONFIRMED);
        assert_eq!(fixture.next(), 34 + 600);
    }

    #[test]
    fn a_change_during_a_poll_is_polled_after_it() {
        let mut fixture = Fixture::polled();
        fixture.schedule.begin(fixture.at(20));
        assert_eq!(fixture.observe(21, 21), None);
        fixture.schedule.end(CONFIRMED, fixture.at(22), JITTER);
        assert_eq!(fixture.next(), 21);
    }

    #[test]
    fn when_the_log_is_lost_polls_follow_the_interval_at_once() {
        let mut fixture = Fixture::polled();
        fixture.observe(2, 2);
        fixture.poll(5, CONFIRMED);
        assert_eq!(fixture.schedule.observe(None, fixture.at(40)), None);
        assert_eq!(fixture.next(), 40);
        fixture.poll(40, CONFIRMED);
        assert_eq!(fixture.next(), 41 + 15);
        assert_eq!(fixture.schedule.observe(None, fixture.at(42)), None);
        assert_eq!(fixture.next(), 41 + 15, "only once");
    }

    #[test]
    fn log_does_not_count_after_unconfirmed_and_failed_polls_and_for_flags_of_an_edge() {
        let mut fixture = Fixture::polled();
        fixture.observe(2, 2);
        for (is_confirmed, is_from_unleash) in [(false, true), (true, false)] {
            fixture.poll(5, PollOutcome::Complete { is_confirmed, is_from_unleash, recheck: None });
            assert_eq!(fixture.next(), 6 + 15);
            assert_eq!((fixture.observe(8, 10), fixture.next()), (None, 6 + 15));
        }
        let failed = PollOutcome::Failed { retry_after: Some(SECOND * 90), is_partial: false };
        fixture.poll(21, failed);
        assert_eq!((fixture.observe(30, 30), fixture.next()), (None, 22 + 90));
    }

    #[test]
    fn recheck_comes_before_the_interval_and_partial_failures_keep_to_it() {
        let mut fixture = Fixture::polled();
        let recheck = Some(fixture.at(8));
        fixture
            .poll(5, PollOutcome::Complete { is_confirmed: true, is_from_unleash: true, recheck });
        assert_eq!(fixture.next(), 8);
        for _ in 0..10 {
            fixture.poll(20, PollOutcome::Failed { retry_after: None, is_partial: true });
        }
        assert_eq!((fixture.next(), fixture.schedule.failures()), (21 + 15, 10));
    }
}
