//! Synchronises one environment with upstream: by polling, and by event streams between polls.
//!
//! Nothing is polled while each token in use has a synced stream. States from streams are published like
//! states from polls. With several tokens, the removal of a flag is published only after the others had
//! time to report it: tokens without a synced stream are then polled immediately.

use std::{mem, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::watch,
    task::{JoinError, spawn_blocking},
    time::{Instant, interval_at, sleep_until},
};
use tracing::{debug, info, warn};

use super::{
    merge::{FetchedDocument, TokenDocuments, merge},
    poll_once::{Poll, PollError, PollResult},
    publish::publish,
    reconnect::{CloseReason, Reconnect, StreamUnavailable, UpstreamMode},
    stream_events::{self, Applied, StreamUpdate},
    stream_pool::{StreamEvent, StreamPool},
};
use crate::{
    background_writer::BackgroundWriter,
    backoff::Backoff,
    protocol::{
        features::{Document, PreviousRun},
        sse::Event,
    },
    snapshot::{Filter, SegmentFormat, Snapshot, Snapshots, body::ContentCoding},
    store::RecordKey,
    telemetry::error_chain,
    token::{Environment, Scope},
    upstream::{Credentials, Upstream},
};

/// How flags are synchronised.
#[derive(Clone, Debug)]
pub struct Config {
    /// The poll interval of an environment.
    pub interval: Duration,
    /// Whether to use upstream's event streams.
    pub mode: UpstreamMode,
}

/// The interval of checks for a changed set of tokens.
const TOKEN_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// The delay after the first failed poll.
const INITIAL_RETRY_DELAY: Duration = Duration::from_secs(1);

/// The longest delay between retries, unless the poll interval is longer.
const MAX_RETRY_DELAY: Duration = Duration::from_mins(1);

/// How long to wait for other tokens to report a flag before removing it. Streams of two tokens deliver
/// the same change within milliseconds of each other.
const REMOVAL_GRACE: Duration = Duration::from_secs(1);

/// The services that [`EnvironmentSync`] uses.
#[derive(Clone, Debug)]
pub(super) struct Dependencies {
    pub(super) config: Config,
    pub(super) upstream: Upstream,
    pub(super) credentials: Credentials,
    pub(super) snapshots: Snapshots,
    pub(super) saver: BackgroundWriter,
}

/// The synchronisation of one environment.
#[derive(Debug)]
pub(super) struct EnvironmentSync {
    environment: Environment,
    dependencies: Dependencies,
    documents: TokenDocuments,
    streams: StreamPool,
    backoff: Backoff,
    transport: Transport,
    removal_grace: Duration,
    /// Whether all expected tokens were available at the last check.
    has_all_tokens: bool,
}

/// How flags arrive, as last logged.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Transport {
    /// By polling; nothing was logged about streams yet.
    Polling,
    /// By polling, because a stream is missing.
    PollingBecause(PollingReason),
    /// By streams.
    Streaming,
}

/// The reaction to an event on a stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum NextAction {
    /// Wait for the next event.
    Wait,
    /// Poll with the tokens without a synced stream.
    Poll,
    /// Reconnect: the stream was closed or could not be opened.
    Reconnect(Reconnect),
}

/// Why an environment is polled rather than streamed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum PollingReason {
    NotSupported,
    Unauthorized,
    Throttled,
    OpenFailed,
    StreamLost,
    PollingPreferred,
}

impl PollingReason {
    fn from_unavailable(refusal: StreamUnavailable) -> Self {
        match refusal {
            StreamUnavailable::NotSupported => Self::NotSupported,
            StreamUnavailable::Unauthorized => Self::Unauthorized,
            StreamUnavailable::Throttled(_) => Self::Throttled,
            StreamUnavailable::Failed(_) => Self::OpenFailed,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::NotSupported => "it does not support streaming",
            Self::Unauthorized => "it does not accept the token for its stream",
            Self::Throttled => "it accepts no further stream",
            Self::OpenFailed => "its stream cannot be opened",
            Self::StreamLost => "its stream was lost",
            Self::PollingPreferred => "it requests polling",
        }
    }
}

impl EnvironmentSync {
    pub(super) fn new(environment: Environment, dependencies: Dependencies) -> Self {
        let served = dependencies.snapshots.load(&environment);
        let documents = TokenDocuments::new(served.as_deref(), Instant::now());
        let streams = StreamPool::new(dependencies.config.mode, dependencies.upstream.clone());
        let max_delay = MAX_RETRY_DELAY.max(dependencies.config.interval);
        let backoff = Backoff::new(INITIAL_RETRY_DELAY, max_delay);
        Self {
            environment,
            dependencies,
            documents,
            streams,
            backoff,
            transport: Transport::Polling,
            removal_grace: REMOVAL_GRACE,
            has_all_tokens: false,
        }
    }

    /// Synchronises the environment until it is no longer served. A change of `poll_requested` triggers a poll.
    pub(super) async fn run(mut self, mut poll_requested: watch::Receiver<()>) {
        while self.is_environment_allowed() {
            let due = Instant::now() + self.poll_and_schedule().await;
            self.follow_streams(due, &mut poll_requested).await;
        }
        let environment = &self.environment;
        info!(%environment, "Environment was removed or disabled upstream; it is no longer served");
    }

    fn is_environment_allowed(&self) -> bool {
        self.dependencies.snapshots.is_environment_allowed(&self.environment)
    }

    /// Polls once; returns the delay until the next poll.
    async fn poll_and_schedule(&mut self) -> Duration {
        let polled = self.poll().await;
        let (environment, documents) = (&self.environment, &self.documents);
        let in_use = self.dependencies.credentials.tokens(&self.environment);
        self.streams.set_tokens(in_use, |token| documents.document(token).is_some());
        let Err(failure) = polled else {
            if self.backoff.failures() > 0 {
                info!(%environment, "Upstream responds again");
            }
            self.backoff.reset();
            let pause = jittered(self.dependencies.config.interval, rand::random());
            let recheck = self.documents.next_recheck();
            let recheck = recheck.and_then(|at| at.checked_duration_since(Instant::now()));
            return recheck.map_or(pause, |recheck| pause.min(recheck));
        };
        if self.backoff.failures() == 0 {
            warn!(
                %environment,
                error = error_chain(&failure),
                "Fetching flags failed and is retried; the last known flags stay"
            );
        } else {
            debug!(%environment, error = error_chain(&failure), "Still failing to fetch flags");
        }
        let pause = self.backoff.next_delay(failure.retry_after(), rand::random());
        // The failure of one token must not make the flags of the others stale.
        let is_partial = self.documents.has_response_in_round() && failure.retry_after().is_none();
        if is_partial { pause.min(self.dependencies.config.interval) } else { pause }
    }

    /// Polls once with every token without a synced stream and publishes changes, even if some of the
    /// tokens failed.
    async fn poll(&mut self) -> Result<(), PollError> {
        let Dependencies { upstream, credentials, .. } = &self.dependencies;
        let (environment, removal_grace) = (&self.environment, self.removal_grace);
        let poll = Poll { upstream, credentials, environment, removal_grace };
        self.documents.begin_round();
        let synced = self.streams.synced_tokens();
        let PollResult { error, prefers_streaming } = poll.run(&mut self.documents, &synced).await;
        if prefers_streaming {
            self.streams.expedite_declined();
        }
        // Streamed flags are confirmed as of the stream's last activity.
        let confirmed_at = self
            .streams
            .last_activity_by_token()
            .map(|(_, at)| at)
            .fold(Instant::now(), Instant::min);
        self.publish(Some(confirmed_at)).await?;
        error.map_or(Ok(()), Err)
    }

    /// Publishes unpublished changes. The served flags count as confirmed at `confirmed_at` if upstream
    /// responded to every token in use or streams to it.
    async fn publish(&mut self, confirmed_at: Option<Instant>) -> Result<(), PollError> {
        let Self { environment, dependencies, documents, streams, has_all_tokens, .. } = self;
        *has_all_tokens = dependencies.credentials.is_complete(environment);
        let in_use = dependencies.credentials.tokens(environment);
        let is_complete =
            documents.complete_round(&in_use, &streams.synced_tokens(), *has_all_tokens);
        documents.advance_time(Instant::now(), streams.last_activity_by_token());
        let served = dependencies.snapshots.load(environment);
        if documents.has_changes() || (is_complete && served.is_none()) {
            let before = served.and_then(|served| served.confirmed_at());
            let confirmed = if is_complete { confirmed_at.max(before) } else { before };
            let (input, replaced) = (documents.merge_input(), documents.take_replaced());
            let make = move || {
                drop(replaced);
                merge(&input)
            };
            let scope = Scope { environment: environment.clone(), projects: documents.projects() };
            let published = publish(&dependencies.snapshots, scope, confirmed, make).await?;
            documents.mark_published();
            if let Some(snapshot) = published {
                let run = PreviousRun { upstream_revision: documents.common_revision() };
                let key = RecordKey::Flags(environment.clone());
                dependencies.saver.save(key, move || serialize_for_store(&snapshot, run));
            }
        } else if is_complete && let (Some(served), Some(confirmed_at)) = (served, confirmed_at) {
            served.confirm(confirmed_at);
        }
        Ok(())
    }

    /// Applies stream events until a poll is needed: when one is due and not every token in use has a
    /// synced stream, when the tokens in use change, or on a poll request.
    async fn follow_streams(&mut self, mut due: Instant, poll_requested: &mut watch::Receiver<()>) {
        let check_interval = TOKEN_CHECK_INTERVAL.min(self.dependencies.config.interval);
        let mut checks = interval_at(Instant::now() + check_interval, check_interval);
        loop {
            let (documents, was_synced) =
                (&self.documents, self.streams.is_synced_for_all_tokens());
            let next_deadline = documents.next_deadline();
            let (at, event) = tokio::select! {
                () = sleep_until(due), if !was_synced => return,
                () = sleep_until(next_deadline.unwrap_or(due)), if next_deadline.is_some() => {
                    // The next poll retries and logs the error.
                    if self.publish(self.streams.confirmed_at()).await.is_err() {
                        return;
                    }
                    continue;
                }
                // The sender outlives this task.
                Ok(()) = poll_requested.changed() => return,
                _ = checks.tick() => {
                    let in_use = self.dependencies.credentials.tokens(&self.environment);
                    if !self.is_environment_allowed() || in_use != self.streams.tokens_in_use() || self.can_drop_inherited() {
                        return;
                    }
                    continue;
                }
                event = self.streams.next_event(|token| documents.event_id(token)) => event,
            };
            let action = match event {
                StreamEvent::Received(events) => self.apply_events(at, events).await,
                StreamEvent::Unavailable(refusal, next, error) => {
                    self.on_stream_unavailable(
                        PollingReason::from_unavailable(refusal),
                        error.map(|it| error_chain(&it)).as_deref(),
                    );
                    NextAction::Reconnect(next)
                }
                StreamEvent::Closed(CloseReason::Ended(_), next, None) => {
                    debug!(environment = %self.environment, "Upstream closed its stream");
                    NextAction::Reconnect(next)
                }
                StreamEvent::Closed(_, next, error) => {
                    self.on_stream_unavailable(
                        PollingReason::StreamLost,
                        error.map(|it| error_chain(&it)).as_deref(),
                    );
                    NextAction::Reconnect(next)
                }
            };
            match action {
                NextAction::Poll | NextAction::Reconnect(Reconnect { poll_now: true, .. }) => {
                    due = Instant::now();
                }
                NextAction::Reconnect(_) if was_synced => {
                    let interval = self.dependencies.config.interval;
                    due = Instant::now() + jittered(interval, rand::random());
                }
                NextAction::Reconnect(_) | NextAction::Wait => {}
            }
        }
    }

    /// Whether flags of an earlier run have become removable since the last check.
    fn can_drop_inherited(&mut self) -> bool {
        let before = self.has_all_tokens;
        self.has_all_tokens = self.dependencies.credentials.is_complete(&self.environment);
        self.has_all_tokens && !before && self.documents.has_inherited()
    }

    /// Applies the events of a stream.
    async fn apply_events(&mut self, at: usize, events: Vec<Event>) -> NextAction {
        let (update, changed) = match self.apply_stream_events(at, events).await {
            Ok(read) => read,
            Err(error) => return NextAction::Reconnect(self.close_stream(at, &error)),
        };
        let mut action = NextAction::Wait;
        if let Some(Applied { event_id, removed_flags, .. }) = update.applied {
            let credential = self.streams.credential(at);
            let has_others = self.streams.tokens_in_use().len() > 1;
            let now = Instant::now();
            let digest = credential.token.digest();
            if changed.is_some() && self.documents.is_stale_event(&digest, event_id, now) {
                self.on_stream_unavailable(
                    PollingReason::StreamLost,
                    Some("the stream sent an older state than the known one"),
                );
                return NextAction::Reconnect(self.streams.close(at, CloseReason::Stale));
            }
            let until = now + self.removal_grace;
            // While polls fail, or upstream has sent `Retry-After`, no extra poll is made.
            if has_others
                && self.documents.defer_removal(credential, &removed_flags, until)
                && self.backoff.failures() == 0
            {
                action = NextAction::Poll;
            }
            self.documents.apply_stream_state(credential, event_id, changed, now);
            self.dependencies.credentials.mark_accepted(&self.environment, &digest);
            self.streams.mark_synced(at);
            if self.streams.is_synced_for_all_tokens() {
                self.on_stream_synced();
            }
        }
        if let Err(error) = self.publish(self.streams.confirmed_at()).await {
            return NextAction::Reconnect(self.close_stream(at, &error));
        }
        if update.prefers_polling {
            self.on_stream_unavailable(PollingReason::PollingPreferred, None);
            action = NextAction::Reconnect(self.streams.close(at, CloseReason::PollingPreferred));
        }
        action
    }

    /// Parses and applies the events of a stream on a blocking thread.
    fn apply_stream_events(
        &self,
        at: usize,
        events: Vec<Event>,
    ) -> impl Future<Output = Result<(StreamUpdate, Option<FetchedDocument>), EventError>> + use<>
    {
        let digest = self.streams.credential(at).token.digest();
        let continues = self.streams.can_apply_deltas(at, self.documents.event_id(&digest));
        let known = self.documents.document(&digest).cloned();
        let is_shared = self.streams.tokens_in_use().len() > 1;
        async move {
            // Most of the time only a keep-alive comment arrived.
            if events.is_empty() {
                return Ok((StreamUpdate::default(), None));
            }
            let apply = move || {
                let mut update =
                    stream_events::apply_events(known.as_deref(), continues, &events, is_shared)?;
                let changed = update.applied.as_mut().and_then(|reached| {
                    let states = mem::take(&mut reached.intermediate_states);
                    Some(
                        FetchedDocument::new(reached.changed.take()?)
                            .with_intermediate_states(&states),
                    )
                });
                Ok((update, changed))
            };
            spawn_blocking(apply).await?
        }
    }

    /// Closes a stream whose events cannot be applied. The next one starts with a full state.
    fn close_stream(&mut self, at: usize, error: &dyn std::error::Error) -> Reconnect {
        self.on_stream_unavailable(PollingReason::StreamLost, Some(&error_chain(error)));
        self.documents.clear_event_id(&self.streams.credential(at).token.digest());
        self.streams.close(at, CloseReason::Unreadable)
    }

    /// Records that every token in use has a synced stream.
    fn on_stream_synced(&mut self) {
        // Earlier poll failures no longer matter.
        self.backoff.reset();
        if self.transport != Transport::Streaming {
            info!(environment = %self.environment, "Upstream's event stream is open; polling stops");
            self.transport = Transport::Streaming;
        }
    }

    /// Records why a stream is missing; logs it if the reason is new.
    fn on_stream_unavailable(&mut self, reason: PollingReason, error: Option<&str>) {
        let (environment, why, before) = (&self.environment, reason.as_str(), self.transport);
        let is_new = match (before, reason) {
            (Transport::Polling | Transport::Streaming, _) => true,
            // The first reason has been logged; later failures of the same outage are not.
            (
                Transport::PollingBecause(_),
                PollingReason::OpenFailed | PollingReason::StreamLost,
            ) => false,
            (Transport::PollingBecause(logged), reason) => logged != reason,
        };
        if !is_new {
            return debug!(%environment, error, "Still polling upstream: {why}");
        }
        self.transport = Transport::PollingBecause(reason);
        let is_expected = self.dependencies.config.mode == UpstreamMode::Stream;
        match (before, reason) {
            (_, PollingReason::NotSupported | PollingReason::Unauthorized) if is_expected => {
                warn!(%environment, "Polling upstream although --upstream-mode is stream: {why}");
            }
            (Transport::Streaming, _) => {
                info!(%environment, error, "Polling upstream again: {why}");
            }
            (Transport::Polling | Transport::PollingBecause(_), _) => {
                info!(%environment, error, "Polling upstream: {why}");
            }
        }
    }
}

/// The delay until the next request after a success: 0.9 to 1.1 of the interval, by `jitter` (0 to 1). It
/// spreads the requests of a fleet that started at the same time.
pub(super) fn jittered(interval: Duration, jitter: f64) -> Duration {
    interval.mul_f64(0.9 + 0.2 * jitter)
}

/// Serializes a snapshot's flags for the store, with the state that the next run needs from this one.
/// The projects are stored as the query of the document.
fn serialize_for_store(snapshot: &Snapshot, run: PreviousRun) -> Bytes {
    let all =
        snapshot.client_features(snapshot.projects(), Filter::default(), SegmentFormat::Separate);
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
