//! Connections to PostgreSQL: to the first server that answers, with timeouts enforced by the server.
//!
//! A session whose client has disappeared must not keep its locks: the server ends a session that idles
//! in a transaction, and sends TCP keepalives. The timeouts of this side are in [`super::connection`].

use std::{
    io,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use sqlx::{
    AnyConnection, ConnectOptions as _, Executor as _,
    postgres::{PgConnectOptions, PgListener, PgPoolOptions},
};
use tokio::time::timeout;

use super::{
    connection::{options_without_logging, timeout_error},
    url::{DatabaseUrl, Server},
};

/// The timeout for connecting to one server and preparing the session.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Sets the timeouts that the server enforces. The lock and statement timeouts are shorter than those of
/// this side, so that the server's error arrives. A setting that the server's version lacks is skipped.
const SESSION_TIMEOUTS_SQL: &str = "SELECT set_config(name, value, false) FROM (VALUES \
     ('lock_timeout', '3s'), ('statement_timeout', '4s'), \
     ('idle_in_transaction_session_timeout', '5s'), ('tcp_user_timeout', '10s'), \
     ('tcp_keepalives_idle', '5'), ('tcp_keepalives_interval', '2'), \
     ('tcp_keepalives_count', '3')) AS limits (name, value) \
     WHERE current_setting(name, true) IS NOT NULL";

/// Fails on a read-only server.
const CHECK_WRITABLE_SQL: &str = "DO $$ BEGIN IF current_setting('transaction_read_only')::boolean \
     THEN RAISE EXCEPTION 'the server is read-only' USING ERRCODE = '25006'; END IF; END $$";

/// The servers of a database.
#[derive(Debug)]
pub(super) struct PostgresServers {
    url: DatabaseUrl,
    /// The index of the server that was connected to last; it is tried first.
    last_connected: AtomicUsize,
}

impl PostgresServers {
    pub(super) fn new(url: DatabaseUrl) -> Self {
        Self { url, last_connected: AtomicUsize::new(0) }
    }

    /// Opens a session.
    pub(super) async fn connect(&self) -> Result<AnyConnection, sqlx::Error> {
        self.connect_first_available(|server| self.open(server)).await
    }

    /// Opens a session that receives the notifications on `channel`.
    pub(super) async fn listen(&self, channel: &'static str) -> Result<PgListener, sqlx::Error> {
        self.connect_first_available(|server| self.open_listener(server, channel)).await
    }

    /// The result of `open` for the first server for which it succeeds.
    async fn connect_first_available<'a, T, F>(
        &'a self,
        open: impl Fn(&'a Server) -> F,
    ) -> Result<T, sqlx::Error>
    where
        F: Future<Output = Result<T, sqlx::Error>>,
    {
        let mut failures = Vec::new();
        for (at, server) in self.by_preference() {
            let opened = timeout(CONNECT_TIMEOUT, open(server)).await;
            match opened.unwrap_or_else(|_| Err(timeout_error(CONNECT_TIMEOUT))) {
                Ok(opened) => {
                    self.last_connected.store(at, Ordering::Relaxed);
                    return Ok(opened);
                }
                Err(error) => failures.push((server, error)),
            }
        }
        Err(join_failures(failures))
    }

    async fn open(&self, server: &Server) -> Result<AnyConnection, sqlx::Error> {
        let mut connection = options_without_logging(&server.url)?.connect().await?;
        for statement in self.session_setup() {
            connection.execute(*statement).await?;
        }
        Ok(connection)
    }

    async fn open_listener(
        &self,
        server: &Server,
        channel: &'static str,
    ) -> Result<PgListener, sqlx::Error> {
        let check = self.session_setup();
        let options = server.url.parse::<PgConnectOptions>()?.disable_statement_logging();
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .max_lifetime(None)
            .idle_timeout(None)
            .acquire_timeout(CONNECT_TIMEOUT)
            .after_connect(move |connection, _| {
                Box::pin(async move {
                    for statement in check {
                        connection.execute(*statement).await?;
                    }
                    Ok(())
                })
            });
        let mut listener = PgListener::connect_with(&pool.connect_lazy_with(options)).await?;
        listener.ignore_pool_close_event(true);
        listener.listen(channel).await?;
        Ok(listener)
    }

    /// The statements that set up a new session.
    fn session_setup(&self) -> &'static [&'static str] {
        if self.url.needs_writable() {
            &[SESSION_TIMEOUTS_SQL, CHECK_WRITABLE_SQL]
        } else {
            &[SESSION_TIMEOUTS_SQL]
        }
    }

    /// The servers in the order in which they are tried, with their index in the URL.
    fn by_preference(&self) -> impl Iterator<Item = (usize, &Server)> {
        let servers = self.url.servers();
        let begin = self.last_connected.load(Ordering::Relaxed);
        let places = (0..servers.len()).map(move |offset| (begin + offset) % servers.len());
        places.map(|at| (at, &servers[at]))
    }
}

/// Combines the failures of all servers into one error; there is at least one.
fn join_failures(mut failures: Vec<(&Server, sqlx::Error)>) -> sqlx::Error {
    if failures.len() == 1 {
        return failures.swap_remove(0).1;
    }
    let messages = failures.iter().map(|(server, error)| format!("{}: {error}", server.name));
    io::Error::other(messages.collect::<Vec<_>>().join("; ")).into()
}
