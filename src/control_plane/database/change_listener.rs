//! Detects changes of the database by other connections: notifications of PostgreSQL, polling of SQLite.

use std::time::Duration;

use sqlx::{Executor as _, postgres::PgListener};
use tokio::time::timeout;

use super::{
    super::error::Error,
    connection::{Connection, timeout_error},
};

/// A dedicated connection that detects changes by others.
pub(in crate::control_plane) enum ChangeListener {
    /// Polls the file's `data_version`.
    Sqlite { connection: Box<Connection>, version: i64 },
    /// Receives notifications of the server.
    Postgres(Box<PgListener>),
}

impl ChangeListener {
    pub(super) async fn sqlite(mut connection: Connection) -> Result<Self, Error> {
        let version = data_version(&mut connection).await?;
        Ok(Self::Sqlite { connection: Box::new(connection), version })
    }

    /// Returns after a change, or when one may have been missed. Fails within 4 seconds if the
    /// connection is lost.
    pub(in crate::control_plane) async fn wait_for_change(&mut self) -> Result<(), Error> {
        /// The polling interval of SQLite.
        const INTERVAL: Duration = Duration::from_millis(250);
        /// The time without a notification after which the server is pinged, and the timeout of the
        /// ping.
        const SILENCE: Duration = Duration::from_secs(2);
        match self {
            Self::Sqlite { connection, version } => loop {
                tokio::time::sleep(INTERVAL).await;
                let now = data_version(connection).await?;
                if std::mem::replace(version, now) != now {
                    return Ok(());
                }
            },
            Self::Postgres(listener) => loop {
                // `None` means that the connection was lost and reopened.
                if let Ok(notification) = timeout(SILENCE, listener.try_recv()).await {
                    notification?;
                    return Ok(());
                }
                let ping = timeout(SILENCE, (&mut **listener).execute("SELECT 1")).await;
                ping.unwrap_or_else(|_| Err(timeout_error(SILENCE)))?;
            },
        }
    }
}

/// A number that changes with each change by another connection.
async fn data_version(connection: &mut Connection) -> Result<i64, Error> {
    Ok(sqlx::query_scalar("PRAGMA data_version").fetch_one(connection).await?)
}
