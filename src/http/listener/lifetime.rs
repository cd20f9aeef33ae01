//! When a connection ends: the policy, without a clock and without IO.
//!
//! A connection is looked at when its alarm rings, and when something has begun that may not last. What
//! has happened on it since the last look is told by counters ([`Activity`]), so that a request costs
//! no look at the clock: a connection that was in use lately is taken to have been in use until now,
//! and stays a little longer than it has to. It never ends earlier.
//!
//! Over HTTP/1 a request that crosses the end of its connection on the way is lost, and nobody can tell
//! whether it was answered. So an idle connection outlasts its timeout ([`Limits::idle_for`]): a client
//! that keeps to the timeout, or polls as often, has had its answer or a new connection by then.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    activity::{Activity, Seen, Waiting},
    limits::{FIRST_REQUEST_TIMEOUT, Limits, SHUTDOWN_TIMEOUT, STALL_TIMEOUT},
};

/// What is to be done with a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Action {
    /// Nothing, and it is looked at again at this time.
    Keep(Instant),
    /// It is old: its next answer is its last. It is looked at again at this time.
    CloseAfterNext(Instant),
    /// It is told to end, as its protocol has it, and looked at again at this time.
    ShutDown(Instant),
    /// It is closed as it is.
    Abort,
}

/// How long a connection has lasted, and may last.
#[derive(Debug)]
pub(super) struct Lifetime {
    idle_for: Duration,
    header_read_timeout: Duration,
    begins_by: Instant,
    ages_at: Option<Instant>,
    /// When it was last known to be in use.
    used_at: Instant,
    seen: Seen,
    /// What it waited for at the last look, and since when.
    waits: (Waiting, Instant),
    left_at: Option<Instant>,
}

/// How many looks there are in the time for which an idle connection is kept: it is kept longer by at most
/// what lies between two.
const CHECKS_PER_TIMEOUT: u32 = 8;

impl Lifetime {
    /// One that begins now. `jitter` is between 0 and 1, so that connections which began together do not
    /// end together.
    pub(super) fn new(limits: &Limits, jitter: f64, now: Instant) -> Self {
        Self {
            idle_for: limits.idle_for(),
            header_read_timeout: limits.header_read_timeout,
            begins_by: now + FIRST_REQUEST_TIMEOUT,
            ages_at: limits.max_age.map(|age| now + age.mul_f64(0.9 + 0.2 * jitter)),
            used_at: now,
            seen: Seen::default(),
            waits: (Waiting::Request, now),
            left_at: None,
        }
    }

    /// When to look for the first time.
    pub(super) fn first_check(&self) -> Instant {
        let first = self.used_at + self.idle_for / CHECKS_PER_TIMEOUT;
        self.ages_at.map_or(first, |age| age.min(first))
    }

    /// Until when its first request may come though the listener has closed.
    pub(super) fn begins_by(&self) -> Instant {
        self.begins_by
    }

    /// Says that the connection was told to end.
    pub(super) fn leave(&mut self, now: Instant) {
        self.left_at.get_or_insert(now);
    }

    /// What is to be done at this time.
    pub(super) fn check(&mut self, activity: &Activity, now: Instant) -> Action {
        let (seen, waiting) = (activity.seen(), activity.waiting());
        let before = std::mem::replace(&mut self.seen, seen);
        // Writes are no use: answers to pings are among them.
        let is_same = seen.requests == before.requests;
        let was_in_use = self.waits.0 != Waiting::Request;
        if !is_same || was_in_use || waiting != Waiting::Request {
            self.used_at = now;
        }
        if seen != before || self.waits.0 != waiting {
            self.waits = (waiting, now);
        }
        let since = self.waits.1;
        let soon = now + self.idle_for / CHECKS_PER_TIMEOUT;
        let next = match (waiting, self.left_at) {
            // Whoever answers has a deadline of its own.
            (Waiting::Answer, _) => {
                if is_same {
                    now + self.idle_for
                } else {
                    soon
                }
            }
            (Waiting::Client, _) => since + STALL_TIMEOUT,
            (Waiting::Head, _) => since + self.header_read_timeout,
            (Waiting::Request, Some(left_at)) => left_at.max(self.used_at) + SHUTDOWN_TIMEOUT,
            (Waiting::Request, None) => {
                let idle_until = self.used_at + self.idle_for;
                if idle_until <= now {
                    self.left_at = Some(now);
                    return Action::ShutDown(now + SHUTDOWN_TIMEOUT);
                }
                idle_until.min(soon)
            }
        };
        if next <= now {
            return Action::Abort;
        }
        match self.ages_at {
            Some(ages_at) if ages_at <= now => {
                self.ages_at = None;
                Action::CloseAfterNext(next)
            }
            Some(ages_at) => Action::Keep(next.min(ages_at)),
            None => Action::Keep(next),
        }
    }
}
