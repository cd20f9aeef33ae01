//! Two tokens that see one project, with states and revisions in various orders.

use std::time::Duration;

use super::*;
use crate::{
    protocol::features::Document,
    sync::part_precedence::{MAX_STATES, ORDER_TIMEOUT},
    token::Token,
};

/// Two tokens that see one project.
struct Bed {
    precedence: TokenPrecedence,
    tokens: [TokenDigest; 2],
    start: Instant,
}

const ONE: usize = 0;
const TWO: usize = 1;

impl Bed {
    fn new() -> Self {
        let digest = |secret: &str| Token::parse(&format!("p:dev.{secret}")).unwrap().digest();
        let tokens = ["one", "two"].map(digest);
        Self { precedence: TokenPrecedence::default(), tokens, start: Instant::now() }
    }

    /// Observes the project with this flag, or without flags, `seconds` after the start.
    fn observe(&mut self, token: usize, flag: &str, revision: Option<u64>, seconds: u64) {
        let feature = format!(r#"{{"name":"{flag}","project":"p"}}"#);
        let features = if flag.is_empty() { String::new() } else { feature };
        let text = format!(r#"{{"features":[{features}]}}"#);
        let states = PartHashes::from_document(&Document::parse(text.as_bytes()).unwrap());
        let at = self.at(seconds);
        let token = self.tokens[token];
        self.precedence.observe(&token, &Projects::from_list(["p"]), &states, revision, at);
    }

    fn at(&self, seconds: u64) -> Instant {
        self.start + Duration::from_secs(seconds)
    }

    /// The leader after confirming these tokens `seconds` after the start.
    fn leader(&mut self, confirmed: &[usize], seconds: u64) -> usize {
        for token in confirmed {
            self.precedence.confirm(&self.tokens[*token], self.at(seconds));
        }
        self.precedence.resolve_timeouts(self.at(seconds));
        let leader = self.precedence.leader_of_project(&"p".into()).unwrap();
        self.tokens.iter().position(|it| it == leader).unwrap()
    }
}

#[test]
fn token_that_moves_on_from_newest_state_leads() {
    let mut fixture = Bed::new();
    for token in [ONE, TWO] {
        fixture.observe(token, "a", None, 0);
    }
    fixture.observe(TWO, "b", None, 0);
    assert_eq!(fixture.leader(&[ONE, TWO], 0), TWO);
    fixture.observe(ONE, "b", None, 1);
    assert_eq!(fixture.leader(&[ONE, TWO], 1), TWO, "it is as new");
    fixture.observe(ONE, "", None, 2);
    assert_eq!(fixture.leader(&[ONE, TWO], 2), ONE);
}

#[test]
fn flag_switched_back_is_not_mistaken_for_its_earlier_state() {
    let mut fixture = Bed::new();
    for token in [ONE, TWO] {
        fixture.observe(token, "on", None, 0);
    }
    fixture.observe(ONE, "off", None, 1);
    fixture.observe(ONE, "on", None, 2);
    // The other token's stream delivers the same changes later.
    fixture.observe(TWO, "off", None, 3);
    assert_eq!(fixture.leader(&[ONE, TWO], 20), ONE, "an earlier change");
    fixture.observe(TWO, "on", None, 21);
    fixture.observe(TWO, "off", None, 22);
    assert_eq!(fixture.leader(&[ONE, TWO], 22), TWO);
}

#[test]
fn last_change_wins_after_5_s_if_order_is_ambiguous() {
    let mut fixture = Bed::new();
    for token in [ONE, TWO] {
        fixture.observe(token, "a", None, 0);
    }
    fixture.observe(ONE, "b", None, 1);
    fixture.observe(TWO, "c", None, 2);
    assert_eq!(fixture.leader(&[ONE, TWO], 2), ONE);
    assert_eq!(fixture.precedence.next_timeout(), Some(fixture.at(2) + ORDER_TIMEOUT));
    assert_eq!(fixture.leader(&[ONE, TWO], 7), TWO);
    assert_eq!(fixture.precedence.next_timeout(), None);
}

#[test]
fn new_token_with_other_state_waits_while_leader_is_confirmed() {
    let mut fixture = Bed::new();
    fixture.observe(ONE, "a", None, 0);
    fixture.observe(TWO, "old", None, 1);
    assert_eq!(fixture.precedence.next_timeout(), None);
    for minute in 1..5 {
        assert_eq!(fixture.leader(&[ONE, TWO], 60 * minute), ONE);
    }
    assert_eq!(fixture.leader(&[TWO], 300 - 31), ONE);
    assert_eq!(fixture.leader(&[TWO], 300), TWO, "upstream no longer confirms the leader");
}

#[test]
fn newer_revision_leads() {
    let mut fixture = Bed::new();
    fixture.observe(ONE, "a", Some(5), 0);
    fixture.observe(TWO, "older", Some(4), 0);
    assert_eq!(fixture.leader(&[], 0), ONE);
    fixture.observe(TWO, "newer", Some(7), 0);
    assert_eq!(fixture.leader(&[], 0), TWO);
}

#[test]
fn token_with_flags_leads_over_token_that_sees_project_empty() {
    let mut fixture = Bed::new();
    fixture.observe(ONE, "", None, 0);
    fixture.observe(TWO, "a", None, 0);
    assert_eq!(fixture.leader(&[ONE, TWO], 60), TWO);
}

#[test]
fn retired_leader_is_replaced_by_token_as_new_or_confirmed_since() {
    let all = Projects::All;
    let mut fixture = Bed::new();
    fixture.observe(ONE, "a", None, 0);
    fixture.observe(TWO, "b", None, 0);
    let one = fixture.tokens[ONE];
    assert!(fixture.precedence.retire(&one, &all));
    assert_eq!(fixture.leader(&[TWO], 4), ONE);
    assert_eq!(fixture.leader(&[TWO], 5), TWO);
    assert!(!fixture.precedence.retire(&one, &all));

    let mut fixture = Bed::new();
    fixture.observe(ONE, "a", None, 0);
    fixture.observe(TWO, "b", None, 0);
    assert!(fixture.precedence.retire(&one, &all));
    fixture.observe(TWO, "a", None, 1);
    assert_eq!(fixture.leader(&[TWO], 1), TWO);
}

#[test]
fn number_of_recorded_states_is_bounded() {
    let mut fixture = Bed::new();
    for n in 0..100 {
        fixture.observe(ONE, &format!("f{n}"), None, n);
    }
    assert!(fixture.precedence.parts.values().all(|it| it.states.len() <= MAX_STATES));
    fixture.observe(TWO, "f3", None, 100);
    assert_eq!(fixture.leader(&[ONE, TWO], 100), ONE);
    let two = fixture.tokens[TWO];
    fixture.precedence.remove_token(&two, fixture.at(100));
    assert_eq!((fixture.precedence.tokens.len(), fixture.leader(&[ONE], 101)), (1, ONE));
}
