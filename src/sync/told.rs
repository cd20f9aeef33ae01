//! Applies the events of a stream to a document; yields the new document and its event id.
//!
//! Pure. Events that arrived together are applied together. If one of them is invalid, all are rejected:
//! the others alone would produce a state that never existed.

use std::{mem, sync::Arc};

use crate::wire::{
    delta::{self, Change, EventId, ParseError},
    features::Document,
    sse::Event,
};

/// Events with changes: the first event of a stream, and later ones.
const CONNECTED: &str = "unleash-connected";
const UPDATED: &str = "unleash-updated";

/// The event that tells clients whether to poll or to stream.
const FETCH_MODE: &str = "fetch-mode";

/// The result of applying events.
#[derive(Debug, Default)]
pub(super) struct Step {
    /// The new state, if there were events with changes.
    pub(super) reached: Option<Reached>,
    /// Upstream asks clients that can poll to poll.
    pub(super) dismissed: bool,
}

/// The state after applying events.
#[derive(Debug)]
pub(super) struct Reached {
    /// The `Last-Event-ID` to reopen the stream with; `None` if the last id was not a number.
    pub(super) id: Option<EventId>,
    /// The document, if it differs from the previous one.
    pub(super) news: Option<Document>,
    /// The names of removed flags.
    pub(super) gone: Vec<Arc<str>>,
    /// The states in between, oldest first; at most the last [`MAX_INTERMEDIATE_STATES`].
    pub(super) passed: Vec<Document>,
}

/// The largest number of intermediate states that are computed.
const PASSED: usize = 16;

/// Why events cannot be applied.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// An event cannot be parsed.
    #[error("an event of upstream's stream cannot be read")]
    Unreadable(#[from] ParseError),
    /// A delta to a state that is not known.
    #[error("upstream's stream starts with a delta to an unknown state")]
    Unfounded,
}

/// Applies `events` to the state `known`. Unless they continue that state (`continues`), they must start
/// with a hydration. Intermediate states are computed only if other tokens' states are compared with
/// them (`is_shared`).
pub(super) fn follow(
    known: Option<&Document>,
    continues: bool,
    events: &[Event],
    is_shared: bool,
) -> Result<Step, Error> {
    let (mut update, mut received, mut event_id) =
        (Step::default(), None::<Vec<delta::Event>>, None);
    for event in events {
        match &*event.name {
            CONNECTED | UPDATED => {
                let changes = delta::parse(event.data.as_bytes())?;
                received.get_or_insert_default().extend(changes);
                event_id = event.id.parse().ok();
            }
            FETCH_MODE => update.dismissed |= event.data.trim() == "polling",
            // Unknown events are ignored.
            _ => {}
        }
    }
    let Some(received) = received else { return Ok(update) };
    let base = match (known, received.first().map(|it| &it.change)) {
        (_, Some(Change::Hydration(_))) => &Document::default(),
        (Some(known), _) if continues => known,
        _ => return Err(Error::Unfounded),
    };
    // Changes with the same event id belong together.
    let groups: Vec<_> = received.chunk_by(|one, next| one.id == next.id).collect();
    let separate = if is_shared { PASSED } else { 0 };
    let together =
        received.len() - groups.iter().rev().take(separate).map(|it| it.len()).sum::<usize>();
    let mut intermediate_states = Vec::new();
    let mut state = delta::apply(base, received[..together].iter().map(|it| &it.change));
    for group in groups.iter().skip(groups.len().saturating_sub(separate)) {
        let next = delta::apply(&state, group.iter().map(|it| &it.change));
        intermediate_states.push(mem::replace(&mut state, next));
    }
    // The base is already known, or empty.
    if together == 0 && !intermediate_states.is_empty() {
        intermediate_states.remove(0);
    }
    let (is_changed, removed_flags) =
        known.map_or((true, Vec::new()), |known| differences(known, &state));
    update.reached = Some(Reached {
        id: event_id,
        news: is_changed.then_some(state),
        gone: removed_flags,
        passed: intermediate_states,
    });
    Ok(update)
}

/// Whether `state` differs from `known`, including its diagnostics, and the names of removed flags.
pub(super) fn differences(known: &Document, state: &Document) -> (bool, Vec<Arc<str>>) {
    let changes = delta::diff(known, state);
    let is_changed = !changes.is_empty() || !state.has_same_diagnostics(known);
    let removed_flags = changes.into_iter().filter_map(|change| match change {
        Change::FeatureRemoved { name, .. } => Some(name),
        Change::Hydration(_)
        | Change::FeatureUpdated(_)
        | Change::SegmentUpdated(_)
        | Change::SegmentRemoved(_) => None,
    });
    (is_changed, removed_flags.collect())
}

/// Whether `state` differs from `known`, including its diagnostics.
pub(super) fn differs(known: &Document, state: &Document) -> bool {
    !delta::diff(known, state).is_empty() || !state.has_same_diagnostics(known)
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

    /// An event with these changes, given as JSON without the type's `eventId`.
    fn changes(name: &str, id: &str, changes: &str) -> Event {
        let text = changes.replace(r#"{"type""#, &format!(r#"{{"eventId":{id},"type""#));
        event(name, id, &format!(r#"{{"events":[{text}]}}"#))
    }

    const A: &str = r#"{"name":"a"}"#;
    const B: &str = r#"{"name":"b"}"#;
    const WHOLE: &str = r#"{"type":"hydration","features":[{"name":"a"}],"segments":[]}"#;
    const ADD_B: &str = r#"{"type":"feature-updated","feature":{"name":"b"}}"#;
    const REMOVE_A: &str = r#"{"type":"feature-removed","featureName":"a","project":"default"}"#;

    /// Checks the resulting event id and, if they changed, the names of the flags.
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
    fn stream_starts_with_hydration_or_continues_previous_state() {
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
    fn unreadable_flags_count_as_a_change() {
        let with_odd = WHOLE.replace(r#"[{"name":"a"}]"#, r#"[{"name":"a"},{"title":"b"}]"#);
        let known = document(A);
        let step = |known: &Document, text: &str| {
            let step = follow(Some(known), true, &[changes(CONNECTED, "7", text)], true).unwrap();
            step.reached.unwrap().news
        };
        let news = step(&known, &with_odd).unwrap();
        assert_eq!(news.unreadable().len(), 1);
        assert!(step(&news, &with_odd).is_none(), "unchanged");
        assert!(step(&news, WHOLE).unwrap().unreadable().is_empty());
    }

    #[test]
    fn removed_flags_are_listed() {
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
    fn equal_state_is_not_reported_as_changed() {
        check(Some(A), false, &[changes(CONNECTED, "7", WHOLE)], (Some(7), None));
        check(Some(A), true, &[changes(CONNECTED, "7", "")], (Some(7), None));
        let there_and_back = [changes(UPDATED, "8", ADD_B), changes(UPDATED, "9", WHOLE)];
        check(Some(A), true, &there_and_back, (Some(9), None));
    }

    #[test]
    fn events_of_one_batch_are_applied_together() {
        let events = [
            changes(CONNECTED, "7", WHOLE),
            event("message", "7", "hello"),
            changes(UPDATED, "8", ADD_B),
            changes(UPDATED, "9", REMOVE_A),
        ];
        check(None, false, &events, (Some(9), Some(&["b"])));
    }

    #[test]
    fn intermediate_states_are_split_by_event_id() {
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
        assert!(alone.passed.is_empty(), "no other token to compare with");
        assert_eq!(names(&alone.news.unwrap()), names(&shared.news.unwrap()));
    }

    #[test]
    fn event_id_that_is_not_a_number_is_dropped() {
        let mut events = [changes(CONNECTED, "7", WHOLE)];
        events[0].id = "x".to_owned();
        check(None, false, &events, (None, Some(&["a"])));
    }

    #[test]
    fn one_invalid_event_rejects_the_whole_batch() {
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
    fn fetch_mode_event_can_request_polling() {
        let step = |data| follow(None, false, &[event(FETCH_MODE, "", data)], true).unwrap();
        assert!(step("polling").dismissed && !step("streaming").dismissed);
        assert!(step("polling").reached.is_none());
        let events = [event(FETCH_MODE, "", "polling"), changes(CONNECTED, "7", WHOLE)];
        let step = follow(None, false, &events, true).unwrap();
        assert!(step.dismissed && step.reached.is_some());
    }
}
