//! Writes denied operations and failed sign-ins to the audit log, rate limited so that a client in a
//! loop cannot fill the disk.

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
    telemetry::error_chain,
    throttle::{KeyedRateLimiter, Rate, client_network},
};

/// The rate of events for one client network.
const OF_ONE: Rate = Rate { burst: 20, interval: Duration::from_mins(1) };
/// The rate of events for all clients.
const OF_ALL: Rate = Rate { burst: 1000, interval: Duration::from_secs(10) };

/// Records denials in the audit log within the rate limits.
#[derive(Debug)]
pub(super) struct Refusals {
    database: Database,
    of_one: KeyedRateLimiter<IpAddr>,
    of_all: KeyedRateLimiter<()>,
    /// The number of events dropped since the last recorded one.
    left_out: AtomicU64,
}

/// Why a sign-in failed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reason {
    WrongPassword,
    Throttled,
}

/// Why an operation was denied.
#[derive(Clone, Copy, Debug)]
pub(super) enum Denial {
    /// A permission is missing.
    Permission(Missing),
    /// Another reason, such as a failed authentication or an operation that is never allowed.
    Reason(&'static str),
}

impl Denial {
    /// The reason in an error; `None` if the error is not a denial.
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
        let (of_one, of_all) = (KeyedRateLimiter::new(OF_ONE), KeyedRateLimiter::new(OF_ALL));
        Self { database, of_one, of_all, left_out: AtomicU64::new(0) }
    }

    /// Records an operation that `actor` was denied.
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

    /// Records a failed sign-in.
    ///
    /// Callers pass `username` only if such an account exists: an unknown name may be a password that
    /// was typed into the wrong field.
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
        let from = client_network(author.address.unwrap_or(Ipv4Addr::UNSPECIFIED.into()));
        if self.of_one.acquire(&from).and_then(|()| self.of_all.acquire(&())).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let left_out = self.left_out.swap(0, Ordering::Relaxed);
        if left_out > 0 {
            data["leftOutBefore"] = left_out.into();
        }
        if let Err(error) = self.write(author, kind, data).await {
            warn!(error = error_chain(&error), "A denial could not be written to the audit log");
        }
    }

    async fn write(&self, author: &Author<'_>, kind: EventKind, data: Value) -> Result<(), Error> {
        let mut transaction = self.database.write(Lane::Control).await?;
        let entry = Entry { data: Some(data), ..Entry::default() };
        audit::record_by(&mut transaction, author, kind, entry).await?;
        transaction.commit().await
    }
}
