//! The database of the control plane: a SQLite file for one instance, or PostgreSQL for several.
//!
//! The same SQL serves both; the sibling modules contain it. Write transactions are serialized by a
//! lock, so that what a transaction has read stays true until it ends. Every operation has a timeout: 5
//! seconds, or 5 minutes for migrations and background work.

mod change_listener;
mod connection;
pub(super) mod migrations;
mod pool;
mod postgres_servers;
mod sqlite_file;
mod url;

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, WeakShared},
};
use jiff::Timestamp;
use sqlx::{Any, AnyConnection, Connection as _, Executor as _};
use tokio::time::timeout;

pub use self::url::{DatabaseUrl, DatabaseUrlError};
pub(super) use self::{
    change_listener::ChangeListener, connection::Connection, pool::PooledConnection,
};
use self::{
    connection::timeout_error,
    migrations::Dialect,
    pool::{Backend, Pool},
    postgres_servers::PostgresServers,
    sqlite_file::SqliteFile,
};
use super::{
    database_health::{DatabaseHealth, DatabaseStatus},
    error::Error,
};

/// The PostgreSQL channel for notifications of token changes.
const NOTIFY_CHANNEL: &str = "parapet_control";

/// The location of the database.
#[derive(Clone, Debug)]
pub enum DatabaseLocation {
    /// A file, which is created if it is missing. Its directory must exist.
    Sqlite(PathBuf),
    /// A server shared by instances, or several of which one is used.
    Postgres(DatabaseUrl),
}

/// A database, connected to on first use. A cheap handle.
#[derive(Clone)]
pub(super) struct Database {
    pool: Pool,
    redacted_location: String,
    is_migrated: Arc<AtomicBool>,
    migration_attempt: Arc<Mutex<Option<MigrationAttempt>>>,
    must_exist: Arc<AtomicBool>,
}

/// An attempt to connect and migrate, shared by all callers that wait for it.
type MigrationAttempt = WeakShared<BoxFuture<'static, Result<(), Error>>>;

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Database({})", self.redacted_location)
    }
}

/// The lock of a write transaction. Writers of the same lock wait for each other.
///
/// SQLite has a single lock for all writers.
#[derive(Clone, Copy, Debug)]
pub(super) enum WriteLock {
    /// Accounts, tokens, sessions and events: small transactions that requests wait for.
    Control = 1,
    /// Usage: large transactions in the background.
    Usage = 2,
}

/// The timeout of statements in background work and migrations.
const BACKGROUND_TIMEOUT: Duration = Duration::from_mins(5);
const BACKGROUND_TIMEOUTS_SQL: &str =
    "SET LOCAL statement_timeout = '290s'; SET LOCAL lock_timeout = '30s'";

impl Database {
    /// The database at `location`, without a connection yet.
    pub(super) async fn new(location: &DatabaseLocation) -> Result<Self, Error> {
        sqlx::any::install_default_drivers();
        let (source, redacted_location) = match location {
            DatabaseLocation::Sqlite(path) => {
                (Backend::Sqlite(SqliteFile::new(path).await?), path.display().to_string())
            }
            DatabaseLocation::Postgres(url) => {
                (Backend::Postgres(PostgresServers::new(url.clone())), url.to_string())
            }
        };
        let pool = Pool::new(source, DatabaseHealth::new());
        let (is_migrated, migration_attempt) = (Arc::default(), Arc::default());
        let must_exist = Arc::default();
        Ok(Self { pool, redacted_location, is_migrated, migration_attempt, must_exist })
    }

    /// Makes the migration fail with [`Error::NotInitialized`] if the database has no account: then it
    /// is not the database that was in use before.
    pub(super) fn require_existing(&self) {
        self.must_exist.store(true, Ordering::Relaxed);
    }

    /// Migrates the schema to this version before the first use.
    ///
    /// Concurrent callers share one attempt, which is cancelled when the last of them gives up. A call
    /// after a failed attempt begins another.
    async fn ensure_migrated(&self) -> Result<(), Error> {
        if self.is_migrated.load(Ordering::Acquire) {
            return Ok(());
        }
        let attempt = {
            let mut attempt = self.migration_attempt.lock().unwrap_or_else(PoisonError::into_inner);
            let running = attempt.as_ref().and_then(WeakShared::upgrade);
            running.filter(|it| it.peek().is_none()).unwrap_or_else(|| {
                let database = self.clone();
                let new = async move { database.connect_and_migrate().await }.boxed().shared();
                *attempt = new.downgrade();
                new
            })
        };
        attempt.await
    }

    async fn connect_and_migrate(&self) -> Result<(), Error> {
        let mut connection = self.pool.acquire().await?;
        match self.pool.backend() {
            Backend::Sqlite(file) => {
                self.migrate(connection.raw()).await?;
                file.enable_auto_vacuum(connection.raw()).await;
                file.record_identity().await;
            }
            Backend::Postgres(_) => {
                let session = sqlx::query_scalar("SELECT pg_backend_pid()");
                let session: i32 = session.fetch_one(&mut *connection).await?;
                tokio::select! {
                    migrated = self.migrate(connection.raw()) => migrated?,
                    error = self.wait_for_lost_session(session) => return Err(error),
                }
            }
        }
        connection.mark_ready();
        self.is_migrated.store(true, Ordering::Release);
        Ok(())
    }

    /// Returns an error once PostgreSQL shows no work in a session from which this process awaits a
    /// response: the request or the response was lost, or the server is gone. A statement may take any
    /// time as long as the server works on it.
    async fn wait_for_lost_session(&self, session: i32) -> Error {
        /// The interval at which another session checks.
        const INTERVAL: Duration = Duration::from_secs(5);
        const WORKING: &str = "SELECT pid FROM pg_stat_activity WHERE pid = $1 AND (state LIKE \
             'idle%' AND clock_timestamp() - state_change > interval '4 seconds') IS NOT TRUE";
        loop {
            tokio::time::sleep(INTERVAL).await;
            let look = async {
                let mut connection = self.pool.open().await?;
                let working = sqlx::query(WORKING).bind(session);
                Ok::<_, Error>(working.fetch_optional(&mut connection).await?)
            };
            match look.await {
                Ok(None) => return Error::unreachable(timeout_error(INTERVAL)),
                Err(Error::Unreachable(error)) if !matches!(*error, sqlx::Error::Database(_)) => {
                    return Error::Unreachable(error);
                }
                // A server that rejects further connections is alive.
                Ok(Some(_)) | Err(_) => {}
            }
        }
    }

    async fn migrate(&self, connection: &mut AnyConnection) -> Result<(), Error> {
        let migration = async {
            let mut transaction = match self.dialect() {
                Dialect::Sqlite => connection.begin_with("BEGIN IMMEDIATE").await?,
                Dialect::Postgres => {
                    let mut transaction = connection.begin().await?;
                    transaction.execute(BACKGROUND_TIMEOUTS_SQL).await?;
                    acquire_write_lock(&mut *transaction, WriteLock::Control).await?;
                    transaction
                }
            };
            migrations::migrate(&mut transaction, self.dialect()).await?;
            if self.must_exist.load(Ordering::Relaxed) {
                let account = sqlx::query("SELECT id FROM accounts LIMIT 1");
                let account = account.fetch_optional(&mut *transaction).await?;
                account.ok_or(Error::NotInitialized)?;
            }
            Ok(transaction.commit().await?)
        };
        timeout(BACKGROUND_TIMEOUT, migration).await.unwrap_or(Err(Error::Busy))
    }

    /// The location without user and password, for display.
    pub(super) fn redacted_location(&self) -> &str {
        &self.redacted_location
    }

    /// The SQL dialect.
    pub(super) fn dialect(&self) -> Dialect {
        match self.pool.backend() {
            Backend::Sqlite(_) => Dialect::Sqlite,
            Backend::Postgres(_) => Dialect::Postgres,
        }
    }

    /// The health records of the database.
    pub(super) fn health(&self) -> &DatabaseHealth {
        self.pool.health()
    }

    pub(super) fn status(&self) -> DatabaseStatus {
        self.health().status(self.redacted_location.clone(), self.pool.connection_count())
    }

    /// A connection for single statements outside a transaction.
    pub(super) async fn connection(&self) -> Result<PooledConnection, Error> {
        self.ensure_migrated().await?;
        if let Backend::Sqlite(file) = self.pool.backend() {
            file.check_identity().await?;
        }
        self.pool.acquire().await
    }

    /// Begins a read transaction on a consistent snapshot of the database.
    pub(super) async fn begin_read(&self) -> Result<PooledConnection, Error> {
        self.begin_read_on(self.connection().await?).await
    }

    /// Like [`Self::begin_read`], without migration: the schema may be an older or a later one.
    pub(super) async fn begin_read_unmigrated(&self) -> Result<PooledConnection, Error> {
        self.begin_read_on(self.pool.acquire().await?).await
    }

    async fn begin_read_on(
        &self,
        mut transaction: PooledConnection,
    ) -> Result<PooledConnection, Error> {
        let begin = match self.dialect() {
            Dialect::Sqlite => "BEGIN",
            Dialect::Postgres => "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        };
        transaction.begin(begin).await?;
        Ok(transaction)
    }

    /// Begins a write transaction; others with the same lock wait until it ends.
    pub(super) async fn begin_write(&self, lane: WriteLock) -> Result<PooledConnection, Error> {
        let mut transaction = self.connection().await?;
        match self.dialect() {
            Dialect::Sqlite => transaction.begin("BEGIN IMMEDIATE").await?,
            Dialect::Postgres => {
                transaction.begin("BEGIN").await?;
                acquire_write_lock(&mut *transaction, lane).await?;
            }
        }
        Ok(transaction)
    }

    /// Like [`Self::begin_write`], with the long timeouts of background work.
    pub(super) async fn begin_background_write(
        &self,
        lane: WriteLock,
    ) -> Result<PooledConnection, Error> {
        let mut transaction = self.connection().await?;
        transaction.set_timeout(BACKGROUND_TIMEOUT);
        match self.dialect() {
            Dialect::Sqlite => transaction.begin("BEGIN IMMEDIATE").await?,
            Dialect::Postgres => {
                transaction.begin("BEGIN").await?;
                (&mut *transaction).execute(BACKGROUND_TIMEOUTS_SQL).await?;
                acquire_write_lock(&mut *transaction, lane).await?;
            }
        }
        Ok(transaction)
    }

    /// Notifies other instances of a token change when `transaction` is committed.
    pub(super) async fn notify_token_change(
        &self,
        transaction: &mut Connection,
    ) -> Result<(), Error> {
        match self.dialect() {
            // Other connections see the change in the file.
            Dialect::Sqlite => {}
            Dialect::Postgres => {
                let notify = sqlx::query("SELECT pg_notify($1, '')").bind(NOTIFY_CHANNEL);
                notify.execute(transaction).await?;
            }
        }
        Ok(())
    }

    /// Begins to listen for changes by other instances.
    pub(super) async fn listen(&self) -> Result<ChangeListener, Error> {
        match self.pool.backend() {
            Backend::Sqlite(file) => {
                file.check_identity().await?;
                ChangeListener::sqlite(self.pool.open().await?).await
            }
            Backend::Postgres(servers) => {
                let listener = servers.listen(NOTIFY_CHANNEL).await.map_err(Error::unreachable)?;
                Ok(ChangeListener::Postgres(Box::new(listener)))
            }
        }
    }
}

/// Waits for an advisory lock of PostgreSQL, which the transaction holds until it ends.
async fn acquire_write_lock(
    transaction: impl sqlx::Executor<'_, Database = Any>,
    lane: WriteLock,
) -> Result<(), sqlx::Error> {
    /// Distinguishes Parapet's locks from those of other applications in the same database.
    const LOCKS: i64 = 0x7061_7261_7065_7400;
    let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCKS + lane as i64);
    lock.execute(transaction).await?;
    Ok(())
}

/// The current time in the precision of the database, milliseconds.
pub(super) fn now() -> Timestamp {
    timestamp_from_millis(Timestamp::now().as_millisecond())
}

/// The timestamp of a column in milliseconds since 1970.
pub(super) fn timestamp_from_millis(millis: i64) -> Timestamp {
    Timestamp::from_millisecond(millis).unwrap_or(Timestamp::MAX)
}

/// A count from the database; a negative one is 0.
pub(super) fn unsigned_count(count: i64) -> u64 {
    count.try_into().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{pool::MAX_CONNECTIONS, *};

    #[tokio::test]
    async fn a_transaction_that_was_rolled_back_by_sqlite_leaks_no_connection() {
        let folder = tempfile::tempdir().unwrap();
        let location = DatabaseLocation::Sqlite(folder.path().join("parapet.db"));
        let database = Database::new(&location).await.unwrap();
        for _ in 0..2 * MAX_CONNECTIONS {
            let mut transaction = database.begin_write(WriteLock::Control).await.unwrap();
            // SQLite rolls back by itself when the disk is full.
            (&mut *transaction).execute("ROLLBACK").await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_file_that_is_not_a_database_is_reported_as_such() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("parapet.db");
        std::fs::write(&path, "This is another file.".repeat(200)).unwrap();
        let database = Database::new(&DatabaseLocation::Sqlite(path)).await.unwrap();
        let error = database.connection().await.unwrap_err();
        let message = crate::telemetry::error_chain(&error);
        assert!(message.contains("file is not a database"), "{message}");
    }

    #[tokio::test]
    async fn concurrent_callers_share_one_connection_attempt() {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("postgres://{}/flags?sslmode=disable", server.local_addr().unwrap());
        let location = DatabaseLocation::Postgres(DatabaseUrl::parse(&url).unwrap());
        let database = Database::new(&location).await.unwrap();
        let connect_all = || futures_util::future::join_all((0..20).map(|_| database.connection()));
        for attempt in 1..=2 {
            let hang_up = async { drop(server.accept().await.unwrap()) };
            let (results, ()) = tokio::join!(connect_all(), hang_up);
            assert!(results.iter().all(|it| matches!(it, Err(Error::Unreachable(_)))), "{attempt}");
            let more = timeout(Duration::ZERO, server.accept()).await;
            assert!(more.is_err(), "attempt {attempt} of all of them is one connection");
        }
    }

    #[tokio::test]
    async fn a_cancelled_statement_leaks_no_connection() {
        let folder = tempfile::tempdir().unwrap();
        let location = DatabaseLocation::Sqlite(folder.path().join("parapet.db"));
        let database = Database::new(&location).await.unwrap();
        let endless = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n \
                       WHERE i < 300000) SELECT SUM(i) FROM n";
        for _ in 0..2 * MAX_CONNECTIONS {
            let mut connection = database.connection().await.unwrap();
            let sum = (&mut *connection).execute(endless);
            assert!(timeout(Duration::ZERO, sum).await.is_err(), "it takes a while");
        }
        database.begin_write(WriteLock::Control).await.unwrap();
    }
}
