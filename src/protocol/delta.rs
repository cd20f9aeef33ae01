//! Delta events, which turn one state of an environment's flags into a later one.
//!
//! `/api/client/delta` and `/api/client/streaming` carry them as `{"events":[…]}`. Flags and segments
//! keep their text byte for byte, as in `features`. This module does not filter events by token, and
//! does not track which of them a client has received.

use std::{borrow::Cow, collections::BTreeMap, fmt::Write as _, sync::Arc};

use itertools::{
    EitherOrBoth::{Both, Left, Right},
    Itertools as _,
};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::features::{Document, Feature, Segment};

/// The id of a state. Within one subscription the ids increase, except after a restart of the sequence.
pub type EventId = u32;

/// A change, and the id of the state that it leads to.
#[derive(Clone, Debug)]
pub struct DeltaEvent {
    /// The state after the last event with this id.
    pub id: EventId,
    /// The change.
    pub change: Change,
}

/// One change of a state.
#[derive(Clone, Debug)]
pub enum Change {
    /// Replaces the whole state.
    Hydration(Document),
    /// Adds the flag, or replaces its text.
    FeatureUpdated(Feature),
    /// Removes the flag.
    FeatureRemoved {
        /// The name of the flag.
        name: Arc<str>,
        /// The project of the flag.
        project: Arc<str>,
    },
    /// Adds the segment, or replaces its text.
    SegmentUpdated(Segment),
    /// Removes the segment of this id.
    SegmentRemoved(i64),
}

/// The error of a list of events that cannot be applied. The resulting state is unknown, so the whole
/// state has to be fetched.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// The JSON does not have the shape of events.
    #[error("the events cannot be read: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The type of an event is unknown here.
    #[error("an event is of an unknown type")]
    UnknownType,
    /// A segment has no numeric id.
    #[error("a segment has no numeric id")]
    SegmentWithoutId,
}

/// The changes that turn `old` into `new`, ordered so that no flag lacks a segment in between.
pub fn diff(old: &Document, new: &Document) -> Vec<Change> {
    let (mut changes, mut last) = (vec![], vec![]);
    let by_id = |a: &&Segment, b: &&Segment| a.id().cmp(&b.id());
    for pair in old.segments().iter().merge_join_by(new.segments(), by_id) {
        match pair {
            Both(before, now) if before == now => {}
            Both(_, now) | Right(now) => changes.push(Change::SegmentUpdated(now.clone())),
            Left(gone) => last.push(Change::SegmentRemoved(gone.id())),
        }
    }
    let by_name = |a: &&Feature, b: &&Feature| a.name().cmp(b.name());
    for pair in old.features().iter().merge_join_by(new.features(), by_name) {
        match pair {
            Both(before, now) if before == now => {}
            Both(_, now) | Right(now) => changes.push(Change::FeatureUpdated(now.clone())),
            Left(gone) => changes.push(Change::FeatureRemoved {
                name: Arc::clone(gone.name()),
                project: Arc::clone(gone.project()),
            }),
        }
    }
    changes.append(&mut last);
    changes
}

/// Applies the changes to `state`, in their order.
///
/// Diagnostics of a state, such as unreadable flags, come only with a hydration, so they are kept until
/// the next one.
#[must_use]
pub fn apply<'a>(state: &Document, changes: impl IntoIterator<Item = &'a Change>) -> Document {
    let mut reported = state;
    let by_name = |it: &Feature| (Arc::clone(it.name()), it.clone());
    let by_id = |it: &Segment| (it.id(), it.clone());
    let mut features: BTreeMap<Arc<str>, Feature> = state.features().iter().map(by_name).collect();
    let mut segments: BTreeMap<i64, Segment> = state.segments().iter().map(by_id).collect();
    for change in changes {
        match change {
            Change::Hydration(whole) => {
                reported = whole;
                features = whole.features().iter().map(by_name).collect();
                segments = whole.segments().iter().map(by_id).collect();
            }
            Change::FeatureUpdated(feature) => features.extend([by_name(feature)]),
            Change::FeatureRemoved { name, .. } => drop(features.remove(name)),
            Change::SegmentUpdated(segment) => segments.extend([by_id(segment)]),
            Change::SegmentRemoved(id) => drop(segments.remove(id)),
        }
    }
    let state =
        Document::from_parts(features.into_values().collect(), segments.into_values().collect());
    state.with_diagnostics_of(reported)
}

/// Encodes `{"events":[…]}`.
pub fn encode<'a>(events: impl IntoIterator<Item = &'a DeltaEvent>) -> String {
    let mut text = String::from(r#"{"events":["#);
    for (n, event) in events.into_iter().enumerate() {
        if n > 0 {
            text.push(',');
        }
        write_event(&mut text, event);
    }
    text.push_str("]}");
    text
}

fn write_event(text: &mut String, DeltaEvent { id, change }: &DeltaEvent) {
    let kind = match change {
        Change::Hydration(_) => HYDRATION,
        Change::FeatureUpdated(_) => FEATURE_UPDATED,
        Change::FeatureRemoved { .. } => FEATURE_REMOVED,
        Change::SegmentUpdated(_) => SEGMENT_UPDATED,
        Change::SegmentRemoved(_) => SEGMENT_REMOVED,
    };
    // Writing to a string cannot fail.
    let _ = write!(text, r#"{{"type":"{kind}","eventId":{id},"#);
    let _ = match change {
        Change::Hydration(whole) => {
            text.push_str(r#""features":["#);
            write_json_array(text, whole.features().iter().map(Feature::raw));
            text.push_str(r#"],"segments":["#);
            write_json_array(text, whole.segments().iter().map(Segment::raw));
            text.write_str("]}")
        }
        Change::FeatureUpdated(feature) => write!(text, r#""feature":{}}}"#, feature.raw()),
        Change::FeatureRemoved { name, project } => {
            let (name, project) = (serde_json::json!(&**name), serde_json::json!(&**project));
            write!(text, r#""featureName":{name},"project":{project}}}"#)
        }
        Change::SegmentUpdated(segment) => write!(text, r#""segment":{}}}"#, segment.raw()),
        Change::SegmentRemoved(segment) => write!(text, r#""segmentId":{segment}}}"#),
    };
}

fn write_json_array<'a>(text: &mut String, items: impl Iterator<Item = &'a str>) {
    for (n, item) in items.enumerate() {
        if n > 0 {
            text.push(',');
        }
        text.push_str(item);
    }
}

const HYDRATION: &str = "hydration";
const FEATURE_UPDATED: &str = "feature-updated";
const FEATURE_REMOVED: &str = "feature-removed";
const SEGMENT_UPDATED: &str = "segment-updated";
const SEGMENT_REMOVED: &str = "segment-removed";

/// Parses `{"events":[…]}` and ignores unknown fields.
///
/// # Errors
/// If a single event is malformed or of an unknown type: the other events alone would lead to a state
/// that never existed.
pub fn parse(body: &[u8]) -> Result<Vec<DeltaEvent>, ParseError> {
    #[derive(Deserialize)]
    struct Body<'a> {
        #[serde(borrow)]
        events: Vec<&'a RawValue>,
    }
    let Body { events } = serde_json::from_slice(body)?;
    events.into_iter().map(|event| parse_event(event.get())).collect()
}

fn parse_event(text: &str) -> Result<DeltaEvent, ParseError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Head<'a> {
        #[serde(borrow, rename = "type")]
        kind: Cow<'a, str>,
        event_id: EventId,
    }
    #[derive(Deserialize)]
    struct WithFeature<'a> {
        #[serde(borrow)]
        feature: &'a RawValue,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct WithoutFeature {
        feature_name: Arc<str>,
        #[serde(default)]
        project: Option<Arc<str>>,
    }
    #[derive(Deserialize)]
    struct WithSegment<'a> {
        #[serde(borrow)]
        segment: &'a RawValue,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct WithoutSegment {
        segment_id: i64,
    }

    let Head { kind, event_id } = serde_json::from_str(text)?;
    let change = match &*kind {
        HYDRATION => Change::Hydration(Document::parse(text.as_bytes())?),
        FEATURE_UPDATED => {
            let WithFeature { feature } = serde_json::from_str(text)?;
            Change::FeatureUpdated(Feature::parse(feature)?)
        }
        FEATURE_REMOVED => {
            let WithoutFeature { feature_name, project } = serde_json::from_str(text)?;
            let project = project.unwrap_or_else(|| Arc::from(""));
            Change::FeatureRemoved { name: feature_name, project }
        }
        SEGMENT_UPDATED => {
            let WithSegment { segment } = serde_json::from_str(text)?;
            let segment = Segment::parse(segment).ok_or(ParseError::SegmentWithoutId)?;
            Change::SegmentUpdated(segment)
        }
        SEGMENT_REMOVED => {
            let WithoutSegment { segment_id } = serde_json::from_str(text)?;
            Change::SegmentRemoved(segment_id)
        }
        _ => return Err(ParseError::UnknownType),
    };
    Ok(DeltaEvent { id: event_id, change })
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn raw_texts(document: &Document) -> (Vec<&str>, Vec<&str>) {
        let features = document.features().iter().map(Feature::raw).collect();
        (features, document.segments().iter().map(Segment::raw).collect())
    }

    /// A state of few flags and segments, so that two states often share some.
    fn any_document() -> impl Strategy<Value = Document> {
        let feature = (0..6_u8, 0..3_u8, 0..3_u8).prop_map(|(name, project, rest)| {
            // The spaces, the unknown field and the escape must be preserved.
            format!(
                r#"{{ "name":"fl\"ag-{name}", "project":"p{project}","x":1e0{rest},
                "strategies":[{{"name":"default","segments":[{rest}]}}]}}"#
            )
        });
        let segment = (0..5_u8, 0..3_u8)
            .prop_map(|(id, rest)| format!(r#"{{"id":{id}, "constraints":[],"y":"{rest}"}}"#));
        (vec(feature, 0..6), vec(segment, 0..5)).prop_map(|(features, segments)| {
            let (features, segments) = (features.join(","), segments.join(","));
            let text = format!(r#"{{"features":[{features}],"segments":[{segments}]}}"#);
            Document::parse(text.as_bytes()).unwrap()
        })
    }

    fn events(id: EventId, changes: Vec<Change>) -> Vec<DeltaEvent> {
        changes.into_iter().map(|change| DeltaEvent { id, change }).collect()
    }

    fn received(sent: &[DeltaEvent]) -> Vec<DeltaEvent> {
        parse(encode(sent).as_bytes()).unwrap()
    }

    proptest! {
        #[test]
        fn received_events_lead_to_new_state(states in vec(any_document(), 2..5)) {
            // Step by step from the first state, and then directly from the first to the last.
            let mut follower = states[0].clone();
            for (n, pair) in (1..).zip(states.windows(2)) {
                let sent = events(n, diff(&pair[0], &pair[1]));
                let received = received(&sent);
                prop_assert!(received.iter().all(|event| event.id == n));
                follower = apply(&follower, received.iter().map(|event| &event.change));
                prop_assert_eq!(raw_texts(&follower), raw_texts(&pair[1]));
            }
            let (first, last) = (&states[0], &states[states.len() - 1]);
            let jump = apply(first, &diff(first, last));
            prop_assert_eq!(raw_texts(&jump), raw_texts(last));
            prop_assert!(diff(&follower, last).is_empty());
        }

        #[test]
        fn hydration_replaces_whole_state(before in any_document(), after in any_document()) {
            let sent = [DeltaEvent { id: 7, change: Change::Hydration(after.clone()) }];
            let received = received(&sent);
            let state = apply(&before, received.iter().map(|event| &event.change));
            prop_assert_eq!(raw_texts(&state), raw_texts(&after));
        }

        #[test]
        fn no_text_makes_parsing_panic(text in ".{0,200}") {
            let _ = parse(text.as_bytes());
            let _ = parse(format!(r#"{{"events":[{text}]}}"#).as_bytes());
        }
    }

    #[test]
    fn diagnostics_persist_until_next_hydration() {
        let hydration = |features: &str| {
            let text = format!(r#"{{"type":"hydration","eventId":1,"features":[{features}]}}"#);
            parse(format!(r#"{{"events":[{text}]}}"#).as_bytes()).unwrap().remove(0).change
        };
        let odd = hydration(r#"{"name":"a"},{"name":"a","enabled":true},{"title":"b"}"#);
        let update = Change::FeatureRemoved { name: "a".into(), project: "default".into() };
        let mut state = apply(&Document::default(), [&odd]);
        for _ in 0..2 {
            let [unreadable] = state.unreadable() else { panic!("{:?}", state.unreadable()) };
            assert_eq!(unreadable.position, 3);
            assert_eq!(state.duplicates(), [Arc::from("a")]);
            state = apply(&state, [&update]);
        }
        state = apply(&state, [&hydration(r#"{"name":"a"}"#)]);
        assert!(state.unreadable().is_empty() && state.duplicates().is_empty());
    }

    #[test]
    fn changes_are_ordered_so_that_no_flag_lacks_a_segment() {
        let parse = |text: &str| Document::parse(text.as_bytes()).unwrap();
        let with = r#"{"features":[{"name":"a","strategies":[{"name":"default","segments":[1]}]}],"segments":[{"id":1}]}"#;
        let (with, without) = (parse(with), parse(r#"{"features":[{"name":"a"}]}"#));
        let appearing = diff(&without, &with);
        assert!(
            matches!(&appearing[..], [Change::SegmentUpdated(_), Change::FeatureUpdated(_)]),
            "{appearing:?}"
        );
        let going = diff(&with, &without);
        assert!(
            matches!(&going[..], [Change::FeatureUpdated(_), Change::SegmentRemoved(1)]),
            "{going:?}"
        );
        let gone = diff(&with, &Document::default());
        assert!(
            matches!(&gone[..], [Change::FeatureRemoved { .. }, Change::SegmentRemoved(1)]),
            "{gone:?}"
        );
    }

    #[test]
    fn parse_errors_are_distinguished() {
        let parse = |event: &str| parse(format!(r#"{{"events":[{event}]}}"#).as_bytes());
        let unknown = parse(r#"{"type":"environment-renamed","eventId":3}"#);
        assert!(matches!(unknown, Err(ParseError::UnknownType)), "{unknown:?}");
        let nameless = parse(r#"{"type":"feature-updated","eventId":3,"feature":{}}"#);
        assert!(matches!(nameless, Err(ParseError::Malformed(_))), "{nameless:?}");
        let segment = parse(r#"{"type":"segment-updated","eventId":3,"segment":{}}"#);
        assert!(matches!(segment, Err(ParseError::SegmentWithoutId)), "{segment:?}");
        let numberless = parse(r#"{"type":"segment-removed","segmentId":3}"#);
        assert!(matches!(numberless, Err(ParseError::Malformed(_))), "{numberless:?}");
        let known = parse(r#"{"type":"segment-removed","segmentId":3,"eventId":4,"more":{}}"#);
        let known = known.unwrap();
        assert!(matches!(known[..], [DeltaEvent { id: 4, change: Change::SegmentRemoved(3) }]));
    }
}
