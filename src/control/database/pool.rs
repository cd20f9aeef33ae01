//! A few connections, handed out one by one.
//!
//! Whoever asks is told at once where none can be made, and why. A connection that was given up in
//! the middle of a statement, or that leads nowhere, is never handed out again; nobody waits for it.

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
        error::Error,
        health::{ConnectionCount, Health, Operation},
    },
    connection::{Connection, State},
    postgres::Postgres,
    sqlite::SqliteFile,
};

/// How many connections are kept.
pub(super) const CONNECTIONS: usize = 5;
/// How long an operation waits for one, and for each of its statements.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection that has idled may take to show that it is alive.
const PING_TIMEOUT: Duration = Duration::from_secs(1);
/// A disk that hangs costs a thread for each connection, so that none is made in place of one that
/// waits for it.
const UNLIMITED: Duration = Duration::from_hours(24 * 365);

/// The connections. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    source: Source,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Connection>>,
    health: Health,
}

/// Where connections come from.
#[derive(Debug)]
pub(super) enum Source {
    Sqlite(SqliteFile),
    Postgres(Postgres),
}

impl Pool {
    pub(super) fn new(source: Source, health: Health) -> Self {
        let permits = Arc::new(Semaphore::new(CONNECTIONS));
        Self(Arc::new(Inner { source, permits, idle: Mutex::default(), health }))
    }

    pub(super) fn source(&self) -> &Source {
        &self.0.source
    }

    pub(super) fn health(&self) -> &Health {
        &self.0.health
    }

    pub(super) fn count(&self) -> ConnectionCount {
        let busy = CONNECTIONS - self.0.permits.available_permits();
        ConnectionCount { busy, idle: self.idle().len(), limit: CONNECTIONS }
    }

    /// A connection that has shown to be alive, or a new one.
    pub(super) async fn acquire(&self) -> Result<Pooled, Error> {
        let permit = timeout(PATIENCE, Arc::clone(&self.0.permits).acquire_owned()).await;
        let permit = permit.map_err(|_| Error::Busy)?.expect("nobody closes it");
        loop {
            let idle = self.idle().pop();
            let Some(mut connection) = idle else { break };
            if connection.ping(PING_TIMEOUT).await.is_ok() {
                connection.set_patience(PATIENCE);
                return Ok(Pooled::new(self, connection, permit));
            }
            self.discard_idle();
        }
        let connection = self.open().await?;
        Ok(Pooled::new(self, connection, permit))
    }

    /// A connection beside those that are handed out.
    pub(super) async fn open(&self) -> Result<Connection, Error> {
        let begun = Instant::now();
        let opened = match &self.0.source {
            Source::Sqlite(file) => file.connect(PATIENCE).await,
            Source::Postgres(servers) => servers.connect().await.map_err(Error::unreachable),
        };
        let opened = opened.map_err(|error| match error {
            Error::Database(error) => Error::Unreachable(error),
            error => error,
        });
        let failure = match &opened {
            Err(Error::Unreachable(error) | Error::Locked(error)) => Some(&**error),
            _ => None,
        };
        self.0.health.record(Operation::Connect, begun.elapsed(), failure);
        Ok(Connection::new(opened?, PATIENCE, self.0.health.clone()))
    }

    /// Drops connections that lead where one has just been lost.
    fn discard_idle(&self) {
        if matches!(self.0.source, Source::Postgres(_)) {
            let forgotten = std::mem::take(&mut *self.idle());
            drop(forgotten);
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection back.
    fn release(&self, mut connection: Connection, permit: OwnedSemaphorePermit) {
        match (connection.state(), &self.0.source) {
            (State::Ready, _) if !connection.is_in_transaction() => {
                self.idle().push(connection);
            }
            (State::Lost, Source::Postgres(_)) => self.discard_idle(),
            // The server ends what was begun when it sees that the connection is closed.
            (State::Midway, Source::Postgres(_)) => {}
            (State::Ready, Source::Postgres(_)) => self.rollback_in_background(connection, permit),
            (_, Source::Sqlite(_)) => {
                connection.set_patience(UNLIMITED);
                self.rollback_in_background(connection, permit);
            }
        }
    }

    /// Rolls back what was begun and not committed. Where that fails the connection goes: SQLite
    /// ends a transaction by itself where the disk is full, of which the driver does not learn.
    fn rollback_in_background(&self, mut connection: Connection, permit: OwnedSemaphorePermit) {
        // There is none when the process is about to end.
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

/// A connection that is somebody's until dropped; a transaction that was not committed then is
/// rolled back.
pub(in crate::control) struct Pooled {
    pool: Pool,
    /// Taken when this is dropped.
    lent: Option<(Connection, OwnedSemaphorePermit)>,
}

impl Pooled {
    fn new(pool: &Pool, connection: Connection, permit: OwnedSemaphorePermit) -> Self {
        Self { pool: pool.clone(), lent: Some((connection, permit)) }
    }

    /// Makes what was done in a transaction last.
    pub(in crate::control) async fn commit(mut self) -> Result<(), Error> {
        Connection::commit(&mut self).await?;
        match self.pool.source() {
            Source::Sqlite(file) => file.check_committed().await,
            Source::Postgres(_) => Ok(()),
        }
    }
}

impl Deref for Pooled {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.lent.as_ref().expect("it is there until this is dropped").0
    }
}

impl DerefMut for Pooled {
    fn deref_mut(&mut self) -> &mut Connection {
        &mut self.lent.as_mut().expect("it is there until this is dropped").0
    }
}

impl fmt::Debug for Pooled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pooled({:?})", self.lent)
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        if let Some((connection, permit)) = self.lent.take() {
            self.pool.release(connection, permit);
        }
    }
}
