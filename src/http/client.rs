//! The API of server SDKs: flag configuration as it is.

use std::sync::Arc;

use hyper::HeaderMap;
use percent_encoding::percent_decode_str;
use semver::Version;

use super::reply::{self, Failure, Freshness, Reply};
use crate::{
    snapshot::{Filter, Segments, Snapshot, body::Body},
    token::{Project, Scope},
};

/// `/api/client/features`: everything that the token sees and the query leaves.
pub async fn features(
    headers: &HeaderMap,
    query: &str,
    snapshot: &Snapshot,
    scope: &Scope,
) -> Result<Reply, Failure> {
    let body = snapshot.listing(&scope.projects, filter(query)?, segments(headers));
    Ok(reply::body(headers, &body, Freshness::Unsaid).await)
}

/// `/api/client/features/{name}`: one flag, if the token sees it.
pub async fn feature(
    headers: &HeaderMap,
    name: &str,
    snapshot: &Snapshot,
    scope: &Scope,
) -> Result<Reply, Failure> {
    let name = decoded(name)?;
    let feature = snapshot.document().feature(&name).ok_or(Failure::NotFound)?;
    if !scope.projects.contains(feature.project()) {
        return Err(Failure::NotFound);
    }
    let text = match segments(headers) {
        Segments::Separate => feature.raw().to_owned(),
        Segments::Inlined => feature.inlined(snapshot.document().segments()),
    };
    Ok(reply::body(headers, &Arc::new(Body::new(text.into())), Freshness::Unsaid).await)
}

/// A flag's name as it stands in a path.
pub fn decoded(name: &str) -> Result<std::borrow::Cow<'_, str>, Failure> {
    let malformed = |_| Failure::Malformed("the flag's name is not UTF-8".to_owned());
    percent_decode_str(name).decode_utf8().map_err(malformed)
}

/// The longest name prefix and the most projects that a query may tell.
const MAX_PREFIX: usize = 255;
const MAX_PROJECTS: usize = 500;

fn filter(query: &str) -> Result<Filter, Failure> {
    let mut filter = Filter::default();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*name {
            "namePrefix" if value.len() > MAX_PREFIX => {
                let text = format!("namePrefix is longer than {MAX_PREFIX} bytes");
                return Err(Failure::Malformed(text));
            }
            "namePrefix" if !value.is_empty() => filter.name_prefix = Some(value.into()),
            "project" | "project[]" if filter.projects.len() >= MAX_PROJECTS => {
                return Err(Failure::Malformed(format!("more than {MAX_PROJECTS} projects")));
            }
            "project" | "project[]" if !value.is_empty() => {
                filter.projects.insert(Project::new(&value));
            }
            _ => {}
        }
    }
    if filter.projects.contains("*") {
        filter.projects.clear();
    }
    Ok(filter)
}

/// The first client specification whose SDKs resolve segments themselves.
const KNOWS_SEGMENTS: Version = Version::new(4, 2, 0);

/// How the SDK wants its segments; one that names no specification is older than all that do.
fn segments(headers: &HeaderMap) -> Segments {
    let version = headers.get("unleash-client-spec").and_then(|value| value.to_str().ok());
    match version.and_then(|text| Version::parse(text.trim()).ok()) {
        Some(version) if version >= KNOWS_SEGMENTS => Segments::Separate,
        _ => Segments::Inlined,
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    #[test]
    fn a_query_becomes_a_filter_and_a_hostile_one_is_refused() {
        let parsed = filter("namePrefix=a%2F&project=x&project=y&other=z").unwrap();
        assert_eq!(parsed.name_prefix.as_deref(), Some("a/"));
        assert_eq!(parsed.projects, ["x", "y"].map(Project::new).into());
        assert_eq!(filter("project=*&namePrefix=").unwrap(), Filter::default());
        assert!(filter(&format!("namePrefix={}", "x".repeat(300))).is_err());
    }

    #[test]
    fn segments_are_written_out_for_sdks_before_specification_4_2_0() {
        let check = |version: Option<&'static str>, expect| {
            let mut headers = HeaderMap::new();
            if let Some(version) = version {
                headers.insert("unleash-client-spec", HeaderValue::from_static(version));
            }
            assert_eq!(segments(&headers), expect, "{version:?}");
        };
        check(Some("5.2.0"), Segments::Separate);
        check(Some("4.2.0"), Segments::Separate);
        check(Some("4.1.9"), Segments::Inlined);
        check(Some("new"), Segments::Inlined);
        check(None, Segments::Inlined);
    }
}
