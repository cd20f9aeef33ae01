//! Metrics of saves, which all stores that outlive the process record.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_histogram, histogram};

use super::key::RecordKey;

const SAVE_SECONDS: &str = "parapet_store_save_seconds";
const SAVE_FAILURES: &str = "parapet_store_save_failures_total";

/// Registers the descriptions of the metrics.
pub(super) fn describe() {
    describe_histogram!(SAVE_SECONDS, Unit::Seconds, "Duration of saves, by kind of record");
    describe_counter!(SAVE_FAILURES, "Saves that failed or took too long, by kind of record");
}

/// Records a save.
pub(super) fn record(key: &RecordKey, duration: Duration, is_saved: bool) {
    histogram!(SAVE_SECONDS, "record" => key.kind()).record(duration);
    counter!(SAVE_FAILURES, "record" => key.kind()).increment((!is_saved).into());
}
