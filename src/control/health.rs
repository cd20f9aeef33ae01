//! How the database is doing, for operators: whether it answers, how fast, and how old what is in
//! memory has become.
//!
//! Nothing is decided by it: a request tries its luck whatever is noted here.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use metrics::{Unit, describe_gauge, describe_histogram, gauge, histogram};
use tokio::time::Instant;

use crate::telemetry::report;

const REACHABLE: &str = "parapet_database_reachable";
const CONNECTIONS: &str = "parapet_database_connections";
const SECONDS: &str = "parapet_database_seconds";
const AGE: &str = "parapet_registry_age_seconds";
const STORED: &str = "parapet_usage_storing";

/// What is timed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation {
    Connect,
    Statement,
    Commit,
}

/// How the database is doing. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Health(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// Since when it has not answered.
    away_since: Option<Timestamp>,
    last_error: Option<(Timestamp, String)>,
    /// When the tokens were last read, by a query that began then.
    last_reload: Option<Instant>,
    /// Since when usage could not be stored.
    usage_waits_since: Option<Timestamp>,
}

/// What there is to see of the database.
#[derive(Clone, Debug)]
pub struct DatabaseStatus {
    /// Where it is, without its user and password.
    pub location: String,
    /// Since when it has not answered; `None` where it does.
    pub away_since: Option<Timestamp>,
    /// The last failure of a connection or a statement, whether mended since or not.
    pub last_error: Option<(Timestamp, String)>,
    /// How long ago the tokens in memory were read.
    pub registry_age: Option<Duration>,
    /// Since when usage waits that could not be stored.
    pub usage_waits_since: Option<Timestamp>,
    /// The connections.
    pub connections: ConnectionCount,
}

/// How many connections there are; those that hear of changes are apart.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ConnectionCount {
    /// In use.
    pub busy: usize,
    /// Open, and waiting for work.
    pub idle: usize,
    /// How many there may be.
    pub limit: usize,
}

impl Health {
    pub(super) fn new() -> Self {
        describe_gauge!(REACHABLE, "Whether the control plane's database answers: 1 or 0");
        describe_gauge!(CONNECTIONS, "Connections to the control plane's database by their state");
        describe_histogram!(SECONDS, Unit::Seconds, "What the control plane's database takes");
        let age = "Time since the tokens in memory were read from the control plane's database";
        describe_gauge!(AGE, Unit::Seconds, age);
        describe_gauge!(STORED, "Whether reported usage can be stored: 1 or 0");
        Self(Arc::new(Mutex::new(State {
            away_since: None,
            last_error: None,
            last_reload: None,
            usage_waits_since: None,
        })))
    }

    /// Notes how an operation ended that took so long.
    ///
    /// An error that the server itself has told shows that it answers.
    pub(super) fn record(&self, what: Operation, took: Duration, error: Option<&sqlx::Error>) {
        let operation = match what {
            Operation::Connect => "connect",
            Operation::Statement => "statement",
            Operation::Commit => "commit",
        };
        histogram!(SECONDS, "operation" => operation).record(took);
        let answers = match (what, error) {
            (_, None) => true,
            (Operation::Connect, Some(_)) => false,
            (Operation::Statement | Operation::Commit, Some(error)) => {
                matches!(error, sqlx::Error::Database(_))
            }
        };
        let mut state = self.lock();
        if answers {
            state.away_since = None;
        } else {
            state.away_since.get_or_insert_with(Timestamp::now);
        }
        if let Some(error) = error {
            state.last_error = Some((Timestamp::now(), report(error)));
        }
    }

    /// Notes that what is in memory was read at this time.
    pub(super) fn record_reload(&self, begun: Instant) {
        self.lock().last_reload = Some(begun);
    }

    /// Notes whether usage could be stored; true where that has changed.
    pub(super) fn record_usage(&self, is_stored: bool) -> bool {
        let mut state = self.lock();
        let was_stored = state.usage_waits_since.is_none();
        if is_stored {
            state.usage_waits_since = None;
        } else {
            state.usage_waits_since.get_or_insert_with(Timestamp::now);
        }
        was_stored != is_stored
    }

    pub(super) fn status(&self, location: String, connections: ConnectionCount) -> DatabaseStatus {
        let state = self.lock();
        DatabaseStatus {
            location,
            away_since: state.away_since,
            last_error: state.last_error.clone(),
            registry_age: state.last_reload.map(|at| at.elapsed()),
            usage_waits_since: state.usage_waits_since,
            connections,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DatabaseStatus {
    /// Writes the gauges of the Prometheus registry.
    #[expect(clippy::cast_precision_loss, reason = "there are a few connections")]
    pub fn measure(&self) {
        let flag = |is_set| if is_set { 1.0 } else { 0.0 };
        gauge!(REACHABLE).set(flag(self.away_since.is_none()));
        gauge!(STORED).set(flag(self.usage_waits_since.is_none()));
        gauge!(AGE).set(self.registry_age.map_or(f64::INFINITY, |age| age.as_secs_f64()));
        gauge!(CONNECTIONS, "state" => "busy").set(self.connections.busy as f64);
        gauge!(CONNECTIONS, "state" => "idle").set(self.connections.idle as f64);
    }
}
