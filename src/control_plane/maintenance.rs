//! Background work: follows token changes by other instances, expires tokens, records token uses, and
//! prunes old rows.
//!
//! If the database is unreachable, this is logged once and retried; meanwhile the tokens in memory stay
//! valid.

use std::{collections::HashSet, time::Duration};

use jiff::Timestamp;
use tokio::time::{Instant, timeout};
use tracing::{debug, info, warn};

use super::{
    audit,
    database::{ChangeListener, Database},
    error::Error,
    sessions::Sessions,
    token_registry::TokenRegistry,
    usage_store,
};
use crate::{auth::Authenticator, backoff::Backoff, telemetry::error_chain};

/// The interval at which tokens are read even without a notification, because a dead connection may go
/// unnoticed.
const RELOAD_INTERVAL: Duration = Duration::from_secs(10);
/// The delays before retries after failures of the database.
const RETRY_DELAYS: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
/// The interval at which token uses are stored.
const USE_RECORD_INTERVAL: Duration = Duration::from_secs(10);
/// The interval of pruning.
const PRUNE_INTERVAL: Duration = Duration::from_mins(10);

/// The retention of events and usage; `None` keeps events forever.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retention {
    pub(super) events: Option<Duration>,
    pub(super) usage: Duration,
}

/// Follows token changes by other instances until dropped.
pub(super) async fn follow_changes(database: &Database, registry: &TokenRegistry) {
    let mut follower = ChangeFollower { listener: None, is_outdated: true };
    let (mut backoff, mut outage) = (RETRY_DELAYS, None);
    loop {
        match follower.reload_next(database, registry).await {
            Ok(()) => {
                backoff.reset();
                if let Some(LoggedOutage { since, .. }) = outage.take() {
                    let away_for = since.elapsed();
                    info!(?away_for, "The control plane's database is reachable again");
                }
            }
            Err(error) => {
                log_outage(&mut outage, error_chain(&error));
                tokio::time::sleep(backoff.next_delay(None, rand::random())).await;
            }
        }
    }
}

/// An outage of the database that has been logged.
struct LoggedOutage {
    since: Instant,
    reason: String,
    /// The earliest time to log another reason.
    next_log_at: Instant,
    pauses: Backoff,
}

/// Logs why tokens cannot be read. A changed reason is logged again, with increasing pauses.
fn log_outage(logged: &mut Option<LoggedOutage>, reason: String) {
    const PAUSES: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_mins(5));
    let now = Instant::now();
    let (since, mut pauses) = match logged {
        Some(logged) if logged.reason == reason || logged.next_log_at > now => return,
        Some(logged) => (logged.since, logged.pauses),
        None => (now, PAUSES),
    };
    warn!(error = reason, "The control plane's database is unreachable; tokens stay as last read");
    let next_log_at = now + pauses.next_delay(None, 1.0);
    *logged = Some(LoggedOutage { since, reason, next_log_at, pauses });
}

/// The state of following changes by others.
struct ChangeFollower {
    listener: Option<ChangeListener>,
    /// Whether tokens may have changed since they were read.
    is_outdated: bool,
}

impl ChangeFollower {
    /// Waits for a change, or reads the tokens after one.
    async fn reload_next(
        &mut self,
        database: &Database,
        registry: &TokenRegistry,
    ) -> Result<(), Error> {
        let mut listening = Ok(());
        match &mut self.listener {
            // The listener covers changes from now on; earlier ones are read below. If listening
            // fails, tokens are read nevertheless.
            None => {
                self.is_outdated = true;
                listening = database.listen().await.map(|it| self.listener = Some(it));
            }
            Some(_) if self.is_outdated => {}
            Some(listener) => {
                if let Ok(Err(error)) = timeout(RELOAD_INTERVAL, listener.wait_for_change()).await {
                    // Reading the tokens below shows whether the database is unreachable.
                    let error = error_chain(&error);
                    info!(error, "The connection for change notifications was lost; reconnecting");
                    self.listener = None;
                }
                self.is_outdated = true;
            }
        }
        registry.reload().await?;
        self.is_outdated = false;
        listening
    }
}

/// Publishes the valid tokens whenever one expires, until dropped.
pub(super) async fn expire_tokens(registry: &TokenRegistry) {
    /// The maximum sleep, because the clock may be set and a new token may expire sooner.
    const LONGEST: Duration = Duration::from_millis(500);
    let mut looked = Timestamp::now();
    loop {
        let next = registry.next_expiry(looked);
        let left = next.map_or(LONGEST, |at| {
            Duration::try_from(Timestamp::now().duration_until(at)).unwrap_or_default()
        });
        tokio::time::sleep(left.min(LONGEST)).await;
        let now = Timestamp::now();
        // Checked again: a token may have been created and have expired during the sleep.
        if registry.next_expiry(looked).is_some_and(|at| at <= now) {
            registry.publish_grants();
        }
        looked = now;
    }
}

/// Stores the uses of tokens until dropped.
pub(super) async fn record_token_uses(registry: &TokenRegistry, auth: &Authenticator) {
    let mut used = HashSet::new();
    loop {
        tokio::time::sleep(USE_RECORD_INTERVAL).await;
        used.extend(auth.take_used_local_tokens());
        match registry.record_uses(&used).await {
            Ok(()) => used.clear(),
            Err(error) => {
                debug!(
                    error = error_chain(&error),
                    "Token uses could not be stored; retrying later"
                );
            }
        }
    }
}

/// Prunes old rows until dropped.
pub(super) async fn run_pruning(database: &Database, sessions: &Sessions, retention: Retention) {
    loop {
        if let Err(error) = prune_once(database, sessions, retention).await {
            debug!(error = error_chain(&error), "Pruning failed; retrying later");
        }
        tokio::time::sleep(PRUNE_INTERVAL).await;
    }
}

async fn prune_once(
    database: &Database,
    sessions: &Sessions,
    retention: Retention,
) -> Result<(), Error> {
    sessions.prune().await?;
    usage_store::prune(database, ago(retention.usage)).await?;
    match retention.events {
        Some(age) => audit::prune(database, ago(age)).await,
        None => Ok(()),
    }
}

/// The time `age` before now.
fn ago(age: Duration) -> Timestamp {
    Timestamp::now().checked_sub(age).unwrap_or(Timestamp::UNIX_EPOCH)
}
