//! Synchronises flags from upstream: finds the environments and runs one `EnvironmentSync` for each.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Notify, oneshot, watch},
    task::{Id, JoinSet},
    time::{Instant, sleep, sleep_until},
};
use tracing::{error, warn};

use super::{
    environment_state::Config,
    environment_sync::{Dependencies, EnvironmentSync},
    environment_tracker::EnvironmentTracker,
    publish::publish,
    shared_environments::{EnvironmentList, SharedEnvironments},
    stream_pool,
};
use crate::{
    background_writer::BackgroundWriter,
    backoff::Backoff,
    event_log::{EventLog, next_list_at},
    fleet::{Coordinator, Fleet, Topic},
    protocol::features::{Document, parse_query_projects},
    served::{EnvironmentFilter, Snapshots},
    store::{RecordKey, Store},
    telemetry::{ReadinessCondition, error_chain},
    token::{Environment, Scope},
    upstream::{AdminToken, EnvironmentTokens, Upstream},
};

/// The interval at which upstream's environments are listed while its event log cannot be read.
const LIST_INTERVAL: Duration = Duration::from_mins(1);

/// The interval at which they are listed otherwise. Unleash does not log that an environment was enabled or
/// disabled.
const UNLOGGED_LIST_INTERVAL: Duration = Duration::from_mins(3);

/// The delay after the first list that failed. It doubles up to the interval.
const INITIAL_RETRY_DELAY: Duration = Duration::from_secs(1);

/// How long to wait before the sync of an environment is restarted after a panic.
const RESTART_DELAY: Duration = Duration::from_secs(1);

/// Which environments are synchronised.
#[derive(Clone, Debug)]
pub enum EnvironmentSelection {
    /// All environments enabled upstream, listed with this admin token.
    Enabled(AdminToken),
    /// A fixed set.
    Named(BTreeSet<Environment>),
    /// The environments of configured tokens and of tokens that SDKs presented.
    FromTokens,
}

/// Synchronises all selected environments with upstream.
#[derive(Clone, Debug)]
pub struct EnvironmentManager {
    /// Interval and mode.
    pub config: Config,
    /// The environments to synchronise.
    pub selection: EnvironmentSelection,
    /// The upstream client.
    pub upstream: Upstream,
    /// The tokens to fetch flags with.
    pub credentials: EnvironmentTokens,
    /// Notified when a new token widens what can be fetched.
    pub token_added: Arc<Notify>,
    /// The served snapshots.
    pub snapshots: Snapshots,
    /// The store to restore flags from at a start without upstream.
    pub store: Arc<dyn Store>,
    /// Saves flags to that store in the background.
    pub writer: BackgroundWriter,
    /// Tells when to fetch flags and to list environments.
    pub event_log: EventLog,
    /// The fleet that synchronises as one, if this instance is in one.
    pub fleet: Option<Fleet>,
}

impl EnvironmentManager {
    /// Serves the stored flags of the selected environments until upstream responds. Damaged records are
    /// skipped.
    pub async fn restore(&self) {
        if let EnvironmentSelection::Named(wanted) = &self.selection {
            self.snapshots.set_environments(&EnvironmentFilter::Only(wanted.clone()));
        }
        let stored = match self.store.list().await {
            Ok(stored) => stored,
            // The store logs that itself.
            Err(error) if error.is_unavailable() => return,
            Err(error) => {
                return warn!(
                    error = error_chain(&error),
                    "Listing stored flags failed; starting without them"
                );
            }
        };
        for key in stored {
            let RecordKey::Flags(environment) = &key else { continue };
            match self.store.load(&key).await {
                Ok(Some(bytes)) => {
                    let scope = Scope {
                        environment: environment.clone(),
                        projects: parse_query_projects(&bytes),
                    };
                    self.serve_stored(scope, &bytes).await;
                }
                Ok(None) => {}
                Err(error) if error.is_unavailable() => return,
                Err(error) => {
                    warn!(
                        error = error_chain(&error),
                        "Reading stored flags failed; they are skipped"
                    );
                }
            }
        }
    }

    /// Serves stored flags of `scope`, unless the environment already has flags or is not selected.
    pub async fn serve_stored(&self, scope: Scope, text: &[u8]) {
        let environment = scope.environment.clone();
        if self.snapshots.load(&environment).is_some()
            || !self.snapshots.is_environment_allowed(&environment)
        {
            return;
        }
        let published = match Document::parse_stored(text) {
            // Unconfirmed: upstream has not responded since this process started.
            Ok(document) => publish(&self.snapshots, scope, None, || document).await,
            Err(error) => {
                return warn!(
                    %environment,
                    error = error_chain(&error),
                    "Parsing stored flags failed; they are skipped"
                );
            }
        };
        if let Err(error) = published {
            warn!(
                %environment,
                error = error_chain(&error),
                "Compiling stored flags failed; they are skipped"
            );
        }
    }

    /// Synchronises every selected environment until dropped. Environments that were removed or disabled
    /// upstream are neither synchronised nor served. Meets the condition once each initially selected
    /// environment has had flags and at least one environment is served.
    pub async fn run(self, ready_when: &ReadinessCondition) {
        stream_pool::describe_metrics();
        let (sender, initial) = oneshot::channel();
        let (shared, coordinator) = match (&self.fleet, &self.selection) {
            (Some(fleet), EnvironmentSelection::Enabled(_)) => {
                let (member, coordinator) = fleet.join(Topic::Environments);
                (SharedEnvironments::member(member), Some(coordinator))
            }
            (Some(_) | None, _) => (SharedEnvironments::Single, None),
        };
        let coordination = async {
            if let Some(coordinator) = coordinator {
                Coordinator::run(coordinator).await;
            }
        };
        tokio::join!(
            self.sync_all(sender, shared),
            self.mark_ready_after_initial_flags(initial, ready_when),
            coordination
        );
    }

    /// Meets the condition once each initial environment has had flags or is no longer served.
    async fn mark_ready_after_initial_flags(
        &self,
        initial: oneshot::Receiver<BTreeSet<Environment>>,
        ready_when: &ReadinessCondition,
    ) {
        if self.is_environment_required() {
            ready_when.describe("upstream's list of environments");
        }
        // `sync_all` sends them; it runs concurrently and never ends.
        let Ok(initial) = initial.await else { return };
        for environment in &initial {
            ready_when.describe(format!("the first flags of environment {environment}"));
            self.snapshots.wait_for_environment(environment).await;
        }
        ready_when.describe(
            "a valid client token to fetch the first flags with: none is configured, or upstream \
             accepts none of them",
        );
        self.snapshots.wait_for_any().await;
        ready_when.mark_met();
    }

    async fn sync_all(
        &self,
        sender: oneshot::Sender<BTreeSet<Environment>>,
        mut shared: SharedEnvironments,
    ) {
        let mut sender = Some(sender);
        let mut loops = JoinSet::new();
        let mut running: BTreeMap<Environment, Id> = BTreeMap::new();
        let poll_request = watch::Sender::new(());
        let mut backoff = Backoff::new(INITIAL_RETRY_DELAY, LIST_INTERVAL);
        let mut environment_list = EnvironmentTracker::default();
        let mut event_log = self.event_log.clone();
        loop {
            let (started, jitter) = (Instant::now(), rand::random());
            let (found, retry) = if shared.uses_upstream() {
                let listed = self.list_environments(&mut backoff, &mut environment_list).await;
                if let (Some(enabled), None) = &listed {
                    let removed = environment_list.removed();
                    shared.on_listed(EnvironmentList { enabled: enabled.clone(), removed });
                }
                listed
            } else {
                (shared.followed_list().map(|list| list.enabled.clone()), None)
            };
            let retry_at = retry.map(|delay| Instant::now() + delay);
            let removed = match shared.followed_list() {
                Some(list) => list.removed.clone(),
                None => environment_list.removed(),
            };
            if matches!(self.selection, EnvironmentSelection::Enabled(_))
                && self.snapshots.set_environments(&EnvironmentFilter::Except(removed))
            {
                // The syncs of removed environments notice and end.
                poll_request.send_replace(());
            }
            for environment in found.iter().flatten() {
                if !running.contains_key(environment) {
                    let follow =
                        self.environment_sync(environment.clone()).run(poll_request.subscribe());
                    let task = loops.spawn(follow);
                    running.insert(environment.clone(), task.id());
                }
            }
            // Readiness waits for the environments of the first list.
            if let Some(found) = found
                && (!found.is_empty() || !self.is_environment_required())
                && let Some(sender) = sender.take()
            {
                // The receiver lives as long as this loop.
                let _ = sender.send(found);
            }
            loop {
                let next = retry_at.unwrap_or_else(|| {
                    let intervals = (LIST_INTERVAL, UNLOGGED_LIST_INTERVAL);
                    next_list_at(event_log.environments(), started, intervals, jitter)
                });
                tokio::select! {
                    () = sleep_until(next) => break,
                    // The next list may be due sooner or later now.
                    () = event_log.updated() => {}
                    () = shared.changed() => break,
                    () = self.token_added.notified() => {
                        poll_request.send_replace(());
                        break;
                    }
                    Some(ended) = loops.join_next_with_id() => match ended {
                        // Its environment was removed: the next list is fetched on schedule.
                        Ok((id, ())) => running.retain(|_, task| *task != id),
                        Err(error) => {
                            error!(
                                error = error_chain(&error),
                                "Synchronising an environment panicked; it restarts in 1 s"
                            );
                            running.retain(|_, task| *task != error.id());
                            sleep(RESTART_DELAY).await;
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Whether readiness waits until at least one environment is found.
    fn is_environment_required(&self) -> bool {
        !matches!(self.selection, EnvironmentSelection::FromTokens)
    }

    /// Lists the environments to synchronise; `None` if that fails and none is served. Also returns the
    /// delay before a retry if it fails.
    async fn list_environments(
        &self,
        backoff: &mut Backoff,
        environment_list: &mut EnvironmentTracker,
    ) -> (Option<BTreeSet<Environment>>, Option<Duration>) {
        let admin = match &self.selection {
            EnvironmentSelection::Named(named) => return (Some(named.clone()), None),
            EnvironmentSelection::FromTokens => {
                return (Some(self.credentials.environments()), None);
            }
            EnvironmentSelection::Enabled(admin) => admin,
        };
        let served = self.snapshots.environments();
        let retry_after = match self.upstream.list_environments(admin).await {
            Ok(list) => {
                if let Some(enabled) = environment_list.update(&list, served.clone()) {
                    backoff.reset();
                    return (Some(enabled), None);
                }
                if backoff.failures() == 0 {
                    warn!("Upstream lists no enabled environment; the list is ignored");
                }
                None
            }
            Err(error) => {
                if backoff.failures() == 0 {
                    warn!(
                        error = error_chain(&error),
                        "Listing upstream's environments failed; the known environments stay"
                    );
                }
                error.retry().retry_after()
            }
        };
        let pause = backoff.next_delay(retry_after, rand::random());
        (Some(served).filter(|served| !served.is_empty()), Some(pause))
    }

    fn environment_sync(&self, environment: Environment) -> EnvironmentSync {
        let Self { config, upstream, credentials, snapshots, writer, event_log, fleet, .. } =
            self.clone();
        EnvironmentSync::new(
            environment,
            Dependencies { config, upstream, credentials, snapshots, writer, event_log, fleet },
        )
    }
}
