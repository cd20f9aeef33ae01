//! A database connection with a timeout for each statement.
//!
//! A server can disappear without closing its connections, for instance when its host or a firewall's
//! connection state is lost. Callers must not hang then, so every statement goes through this module.

use std::{fmt, io, str::FromStr as _, time::Duration};

use futures_util::{StreamExt as _, stream};
use sqlx::{
    Any, AnyConnection, ConnectOptions as _, Either, Execute, Executor, SqlStr,
    any::{AnyConnectOptions, AnyQueryResult, AnyRow, AnyStatement, AnyTypeInfo},
    postgres::PgDatabaseError,
};
use tokio::time::{Instant, timeout_at};

use super::super::database_health::{DatabaseHealth, DatabaseOperation};

type BoxStream<'a, T> = std::pin::Pin<Box<dyn stream::Stream<Item = T> + Send + 'a>>;
type BoxFuture<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>;
type StatementItem = Either<AnyQueryResult, AnyRow>;

/// A connection to SQLite or PostgreSQL.
///
/// A statement fails with an I/O error of kind `TimedOut` unless its whole result arrives within the
/// connection's timeout.
pub(in crate::control_plane) struct Connection {
    raw: AnyConnection,
    state: State,
    is_in_transaction: bool,
    timeout: Duration,
    health: DatabaseHealth,
}

/// Whether a connection can be used again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum State {
    /// Idle.
    Ready,
    /// A statement is running, or was cancelled before its end.
    Pending,
    /// The connection is broken or its server is unusable; other idle connections may be affected too.
    Broken,
}

impl Connection {
    pub(super) fn new(raw: AnyConnection, timeout: Duration, health: DatabaseHealth) -> Self {
        Self { raw, state: State::Ready, is_in_transaction: false, timeout, health }
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Sets the timeout of the following statements.
    pub(in crate::control_plane) fn set_timeout(&mut self, patience: Duration) {
        self.timeout = patience;
    }

    /// Whether a transaction is open.
    pub(super) fn is_in_transaction(&self) -> bool {
        self.is_in_transaction
    }

    /// The driver's connection, for operations with their own timeout. Until [`Self::mark_ready`] is
    /// called, this connection counts as interrupted.
    pub(super) fn raw(&mut self) -> &mut AnyConnection {
        self.state = State::Pending;
        &mut self.raw
    }

    /// Marks the operation on [`Self::raw`] as completed.
    pub(super) fn mark_ready(&mut self) {
        self.state = State::Ready;
    }

    pub(super) async fn begin(&mut self, statement: &'static str) -> Result<(), sqlx::Error> {
        self.is_in_transaction = true;
        self.execute(statement).await.map(drop)
    }

    pub(super) async fn commit(&mut self) -> Result<(), sqlx::Error> {
        let commit = self.raw.execute("COMMIT");
        let running = StatementGuard::start(
            &mut self.state,
            &self.health,
            self.timeout,
            DatabaseOperation::Commit,
        );
        running.run_with_timeout(commit).await?;
        self.is_in_transaction = false;
        Ok(())
    }

    /// Waits for the end of a cancelled statement, and rolls back its transaction.
    pub(super) async fn reset(&mut self) -> Result<(), sqlx::Error> {
        self.ping(self.timeout).await?;
        if self.is_in_transaction {
            self.execute("ROLLBACK").await?;
            self.is_in_transaction = false;
        }
        Ok(())
    }

    /// Checks that the server responds.
    pub(super) async fn ping(&mut self, patience: Duration) -> Result<(), sqlx::Error> {
        let ping = sqlx::Connection::ping(&mut self.raw);
        let running = StatementGuard::start(
            &mut self.state,
            &self.health,
            patience,
            DatabaseOperation::Statement,
        );
        running.run_with_timeout(ping).await
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({:?})", self.state)
    }
}

/// A running statement. If it is dropped before its end, the connection stays [`State::Pending`].
struct StatementGuard<'a> {
    state: &'a mut State,
    health: &'a DatabaseHealth,
    operation: DatabaseOperation,
    started_at: Instant,
    timeout: Duration,
}

impl<'a> StatementGuard<'a> {
    fn start(
        state: &'a mut State,
        health: &'a DatabaseHealth,
        timeout: Duration,
        operation: DatabaseOperation,
    ) -> Self {
        *state = State::Pending;
        Self { state, health, operation, started_at: Instant::now(), timeout }
    }

    fn deadline(&self) -> Instant {
        self.started_at + self.timeout
    }

    async fn run_with_timeout<T>(
        mut self,
        work: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let done = timeout_at(self.deadline(), work).await;
        self.record_result(done.unwrap_or_else(|_| Err(timeout_error(self.timeout))))
    }

    fn record_result<T>(&mut self, done: Result<T, sqlx::Error>) -> Result<T, sqlx::Error> {
        *self.state = match &done {
            Err(error) if is_connection_broken(error) => State::Broken,
            // After an error message of the server, too, the connection is idle.
            Ok(_) | Err(_) => State::Ready,
        };
        self.health.record(self.operation, self.started_at.elapsed(), done.as_ref().err());
        done
    }
}

impl<'c> Executor<'c> for &'c mut Connection {
    type Database = Any;

    fn fetch_many<'e, 'q: 'e, E>(
        self,
        query: E,
    ) -> BoxStream<'e, Result<StatementItem, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Any>,
    {
        let steps = self.raw.fetch_many(query);
        let running = StatementGuard::start(
            &mut self.state,
            &self.health,
            self.timeout,
            DatabaseOperation::Statement,
        );
        let next = |state: Option<(BoxStream<'e, _>, StatementGuard<'e>)>| async move {
            let (mut steps, mut running) = state?;
            match timeout_at(running.deadline(), steps.next()).await {
                Ok(Some(Ok(step))) => Some((Ok(step), Some((steps, running)))),
                Ok(Some(Err(error))) => Some((running.record_result(Err(error)), None)),
                Ok(None) => running.record_result(Ok(())).err().map(|error| (Err(error), None)),
                Err(_) => {
                    let error = timeout_error(running.timeout);
                    Some((running.record_result(Err(error)), None))
                }
            }
        };
        Box::pin(stream::unfold(Some((steps, running)), next))
    }

    fn fetch_optional<'e, 'q: 'e, E>(
        self,
        query: E,
    ) -> BoxFuture<'e, Result<Option<AnyRow>, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Any>,
    {
        let row = self.raw.fetch_optional(query);
        let running = StatementGuard::start(
            &mut self.state,
            &self.health,
            self.timeout,
            DatabaseOperation::Statement,
        );
        Box::pin(running.run_with_timeout(row))
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        parameters: &'e [AnyTypeInfo],
    ) -> BoxFuture<'e, Result<AnyStatement, sqlx::Error>>
    where
        'c: 'e,
    {
        let prepared = self.raw.prepare_with(sql, parameters);
        let running = StatementGuard::start(
            &mut self.state,
            &self.health,
            self.timeout,
            DatabaseOperation::Statement,
        );
        Box::pin(running.run_with_timeout(prepared))
    }
}

/// Connection options with statement logging disabled.
pub(super) fn options_without_logging(url: &str) -> Result<AnyConnectOptions, sqlx::Error> {
    Ok(AnyConnectOptions::from_str(url)?.disable_statement_logging())
}

/// The error after a timeout.
pub(super) fn timeout_error(patience: Duration) -> sqlx::Error {
    let text = format!("no response within {patience:?}");
    io::Error::new(io::ErrorKind::TimedOut, text).into()
}

/// Whether a connection is unusable after this error.
fn is_connection_broken(error: &sqlx::Error) -> bool {
    /// PostgreSQL: the server closes the session or shuts down, has become read-only, or has another
    /// schema than at the time when the session prepared its statements.
    const GONE: [&str; 7] = ["57P01", "57P02", "57P03", "57P05", "25P03", "25006", "0A000"];
    match error {
        sqlx::Error::Database(error) => {
            let code = error.code();
            let is_postgres = error.try_downcast_ref::<PgDatabaseError>().is_some();
            is_postgres && code.is_some_and(|code| GONE.contains(&&*code))
        }
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::WorkerCrashed => true,
        _ => false,
    }
}
