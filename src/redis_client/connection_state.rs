//! Decides when to use, check, open or refuse a connection. It performs no IO and reads no clock.
//!
//! At most one attempt to connect runs at a time, and everyone who needs a connection joins it. After
//! a failure there is a delay, which grows until a command succeeds, not until a connection is open:
//! a server that accepts connections but answers nothing is not asked more often than one that is away.

use std::{sync::Arc, time::Duration};

use redis::RedisError;
use tokio::time::Instant;

use crate::backoff::Backoff;

/// Delays after failures.
const INITIAL_DELAY: Duration = Duration::from_millis(100);
const MAX_DELAY: Duration = Duration::from_secs(3);

/// How long a connection may be unused before it is checked first: servers and balancers close idle
/// connections, and a command that finds out has an unknown outcome.
const IDLE_LIMIT: Duration = Duration::from_secs(15);

/// The state of the connection of a client. `C` is an open connection, `O` the attempt to open one.
pub(super) struct ConnectionState<C, O> {
    phase: Phase<C, O>,
    /// Counts connections and attempts, so that late results of earlier ones change nothing.
    generation: u64,
    backoff: Backoff,
}

enum Phase<C, O> {
    Closed,
    Opening(O),
    Open { connection: C, used_at: Instant },
    Waiting { until: Instant, cause: Arc<RedisError> },
}

/// How to get a connection.
#[derive(Debug)]
pub(super) enum Step<C, O> {
    /// Use this connection.
    Use { connection: C, generation: u64 },
    /// Check this connection first, and [discard](ConnectionState::discard) it if it is closed.
    Check { connection: C, generation: u64 },
    /// Join this attempt, and [report](ConnectionState::opened) its result.
    Join { attempt: O, generation: u64 },
    /// Fail: the next attempt has to wait.
    Fail(Arc<RedisError>),
}

impl<C: Clone, O: Clone> ConnectionState<C, O> {
    /// Without a connection.
    pub(super) const fn new() -> Self {
        let backoff = Backoff::new(INITIAL_DELAY, MAX_DELAY);
        Self { phase: Phase::Closed, generation: 0, backoff }
    }

    /// The next step towards a connection; `open` begins an attempt.
    pub(super) fn next(&mut self, now: Instant, open: impl FnOnce() -> O) -> Step<C, O> {
        if matches!(&self.phase, Phase::Waiting { until, .. } if *until <= now) {
            self.phase = Phase::Closed;
        }
        if matches!(self.phase, Phase::Closed) {
            self.generation += 1;
            self.phase = Phase::Opening(open());
        }
        let generation = self.generation;
        match &mut self.phase {
            Phase::Open { connection, used_at } => {
                let is_idle = now.saturating_duration_since(*used_at) > IDLE_LIMIT;
                let connection = connection.clone();
                if is_idle {
                    Step::Check { connection, generation }
                } else {
                    Step::Use { connection, generation }
                }
            }
            Phase::Opening(attempt) => Step::Join { attempt: attempt.clone(), generation },
            Phase::Waiting { cause, .. } => Step::Fail(Arc::clone(cause)),
            Phase::Closed => unreachable!("an attempt was begun above"),
        }
    }

    /// Why no connection may be opened now, if that is so.
    pub(super) fn failure(&self, now: Instant) -> Option<Arc<RedisError>> {
        match &self.phase {
            Phase::Waiting { until, cause } if now < *until => Some(Arc::clone(cause)),
            _ => None,
        }
    }

    /// Stores the connection of a successful attempt.
    pub(super) fn opened(&mut self, generation: u64, connection: C, now: Instant) {
        if self.generation == generation && matches!(self.phase, Phase::Opening(_)) {
            self.phase = Phase::Open { connection, used_at: now };
        }
    }

    /// Records that the server answered.
    pub(super) fn answered(&mut self, generation: u64, now: Instant) {
        if self.generation == generation
            && let Phase::Open { used_at, .. } = &mut self.phase
        {
            *used_at = now;
            self.backoff.reset();
        }
    }

    /// Records that an attempt failed, or that a connection broke. `jitter`, from 0 to 1, spreads the
    /// next attempts of several instances.
    pub(super) fn failed(
        &mut self,
        generation: u64,
        cause: Arc<RedisError>,
        now: Instant,
        jitter: f64,
    ) {
        let is_current = self.generation == generation;
        if is_current && matches!(self.phase, Phase::Opening(_) | Phase::Open { .. }) {
            let until = now + self.backoff.next_delay(None, jitter);
            self.phase = Phase::Waiting { until, cause };
        }
    }

    /// Forgets a connection that was found closed while it was idle; the next one may be opened at once.
    pub(super) fn discard(&mut self, generation: u64) {
        if self.generation == generation && matches!(self.phase, Phase::Open { .. }) {
            self.phase = Phase::Closed;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    type State = ConnectionState<&'static str, u32>;

    fn cause() -> Arc<RedisError> {
        Arc::new(io::Error::from(io::ErrorKind::ConnectionRefused).into())
    }

    fn open(state: &mut State, now: Instant) -> u64 {
        let Step::Join { generation, .. } = state.next(now, || 1) else { panic!("not closed") };
        state.opened(generation, "connection", now);
        generation
    }

    #[tokio::test(start_paused = true)]
    async fn everyone_joins_the_same_attempt() {
        let (mut state, now) = (State::new(), Instant::now());
        for _ in 0..3 {
            let step = state.next(now, || 7);
            assert!(matches!(step, Step::Join { attempt: 7, generation: 1 }), "{step:?}");
        }
        state.opened(1, "connection", now);
        let step = state.next(now, || unreachable!());
        assert!(matches!(step, Step::Use { connection: "connection", generation: 1 }), "{step:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn failures_delay_the_next_attempt_until_a_command_succeeds() {
        let (mut state, mut now) = (State::new(), Instant::now());
        let mut delays = Vec::new();
        for _ in 0..7 {
            let generation = open(&mut state, now);
            state.failed(generation, cause(), now, 1.0);
            let begun = now;
            while let Step::Fail(_) = state.next(now, || 1) {
                assert!(state.failure(now).is_some());
                now += Duration::from_millis(100);
            }
            delays.push((now - begun).as_millis());
            state.opened(state.generation, "connection", now);
            state.discard(state.generation);
        }
        assert_eq!(delays, [100, 200, 400, 800, 1600, 3000, 3000]);
        let generation = open(&mut state, now);
        state.answered(generation, now);
        state.failed(generation, cause(), now, 1.0);
        assert!(state.failure(now + INITIAL_DELAY / 2).is_some());
        assert!(state.failure(now + INITIAL_DELAY).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn idle_connection_is_checked_and_replaced_at_once() {
        let (mut state, now) = (State::new(), Instant::now());
        let generation = open(&mut state, now);
        state.answered(generation, now + IDLE_LIMIT);
        let later = now + IDLE_LIMIT * 2;
        assert!(matches!(state.next(later, || 2), Step::Use { .. }));
        let later = later + Duration::from_millis(1);
        assert!(matches!(state.next(later, || 2), Step::Check { .. }));
        state.discard(generation);
        assert!(matches!(state.next(later, || 2), Step::Join { attempt: 2, .. }));
    }

    #[tokio::test(start_paused = true)]
    async fn late_results_of_an_earlier_connection_change_nothing() {
        let (mut state, now) = (State::new(), Instant::now());
        let first = open(&mut state, now);
        state.discard(first);
        let second = open(&mut state, now);
        state.failed(first, cause(), now, 1.0);
        state.discard(first);
        let step = state.next(now, || unreachable!());
        assert!(matches!(step, Step::Use { generation, .. } if generation == second), "{step:?}");
    }
}
