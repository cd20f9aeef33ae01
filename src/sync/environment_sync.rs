//! Synchronises one environment with upstream: by polling, and by event streams between polls.
//!
//! It performs the actions that [`EnvironmentState`] decides on, and reports results and events to it.
//!
//! In a fleet it does so only while this instance leads or is alone; otherwise it publishes the documents
//! that the leader shares ([`FleetSync`]). Each time it takes over from a leader it begins as after a
//! restart: with the served flags, and with a poll.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::pending;
use tokio::{
    sync::watch,
    task::{JoinError, spawn_blocking},
    time::{Instant, interval_at, sleep, sleep_until},
};
use tracing::{debug, info, warn};

use self::transport_log::TransportLog;
use super::{
    environment_state::{Action, Config, EnvironmentState, Publication},
    fleet_sync::{FleetSync, SharedFlags},
    merge::merge,
    poll_once::{Poll, PollError, PollResult},
    publish::publish,
    reconnect::CloseReason,
    stream_events::{self, StreamUpdate, apply_events},
    stream_pool::{StreamEvent, StreamPool},
};
use crate::{
    background_writer::BackgroundWriter,
    backoff::Backoff,
    event_log::EventLog,
    fleet::{Coordinator, Fleet, Role, Topic, Update},
    protocol::{
        features::{Document, PreviousRun},
        sse::DecodedEvent,
    },
    served::{ServedSnapshot, Snapshots},
    snapshot::{Filter, SegmentFormat, prepared_body::ContentCoding},
    store::RecordKey,
    telemetry::error_chain,
    token::{Environment, Scope, TokenDigest},
    upstream::{EnvironmentTokens, Upstream},
};

mod transport_log;

/// The interval of checks for a changed set of tokens.
const TOKEN_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// The delays before a follower obtains its token: the first, and the longest.
const FOLLOWER_TOKEN_DELAY: Duration = Duration::from_secs(2);
const TOKEN_RETRY_DELAY: Duration = Duration::from_mins(1);

/// The services that [`EnvironmentSync`] uses.
#[derive(Clone, Debug)]
pub(super) struct Dependencies {
    pub(super) config: Config,
    pub(super) upstream: Upstream,
    pub(super) credentials: EnvironmentTokens,
    pub(super) snapshots: Snapshots,
    pub(super) writer: BackgroundWriter,
    pub(super) event_log: EventLog,
    /// The fleet that synchronises as one, if this instance is in one.
    pub(super) fleet: Option<Fleet>,
}

/// The synchronisation of one environment.
#[derive(Debug)]
pub(super) struct EnvironmentSync {
    environment: Environment,
    dependencies: Dependencies,
    state: EnvironmentState,
    streams: StreamPool,
    transport_log: TransportLog,
    fleet: FleetSync,
}

impl EnvironmentSync {
    pub(super) fn new(environment: Environment, dependencies: Dependencies) -> Self {
        let Dependencies { config, upstream, snapshots, .. } = &dependencies;
        let served = snapshots.load(&environment);
        Self {
            state: EnvironmentState::new(config, served.as_deref(), Instant::now()),
            streams: StreamPool::new(upstream.clone()),
            transport_log: TransportLog::new(environment.clone(), config.mode),
            fleet: FleetSync::Single,
            environment,
            dependencies,
        }
    }

    /// Synchronises the environment until it is no longer served. A change of `poll_requested` triggers a
    /// poll.
    pub(super) async fn run(mut self, poll_requested: watch::Receiver<()>) {
        let (environment, fleet) = (self.environment.clone(), self.dependencies.fleet.clone());
        let Some(fleet) = fleet else { return self.synchronise(poll_requested).await };
        let (member, coordinator) = fleet.join(Topic::Flags(environment.clone()));
        let served = self.dependencies.snapshots.load(&environment);
        self.fleet = FleetSync::member(member, served.as_deref());
        let tokens = obtain_token_of_follower(self.dependencies.clone(), environment);
        tokio::select! {
            () = self.synchronise(poll_requested) => {}
            // Neither of these ends.
            () = Coordinator::run(coordinator) => {}
            () = tokens => {}
        }
    }

    async fn synchronise(&mut self, mut poll_requested: watch::Receiver<()>) {
        let check_interval = TOKEN_CHECK_INTERVAL.min(self.dependencies.config.interval);
        let mut checks = interval_at(Instant::now() + check_interval, check_interval);
        let mut event_log = self.dependencies.event_log.clone();
        while self.dependencies.snapshots.is_environment_allowed(&self.environment) {
            let action = if self.fleet.uses_upstream() {
                self.state.next_action(Instant::now())
            } else {
                Action::Wait(None)
            };
            match action {
                Action::Poll => {
                    self.poll().await;
                    checks.reset();
                }
                Action::Publish => {
                    // The next poll retries and logs the error.
                    if self.publish().await.is_err() {
                        self.state.request_poll();
                    }
                }
                Action::OpenStream(token, last) => self.streams.open(token, last),
                Action::Wait(until) => tokio::select! {
                    () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {}
                    // The sender outlives this task.
                    Ok(()) = poll_requested.changed() => self.state.request_poll(),
                    () = event_log.updated(), if self.fleet.uses_upstream() => {
                        let observed = event_log.flags(&self.environment);
                        self.state.on_event_log_updated(observed, Instant::now());
                        // Nothing is merged: this confirms the served flags.
                        if self.publish().await.is_err() {
                            self.state.request_poll();
                        }
                    }
                    _ = checks.tick() => {
                        let credentials = &self.dependencies.credentials;
                        let has_all_tokens = credentials.is_complete(&self.environment);
                        self.state.check_tokens(&credentials.tokens(&self.environment), has_all_tokens);
                    }
                    (token, event) = self.streams.next_event() => self.on_stream_event(&token, event).await,
                    update = self.fleet.next_update() => self.on_fleet_update(update).await,
                },
            }
        }
        let environment = &self.environment;
        info!(%environment, "Environment was removed or disabled upstream; it is no longer served");
    }

    async fn on_fleet_update(&mut self, update: Update) {
        let Dependencies { snapshots, .. } = &self.dependencies;
        let served = snapshots.load(&self.environment);
        match update {
            Update::Document(document) => {
                let shared = SharedFlags { snapshots, environment: &self.environment, document };
                if self.fleet.publish(shared, served.as_deref()).await && self.fleet.uses_upstream()
                {
                    self.begin();
                }
            }
            Update::Confirmed(at) => {
                if let Some(served) = served {
                    served.confirm(at);
                }
            }
            Update::Role(role) => {
                let began = self.fleet.set_role(role);
                if began {
                    self.begin();
                }
                if let (Role::Leader, Some(served)) = (role, served) {
                    self.fleet.share(|run| serialize_for_store(&served, run));
                }
            }
        }
    }

    /// Begins, or ends, to synchronise with upstream: from the served flags, with a poll and without
    /// streams.
    fn begin(&mut self) {
        let Dependencies { config, upstream, snapshots, .. } = &self.dependencies;
        let served = snapshots.load(&self.environment);
        self.state = EnvironmentState::new(config, served.as_deref(), Instant::now());
        self.streams = StreamPool::new(upstream.clone());
        self.transport_log = TransportLog::new(self.environment.clone(), config.mode);
    }

    /// Polls once, and schedules the next poll.
    async fn poll(&mut self) {
        let polled = self.poll_and_publish().await;
        let (environment, failures) = (&self.environment, self.state.poll_failures());
        match &polled {
            Ok(()) if failures > 0 => info!(%environment, "Upstream responds again"),
            Ok(()) => {}
            Err(error) if failures == 0 => warn!(
                %environment,
                error = error_chain(error),
                "Fetching flags failed and is retried; the last known flags stay"
            ),
            Err(error) => {
                debug!(%environment, error = error_chain(error), "Still failing to fetch flags");
            }
        }
        let polled = polled.map_err(|error| error.retry_after());
        let in_use = self.dependencies.credentials.tokens(environment);
        self.state.on_polled(polled, in_use, Instant::now(), rand::random());
        self.fleet.on_polled(self.state.poll_failures());
        self.streams.retain(|token| self.state.is_connected(token));
    }

    /// Polls with every token without a synced stream and publishes changes, even if some of the tokens
    /// failed.
    async fn poll_and_publish(&mut self) -> Result<(), PollError> {
        let Dependencies { upstream, credentials, .. } = &self.dependencies;
        let (environment, removal_grace) = (&self.environment, self.state.removal_grace);
        let poll = Poll { upstream, credentials, environment, removal_grace };
        let (documents, synced) = self.state.begin_poll(Instant::now());
        let PollResult { error, prefers_streaming } = poll.run(documents, &synced).await;
        if prefers_streaming {
            self.state.on_streaming_hint();
        }
        self.publish().await?;
        error.map_or(Ok(()), Err)
    }

    /// Publishes unpublished changes, or confirms the served flags.
    async fn publish(&mut self) -> Result<(), PollError> {
        let Dependencies { credentials, snapshots, writer, .. } = &self.dependencies;
        let (environment, in_use) = (&self.environment, credentials.tokens(&self.environment));
        let has_all_tokens = credentials.is_complete(environment);
        let served = snapshots.load(environment);
        let now = Instant::now();
        match self.state.publication(&in_use, has_all_tokens, served.as_deref(), now) {
            Publication::Nothing => {}
            Publication::Confirm(at) => {
                if let Some(served) = served {
                    served.confirm(at);
                    self.fleet.on_fetched(at);
                }
            }
            Publication::Replace { input, projects, confirmed_at, run, replaced } => {
                let make = move || {
                    drop(replaced);
                    merge(&input)
                };
                let scope = Scope { environment: environment.clone(), projects };
                let published = publish(snapshots, scope, confirmed_at, make).await?;
                self.state.on_published();
                match (&published, confirmed_at) {
                    (Some(_), _) => self.fleet.on_replaced(confirmed_at),
                    (None, Some(at)) => self.fleet.on_fetched(at),
                    (None, None) => {}
                }
                self.fleet.set_previous_run(run);
                if let Some(snapshot) = published {
                    self.fleet.share(|run| serialize_for_store(&snapshot, run));
                    let key = RecordKey::Flags(environment.clone());
                    writer.save(key, move || serialize_for_store(&snapshot, run));
                }
            }
        }
        Ok(())
    }

    async fn on_stream_event(&mut self, token: &TokenDigest, event: StreamEvent) {
        match event {
            StreamEvent::Opened => self.state.on_stream_activity(token, Instant::now()),
            StreamEvent::Unavailable(refusal, error) => {
                self.state.on_stream_unavailable(token, refusal, Instant::now(), rand::random());
                self.transport_log.on_unavailable(refusal, error.as_deref());
            }
            StreamEvent::Received(events) => self.apply_events(token, events).await,
            StreamEvent::Closed(reason, error) => {
                self.close_stream(token, reason, error.as_deref());
            }
        }
    }

    /// Applies the events of a stream, and publishes the changes.
    async fn apply_events(&mut self, token: &TokenDigest, events: Vec<DecodedEvent>) {
        self.state.on_stream_activity(token, Instant::now());
        let (known, continues) = self.state.event_base(token);
        let is_shared = self.state.has_several_tokens();
        let update = match parse_events(known, continues, events, is_shared).await {
            Ok(parsed) => parsed,
            Err(error) => {
                let error = error_chain(&error);
                return self.close_stream(token, CloseReason::Unreadable, Some(&error));
            }
        };
        if let Some(applied) = update.applied {
            if !self.state.on_stream_flags_received(token, applied, Instant::now()) {
                let error = "the stream sent an older state than the known one";
                return self.close_stream(token, CloseReason::Stale, Some(error));
            }
            self.dependencies.credentials.mark_accepted(&self.environment, token);
            if self.state.is_streaming() {
                self.transport_log.on_streaming();
            }
        }
        if let Err(error) = self.publish().await {
            let error = error_chain(&error);
            return self.close_stream(token, CloseReason::Unreadable, Some(&error));
        }
        if update.prefers_polling {
            self.close_stream(token, CloseReason::PollingPreferred, None);
        }
    }

    /// Closes a stream, or records that it has ended.
    fn close_stream(&mut self, token: &TokenDigest, reason: CloseReason, error: Option<&str>) {
        let reason = self.state.on_stream_closed(token, reason, Instant::now(), rand::random());
        self.streams.close(token, reason);
        self.transport_log.on_closed(reason, error);
    }
}

/// Obtains the environment's token for a follower, which does not fetch flags, but sends usage and accepts
/// the listed tokens of the environments for which it has one.
///
/// It does so only once there are flags: the leader has then obtained the token, and stored it for all.
async fn obtain_token_of_follower(dependencies: Dependencies, environment: Environment) {
    let Dependencies { credentials, snapshots, .. } = dependencies;
    snapshots.wait_for_environment(&environment).await;
    let mut backoff = Backoff::new(FOLLOWER_TOKEN_DELAY, TOKEN_RETRY_DELAY);
    loop {
        sleep(backoff.next_delay(None, rand::random())).await;
        if credentials.obtain(&environment).await.is_ok() {
            return pending().await;
        }
    }
}

/// Parses the events of a stream, and applies them to its document, on a blocking thread.
async fn parse_events(
    known: Option<Arc<Document>>,
    continues: bool,
    events: Vec<DecodedEvent>,
    is_shared: bool,
) -> Result<StreamUpdate, EventError> {
    // Most of the time only a keep-alive comment arrived.
    if events.is_empty() {
        return Ok(StreamUpdate::default());
    }
    let apply = move || apply_events(known.as_deref(), continues, &events, is_shared);
    Ok(spawn_blocking(apply).await??)
}

/// Serializes a snapshot's flags for the store, with the state that the next run needs from this one.
/// The projects are stored as the query of the document.
fn serialize_for_store(snapshot: &ServedSnapshot, run: PreviousRun) -> Bytes {
    let all =
        snapshot.client_features(snapshot.projects(), Filter::default(), SegmentFormat::Separate);
    let run = PreviousRun { state_id: Some(snapshot.state_id().get()), ..run };
    Document::encode_stored(&all.get_or_encode(ContentCoding::Identity).bytes, run).into()
}

/// Why events of a stream cannot be applied.
#[derive(Debug, thiserror::Error)]
enum EventError {
    #[error(transparent)]
    Delta(#[from] stream_events::Error),
    #[error("parsing or compiling events of upstream's stream panicked")]
    Panic(#[from] JoinError),
}

#[cfg(test)]
mod tests;
