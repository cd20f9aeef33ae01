//! A connection whose statements end: each within a time, answered or not.
//!
//! A server can be gone without a word: its machine lost, a firewall that forgot the connection.
//! Nothing may then wait for longer than a few seconds, so everything that is asked of a database
//! goes through here.

use std::{fmt, io, str::FromStr as _, time::Duration};

use futures_util::{StreamExt as _, stream};
use sqlx::{
    Any, AnyConnection, ConnectOptions as _, Either, Execute, Executor, SqlStr,
    any::{AnyConnectOptions, AnyQueryResult, AnyRow, AnyStatement, AnyTypeInfo},
    postgres::PgDatabaseError,
};
use tokio::time::{Instant, timeout_at};

use super::super::health::{Health, Operation};

type BoxStream<'a, T> = std::pin::Pin<Box<dyn stream::Stream<Item = T> + Send + 'a>>;
type BoxFuture<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>;
type Step = Either<AnyQueryResult, AnyRow>;

/// A connection to the database of either kind.
///
/// What a statement waits for, the answer included, is bounded by the connection's patience; after
/// that it fails with an I/O error of kind `TimedOut`.
pub(in crate::control) struct Connection {
    raw: AnyConnection,
    state: State,
    is_in_transaction: bool,
    patience: Duration,
    health: Health,
}

/// Whether a connection can be used again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum State {
    /// It waits for a statement.
    Ready,
    /// A statement was begun and has not ended, perhaps because nobody wants its result any more.
    Midway,
    /// It leads nowhere, or to a server that is of no use now; others like it may do so too.
    Lost,
}

impl Connection {
    pub(super) fn new(raw: AnyConnection, patience: Duration, health: Health) -> Self {
        Self { raw, state: State::Ready, is_in_transaction: false, patience, health }
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// How long statements may take from here on.
    pub(in crate::control) fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Whether a transaction was begun and not ended.
    pub(super) fn is_in_transaction(&self) -> bool {
        self.is_in_transaction
    }

    /// The driver's connection, for what brings a time limit of its own; until [`Self::mark_ready`] is
    /// called this connection counts as given up.
    pub(super) fn raw(&mut self) -> &mut AnyConnection {
        self.state = State::Midway;
        &mut self.raw
    }

    /// Says that what was done with [`Self::raw`] has ended well.
    pub(super) fn mark_ready(&mut self) {
        self.state = State::Ready;
    }

    pub(super) async fn begin(&mut self, statement: &'static str) -> Result<(), sqlx::Error> {
        self.is_in_transaction = true;
        self.execute(statement).await.map(drop)
    }

    pub(super) async fn commit(&mut self) -> Result<(), sqlx::Error> {
        let commit = self.raw.execute("COMMIT");
        let running =
            Running::begin(&mut self.state, &self.health, self.patience, Operation::Commit);
        running.finish(commit).await?;
        self.is_in_transaction = false;
        Ok(())
    }

    /// Waits for a statement that nobody wants any more, and ends its transaction.
    pub(super) async fn reset(&mut self) -> Result<(), sqlx::Error> {
        self.ping(self.patience).await?;
        if self.is_in_transaction {
            self.execute("ROLLBACK").await?;
            self.is_in_transaction = false;
        }
        Ok(())
    }

    /// Asks for a sign of life.
    pub(super) async fn ping(&mut self, patience: Duration) -> Result<(), sqlx::Error> {
        let ping = sqlx::Connection::ping(&mut self.raw);
        let running = Running::begin(&mut self.state, &self.health, patience, Operation::Statement);
        running.finish(ping).await
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({:?})", self.state)
    }
}

/// A statement under way. The connection stays [`State::Midway`] where this is dropped.
struct Running<'a> {
    state: &'a mut State,
    health: &'a Health,
    what: Operation,
    begun: Instant,
    patience: Duration,
}

impl<'a> Running<'a> {
    fn begin(
        state: &'a mut State,
        health: &'a Health,
        patience: Duration,
        what: Operation,
    ) -> Self {
        *state = State::Midway;
        Self { state, health, what, begun: Instant::now(), patience }
    }

    fn deadline(&self) -> Instant {
        self.begun + self.patience
    }

    async fn finish<T>(
        mut self,
        work: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let done = timeout_at(self.deadline(), work).await;
        self.end(done.unwrap_or_else(|_| Err(no_answer(self.patience))))
    }

    fn end<T>(&mut self, done: Result<T, sqlx::Error>) -> Result<T, sqlx::Error> {
        *self.state = match &done {
            Err(error) if is_lost(error) => State::Lost,
            // Also where the server has said what is wrong: it waits for the next statement.
            Ok(_) | Err(_) => State::Ready,
        };
        self.health.record(self.what, self.begun.elapsed(), done.as_ref().err());
        done
    }
}

impl<'c> Executor<'c> for &'c mut Connection {
    type Database = Any;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Step, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Any>,
    {
        let steps = self.raw.fetch_many(query);
        let running =
            Running::begin(&mut self.state, &self.health, self.patience, Operation::Statement);
        let next = |state: Option<(BoxStream<'e, _>, Running<'e>)>| async move {
            let (mut steps, mut running) = state?;
            match timeout_at(running.deadline(), steps.next()).await {
                Ok(Some(Ok(step))) => Some((Ok(step), Some((steps, running)))),
                Ok(Some(Err(error))) => Some((running.end(Err(error)), None)),
                Ok(None) => running.end(Ok(())).err().map(|error| (Err(error), None)),
                Err(_) => {
                    let error = no_answer(running.patience);
                    Some((running.end(Err(error)), None))
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
        let running =
            Running::begin(&mut self.state, &self.health, self.patience, Operation::Statement);
        Box::pin(running.finish(row))
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
        let running =
            Running::begin(&mut self.state, &self.health, self.patience, Operation::Statement);
        Box::pin(running.finish(prepared))
    }
}

/// Options that log no statements, whose texts are nobody's business.
pub(super) fn quiet(url: &str) -> Result<AnyConnectOptions, sqlx::Error> {
    Ok(AnyConnectOptions::from_str(url)?.disable_statement_logging())
}

/// The error of somebody who has said nothing for so long.
pub(super) fn no_answer(patience: Duration) -> sqlx::Error {
    let text = format!("no answer within {patience:?}");
    io::Error::new(io::ErrorKind::TimedOut, text).into()
}

/// Whether a connection is of no use after this error.
fn is_lost(error: &sqlx::Error) -> bool {
    /// PostgreSQL: the server ends the session or itself, takes no changes any more, or has tables of
    /// another form than the session's statements were prepared for.
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
