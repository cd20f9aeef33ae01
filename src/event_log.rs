//! Follows upstream's event log, so that only what has changed is requested.
//!
//! Unleash logs every change of a flag, an environment or a token as an event, and refreshes its own caches
//! by these events. One small request per interval tells whether any was added. While that works, flags,
//! tokens and environments are requested when they changed, and otherwise only every
//! [`RECONCILE_INTERVAL`], in case a change was not logged. While it does not work, each is polled at its
//! own interval.
//!
//! This module neither requests nor knows flags and tokens: `sync` and `auth` do. Reading the log needs an
//! admin token.

mod position;

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tracing::info;

use self::position::{Difference, Position};
use crate::{
    backoff::{Backoff, jittered},
    protocol::event_log::{ChangedSubject, LoggedEvent},
    telemetry::error_chain,
    token::Environment,
    upstream::{self, AdminToken, Upstream},
};

/// The interval at which everything is requested although the log shows no change.
pub const RECONCILE_INTERVAL: Duration = Duration::from_mins(10);

/// The delay before the next attempt if upstream has no event log.
const MISSING_RETRY_DELAY: Duration = Duration::from_mins(10);

/// The longest delay between requests that fail, unless the interval is longer.
const MAX_RETRY_DELAY: Duration = Duration::from_mins(1);

/// The maximum number of environments whose changes are told apart.
const MAX_ENVIRONMENTS: usize = 1_000;

/// The latest changes of one kind of object that the log has shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Observed {
    /// A request that started before this time may have missed the last change.
    pub changed_at: Instant,
    /// Nothing else had changed at this time.
    pub checked_at: Instant,
}

/// When to request a list from upstream again, after a request that started at `started` and succeeded:
/// once it changed. While the log cannot be read, that is after `interval`, and otherwise after
/// `reconcile_interval` at the latest. `jitter` is from 0 to 1.
pub fn next_list_at(
    observed: Option<Observed>,
    started: Instant,
    (interval, reconcile_interval): (Duration, Duration),
    jitter: f64,
) -> Instant {
    match observed {
        None => started + jittered(interval, jitter),
        Some(Observed { changed_at, .. }) if started < changed_at => changed_at,
        Some(_) => started + jittered(interval.max(reconcile_interval), jitter),
    }
}

/// A view of the event log. A cheap handle; each clone waits for changes by itself.
#[derive(Clone, Debug)]
pub struct EventLog(watch::Receiver<Option<Arc<Observations>>>);

impl EventLog {
    /// A log that is never available.
    pub fn unavailable() -> Self {
        Self(watch::Sender::new(None).subscribe())
    }

    /// Waits until the log was read, or cannot be read any more. Never returns for an unavailable log.
    /// Dropping the future is safe.
    pub async fn updated(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// What the log has shown about the flags of an environment; `None` while it cannot be read.
    pub fn flags(&self, environment: &Environment) -> Option<Observed> {
        self.observed(|it| it.flags.max(it.flags_of.get(environment).copied().unwrap_or(it.flags)))
    }

    /// What the log has shown about environments; `None` while it cannot be read.
    pub fn environments(&self) -> Option<Observed> {
        self.observed(|it| it.environments)
    }

    /// What the log has shown about API tokens; `None` while it cannot be read.
    pub fn tokens(&self) -> Option<Observed> {
        self.observed(|it| it.tokens)
    }

    fn observed(&self, changed_at: impl Fn(&Observations) -> Instant) -> Option<Observed> {
        let latest = self.0.borrow();
        let latest = latest.as_ref()?;
        Some(Observed { changed_at: changed_at(latest), checked_at: latest.checked_at })
    }
}

/// When the log was read, and when it showed the last change of each kind of object.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Observations {
    checked_at: Instant,
    tokens: Instant,
    environments: Instant,
    /// Of flags in all environments.
    flags: Instant,
    /// Of flags in a single environment.
    flags_of: HashMap<Environment, Instant>,
}

impl Observations {
    /// Everything may have changed until `now`.
    fn all_changed(checked_at: Instant, now: Instant) -> Self {
        let flags_of = HashMap::new();
        Self { checked_at, tokens: now, environments: now, flags: now, flags_of }
    }

    /// These events were added until `now`.
    fn after(&self, events: &[LoggedEvent], checked_at: Instant, now: Instant) -> Self {
        let mut next = Self { checked_at, ..self.clone() };
        for event in events {
            match (event.subject, &event.environment) {
                (ChangedSubject::Token, _) => next.tokens = now,
                (ChangedSubject::Flag, Some(environment))
                    if next.flags_of.len() < MAX_ENVIRONMENTS =>
                {
                    next.flags_of.insert(environment.clone(), now);
                }
                (ChangedSubject::Flag, _) => next.flags = now,
                (ChangedSubject::Other, _) => return Self::all_changed(checked_at, now),
            }
        }
        next
    }
}

/// Why the log cannot be read.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("upstream has no event log that the admin token can read")]
    Missing,
    #[error(transparent)]
    Upstream(#[from] upstream::Error),
}

/// Reads the event log at an interval.
#[derive(Debug)]
pub struct EventLogFollower {
    upstream: Upstream,
    admin: AdminToken,
    interval: Duration,
    latest: watch::Sender<Option<Arc<Observations>>>,
}

impl EventLogFollower {
    /// A follower of the log that `admin` may read; [`run`](Self::run) does the reading.
    pub fn new(upstream: Upstream, admin: AdminToken, interval: Duration) -> Self {
        Self { upstream, admin, interval, latest: watch::Sender::new(None) }
    }

    /// A view of what is read.
    pub fn event_log(&self) -> EventLog {
        EventLog(self.latest.subscribe())
    }

    /// Reads the log while `is_wanted`, until dropped. Meanwhile it shows nothing.
    pub async fn run_while(&self, mut is_wanted: watch::Receiver<bool>) {
        while is_wanted.wait_for(|it| *it).await.is_ok() {
            tokio::select! {
                () = self.run() => {}
                _ = is_wanted.wait_for(|it| !it) => {}
            }
            self.latest.send_if_modified(|latest| latest.take().is_some());
        }
        // Nobody can want it again.
        std::future::pending::<()>().await;
    }

    /// Reads the log until dropped.
    pub async fn run(&self) {
        let mut backoff = Backoff::new(self.interval, MAX_RETRY_DELAY.max(self.interval));
        let mut position = None;
        let mut was_followed = None;
        loop {
            let read = self.read(&mut position).await;
            let is_changed = was_followed.replace(read.is_ok()) != Some(read.is_ok());
            let pause = match read {
                Ok(()) => {
                    if is_changed {
                        info!(
                            interval = ?self.interval,
                            "Following upstream's event log: flags, tokens and environments are requested when they change"
                        );
                    }
                    backoff.reset();
                    // Never later, because the interval limits how long a revoked token is accepted.
                    self.interval.mul_f64(1.0 - 0.05 * rand::random::<f64>())
                }
                Err(error) => {
                    if is_changed {
                        info!(
                            error = error_chain(&error),
                            "Upstream's event log cannot be read; flags, tokens and environments are polled at their intervals"
                        );
                    }
                    position = None;
                    self.latest.send_if_modified(|latest| latest.take().is_some());
                    match error {
                        ReadError::Missing => jittered(MISSING_RETRY_DELAY, rand::random()),
                        ReadError::Upstream(error) => {
                            backoff.next_delay(error.retry().retry_after(), rand::random())
                        }
                    }
                }
            };
            sleep(pause).await;
        }
    }

    /// Reads the log once, and publishes what it shows.
    async fn read(&self, position: &mut Option<Position>) -> Result<(), ReadError> {
        let started = Instant::now();
        let since = position.as_ref().and_then(Position::since);
        let search = async |limit| {
            let page = self.upstream.search_events(&self.admin, since, limit).await?;
            page.ok_or(ReadError::Missing)
        };
        let mut page = search(1).await?;
        let mut difference = Difference::between(position.as_ref(), &page);
        if let Difference::Incomplete { limit } = difference {
            page = search(limit).await?;
            difference = Difference::between(position.as_ref(), &page);
        }
        *position = Position::after(position.as_ref(), since, &page);
        let now = Instant::now();
        self.latest.send_modify(|latest| {
            let next = match (latest.as_deref(), &difference) {
                (Some(known), Difference::Nothing) => known.after(&[], started, now),
                (Some(known), Difference::Events(added)) => known.after(added, started, now),
                (_, Difference::Unknown | Difference::Incomplete { .. }) | (None, _) => {
                    Observations::all_changed(started, now)
                }
            };
            *latest = Some(Arc::new(next));
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(subject: ChangedSubject, environment: Option<&str>) -> LoggedEvent {
        let environment = environment.map(Environment::new);
        LoggedEvent { id: 1, created_at: jiff::Timestamp::UNIX_EPOCH, subject, environment }
    }

    /// Which of tokens, environments, flags of `dev` and flags of `prod` changed by these events.
    fn changed(events: &[LoggedEvent]) -> [bool; 4] {
        let start = Instant::now();
        let (checked_at, now) = (start + Duration::from_secs(1), start + Duration::from_secs(2));
        let next = Observations::all_changed(start, start).after(events, checked_at, now);
        let (_sender, receiver) = watch::channel(Some(Arc::new(next)));
        let log = EventLog(receiver);
        let [dev, prod] = ["dev", "prod"].map(|name| log.flags(&Environment::new(name)));
        [log.tokens(), log.environments(), dev, prod].map(|observed| {
            let observed = observed.expect("available");
            assert_eq!(observed.checked_at, checked_at);
            observed.changed_at == now
        })
    }

    #[test]
    fn an_event_changes_only_what_it_concerns() {
        use ChangedSubject::{Flag, Other, Token};
        assert_eq!(changed(&[]), [false; 4]);
        assert_eq!(changed(&[event(Token, Some("dev"))]), [true, false, false, false]);
        assert_eq!(changed(&[event(Flag, Some("dev"))]), [false, false, true, false]);
        assert_eq!(changed(&[event(Flag, None)]), [false, false, true, true]);
        assert_eq!(changed(&[event(Flag, Some("qa")), event(Other, Some("dev"))]), [true; 4]);
    }

    #[test]
    fn changes_of_more_environments_than_are_told_apart_concern_all() {
        let events: Vec<_> = (0..=MAX_ENVIRONMENTS)
            .map(|n| event(ChangedSubject::Flag, Some(&n.to_string())))
            .collect();
        assert_eq!(changed(&events), [false, false, true, true]);
    }

    #[test]
    fn list_is_requested_when_it_changed_and_at_its_interval_without_the_log() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let next = |changed: Option<u64>| {
            let observed = changed.map(|it| Observed { changed_at: at(it), checked_at: at(20) });
            let intervals = (Duration::from_mins(1), RECONCILE_INTERVAL);
            (next_list_at(observed, at(10), intervals, 0.5) - start).as_secs()
        };
        assert_eq!(next(None), 70);
        assert_eq!(next(Some(20)), 20, "it changed after the request");
        assert_eq!(next(Some(10)), 610);
    }

    #[tokio::test(start_paused = true)]
    async fn unavailable_log_shows_nothing_and_never_changes() {
        let mut log = EventLog::unavailable();
        assert_eq!(log.tokens(), None);
        let updated = tokio::time::timeout(Duration::from_hours(1), log.updated()).await;
        updated.expect_err("never");
    }
}
