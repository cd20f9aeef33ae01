//! Writes denied operations and failed sign-ins to the audit log, rate limited so that a client in a
//! loop cannot fill the disk.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tracing::warn;

use super::{
    audit::{self, Author, EventKind, NewEvent},
    database::{Database, WriteLock},
    error::Error,
    operator::Actor,
    permissions::MissingPermission,
};
use crate::{
    rate_limit::{KeyedRateLimiter, Rate, RateLimiter, client_network},
    telemetry::error_chain,
};

/// The rate of events for one client network.
const PER_ADDRESS_RATE: Rate = Rate { burst: 20, interval: Duration::from_mins(1) };
/// The rate of events for all clients.
const TOTAL_RATE: Rate = Rate { burst: 1000, interval: Duration::from_secs(10) };

/// Records denials in the audit log within the rate limits.
#[derive(Debug)]
pub(super) struct DenialLog {
    database: Database,
    per_address: KeyedRateLimiter<IpAddr>,
    total: Mutex<RateLimiter>,
    /// The number of events dropped since the last recorded one.
    dropped_count: AtomicU64,
}

/// Why a sign-in failed.
#[derive(Clone, Copy, Debug)]
pub(super) enum SignInFailure {
    WrongPassword,
    Throttled,
}

/// Why an operation was denied.
#[derive(Clone, Copy, Debug)]
pub(super) enum DenialReason {
    /// A permission is missing.
    Permission(MissingPermission),
    /// Another reason, such as a failed authentication or an operation that is never allowed.
    Other(&'static str),
}

impl DenialReason {
    /// The reason in an error; `None` if the error is not a denial.
    pub(super) fn from_error(error: &Error) -> Option<Self> {
        Some(match error {
            Error::MissingPermission(missing) => Self::Permission(*missing),
            Error::LastAdmin => Self::Other("it is the last admin"),
            Error::WrongPassword => Self::Other("wrong password"),
            Error::SessionEnded => Self::Other("the session has ended"),
            Error::RateLimited(_) => Self::Other("too many attempts"),
            _ => return None,
        })
    }
}

impl DenialLog {
    pub(super) fn new(database: Database) -> Self {
        Self {
            database,
            per_address: KeyedRateLimiter::new(PER_ADDRESS_RATE),
            total: Mutex::new(RateLimiter::new(TOTAL_RATE)),
            dropped_count: AtomicU64::new(0),
        }
    }

    /// Records an operation that `actor` was denied.
    pub(super) async fn record_operation(
        &self,
        actor: &Actor,
        operation: &str,
        denial: DenialReason,
    ) {
        let data = match denial {
            DenialReason::Permission(missing) => {
                json!({ "operation": operation, "permission": missing.permission() })
            }
            DenialReason::Other(reason) => json!({ "operation": operation, "reason": reason }),
        };
        let author = Author::from(actor);
        self.record(&author, EventKind::PermissionDenied, data).await;
    }

    /// Records a failed sign-in.
    ///
    /// Callers pass `username` only if such an account exists: an unknown name may be a password that
    /// was typed into the wrong field.
    pub(super) async fn record_sign_in(
        &self,
        username: Option<&str>,
        address: IpAddr,
        reason: SignInFailure,
    ) {
        let reason = match reason {
            SignInFailure::WrongPassword => "wrong password or no such account",
            SignInFailure::Throttled => "too many attempts",
        };
        let author = Author { name: "anonymous", id: None, address: Some(address) };
        let data = json!({ "username": username, "reason": reason });
        self.record(&author, EventKind::SignInRefused, data).await;
    }

    async fn record(&self, author: &Author<'_>, kind: EventKind, mut data: Value) {
        let from = client_network(author.address.unwrap_or(Ipv4Addr::UNSPECIFIED.into()));
        let total = || self.total.lock().unwrap_or_else(PoisonError::into_inner).acquire();
        if self.per_address.acquire(&from).and_then(|()| total()).is_err() {
            self.dropped_count.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let left_out = self.dropped_count.swap(0, Ordering::Relaxed);
        if left_out > 0 {
            data["leftOutBefore"] = left_out.into();
        }
        if let Err(error) = self.write(author, kind, data).await {
            warn!(error = error_chain(&error), "A denial could not be written to the audit log");
        }
    }

    async fn write(&self, author: &Author<'_>, kind: EventKind, data: Value) -> Result<(), Error> {
        let mut transaction = self.database.begin_write(WriteLock::Control).await?;
        let entry = NewEvent { data: Some(data), ..NewEvent::default() };
        audit::record_by(&mut transaction, author, kind, entry).await?;
        transaction.commit().await
    }
}
