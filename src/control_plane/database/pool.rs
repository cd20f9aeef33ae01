//! A pool of at most 5 connections.
//!
//! If no connection can be opened, callers get the error immediately. A broken connection is dropped.
//! One whose statement was cancelled is dropped (PostgreSQL) or reset in the background (SQLite).

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};

use super::{
    super::{
        database_health::{ConnectionCount, DatabaseHealth, DatabaseOperation},
        error::Error,
    },
    connection::{Connection, State},
    postgres_servers::PostgresServers,
    sqlite_file::SqliteFile,
};

/// The maximum number of connections, apart from those of listeners.
pub(super) const MAX_CONNECTIONS: usize = 5;
/// The timeout for acquiring a connection, and for each of its statements.
pub(super) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
/// The timeout of the check that an idle connection is alive.
const PING_TIMEOUT: Duration = Duration::from_secs(1);
/// The timeout for resetting a SQLite connection: if the disk hangs, each connection blocks a thread, so
/// a hanging connection keeps its permit and is not replaced.
const NO_TIMEOUT: Duration = Duration::from_hours(24 * 365);

/// The pool. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    backend: Backend,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Connection>>,
    health: DatabaseHealth,
}

/// The database that connections are opened to.
#[derive(Debug)]
pub(super) enum Backend {
    Sqlite(SqliteFile),
    Postgres(PostgresServers),
}

impl Pool {
    pub(super) fn new(backend: Backend, health: DatabaseHealth) -> Self {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        Self(Arc::new(Inner { backend, permits, idle: Mutex::default(), health }))
    }

    pub(super) fn backend(&self) -> &Backend {
        &self.0.backend
    }

    pub(super) fn health(&self) -> &DatabaseHealth {
        &self.0.health
    }

    pub(super) fn connection_count(&self) -> ConnectionCount {
        let busy = MAX_CONNECTIONS - self.0.permits.available_permits();
        ConnectionCount { busy, idle: self.idle().len(), limit: MAX_CONNECTIONS }
    }

    /// An idle connection that responds to a ping, or a new one. Fails with [`Error::Busy`] after 5 s.
    pub(super) async fn acquire(&self) -> Result<PooledConnection, Error> {
        let permit = timeout(DEFAULT_TIMEOUT, Arc::clone(&self.0.permits).acquire_owned()).await;
        let permit = permit.map_err(|_| Error::Busy)?.expect("the semaphore is never closed");
        loop {
            let idle = self.idle().pop();
            let Some(mut connection) = idle else { break };
            if connection.ping(PING_TIMEOUT).await.is_ok() {
                connection.set_timeout(DEFAULT_TIMEOUT);
                return Ok(PooledConnection::new(self, connection, permit));
            }
            self.discard_idle();
        }
        let connection = self.open().await?;
        Ok(PooledConnection::new(self, connection, permit))
    }

    /// A new connection that does not count toward the limit of the pool.
    pub(super) async fn open(&self) -> Result<Connection, Error> {
        let begun = Instant::now();
        let opened = match &self.0.backend {
            Backend::Sqlite(file) => file.connect(DEFAULT_TIMEOUT).await,
            Backend::Postgres(servers) => servers.connect().await.map_err(Error::unreachable),
        };
        let opened = opened.map_err(|error| match error {
            Error::Database(error) => Error::Unreachable(error),
            error => error,
        });
        let failure = match &opened {
            Err(Error::Unreachable(error) | Error::Locked(error)) => Some(&**error),
            _ => None,
        };
        self.0.health.record(DatabaseOperation::Connect, begun.elapsed(), failure);
        Ok(Connection::new(opened?, DEFAULT_TIMEOUT, self.0.health.clone()))
    }

    /// Drops all idle connections after one has been lost.
    fn discard_idle(&self) {
        if matches!(self.0.backend, Backend::Postgres(_)) {
            let discarded = std::mem::take(&mut *self.idle());
            drop(discarded);
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a connection to the pool, or drops it.
    fn release(&self, mut connection: Connection, permit: OwnedSemaphorePermit) {
        match (connection.state(), &self.0.backend) {
            (State::Ready, _) if !connection.is_in_transaction() => {
                self.idle().push(connection);
            }
            (State::Broken, Backend::Postgres(_)) => self.discard_idle(),
            // The server aborts the statement when the connection is closed.
            (State::Pending, Backend::Postgres(_)) => {}
            (State::Ready, Backend::Postgres(_)) => self.rollback_in_background(connection, permit),
            (_, Backend::Sqlite(_)) => {
                connection.set_timeout(NO_TIMEOUT);
                self.rollback_in_background(connection, permit);
            }
        }
    }

    /// Rolls back an uncommitted transaction. If that fails, the connection is dropped: SQLite rolls
    /// back by itself when the disk is full, and the driver does not notice that.
    fn rollback_in_background(&self, mut connection: Connection, permit: OwnedSemaphorePermit) {
        // There is no runtime while the process exits.
        let Ok(runtime) = Handle::try_current() else { return };
        let pool = self.clone();
        runtime.spawn(async move {
            if connection.reset().await.is_ok() {
                pool.idle().push(connection);
            }
            drop(permit);
        });
    }
}

/// A connection that is returned to the pool when dropped. An uncommitted transaction is rolled back
/// then.
pub(in crate::control_plane) struct PooledConnection {
    pool: Pool,
    /// `None` only during the drop.
    connection: Option<(Connection, OwnedSemaphorePermit)>,
}

impl PooledConnection {
    fn new(pool: &Pool, connection: Connection, permit: OwnedSemaphorePermit) -> Self {
        Self { pool: pool.clone(), connection: Some((connection, permit)) }
    }

    /// Commits the transaction.
    pub(in crate::control_plane) async fn commit(mut self) -> Result<(), Error> {
        Connection::commit(&mut self).await?;
        match self.pool.backend() {
            Backend::Sqlite(file) => file.check_committed().await,
            Backend::Postgres(_) => Ok(()),
        }
    }
}

impl Deref for PooledConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection.as_ref().expect("the connection is there until the drop").0
    }
}

impl DerefMut for PooledConnection {
    fn deref_mut(&mut self) -> &mut Connection {
        &mut self.connection.as_mut().expect("the connection is there until the drop").0
    }
}

impl fmt::Debug for PooledConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pooled({:?})", self.connection)
    }
}

impl Drop for PooledConnection {
    fn drop(&mut self) {
        if let Some((connection, permit)) = self.connection.take() {
            self.pool.release(connection, permit);
        }
    }
}
