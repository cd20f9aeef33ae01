//! What happens without being asked for: changes by other instances are follower, tokens expire,
//! uses are written down, and what is too old is forgotten.
//!
//! A database that is away is told of once, and asked again and again; meanwhile what is in memory
//! stays in force.

use std::{collections::HashSet, time::Duration};

use jiff::Timestamp;
use tokio::time::{Instant, timeout};
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
    let mut follower = Follower { listener: None, is_outdated: true };
    let (mut wait, mut told) = (RETRY.0, None);
    loop {
        match follower.next(database, registry).await {
            Ok(()) => {
                wait = RETRY.0;
                if let Some(LoggedOutage { since, .. }) = told.take() {
                    let away_for = since.elapsed();
                    info!(?away_for, "The control plane's database is back");
                }
            }
            Err(error) => {
                log_outage(&mut told, report(&error));
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY.1);
            }
        }
    }
}

/// What was logged of a database that is away.
struct LoggedOutage {
    since: Instant,
    reason: String,
    /// When another reason may be logged, and how long to wait after that one.
    next: Instant,
    pause: Duration,
}

/// Logs why tokens cannot be read: at once, and again where the reason is another one, though less
/// and less often.
fn log_outage(logged: &mut Option<LoggedOutage>, reason: String) {
    /// How long the first reason stands alone, and the longest pause between others.
    const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(5));
    let now = Instant::now();
    let (since, pause) = match logged {
        Some(logged) if logged.reason == reason || logged.next > now => return,
        Some(logged) => (logged.since, (logged.pause * 2).min(PAUSE.1)),
        None => (now, PAUSE.0),
    };
    warn!(error = reason, "The control plane's database is away; tokens stay as they are");
    *logged = Some(LoggedOutage { since, reason, next: now + pause, pause });
}

/// What is known of changes by others.
struct Follower {
    listener: Option<Listener>,
    /// Whether tokens may have changed since they were read.
    is_outdated: bool,
}

impl Follower {
    /// Waits for a change, or reads the tokens after one.
    async fn next(&mut self, database: &Database, registry: &Registry) -> Result<(), Error> {
        let mut listening = Ok(());
        match &mut self.listener {
            // From here on changes are heard; what changed before is read now. Where they cannot
            // be, tokens are read all the same.
            None => {
                self.is_outdated = true;
                listening = database.listen().await.map(|it| self.listener = Some(it));
            }
            Some(_) if self.is_outdated => {}
            Some(listener) => {
                if let Ok(Err(error)) = timeout(RELOAD, listener.changed()).await {
                    // Whether the database is away is seen when the tokens are read.
                    let error = report(&error);
                    info!(error, "Changes by others were not heard any more; listening anew");
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
