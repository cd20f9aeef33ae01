//! Operations and outcomes of upstream requests, for metrics and `/status`.
//!
//! Labels come only from these enums, never from data that upstream sends.

use std::{
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use jiff::Timestamp;
use metrics::{
    Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use reqwest::StatusCode;
use tracing::warn;

use super::error::{Error, Fault};
use crate::telemetry::{self, LogLimiter};

const REQUESTS: &str = "parapet_upstream_requests_total";
const DURATION: &str = "parapet_upstream_request_duration_seconds";
const STREAMS: &str = "parapet_upstream_streams";

/// The operation of a request; a metrics label.
#[derive(Clone, Copy, Debug)]
pub(super) enum UpstreamOperation {
    Features,
    Stream,
    Validate,
    Probe,
    Usage,
    Environments,
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
pub(super) fn describe() {
    describe_counter!(REQUESTS, "Requests to upstream by purpose and outcome.");
    describe_histogram!(DURATION, Unit::Seconds, "Duration of requests to upstream by purpose.");
    describe_gauge!(STREAMS, "Open event streams from upstream.");
}

/// Records a finished request in the metrics.
pub(super) fn record_request(purpose: UpstreamOperation, outcome: RequestOutcome, took: Duration) {
    let (purpose, outcome) = (purpose.as_str(), outcome.as_str());
    counter!(REQUESTS, "purpose" => purpose, "outcome" => outcome).increment(1);
    histogram!(DURATION, "purpose" => purpose).record(took);
}

/// The health of upstream, as seen by this instance.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Health {
    /// When a request last succeeded.
    pub last_success: Option<Timestamp>,
    /// When a request last failed, with its error.
    pub last_error: Option<(Timestamp, String)>,
    /// Consecutive requests that failed by upstream's fault. A refusal (401, 403) is not such a failure.
    pub consecutive_failures: u64,
    /// The number of open event streams.
    pub streams: usize,
}

/// Tracks [`Health`] from the results of requests.
#[derive(Debug, Default)]
pub(super) struct HealthTracker {
    health: Mutex<Health>,
    outage: Mutex<Outage>,
}

/// Why upstream is unreachable, for the log.
#[derive(Debug, Default)]
struct Outage {
    /// The last reason since the last success.
    reason: Option<String>,
    change_log_limiter: LogLimiter,
}

impl Outage {
    /// Records a reason, and logs it if it differs from the previous one. Callers log only the first
    /// error of an outage. Without this, a rejected certificate after a refused connection would never
    /// be logged.
    fn record_reason(&mut self, reason: &str) {
        let before = self.reason.replace(reason.to_owned());
        if before.is_some_and(|before| before != reason)
            && self.change_log_limiter.admit().is_some()
        {
            warn!(error = reason, "Upstream is unreachable for another reason than before");
        }
    }
}

impl HealthTracker {
    /// Records the result of a request.
    pub(super) fn record<T>(&self, result: &Result<T, Error>) {
        match result {
            Ok(_) => self.record_success(),
            Err(error) => self.record_failure(error),
        }
    }

    /// Records a success or data on a stream.
    pub(super) fn record_success(&self) {
        lock(&self.outage).reason = None;
        let mut health = self.lock();
        health.last_success = Some(Timestamp::now());
        health.consecutive_failures = 0;
    }

    /// Records a failure.
    pub(super) fn record_failure(&self, error: &Error) {
        let report = telemetry::error_chain(error);
        if matches!(error, Error::Unreachable(_)) {
            lock(&self.outage).record_reason(&report);
        }
        let mut health = self.lock();
        health.last_error = Some((Timestamp::now(), report));
        match error.fault() {
            Fault::Upstream => health.consecutive_failures += 1,
            Fault::Credentials | Fault::Local => health.consecutive_failures = 0,
        }
    }

    /// Records an opened stream.
    pub(super) fn stream_opened(&self) {
        self.lock().streams += 1;
        gauge!(STREAMS).increment(1);
    }

    /// Records a closed stream.
    pub(super) fn stream_closed(&self) {
        self.lock().streams -= 1;
        gauge!(STREAMS).decrement(1);
    }

    /// The current health.
    pub(super) fn health(&self) -> Health {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Health> {
        lock(&self.health)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it holds this lock")
}
