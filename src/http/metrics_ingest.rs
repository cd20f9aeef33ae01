//! Receives usage reports of SDKs and other edges: registrations, flag counts and instance data. It only
//! records them; [`usage`](crate::usage) sends them on later.

use std::sync::Arc;

use hyper::HeaderMap;
use jiff::Timestamp;

use super::{response::HttpError, routes::UsageEndpoint};
use crate::{
    protocol::usage::{
        BATCH_ID_HEADER, BulkReport, ClientApplication, ClientMetrics, EdgeInstance, ParseError,
        SdkMetadata,
    },
    usage::{BatchId, QuotaExceeded, ReportingClient, Usage},
};

/// The longest SDK header value that is recorded, in bytes.
const MAX_HEADER_BYTES: usize = 100;

/// Records a report.
pub fn record(
    endpoint: UsageEndpoint,
    usage: &Usage,
    client: &ReportingClient<'_>,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(), HttpError> {
    match endpoint {
        UsageEndpoint::Registration => {
            let mut application = ClientApplication::parse(body)?;
            complete_from_headers(&mut application.metadata, headers);
            usage.record_registration(client, application)?;
        }
        UsageEndpoint::Metrics => {
            let mut report = ClientMetrics::parse(body)?;
            complete_from_headers(&mut report.metadata, headers);
            usage.record_metrics(client, report, Timestamp::now())?;
        }
        UsageEndpoint::BulkMetrics => {
            let (report, id) = (BulkReport::parse(body)?, batch_id(headers));
            usage.record_bulk(client, report, id, Timestamp::now())?;
        }
        UsageEndpoint::EdgeInstance => {
            usage.track_downstream_edge(client, &EdgeInstance::parse(body)?)?;
        }
    }
    Ok(())
}

/// The id of a bulk report. Only a Parapet sends one; the keys of others are not ids of batches.
fn batch_id(headers: &HeaderMap) -> Option<BatchId> {
    BatchId::parse(headers.get(BATCH_ID_HEADER)?.to_str().ok()?)
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
