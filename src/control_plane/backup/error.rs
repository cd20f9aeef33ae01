//! The error of a backup or a restore.

use std::{io, path::PathBuf};

use crate::control_plane::error::Error;

/// Why a backup or a restore failed.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The database failed.
    #[error(transparent)]
    Database(#[from] Error),
    /// The file exists already.
    #[error("{} exists already; use --force to replace it", .0.display())]
    Exists(PathBuf),
    /// The file cannot be written.
    #[error("{} cannot be written", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not a backup, or is incomplete or modified.
    #[error("{} is not a backup, or is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The defect.
        reason: &'static str,
    },
    /// A later version of Parapet has written the file.
    #[error("{} was written by a later version of Parapet", .0.display())]
    Newer(PathBuf),
    /// The database is not empty.
    #[error("the database is not empty; use --force to delete its contents and end all sessions")]
    NotEmpty,
}

impl From<sqlx::Error> for BackupError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error.into())
    }
}
