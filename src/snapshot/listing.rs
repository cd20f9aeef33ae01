//! Flag configuration for server SDKs: the document cut to a scope and a filter.
//!
//! Flags and segments are sent in the very text in which upstream told them.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use serde_json::json;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::body::Body;
use crate::{
    token::{Environment, Project, Projects},
    wire::features::{Document, Feature, Segment},
};

/// What a request narrows its scope to.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Filter {
    /// Only flags whose names begin so.
    pub name_prefix: Option<Box<str>>,
    /// Only flags of these projects, when there are any.
    pub projects: BTreeSet<Project>,
}

impl Filter {
    fn shows(&self, projects: &Projects, feature: &Feature) -> bool {
        let project = feature.project();
        projects.contains(project)
            && (self.projects.is_empty() || self.projects.contains(&**project))
            && self.name_prefix.as_deref().is_none_or(|it| feature.name().starts_with(it))
    }
}

/// How segments are told.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Segments {
    /// Apart, referred to by id: for SDKs whose client specification is 4.2.0 or later.
    Separate,
    /// Written into the constraints of each strategy, for older SDKs.
    Inlined,
}

/// What a listing depends on besides the document.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct ListingKey {
    pub(super) projects: Projects,
    pub(super) filter: Filter,
    pub(super) segments: Segments,
}

/// What `projects` and `filter` leave of a document: their flags, and only the segments that these
/// refer to.
pub fn cut(document: &Document, projects: &Projects, filter: &Filter) -> Document {
    let features = document.features().iter().filter(|it| filter.shows(projects, it)).cloned();
    let features: Vec<_> = features.collect();
    let wanted: BTreeSet<i64> =
        features.iter().flat_map(|feature| feature.segment_ids().iter().copied()).collect();
    let segments = document.segments().iter().filter(|it| wanted.contains(&it.id())).cloned();
    let segments = segments.collect();
    Document::of(features, segments)
}

/// A filtered listing, and how often its snapshot was asked for it; who asked before in the same
/// words and was answered by the listener did not ask the snapshot.
#[derive(Debug)]
pub(super) struct Listing {
    body: Arc<Body>,
    asked: AtomicU64,
}

impl Listing {
    /// A listing that was not asked for yet.
    pub(super) fn of(body: Arc<Body>) -> Arc<Self> {
        Arc::new(Self { body, asked: AtomicU64::new(0) })
    }

    /// The body, for a request, which is counted.
    pub(super) fn body_counted(&self) -> Arc<Body> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Arc::clone(&self.body)
    }

    /// The body, for nobody in particular.
    pub(super) fn body(&self) -> &Arc<Body> {
        &self.body
    }

    /// How often it was asked for.
    pub(super) fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }
}

/// What a listing takes besides its flags and segments, in bytes, if its query is short.
const ENDS: usize = 512;

/// Writes `{"version":2,"features":[…],"segments":[…],"query":{…}}`, flags sorted by name and only
/// the segments that they refer to.
///
/// At the end stands `meta` as from Unleash: the entity tag, a hash of the query, and `revision`. The
/// tag is a hash of all that comes before, so that equal flags have equal tags on every instance,
/// and nothing that is outside the scope changes it.
pub(super) fn build(
    environment: &Environment,
    document: &Document,
    key: &ListingKey,
    revision: u32,
) -> Body {
    let shown = cut(document, &key.projects, &key.filter);
    let features = shown.features().iter().map(|it| it.raw().len() + 1).sum::<usize>();
    let segments = shown.segments().iter().map(|it| it.raw().len() + 1).sum::<usize>();
    // Large texts are not to be moved as they grow.
    let mut text = String::with_capacity(features + segments + ENDS);
    text.push_str(r#"{"version":2,"features":["#);
    match key.segments {
        Segments::Separate => {
            push_list(&mut text, shown.features().iter().map(Feature::raw));
            text.push_str(r#"],"segments":["#);
            push_list(&mut text, shown.segments().iter().map(Segment::raw));
        }
        Segments::Inlined => {
            push_list(&mut text, shown.features().iter().map(|it| it.inlined(shown.segments())));
        }
    }
    text.push_str(r#"],"query":"#);
    let query = query(environment, key);
    text.push_str(&query);
    let hash = xxh3_128(text.as_bytes());
    let etag = format!("\"{hash:032x}\"");
    let query_hash = format!("{:08x}", xxh3_64(query.as_bytes()) >> 32);
    let meta = json!({ "revisionId": revision, "etag": etag, "queryHash": query_hash });
    write!(text, r#","meta":{meta}}}"#).expect("writing to a string cannot fail");
    Body::tagged(text.into_bytes().into_boxed_slice().into(), hash)
}

fn push_list(text: &mut String, items: impl Iterator<Item = impl AsRef<str>>) {
    for (n, item) in items.enumerate() {
        if n > 0 {
            text.push(',');
        }
        text.push_str(item.as_ref());
    }
}

/// What was asked for, as Unleash repeats it.
fn query(environment: &Environment, key: &ListingKey) -> String {
    let Filter { name_prefix, projects } = &key.filter;
    let projects = if projects.is_empty() {
        key.projects.to_list()
    } else {
        projects.iter().map(Project::as_str).collect()
    };
    let mut query = json!({
        "projects": projects,
        "environment": environment.as_str(),
        "inlineSegmentConstraints": key.segments == Segments::Inlined,
    });
    if let Some(prefix) = name_prefix {
        query["namePrefix"] = serde_json::Value::from(&**prefix);
    }
    query.to_string()
}
