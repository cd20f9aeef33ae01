//! Logs the beginning and the end of a time in which a remote store cannot be reached.
//!
//! Such a failure concerns every record and every caller at once; each reports the other failures.

use std::sync::atomic::{AtomicBool, Ordering};

use tracing::{info, warn};

use super::store_trait::Error;
use crate::telemetry::error_chain;

/// Whether the store was unavailable at the last operation.
#[derive(Debug, Default)]
pub(super) struct OutageLog {
    is_out: AtomicBool,
}

impl OutageLog {
    /// Records the result of an operation on the store at `location`, and returns it.
    pub(super) fn record<T>(&self, location: &str, result: Result<T, Error>) -> Result<T, Error> {
        match &result {
            Err(error @ Error::Unavailable { .. }) => {
                if !self.is_out.swap(true, Ordering::Relaxed) {
                    warn!(
                        store = location,
                        error = error_chain(error),
                        "The store is unavailable: flags are served from memory, and saves are retried"
                    );
                }
            }
            // A damaged or rejected record still shows that the store responds.
            Ok(_) | Err(_) => {
                if self.is_out.swap(false, Ordering::Relaxed) {
                    info!(store = location, "The store is available again");
                }
            }
        }
        result
    }
}
