//! A client-features document: the flags and segments of one environment.
//!
//! `/api/client/features`, bootstrap files and backups have the same shape. Files may also have the
//! simple format of Unleash Edge ([`Document::parse_file`]). The text of each flag and segment is kept
//! byte for byte, so that fields and operators unknown to this version are preserved.
//! [`Feature::definition`] parses that text for the engine. This module does not validate definitions: a
//! value of the wrong type is parsed as [`Lenient::Malformed`], and the engine decides how to treat it.

mod definition;
mod inline;
mod simple;

use std::{collections::HashMap, sync::Arc, thread};

use foldhash::fast::RandomState;
use itertools::{EitherOrBoth::Both, Itertools as _};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

pub use self::definition::{
    Constraint, Definition, Dependency, Override, Parameters, Payload, Strategy, Variant,
};
use self::definition::{Meta, SegmentBody};
use super::{
    byte_order_mark::without_byte_order_mark,
    lenient::{Lenient, Text},
};
use crate::token::Projects;

/// The project of a flag without one, as in Unleash.
const DEFAULT_PROJECT: &str = "default";

/// The flags and segments of one environment. Flags are sorted by name and segments by id; both are
/// unique.
#[derive(Debug, Clone, Default)]
pub struct Document {
    features: Vec<Feature>,
    segments: Vec<Segment>,
    revision: Option<u64>,
    stored_revision: Option<u64>,
    previous_run: Option<PreviousRun>,
    duplicates: Vec<Arc<str>>,
    unreadable: Vec<UnreadableFlag>,
}

/// Information about the run that served and stored a document.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PreviousRun {
    /// The upstream revision of the document, if upstream's revisions can be compared.
    pub upstream_revision: Option<u64>,
    /// The id of the state, from which event ids are derived.
    pub state_id: Option<u32>,
}

/// The field that Parapet adds to a stored listing.
#[derive(Deserialize, Serialize)]
struct StoredExtension {
    parapet: Option<PreviousRun>,
}

/// A flag that was left out of its document because its name could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadableFlag {
    /// The position in the received list, counted from 1.
    pub position: usize,
    /// The parse error.
    pub reason: String,
}

impl Document {
    /// Parses a client-features body.
    ///
    /// # Errors
    /// Only if the body is not a client-features object: not JSON, without a `features` list, or with a list
    /// that contains items but no flag. A malformed flag is kept if its name can be read, and left out
    /// otherwise ([`Document::unreadable`]). Both are reported at compilation.
    pub fn parse(body: &[u8]) -> Result<Self, serde_json::Error> {
        Self::parse_reusing(body, &Self::default())
    }

    /// Parses a client-features body and shares unchanged flags and segments with `before`. Unchanged
    /// flags are recognised by their text and not parsed again.
    ///
    /// # Errors
    /// As [`Document::parse`].
    pub fn parse_reusing(body: &[u8], before: &Self) -> Result<Self, serde_json::Error> {
        let body = without_byte_order_mark(body);
        // serde would accept a list of the fields in place of an object.
        if body.trim_ascii_start().starts_with(b"[") {
            return Err(serde::de::Error::custom(format_args!(
                "a list, where {EXPECTED_SHAPE} is expected"
            )));
        }
        let body: Body<'_> = serde_json::from_slice(body)?;
        // Half of the work is done; yields to other threads before the rest.
        thread::yield_now();
        let features = match body.features {
            Lenient::Valid(features) => features,
            // A response without flags is an error; it must not be taken for an empty configuration.
            Lenient::Missing | Lenient::Malformed => {
                return Err(serde::de::Error::custom("`features` is not a list"));
            }
        };
        let (features, unreadable) = parse_features(features, &before.index_by_text())?;
        let segments = body.segments.valid().unwrap_or_default();
        let segments = segments.into_iter().filter_map(Segment::parse).collect();
        let revision = body.meta.valid().and_then(|meta| meta.revision_id.valid());
        let mut document = Self { unreadable, ..Self::from_unsorted(features, segments, revision) };
        document.reuse_unchanged_segments(before);
        Ok(document)
    }

    /// Parses a file: a client-features body, or the simple format of Unleash Edge's offline mode,
    /// `{"<flag>":{"enabled":true,"variant":"<name>"}}`.
    ///
    /// # Errors
    /// If it is neither; the message names both formats.
    pub fn parse_file(text: &[u8]) -> Result<Self, serde_json::Error> {
        match Self::parse(text) {
            Err(error) if error.is_data() => {
                let flags = simple::parse_flags(without_byte_order_mark(text), &error)?;
                let features =
                    flags.iter().map(|flag| Feature::parse(flag)).collect::<Result<_, _>>();
                Ok(Self::from_parts(features?, Vec::new()))
            }
            other => other,
        }
    }

    /// Parses a listing that Parapet has sent or stored. Its revision becomes
    /// [`Document::stored_revision`].
    ///
    /// # Errors
    /// As [`Document::parse`].
    pub fn parse_stored(text: &[u8]) -> Result<Self, serde_json::Error> {
        let document = Self::parse(text)?;
        let StoredExtension { parapet: previous_run } =
            serde_json::from_slice(without_byte_order_mark(text))?;
        let stored_revision = document.revision;
        Ok(Self { revision: None, stored_revision, previous_run, ..document })
    }

    /// The text to store for a listing; [`Document::parse_stored`] parses it.
    pub fn encode_stored(listing: &[u8], run: PreviousRun) -> Vec<u8> {
        let mut text = serde_json::to_vec(&StoredExtension { parapet: Some(run) })
            .expect("an object of numbers serializes");
        text.pop();
        text.push(b',');
        text.extend_from_slice(listing.strip_prefix(b"{").expect("a listing is an object"));
        text
    }

    /// The union of several responses for one environment, fetched with tokens of different projects.
    ///
    /// If two of them contain the same flag or segment, the later one is used. The revision is the
    /// highest.
    pub fn union(documents: impl IntoIterator<Item = Self>) -> Self {
        let mut union = Self::default();
        for document in documents {
            union.features.extend(document.features);
            union.segments.extend(document.segments);
            union.revision = union.revision.max(document.revision);
            union.duplicates.extend(document.duplicates);
            union.unreadable.extend(document.unreadable);
        }
        // A flag that tokens of two projects can access is not a duplicate to report.
        let sorted = Self::from_unsorted(union.features, union.segments, union.revision);
        Self { duplicates: union.duplicates, unreadable: union.unreadable, ..sorted }
    }

    /// The document with only the flags and segments for which the predicates are true.
    #[must_use]
    pub fn filter(
        &self,
        has_feature: impl Fn(&Feature) -> bool,
        has_segment: impl Fn(&Segment) -> bool,
    ) -> Self {
        Self {
            features: self.features.iter().filter(|it| has_feature(it)).cloned().collect(),
            segments: self.segments.iter().filter(|it| has_segment(it)).cloned().collect(),
            revision: self.revision,
            stored_revision: self.stored_revision,
            previous_run: self.previous_run,
            duplicates: self.duplicates.clone(),
            unreadable: self.unreadable.clone(),
        }
    }

    /// The flags, sorted by name.
    pub fn features(&self) -> &[Feature] {
        &self.features
    }

    /// The flag with this name.
    pub fn feature(&self, name: &str) -> Option<&Feature> {
        let index = self.features.binary_search_by(|feature| (**feature.name()).cmp(name)).ok()?;
        self.features.get(index)
    }

    /// The segments, sorted by id.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The segment with this id.
    pub fn segment(&self, id: i64) -> Option<&Segment> {
        find_segment(&self.segments, id)
    }

    /// `meta.revisionId`: the server's revision of this state.
    pub fn revision(&self) -> Option<u64> {
        self.revision
    }

    /// The revision under which this state was served before it was stored.
    pub fn stored_revision(&self) -> Option<u64> {
        self.stored_revision
    }

    /// The run that stored this document, if one did.
    pub fn previous_run(&self) -> Option<PreviousRun> {
        self.previous_run
    }

    /// The names that the body defined more than once; the last definition is used.
    pub fn duplicates(&self) -> &[Arc<str>] {
        &self.duplicates
    }

    /// The flags that were left out because their names could not be read.
    pub fn unreadable(&self) -> &[UnreadableFlag] {
        &self.unreadable
    }

    /// Creates a document. Of several flags with the same name, or segments with the same id, the last
    /// is used.
    pub fn from_parts(features: Vec<Feature>, segments: Vec<Segment>) -> Self {
        Self::from_unsorted(features, segments, None)
    }

    /// The same flags and segments, with the diagnostics of `other`: unreadable flags and duplicate
    /// names.
    #[must_use]
    pub(super) fn with_diagnostics_of(self, other: &Self) -> Self {
        let (duplicates, unreadable) = (other.duplicates.clone(), other.unreadable.clone());
        Self { duplicates, unreadable, ..self }
    }

    /// Whether both have the same diagnostics: unreadable flags and duplicate names.
    pub fn has_same_diagnostics(&self, other: &Self) -> bool {
        self.duplicates == other.duplicates && self.unreadable == other.unreadable
    }

    /// The same document, sharing unchanged flags and segments with `previous`. Several states in memory
    /// then cost only their differences.
    #[must_use]
    pub fn reuse_unchanged(mut self, previous: &Self) -> Self {
        let features = previous.features.iter();
        for pair in features.merge_join_by(&mut self.features, |a, b| a.name().cmp(b.name())) {
            if let Both(before, now) = pair
                && before == now
            {
                *now = before.clone();
            }
        }
        self.reuse_unchanged_segments(previous);
        self
    }

    fn reuse_unchanged_segments(&mut self, previous: &Self) {
        for segment in &mut self.segments {
            if let Some(before) = previous.segment(segment.id)
                && before == segment
            {
                *segment = before.clone();
            }
        }
    }

    fn index_by_text(&self) -> FeaturesByText<'_> {
        self.features.iter().map(|feature| (feature.raw(), feature)).collect()
    }

    fn from_unsorted(
        features: Vec<Feature>,
        segments: Vec<Segment>,
        revision: Option<u64>,
    ) -> Self {
        let mut duplicates = Vec::new();
        let mut note = |feature: &Feature| duplicates.push(Arc::clone(feature.name()));
        let features = sort_keeping_last(features, Feature::name, &mut note);
        let segments = sort_keeping_last(segments, |segment| &segment.id, |_| {});
        duplicates.dedup();
        Self {
            features,
            segments,
            revision,
            stored_revision: None,
            previous_run: None,
            duplicates,
            unreadable: Vec::new(),
        }
    }
}

/// Flags by their JSON text.
type FeaturesByText<'d> = HashMap<&'d str, &'d Feature, RandomState>;

/// Parses flags and collects unreadable ones. Known flags are reused without parsing. If there is no
/// readable flag, the last error is that of the whole body.
fn parse_features(
    items: Vec<&RawValue>,
    known: &FeaturesByText<'_>,
) -> Result<(Vec<Feature>, Vec<UnreadableFlag>), serde_json::Error> {
    let mut features = Vec::with_capacity(items.len());
    let mut unreadable = Vec::new();
    let mut last = None;
    for (position, item) in (1..).zip(items) {
        if let Some(&feature) = known.get(item.get()) {
            features.push(feature.clone());
            continue;
        }
        match Feature::parse(item) {
            Ok(feature) => features.push(feature),
            Err(error) => {
                unreadable.push(UnreadableFlag { position, reason: error.to_string() });
                last = Some(error);
            }
        }
    }
    match last {
        Some(error) if features.is_empty() => Err(error),
        Some(_) | None => Ok((features, unreadable)),
    }
}

/// Sorts by key and keeps the last item of each key; the others are passed to `drop`.
fn sort_keeping_last<T, K: Ord>(
    mut items: Vec<T>,
    key: impl Fn(&T) -> &K,
    mut drop: impl FnMut(&T),
) -> Vec<T> {
    items.sort_by(|a, b| key(a).cmp(key(b)));
    let mut kept: Vec<T> = Vec::with_capacity(items.len());
    for item in items {
        match kept.last_mut() {
            Some(last) if key(last) == key(&item) => {
                drop(last);
                *last = item;
            }
            Some(_) | None => kept.push(item),
        }
    }
    kept
}

/// Finds a segment in `segments`, which are sorted by id.
fn find_segment(segments: &[Segment], id: i64) -> Option<&Segment> {
    let index = segments.binary_search_by_key(&id, |segment| segment.id).ok()?;
    segments.get(index)
}

/// The projects in the `query` of a listing; all if there is none.
pub fn parse_query_projects(listing: &[u8]) -> Projects {
    #[derive(Deserialize)]
    struct Listing {
        query: Query,
    }
    #[derive(Deserialize)]
    struct Query {
        projects: Vec<String>,
    }
    match serde_json::from_slice::<Listing>(listing) {
        Ok(listing) => Projects::from_list(listing.query.projects.iter().map(String::as_str)),
        Err(_) => Projects::All,
    }
}

const EXPECTED_SHAPE: &str = "an object with a list `features`";

#[derive(Deserialize)]
#[serde(expecting = "an object with a list `features`")]
struct Body<'a> {
    #[serde(borrow)]
    features: Lenient<Vec<&'a RawValue>>,
    #[serde(borrow, default)]
    segments: Lenient<Vec<&'a RawValue>>,
    #[serde(default)]
    meta: Lenient<Meta>,
}

/// A flag: its JSON text, and the few values that are needed without compiling it.
///
/// Clones share the text. Flags are equal if their texts are equal.
#[derive(Debug, Clone)]
pub struct Feature(Arc<FeatureData>);

#[derive(Debug)]
struct FeatureData {
    name: Arc<str>,
    project: Arc<str>,
    segment_ids: Box<[i64]>,
    raw: Box<RawValue>,
}

impl PartialEq for Feature {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.raw() == other.raw()
    }
}

impl Eq for Feature {}

impl Feature {
    pub(super) fn parse(raw: &RawValue) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct Named<'a> {
            name: Arc<str>,
            #[serde(borrow, default)]
            project: Lenient<Text<'a>>,
        }
        let Named { name, project } = serde_json::from_str(raw.get())?;
        let project = project.valid().filter(|project| !project.is_empty());
        Ok(Self(Arc::new(FeatureData {
            name,
            project: Arc::from(project.as_deref().unwrap_or(DEFAULT_PROJECT)),
            segment_ids: segment_ids(raw.get()),
            raw: raw.to_owned(),
        })))
    }

    /// The name, unique in the document.
    pub fn name(&self) -> &Arc<str> {
        &self.0.name
    }

    /// The project of the flag; `default` if the text has none.
    pub fn project(&self) -> &Arc<str> {
        &self.0.project
    }

    /// The ids of the segments that its strategies use, sorted and unique.
    pub fn segment_ids(&self) -> &[i64] {
        &self.0.segment_ids
    }

    /// The flag's JSON exactly as received.
    pub fn raw(&self) -> &str {
        self.0.raw.get()
    }

    /// Parses the text for compilation; the result borrows from it.
    ///
    /// # Errors
    /// If the object cannot be parsed at all, for instance because a key occurs twice.
    pub fn definition(&self) -> Result<Definition<'_>, serde_json::Error> {
        serde_json::from_str(self.0.raw.get())
    }

    /// The flag's JSON with segments inlined, for SDKs without support for segments
    /// (`Unleash-Client-Spec` below 4.2.0).
    ///
    /// In every strategy, the constraints of its segments are added to `constraints`, and `segments` is
    /// removed. All other values keep their text and order. A reference to an unknown segment becomes a
    /// constraint that never matches.
    pub fn with_inlined_segments(&self, segments: &[Segment]) -> String {
        inline::inline_segments(self.0.raw.get(), |id| {
            find_segment(segments, id).map(|it| &*it.raw)
        })
    }
}

/// The ids of segments in a flag's text. Few flags have any, so most texts are not parsed.
fn segment_ids(text: &str) -> Box<[i64]> {
    if !text.contains("\"segments\"") {
        return Box::default();
    }
    let Ok(Definition { strategies: Lenient::Valid(strategies), .. }) = serde_json::from_str(text)
    else {
        return Box::default();
    };
    let of_strategy = |strategy: Lenient<Strategy<'_>>| strategy.valid()?.segments.valid();
    let ids = strategies.into_iter().filter_map(of_strategy).flatten();
    let mut ids: Vec<i64> = ids.filter_map(Lenient::valid).collect();
    ids.sort_unstable();
    ids.dedup();
    ids.into_boxed_slice()
}

/// A segment: a reusable list of constraints.
///
/// Clones share the text. Segments are equal if their texts are equal.
#[derive(Debug, Clone)]
pub struct Segment {
    id: i64,
    raw: Arc<RawValue>,
}

impl PartialEq for Segment {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.raw, &other.raw) || self.raw() == other.raw()
    }
}

impl Eq for Segment {}

impl Segment {
    /// Parses a segment. `None` without a numeric id, because no strategy can refer to it.
    pub(super) fn parse(raw: &RawValue) -> Option<Self> {
        #[derive(Deserialize)]
        struct SegmentId {
            id: i64,
        }
        let SegmentId { id } = serde_json::from_str(raw.get()).ok()?;
        Some(Self { id, raw: raw.to_owned().into() })
    }

    /// The id that strategies refer to.
    pub fn id(&self) -> i64 {
        self.id
    }

    /// The segment's JSON exactly as received.
    pub fn raw(&self) -> &str {
        self.raw.get()
    }

    /// The name of the segment, if it has one.
    pub fn name(&self) -> Option<Text<'_>> {
        serde_json::from_str::<SegmentBody<'_>>(self.raw.get()).ok()?.name.valid()
    }

    /// The constraints, all of which must match.
    pub fn constraints(&self) -> Lenient<Vec<Lenient<Constraint<'_>>>> {
        match serde_json::from_str::<SegmentBody<'_>>(self.raw.get()) {
            Ok(body) => body.constraints,
            Err(_) => Lenient::Malformed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Document {
        Document::parse(body.as_bytes()).unwrap()
    }

    #[test]
    fn text_is_preserved_byte_for_byte() {
        let flag = r#"{"name":"a", "new":{"x" : [1.50, "\u0061"]},"strategies":[{"name":"default","constraints":[{"operator":"FUTURE"}]}]}"#;
        let document =
            parse(&format!(r#"{{"features":[{flag}],"segments":[{{"id":1,  "y":1e3}}]}}"#));
        assert_eq!(document.features()[0].raw(), flag);
        assert_eq!(document.segments()[0].raw(), r#"{"id":1,  "y":1e3}"#);
    }

    #[test]
    fn features_are_sorted_and_last_duplicate_is_used() {
        let document = parse(
            r#"{"features":[{"name":"b"},{"name":"a","project":"x"},{"name":"b","project":"web"}],"meta":{"revisionId":7}}"#,
        );
        let flags: Vec<_> =
            document.features().iter().map(|f| (&**f.name(), &**f.project())).collect();
        assert_eq!(flags, [("a", "x"), ("b", "web")]);
        assert_eq!(document.duplicates(), [Arc::from("b")]);
        assert_eq!(document.revision(), Some(7));
    }

    #[test]
    fn only_body_that_is_not_a_client_features_object_fails() {
        for body in [
            "",
            "[]",
            "{}",
            r#"{"features":3}"#,
            r#"{"features":null}"#,
            r#"{"features":[1]}"#,
            r#"{"features":[{}]}"#,
        ] {
            assert!(Document::parse(body.as_bytes()).is_err(), "{body}");
        }
        let odd = r#"{"features":[{"name":"a","strategies":7,"enabled":"yes","name2":1}],"segments":{"a":1},"meta":[]}"#;
        assert_eq!(parse(odd).features().len(), 1);
        assert_eq!(parse(r#"{"features":[],"segments":null,"meta":null}"#).features().len(), 0);
        let twice = r#"{"features":[{"name":"a","strategies":[],"strategies":[]}]}"#;
        assert!(parse(twice).features()[0].definition().is_err());
    }

    #[test]
    fn error_of_unexpected_body_names_expected_shape() {
        for body in ["[]", " [[],[],{}]", "7", "\"x\""] {
            let error = Document::parse(body.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("an object with a list `features`"), "{body}: {error}");
        }
    }

    #[test]
    fn files_may_have_the_simple_format() {
        let text =
            r#"{"b":{"enabled":true,"variant":"blue"},"a":{"enabled":false,"variant":null}}"#;
        let document = Document::parse_file(text.as_bytes()).unwrap();
        let [a, b] = document.features() else { panic!("{document:?}") };
        assert_eq!((&**a.name(), &**b.name()), ("a", "b"));
        let raw = |flag: &Feature| serde_json::from_str::<serde_json::Value>(flag.raw()).unwrap();
        assert_eq!(raw(a)["enabled"], false);
        assert_eq!(raw(b)["variants"][0]["weight"], 1000);
        // `features` is also a valid name of a flag.
        let document = Document::parse_file(br#"{"features":{"enabled":true}}"#).unwrap();
        assert_eq!(&**document.features()[0].name(), "features");
    }

    #[test]
    fn error_of_file_in_neither_format_names_both() {
        let check = |text: &str, reason: &str| {
            let error = Document::parse_file(text.as_bytes()).unwrap_err().to_string();
            for part in [r#"{"features": [...]}"#, r#""enabled": true"#, reason] {
                assert!(error.contains(part), "{text}: {error}");
            }
        };
        check("{}", "missing field `features`");
        check("[]", "a list");
        check(r#"{"a":{"variant":"x"}}"#, "missing field `enabled`");
        check(r#"{"a":{"enabled":true,"strategies":[]}}"#, "unknown field `strategies`");
        check(r#"{"features":3}"#, "`features` is not a list");
        check(r#"{"features":[{}]}"#, "missing field `name`");
        let error = Document::parse_file(b"{ no JSON").unwrap_err();
        assert!(error.is_syntax() && error.line() == 1, "{error}");
    }

    #[test]
    fn stored_listing_preserves_its_served_revision() {
        let text = br#"{"features":[],"meta":{"revisionId":7}}"#;
        let document = Document::parse_stored(text).unwrap();
        assert_eq!((document.revision(), document.stored_revision()), (None, Some(7)));
        assert_eq!(document.previous_run(), None, "not stored by Parapet");
        for upstream_revision in [None, Some(9)] {
            let run = PreviousRun { upstream_revision, state_id: Some(5) };
            let document = Document::parse_stored(&Document::encode_stored(text, run)).unwrap();
            assert_eq!((document.stored_revision(), document.previous_run()), (Some(7), Some(run)));
        }
    }

    #[test]
    fn flag_with_unreadable_name_is_left_out() {
        let check = |odd: &str, reason: &str| {
            let body = format!(r#"{{"features":[{{"name":"a"}},{odd},{{"name":"b"}}]}}"#);
            let document = parse(&body);
            let names: Vec<_> = document.features().iter().map(|it| &**it.name()).collect();
            assert_eq!(names, ["a", "b"], "{odd}");
            let [UnreadableFlag { position: 2, reason: actual }] = document.unreadable() else {
                panic!("{odd}: {:?}", document.unreadable());
            };
            assert!(actual.starts_with(reason), "{odd}: {actual}");
            assert_eq!(Document::union([document.clone()]).unreadable(), document.unreadable());
        };
        check("{}", "missing field `name`");
        check("7", "invalid type: integer `7`");
        check(r#"{"name":null}"#, "invalid type: null");
        check(r#"{"name":"x","name":"y"}"#, "duplicate field `name`");
        check(r#"{"name":"x","project":"y","project":"z"}"#, "duplicate field `project`");
    }

    #[test]
    fn referenced_segments_are_listed_once() {
        let document = parse(
            r#"{"features":[{"name":"a","strategies":[{"segments":[3,1]},{"segments":[3,"x"]},{"segments":null},7]}]}"#,
        );
        assert_eq!(document.features()[0].segment_ids(), [1, 3]);
    }

    #[test]
    fn unchanged_features_and_segments_are_shared() {
        let first = r#"{"features":[{"name":"a"},{"name":"b"}],"segments":[{"id":1},{"id":2}]}"#;
        let then = r#"{"features":[{"name":"a"},{"name":"b","x":1},{"name":"c"}],"segments":[{"id":1},{"id":2,"x":1}]}"#;
        let (first, text, then) = (parse(first), then, parse(then));
        let read = Document::parse_reusing(text.as_bytes(), &first).unwrap();
        for shared in [then.clone().reuse_unchanged(&first), read] {
            assert_eq!(shared.features(), then.features());
            assert_eq!(shared.segments(), then.segments());
            let same = |n: usize| {
                shared.features()[n].raw().as_ptr() == first.features()[n].raw().as_ptr()
            };
            assert_eq!([same(0), same(1)], [true, false]);
            let same = |n: usize| {
                shared.segments()[n].raw().as_ptr() == first.segments()[n].raw().as_ptr()
            };
            assert_eq!([same(0), same(1)], [true, false]);
        }
    }

    #[test]
    fn reusing_a_previous_document_does_not_change_the_result() {
        let b = r#"{"name":"b","project":"x"}"#;
        let before = parse(&format!(r#"{{"features":[{b},{{"name":"gone"}}]}}"#));
        let body = format!(
            r#"{{"features":[{{"name":7}},{b},{{"name":"a"}},{{"name":"b"}},{b}],"meta":{{"revisionId":3}}}}"#
        );
        let (read, expect) = (Document::parse_reusing(body.as_bytes(), &before), parse(&body));
        assert_eq!(format!("{:?}", read.unwrap()), format!("{expect:?}"));
        for body in [r#"{"features":7}"#, r#"{"features":[{"name":7}]}"#, "["] {
            assert!(Document::parse_reusing(body.as_bytes(), &before).is_err());
        }
    }

    #[test]
    fn merge_unites_by_name_and_id() {
        let one = parse(
            r#"{"features":[{"name":"b"},{"name":"a","project":"old"}],"segments":[{"id":2}],"meta":{"revisionId":5}}"#,
        );
        let two = parse(
            r#"{"features":[{"name":"a","project":"new"}],"segments":[{"id":1},{"id":2}],"meta":{"revisionId":4}}"#,
        );
        let union = Document::union([one, two]);
        let flags: Vec<_> =
            union.features().iter().map(|f| (&**f.name(), &**f.project())).collect();
        assert_eq!(flags, [("a", "new"), ("b", "default")]);
        assert_eq!(union.segments().iter().map(Segment::id).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(union.revision(), Some(5));
        assert!(union.duplicates().is_empty());
    }

    #[test]
    fn projects_are_read_from_query_of_listing() {
        let of =
            |query: &str| parse_query_projects(format!(r#"{{"features":[]{query}}}"#).as_bytes());
        assert_eq!(of(r#","query":{"projects":["a","b"]}"#), Projects::from_list(["a", "b"]));
        assert_eq!(of(r#","query":{"projects":["*"]}"#), Projects::All);
        assert_eq!(of(r#","query":{"environment":"dev"}"#), Projects::All);
        assert_eq!(of(""), Projects::All);
    }
}
