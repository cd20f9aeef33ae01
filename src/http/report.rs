//! What SDKs and other edges report: applications and counts, taken in and answered at once.

use jiff::Timestamp;

use super::reply::{self, Failure, Reply};
use crate::{
    token::{Grant, TokenKind},
    usage::Usage,
    wire::usage::{Application, Bulk, ClientMetrics, EdgeInstance, ParseError, SdkKind},
};

/// An SDK that starts.
pub fn register(usage: &Usage, grant: &Grant, body: &[u8]) -> Result<Reply, Failure> {
    let application = Application::parse(body)?;
    usage.record_registration(&grant.scope, kind(grant), application, Timestamp::now());
    Ok(reply::accepted())
}

/// What one SDK counted.
pub fn metrics(usage: &Usage, grant: &Grant, body: &[u8]) -> Result<Reply, Failure> {
    let report = ClientMetrics::parse(body)?;
    usage.record_metrics(&grant.scope, kind(grant), report, Timestamp::now());
    Ok(reply::accepted())
}

/// What another edge has gathered.
pub fn bulk(usage: &Usage, grant: &Grant, body: &[u8]) -> Result<Reply, Failure> {
    let bulk = Bulk::parse(body)?;
    usage.record_bulk(&grant.scope, kind(grant), bulk, Timestamp::now());
    Ok(reply::accepted())
}

/// How another edge is doing.
pub fn instance(usage: &Usage, body: &[u8]) -> Result<Reply, Failure> {
    usage.record_edge_instance(&EdgeInstance::parse(body)?, Timestamp::now());
    Ok(reply::accepted())
}

fn kind(grant: &Grant) -> SdkKind {
    match grant.kind {
        TokenKind::Frontend => SdkKind::Frontend,
        TokenKind::Admin | TokenKind::Client => SdkKind::Backend,
    }
}

impl From<ParseError> for Failure {
    fn from(error: ParseError) -> Self {
        Self::Malformed(error.to_string())
    }
}
