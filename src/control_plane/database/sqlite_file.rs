//! The file of SQLite: created with access for its owner only, opened, and checked for replacement.
//!
//! A process can write to a deleted file that it holds open, but the data is lost at a restart. So the
//! identity of the file is compared before and after each change.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use sqlx::{AnyConnection, ConnectOptions as _, Executor as _, any::AnyConnectOptions};
use tokio::fs::{OpenOptions, metadata};
use tracing::info;

use super::{super::error::Error, connection::options_without_logging};
use crate::telemetry::error_chain;

/// The busy timeout is shorter than the statement timeout of this side, so that SQLite's error arrives.
const PRAGMAS: &str = "PRAGMA busy_timeout = 4000; PRAGMA auto_vacuum = FULL; \
     PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;";

/// A database file.
#[derive(Debug)]
pub(super) struct SqliteFile {
    path: PathBuf,
    options: AnyConnectOptions,
    /// The identity of the file when it was opened.
    identity: OnceLock<FileIdentity>,
}

/// The maximum size of a file that is vacuumed at a start, in bytes: this takes about a second.
const MAX_VACUUM_SIZE: i64 = 64 << 20;

impl SqliteFile {
    /// Creates the file if it is missing.
    pub(super) async fn new(path: &Path) -> Result<Self, Error> {
        create_private(path).await.map_err(|error| Error::file(path, error))?;
        let options = options_without_logging(&connection_url(path)?)?;
        Ok(Self { path: path.to_owned(), options, identity: OnceLock::new() })
    }

    /// Opens a connection; retries while another connection locks the file, for at most `patience`.
    pub(super) async fn connect(&self, patience: Duration) -> Result<AnyConnection, Error> {
        /// The pause before a retry.
        const PAUSE: Duration = Duration::from_millis(20);
        let connected = tokio::time::timeout(patience, async {
            loop {
                match self.open().await.map_err(Error::from) {
                    Err(Error::Locked(_)) => tokio::time::sleep(PAUSE).await,
                    connected => return connected,
                }
            }
        });
        connected.await.unwrap_or(Err(Error::Busy))
    }

    /// Enables automatic shrinking of a file that an earlier version has created. This rewrites the file
    /// once and blocks writers, so a file above 64 MiB is left unchanged.
    pub(super) async fn enable_auto_vacuum(&self, connection: &mut AnyConnection) {
        let vacuum = async {
            let mode = sqlx::query_scalar("PRAGMA auto_vacuum");
            let mode: i64 = mode.fetch_one(&mut *connection).await?;
            let size = sqlx::query_scalar(
                "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size",
            );
            let size: i64 = size.fetch_one(&mut *connection).await?;
            if mode == 0 && size <= MAX_VACUUM_SIZE {
                connection.execute("PRAGMA auto_vacuum = FULL; VACUUM").await?;
            }
            Ok::<_, sqlx::Error>(())
        };
        if let Err(error) = vacuum.await {
            let error = error_chain(&error);
            info!(
                error,
                "The control plane's database could not be vacuumed; retrying at the next start"
            );
        }
    }

    async fn open(&self) -> Result<AnyConnection, sqlx::Error> {
        let mut connection = self.options.connect().await?;
        connection.execute(PRAGMAS).await?;
        Ok(connection)
    }

    /// Records the identity of the file; called once it is open.
    pub(super) async fn record_identity(&self) {
        if let Ok(metadata) = metadata(&self.path).await {
            let _ = self.identity.set(file_identity(&metadata));
        }
    }

    /// Fails if the open file is no longer the one at its path.
    pub(super) async fn check_identity(&self) -> Result<(), Error> {
        let Some(known) = self.identity.get() else { return Ok(()) };
        match metadata(&self.path).await {
            Ok(metadata) if file_identity(&metadata) == *known => Ok(()),
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::file(&self.path, error))
            }
            _ => Err(Error::FileReplaced(self.path.clone())),
        }
    }

    /// Fails if the next start would not find the latest commit: the database file was replaced, or its
    /// write-ahead log, which exists while a connection is open, is missing.
    pub(super) async fn check_committed(&self) -> Result<(), Error> {
        let mut log = self.path.clone().into_os_string();
        log.push("-wal");
        match metadata(&log).await {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(Error::FileReplaced(self.path.clone()))
            }
            _ => self.check_identity().await,
        }
    }
}

/// Distinguishes a file from another at the same path: device and inode.
type FileIdentity = (u64, u64);

#[cfg(unix)]
fn file_identity(metadata: &std::fs::Metadata) -> FileIdentity {
    use std::os::unix::fs::MetadataExt as _;
    (metadata.dev(), metadata.ino())
}

/// On other systems an open file cannot be deleted.
#[cfg(not(unix))]
fn file_identity(_: &std::fs::Metadata) -> FileIdentity {
    (0, 0)
}

fn connection_url(path: &Path) -> Result<String, Error> {
    let not_text = || {
        let reason = "its path is not valid UTF-8";
        Error::file(path, std::io::Error::new(ErrorKind::InvalidInput, reason))
    };
    let path = path.to_str().ok_or_else(not_text)?;
    Ok(format!("sqlite:{}?mode=rw", utf8_percent_encode(path, NON_ALPHANUMERIC)))
}

/// Creates the file with access for its owner only; SQLite copies the mode to its auxiliary files.
async fn create_private(path: &Path) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true);
    #[cfg(unix)]
    options.mode(0o600);
    options.open(path).await.map(drop)
}
