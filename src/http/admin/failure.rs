//! What the control plane's errors are to whoever asked.

use std::{
    sync::{LazyLock, Mutex, PoisonError},
    time::Duration,
};

use tracing::{debug, error};

use crate::{
    control::Error,
    http::reply::Failure,
    telemetry::{Sparing, report},
    wire::admin::Problem,
};

/// When trying again makes sense where the database does not answer.
const TRY_AGAIN: Duration = Duration::from_secs(5);

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Missing(missing) => Self::Permission(missing),
            Error::Taken(field) => {
                Self::Invalid(vec![Problem { path: field, reason: "is taken".to_owned() }])
            }
            Error::LastAdmin => Self::Denied(error.to_string()),
            Error::Limit { .. } => Self::Malformed(error.to_string()),
            Error::Throttled(pause) => Self::Throttled(pause),
            Error::WrongPassword => Self::WrongPassword,
            Error::SessionEnded => Self::SignIn,
            Error::Invalid { field, reason } => {
                Self::Invalid(vec![Problem { path: field, reason }])
            }
            Error::Replaced(_) => {
                log(&error);
                let what =
                    "the file of the database of accounts and tokens was deleted or replaced";
                Self::Unavailable { what, retry_after: TRY_AGAIN }
            }
            Error::Unreachable(_) => {
                // Whoever follows the tokens has logged why.
                debug!(error = report(&error), "The control plane's database cannot be reached");
                let what = "the database of accounts and tokens cannot be reached";
                Self::Unavailable { what, retry_after: TRY_AGAIN }
            }
            Error::Busy | Error::Locked(_) => {
                log(&error);
                let what = "the database of accounts and tokens is busy";
                Self::Unavailable { what, retry_after: TRY_AGAIN }
            }
            Error::Newer { .. }
            | Error::Migration(_)
            | Error::NotBegun
            | Error::File(..)
            | Error::Database(_) => {
                log(&error);
                let what = "the database of accounts and tokens does not answer";
                Self::Unavailable { what, retry_after: TRY_AGAIN }
            }
        }
    }
}

/// Logs why the database could not be used, once a minute: else whoever polls the admin API fills the
/// log.
fn log(error: &Error) {
    static SPARING: LazyLock<Mutex<Sparing>> = LazyLock::new(Mutex::default);
    let admitted = SPARING.lock().unwrap_or_else(PoisonError::into_inner).admit();
    if let Some(left_out) = admitted {
        let more_since_last_line = (left_out > 0).then_some(left_out);
        let error = report(error);
        error!(error, more_since_last_line, "The control plane cannot use its database");
    }
}
