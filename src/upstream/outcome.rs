//! What requests are made for and how they end, for the metrics and for `/status`.
//!
//! Labels come from these enums only, never from what upstream sends.

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
use crate::telemetry::{self, Sparing};

const REQUESTS: &str = "parapet_upstream_requests_total";
const DURATION: &str = "parapet_upstream_request_duration_seconds";
const STREAMS: &str = "parapet_upstream_streams";

/// What a request is made for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
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

impl Purpose {
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

/// How a request ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Outcome {
    Ok,
    NotModified,
    NotOffered,
    Unauthorized,
    Rejected,
    Throttled,
    Failed,
    Malformed,
    Redirected,
    Timeout,
    Unreachable,
    Interrupted,
    Unsent,
}

impl Outcome {
    /// How `result` ended, whose answer had this status if there was one.
    pub(super) fn of<T>(status: Option<StatusCode>, result: &Result<T, Error>) -> Self {
        match result {
            Ok(_) if status == Some(StatusCode::NOT_MODIFIED) => Self::NotModified,
            Ok(_) => Self::Ok,
            Err(Error::Unreachable(_)) => Self::Unreachable,
            Err(Error::Interrupted(_)) => Self::Interrupted,
            Err(Error::Timeout(_) | Error::Silent(_)) => Self::Timeout,
            Err(Error::Redirect { .. }) => Self::Redirected,
            Err(Error::Status { status, .. }) => match *status {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Self::Unauthorized,
                StatusCode::TOO_MANY_REQUESTS => Self::Throttled,
                status if status.is_client_error() => Self::Rejected,
                _ => Self::Failed,
            },
            Err(Error::Unconditional | Error::TooLarge { .. } | Error::Decode { .. }) => {
                Self::Malformed
            }
            Err(
                Error::Scheme
                | Error::File { .. }
                | Error::Pem { .. }
                | Error::Identity(_)
                | Error::Header(_)
                | Error::Setup(_),
            ) => Self::Unsent,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::NotModified => "not_modified",
            Self::NotOffered => "not_offered",
            Self::Unauthorized => "unauthorized",
            Self::Rejected => "rejected",
            Self::Throttled => "throttled",
            Self::Failed => "failed",
            Self::Malformed => "malformed",
            Self::Redirected => "redirected",
            Self::Timeout => "timeout",
            Self::Unreachable => "unreachable",
            Self::Interrupted => "interrupted",
            Self::Unsent => "unsent",
        }
    }
}

/// Tells the metric registry what the metrics of this module mean.
pub(super) fn describe() {
    describe_counter!(REQUESTS, "Requests to upstream by purpose and outcome.");
    describe_histogram!(DURATION, Unit::Seconds, "Duration of requests to upstream by purpose.");
    describe_gauge!(STREAMS, "Streams on which upstream tells changes.");
}

/// Counts a finished request.
pub(super) fn count(purpose: Purpose, outcome: Outcome, took: Duration) {
    let (purpose, outcome) = (purpose.as_str(), outcome.as_str());
    counter!(REQUESTS, "purpose" => purpose, "outcome" => outcome).increment(1);
    histogram!(DURATION, "purpose" => purpose).record(took);
}

/// How upstream has been doing, as seen from here.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Health {
    /// When a request last succeeded.
    pub last_success: Option<Timestamp>,
    /// When a request last failed, and how.
    pub last_error: Option<(Timestamp, String)>,
    /// How many requests in a row have failed by upstream's fault; a refusal is an answer.
    pub consecutive_failures: u64,
    /// On how many streams it tells what changes.
    pub streams: usize,
}

/// The [`Health`] that requests keep current.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    health: Mutex<Health>,
    outage: Mutex<Outage>,
}

/// Why there is no connection to upstream, as far as it is logged.
#[derive(Debug, Default)]
struct Outage {
    /// The last reason since the last success.
    reason: Option<String>,
    changes: Sparing,
}

impl Outage {
    /// Notes a reason, and logs it where it is another one. The first is logged by whoever made the
    /// request, and is all that is: a certificate that is refused after a refused connection would
    /// never show.
    fn note(&mut self, reason: &str) {
        let before = self.reason.replace(reason.to_owned());
        if before.is_some_and(|before| before != reason) && self.changes.admit().is_some() {
            warn!(error = reason, "Upstream is unreachable for another reason than before");
        }
    }
}

impl Pulse {
    /// Takes note of how a request ended.
    pub(super) fn feel<T>(&self, result: &Result<T, Error>) {
        match result {
            Ok(_) => self.beat(),
            Err(error) => self.miss(error),
        }
    }

    /// Takes note of a sign of life.
    pub(super) fn beat(&self) {
        lock(&self.outage).reason = None;
        let mut health = self.lock();
        health.last_success = Some(Timestamp::now());
        health.consecutive_failures = 0;
    }

    /// Takes note of a failure.
    pub(super) fn miss(&self, error: &Error) {
        let report = telemetry::report(error);
        if matches!(error, Error::Unreachable(_)) {
            lock(&self.outage).note(&report);
        }
        let mut health = self.lock();
        health.last_error = Some((Timestamp::now(), report));
        match error.fault() {
            Fault::Upstream => health.consecutive_failures += 1,
            Fault::Credentials | Fault::Ours => health.consecutive_failures = 0,
        }
    }

    /// Takes note of a stream more.
    pub(super) fn opened(&self) {
        self.lock().streams += 1;
        gauge!(STREAMS).increment(1);
    }

    /// Takes note of a stream less.
    pub(super) fn closed(&self) {
        self.lock().streams -= 1;
        gauge!(STREAMS).decrement(1);
    }

    /// How upstream is doing.
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
