//! Metrics of requests to upstream: their operations and outcomes.
//!
//! Labels come only from these enums, never from data that upstream sends.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_histogram, histogram};
use reqwest::StatusCode;

use super::error::Error;

const REQUESTS: &str = "parapet_upstream_requests_total";
const DURATION: &str = "parapet_upstream_request_duration_seconds";

/// The operation of a request; a metrics label.
#[derive(Clone, Copy, Debug)]
pub(super) enum UpstreamOperation {
    Features,
    Stream,
    Validate,
    Probe,
    Usage,
    Environments,
    EventLog,
    ListTokens,
    CreateToken,
    DeleteToken,
    Relay,
}

impl UpstreamOperation {
    fn as_str(self) -> &'static str {
        match self {
            Self::Features => "features",
            Self::Stream => "stream",
            Self::Validate => "validate",
            Self::Probe => "probe",
            Self::Usage => "usage",
            Self::Environments => "environments",
            Self::EventLog => "event_log",
            Self::ListTokens => "list_tokens",
            Self::CreateToken => "create_token",
            Self::DeleteToken => "delete_token",
            Self::Relay => "relay",
        }
    }
}

/// The outcome of a request; a metrics label.
#[derive(Clone, Copy, Debug)]
pub(super) enum RequestOutcome {
    Ok,
    NotModified,
    NotSupported,
    Unauthorized,
    Rejected,
    Throttled,
    Failed,
    Malformed,
    Redirected,
    Timeout,
    Unreachable,
    Interrupted,
    NotSent,
}

impl RequestOutcome {
    /// Classifies a `result`; `status` is that of the response, if there was one.
    pub(super) fn from_result<T>(status: Option<StatusCode>, result: &Result<T, Error>) -> Self {
        match result {
            Ok(_) if status == Some(StatusCode::NOT_MODIFIED) => Self::NotModified,
            Ok(_) => Self::Ok,
            Err(Error::Unreachable(_)) => Self::Unreachable,
            Err(Error::Interrupted(_)) => Self::Interrupted,
            Err(Error::Timeout(_) | Error::StreamTimeout(_)) => Self::Timeout,
            Err(Error::Redirect { .. }) => Self::Redirected,
            Err(Error::Status { status, .. }) => match *status {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Self::Unauthorized,
                StatusCode::TOO_MANY_REQUESTS => Self::Throttled,
                status if status.is_client_error() => Self::Rejected,
                _ => Self::Failed,
            },
            Err(Error::UnexpectedNotModified | Error::TooLarge { .. } | Error::Decode { .. }) => {
                Self::Malformed
            }
            Err(
                Error::InvalidScheme
                | Error::File { .. }
                | Error::Pem { .. }
                | Error::ClientCertificate(_)
                | Error::InvalidHeader(_)
                | Error::Setup(_),
            ) => Self::NotSent,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::NotModified => "not_modified",
            Self::NotSupported => "not_offered",
            Self::Unauthorized => "unauthorized",
            Self::Rejected => "rejected",
            Self::Throttled => "throttled",
            Self::Failed => "failed",
            Self::Malformed => "malformed",
            Self::Redirected => "redirected",
            Self::Timeout => "timeout",
            Self::Unreachable => "unreachable",
            Self::Interrupted => "interrupted",
            Self::NotSent => "unsent",
        }
    }
}

/// Describes the metrics of this module.
pub(super) fn describe_metrics() {
    describe_counter!(REQUESTS, "Requests to upstream by purpose and outcome.");
    describe_histogram!(DURATION, Unit::Seconds, "Duration of requests to upstream by purpose.");
}

/// Records a finished request in the metrics.
pub(super) fn record(purpose: UpstreamOperation, outcome: RequestOutcome, took: Duration) {
    let (purpose, outcome) = (purpose.as_str(), outcome.as_str());
    counter!(REQUESTS, "purpose" => purpose, "outcome" => outcome).increment(1);
    histogram!(DURATION, "purpose" => purpose).record(took);
}
