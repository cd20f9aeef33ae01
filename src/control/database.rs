//! The database of the control plane: SQLite in a file of its own, or PostgreSQL for several.
//!
//! One SQL text serves both. What it says is the business of the modules beside this one. Whoever
//! writes does so alone, so that what a transaction has read stays true until it ends. Nothing here
//! waits for longer than some seconds, whatever the database does.

mod connection;
mod listener;
mod pool;
mod postgres;
mod sqlite;
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
pub(super) use self::{connection::Connection, listener::Listener, pool::Pooled};
use self::{
    connection::no_answer,
    pool::{Pool, Source},
    postgres::Postgres,
    sqlite::SqliteFile,
};
use super::{
    error::Error,
    health::{DatabaseStatus, Health},
    migrations::{self, Dialect},
};

/// The PostgreSQL channel on which changes are told.
const CHANNEL: &str = "parapet_control";

/// Where the database is.
#[derive(Clone, Debug)]
pub enum Location {
    /// A file, made when it is not there; its directory must be.
    Sqlite(PathBuf),
    /// A server that instances share, or several of which one is used.
    Postgres(DatabaseUrl),
}

/// A database, which is connected to when it is first used. A cheap handle.
#[derive(Clone)]
pub(super) struct Database {
    pool: Pool,
    shown: String,
    is_prepared: Arc<AtomicBool>,
    attempt: Arc<Mutex<Option<Attempt>>>,
    must_exist: Arc<AtomicBool>,
}

/// An attempt to prepare a database, which belongs to all who wait for it.
type Attempt = WeakShared<BoxFuture<'static, Result<(), Error>>>;

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Database({})", self.shown)
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

/// How long the statements of work that nobody waits for may take.
const BACKGROUND_PATIENCE: Duration = Duration::from_mins(5);
const BACKGROUND_LIMITS: &str =
    "SET LOCAL statement_timeout = '290s'; SET LOCAL lock_timeout = '30s'";

impl Database {
    /// The database at `location`, which nobody has connected to yet.
    pub(super) async fn new(location: &Location) -> Result<Self, Error> {
        sqlx::any::install_default_drivers();
        let (source, shown) = match location {
            Location::Sqlite(path) => {
                (Source::Sqlite(SqliteFile::new(path).await?), path.display().to_string())
            }
            Location::Postgres(url) => {
                (Source::Postgres(Postgres::new(url.clone())), url.to_string())
            }
        };
        let pool = Pool::new(source, Health::new());
        let (is_prepared, attempt) = (Arc::default(), Arc::default());
        Ok(Self { pool, shown, is_prepared, attempt, must_exist: Arc::default() })
    }

    /// Refuses from here on to begin a database anew: one without an account is not the one that
    /// was meant.
    pub(super) fn require_existing(&self) {
        self.must_exist.store(true, Ordering::Relaxed);
    }

    /// Brings the schema to this version, before anything else is done.
    ///
    /// All who come meanwhile wait for the same attempt, which ends when the last of them gives up. Who
    /// comes after one that failed begins another.
    async fn prepare(&self) -> Result<(), Error> {
        if self.is_prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        let attempt = {
            let mut attempt = self.attempt.lock().unwrap_or_else(PoisonError::into_inner);
            let under_way = attempt.as_ref().and_then(WeakShared::upgrade);
            under_way.filter(|it| it.peek().is_none()).unwrap_or_else(|| {
                let database = self.clone();
                let new = async move { database.prepare_once().await }.boxed().shared();
                *attempt = new.downgrade();
                new
            })
        };
        attempt.await
    }

    async fn prepare_once(&self) -> Result<(), Error> {
        let mut connection = self.pool.acquire().await?;
        match self.pool.source() {
            Source::Sqlite(file) => {
                self.migrate(connection.raw()).await?;
                file.enable_auto_vacuum(connection.raw()).await;
                file.remember().await;
            }
            Source::Postgres(_) => {
                let session = sqlx::query_scalar("SELECT pg_backend_pid()");
                let session: i32 = session.fetch_one(&mut *connection).await?;
                tokio::select! {
                    migrated = self.migrate(connection.raw()) => migrated?,
                    error = self.until_silent(session) => return Err(error),
                }
            }
        }
        connection.mark_ready();
        self.is_prepared.store(true, Ordering::Release);
        Ok(())
    }

    /// Waits until PostgreSQL knows of no work in a session that this side awaits an answer of: the
    /// question or the answer was lost, or the server is gone. How long a statement takes does not matter.
    async fn until_silent(&self, session: i32) -> Error {
        /// How often another session looks.
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
                Ok(None) => return Error::unreachable(no_answer(INTERVAL)),
                Err(Error::Unreachable(error)) if !matches!(*error, sqlx::Error::Database(_)) => {
                    return Error::Unreachable(error);
                }
                // A server that lets nobody else in answers all the same.
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
                    transaction.execute(BACKGROUND_LIMITS).await?;
                    lock(&mut *transaction, Lane::Control).await?;
                    transaction
                }
            };
            migrations::migrate(&mut transaction, self.dialect()).await?;
            if self.must_exist.load(Ordering::Relaxed) {
                let account = sqlx::query("SELECT id FROM accounts LIMIT 1");
                let account = account.fetch_optional(&mut *transaction).await?;
                account.ok_or(Error::NotBegun)?;
            }
            Ok(transaction.commit().await?)
        };
        timeout(BACKGROUND_PATIENCE, migration).await.unwrap_or(Err(Error::Busy))
    }

    /// Where it is, without its user and password.
    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    /// Which SQL it speaks.
    pub(super) fn dialect(&self) -> Dialect {
        match self.pool.source() {
            Source::Sqlite(_) => Dialect::Sqlite,
            Source::Postgres(_) => Dialect::Postgres,
        }
    }

    /// Notes what else there is to see of the database.
    pub(super) fn health(&self) -> &Health {
        self.pool.health()
    }

    pub(super) fn status(&self) -> DatabaseStatus {
        self.health().status(self.shown.clone(), self.pool.count())
    }

    /// A connection on which single statements are run.
    pub(super) async fn connection(&self) -> Result<Pooled, Error> {
        self.prepare().await?;
        if let Source::Sqlite(file) = self.pool.source() {
            file.check().await?;
        }
        self.pool.acquire().await
    }

    /// Begins a transaction that sees the database as it is now, whatever others write meanwhile.
    pub(super) async fn read(&self) -> Result<Pooled, Error> {
        self.begin_to_read(self.connection().await?).await
    }

    /// The same of a database as its last instance left it: its schema may be an older or a later one,
    /// and is not touched.
    pub(super) async fn read_unprepared(&self) -> Result<Pooled, Error> {
        self.begin_to_read(self.pool.acquire().await?).await
    }

    async fn begin_to_read(&self, mut transaction: Pooled) -> Result<Pooled, Error> {
        let begin = match self.dialect() {
            Dialect::Sqlite => "BEGIN",
            Dialect::Postgres => "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        };
        transaction.begin(begin).await?;
        Ok(transaction)
    }

    /// Begins a transaction after which others of its lane wait until it ends.
    pub(super) async fn write(&self, lane: Lane) -> Result<Pooled, Error> {
        let mut transaction = self.connection().await?;
        match self.dialect() {
            Dialect::Sqlite => transaction.begin("BEGIN IMMEDIATE").await?,
            Dialect::Postgres => {
                transaction.begin("BEGIN").await?;
                lock(&mut *transaction, lane).await?;
            }
        }
        Ok(transaction)
    }

    /// The same for work that takes its time, and that no request waits for.
    pub(super) async fn write_in_background(&self, lane: Lane) -> Result<Pooled, Error> {
        let mut transaction = self.connection().await?;
        transaction.set_patience(BACKGROUND_PATIENCE);
        match self.dialect() {
            Dialect::Sqlite => transaction.begin("BEGIN IMMEDIATE").await?,
            Dialect::Postgres => {
                transaction.begin("BEGIN").await?;
                (&mut *transaction).execute(BACKGROUND_LIMITS).await?;
                lock(&mut *transaction, lane).await?;
            }
        }
        Ok(transaction)
    }

    /// Tells other instances, once `transaction` is committed, that tokens have changed.
    pub(super) async fn announce(&self, transaction: &mut Connection) -> Result<(), Error> {
        match self.dialect() {
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
        match self.pool.source() {
            Source::Sqlite(file) => {
                file.check().await?;
                Listener::of_file(self.pool.open().await?).await
            }
            Source::Postgres(servers) => {
                let listener = servers.listen(CHANNEL).await.map_err(Error::unreachable)?;
                Ok(Listener::Postgres(Box::new(listener)))
            }
        }
    }
}

/// Waits for others of a lane.
async fn lock(
    transaction: impl sqlx::Executor<'_, Database = Any>,
    lane: Lane,
) -> Result<(), sqlx::Error> {
    /// Marks our locks among those of others in the same database.
    const LOCKS: i64 = 0x7061_7261_7065_7400;
    let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCKS + lane as i64);
    lock.execute(transaction).await?;
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::{pool::CONNECTIONS, *};

    #[tokio::test]
    async fn a_transaction_that_ended_by_itself_keeps_no_connection_from_others() {
        let folder = tempfile::tempdir().unwrap();
        let location = Location::Sqlite(folder.path().join("parapet.db"));
        let database = Database::new(&location).await.unwrap();
        for _ in 0..2 * CONNECTIONS {
            let mut transaction = database.write(Lane::Control).await.unwrap();
            // As SQLite does when there is no room for what was to be written.
            (&mut *transaction).execute("ROLLBACK").await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_file_that_is_no_database_is_called_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("parapet.db");
        std::fs::write(&path, "This is another file.".repeat(200)).unwrap();
        let database = Database::new(&Location::Sqlite(path)).await.unwrap();
        let error = database.connection().await.unwrap_err();
        let told = crate::telemetry::report(&error);
        assert!(told.contains("file is not a database"), "{told}");
    }

    #[tokio::test]
    async fn all_who_wait_for_a_database_wait_for_the_same_attempt() {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("postgres://{}/flags?sslmode=disable", server.local_addr().unwrap());
        let location = Location::Postgres(DatabaseUrl::parse(&url).unwrap());
        let database = Database::new(&location).await.unwrap();
        let ask = || futures_util::future::join_all((0..20).map(|_| database.connection()));
        for attempt in 1..=2 {
            let hang_up = async { drop(server.accept().await.unwrap()) };
            let (answers, ()) = tokio::join!(ask(), hang_up);
            assert!(answers.iter().all(|it| matches!(it, Err(Error::Unreachable(_)))), "{attempt}");
            let more = timeout(Duration::ZERO, server.accept()).await;
            assert!(more.is_err(), "attempt {attempt} of all of them is one connection");
        }
    }

    #[tokio::test]
    async fn a_statement_that_is_given_up_keeps_no_connection_from_others() {
        let folder = tempfile::tempdir().unwrap();
        let location = Location::Sqlite(folder.path().join("parapet.db"));
        let database = Database::new(&location).await.unwrap();
        let endless = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n \
                       WHERE i < 300000) SELECT SUM(i) FROM n";
        for _ in 0..2 * CONNECTIONS {
            let mut connection = database.connection().await.unwrap();
            let sum = (&mut *connection).execute(endless);
            assert!(timeout(Duration::ZERO, sum).await.is_err(), "it takes a while");
        }
        database.write(Lane::Control).await.unwrap();
    }
}
