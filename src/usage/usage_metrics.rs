//! Metrics of usage reporting: families and the fixed sets of their label values.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};

const REPORTS: &str = "parapet_usage_reports_total";
const REFUSED: &str = "parapet_usage_reports_refused_total";
const REPEATED: &str = "parapet_usage_batches_repeated_total";
const RECEIVED: &str = "parapet_usage_counts_received_total";
const SENT: &str = "parapet_usage_counts_sent_total";
const DROPPED: &str = "parapet_usage_dropped_total";
const ITEMS_DROPPED: &str = "parapet_usage_items_dropped_total";
const BATCHES: &str = "parapet_usage_batches_total";
const PENDING: &str = "parapet_usage_pending";
const PARKED: &str = "parapet_usage_batches_parked";
const OLDEST: &str = "parapet_usage_oldest_pending_seconds";

/// The endpoint that received a report.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum ReportEndpoint {
    Metrics,
    Bulk,
    Register,
    Edge,
}

impl ReportEndpoint {
    fn as_str(self) -> &'static str {
        match self {
            Self::Metrics => "metrics",
            Self::Bulk => "bulk",
            Self::Register => "register",
            Self::Edge => "edge",
        }
    }
}

/// Why evaluations, or other reported items, do not reach upstream.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum DropReason {
    /// Upstream cannot store the flag's name.
    Name,
    /// A counter would exceed the largest number that upstream can store.
    Overflow,
    /// Reported for an environment other than the token's.
    Environment,
    /// Larger than a request may be.
    Size,
    /// Upstream rejected the batch permanently.
    Rejected,
    /// There is no upstream.
    NoUpstream,
}

impl DropReason {
    fn as_str(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Overflow => "overflow",
            Self::Environment => "environment",
            Self::Size => "size",
            Self::Rejected => "rejected",
            Self::NoUpstream => "no_upstream",
        }
    }
}

/// Registers the descriptions of the metrics.
pub(super) fn describe_metrics() {
    describe_counter!(REPORTS, "Usage reports, by endpoint.");
    describe_counter!(REFUSED, "Usage reports rejected (429) over quota, by endpoint.");
    describe_counter!(REPEATED, "Batches of other edges that had been counted already.");
    describe_counter!(RECEIVED, "Flag evaluations that were reported.");
    describe_counter!(SENT, "Flag evaluations that upstream accepted.");
    describe_counter!(DROPPED, "Flag evaluations that were dropped, by reason.");
    describe_counter!(ITEMS_DROPPED, "Other reported items that were dropped, by kind.");
    describe_counter!(BATCHES, "Attempts to send a batch of usage, by outcome.");
    describe_gauge!(PENDING, "Counters that are waiting to be sent.");
    describe_gauge!(PARKED, "Batches that the leader of the fleet has and has not sent yet.");
    describe_gauge!(
        OLDEST,
        Unit::Seconds,
        "Time since the end of its interval of the oldest usage that is waiting to be sent."
    );
}

pub(super) fn count_report(endpoint: ReportEndpoint) {
    counter!(REPORTS, "endpoint" => endpoint.as_str()).increment(1);
}

pub(super) fn count_refused_report(endpoint: ReportEndpoint) {
    counter!(REFUSED, "endpoint" => endpoint.as_str()).increment(1);
}

pub(super) fn count_repeated_batch() {
    counter!(REPEATED).increment(1);
}

pub(super) fn count_received(count: u64) {
    counter!(RECEIVED).increment(count);
}

pub(super) fn count_sent(count: u64) {
    counter!(SENT).increment(count);
}

pub(super) fn count_dropped(reason: DropReason, count: u64) {
    if count > 0 {
        counter!(DROPPED, "reason" => reason.as_str()).increment(count);
    }
}

/// Counts registrations, impact samples and unreadable items that were dropped.
pub(super) fn count_dropped_items(item: &'static str, count: usize) {
    if count > 0 {
        counter!(ITEMS_DROPPED, "item" => item).increment(count as u64);
    }
}

/// Counts the impact metrics of a batch whose destination stores none.
pub fn count_unstored_impact_metrics(count: usize) {
    count_dropped_items("impact_metric_not_kept", count);
}

pub(super) fn count_batch(outcome: &'static str) {
    counter!(BATCHES, "outcome" => outcome).increment(1);
}

#[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
pub(super) fn set_pending(counters: usize, parked: usize, oldest: Duration) {
    gauge!(PENDING).set(counters as f64);
    gauge!(PARKED).set(parked as f64);
    gauge!(OLDEST).set(oldest.as_secs_f64());
}
