//! A reference to an open session, and the limits of its age.

use jiff::SignedDuration;
use sqlx::{Row as _, any::AnyRow};

use super::{
    database::{Connection, now, timestamp_from_millis},
    error::Error,
};

/// A reference to a session by the public half of its cookie, which does not authenticate.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SessionRef {
    pub(super) selector: String,
    pub(super) limits: SessionLimits,
}

impl SessionRef {
    /// The key of the session in the database.
    pub(super) fn selector(&self) -> &str {
        &self.selector
    }

    /// Fails unless this is an open session of the account `id`, as `transaction` sees it.
    pub(super) async fn require_open(
        &self,
        transaction: &mut Connection,
        id: i64,
    ) -> Result<(), Error> {
        let row = sqlx::query("SELECT * FROM sessions WHERE selector = $1 AND account_id = $2")
            .bind(&self.selector)
            .bind(id)
            .fetch_optional(transaction)
            .await?;
        match row {
            Some(row) if !self.limits.is_exceeded_by(&row)? => Ok(()),
            _ => Err(Error::SessionEnded),
        }
    }

    /// A reference to no session.
    #[cfg(test)]
    pub(super) fn example() -> Self {
        let limits = SessionLimits { idle: SignedDuration::MAX, lifetime: SignedDuration::MAX };
        Self { selector: String::new(), limits }
    }
}

/// The timeouts of sessions.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct SessionLimits {
    /// The time after the last request.
    pub(super) idle: SignedDuration,
    /// The time after the sign-in.
    pub(super) lifetime: SignedDuration,
}

impl SessionLimits {
    /// Whether the session in a row has ended.
    pub(super) fn is_exceeded_by(self, row: &AnyRow) -> Result<bool, sqlx::Error> {
        let age = |column| -> Result<_, sqlx::Error> {
            Ok(now().duration_since(timestamp_from_millis(row.try_get(column)?)))
        };
        Ok(age("seen_at")? > self.idle || age("created_at")? > self.lifetime)
    }
}
