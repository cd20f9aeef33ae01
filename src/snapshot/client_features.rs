//! Flag configuration for server SDKs (`/api/client/features`): the document limited to a scope and a
//! filter.
//!
//! Flags and segments are sent byte for byte as upstream sent them.

use std::{collections::BTreeSet, fmt::Write as _};

use serde_json::json;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::prepared_body::PreparedBody;
use crate::{
    protocol::features::{Document, Feature, Segment},
    token::{Environment, Project, Projects},
};

/// The part of its scope that a request selects.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Filter {
    /// Only flags whose names begin with this.
    pub name_prefix: Option<Box<str>>,
    /// Only flags of these projects, unless it is empty.
    pub projects: BTreeSet<Project>,
}

impl Filter {
    fn matches(&self, projects: &Projects, feature: &Feature) -> bool {
        let project = feature.project();
        projects.contains(project)
            && (self.projects.is_empty() || self.projects.contains(&**project))
            && self.name_prefix.as_deref().is_none_or(|it| feature.name().starts_with(it))
    }
}

/// How segments are represented.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum SegmentFormat {
    /// As a list to which strategies refer by id, for SDKs with client specification 4.2.0 or later.
    Separate,
    /// Inlined into the constraints of each strategy, for older SDKs.
    Inlined,
}

/// Everything that a body depends on besides the document.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ClientFeaturesKey {
    /// The projects of the token.
    pub projects: Projects,
    /// The filter of the request.
    pub filter: Filter,
    /// How segments are represented.
    pub segments: SegmentFormat,
}

/// The flags of a document that match `projects` and `filter`, and only the segments that these flags
/// refer to.
pub fn filter_document(document: &Document, projects: &Projects, filter: &Filter) -> Document {
    let features = document.features().iter().filter(|it| filter.matches(projects, it)).cloned();
    let features: Vec<_> = features.collect();
    let segment_ids: BTreeSet<i64> =
        features.iter().flat_map(|feature| feature.segment_ids().iter().copied()).collect();
    let segments = document.segments().iter().filter(|it| segment_ids.contains(&it.id())).cloned();
    let segments = segments.collect();
    Document::from_parts(features, segments)
}

/// Size of a body without its flags and segments, in bytes, if its query is short.
const ENVELOPE_BYTES: usize = 512;

/// Writes `{"version":2,"features":[…],"segments":[…],"query":{…},"meta":{…}}` with flags sorted by
/// name and only the segments that they refer to.
///
/// `meta` has the same fields as from Unleash: the entity tag, a hash of the query, and `revision`. The
/// tag is a hash of everything before `meta`, so that equal flags have equal tags on every instance and
/// changes outside the scope do not change the tag.
pub(super) fn build(
    environment: &Environment,
    document: &Document,
    key: &ClientFeaturesKey,
    revision: u32,
) -> PreparedBody {
    let filtered = filter_document(document, &key.projects, &key.filter);
    let features = filtered.features().iter().map(|it| it.raw().len() + 1).sum::<usize>();
    let segments = filtered.segments().iter().map(|it| it.raw().len() + 1).sum::<usize>();
    // Allocated once, so that a large text is not copied as it grows.
    let mut text = String::with_capacity(features + segments + ENVELOPE_BYTES);
    text.push_str(r#"{"version":2,"features":["#);
    match key.segments {
        SegmentFormat::Separate => {
            push_list(&mut text, filtered.features().iter().map(Feature::raw));
            text.push_str(r#"],"segments":["#);
            push_list(&mut text, filtered.segments().iter().map(Segment::raw));
        }
        SegmentFormat::Inlined => {
            push_list(
                &mut text,
                filtered.features().iter().map(|it| it.with_inlined_segments(filtered.segments())),
            );
        }
    }
    text.push_str(r#"],"query":"#);
    let query = query_json(environment, key);
    text.push_str(&query);
    let hash = xxh3_128(text.as_bytes());
    let etag = format!("\"{hash:032x}\"");
    let query_hash = format!("{:08x}", xxh3_64(query.as_bytes()) >> 32);
    let meta = json!({ "revisionId": revision, "etag": etag, "queryHash": query_hash });
    write!(text, r#","meta":{meta}}}"#).expect("writing to a string cannot fail");
    PreparedBody::with_hash(text.into_bytes().into_boxed_slice().into(), hash)
}

fn push_list(text: &mut String, items: impl Iterator<Item = impl AsRef<str>>) {
    for (n, item) in items.enumerate() {
        if n > 0 {
            text.push(',');
        }
        text.push_str(item.as_ref());
    }
}

/// The `query` of the response, which repeats the request as Unleash does.
fn query_json(environment: &Environment, key: &ClientFeaturesKey) -> String {
    let Filter { name_prefix, projects } = &key.filter;
    let projects = if projects.is_empty() {
        key.projects.to_list()
    } else {
        projects.iter().map(Project::as_str).collect()
    };
    let mut query = json!({
        "projects": projects,
        "environment": environment.as_str(),
        "inlineSegmentConstraints": key.segments == SegmentFormat::Inlined,
    });
    if let Some(prefix) = name_prefix {
        query["namePrefix"] = serde_json::Value::from(&**prefix);
    }
    query.to_string()
}
