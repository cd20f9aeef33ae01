//! The health of upstream, as seen by the requests of this instance.
//!
//! It decides nothing: `/status` shows it.

use std::sync::{Mutex, MutexGuard};

use jiff::Timestamp;
use metrics::{describe_gauge, gauge};
use tracing::warn;

use super::error::{Error, Fault};
use crate::telemetry::{self, LogLimiter};

const STREAMS: &str = "parapet_upstream_streams";

/// Describes the metrics of this module.
pub(super) fn describe_metrics() {
    describe_gauge!(STREAMS, "Open event streams from upstream.");
}

/// The health of upstream, as seen by this instance.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct UpstreamHealth {
    /// When a request last succeeded.
    pub last_success: Option<Timestamp>,
    /// When a request last failed, with its error.
    pub last_error: Option<(Timestamp, String)>,
    /// Consecutive requests that failed by upstream's fault. A refusal (401, 403) is not such a failure.
    pub consecutive_failures: u64,
    /// The number of open event streams.
    pub streams: usize,
}

/// Tracks [`UpstreamHealth`] from the results of requests.
#[derive(Debug, Default)]
pub(super) struct HealthTracker {
    health: Mutex<UpstreamHealth>,
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
    pub(super) fn health(&self) -> UpstreamHealth {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, UpstreamHealth> {
        lock(&self.health)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it holds this lock")
}
