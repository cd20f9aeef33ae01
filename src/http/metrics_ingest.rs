//! Receives usage reports of SDKs and other edges: registrations, flag counts and instance data. It only
//! records them; [`usage`](crate::usage) sends them on later.

use std::sync::Arc;

use hyper::HeaderMap;
use jiff::Timestamp;

use super::response::{self, HttpError, HttpResponse};
use crate::{
    protocol::usage::{
        BulkReport, ClientApplication, ClientMetrics, EdgeInstance, ParseError, SdkMetadata,
    },
    usage::{QuotaExceeded, ReportingClient, Usage},
};

/// The longest SDK header value that is recorded, in bytes.
const MAX_HEADER_BYTES: usize = 100;

/// Registers an application.
pub fn register(
    usage: &Usage,
    reporter: &ReportingClient<'_>,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<HttpResponse, HttpError> {
    let mut application = ClientApplication::parse(body)?;
    complete_from_headers(&mut application.metadata, headers);
    usage.record_registration(reporter, application)?;
    Ok(response::accepted())
}

/// Records the flag counts of one SDK.
pub fn client_metrics(
    usage: &Usage,
    reporter: &ReportingClient<'_>,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<HttpResponse, HttpError> {
    let mut report = ClientMetrics::parse(body)?;
    complete_from_headers(&mut report.metadata, headers);
    usage.record_metrics(reporter, report, Timestamp::now())?;
    Ok(response::accepted())
}

/// Records the counts and registrations that another edge has collected.
pub fn bulk_metrics(
    usage: &Usage,
    reporter: &ReportingClient<'_>,
    body: &[u8],
) -> Result<HttpResponse, HttpError> {
    let bulk = BulkReport::parse(body)?;
    usage.record_bulk(reporter, bulk, Timestamp::now())?;
    Ok(response::accepted())
}

/// Records the status of another edge.
pub fn edge_instance(
    usage: &Usage,
    reporter: &ReportingClient<'_>,
    body: &[u8],
) -> Result<HttpResponse, HttpError> {
    usage.track_downstream_edge(reporter, &EdgeInstance::parse(body)?)?;
    Ok(response::accepted())
}

/// Completes the metadata from headers: frontend SDKs send it only there.
fn complete_from_headers(metadata: &mut SdkMetadata, headers: &HeaderMap) {
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(Arc::from);
    let fields = [
        (&mut metadata.sdk_version, "unleash-sdk"),
        (&mut metadata.sdk_flavor, "unleash-sdk-flavor"),
        (&mut metadata.sdk_flavor_version, "unleash-sdk-flavor-version"),
        (&mut metadata.spec_version, "unleash-client-spec"),
    ];
    for (field, name) in fields {
        if field.is_none() {
            *field = header(name).filter(|text: &Arc<str>| text.len() <= MAX_HEADER_BYTES);
        }
    }
}

impl From<QuotaExceeded> for HttpError {
    fn from(full: QuotaExceeded) -> Self {
        Self::UsageFull(full.retry_after)
    }
}

impl From<ParseError> for HttpError {
    fn from(error: ParseError) -> Self {
        Self::Malformed(error.to_string())
    }
}
