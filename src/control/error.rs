//! Why an operation of the control plane failed, without telling any secret.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use sqlx::migrate::MigrateError;

use super::permission::Missing;

/// Why an operation failed; several may wait for the same one.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The operator may not do this.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// Somebody else has this name.
    #[error("the {0} is taken")]
    Taken(&'static str),
    /// Nobody could administer the instance any more.
    #[error("the last admin can be neither deleted nor given another role")]
    LastAdmin,
    /// There are as many as there may be.
    #[error("there may be at most {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How many.
        limit: usize,
    },
    /// Too many attempts; the next may be made after this time.
    #[error("too many attempts, try again in {} seconds", .0.as_secs().max(1))]
    Throttled(Duration),
    /// The session in which the request was made has ended meanwhile, or its account is gone.
    #[error("the session has ended, sign in again")]
    SessionEnded,
    /// The password does not match, or there is no such account.
    #[error("the username or the password is wrong")]
    WrongPassword,
    /// What was given cannot be.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field, as the admin API names it.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// All connections to the database are in use; trying again helps.
    #[error("all connections to the control plane's database are in use")]
    Busy,
    /// Somebody else has what an operation needs; trying again helps.
    #[error("the database of the control plane is busy")]
    Locked(#[source] Arc<sqlx::Error>),
    /// A newer version has written the database.
    #[error(
        "the database of the control plane was written by a newer version of Parapet (its schema \
         has version {found}, this one knows {known})"
    )]
    Newer {
        /// The version of the database.
        found: i64,
        /// The newest version that is known here.
        known: i64,
    },
    /// The database cannot be brought to this version.
    #[error("the database of the control plane cannot be migrated")]
    Migration(#[source] Arc<MigrateError>),
    /// No instance has been started on the database.
    #[error(
        "no instance has been started on this database: the first start makes the account of an \
         admin in it"
    )]
    NotBegun,
    /// The file of the database cannot be opened or made.
    #[error("the control plane's database {} cannot be opened", .0.display())]
    File(PathBuf, #[source] Arc<io::Error>),
    /// The file of the database was deleted or replaced while it was open: what is written to it
    /// would be lost.
    #[error(
        "the control plane's database {} was deleted or replaced while Parapet runs; put it back, \
         or restart Parapet", .0.display()
    )]
    Replaced(PathBuf),
    /// The database does not answer, or cannot be connected to.
    #[error("the control plane's database cannot be reached")]
    Unreachable(#[source] Arc<sqlx::Error>),
    /// The database failed.
    #[error("the database of the control plane failed")]
    Database(#[source] Arc<sqlx::Error>),
}

impl Error {
    /// A field that cannot be as it is.
    pub(super) fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }

    /// The file of a database that cannot be opened or made.
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
        /// SQLite: another connection is writing, or recovers the file (its primary code with those
        /// that extend it). PostgreSQL: a lock is not given, or a statement takes too long.
        const BUSY: [&str; 6] = ["5", "261", "517", "773", "55P03", "57014"];
        match &error {
            sqlx::Error::Database(told)
                if told.code().is_some_and(|code| BUSY.contains(&&*code)) =>
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
