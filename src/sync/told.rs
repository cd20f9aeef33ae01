//! What the events of a stream come to: the state that they lead to, and its number.
//!
//! Pure. All that arrived together is one step; a single event that cannot be followed spoils it, as
//! what the others lead to is no state that there ever was.

use std::{mem, sync::Arc};

use crate::wire::{
    delta::{self, Change, EventId, Unreadable},
    features::Document,
    sse::Event,
};

/// The events that tell changes: the first of a stream, and the others.
const CONNECTED: &str = "unleash-connected";
const UPDATED: &str = "unleash-updated";

/// The event that says how to fetch flags from now on.
const FETCH_MODE: &str = "fetch-mode";

/// What a stream told.
#[derive(Debug, Default)]
pub(super) struct Step {
    /// The state that was reached, if any was told.
    pub(super) reached: Option<Reached>,
    /// Upstream sends those who can poll to polling.
    pub(super) dismissed: bool,
}

/// A state that a stream led to.
#[derive(Debug)]
pub(super) struct Reached {
    /// What to name when the stream is opened again, if there is such a number.
    pub(super) id: Option<EventId>,
    /// The flags, where they are not those that were known already.
    pub(super) news: Option<Document>,
    /// The names of those that were known and are gone.
    pub(super) gone: Vec<Arc<str>>,
    /// The states on the way, oldest first; of many only the last.
    pub(super) passed: Vec<Document>,
}

/// How many states on the way are made out at most.
const PASSED: usize = 16;

/// Why a stream cannot be followed any further.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// Events that cannot be read.
    #[error("what upstream's stream tells cannot be followed")]
    Unreadable(#[from] Unreadable),
    /// Changes of a state that is not known.
    #[error("upstream's stream begins with changes of an unknown state")]
    Unfounded,
}

/// Follows `events` from the state that is `known`; if they do not continue that one, they have to begin
/// with a whole state. The states on the way are made where they are to be compared with those of other
/// tokens (`is_shared`).
pub(super) fn follow(
    known: Option<&Document>,
    continues: bool,
    events: &[Event],
    is_shared: bool,
) -> Result<Step, Error> {
    let (mut step, mut told, mut id) = (Step::default(), None::<Vec<delta::Event>>, None);
    for event in events {
        match &*event.name {
            CONNECTED | UPDATED => {
                let changes = delta::parse(event.data.as_bytes())?;
                told.get_or_insert_default().extend(changes);
                id = event.id.parse().ok();
            }
            FETCH_MODE => step.dismissed |= event.data.trim() == "polling",
            // What else there may be is for others.
            _ => {}
        }
    }
    let Some(told) = told else { return Ok(step) };
    let base = match (known, told.first().map(|it| &it.change)) {
        (_, Some(Change::Hydration(_))) => &Document::default(),
        (Some(known), _) if continues => known,
        _ => return Err(Error::Unfounded),
    };
    // Changes of one number belong together.
    let groups: Vec<_> = told.chunk_by(|one, next| one.id == next.id).collect();
    let kept = if is_shared { PASSED } else { 0 };
    let together = told.len() - groups.iter().rev().take(kept).map(|it| it.len()).sum::<usize>();
    let mut passed = Vec::new();
    let mut state = delta::apply(base, told[..together].iter().map(|it| &it.change));
    for group in groups.iter().skip(groups.len().saturating_sub(kept)) {
        let next = delta::apply(&state, group.iter().map(|it| &it.change));
        passed.push(mem::replace(&mut state, next));
    }
    // What it began with is known, or nothing.
    if together == 0 && !passed.is_empty() {
        passed.remove(0);
    }
    let (is_news, gone) = known.map_or((true, Vec::new()), |known| differences(known, &state));
    step.reached = Some(Reached { id, news: is_news.then_some(state), gone, passed });
    Ok(step)
}

/// Whether one state differs from the other, also in what is to be reported of it, and the names of the
/// flags that it lacks.
pub(super) fn differences(known: &Document, state: &Document) -> (bool, Vec<Arc<str>>) {
    let changes = delta::diff(known, state);
    let is_news = !changes.is_empty() || !state.reports_as(known);
    let gone = changes.into_iter().filter_map(|change| match change {
        Change::FeatureRemoved { name, .. } => Some(name),
        Change::Hydration(_)
        | Change::FeatureUpdated(_)
        | Change::SegmentUpdated(_)
        | Change::SegmentRemoved(_) => None,
    });
    (is_news, gone.collect())
}

/// Whether one state differs from the other, also in what is to be reported of it.
pub(super) fn differs(known: &Document, state: &Document) -> bool {
    !delta::diff(known, state).is_empty() || !state.reports_as(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Document {
        Document::parse(format!(r#"{{"features":[{text}]}}"#).as_bytes()).unwrap()
    }

    fn event(name: &str, id: &str, data: &str) -> Event {
        Event { name: name.to_owned(), id: id.to_owned(), data: data.to_owned() }
    }

    /// An event that tells these changes, written as their JSON without the type's `eventId`.
    fn changes(name: &str, id: &str, changes: &str) -> Event {
        let text = changes.replace(r#"{"type""#, &format!(r#"{{"eventId":{id},"type""#));
        event(name, id, &format!(r#"{{"events":[{text}]}}"#))
    }

    const A: &str = r#"{"name":"a"}"#;
    const B: &str = r#"{"name":"b"}"#;
    const WHOLE: &str = r#"{"type":"hydration","features":[{"name":"a"}],"segments":[]}"#;
    const ADD_B: &str = r#"{"type":"feature-updated","feature":{"name":"b"}}"#;
    const REMOVE_A: &str = r#"{"type":"feature-removed","featureName":"a","project":"default"}"#;

    /// The number that was reached and the names of the flags, if these are news.
    #[track_caller]
    fn check(
        known: Option<&str>,
        continues: bool,
        events: &[Event],
        expect: (Option<EventId>, Option<&[&str]>),
    ) {
        let known = known.map(document);
        let step = follow(known.as_ref(), continues, events, true).unwrap();
        let Reached { id, news, .. } = step.reached.unwrap();
        let names = news.map(|it| it.features().iter().map(|it| it.name().to_string()).collect());
        assert_eq!(id, expect.0);
        assert_eq!(
            names,
            expect.1.map(|it| it.iter().map(|&it| it.to_owned()).collect::<Vec<_>>())
        );
    }

    #[test]
    fn a_stream_begins_with_a_whole_state_or_goes_on_from_the_known_one() {
        let connected = |text: &str| [changes(CONNECTED, "7", text)];
        check(None, false, &connected(WHOLE), (Some(7), Some(&["a"])));
        check(Some(B), true, &connected(WHOLE), (Some(7), Some(&["a"])));
        check(Some(A), true, &connected(ADD_B), (Some(7), Some(&["a", "b"])));
        for (known, continues) in [(None, true), (None, false), (Some(A), false)] {
            for text in [ADD_B, ""] {
                let known = known.map(document);
                let error = follow(known.as_ref(), continues, &connected(text), true).unwrap_err();
                assert!(matches!(error, Error::Unfounded), "{error}");
            }
        }
    }

    #[test]
    fn what_cannot_be_read_is_news() {
        let with_odd = WHOLE.replace(r#"[{"name":"a"}]"#, r#"[{"name":"a"},{"title":"b"}]"#);
        let known = document(A);
        let step = |known: &Document, text: &str| {
            let step = follow(Some(known), true, &[changes(CONNECTED, "7", text)], true).unwrap();
            step.reached.unwrap().news
        };
        let news = step(&known, &with_odd).unwrap();
        assert_eq!(news.unreadable().len(), 1);
        assert!(step(&news, &with_odd).is_none(), "it is known");
        assert!(step(&news, WHOLE).unwrap().unreadable().is_empty());
    }

    #[test]
    fn it_is_told_which_flags_are_gone() {
        let gone = |known: Option<&str>, text: &str| {
            let known = known.map(document);
            let step =
                follow(known.as_ref(), true, &[changes(CONNECTED, "7", text)], true).unwrap();
            step.reached.unwrap().gone
        };
        assert_eq!(gone(Some(B), WHOLE), [Arc::from("b")]);
        assert_eq!(gone(Some(A), REMOVE_A), [Arc::from("a")]);
        assert!(gone(Some(A), ADD_B).is_empty() && gone(None, WHOLE).is_empty());
    }

    #[test]
    fn what_was_known_already_is_no_news() {
        check(Some(A), false, &[changes(CONNECTED, "7", WHOLE)], (Some(7), None));
        check(Some(A), true, &[changes(CONNECTED, "7", "")], (Some(7), None));
        let there_and_back = [changes(UPDATED, "8", ADD_B), changes(UPDATED, "9", WHOLE)];
        check(Some(A), true, &there_and_back, (Some(9), None));
    }

    #[test]
    fn what_arrived_together_is_one_step() {
        let events = [
            changes(CONNECTED, "7", WHOLE),
            event("message", "7", "hello"),
            changes(UPDATED, "8", ADD_B),
            changes(UPDATED, "9", REMOVE_A),
        ];
        check(None, false, &events, (Some(9), Some(&["b"])));
    }

    #[test]
    fn states_on_the_way_are_made_out_by_the_numbers_of_changes() {
        let names = |it: &Document| it.features().iter().map(|it| it.name().to_string()).collect();
        let reached = |events: &[Event], is_shared| {
            let known = document(A);
            follow(Some(&known), true, events, is_shared).unwrap().reached.unwrap()
        };
        let passed = |events: &[Event]| {
            reached(events, true).passed.iter().map(names).collect::<Vec<Vec<String>>>()
        };
        let add = |id: usize| {
            let feature = format!(r#"{{"type":"feature-updated","feature":{{"name":"f{id}"}}}}"#);
            changes(UPDATED, &id.to_string(), &feature)
        };
        assert!(passed(&[add(8)]).is_empty());
        let both = format!("{ADD_B},{REMOVE_A}");
        assert!(passed(&[changes(UPDATED, "8", &both)]).is_empty(), "they belong together");
        assert_eq!(passed(&[changes(UPDATED, "8", &both), add(9)]), [["b"]]);
        let many: Vec<_> = (8..48).map(add).collect();
        let passed = passed(&many);
        assert_eq!((passed.len(), passed[0].len()), (PASSED, 40 - PASSED + 1));
        let [alone, shared] = [false, true].map(|is_shared| reached(&many, is_shared));
        assert!(alone.passed.is_empty(), "there is nobody to compare them with");
        assert_eq!(names(&alone.news.unwrap()), names(&shared.news.unwrap()));
    }

    #[test]
    fn a_number_that_is_none_is_not_named_again() {
        let mut events = [changes(CONNECTED, "7", WHOLE)];
        events[0].id = "x".to_owned();
        check(None, false, &events, (None, Some(&["a"])));
    }

    #[test]
    fn one_event_that_cannot_be_followed_spoils_the_step() {
        for odd in [
            "hello",
            r#"{"events":7}"#,
            r#"{"events":[{"eventId":8,"type":"feature-vanished"}]}"#,
            r#"{"events":[{"eventId":8,"type":"feature-updated","feature":{}}]}"#,
        ] {
            let events = [changes(CONNECTED, "7", WHOLE), event(UPDATED, "8", odd)];
            let error = follow(None, false, &events, true).unwrap_err();
            assert!(matches!(error, Error::Unreadable(_)), "{odd}: {error}");
        }
    }

    #[test]
    fn those_who_can_poll_may_be_sent_to_polling() {
        let step = |data| follow(None, false, &[event(FETCH_MODE, "", data)], true).unwrap();
        assert!(step("polling").dismissed && !step("streaming").dismissed);
        assert!(step("polling").reached.is_none());
        let events = [event(FETCH_MODE, "", "polling"), changes(CONNECTED, "7", WHOLE)];
        let step = follow(None, false, &events, true).unwrap();
        assert!(step.dismissed && step.reached.is_some());
    }
}
