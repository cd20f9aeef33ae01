//! The client API, for server SDKs: flag configuration as Unleash sent it. It evaluates nothing.

mod delta_events;

use std::sync::Arc;

use hyper::{
    HeaderMap,
    header::{HeaderName, HeaderValue, IF_NONE_MATCH},
};
use percent_encoding::percent_decode_str;
use semver::Version;

pub use self::delta_events::DeltaEvents;
use super::{
    authorizer::{AuthorizedRead, RoutedRequest},
    response::{self, CachePolicy, HttpError, HttpResponse},
};
use crate::{
    changes::{ChangeFeed, SubscriptionKey, UpdateKind},
    protocol::delta::EventId,
    snapshot::{Filter, SegmentFormat, prepared_body::PreparedBody},
    token::{Project, Scope},
};

/// `/api/client/features`: the flags in the token's scope that match the query.
pub fn features(
    request: &RoutedRequest<'_>,
    read: &AuthorizedRead,
) -> Result<Arc<PreparedBody>, HttpError> {
    let (filter, format) = (parse_filter(request.query)?, segment_format(request.headers));
    Ok(read.snapshot.client_features(&read.grant.scope.projects, filter, format))
}

/// `/api/client/features/{name}`: one flag, if it is in the token's scope.
pub async fn feature(
    request: &RoutedRequest<'_>,
    read: &AuthorizedRead,
) -> Result<HttpResponse, HttpError> {
    let (name, document) = (decode_flag_name(request.parameter)?, read.snapshot.document());
    let feature = document.feature(&name).ok_or(HttpError::NotFound)?;
    if !read.grant.scope.projects.contains(feature.project()) {
        return Err(HttpError::NotFound);
    }
    let text = match segment_format(request.headers) {
        SegmentFormat::Separate => feature.raw().to_owned(),
        SegmentFormat::Inlined => feature.with_inlined_segments(document.segments()),
    };
    let body = Arc::new(PreparedBody::new(text.into()));
    Ok(response::negotiate_body(request.headers, &body, CachePolicy::Unspecified).await)
}

/// The subscription of a client that follows changes: its scope and the filter of its query.
pub fn subscription_key(
    request: &RoutedRequest<'_>,
    read: &AuthorizedRead,
) -> Result<SubscriptionKey, HttpError> {
    let Scope { environment, projects } = read.grant.scope.clone();
    Ok(SubscriptionKey::new(environment, projects, parse_filter(request.query)?))
}

/// `/api/client/delta`: the changes since the state in `If-None-Match`, or all flags if that state is
/// missing or not in the history.
pub async fn delta(
    headers: &HeaderMap,
    key: SubscriptionKey,
    feed: &ChangeFeed,
) -> Result<HttpResponse, HttpError> {
    let update = feed
        .update_since(&Arc::new(key), parse_state_id(headers.get(IF_NONE_MATCH)))
        .ok_or(HttpError::FLAGS_NOT_FETCHED)?;
    Ok(match update.kind() {
        UpdateKind::Unchanged => response::delta_not_modified(update.event_id()),
        UpdateKind::Delta | UpdateKind::Snapshot => {
            response::delta(headers, update.body(), update.event_id()).await
        }
    })
}

/// Parses a state id, either bare or as an entity tag.
pub fn parse_state_id(value: Option<&HeaderValue>) -> Option<EventId> {
    let text = value?.to_str().ok()?.trim();
    let opaque = text.strip_prefix("W/").unwrap_or(text).trim_matches('"');
    opaque.parse().ok()
}

/// Percent-decodes a flag name from a path.
pub fn decode_flag_name(name: &str) -> Result<std::borrow::Cow<'_, str>, HttpError> {
    let malformed = |_| HttpError::Malformed("the flag's name is not UTF-8".to_owned());
    percent_decode_str(name).decode_utf8().map_err(malformed)
}

/// The longest `namePrefix` in a query, in bytes.
const MAX_PREFIX: usize = 255;
/// The most `project` parameters in a query.
const MAX_PROJECTS: usize = 500;

/// Parses the filter that a query adds to the token's scope.
pub fn parse_filter(query: &str) -> Result<Filter, HttpError> {
    let mut filter = Filter::default();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*name {
            "namePrefix" if value.len() > MAX_PREFIX => {
                let text = format!("namePrefix is longer than {MAX_PREFIX} bytes");
                return Err(HttpError::Malformed(text));
            }
            "namePrefix" if !value.is_empty() => filter.name_prefix = Some(value.into()),
            "project" | "project[]" if filter.projects.len() >= MAX_PROJECTS => {
                return Err(HttpError::Malformed(format!("more than {MAX_PROJECTS} projects")));
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
const MIN_SPEC_FOR_SEGMENTS: Version = Version::new(4, 2, 0);

/// The header with the version of the client specification that an SDK implements.
const CLIENT_SPEC: HeaderName = HeaderName::from_static("unleash-client-spec");

/// The segment format for the SDK. An SDK that sends no specification version predates segments.
fn segment_format(headers: &HeaderMap) -> SegmentFormat {
    let Some(version) = headers.get(CLIENT_SPEC) else { return SegmentFormat::Inlined };
    // Fast path: the common `d.d.d` is compared without a semver parser.
    if let [major @ b'0'..=b'9', b'.', minor @ b'0'..=b'9', b'.', b'0'..=b'9'] = *version.as_bytes()
    {
        return if (major, minor) >= (b'4', b'2') {
            SegmentFormat::Separate
        } else {
            SegmentFormat::Inlined
        };
    }
    match version.to_str().ok().and_then(|text| Version::parse(text.trim()).ok()) {
        Some(version) if version >= MIN_SPEC_FOR_SEGMENTS => SegmentFormat::Separate,
        _ => SegmentFormat::Inlined,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_is_parsed_to_a_filter_and_an_oversized_one_is_rejected() {
        let parsed = parse_filter("namePrefix=a%2F&project=x&project=y&other=z").unwrap();
        assert_eq!(parsed.name_prefix.as_deref(), Some("a/"));
        assert_eq!(parsed.projects, ["x", "y"].map(Project::new).into());
        assert_eq!(parse_filter("project=*&namePrefix=").unwrap(), Filter::default());
        assert!(parse_filter(&format!("namePrefix={}", "x".repeat(300))).is_err());
    }

    #[test]
    fn state_id_is_parsed_from_an_entity_tag_or_a_number() {
        let check = |text: &'static str, expect| {
            assert_eq!(parse_state_id(Some(&HeaderValue::from_static(text))), expect, "{text}");
        };
        check("\"17\"", Some(17));
        check("W/\"17\"", Some(17));
        check(" 17 ", Some(17));
        check("\"\"", None);
        check("17a", None);
        check("-1", None);
        check("4294967296", None);
        assert_eq!(parse_state_id(None), None);
    }

    #[test]
    fn segments_are_inlined_for_sdks_before_specification_4_2_0() {
        let check = |version: Option<&'static str>, expect| {
            let mut headers = HeaderMap::new();
            if let Some(version) = version {
                headers.insert("unleash-client-spec", HeaderValue::from_static(version));
            }
            assert_eq!(segment_format(&headers), expect, "{version:?}");
        };
        check(Some("5.2.0"), SegmentFormat::Separate);
        check(Some("4.2.0"), SegmentFormat::Separate);
        check(Some("4.1.9"), SegmentFormat::Inlined);
        check(Some("3.9.0"), SegmentFormat::Inlined);
        check(Some("10.0.0"), SegmentFormat::Separate);
        check(Some("4.10.0"), SegmentFormat::Separate);
        check(Some("4.2.0-beta"), SegmentFormat::Inlined);
        check(Some(" 5.2.0"), SegmentFormat::Separate);
        check(Some("5.2"), SegmentFormat::Inlined);
        check(Some("new"), SegmentFormat::Inlined);
        check(None, SegmentFormat::Inlined);
    }
}
