//! Applies the events of a stream to a document; yields the new document and its event id.
//!
//! Pure. Events that arrived together are applied together. If one of them is invalid, all are rejected:
//! the others alone would produce a state that never existed.

use std::{mem, sync::Arc};

use super::fetched_documents::FetchedDocument;
use crate::protocol::{
    delta::{self, Change, EventId, ParseError},
    features::Document,
    sse::DecodedEvent,
};

/// Events with changes: the first event of a stream, and later ones.
const CONNECTED: &str = "unleash-connected";
const UPDATED: &str = "unleash-updated";

/// The event that tells clients whether to poll or to stream.
const FETCH_MODE: &str = "fetch-mode";

/// The result of applying events.
#[derive(Debug, Default)]
pub(super) struct StreamUpdate {
    /// The new state, if there were events with changes.
    pub(super) applied: Option<Applied>,
    /// Upstream asks clients that can poll to poll.
    pub(super) prefers_polling: bool,
}

/// The state after applying events.
#[derive(Debug)]
pub(super) struct Applied {
    /// The `Last-Event-ID` to reopen the stream with; `None` if the last id was not a number.
    pub(super) event_id: Option<EventId>,
    /// The document, if it differs from the previous one, with at most the last
    /// [`MAX_INTERMEDIATE_STATES`] states in between.
    pub(super) changed: Option<FetchedDocument>,
    /// The names of removed flags.
    pub(super) removed_flags: Vec<Arc<str>>,
}

/// The largest number of intermediate states that are computed.
const MAX_INTERMEDIATE_STATES: usize = 16;

/// Why events cannot be applied.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// An event cannot be parsed.
    #[error("an event of upstream's stream cannot be read")]
    Unreadable(#[from] ParseError),
    /// A delta to a state that is not known.
    #[error("upstream's stream starts with a delta to an unknown state")]
    MissingBase,
}

/// Applies `events` to the state `known`. Unless they continue that state (`continues`), they must start
/// with a hydration. Intermediate states are computed only if other tokens' states are compared with
/// them (`is_shared`).
pub(super) fn apply_events(
    known: Option<&Document>,
    continues: bool,
    events: &[DecodedEvent],
    is_shared: bool,
) -> Result<StreamUpdate, Error> {
    let (mut update, mut received, mut event_id) =
        (StreamUpdate::default(), None::<Vec<delta::DeltaEvent>>, None);
    for event in events {
        match &*event.name {
            CONNECTED | UPDATED => {
                let changes = delta::parse(event.data.as_bytes())?;
                received.get_or_insert_default().extend(changes);
                event_id = event.id.parse().ok();
            }
            FETCH_MODE => update.prefers_polling |= event.data.trim() == "polling",
            // Unknown events are ignored.
            _ => {}
        }
    }
    let Some(received) = received else { return Ok(update) };
    let base = match (known, received.first().map(|it| &it.change)) {
        (_, Some(Change::Hydration(_))) => &Document::default(),
        (Some(known), _) if continues => known,
        _ => return Err(Error::MissingBase),
    };
    // Changes with the same event id belong together.
    let groups: Vec<_> = received.chunk_by(|one, next| one.id == next.id).collect();
    let separate = if is_shared { MAX_INTERMEDIATE_STATES } else { 0 };
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
    let changed = is_changed
        .then(|| FetchedDocument::new(state).with_intermediate_states(&intermediate_states));
    update.applied = Some(Applied { event_id, changed, removed_flags });
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::document_parts::PartHashes;

    fn document(text: &str) -> Document {
        Document::parse(format!(r#"{{"features":[{text}]}}"#).as_bytes()).unwrap()
    }

    fn event(name: &str, id: &str, data: &str) -> DecodedEvent {
        DecodedEvent { name: name.to_owned(), id: id.to_owned(), data: data.to_owned() }
    }

    /// An event with these changes, given as JSON without the type's `eventId`.
    fn delta_event(name: &str, id: &str, changes: &str) -> DecodedEvent {
        let text = changes.replace(r#"{"type""#, &format!(r#"{{"eventId":{id},"type""#));
        event(name, id, &format!(r#"{{"events":[{text}]}}"#))
    }

    const A: &str = r#"{"name":"a"}"#;
    const B: &str = r#"{"name":"b"}"#;
    const HYDRATION: &str = r#"{"type":"hydration","features":[{"name":"a"}],"segments":[]}"#;
    const ADD_B: &str = r#"{"type":"feature-updated","feature":{"name":"b"}}"#;
    const REMOVE_A: &str = r#"{"type":"feature-removed","featureName":"a","project":"default"}"#;

    fn flag_names(document: &Document) -> Vec<String> {
        document.features().iter().map(|it| it.name().to_string()).collect()
    }

    /// Checks the resulting event id and, if they changed, the names of the flags.
    #[track_caller]
    fn assert_applied(
        known: Option<&str>,
        continues: bool,
        events: &[DecodedEvent],
        expect: (Option<EventId>, Option<&[&str]>),
    ) {
        let known = known.map(document);
        let step = apply_events(known.as_ref(), continues, events, true).unwrap();
        let Applied { event_id, changed, .. } = step.applied.unwrap();
        let names = changed.map(|it| flag_names(&it.document));
        assert_eq!(event_id, expect.0);
        assert_eq!(
            names,
            expect.1.map(|it| it.iter().map(|&it| it.to_owned()).collect::<Vec<_>>())
        );
    }

    #[test]
    fn stream_starts_with_hydration_or_continues_previous_state() {
        let connected = |text: &str| [delta_event(CONNECTED, "7", text)];
        assert_applied(None, false, &connected(HYDRATION), (Some(7), Some(&["a"])));
        assert_applied(Some(B), true, &connected(HYDRATION), (Some(7), Some(&["a"])));
        assert_applied(Some(A), true, &connected(ADD_B), (Some(7), Some(&["a", "b"])));
        for (known, continues) in [(None, true), (None, false), (Some(A), false)] {
            for text in [ADD_B, ""] {
                let known = known.map(document);
                let error =
                    apply_events(known.as_ref(), continues, &connected(text), true).unwrap_err();
                assert!(matches!(error, Error::MissingBase), "{error}");
            }
        }
    }

    #[test]
    fn unreadable_flags_count_as_a_change() {
        let with_odd = HYDRATION.replace(r#"[{"name":"a"}]"#, r#"[{"name":"a"},{"title":"b"}]"#);
        let known = document(A);
        let step = |known: &Document, text: &str| {
            let step = apply_events(Some(known), true, &[delta_event(CONNECTED, "7", text)], true)
                .unwrap();
            step.applied.unwrap().changed.map(|it| it.document)
        };
        let news = step(&known, &with_odd).unwrap();
        assert_eq!(news.unreadable().len(), 1);
        assert!(step(&news, &with_odd).is_none(), "unchanged");
        assert!(step(&news, HYDRATION).unwrap().unreadable().is_empty());
    }

    #[test]
    fn removed_flags_are_listed() {
        let gone = |known: Option<&str>, text: &str| {
            let known = known.map(document);
            let step =
                apply_events(known.as_ref(), true, &[delta_event(CONNECTED, "7", text)], true)
                    .unwrap();
            step.applied.unwrap().removed_flags
        };
        assert_eq!(gone(Some(B), HYDRATION), [Arc::from("b")]);
        assert_eq!(gone(Some(A), REMOVE_A), [Arc::from("a")]);
        assert!(gone(Some(A), ADD_B).is_empty() && gone(None, HYDRATION).is_empty());
    }

    #[test]
    fn equal_state_is_not_reported_as_changed() {
        assert_applied(Some(A), false, &[delta_event(CONNECTED, "7", HYDRATION)], (Some(7), None));
        assert_applied(Some(A), true, &[delta_event(CONNECTED, "7", "")], (Some(7), None));
        let there_and_back =
            [delta_event(UPDATED, "8", ADD_B), delta_event(UPDATED, "9", HYDRATION)];
        assert_applied(Some(A), true, &there_and_back, (Some(9), None));
    }

    #[test]
    fn events_of_one_batch_are_applied_together() {
        let events = [
            delta_event(CONNECTED, "7", HYDRATION),
            event("message", "7", "hello"),
            delta_event(UPDATED, "8", ADD_B),
            delta_event(UPDATED, "9", REMOVE_A),
        ];
        assert_applied(None, false, &events, (Some(9), Some(&["b"])));
    }

    #[test]
    fn intermediate_states_are_split_by_event_id() {
        let changed = |events: &[DecodedEvent], is_shared| {
            let known = document(A);
            let update = apply_events(Some(&known), true, events, is_shared).unwrap();
            update.applied.unwrap().changed.unwrap()
        };
        let states = |events: &[DecodedEvent]| changed(events, true).intermediate_states;
        let state = |flags: &str| PartHashes::from_document(&document(flags));
        let flag = |id: usize| format!(r#"{{"name":"f{id}"}}"#);
        let add = |id: usize| {
            let feature = format!(r#"{{"type":"feature-updated","feature":{}}}"#, flag(id));
            delta_event(UPDATED, &id.to_string(), &feature)
        };
        assert_eq!(states(&[add(8)]), []);
        let both = format!("{ADD_B},{REMOVE_A}");
        assert_eq!(states(&[delta_event(UPDATED, "8", &both)]), [], "they belong together");
        assert_eq!(states(&[delta_event(UPDATED, "8", &both), add(9)]), [state(B)]);
        let many: Vec<_> = (8..48).map(add).collect();
        let [alone, shared] = [false, true].map(|is_shared| changed(&many, is_shared));
        let first: Vec<_> =
            (8..48 - MAX_INTERMEDIATE_STATES).map(flag).chain([A.to_owned()]).collect();
        assert_eq!(shared.intermediate_states.len(), MAX_INTERMEDIATE_STATES);
        assert_eq!(shared.intermediate_states[0], state(&first.join(",")));
        assert_eq!(alone.intermediate_states, [], "no other token to compare with");
        assert_eq!(flag_names(&alone.document), flag_names(&shared.document));
    }

    #[test]
    fn event_id_that_is_not_a_number_is_dropped() {
        let mut events = [delta_event(CONNECTED, "7", HYDRATION)];
        events[0].id = "x".to_owned();
        assert_applied(None, false, &events, (None, Some(&["a"])));
    }

    #[test]
    fn one_invalid_event_rejects_the_whole_batch() {
        for odd in [
            "hello",
            r#"{"events":7}"#,
            r#"{"events":[{"eventId":8,"type":"feature-vanished"}]}"#,
            r#"{"events":[{"eventId":8,"type":"feature-updated","feature":{}}]}"#,
        ] {
            let events = [delta_event(CONNECTED, "7", HYDRATION), event(UPDATED, "8", odd)];
            let error = apply_events(None, false, &events, true).unwrap_err();
            assert!(matches!(error, Error::Unreadable(_)), "{odd}: {error}");
        }
    }

    #[test]
    fn fetch_mode_event_can_request_polling() {
        let step = |data| apply_events(None, false, &[event(FETCH_MODE, "", data)], true).unwrap();
        assert!(step("polling").prefers_polling && !step("streaming").prefers_polling);
        assert!(step("polling").applied.is_none());
        let events = [event(FETCH_MODE, "", "polling"), delta_event(CONNECTED, "7", HYDRATION)];
        let step = apply_events(None, false, &events, true).unwrap();
        assert!(step.prefers_polling && step.applied.is_some());
    }
}
