//! The database of the control plane: SQLite in a file of its own, or PostgreSQL for several.
//!
//! One SQL text serves both. What it says is the business of the modules beside this one. Whoever
//! writes does so alone, so that what a transaction has read stays true until it ends.

use std::{
    fmt,
    io::ErrorKind,
    path::{Path, PathBuf},
    str::FromStr as _,
    time::Duration,
};

use jiff::Timestamp;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use sqlx::{
    Any, AnyConnection, AnyPool, ConnectOptions as _, Connection as _, Executor as _, Transaction,
    any::{AnyConnectOptions, AnyPoolOptions},
    postgres::{PgConnectOptions, PgListener},
};
use tokio::{fs::OpenOptions, time::timeout};
use zeroize::Zeroizing;

use super::{
    error::Error,
    migrations::{self, Dialect},
};

/// How many connections are kept.
const CONNECTIONS: u32 = 5;
/// How long an operation waits for one, and for others that write.
const PATIENCE: Duration = Duration::from_secs(5);
/// The PostgreSQL channel on which changes are told.
const CHANNEL: &str = "parapet_control";

/// Where the database is.
#[derive(Clone, Debug)]
pub enum Location {
    /// A file, made when it is not there; its directory must be.
    Sqlite(PathBuf),
    /// A server that instances share.
    Postgres(DatabaseUrl),
}

/// The URL of a PostgreSQL database, whose user's password is shown to nobody.
#[derive(Clone)]
pub struct DatabaseUrl {
    url: Zeroizing<String>,
    shown: String,
}

/// Why a text is not the URL of a database; never repeats the text.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DatabaseUrlError {
    /// Another kind of URL, or none.
    #[error("the URL does not begin with postgres:// or postgresql://")]
    Scheme,
    /// It cannot be read.
    #[error("the URL is not of the form postgres://user:password@host:port/database")]
    Form,
}

impl DatabaseUrl {
    /// Reads `postgres://user:password@host:port/database?sslmode=…`.
    pub fn parse(text: &str) -> Result<Self, DatabaseUrlError> {
        let text = text.trim();
        if !text.starts_with("postgres://") && !text.starts_with("postgresql://") {
            return Err(DatabaseUrlError::Scheme);
        }
        let options = PgConnectOptions::from_str(text).map_err(|_| DatabaseUrlError::Form)?;
        let database = options.get_database().unwrap_or_default();
        let shown = format!("postgres://{}:{}/{database}", options.get_host(), options.get_port());
        Ok(Self { url: Zeroizing::new(text.to_owned()), shown })
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DatabaseUrl({})", self.shown)
    }
}

/// A database that has been opened. A cheap handle.
#[derive(Clone)]
pub(super) struct Database {
    pool: AnyPool,
    dialect: Dialect,
    url: Zeroizing<String>,
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Database({:?})", self.dialect)
    }
}

/// Writers that keep out of one another's way: those of a lane wait for each other.
///
/// SQLite has one lane only.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lane {
    /// Accounts, tokens, sessions, events: small and awaited by people.
    Control = 1,
    /// Usage: large, and awaited by nobody.
    Usage = 2,
}

impl Database {
    /// Connects, and brings the schema to this version.
    pub(super) async fn open(location: &Location) -> Result<Self, Error> {
        sqlx::any::install_default_drivers();
        let (dialect, url) = match location {
            Location::Sqlite(path) => {
                make_private(path).await.map_err(|error| Error::File(path.clone(), error))?;
                (Dialect::Sqlite, Zeroizing::new(sqlite_url(path)?))
            }
            Location::Postgres(url) => (Dialect::Postgres, url.url.clone()),
        };
        let options = AnyPoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(PATIENCE)
            .after_connect(move |connection, _| Box::pin(prepare(connection, dialect)))
            // SQLite ends a transaction by itself where the disk is full, and the driver, which does
            // not learn of it, would begin no other on that connection.
            .before_acquire(|connection, _| {
                let is_usable = !connection.is_in_transaction();
                Box::pin(async move { Ok(is_usable) })
            });
        let url_options = quiet(&url)?;
        // The pool tries until its patience ends, and then tells that and not the reason.
        first_connection(&url_options, dialect).await?;
        let pool = options.connect_with(url_options).await?;
        let database = Self { pool, dialect, url };
        let mut transaction = database.write(Lane::Control).await?;
        migrations::migrate(&mut transaction, dialect).await?;
        transaction.commit().await?;
        Ok(database)
    }

    /// Where single statements are run.
    pub(super) fn pool(&self) -> &AnyPool {
        &self.pool
    }

    /// Begins a transaction that sees the database as it is now, whatever others write meanwhile.
    pub(super) async fn read(&self) -> Result<Transaction<'static, Any>, Error> {
        let begin = match self.dialect {
            Dialect::Sqlite => "BEGIN",
            Dialect::Postgres => "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        };
        Ok(self.pool.begin_with(begin).await?)
    }

    /// Begins a transaction after which others of its lane wait until it ends.
    pub(super) async fn write(&self, lane: Lane) -> Result<Transaction<'static, Any>, Error> {
        match self.dialect {
            Dialect::Sqlite => Ok(self.pool.begin_with("BEGIN IMMEDIATE").await?),
            Dialect::Postgres => {
                /// Marks our locks among those of others in the same database.
                const LOCKS: i64 = 0x7061_7261_7065_7400;
                let mut transaction = self.pool.begin().await?;
                let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)");
                lock.bind(LOCKS + lane as i64).execute(&mut *transaction).await?;
                Ok(transaction)
            }
        }
    }

    /// Tells other instances, once `transaction` is committed, that tokens have changed.
    pub(super) async fn announce(&self, transaction: &mut AnyConnection) -> Result<(), Error> {
        match self.dialect {
            // Others see it in the file.
            Dialect::Sqlite => {}
            Dialect::Postgres => {
                let notify = sqlx::query("SELECT pg_notify($1, '')").bind(CHANNEL);
                notify.execute(transaction).await?;
            }
        }
        Ok(())
    }

    /// Begins to listen for changes by others.
    pub(super) async fn listen(&self) -> Result<Listener, Error> {
        match self.dialect {
            Dialect::Sqlite => {
                let mut connection = quiet(&self.url)?.connect().await?;
                prepare(&mut connection, self.dialect).await?;
                let version = data_version(&mut connection).await?;
                Ok(Listener::Sqlite { connection, version })
            }
            Dialect::Postgres => {
                let mut listener = PgListener::connect(&self.url).await?;
                listener.listen(CHANNEL).await?;
                Ok(Listener::Postgres(Box::new(listener)))
            }
        }
    }
}

/// Hears of changes by others.
pub(super) enum Listener {
    Sqlite { connection: AnyConnection, version: i64 },
    Postgres(Box<PgListener>),
}

impl Listener {
    /// Returns after a change, or when there may have been one.
    pub(super) async fn changed(&mut self) -> Result<(), Error> {
        /// How often the file of SQLite is looked at.
        const INTERVAL: Duration = Duration::from_millis(250);
        match self {
            Self::Sqlite { connection, version } => loop {
                tokio::time::sleep(INTERVAL).await;
                let now = data_version(connection).await?;
                if std::mem::replace(version, now) != now {
                    return Ok(());
                }
            },
            // `None` is a connection that was lost and made anew.
            Self::Postgres(listener) => {
                listener.try_recv().await?;
                Ok(())
            }
        }
    }
}

/// A number that is another one after each change by another connection.
async fn data_version(connection: &mut AnyConnection) -> Result<i64, Error> {
    Ok(sqlx::query_scalar("PRAGMA data_version").fetch_one(connection).await?)
}

/// The time as the database keeps it.
pub(super) fn now() -> Timestamp {
    of_millis(Timestamp::now().as_millisecond())
}

/// A time of the database.
pub(super) fn of_millis(millis: i64) -> Timestamp {
    Timestamp::from_millisecond(millis).unwrap_or(Timestamp::MAX)
}

/// A count of the database.
pub(super) fn of_count(count: i64) -> u64 {
    count.try_into().unwrap_or(0)
}

/// Options that log no statements, whose texts are nobody's business.
fn quiet(url: &str) -> Result<AnyConnectOptions, Error> {
    Ok(AnyConnectOptions::from_str(url)?.disable_statement_logging())
}

/// Connects once, with the reason where that cannot be done. An instance that starts at the same time
/// is waited for.
async fn first_connection(options: &AnyConnectOptions, dialect: Dialect) -> Result<(), Error> {
    /// How long somebody else may take who is at the file as well.
    const PAUSE: Duration = Duration::from_millis(20);
    let once = async || {
        let mut connection = AnyConnection::connect_with(options).await?;
        prepare(&mut connection, dialect).await?;
        connection.close().await
    };
    let connected = timeout(PATIENCE, async {
        loop {
            match once().await.map_err(Error::from) {
                Err(Error::Busy) => tokio::time::sleep(PAUSE).await,
                Err(Error::Database(error)) => return Err(Error::Unreachable(error)),
                connected => return connected,
            }
        }
    });
    connected.await.unwrap_or_else(|_| match dialect {
        Dialect::Sqlite => Err(Error::Busy),
        Dialect::Postgres => Err(Error::Unreachable(sqlx::Error::Io(ErrorKind::TimedOut.into()))),
    })
}

async fn prepare(connection: &mut AnyConnection, dialect: Dialect) -> Result<(), sqlx::Error> {
    match dialect {
        Dialect::Sqlite => {
            connection
                .execute(
                    "PRAGMA busy_timeout = 5000; PRAGMA journal_mode = WAL; \
                     PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;",
                )
                .await?;
        }
        Dialect::Postgres => connection.ping().await?,
    }
    Ok(())
}

fn sqlite_url(path: &Path) -> Result<String, Error> {
    let not_text = || {
        let reason = "its path is not valid UTF-8";
        Error::File(path.to_owned(), std::io::Error::new(ErrorKind::InvalidInput, reason))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_transaction_that_ended_by_itself_keeps_no_connection_from_others() {
        let folder = tempfile::tempdir().unwrap();
        let location = Location::Sqlite(folder.path().join("parapet.db"));
        let database = Database::open(&location).await.unwrap();
        for _ in 0..2 * CONNECTIONS {
            let mut transaction = database.write(Lane::Control).await.unwrap();
            // As SQLite does when there is no room for what was to be written.
            transaction.execute("ROLLBACK").await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_file_that_is_no_database_is_called_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("parapet.db");
        std::fs::write(&path, "This is another file.".repeat(200)).unwrap();
        let error = Database::open(&Location::Sqlite(path)).await.unwrap_err();
        let told = crate::telemetry::report(&error);
        assert!(told.contains("file is not a database"), "{told}");
    }

    #[test]
    fn a_database_url_shows_where_and_not_with_what() {
        let url = DatabaseUrl::parse("postgres://ann:s3cr3t@db.example:5433/flags?sslmode=require");
        let url = url.unwrap();
        assert_eq!(url.to_string(), "postgres://db.example:5433/flags");
        assert_eq!(format!("{url:?}"), "DatabaseUrl(postgres://db.example:5433/flags)");
        let error = |text| DatabaseUrl::parse(text).err();
        assert_eq!(error("mysql://localhost/flags"), Some(DatabaseUrlError::Scheme));
        assert_eq!(error("postgres://host:port/flags"), Some(DatabaseUrlError::Form));
    }
}
