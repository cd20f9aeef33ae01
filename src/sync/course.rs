//! When the stream of one token is opened, and whether its flags are asked for meanwhile.
//!
//! Sans IO: it tells durations, and opens, polls and sleeps nowhere.

use std::time::Duration;

use super::pace::Pace;

/// How flags come from upstream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mode {
    /// By its stream where it offers one, else by polling.
    Auto,
    /// By polling.
    Poll,
    /// By its stream, which it is expected to offer; by polling while it does not.
    Stream,
}

impl Mode {
    /// Reads a mode's name.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Self::Auto),
            "poll" => Some(Self::Poll),
            "stream" => Some(Self::Stream),
            _ => None,
        }
    }
}

/// Why there is no stream where one was asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Refusal {
    /// Upstream offers none.
    NotOffered,
    /// Upstream does not admit the token to it. Whether it admits it at all is for a poll to tell:
    /// Unleash Edge says 403 to all where it does not stream.
    NotAdmitted,
    /// Upstream has no room for another, and may have said for how long.
    Crowded(Option<Duration>),
    /// Upstream could not be asked, or failed, and may have said for how long.
    Failed(Option<Duration>),
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum End {
    /// In good order; upstream may have said when to come back.
    Over(Option<Duration>),
    /// The connection broke.
    Broken,
    /// Upstream told nothing for too long.
    Silent,
    /// Upstream told something that cannot be followed.
    Unreadable,
    /// Upstream told an older state than is known: another replica of it has answered.
    Outdated,
    /// Upstream sends those who can poll to polling.
    Dismissed,
}

impl End {
    /// Its name in the metrics.
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

/// What follows from the loss of a stream, or from not getting one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Next {
    /// When the stream is asked for again.
    pub(super) open_after: Duration,
    /// Whether flags are to be asked for at once, rather than an interval after they were confirmed.
    pub(super) polls_now: bool,
}

/// After how long a stream that is not offered is asked for again.
const ASK_AGAIN: Duration = Duration::from_mins(5);

/// The same where it is expected: it was there before, or the operator says that it should be.
const ASK_SOON: Duration = Duration::from_mins(1);

/// How long an upstream without room is left alone that does not say for how long.
const CROWDED_FOR: Duration = Duration::from_mins(1);

/// How long a stream lives at least that was worth being opened at once again.
const LASTING: Duration = Duration::from_secs(10);

/// The longest pause before a stream that has lasted is opened again.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The longest that upstream may have us wait after the end of a stream.
const LONGEST_WAIT: Duration = Duration::from_mins(1);

/// The shortest pause after a refusal, whatever upstream hints at.
const HINTED: Duration = Duration::from_secs(10);

/// The attempts at a stream for one token.
#[derive(Debug)]
pub(super) struct Course {
    mode: Mode,
    pace: Pace,
    /// Upstream has told something on a stream before.
    followed: bool,
    /// Upstream wanted to have no stream, the last time that it was asked.
    declined: bool,
}

impl Course {
    /// Begins with an attempt at once.
    pub(super) fn new(mode: Mode) -> Self {
        Self { mode, pace: Pace::new(Duration::ZERO), followed: false, declined: false }
    }

    /// Takes note that a stream has told its state.
    pub(super) fn told(&mut self) {
        (self.followed, self.declined) = (true, false);
    }

    /// What follows from not getting a stream; `jitter` is from 0 to 1, so that a fleet that was
    /// refused together does not come back together.
    pub(super) fn refused(&mut self, refusal: Refusal, jitter: f64) -> Next {
        self.declined = matches!(refusal, Refusal::NotOffered | Refusal::NotAdmitted);
        let open_after = match refusal {
            Refusal::NotOffered | Refusal::NotAdmitted => {
                let expected = self.followed || self.mode == Mode::Stream;
                let pause = if expected { ASK_SOON } else { ASK_AGAIN };
                pause.mul_f64(0.8 + 0.4 * jitter)
            }
            // Never before the time that upstream named.
            Refusal::Crowded(wish) => wish.unwrap_or(CROWDED_FOR).mul_f64(1.0 + 0.2 * jitter),
            Refusal::Failed(wish) => self.pace.after_failure(wish, jitter),
        };
        Next { open_after, polls_now: refusal == Refusal::NotAdmitted }
    }

    /// What follows from the end of a stream that was open for so long.
    pub(super) fn ended(&mut self, end: End, lived: Duration, jitter: f64) -> Next {
        if lived >= LASTING {
            self.pace = Pace::new(Duration::ZERO);
        }
        let open_after = match end {
            End::Dismissed => {
                self.declined = true;
                let pause = if self.mode == Mode::Stream { ASK_SOON } else { ASK_AGAIN };
                pause.mul_f64(0.8 + 0.4 * jitter)
            }
            // One that never lasts is opened ever more seldom, however orderly it ends.
            _ if lived < LASTING => self.pace.after_failure(None, jitter),
            End::Over(Some(wait)) => wait.min(LONGEST_WAIT).mul_f64(1.0 + 0.2 * jitter),
            End::Over(None) | End::Broken | End::Silent | End::Unreadable | End::Outdated => {
                AT_ONCE.mul_f64(jitter)
            }
        };
        // Up to its end or break a stream has told everything; what silence hid, or another replica knows
        // already, is not known.
        Next { open_after, polls_now: matches!(end, End::Silent | End::Outdated) }
    }

    /// How long after its refusal the stream may be asked for now that upstream hints at it.
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
        let mut course = Course::new(mode);
        course.told();
        course
    }

    /// After how many milliseconds the stream is asked for again.
    fn pause(next: Next) -> u128 {
        next.open_after.as_millis()
    }

    #[test]
    fn a_stream_that_is_not_offered_is_asked_for_again_after_minutes_and_sooner_if_expected() {
        for refusal in [Refusal::NotOffered, Refusal::NotAdmitted] {
            let ask = |mut course: Course| pause(course.refused(refusal, 0.5));
            assert_eq!(ask(Course::new(Mode::Auto)), 300_000);
            assert_eq!(ask(Course::new(Mode::Stream)), 60_000);
            assert_eq!(ask(followed(Mode::Auto)), 60_000);
            let mut course = Course::new(Mode::Auto);
            assert_eq!(pause(course.refused(refusal, 0.0)), 240_000);
            assert_eq!(pause(course.refused(refusal, 1.0)), 360_000, "fleets spread");
        }
    }

    #[test]
    fn a_hint_shortens_what_upstream_declined_and_nothing_else() {
        let mut course = Course::new(Mode::Auto);
        assert_eq!(course.hinted(), None);
        course.refused(Refusal::NotOffered, 0.5);
        assert_eq!(course.hinted(), Some(HINTED));
        course.refused(Refusal::Crowded(None), 0.5);
        assert_eq!(course.hinted(), None, "it has its reasons");
        course.ended(End::Dismissed, LONG, 0.5);
        assert_eq!(course.hinted(), Some(HINTED));
        course.told();
        course.ended(End::Broken, LONG, 0.5);
        assert_eq!(course.hinted(), None);
    }

    #[test]
    fn an_upstream_without_room_is_left_alone_for_as_long_as_it_says() {
        let mut course = Course::new(Mode::Auto);
        let wish = Some(Duration::from_secs(20));
        assert_eq!(pause(course.refused(Refusal::Crowded(wish), 0.0)), 20_000);
        assert_eq!(pause(course.refused(Refusal::Crowded(wish), 1.0)), 24_000);
        assert_eq!(pause(course.refused(Refusal::Crowded(None), 0.0)), 60_000);
    }

    #[test]
    fn a_stream_that_lasted_is_opened_again_at_once_however_it_ended() {
        for end in [End::Over(None), End::Broken, End::Silent, End::Unreadable] {
            let next = followed(Mode::Auto).ended(end, LONG, 0.5);
            assert_eq!(pause(next), 500, "{end:?}");
            assert_eq!(next.polls_now, end == End::Silent);
        }
        let over = |wait| {
            let end = End::Over(Some(Duration::from_secs(wait)));
            pause(followed(Mode::Auto).ended(end, LONG, 0.0))
        };
        assert_eq!((over(3), over(4000)), (3_000, 60_000), "as upstream says, within reason");
        assert_eq!(pause(followed(Mode::Auto).ended(End::Dismissed, LONG, 0.5)), 300_000);
    }

    #[test]
    fn pauses_grow_while_a_stream_cannot_be_had_or_does_not_last() {
        let mut course = followed(Mode::Auto);
        let fail = |course: &mut Course| pause(course.refused(Refusal::Failed(None), 0.5));
        let end = |course: &mut Course, lived| pause(course.ended(End::Over(None), lived, 0.5));
        assert_eq!([fail(&mut course), fail(&mut course)], [1_000, 2_000]);
        assert_eq!([end(&mut course, SHORT), end(&mut course, SHORT)], [4_000, 8_000]);
        for _ in 0..9 {
            assert!(fail(&mut course) <= 72_000);
        }
        assert_eq!(end(&mut course, LONG), 500);
        assert_eq!(fail(&mut course), 1_000);
        let wish = Some(Duration::from_secs(9));
        assert_eq!(pause(course.refused(Refusal::Failed(wish), 0.5)), 9_000);
    }

    #[test]
    fn a_token_that_a_stream_does_not_admit_is_polled_with_at_once() {
        let polls = |refusal| Course::new(Mode::Auto).refused(refusal, 0.5).polls_now;
        assert!(polls(Refusal::NotAdmitted));
        for refusal in [Refusal::NotOffered, Refusal::Crowded(None), Refusal::Failed(None)] {
            assert!(!polls(refusal), "{refusal:?}");
        }
    }
}
