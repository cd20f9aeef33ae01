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
    course::{End, Mode, Next, Refusal},
    lines::{Happened, Lines},
    pace::Pace,
    publish::publish,
    round::{Asked, Failure, Round},
    sources::{Received, Sources, merged},
    told::{self, Reached, Step},
};
use crate::{
    saver::BackgroundWriter,
    snapshot::{Filter, SegmentFormat, Snapshot, Snapshots, body::ContentCoding},
    store::Key,
    telemetry::error_chain,
    token::{Environment, Scope},
    upstream::{Credentials, Upstream},
    wire::{
        features::{Document, PreviousRun},
        sse::Event,
    },
};

/// How flags are synchronised.
#[derive(Clone, Debug)]
pub struct Config {
    /// The poll interval of an environment.
    pub interval: Duration,
    /// Whether to use upstream's event streams.
    pub mode: Mode,
}

/// The interval of checks for a changed set of tokens.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How long to wait for other tokens to report a flag before removing it. Streams of two tokens deliver
/// the same change within milliseconds of each other.
const HELD_FOR: Duration = Duration::from_secs(1);

/// The services that [`EnvironmentSync`] uses.
#[derive(Clone, Debug)]
pub(super) struct Means {
    pub(super) config: Config,
    pub(super) upstream: Upstream,
    pub(super) credentials: Credentials,
    pub(super) snapshots: Snapshots,
    pub(super) saver: BackgroundWriter,
}

/// The synchronisation of one environment.
#[derive(Debug)]
pub(super) struct Followed {
    environment: Environment,
    means: Means,
    sources: Sources,
    lines: Lines,
    pace: Pace,
    way: Way,
    held_for: Duration,
    /// Whether all expected tokens were available at the last check.
    is_complete: bool,
}

/// How flags arrive, as last logged.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    /// By polling; nothing was logged about streams yet.
    Polls,
    /// By polling, because a stream is missing.
    PollsFor(Want),
    /// By streams.
    Streams,
}

/// The reaction to an event on a stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Then {
    /// Wait for the next event.
    Listen,
    /// Poll with the tokens without a synced stream.
    Ask,
    /// Reconnect: the stream was closed or could not be opened.
    Lost(Next),
}

/// Why an environment is polled rather than streamed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Want {
    NotOffered,
    NotAdmitted,
    Crowded,
    Failed,
    Lost,
    Dismissed,
}

impl Want {
    fn of(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NotOffered => Self::NotOffered,
            Refusal::NotAdmitted => Self::NotAdmitted,
            Refusal::Crowded(_) => Self::Crowded,
            Refusal::Failed(_) => Self::Failed,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::NotOffered => "it does not support streaming",
            Self::NotAdmitted => "it does not accept the token for its stream",
            Self::Crowded => "it accepts no further stream",
            Self::Failed => "its stream cannot be opened",
            Self::Lost => "its stream was lost",
            Self::Dismissed => "it requests polling",
        }
    }
}

impl Followed {
    pub(super) fn new(environment: Environment, dependencies: Means) -> Self {
        let served = dependencies.snapshots.load(&environment);
        let documents = Sources::new(served.as_deref(), Instant::now());
        let streams = Lines::new(dependencies.config.mode, dependencies.upstream.clone());
        let backoff = Pace::new(dependencies.config.interval);
        Self {
            environment,
            means: dependencies,
            sources: documents,
            lines: streams,
            pace: backoff,
            way: Way::Polls,
            held_for: HELD_FOR,
            is_complete: false,
        }
    }

    /// Synchronises the environment until it is no longer served. A change of `poll_requested` triggers a poll.
    pub(super) async fn run(mut self, mut poll_requested: watch::Receiver<()>) {
        while self.is_served() {
            let due = Instant::now() + self.round().await;
            self.listen(due, &mut poll_requested).await;
        }
        let environment = &self.environment;
        info!(%environment, "Environment was removed or disabled upstream; it is no longer served");
    }

    fn is_served(&self) -> bool {
        self.means.snapshots.is_served(&self.environment)
    }

    /// Polls once; returns the delay until the next poll.
    async fn round(&mut self) -> Duration {
        let polled = self.refresh().await;
        let (environment, documents) = (&self.environment, &self.sources);
        let in_use = self.means.credentials.tokens(&self.environment);
        self.lines.keep(in_use, |token| documents.document(token).is_some());
        let Err(failure) = polled else {
            if self.pace.failures() > 0 {
                info!(%environment, "Upstream responds again");
            }
            let pause = self.pace.after_success(rand::random());
            let recheck = self.sources.next_question();
            let recheck = recheck.and_then(|at| at.checked_duration_since(Instant::now()));
            return recheck.map_or(pause, |recheck| pause.min(recheck));
        };
        if self.pace.failures() == 0 {
            warn!(
                %environment,
                error = error_chain(&failure),
                "Fetching flags failed and is retried; the last known flags stay"
            );
        } else {
            debug!(%environment, error = error_chain(&failure), "Still failing to fetch flags");
        }
        let pause = self.pace.after_failure(failure.wish(), rand::random());
        // The failure of one token must not make the flags of the others stale.
        let is_partial = self.sources.heard() && failure.wish().is_none();
        if is_partial { pause.min(self.means.config.interval) } else { pause }
    }

    /// Polls once with every token without a synced stream and publishes changes, even if some of the
    /// tokens failed.
    async fn refresh(&mut self) -> Result<(), Failure> {
        let Means { upstream, credentials, .. } = &self.means;
        let (environment, removal_grace) = (&self.environment, self.held_for);
        let poll = Round { upstream, credentials, environment, held_for: removal_grace };
        self.sources.begin();
        let synced = self.lines.speak_for();
        let Asked { failure: error, prefers_streaming } =
            poll.ask(&mut self.sources, &synced).await;
        if prefers_streaming {
            self.lines.hint();
        }
        // Streamed flags are confirmed as of the stream's last activity.
        let confirmed_at =
            self.lines.last_signs().map(|(_, at)| at).fold(Instant::now(), Instant::min);
        self.publish(Some(confirmed_at)).await?;
        error.map_or(Ok(()), Err)
    }

    /// Publishes unpublished changes. The served flags count as confirmed at `confirmed_at` if upstream
    /// responded to every token in use or streams to it.
    async fn publish(&mut self, confirmed_at: Option<Instant>) -> Result<(), Failure> {
        let Self {
            environment,
            means: dependencies,
            sources: documents,
            lines: streams,
            is_complete: has_all_tokens,
            ..
        } = self;
        *has_all_tokens = dependencies.credentials.is_complete(environment);
        let in_use = dependencies.credentials.tokens(environment);
        let is_complete = documents.settle(&in_use, &streams.speak_for(), *has_all_tokens);
        documents.advance(Instant::now(), streams.last_signs());
        let served = dependencies.snapshots.load(environment);
        if documents.is_dirty() || (is_complete && served.is_none()) {
            let before = served.and_then(|served| served.confirmed_at());
            let confirmed = if is_complete { confirmed_at.max(before) } else { before };
            let (input, replaced) = (documents.parts(), documents.take_replaced());
            let make = move || {
                drop(replaced);
                merged(&input)
            };
            let scope = Scope { environment: environment.clone(), projects: documents.projects() };
            let published = publish(&dependencies.snapshots, scope, confirmed, make).await?;
            documents.published();
            if let Some(snapshot) = published {
                let run = PreviousRun { upstream_revision: documents.revision() };
                let key = Key::Flags(environment.clone());
                dependencies.saver.save(key, move || stored_form(&snapshot, run));
            }
        } else if is_complete && let (Some(served), Some(confirmed_at)) = (served, confirmed_at) {
            served.confirm(confirmed_at);
        }
        Ok(())
    }

    /// Applies stream events until a poll is needed: when one is due and not every token in use has a
    /// synced stream, when the tokens in use change, or on a poll request.
    async fn listen(&mut self, mut due: Instant, poll_requested: &mut watch::Receiver<()>) {
        let check_interval = LOOK_EVERY.min(self.means.config.interval);
        let mut checks = interval_at(Instant::now() + check_interval, check_interval);
        loop {
            let (documents, was_synced) = (&self.sources, self.lines.speak_for_all());
            let next_deadline = documents.next_change();
            let (at, event) = tokio::select! {
                () = sleep_until(due), if !was_synced => return,
                () = sleep_until(next_deadline.unwrap_or(due)), if next_deadline.is_some() => {
                    // The next poll retries and logs the error.
                    if self.publish(self.lines.heard()).await.is_err() {
                        return;
                    }
                    continue;
                }
                // The sender outlives this task.
                Ok(()) = poll_requested.changed() => return,
                _ = checks.tick() => {
                    let in_use = self.means.credentials.tokens(&self.environment);
                    if !self.is_served() || in_use != self.lines.tokens_in_use() || self.has_completed() {
                        return;
                    }
                    continue;
                }
                event = self.lines.next(|token| documents.event(token)) => event,
            };
            let action = match event {
                Happened::Told(events) => self.follow(at, events).await,
                Happened::Refused(refusal, next, error) => {
                    self.miss(Want::of(refusal), error.map(|it| error_chain(&it)).as_deref());
                    Then::Lost(next)
                }
                Happened::Ended(End::Over(_), next, None) => {
                    debug!(environment = %self.environment, "Upstream closed its stream");
                    Then::Lost(next)
                }
                Happened::Ended(_, next, error) => {
                    self.miss(Want::Lost, error.map(|it| error_chain(&it)).as_deref());
                    Then::Lost(next)
                }
            };
            match action {
                Then::Ask | Then::Lost(Next { polls_now: true, .. }) => due = Instant::now(),
                Then::Lost(_) if was_synced => {
                    due = Instant::now() + self.pace.after_success(rand::random());
                }
                Then::Lost(_) | Then::Listen => {}
            }
        }
    }

    /// Whether flags of an earlier run have become removable since the last check.
    fn has_completed(&mut self) -> bool {
        let before = self.is_complete;
        self.is_complete = self.means.credentials.is_complete(&self.environment);
        self.is_complete && !before && self.sources.has_inherited()
    }

    /// Applies the events of a stream.
    async fn follow(&mut self, at: usize, events: Vec<Event>) -> Then {
        let (update, changed) = match self.read(at, events).await {
            Ok(read) => read,
            Err(error) => return Then::Lost(self.leave(at, &error)),
        };
        let mut action = Then::Listen;
        if let Some(Reached { id: event_id, gone: removed_flags, .. }) = update.reached {
            let credential = self.lines.credential(at);
            let has_others = self.lines.tokens_in_use().len() > 1;
            let now = Instant::now();
            let digest = credential.token.digest();
            if changed.is_some() && self.sources.is_event_outdated(&digest, event_id, now) {
                self.miss(Want::Lost, Some("the stream sent an older state than the known one"));
                return Then::Lost(self.lines.close(at, End::Outdated));
            }
            let until = now + self.held_for;
            // While polls fail, or upstream has sent `Retry-After`, no extra poll is made.
            if has_others
                && self.sources.hold(credential, &removed_flags, until)
                && self.pace.failures() == 0
            {
                action = Then::Ask;
            }
            self.sources.follow(credential, event_id, changed, now);
            self.means.credentials.accept(&self.environment, &digest);
            self.lines.understood(at);
            if self.lines.speak_for_all() {
                self.arrive();
            }
        }
        if let Err(error) = self.publish(self.lines.heard()).await {
            return Then::Lost(self.leave(at, &error));
        }
        if update.dismissed {
            self.miss(Want::Dismissed, None);
            action = Then::Lost(self.lines.close(at, End::Dismissed));
        }
        action
    }

    /// Parses and applies the events of a stream on a blocking thread.
    fn read(
        &self,
        at: usize,
        events: Vec<Event>,
    ) -> impl Future<Output = Result<(Step, Option<Received>), Untold>> + use<> {
        let digest = self.lines.credential(at).token.digest();
        let continues = self.lines.goes_on(at, self.sources.event(&digest));
        let known = self.sources.document(&digest).cloned();
        let is_shared = self.lines.tokens_in_use().len() > 1;
        async move {
            // Most of the time only a keep-alive comment arrived.
            if events.is_empty() {
                return Ok((Step::default(), None));
            }
            let apply = move || {
                let mut update = told::follow(known.as_deref(), continues, &events, is_shared)?;
                let changed = update.reached.as_mut().and_then(|reached| {
                    let states = mem::take(&mut reached.passed);
                    Some(Received::new(reached.news.take()?).having_passed(&states))
                });
                Ok((update, changed))
            };
            spawn_blocking(apply).await?
        }
    }

    /// Closes a stream whose events cannot be applied. The next one starts with a full state.
    fn leave(&mut self, at: usize, error: &dyn std::error::Error) -> Next {
        self.miss(Want::Lost, Some(&error_chain(error)));
        self.sources.forget_event(&self.lines.credential(at).token.digest());
        self.lines.close(at, End::Unreadable)
    }

    /// Records that every token in use has a synced stream.
    fn arrive(&mut self) {
        // Earlier poll failures no longer matter.
        self.pace.after_success(rand::random());
        if self.way != Way::Streams {
            info!(environment = %self.environment, "Upstream's event stream is open; polling stops");
            self.way = Way::Streams;
        }
    }

    /// Records why a stream is missing; logs it if the reason is new.
    fn miss(&mut self, reason: Want, error: Option<&str>) {
        let (environment, why, before) = (&self.environment, reason.as_str(), self.way);
        let is_new = match (before, reason) {
            (Way::Polls | Way::Streams, _) => true,
            // The first reason has been logged; later failures of the same outage are not.
            (Way::PollsFor(_), Want::Failed | Want::Lost) => false,
            (Way::PollsFor(logged), reason) => logged != reason,
        };
        if !is_new {
            return debug!(%environment, error, "Still polling upstream: {why}");
        }
        self.way = Way::PollsFor(reason);
        let is_expected = self.means.config.mode == Mode::Stream;
        match (before, reason) {
            (_, Want::NotOffered | Want::NotAdmitted) if is_expected => {
                warn!(%environment, "Polling upstream although --upstream-mode is stream: {why}");
            }
            (Way::Streams, _) => info!(%environment, error, "Polling upstream again: {why}"),
            (Way::Polls | Way::PollsFor(_), _) => {
                info!(%environment, error, "Polling upstream: {why}");
            }
        }
    }
}

/// Serializes a snapshot's flags for the store, with the state that the next run needs from this one.
/// The projects are stored as the query of the document.
fn stored_form(snapshot: &Snapshot, run: PreviousRun) -> Bytes {
    let all = snapshot.client_features(snapshot.projects(), Filter::default(), SegmentFormat::Separate);
    Document::encode_stored(&all.get_or_encode(ContentCoding::Identity).bytes, run).into()
}

/// Why events of a stream cannot be applied.
#[derive(Debug, thiserror::Error)]
enum Untold {
    #[error(transparent)]
    Events(#[from] told::Error),
    #[error("parsing or compiling events of upstream's stream panicked")]
    Panic(#[from] JoinError),
}

#[cfg(test)]
mod tests;
