//! Hears of changes by others.

use std::time::Duration;

use sqlx::{Executor as _, postgres::PgListener};
use tokio::time::timeout;

use super::{
    super::error::Error,
    connection::{Connection, no_answer},
};

/// A connection of its own, which hears of changes by others.
pub(in crate::control) enum Listener {
    /// The file's version, looked at.
    Sqlite { connection: Box<Connection>, version: i64 },
    /// Notifications, told by the server.
    Postgres(Box<PgListener>),
}

impl Listener {
    pub(super) async fn of_file(mut connection: Connection) -> Result<Self, Error> {
        let version = data_version(&mut connection).await?;
        Ok(Self::Sqlite { connection: Box::new(connection), version })
    }

    /// Returns after a change, or when there may have been one. Fails within seconds where nothing
    /// can be heard any more.
    pub(in crate::control) async fn changed(&mut self) -> Result<(), Error> {
        /// How often the file of SQLite is looked at.
        const INTERVAL: Duration = Duration::from_millis(250);
        /// After which silence a server is asked whether it is there, and how long it may take to
        /// answer.
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
                // `None` is a connection that was lost and made anew.
                if let Ok(told) = timeout(SILENCE, listener.try_recv()).await {
                    told?;
                    return Ok(());
                }
                let answer = timeout(SILENCE, (&mut **listener).execute("SELECT 1")).await;
                answer.unwrap_or_else(|_| Err(no_answer(SILENCE)))?;
            },
        }
    }
}

/// A number that is another one after each change by another connection.
async fn data_version(connection: &mut Connection) -> Result<i64, Error> {
    Ok(sqlx::query_scalar("PRAGMA data_version").fetch_one(connection).await?)
}
