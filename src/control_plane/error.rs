//! The error of control plane operations. Messages contain no secrets.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use sqlx::migrate::MigrateError;

use super::permissions::MissingPermission;

/// Why an operation failed. Cloneable, because several callers may share one attempt.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The operator lacks a permission.
    #[error(transparent)]
    MissingPermission(#[from] MissingPermission),
    /// The name is in use.
    #[error("the {0} is taken")]
    NameTaken(&'static str),
    /// The operation would remove the last admin.
    #[error("the last admin can be neither deleted nor given another role")]
    LastAdmin,
    /// The maximum number of objects exists.
    #[error("the limit of {limit} {what} is reached")]
    LimitReached {
        /// The kind of object, in the plural.
        what: &'static str,
        /// The maximum number.
        limit: usize,
    },
    /// Too many attempts; the next one is allowed after this time.
    #[error("too many attempts, try again in {} seconds", .0.as_secs().max(1))]
    RateLimited(Duration),
    /// The session of the request has ended, or its account was deleted.
    #[error("the session has ended, sign in again")]
    SessionEnded,
    /// The password is wrong, or there is no such account.
    #[error("the username or the password is wrong")]
    WrongPassword,
    /// The value of a field is invalid.
    #[error("{field}: {reason}")]
    InvalidField {
        /// The field, as the admin API names it.
        field: &'static str,
        /// Why it is invalid.
        reason: String,
    },
    /// No connection to the database was available in time; a retry may succeed.
    #[error("all connections to the control plane's database are in use")]
    Busy,
    /// Another transaction holds a lock that the operation needs; a retry may succeed.
    #[error("the control plane's database is busy")]
    Locked(#[source] Arc<sqlx::Error>),
    /// A newer version of Parapet has migrated the database.
    #[error(
        "the control plane's database was migrated by a newer version of Parapet (its schema has \
         version {found}, this version supports {known})"
    )]
    NewerSchema {
        /// The version of the database's schema.
        found: i64,
        /// The newest supported version.
        known: i64,
    },
    /// The migration of the database failed.
    #[error("the control plane's database cannot be migrated")]
    Migration(#[source] Arc<MigrateError>),
    /// No instance has been started on the database.
    #[error(
        "this database is not initialized: start an instance on it first, which creates the account \
         of an admin"
    )]
    NotInitialized,
    /// The file of the database cannot be opened or created.
    #[error("the control plane's database {} cannot be opened", .0.display())]
    File(PathBuf, #[source] Arc<io::Error>),
    /// The file of the database was deleted or replaced while it was open; further writes to it would be
    /// lost.
    #[error(
        "the control plane's database {} was deleted or replaced while Parapet runs; restore it \
         or restart Parapet", .0.display()
    )]
    FileReplaced(PathBuf),
    /// The database does not respond, or no connection can be opened.
    #[error("the control plane's database cannot be reached")]
    Unreachable(#[source] Arc<sqlx::Error>),
    /// The database reported an error.
    #[error("the control plane's database failed")]
    Database(#[source] Arc<sqlx::Error>),
}

impl Error {
    /// A field with an invalid value.
    pub(super) fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::InvalidField { field, reason: reason.into() }
    }

    /// A database file that cannot be opened or created.
    pub(super) fn file(path: &Path, error: io::Error) -> Self {
        Self::File(path.to_owned(), Arc::new(error))
    }

    /// A server that cannot be connected to.
    pub(super) fn unreachable(error: sqlx::Error) -> Self {
        Self::Unreachable(Arc::new(error))
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        /// SQLite: another connection writes or recovers the file (the primary code and its extended
        /// codes). PostgreSQL: timeout of a lock or a statement.
        const BUSY: [&str; 6] = ["5", "261", "517", "773", "55P03", "57014"];
        match &error {
            sqlx::Error::Database(database)
                if database.code().is_some_and(|code| BUSY.contains(&&*code)) =>
            {
                Self::Locked(Arc::new(error))
            }
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::WorkerCrashed => Self::unreachable(error),
            _ => Self::Database(Arc::new(error)),
        }
    }
}
