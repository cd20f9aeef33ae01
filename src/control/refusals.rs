//! What was refused, noted without letting a loop fill the disk.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use serde_json::{Value, json};
use tracing::warn;

use super::{
    audit::{self, Author, Entry, EventKind},
    database::{Database, Lane},
    error::Error,
    permission::{Actor, Missing},
};
use crate::{
    telemetry::report,
    throttle::{Buckets, Rate, origin},
};

/// How many events one origin may cause.
const OF_ONE: Rate = Rate { burst: 20, every: Duration::from_mins(1) };
/// How many events all may cause.
const OF_ALL: Rate = Rate { burst: 1000, every: Duration::from_secs(10) };

/// Notes refusals, as many as may be.
#[derive(Debug)]
pub(super) struct Refusals {
    database: Database,
    of_one: Buckets<IpAddr>,
    of_all: Buckets<()>,
    /// How many were not noted since the last that was.
    left_out: AtomicU64,
}

/// Why a sign-in was refused.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reason {
    WrongPassword,
    Throttled,
}

/// Why an operation was denied.
#[derive(Clone, Copy, Debug)]
pub(super) enum Denial {
    /// A right is lacking.
    Permission(Missing),
    /// Nobody may do it, or who does it has not shown to be who it is.
    Reason(&'static str),
}

impl Denial {
    /// What an error says of it; `None` for one that denies nothing.
    pub(super) fn of(error: &Error) -> Option<Self> {
        Some(match error {
            Error::Missing(missing) => Self::Permission(*missing),
            Error::LastAdmin => Self::Reason("it is the last admin"),
            Error::WrongPassword => Self::Reason("wrong password"),
            Error::SessionEnded => Self::Reason("the session has ended"),
            Error::Throttled(_) => Self::Reason("too many attempts"),
            _ => return None,
        })
    }
}

impl Refusals {
    pub(super) fn new(database: Database) -> Self {
        let (of_one, of_all) = (Buckets::new(OF_ONE), Buckets::new(OF_ALL));
        Self { database, of_one, of_all, left_out: AtomicU64::new(0) }
    }

    /// Notes an operation that `actor` was denied.
    pub(super) async fn operation(&self, actor: &Actor, operation: &str, denial: Denial) {
        let data = match denial {
            Denial::Permission(missing) => {
                json!({ "operation": operation, "permission": missing.permission() })
            }
            Denial::Reason(reason) => json!({ "operation": operation, "reason": reason }),
        };
        let author = Author::from(actor);
        self.note(&author, EventKind::PermissionDenied, data).await;
    }

    /// Notes an attempt to sign in.
    ///
    /// The name is that of an account, if there is one: a text that names nobody may be a password
    /// that somebody typed into the wrong field.
    pub(super) async fn sign_in(&self, username: Option<&str>, address: IpAddr, reason: Reason) {
        let reason = match reason {
            Reason::WrongPassword => "wrong password or no such account",
            Reason::Throttled => "too many attempts",
        };
        let author = Author { name: "anonymous", id: None, address: Some(address) };
        let data = json!({ "username": username, "reason": reason });
        self.note(&author, EventKind::SignInRefused, data).await;
    }

    async fn note(&self, author: &Author<'_>, kind: EventKind, mut data: Value) {
        let from = origin(author.address.unwrap_or(Ipv4Addr::UNSPECIFIED.into()));
        if self.of_one.take(&from).and_then(|()| self.of_all.take(&())).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let left_out = self.left_out.swap(0, Ordering::Relaxed);
        if left_out > 0 {
            data["leftOutBefore"] = left_out.into();
        }
        if let Err(error) = self.write(author, kind, data).await {
            warn!(error = report(&error), "A refusal could not be noted in the audit log");
        }
    }

    async fn write(&self, author: &Author<'_>, kind: EventKind, data: Value) -> Result<(), Error> {
        let mut transaction = self.database.write(Lane::Control).await?;
        let entry = Entry { data: Some(data), ..Entry::default() };
        audit::record_by(&mut transaction, author, kind, entry).await?;
        transaction.commit().await
    }
}
