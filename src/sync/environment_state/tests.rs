//! Polls and streams of two tokens, without upstream and without a clock.

use super::*;
use crate::{
    sync::{fetched_documents::FetchedDocument, merge::merge},
    token::{Environment, Scope},
};

const INTERVAL: Duration = Duration::from_secs(15);

/// Picks exactly the interval, and three quarters of a backoff's delay.
const JITTER: f64 = 0.5;

/// The delay before a stream is reopened that closed early for the first time.
const FIRST_REOPENING: Duration = Duration::from_millis(750);

/// A state with the tokens `one`, which sees project `a`, and `two`, which sees `b`.
struct Fixture {
    state: EnvironmentState,
    one: Credential,
    two: Credential,
    served: Option<ServedSnapshot>,
    now: Instant,
}

impl Fixture {
    fn new(mode: UpstreamMode) -> Self {
        let (now, config) = (Instant::now(), Config { interval: INTERVAL, mode });
        let state = EnvironmentState::new(&config, None, now);
        Self { state, one: credential("a"), two: credential("b"), served: None, now }
    }

    /// Polled once; both tokens have a stream that has delivered their state.
    fn streaming() -> Self {
        let mut fixture = Self::new(UpstreamMode::Auto);
        fixture.poll(&[("one", &["a/x"]), ("two", &["b/y"])], Ok(()));
        for token in ["one", "two"] {
            fixture.open_stream(token, None);
            assert!(fixture.receive_stream_flags(token, 1, &[], None));
        }
        fixture
    }

    fn credential(&self, token: &str) -> &Credential {
        if token == "one" { &self.one } else { &self.two }
    }

    fn digest(&self, token: &str) -> TokenDigest {
        self.credential(token).token.digest()
    }

    fn in_use(&self) -> Vec<Credential> {
        vec![self.one.clone(), self.two.clone()]
    }

    fn advance(&mut self, by: Duration) {
        self.now += by;
    }

    fn next_action(&mut self) -> Action {
        self.state.next_action(self.now)
    }

    /// How long to wait for events.
    #[track_caller]
    fn wait(&mut self) -> Option<Duration> {
        match self.next_action() {
            Action::Wait(until) => until.map(|until| until - self.now),
            other => panic!("{other:?}"),
        }
    }

    /// Performs a poll that is due now, with these flags in upstream's responses.
    #[track_caller]
    fn poll(&mut self, responses: &[(&str, &[&str])], result: Result<(), Option<Duration>>) {
        assert_eq!(self.next_action(), Action::Poll);
        let (credentials, in_use) = ([self.one.clone(), self.two.clone()], self.in_use());
        let (documents, synced) = self.state.begin_poll(self.now);
        for (token, flags) in responses {
            let credential = &credentials[usize::from(*token == "two")];
            assert!(!synced.contains(&credential.token.digest()), "{token} has a stream");
            documents.insert(credential, None, document(flags), true, self.now);
        }
        self.publish();
        self.state.on_polled(result, in_use, self.now, JITTER);
    }

    /// Publishes or confirms; returns when the served flags were last confirmed.
    fn publish(&mut self) -> Option<Instant> {
        let in_use = self.in_use();
        match self.state.publication(&in_use, true, self.served.as_ref(), self.now) {
            Publication::Nothing => {}
            Publication::Confirm(at) => self.served.as_ref().unwrap().confirm(at),
            Publication::Replace { input, projects, confirmed_at, .. } => {
                let scope = Scope { environment: Environment::new("dev"), projects };
                self.served = Some(ServedSnapshot::build(scope, merge(&input), confirmed_at));
                self.state.on_published();
            }
        }
        self.served.as_ref().and_then(ServedSnapshot::confirmed_at)
    }

    fn served_flags(&self) -> Vec<String> {
        let features = self.served.iter().flat_map(|it| it.document().features());
        features.map(|it| format!("{}/{}", it.project(), it.name())).collect()
    }

    /// Opens the next stream, which must be that of this token and resume after this event.
    #[track_caller]
    fn open_stream(&mut self, token: &str, last: Option<EventId>) {
        let expect = Action::OpenStream(self.credential(token).token.clone(), last);
        assert_eq!(self.next_action(), expect);
        self.state.on_stream_activity(&self.digest(token), self.now);
    }

    /// A stream delivers a state; `removed` are the flags that it no longer has.
    fn receive_stream_flags(
        &mut self,
        token: &str,
        event: EventId,
        removed: &[&str],
        changed: Option<&[&str]>,
    ) -> bool {
        let applied = Applied {
            event_id: Some(event),
            changed: changed.map(document),
            removed_flags: removed.iter().map(|it| Arc::from(*it)).collect(),
        };
        self.state.on_stream_flags_received(&self.digest(token), applied, self.now)
    }

    fn close_stream(&mut self, token: &str, reason: CloseReason) -> CloseReason {
        self.state.on_stream_closed(&self.digest(token), reason, self.now, JITTER)
    }
}

fn credential(project: &str) -> Credential {
    let token = Token::parse(&format!("[]:dev.{project}")).unwrap();
    Credential { token, projects: Projects::from_list([project]) }
}

/// Flags written as `project/name`.
fn document(flags: &[&str]) -> FetchedDocument {
    let flag = |it: &&str| {
        let (project, name) = it.split_once('/').unwrap();
        format!(r#"{{"name":"{name}","project":"{project}"}}"#)
    };
    let flags: Vec<_> = flags.iter().map(flag).collect();
    let text = format!(r#"{{"features":[{}]}}"#, flags.join(","));
    FetchedDocument::new(Document::parse(text.as_bytes()).unwrap())
}

#[test]
fn failed_polls_are_retried_with_backoff_until_one_succeeds() {
    let mut fixture = Fixture::new(UpstreamMode::Poll);
    let retry_after = Duration::from_secs(90);
    for (result, delay) in [
        (Err(None), Duration::from_millis(750)),
        (Err(None), Duration::from_millis(1500)),
        (Err(Some(retry_after)), retry_after),
        (Ok(()), INTERVAL),
        (Err(None), Duration::from_millis(750)),
    ] {
        fixture.poll(&[], result);
        assert_eq!(fixture.wait(), Some(delay), "{result:?}");
        fixture.advance(delay);
    }
    assert_eq!(fixture.state.poll_failures(), 1);
}

#[test]
fn failure_of_one_token_does_not_delay_polls_of_the_others() {
    let mut fixture = Fixture::new(UpstreamMode::Poll);
    for _ in 0..9 {
        fixture.poll(&[("one", &["a/x"])], Err(None));
        let delay = fixture.wait().unwrap();
        assert!(delay <= INTERVAL, "{delay:?}");
        fixture.advance(delay);
    }
    fixture.poll(&[], Err(None));
    assert_eq!(fixture.wait(), Some(Duration::from_secs(45)), "no token got a response");
}

#[test]
fn nothing_is_polled_while_every_token_has_a_synced_stream() {
    let mut fixture = Fixture::new(UpstreamMode::Auto);
    fixture.poll(&[("one", &["a/x"]), ("two", &["b/y"])], Ok(()));
    fixture.open_stream("one", None);
    fixture.open_stream("two", None);
    assert_eq!(fixture.wait(), Some(INTERVAL), "neither has delivered its state");
    assert!(fixture.receive_stream_flags("one", 1, &[], None));
    assert_eq!(fixture.wait(), Some(INTERVAL), "the other has not");
    assert!(fixture.receive_stream_flags("two", 1, &[], None));
    assert_eq!(fixture.wait(), None);
    fixture.advance(10 * INTERVAL);
    assert_eq!(fixture.wait(), None);
}

#[test]
fn lost_stream_is_polled_one_interval_later_unless_it_may_have_missed_changes() {
    for (reason, is_polled_now) in [(CloseReason::Broken, false), (CloseReason::TimedOut, true)] {
        let mut fixture = Fixture::streaming();
        fixture.advance(10 * INTERVAL);
        assert_eq!(fixture.close_stream("two", reason), reason);
        if is_polled_now {
            fixture.poll(&[("two", &["b/y"])], Ok(()));
        }
        assert_eq!(fixture.wait(), Some(Duration::from_millis(500)), "{reason:?}");
        fixture.advance(Duration::from_millis(500));
        fixture.open_stream("two", Some(1).filter(|_| !is_polled_now));
        assert_eq!(fixture.wait(), Some(INTERVAL.saturating_sub(Duration::from_millis(500))));
    }
}

#[test]
fn stream_that_ends_before_its_state_counts_as_broken() {
    let mut fixture = Fixture::streaming();
    let ended = CloseReason::Ended(None);
    assert_eq!(fixture.close_stream("one", ended), ended);
    fixture.advance(FIRST_REOPENING);
    fixture.open_stream("one", Some(1));
    assert_eq!(fixture.close_stream("one", ended), CloseReason::Broken);
}

#[test]
fn stream_is_opened_after_the_first_response_and_resumes_unless_an_event_was_unreadable() {
    let mut fixture = Fixture::new(UpstreamMode::Auto);
    fixture.poll(&[("one", &["a/x"])], Ok(()));
    fixture.open_stream("one", None);
    assert_eq!(fixture.wait(), Some(INTERVAL), "no response to the other token yet");
    let one = fixture.digest("one");
    assert!(!fixture.state.event_base(&one).1, "it starts with a full state");
    assert!(fixture.receive_stream_flags("one", 7, &[], None));
    assert!(fixture.state.event_base(&one).1);
    fixture.close_stream("one", CloseReason::Broken);
    fixture.advance(FIRST_REOPENING);
    fixture.open_stream("one", Some(7));
    assert!(fixture.state.event_base(&one).1, "it continues the known state");
    fixture.close_stream("one", CloseReason::Unreadable);
    fixture.advance(2 * FIRST_REOPENING);
    fixture.open_stream("one", None);
    assert!(!fixture.state.event_base(&one).1);
}

#[test]
fn no_stream_is_opened_in_poll_mode() {
    let mut fixture = Fixture::new(UpstreamMode::Poll);
    fixture.poll(&[("one", &["a/x"]), ("two", &["b/y"])], Ok(()));
    assert_eq!(fixture.wait(), Some(INTERVAL));
}

#[test]
fn hint_at_streaming_reopens_a_declined_stream_sooner() {
    let mut fixture = Fixture::new(UpstreamMode::Auto);
    fixture.poll(&[("one", &["a/x"])], Ok(()));
    fixture.open_stream("one", None);
    let one = fixture.digest("one");
    fixture.state.on_stream_unavailable(&one, StreamUnavailable::NotSupported, fixture.now, JITTER);
    assert!(!fixture.state.is_connected(&one));
    assert_eq!(fixture.wait(), Some(INTERVAL));
    fixture.state.on_streaming_hint();
    assert_eq!(fixture.wait(), Some(Duration::from_secs(10)));
}

#[test]
fn token_that_upstream_rejects_for_its_stream_is_polled_at_once() {
    let mut fixture = Fixture::new(UpstreamMode::Auto);
    fixture.poll(&[("one", &["a/x"])], Ok(()));
    fixture.open_stream("one", None);
    let one = fixture.digest("one");
    fixture.state.on_stream_unavailable(&one, StreamUnavailable::Unauthorized, fixture.now, JITTER);
    assert_eq!(fixture.next_action(), Action::Poll);
}

#[test]
fn flag_that_may_have_moved_is_polled_for_at_once_and_removed_after_the_grace_period() {
    let mut fixture = Fixture::streaming();
    fixture.close_stream("two", CloseReason::Broken);
    assert!(fixture.receive_stream_flags("one", 2, &["x"], Some(&[])));
    fixture.publish();
    assert_eq!(fixture.served_flags(), ["a/x", "b/y"]);
    fixture.poll(&[("two", &["b/y"])], Ok(()));
    assert_eq!(fixture.wait(), Some(FIRST_REOPENING));
    fixture.advance(FIRST_REOPENING);
    fixture.open_stream("two", None);
    fixture.advance(REMOVAL_GRACE.saturating_sub(FIRST_REOPENING));
    assert_eq!(fixture.next_action(), Action::Publish);
    fixture.publish();
    assert_eq!(fixture.served_flags(), ["b/y"]);
    assert_eq!(fixture.wait(), Some(INTERVAL.saturating_sub(REMOVAL_GRACE)));
}

#[test]
fn no_extra_poll_is_made_while_polls_fail() {
    let mut fixture = Fixture::streaming();
    fixture.close_stream("two", CloseReason::TimedOut);
    fixture.poll(&[], Err(Some(Duration::from_secs(90))));
    assert!(fixture.receive_stream_flags("one", 2, &["x"], Some(&[])));
    fixture.publish();
    assert_eq!(fixture.wait(), Some(FIRST_REOPENING));
    fixture.advance(FIRST_REOPENING);
    fixture.open_stream("two", Some(1));
    assert_eq!(fixture.wait(), Some(REMOVAL_GRACE.saturating_sub(FIRST_REOPENING)));
}

#[test]
fn older_state_of_a_stream_is_rejected() {
    let mut fixture = Fixture::new(UpstreamMode::Auto);
    let (documents, _) = fixture.state.begin_poll(fixture.now);
    let received = document(&["a/x"]).with_revision(Some(9));
    documents.insert(&fixture.one, None, received, true, fixture.now);
    fixture.state.on_polled(Ok(()), fixture.in_use(), fixture.now, JITTER);
    fixture.open_stream("one", None);
    assert!(!fixture.receive_stream_flags("one", 8, &[], Some(&["a/old"])));
    fixture.close_stream("one", CloseReason::Stale);
    assert_eq!(fixture.next_action(), Action::Poll);
    fixture.publish();
    assert_eq!(fixture.served_flags(), ["a/x"]);
}

#[test]
fn served_flags_are_confirmed_as_of_the_quietest_stream() {
    let mut fixture = Fixture::streaming();
    fixture.publish();
    let start = fixture.now;
    fixture.advance(Duration::from_secs(3));
    fixture.state.on_stream_activity(&fixture.digest("one"), fixture.now);
    assert_eq!(fixture.publish(), Some(start));
    fixture.advance(Duration::from_secs(2));
    fixture.state.on_stream_activity(&fixture.digest("two"), fixture.now);
    assert_eq!(fixture.publish(), Some(start + Duration::from_secs(3)));
}

#[test]
fn served_flags_are_not_confirmed_without_a_response_to_every_token() {
    let mut fixture = Fixture::new(UpstreamMode::Poll);
    fixture.poll(&[("one", &["a/x"]), ("two", &["b/y"])], Ok(()));
    let start = fixture.now;
    fixture.advance(INTERVAL);
    fixture.poll(&[("one", &["a/x"])], Err(None));
    assert_eq!(fixture.publish(), Some(start));
}

#[test]
fn changed_tokens_are_polled_at_once_even_if_all_have_streams() {
    let mut fixture = Fixture::streaming();
    let in_use = fixture.in_use();
    fixture.state.check_tokens(&in_use, true);
    assert_eq!(fixture.wait(), None);
    fixture.state.check_tokens(&in_use[..1], true);
    assert_eq!(fixture.next_action(), Action::Poll);
}

#[test]
fn response_that_does_not_count_yet_is_confirmed_in_time_but_not_again_and_again() {
    let run = PreviousRun { upstream_revision: Some(7), state_id: None };
    let flags = br#"{"features":[{"name":"served","project":"a"}]}"#;
    let document_of_run = Document::parse_stored(&Document::encode_stored(flags, run)).unwrap();
    let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
    let served = ServedSnapshot::build(scope, document_of_run, None);
    let mut fixture = Fixture::new(UpstreamMode::Poll);
    let config = Config { interval: INTERVAL, mode: UpstreamMode::Poll };
    fixture.state = EnvironmentState::new(&config, Some(&served), fixture.now);
    let (documents, _) = fixture.state.begin_poll(fixture.now);
    let received = document(&["a/older"]).with_revision(Some(6));
    documents.insert(&fixture.one, None, received, true, fixture.now);
    fixture.state.on_polled(Ok(()), fixture.in_use(), fixture.now, JITTER);
    assert_eq!(fixture.wait(), Some(INTERVAL));
    fixture.advance(Duration::from_secs(50));
    fixture.poll(&[], Ok(()));
    assert_eq!(fixture.wait(), Some(Duration::from_secs(10)), "it counts after a minute");
    fixture.advance(Duration::from_secs(20));
    fixture.poll(&[], Ok(()));
    assert_eq!(fixture.wait(), Some(INTERVAL), "upstream did not confirm it");
}

#[test]
fn flags_of_an_earlier_run_are_checked_once_all_expected_tokens_are_available() {
    let mut fixture = Fixture::new(UpstreamMode::Poll);
    let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
    let before = Document::parse(br#"{"features":[{"name":"frozen","project":"c"}]}"#).unwrap();
    let served = ServedSnapshot::build(scope, before, None);
    let config = Config { interval: INTERVAL, mode: UpstreamMode::Poll };
    fixture.state = EnvironmentState::new(&config, Some(&served), fixture.now);
    let in_use = fixture.in_use();
    let (documents, _) = fixture.state.begin_poll(fixture.now);
    for (credential, flags) in in_use.iter().zip([["a/x"], ["b/y"]]) {
        documents.insert(credential, None, document(&flags), true, fixture.now);
    }
    let publication = fixture.state.publication(&in_use, false, Some(&served), fixture.now);
    let Publication::Replace { input, confirmed_at: None, .. } = publication else {
        panic!("{publication:?}")
    };
    assert!(merge(&input).feature("frozen").is_some());
    fixture.state.on_polled(Ok(()), in_use.clone(), fixture.now, JITTER);
    fixture.state.check_tokens(&in_use, false);
    assert_eq!(fixture.wait(), Some(INTERVAL));
    fixture.state.check_tokens(&in_use, true);
    assert_eq!(fixture.next_action(), Action::Poll);
}
