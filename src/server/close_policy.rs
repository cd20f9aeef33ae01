//! Decides when a connection closes. Pure: no clock and no IO.
//!
//! A connection is checked when its timer fires, and when a state with a shorter timeout begins.
//! Counters ([`ConnectionActivity`]) show what happened since the last check, so that a request does not
//! read the clock. A connection that was used since the last check counts as used until now: it may stay
//! open a little longer than its timeout, and never closes earlier.
//!
//! An HTTP/1 request that is sent while its connection closes is lost, and the client cannot know
//! whether it was processed. An idle connection therefore stays open for longer than its timeout
//! ([`ConnectionLimits::idle_timeout_with_margin`]), so that the requests of a client which respects the
//! timeout, or polls at that interval, arrive in time.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    connection_activity::{ActivityCounters, ConnectionActivity, ConnectionState},
    connection_limits::{ConnectionLimits, FIRST_REQUEST_TIMEOUT, SHUTDOWN_TIMEOUT, STALL_TIMEOUT},
};

/// The next action for a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum PolicyAction {
    /// Keep it open and check again at this time.
    KeepOpen(Instant),
    /// It reached its maximum age: close it after the next response. Check again at this time.
    CloseAfterResponse(Instant),
    /// Shut it down gracefully, as its protocol defines, and check again at this time.
    ShutDown(Instant),
    /// Close it immediately.
    Abort,
}

/// The timeouts of one connection and the observations that they depend on.
#[derive(Debug)]
pub(super) struct ConnectionPolicy {
    idle_timeout_with_margin: Duration,
    header_read_timeout: Duration,
    first_request_by: Instant,
    max_age_deadline: Option<Instant>,
    /// When the connection was last known to be in use.
    last_used_at: Instant,
    counters: ActivityCounters,
    /// The state at the last check, and its start.
    state_since: (ConnectionState, Instant),
    closing_since: Option<Instant>,
}

/// The number of checks per idle timeout. A connection stays open longer than the timeout by at most one
/// check interval.
const CHECKS_PER_IDLE_TIMEOUT: u32 = 8;

impl ConnectionPolicy {
    /// Starts the timeouts of a new connection. `jitter`, from 0 to 1, varies the maximum age by 10 %,
    /// so that connections which were opened together do not close together.
    pub(super) fn new(limits: &ConnectionLimits, jitter: f64, now: Instant) -> Self {
        Self {
            idle_timeout_with_margin: limits.idle_timeout_with_margin(),
            header_read_timeout: limits.header_read_timeout,
            first_request_by: now + FIRST_REQUEST_TIMEOUT,
            max_age_deadline: limits.max_age.map(|age| now + age.mul_f64(0.9 + 0.2 * jitter)),
            last_used_at: now,
            counters: ActivityCounters::default(),
            state_since: (ConnectionState::Idle, now),
            closing_since: None,
        }
    }

    /// The time of the first check.
    pub(super) fn first_check(&self) -> Instant {
        let first = self.last_used_at + self.idle_timeout_with_margin / CHECKS_PER_IDLE_TIMEOUT;
        self.max_age_deadline.map_or(first, |age| age.min(first))
    }

    /// The latest time for the first request after the listener has closed.
    pub(super) fn first_request_deadline(&self) -> Instant {
        self.first_request_by
    }

    /// Records that the connection has started to close.
    pub(super) fn start_closing(&mut self, now: Instant) {
        self.closing_since.get_or_insert(now);
    }

    /// Decides the next action from the activity since the last check.
    pub(super) fn next_action(
        &mut self,
        activity: &ConnectionActivity,
        now: Instant,
    ) -> PolicyAction {
        let (seen, waiting) = (activity.counters(), activity.state());
        let before = std::mem::replace(&mut self.counters, seen);
        // Writes do not count as use: they include responses to pings.
        let is_same = seen.requests == before.requests;
        let was_in_use = self.state_since.0 != ConnectionState::Idle;
        if !is_same || was_in_use || waiting != ConnectionState::Idle {
            self.last_used_at = now;
        }
        if seen != before || self.state_since.0 != waiting {
            self.state_since = (waiting, now);
        }
        let since = self.state_since.1;
        let soon = now + self.idle_timeout_with_margin / CHECKS_PER_IDLE_TIMEOUT;
        let next = match (waiting, self.closing_since) {
            // The service limits the duration of requests.
            (ConnectionState::Responding, _) => {
                if is_same {
                    now + self.idle_timeout_with_margin
                } else {
                    soon
                }
            }
            (ConnectionState::WriteBlocked, _) => since + STALL_TIMEOUT,
            (ConnectionState::ReadingHead, _) => since + self.header_read_timeout,
            (ConnectionState::Idle, Some(left_at)) => {
                left_at.max(self.last_used_at) + SHUTDOWN_TIMEOUT
            }
            (ConnectionState::Idle, None) => {
                let idle_until = self.last_used_at + self.idle_timeout_with_margin;
                if idle_until <= now {
                    self.closing_since = Some(now);
                    return PolicyAction::ShutDown(now + SHUTDOWN_TIMEOUT);
                }
                idle_until.min(soon)
            }
        };
        if next <= now {
            return PolicyAction::Abort;
        }
        match self.max_age_deadline {
            Some(ages_at) if ages_at <= now => {
                self.max_age_deadline = None;
                PolicyAction::CloseAfterResponse(next)
            }
            Some(ages_at) => PolicyAction::KeepOpen(next.min(ages_at)),
            None => PolicyAction::KeepOpen(next),
        }
    }
}
