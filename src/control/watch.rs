//! What happens without being asked for: changes by other instances are followed, tokens expire,
//! uses are written down, and what is too old is forgotten.
//!
//! A database that is away is told of once, and asked again and again; meanwhile what is in memory
//! stays in force.

use std::{collections::HashSet, time::Duration};

use jiff::Timestamp;
use tracing::{debug, info, warn};

use super::{
    audit,
    database::{Database, Listener},
    error::Error,
    registry::Registry,
    sessions::Sessions,
    usage,
};
use crate::{auth::Authenticator, telemetry::report};

/// How often tokens are read although nobody said that they changed: a connection may be dead
/// without knowing.
const RELOAD: Duration = Duration::from_secs(10);
/// How long to wait before a database that failed is asked again, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How often the uses of tokens are written down.
const NOTE_USES: Duration = Duration::from_secs(10);
/// How often what is too old is looked for.
const PRUNE: Duration = Duration::from_mins(10);

/// How long things are kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retention {
    pub(super) events: Option<Duration>,
    pub(super) usage: Duration,
}

/// Reads what others change, until dropped.
pub(super) async fn follow(database: &Database, registry: &Registry) {
    let (mut listener, mut wait, mut is_away) = (None, RETRY.0, false);
    loop {
        match next(database, registry, &mut listener).await {
            Ok(()) => {
                wait = RETRY.0;
                if std::mem::take(&mut is_away) {
                    info!("The control plane's database is back");
                }
            }
            Err(error) => {
                listener = None;
                if !std::mem::replace(&mut is_away, true) {
                    let error = report(&error);
                    warn!(error, "The control plane's database is away; tokens stay as they are");
                }
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY.1);
            }
        }
    }
}

/// Reads the tokens once, after a change or a while.
async fn next(
    database: &Database,
    registry: &Registry,
    listener: &mut Option<Listener>,
) -> Result<(), Error> {
    match listener {
        Some(listener) => {
            if let Ok(changed) = tokio::time::timeout(RELOAD, listener.changed()).await {
                changed?;
            }
        }
        // From here on changes are heard; what changed before is read now.
        None => *listener = Some(database.listen().await?),
    }
    registry.reload().await
}

/// Drops tokens as they expire, until dropped.
pub(super) async fn expire(registry: &Registry) {
    /// Not longer, because clocks are set and tokens come that expire sooner.
    const LONGEST: Duration = Duration::from_millis(500);
    let mut looked = Timestamp::now();
    loop {
        let next = registry.next_expiry(looked);
        let left = next.map_or(LONGEST, |at| {
            Duration::try_from(Timestamp::now().duration_until(at)).unwrap_or_default()
        });
        tokio::time::sleep(left.min(LONGEST)).await;
        let now = Timestamp::now();
        // Asked again: a token may have come and expired meanwhile.
        if registry.next_expiry(looked).is_some_and(|at| at <= now) {
            registry.publish();
        }
        looked = now;
    }
}

/// Writes down which tokens are used, until dropped.
pub(super) async fn note_uses(registry: &Registry, auth: &Authenticator) {
    let mut used = HashSet::new();
    loop {
        tokio::time::sleep(NOTE_USES).await;
        used.extend(auth.take_used());
        match registry.note_uses(&used).await {
            Ok(()) => used.clear(),
            Err(error) => debug!(error = report(&error), "Uses of tokens are written later"),
        }
    }
}

/// Forgets what is too old, until dropped.
pub(super) async fn prune(database: &Database, sessions: &Sessions, retention: Retention) {
    loop {
        if let Err(error) = prune_once(database, sessions, retention).await {
            debug!(error = report(&error), "What is too old is forgotten later");
        }
        tokio::time::sleep(PRUNE).await;
    }
}

async fn prune_once(
    database: &Database,
    sessions: &Sessions,
    retention: Retention,
) -> Result<(), Error> {
    sessions.prune().await?;
    usage::prune(database, past(retention.usage)).await?;
    match retention.events {
        Some(age) => audit::prune(database, past(age)).await,
        None => Ok(()),
    }
}

/// So long ago.
fn past(age: Duration) -> Timestamp {
    Timestamp::now().checked_sub(age).unwrap_or(Timestamp::UNIX_EPOCH)
}
