//! The file of SQLite: made for its owner alone, opened, and watched for being taken away.
//!
//! A process that holds a deleted file open can write to it, and nothing of that is there after a
//! restart. So the file's identity is compared before and after each change.

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

use super::{super::error::Error, connection::quiet};
use crate::telemetry::report;

/// SQLite waits shorter for others that write than this side waits for SQLite.
const SETTINGS: &str = "PRAGMA busy_timeout = 4000; PRAGMA auto_vacuum = FULL; \
     PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;";

/// A file of SQLite.
#[derive(Debug)]
pub(super) struct SqliteFile {
    path: PathBuf,
    options: AnyConnectOptions,
    /// Which file it was when it was opened.
    identity: OnceLock<Identity>,
}

/// The largest file that is written anew at a start, in bytes: a matter of a second.
const LARGEST_REWRITTEN: i64 = 64 << 20;

impl SqliteFile {
    /// Makes the file where it is missing.
    pub(super) async fn new(path: &Path) -> Result<Self, Error> {
        make_private(path).await.map_err(|error| Error::file(path, error))?;
        let options = quiet(&url(path)?)?;
        Ok(Self { path: path.to_owned(), options, identity: OnceLock::new() })
    }

    /// Waits for somebody who is at the file as well.
    pub(super) async fn connect(&self, patience: Duration) -> Result<AnyConnection, Error> {
        /// How long somebody else may take before the file is tried again.
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

    /// Lets a file that an earlier version has made shrink too; once, for it is written anew. A large one
    /// stays as it is: nobody could write meanwhile.
    pub(super) async fn enable_auto_vacuum(&self, connection: &mut AnyConnection) {
        let vacuum = async {
            let mode = sqlx::query_scalar("PRAGMA auto_vacuum");
            let mode: i64 = mode.fetch_one(&mut *connection).await?;
            let size = sqlx::query_scalar(
                "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size",
            );
            let size: i64 = size.fetch_one(&mut *connection).await?;
            if mode == 0 && size <= LARGEST_REWRITTEN {
                connection.execute("PRAGMA auto_vacuum = FULL; VACUUM").await?;
            }
            Ok::<_, sqlx::Error>(())
        };
        if let Err(error) = vacuum.await {
            let error = report(&error);
            info!(error, "The control plane's database stays as large as it is for now");
        }
    }

    async fn open(&self) -> Result<AnyConnection, sqlx::Error> {
        let mut connection = self.options.connect().await?;
        connection.execute(SETTINGS).await?;
        Ok(connection)
    }

    /// Remembers which file it is; called once it is open.
    pub(super) async fn remember(&self) {
        if let Ok(metadata) = metadata(&self.path).await {
            let _ = self.identity.set(identity(&metadata));
        }
    }

    /// Fails where the file that is open is no longer the one at its path.
    pub(super) async fn check(&self) -> Result<(), Error> {
        let Some(known) = self.identity.get() else { return Ok(()) };
        match metadata(&self.path).await {
            Ok(metadata) if identity(&metadata) == *known => Ok(()),
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::file(&self.path, error))
            }
            _ => Err(Error::Replaced(self.path.clone())),
        }
    }

    /// Fails where what was committed just now is in no file that the next start would find: the
    /// database's, or the log beside it, which is there as long as a connection is open.
    pub(super) async fn check_committed(&self) -> Result<(), Error> {
        let mut log = self.path.clone().into_os_string();
        log.push("-wal");
        match metadata(&log).await {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(Error::Replaced(self.path.clone()))
            }
            _ => self.check().await,
        }
    }
}

/// What tells a file from another at the same path.
type Identity = (u64, u64);

#[cfg(unix)]
fn identity(metadata: &std::fs::Metadata) -> Identity {
    use std::os::unix::fs::MetadataExt as _;
    (metadata.dev(), metadata.ino())
}

/// Elsewhere a file that is open cannot be deleted.
#[cfg(not(unix))]
fn identity(_: &std::fs::Metadata) -> Identity {
    (0, 0)
}

fn url(path: &Path) -> Result<String, Error> {
    let not_text = || {
        let reason = "its path is not valid UTF-8";
        Error::file(path, std::io::Error::new(ErrorKind::InvalidInput, reason))
    };
    let path = path.to_str().ok_or_else(not_text)?;
    Ok(format!("sqlite:{}?mode=rw", utf8_percent_encode(path, NON_ALPHANUMERIC)))
}

/// Makes the file, for its owner alone; SQLite makes those beside it likewise.
async fn make_private(path: &Path) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true);
    #[cfg(unix)]
    options.mode(0o600);
    options.open(path).await.map(drop)
}
