//! The health of the database, for operators: reachability, latency, and the age of the tokens in
//! memory.
//!
//! It is informational only: requests try the database regardless of it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use metrics::{Unit, describe_gauge, describe_histogram, gauge, histogram};
use tokio::time::Instant;

use crate::telemetry::error_chain;

const REACHABLE: &str = "parapet_database_reachable";
const CONNECTIONS: &str = "parapet_database_connections";
const OPERATION_SECONDS: &str = "parapet_database_seconds";
const REGISTRY_AGE: &str = "parapet_registry_age_seconds";
const USAGE_STORING: &str = "parapet_usage_storing";

/// The operations whose duration is measured.
#[derive(Clone, Copy, Debug)]
pub(super) enum DatabaseOperation {
    Connect,
    Statement,
    Commit,
}

/// The health of the database. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct DatabaseHealth(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// The start of the current outage.
    unreachable_since: Option<Timestamp>,
    last_error: Option<(Timestamp, String)>,
    /// The start of the latest successful query of the tokens.
    last_reload: Option<Instant>,
    /// The time since which usage cannot be stored.
    usage_failing_since: Option<Timestamp>,
}

/// The status of the database for display.
#[derive(Clone, Debug)]
pub struct DatabaseStatus {
    /// Its location without user and password.
    pub location: String,
    /// The start of the current outage; `None` while the database responds.
    pub unreachable_since: Option<Timestamp>,
    /// The last failure of a connection or a statement, even if later ones succeeded.
    pub last_error: Option<(Timestamp, String)>,
    /// The age of the tokens in memory.
    pub registry_age: Option<Duration>,
    /// The time since which usage cannot be stored and stays queued.
    pub usage_failing_since: Option<Timestamp>,
    /// The connections of the pool.
    pub connections: ConnectionCount,
}

/// The number of connections in the pool; those of listeners are not included.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ConnectionCount {
    /// In use.
    pub busy: usize,
    /// Open and idle.
    pub idle: usize,
    /// The maximum number.
    pub limit: usize,
}

impl DatabaseHealth {
    pub(super) fn new() -> Self {
        describe_gauge!(REACHABLE, "Whether the control plane's database responds: 1 or 0");
        describe_gauge!(CONNECTIONS, "Connections to the control plane's database by their state");
        describe_histogram!(
            OPERATION_SECONDS,
            Unit::Seconds,
            "Duration of operations on the control plane's database"
        );
        let age = "Time since the tokens in memory were read from the control plane's database";
        describe_gauge!(REGISTRY_AGE, Unit::Seconds, age);
        describe_gauge!(USAGE_STORING, "Whether reported usage can be stored: 1 or 0");
        Self(Arc::new(Mutex::new(State {
            unreachable_since: None,
            last_error: None,
            last_reload: None,
            usage_failing_since: None,
        })))
    }

    /// Records the duration and the outcome of an operation.
    ///
    /// An error message from the server itself proves that it is reachable.
    pub(super) fn record(
        &self,
        what: DatabaseOperation,
        took: Duration,
        error: Option<&sqlx::Error>,
    ) {
        let operation = match what {
            DatabaseOperation::Connect => "connect",
            DatabaseOperation::Statement => "statement",
            DatabaseOperation::Commit => "commit",
        };
        histogram!(OPERATION_SECONDS, "operation" => operation).record(took);
        let answers = match (what, error) {
            (_, None) => true,
            (DatabaseOperation::Connect, Some(_)) => false,
            (DatabaseOperation::Statement | DatabaseOperation::Commit, Some(error)) => {
                matches!(error, sqlx::Error::Database(_))
            }
        };
        let mut state = self.lock();
        if answers {
            state.unreachable_since = None;
        } else {
            state.unreachable_since.get_or_insert_with(Timestamp::now);
        }
        if let Some(error) = error {
            state.last_error = Some((Timestamp::now(), error_chain(error)));
        }
    }

    /// Records that the tokens in memory were read by a query that began at this time.
    pub(super) fn record_reload(&self, begun: Instant) {
        self.lock().last_reload = Some(begun);
    }

    /// Records whether usage could be stored; true if that has changed.
    pub(super) fn record_usage(&self, is_stored: bool) -> bool {
        let mut state = self.lock();
        let was_stored = state.usage_failing_since.is_none();
        if is_stored {
            state.usage_failing_since = None;
        } else {
            state.usage_failing_since.get_or_insert_with(Timestamp::now);
        }
        was_stored != is_stored
    }

    pub(super) fn status(&self, location: String, connections: ConnectionCount) -> DatabaseStatus {
        let state = self.lock();
        DatabaseStatus {
            location,
            unreachable_since: state.unreachable_since,
            last_error: state.last_error.clone(),
            registry_age: state.last_reload.map(|at| at.elapsed()),
            usage_failing_since: state.usage_failing_since,
            connections,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DatabaseStatus {
    /// Updates the gauges of the Prometheus registry.
    #[expect(clippy::cast_precision_loss, reason = "there are a few connections")]
    pub fn record_metrics(&self) {
        let flag = |is_set| if is_set { 1.0 } else { 0.0 };
        gauge!(REACHABLE).set(flag(self.unreachable_since.is_none()));
        gauge!(USAGE_STORING).set(flag(self.usage_failing_since.is_none()));
        gauge!(REGISTRY_AGE).set(self.registry_age.map_or(f64::INFINITY, |age| age.as_secs_f64()));
        gauge!(CONNECTIONS, "state" => "busy").set(self.connections.busy as f64);
        gauge!(CONNECTIONS, "state" => "idle").set(self.connections.idle as f64);
    }
}
