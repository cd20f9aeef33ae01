//! Receives usage reports of SDKs and other edges: registrations, flag counts and instance data. It only
//! records them; [`usage`](crate::usage) sends them on later.

use std::sync::Arc;

use hyper::HeaderMap;
use jiff::Timestamp;

use super::reply::{self, Failure, Reply};
use crate::{
    usage::{Full, Reporter, Usage},
    wire::usage::{Application, Bulk, ClientMetrics, EdgeInstance, Metadata, ParseError},
};

/// The longest SDK header value that is recorded, in bytes.
const MAX_HEADER: usize = 100;

/// Registers an application.
pub fn register(
    usage: &Usage,
    reporter: &Reporter<'_>,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Reply, Failure> {
    let mut application = Application::parse(body)?;
    complete(&mut application.metadata, headers);
    usage.record_registration(reporter, application)?;
    Ok(reply::accepted())
}

/// Records the flag counts of one SDK.
pub fn metrics(
    usage: &Usage,
    reporter: &Reporter<'_>,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Reply, Failure> {
    let mut report = ClientMetrics::parse(body)?;
    complete(&mut report.metadata, headers);
    usage.record_metrics(reporter, report, Timestamp::now())?;
    Ok(reply::accepted())
}

/// Records the counts and registrations that another edge has collected.
pub fn bulk(usage: &Usage, reporter: &Reporter<'_>, body: &[u8]) -> Result<Reply, Failure> {
    let bulk = Bulk::parse(body)?;
    usage.record_bulk(reporter, bulk, Timestamp::now())?;
    Ok(reply::accepted())
}

/// Records the status of another edge.
pub fn instance(usage: &Usage, reporter: &Reporter<'_>, body: &[u8]) -> Result<Reply, Failure> {
    usage.record_edge_instance(reporter, &EdgeInstance::parse(body)?)?;
    Ok(reply::accepted())
}

/// Completes the metadata from headers: frontend SDKs send it only there.
fn complete(metadata: &mut Metadata, headers: &HeaderMap) {
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(Arc::from);
    let fields = [
        (&mut metadata.sdk_version, "unleash-sdk"),
        (&mut metadata.sdk_flavor, "unleash-sdk-flavor"),
        (&mut metadata.sdk_flavor_version, "unleash-sdk-flavor-version"),
        (&mut metadata.spec_version, "unleash-client-spec"),
    ];
    for (field, name) in fields {
        if field.is_none() {
            *field = header(name).filter(|text: &Arc<str>| text.len() <= MAX_HEADER);
        }
    }
}

impl From<Full> for Failure {
    fn from(full: Full) -> Self {
        Self::UsageFull(full.retry_after)
    }
}

impl From<ParseError> for Failure {
    fn from(error: ParseError) -> Self {
        Self::Malformed(error.to_string())
    }
}
