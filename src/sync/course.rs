//! Decides when to (re)open a token's event stream, and whether to poll until then.
//!
//! Sans IO: it returns durations. It opens no stream, sends no request and never sleeps.

use std::time::Duration;

use super::pace::Pace;

/// How flags are fetched from upstream (`--upstream-mode`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mode {
    /// By streaming where upstream supports it, otherwise by polling.
    Auto,
    /// By polling.
    Poll,
    /// By streaming, which upstream is expected to support; by polling while it does not.
    Stream,
}

impl Mode {
    /// Parses a mode's name.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Self::Auto),
            "poll" => Some(Self::Poll),
            "stream" => Some(Self::Stream),
            _ => None,
        }
    }
}

/// Why a stream could not be opened.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Refusal {
    /// Upstream does not support streaming.
    NotOffered,
    /// Upstream rejects the token on the streaming endpoint. Only a poll shows whether the token is
    /// valid: Unleash Edge responds with 403 to every token when streaming is off.
    NotAdmitted,
    /// Upstream accepts no further stream now (429), with its `Retry-After` if it sent one.
    Crowded(Option<Duration>),
    /// Upstream is unreachable or failed, with its `Retry-After` if it sent one.
    Failed(Option<Duration>),
}

/// Why a stream was closed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum End {
    /// Upstream ended it regularly, with its `retry` delay if it sent one.
    Over(Option<Duration>),
    /// The connection broke.
    Broken,
    /// No data arrived within the idle timeout.
    Silent,
    /// An event could not be parsed or applied.
    Unreadable,
    /// It sent an older state than the one already known: another replica of upstream responded.
    Outdated,
    /// Upstream asked clients that can poll to poll.
    Dismissed,
}

impl End {
    /// The label value in metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Over(_) => "over",
            Self::Broken => "broken",
            Self::Silent => "silent",
            Self::Unreadable => "unreadable",
            Self::Outdated => "outdated",
            Self::Dismissed => "dismissed",
        }
    }
}

/// When to reconnect after a stream was closed or could not be opened.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Next {
    /// Delay before the next attempt to open the stream.
    pub(super) open_after: Duration,
    /// Whether to poll immediately rather than one interval after the flags were last confirmed.
    pub(super) polls_now: bool,
}

/// Retry interval where upstream does not support streaming.
const ASK_AGAIN: Duration = Duration::from_mins(5);

/// Retry interval where a stream is expected: it worked before, or `--upstream-mode` is `stream`.
const ASK_SOON: Duration = Duration::from_mins(1);

/// Delay after a 429 without `Retry-After`.
const CROWDED_FOR: Duration = Duration::from_mins(1);

/// A stream that stayed open this long is reopened immediately.
const LASTING: Duration = Duration::from_secs(10);

/// The longest delay before a stable stream is reopened.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The longest `retry` delay accepted from upstream at the end of a stream.
const LONGEST_WAIT: Duration = Duration::from_mins(1);

/// The shortest delay after a rejected attempt, even if upstream hints that it streams.
const HINTED: Duration = Duration::from_secs(10);

/// Reconnect state of one token's stream.
#[derive(Debug)]
pub(super) struct Course {
    mode: Mode,
    pace: Pace,
    /// A stream has delivered a state before.
    followed: bool,
    /// Upstream declined streaming at the last attempt.
    declined: bool,
}

impl Course {
    /// Starts with an immediate attempt.
    pub(super) fn new(mode: Mode) -> Self {
        Self { mode, pace: Pace::new(Duration::ZERO), followed: false, declined: false }
    }

    /// Records that a stream has delivered its state.
    pub(super) fn told(&mut self) {
        (self.followed, self.declined) = (true, false);
    }

    /// Schedules the next attempt after one that failed. `jitter` is between 0 and 1: it spreads the
    /// retries of a fleet that failed at the same time.
    pub(super) fn refused(&mut self, refusal: Refusal, jitter: f64) -> Next {
        self.declined = matches!(refusal, Refusal::NotOffered | Refusal::NotAdmitted);
        let delay = match refusal {
            Refusal::NotOffered | Refusal::NotAdmitted => {
                let expected = self.followed || self.mode == Mode::Stream;
                let pause = if expected { ASK_SOON } else { ASK_AGAIN };
                pause.mul_f64(0.8 + 0.4 * jitter)
            }
            // Jitter only adds: never earlier than `Retry-After`.
            Refusal::Crowded(retry_after) => {
                retry_after.unwrap_or(CROWDED_FOR).mul_f64(1.0 + 0.2 * jitter)
            }
            Refusal::Failed(retry_after) => self.pace.after_failure(retry_after, jitter),
        };
        Next { open_after: delay, polls_now: refusal == Refusal::NotAdmitted }
    }

    /// Schedules the next attempt after a stream that was open for `lifetime`.
    pub(super) fn ended(&mut self, end: End, lifetime: Duration, jitter: f64) -> Next {
        if lifetime >= LASTING {
            self.pace = Pace::new(Duration::ZERO);
        }
        let delay = match end {
            End::Dismissed => {
                self.declined = true;
                let pause = if self.mode == Mode::Stream { ASK_SOON } else { ASK_AGAIN };
                pause.mul_f64(0.8 + 0.4 * jitter)
            }
            // A short-lived stream is reopened with backoff, even after a regular end.
            _ if lifetime < LASTING => self.pace.after_failure(None, jitter),
            End::Over(Some(wait)) => wait.min(LONGEST_WAIT).mul_f64(1.0 + 0.2 * jitter),
            End::Over(None) | End::Broken | End::Silent | End::Unreadable | End::Outdated => {
                AT_ONCE.mul_f64(jitter)
            }
        };
        // A stream is complete up to its end or break. After a timeout or a stale state, changes may
        // have been missed, so a poll is needed.
        Next { open_after: delay, polls_now: matches!(end, End::Silent | End::Outdated) }
    }

    /// The delay, counted from the last failed attempt, after which a hint from upstream allows another
    /// one; `None` unless upstream declined streaming.
    pub(super) fn hinted(&self) -> Option<Duration> {
        self.declined.then_some(HINTED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_hours(1);
    const SHORT: Duration = Duration::from_secs(1);

    fn followed(mode: Mode) -> Course {
        let mut policy = Course::new(mode);
        policy.told();
        policy
    }

    /// Milliseconds until the next attempt.
    fn pause(next: Next) -> u128 {
        next.open_after.as_millis()
    }

    #[test]
    fn unsupported_stream_is_retried_after_5_min_and_after_1_min_if_expected() {
        for refusal in [Refusal::NotOffered, Refusal::NotAdmitted] {
            let ask = |mut policy: Course| pause(policy.refused(refusal, 0.5));
            assert_eq!(ask(Course::new(Mode::Auto)), 300_000);
            assert_eq!(ask(Course::new(Mode::Stream)), 60_000);
            assert_eq!(ask(followed(Mode::Auto)), 60_000);
            let mut policy = Course::new(Mode::Auto);
            assert_eq!(pause(policy.refused(refusal, 0.0)), 240_000);
            assert_eq!(pause(policy.refused(refusal, 1.0)), 360_000, "fleets spread");
        }
    }

    #[test]
    fn streaming_hint_shortens_delay_only_after_upstream_declined() {
        let mut policy = Course::new(Mode::Auto);
        assert_eq!(policy.hinted(), None);
        policy.refused(Refusal::NotOffered, 0.5);
        assert_eq!(policy.hinted(), Some(HINTED));
        policy.refused(Refusal::Crowded(None), 0.5);
        assert_eq!(policy.hinted(), None, "a limit is not a refusal");
        policy.ended(End::Dismissed, LONG, 0.5);
        assert_eq!(policy.hinted(), Some(HINTED));
        policy.told();
        policy.ended(End::Broken, LONG, 0.5);
        assert_eq!(policy.hinted(), None);
    }

    #[test]
    fn throttled_stream_is_retried_after_retry_after_or_1_min() {
        let mut policy = Course::new(Mode::Auto);
        let retry_after = Some(Duration::from_secs(20));
        assert_eq!(pause(policy.refused(Refusal::Crowded(retry_after), 0.0)), 20_000);
        assert_eq!(pause(policy.refused(Refusal::Crowded(retry_after), 1.0)), 24_000);
        assert_eq!(pause(policy.refused(Refusal::Crowded(None), 0.0)), 60_000);
    }

    #[test]
    fn stable_stream_is_reopened_within_1_s_for_any_close_reason() {
        for end in [End::Over(None), End::Broken, End::Silent, End::Unreadable] {
            let next = followed(Mode::Auto).ended(end, LONG, 0.5);
            assert_eq!(pause(next), 500, "{end:?}");
            assert_eq!(next.polls_now, end == End::Silent);
        }
        let over = |wait| {
            let end = End::Over(Some(Duration::from_secs(wait)));
            pause(followed(Mode::Auto).ended(end, LONG, 0.0))
        };
        assert_eq!((over(3), over(4000)), (3_000, 60_000), "upstream's delay, capped");
        assert_eq!(pause(followed(Mode::Auto).ended(End::Dismissed, LONG, 0.5)), 300_000);
    }

    #[test]
    fn delay_grows_while_stream_fails_to_open_or_closes_early() {
        let mut policy = followed(Mode::Auto);
        let fail = |policy: &mut Course| pause(policy.refused(Refusal::Failed(None), 0.5));
        let end =
            |policy: &mut Course, lifetime| pause(policy.ended(End::Over(None), lifetime, 0.5));
        assert_eq!([fail(&mut policy), fail(&mut policy)], [1_000, 2_000]);
        assert_eq!([end(&mut policy, SHORT), end(&mut policy, SHORT)], [4_000, 8_000]);
        for _ in 0..9 {
            assert!(fail(&mut policy) <= 72_000);
        }
        assert_eq!(end(&mut policy, LONG), 500);
        assert_eq!(fail(&mut policy), 1_000);
        let retry_after = Some(Duration::from_secs(9));
        assert_eq!(pause(policy.refused(Refusal::Failed(retry_after), 0.5)), 9_000);
    }

    #[test]
    fn token_rejected_by_stream_is_polled_immediately() {
        let polls = |refusal| Course::new(Mode::Auto).refused(refusal, 0.5).polls_now;
        assert!(polls(Refusal::NotAdmitted));
        for refusal in [Refusal::NotOffered, Refusal::Crowded(None), Refusal::Failed(None)] {
            assert!(!polls(refusal), "{refusal:?}");
        }
    }
}
