//! Logs the beginning and the end of a time in which a remote store cannot be used.
//!
//! Such a failure concerns every record and every caller at once; each reports the other failures. A
//! server that is full, or a replica, still answers reads. An outage that a write has noticed therefore
//! lasts until a write succeeds.

use std::sync::{Mutex, PoisonError};

use tracing::{info, warn};

use super::store_trait::Error;
use crate::telemetry::error_chain;

/// Whether the store can be used.
#[derive(Debug, Default)]
pub(super) struct OutageLog {
    /// What the current outage prevents.
    outage: Mutex<Option<Access>>,
}

/// A kind of operation on a store. An outage of reads is one of writes, too.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Access {
    Read,
    Write,
}

impl OutageLog {
    /// Records the result of an operation on the store at `location`, and returns it.
    pub(super) fn record<T>(
        &self,
        location: &str,
        access: Access,
        result: Result<T, Error>,
    ) -> Result<T, Error> {
        let mut outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        match &result {
            Err(error @ Error::Unavailable { .. }) => {
                if outage.is_none() {
                    warn!(
                        store = location,
                        error = error_chain(error),
                        "The store is unavailable: flags are served from memory, and saves are retried"
                    );
                }
                *outage = (*outage).max(Some(access));
            }
            // A damaged record still shows that the store responds.
            Ok(_) | Err(_) => {
                if outage.is_some_and(|prevented| prevented <= access) {
                    *outage = None;
                    info!(store = location, "The store is available again");
                }
            }
        }
        drop(outage);
        result
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn outage_of_writes_outlasts_successful_reads() {
        let (log, error) = (OutageLog::default(), || Error::Unavailable {
            store: "redis://here".to_owned(),
            source: io::Error::other("OOM"),
        });
        let is_out = |log: &OutageLog| log.outage.lock().expect("lock").is_some();
        let record = |access, result| drop(log.record("redis://here", access, result));
        for (access, result, is_out_then) in [
            (Access::Read, Ok(()), false),
            (Access::Read, Err(error()), true),
            (Access::Read, Ok(()), false),
            (Access::Read, Err(error()), true),
            (Access::Write, Err(error()), true),
            (Access::Read, Ok(()), true),
            (Access::Write, Ok(()), false),
        ] {
            record(access, result);
            assert_eq!(is_out(&log), is_out_then);
        }
    }
}
