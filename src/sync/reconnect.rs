//! Decides when to (re)open a token's event stream, and whether to poll until then.
//!
//! Sans IO: it returns durations. It opens no stream, sends no request and never sleeps.

use std::time::Duration;

use crate::backoff::Backoff;

/// How flags are fetched from upstream (`--upstream-mode`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum UpstreamMode {
    /// By streaming where upstream supports it, otherwise by polling.
    Auto,
    /// By polling.
    Poll,
    /// By streaming, which upstream is expected to support; by polling while it does not.
    Stream,
}

impl UpstreamMode {
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
pub(super) enum StreamUnavailable {
    /// Upstream does not support streaming.
    NotSupported,
    /// Upstream rejects the token on the streaming endpoint. Only a poll shows whether the token is
    /// valid: Unleash Edge responds with 403 to every token when streaming is off.
    Unauthorized,
    /// Upstream accepts no further stream now (429), with its `Retry-After` if it sent one.
    Throttled(Option<Duration>),
    /// Upstream is unreachable or failed, with its `Retry-After` if it sent one.
    Failed(Option<Duration>),
}

/// Why a stream was closed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum CloseReason {
    /// Upstream ended it regularly, with its `retry` delay if it sent one.
    Ended(Option<Duration>),
    /// The connection broke.
    Broken,
    /// No data arrived within the idle timeout.
    TimedOut,
    /// An event could not be parsed or applied.
    Unreadable,
    /// It sent an older state than the one already known: another replica of upstream responded.
    Stale,
    /// Upstream asked clients that can poll to poll.
    PollingPreferred,
}

impl CloseReason {
    /// The label value in metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Ended(_) => "over",
            Self::Broken => "broken",
            Self::TimedOut => "silent",
            Self::Unreadable => "unreadable",
            Self::Stale => "outdated",
            Self::PollingPreferred => "dismissed",
        }
    }
}

/// When to reconnect after a stream was closed or could not be opened.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Reconnect {
    /// Delay before the next attempt to open the stream.
    pub(super) delay: Duration,
    /// Whether to poll immediately rather than one interval after the flags were last confirmed.
    pub(super) poll_now: bool,
}

/// The shortest and the longest delay between attempts while upstream does not support streaming. It doubles
/// with each refusal in a row.
const UNSUPPORTED_RETRY_DELAY: Duration = Duration::from_mins(5);
const MAX_UNSUPPORTED_RETRY_DELAY: Duration = Duration::from_hours(1);

/// Retry interval where a stream is expected: it worked before, or `--upstream-mode` is `stream`.
const EXPECTED_STREAM_RETRY_INTERVAL: Duration = Duration::from_mins(1);

/// Delay after a 429 without `Retry-After`.
const DEFAULT_THROTTLED_DELAY: Duration = Duration::from_mins(1);

/// The shortest and the longest delay after attempts that failed, and after streams that closed early.
const INITIAL_RETRY_DELAY: Duration = Duration::from_secs(1);
const MAX_RETRY_DELAY: Duration = Duration::from_mins(1);

/// A stream that stayed open this long is reopened immediately.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// The longest delay before a stable stream is reopened.
const MAX_IMMEDIATE_DELAY: Duration = Duration::from_secs(1);

/// The longest `retry` delay accepted from upstream at the end of a stream.
const MAX_SERVER_RETRY_DELAY: Duration = Duration::from_mins(1);

/// The shortest delay after a rejected attempt, even if upstream hints that it streams.
const MIN_DELAY_AFTER_HINT: Duration = Duration::from_secs(10);

/// Reconnect state of one token's stream.
#[derive(Debug)]
pub(super) struct ReconnectPolicy {
    mode: UpstreamMode,
    backoff: Backoff,
    /// A stream has delivered a state before.
    was_synced: bool,
    /// How many times in a row upstream declined streaming.
    refusals: u32,
}

impl ReconnectPolicy {
    /// Starts with an immediate attempt.
    pub(super) fn new(mode: UpstreamMode) -> Self {
        let backoff = Backoff::new(INITIAL_RETRY_DELAY, MAX_RETRY_DELAY);
        Self { mode, backoff, was_synced: false, refusals: 0 }
    }

    /// Records that a stream has delivered its state.
    pub(super) fn on_synced(&mut self) {
        (self.was_synced, self.refusals) = (true, 0);
    }

    /// Schedules the next attempt after one that failed. `jitter` is between 0 and 1: it spreads the
    /// retries of a fleet that failed at the same time.
    pub(super) fn on_unavailable(&mut self, refusal: StreamUnavailable, jitter: f64) -> Reconnect {
        let delay = match refusal {
            StreamUnavailable::NotSupported | StreamUnavailable::Unauthorized => {
                self.delay_after_refusal(self.was_synced, jitter)
            }
            // Jitter only adds: never earlier than `Retry-After`.
            StreamUnavailable::Throttled(retry_after) => {
                self.refusals = 0;
                retry_after.unwrap_or(DEFAULT_THROTTLED_DELAY).mul_f64(1.0 + 0.2 * jitter)
            }
            StreamUnavailable::Failed(retry_after) => {
                self.refusals = 0;
                self.backoff.next_delay(retry_after, jitter)
            }
        };
        Reconnect { delay, poll_now: refusal == StreamUnavailable::Unauthorized }
    }

    /// Schedules the next attempt after a stream that was open for `lifetime`.
    pub(super) fn on_closed(
        &mut self,
        end: CloseReason,
        lifetime: Duration,
        jitter: f64,
    ) -> Reconnect {
        if lifetime >= STABLE_AFTER {
            self.backoff.reset();
        }
        let delay = match end {
            CloseReason::PollingPreferred => self.delay_after_refusal(false, jitter),
            // A short-lived stream is reopened with backoff, even after a regular end.
            _ if lifetime < STABLE_AFTER => self.backoff.next_delay(None, jitter),
            CloseReason::Ended(Some(wait)) => {
                wait.min(MAX_SERVER_RETRY_DELAY).mul_f64(1.0 + 0.2 * jitter)
            }
            CloseReason::Ended(None)
            | CloseReason::Broken
            | CloseReason::TimedOut
            | CloseReason::Unreadable
            | CloseReason::Stale => MAX_IMMEDIATE_DELAY.mul_f64(jitter),
        };
        // A stream is complete up to its end or break. After a timeout or a stale state, changes may
        // have been missed, so a poll is needed.
        Reconnect { delay, poll_now: matches!(end, CloseReason::TimedOut | CloseReason::Stale) }
    }

    /// The delay, counted from the last failed attempt, after which a hint from upstream allows another
    /// one; `None` unless upstream declined streaming.
    pub(super) fn delay_after_hint(&self) -> Option<Duration> {
        (self.refusals > 0).then_some(MIN_DELAY_AFTER_HINT)
    }

    /// The delay after upstream declined streaming. `is_expected` is whether it is known to support it.
    fn delay_after_refusal(&mut self, is_expected: bool, jitter: f64) -> Duration {
        let factor = 2_u32.saturating_pow(self.refusals);
        self.refusals = self.refusals.saturating_add(1);
        let delay = if is_expected || self.mode == UpstreamMode::Stream {
            EXPECTED_STREAM_RETRY_INTERVAL
        } else {
            UNSUPPORTED_RETRY_DELAY.saturating_mul(factor).min(MAX_UNSUPPORTED_RETRY_DELAY)
        };
        delay.mul_f64(0.8 + 0.4 * jitter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_hours(1);
    const SHORT: Duration = Duration::from_secs(1);

    fn synced_policy(mode: UpstreamMode) -> ReconnectPolicy {
        let mut policy = ReconnectPolicy::new(mode);
        policy.on_synced();
        policy
    }

    /// Milliseconds until the next attempt.
    fn delay_ms(next: Reconnect) -> u128 {
        next.delay.as_millis()
    }

    #[test]
    fn unsupported_stream_is_retried_ever_later_and_after_1_min_if_expected() {
        for refusal in [StreamUnavailable::NotSupported, StreamUnavailable::Unauthorized] {
            let ask = |mut policy: ReconnectPolicy| delay_ms(policy.on_unavailable(refusal, 0.5));
            assert_eq!(ask(ReconnectPolicy::new(UpstreamMode::Auto)), 300_000);
            assert_eq!(ask(ReconnectPolicy::new(UpstreamMode::Stream)), 60_000);
            assert_eq!(ask(synced_policy(UpstreamMode::Auto)), 60_000);
            let mut policy = ReconnectPolicy::new(UpstreamMode::Auto);
            assert_eq!(delay_ms(policy.on_unavailable(refusal, 0.0)), 240_000);
            assert_eq!(delay_ms(policy.on_unavailable(refusal, 1.0)), 720_000, "fleets spread");
            let minutes = [(); 4].map(|()| delay_ms(policy.on_unavailable(refusal, 0.5)) / 60_000);
            assert_eq!(minutes, [20, 40, 60, 60]);
        }
    }

    #[test]
    fn streaming_hint_shortens_delay_only_after_upstream_declined() {
        let mut policy = ReconnectPolicy::new(UpstreamMode::Auto);
        assert_eq!(policy.delay_after_hint(), None);
        policy.on_unavailable(StreamUnavailable::NotSupported, 0.5);
        assert_eq!(policy.delay_after_hint(), Some(MIN_DELAY_AFTER_HINT));
        policy.on_unavailable(StreamUnavailable::Throttled(None), 0.5);
        assert_eq!(policy.delay_after_hint(), None, "a limit is not a refusal");
        policy.on_closed(CloseReason::PollingPreferred, LONG, 0.5);
        assert_eq!(policy.delay_after_hint(), Some(MIN_DELAY_AFTER_HINT));
        policy.on_synced();
        policy.on_closed(CloseReason::Broken, LONG, 0.5);
        assert_eq!(policy.delay_after_hint(), None);
    }

    #[test]
    fn throttled_stream_is_retried_after_retry_after_or_1_min() {
        let mut policy = ReconnectPolicy::new(UpstreamMode::Auto);
        let retry_after = Some(Duration::from_secs(20));
        assert_eq!(
            delay_ms(policy.on_unavailable(StreamUnavailable::Throttled(retry_after), 0.0)),
            20_000
        );
        assert_eq!(
            delay_ms(policy.on_unavailable(StreamUnavailable::Throttled(retry_after), 1.0)),
            24_000
        );
        assert_eq!(
            delay_ms(policy.on_unavailable(StreamUnavailable::Throttled(None), 0.0)),
            60_000
        );
    }

    #[test]
    fn stable_stream_is_reopened_within_1_s_for_any_close_reason() {
        for end in [
            CloseReason::Ended(None),
            CloseReason::Broken,
            CloseReason::TimedOut,
            CloseReason::Unreadable,
        ] {
            let next = synced_policy(UpstreamMode::Auto).on_closed(end, LONG, 0.5);
            assert_eq!(delay_ms(next), 500, "{end:?}");
            assert_eq!(next.poll_now, end == CloseReason::TimedOut);
        }
        let over = |wait| {
            let end = CloseReason::Ended(Some(Duration::from_secs(wait)));
            delay_ms(synced_policy(UpstreamMode::Auto).on_closed(end, LONG, 0.0))
        };
        assert_eq!((over(3), over(4000)), (3_000, 60_000), "upstream's delay, capped");
        assert_eq!(
            delay_ms(synced_policy(UpstreamMode::Auto).on_closed(
                CloseReason::PollingPreferred,
                LONG,
                0.5
            )),
            300_000
        );
    }

    #[test]
    fn delay_grows_while_stream_fails_to_open_or_closes_early() {
        let mut policy = synced_policy(UpstreamMode::Auto);
        let fail = |policy: &mut ReconnectPolicy| {
            delay_ms(policy.on_unavailable(StreamUnavailable::Failed(None), 1.0))
        };
        let end = |policy: &mut ReconnectPolicy, lifetime| {
            delay_ms(policy.on_closed(CloseReason::Ended(None), lifetime, 1.0))
        };
        assert_eq!([fail(&mut policy), fail(&mut policy)], [1_000, 2_000]);
        assert_eq!([end(&mut policy, SHORT), end(&mut policy, SHORT)], [4_000, 8_000]);
        for _ in 0..9 {
            assert!(fail(&mut policy) <= 60_000);
        }
        assert_eq!(end(&mut policy, LONG), 1_000);
        assert_eq!(fail(&mut policy), 1_000);
        let retry_after = Some(Duration::from_secs(9));
        assert_eq!(
            delay_ms(policy.on_unavailable(StreamUnavailable::Failed(retry_after), 0.5)),
            9_000
        );
    }

    #[test]
    fn token_rejected_by_stream_is_polled_immediately() {
        let polls = |refusal| {
            ReconnectPolicy::new(UpstreamMode::Auto).on_unavailable(refusal, 0.5).poll_now
        };
        assert!(polls(StreamUnavailable::Unauthorized));
        for refusal in [
            StreamUnavailable::NotSupported,
            StreamUnavailable::Throttled(None),
            StreamUnavailable::Failed(None),
        ] {
            assert!(!polls(refusal), "{refusal:?}");
        }
    }
}
