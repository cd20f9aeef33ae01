//! Maps errors of the control plane to HTTP errors.

use std::{
    sync::{LazyLock, Mutex, PoisonError},
    time::Duration,
};

use tracing::{debug, error};

use crate::{
    control_plane::Error,
    http::response::HttpError,
    protocol::admin::FieldError,
    telemetry::{LogLimiter, error_chain},
};

/// The `Retry-After` of responses while the database is unavailable.
const RETRY_AFTER: Duration = Duration::from_secs(5);

impl From<Error> for HttpError {
    fn from(error: Error) -> Self {
        match error {
            Error::MissingPermission(missing) => Self::MissingPermission(missing),
            Error::NameTaken(field) => {
                Self::InvalidFields(vec![FieldError { field, reason: "is taken".to_owned() }])
            }
            Error::LastAdmin => Self::OperationDenied(error.to_string()),
            Error::LimitReached { .. } => Self::Malformed(error.to_string()),
            Error::RateLimited(pause) => Self::RateLimited(pause),
            Error::WrongPassword => Self::WrongPassword,
            Error::SessionEnded => Self::SignInRequired,
            Error::InvalidField { field, reason } => {
                Self::InvalidFields(vec![FieldError { field, reason }])
            }
            Error::FileReplaced(_) => {
                log_database_error(&error);
                let what =
                    "the file of the database of accounts and tokens was deleted or replaced";
                Self::Unavailable { what, retry_after: RETRY_AFTER }
            }
            Error::Unreachable(_) => {
                // The task that follows changes of tokens logs the cause.
                debug!(error = error_chain(&error), "The control plane's database is unreachable");
                let what = "the database of accounts and tokens cannot be reached";
                Self::Unavailable { what, retry_after: RETRY_AFTER }
            }
            Error::Busy | Error::Locked(_) => {
                log_database_error(&error);
                let what = "the database of accounts and tokens is busy";
                Self::Unavailable { what, retry_after: RETRY_AFTER }
            }
            Error::NewerSchema { .. }
            | Error::Migration(_)
            | Error::NotInitialized
            | Error::File(..)
            | Error::Database(_) => {
                log_database_error(&error);
                let what = "the database of accounts and tokens failed";
                Self::Unavailable { what, retry_after: RETRY_AFTER }
            }
        }
    }
}

/// Logs a failure of the database, at most once a minute, so that clients which poll the admin API do
/// not fill the log.
fn log_database_error(error: &Error) {
    static SPARING: LazyLock<Mutex<LogLimiter>> = LazyLock::new(Mutex::default);
    let admitted = SPARING.lock().unwrap_or_else(PoisonError::into_inner).admit();
    if let Some(left_out) = admitted {
        let more_since_last_line = (left_out > 0).then_some(left_out);
        let error = error_chain(error);
        error!(
            error,
            more_since_last_line,
            "The control plane's database failed; requests for accounts and tokens get a 503"
        );
    }
}
