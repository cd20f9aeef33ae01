//! One environment of upstream that is followed: by polls in rounds, and by streams between them.
//!
//! As long as upstream tells on streams what changes for every token in use, nothing is polled. What a
//! stream tells is published as what a poll brings is. Where there are several tokens, that one sees a
//! flag no more is published when the others have had time to tell of it: those whose streams do not
//! speak are asked with at once.

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
    saver::Saver,
    snapshot::{Filter, Segments, Snapshot, Snapshots, body::Coding},
    store::Key,
    telemetry::report,
    token::{Environment, Scope},
    upstream::{Credentials, Upstream},
    wire::{
        features::{Document, EarlierRun},
        sse::Event,
    },
};

/// How snapshots are kept current.
#[derive(Clone, Debug)]
pub struct Config {
    /// The time between two fetches of an environment's flags.
    pub interval: Duration,
    /// Whether upstream's streams are followed.
    pub mode: Mode,
}

/// How often it is looked whether other tokens are in use than those that streams are of.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How long others' word is waited for of a flag that a token sees no more. Where streams tell of both,
/// milliseconds pass between.
const HELD_FOR: Duration = Duration::from_secs(1);

/// What following an environment needs of others.
#[derive(Clone, Debug)]
pub(super) struct Means {
    pub(super) config: Config,
    pub(super) upstream: Upstream,
    pub(super) credentials: Credentials,
    pub(super) snapshots: Snapshots,
    pub(super) saver: Saver,
}

/// An environment, and what is known of it.
#[derive(Debug)]
pub(super) struct Followed {
    environment: Environment,
    means: Means,
    sources: Sources,
    lines: Lines,
    pace: Pace,
    way: Way,
    held_for: Duration,
    /// Whether every token that can be expected was known at the last look.
    is_complete: bool,
}

/// How flags come, as was said last.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    /// By polls; of streams nothing was said.
    Polls,
    /// By polls, for want of streams.
    PollsFor(Want),
    /// By streams.
    Streams,
}

/// What follows from what happened on a line.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Then {
    /// Nothing.
    Listen,
    /// Those tokens are asked with whose lines do not speak, if there are such.
    Ask,
    /// What follows from the loss of a stream, or from not getting one.
    Lost(Next),
}

/// Why there is no stream.
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
            Self::NotOffered => "it offers no stream",
            Self::NotAdmitted => "it does not admit our token to its stream",
            Self::Crowded => "it has no room for another stream",
            Self::Failed => "its stream cannot be opened",
            Self::Lost => "its stream was lost",
            Self::Dismissed => "it sends those who can poll to polling",
        }
    }
}

impl Followed {
    pub(super) fn new(environment: Environment, means: Means) -> Self {
        let served = means.snapshots.load(&environment);
        let sources = Sources::new(served.as_deref(), Instant::now());
        let lines = Lines::new(means.config.mode, means.upstream.clone());
        let pace = Pace::new(means.config.interval);
        let (way, held_for, is_complete) = (Way::Polls, HELD_FOR, false);
        Self { environment, means, sources, lines, pace, way, held_for, is_complete }
    }

    /// Follows the environment until it is not served any more. Whoever kicks wants a round at once.
    pub(super) async fn run(mut self, mut kicked: watch::Receiver<()>) {
        while self.is_served() {
            let due = Instant::now() + self.round().await;
            self.listen(due, &mut kicked).await;
        }
        let environment = &self.environment;
        info!(%environment, "Upstream has this environment no more, or has disabled it");
    }

    fn is_served(&self) -> bool {
        self.means.snapshots.serves(&self.environment)
    }

    /// Asks once for the environment's flags, and says when to ask again.
    async fn round(&mut self) -> Duration {
        let refreshed = self.refresh().await;
        let (environment, sources) = (&self.environment, &self.sources);
        let in_use = self.means.credentials.tokens(&self.environment);
        self.lines.keep(in_use, |token| sources.document(token).is_some());
        let Err(failure) = refreshed else {
            if self.pace.failures() > 0 {
                info!(%environment, "Upstream answers again");
            }
            let pause = self.pace.after_success(rand::random());
            let asks_again = self.sources.next_question();
            let in_doubt = asks_again.and_then(|at| at.checked_duration_since(Instant::now()));
            return in_doubt.map_or(pause, |doubt| pause.min(doubt));
        };
        if self.pace.failures() == 0 {
            warn!(%environment, error = report(&failure), "Cannot refresh, what is known stays");
        } else {
            debug!(%environment, error = report(&failure), "Still cannot refresh");
        }
        let pause = self.pace.after_failure(failure.wish(), rand::random());
        // One token's failure does not make the others' flags older.
        let sound = self.sources.heard() && failure.wish().is_none();
        if sound { pause.min(self.means.config.interval) } else { pause }
    }

    /// Asks once, with every token in hand of which upstream does not tell by itself what changes, and
    /// publishes what is new.
    ///
    /// What some tokens brought is published although others failed.
    async fn refresh(&mut self) -> Result<(), Failure> {
        let Means { upstream, credentials, .. } = &self.means;
        let (environment, held_for) = (&self.environment, self.held_for);
        let round = Round { upstream, credentials, environment, held_for };
        self.sources.begin();
        let followed = self.lines.speak_for();
        let Asked { failure, prefers_streaming } = round.ask(&mut self.sources, &followed).await;
        if prefers_streaming {
            self.lines.hint();
        }
        // What is followed is known to be current as of the last sign of life.
        let heard = self.lines.last_signs().map(|(_, at)| at).fold(Instant::now(), Instant::min);
        self.publish(Some(heard)).await?;
        failure.map_or(Ok(()), Err)
    }

    /// Publishes what is not yet, and keeps since when it is known to be current: `heard`, if by then
    /// upstream has answered for, or follows up on, every token in use.
    async fn publish(&mut self, heard: Option<Instant>) -> Result<(), Failure> {
        let Self { environment, means, sources, lines, is_complete, .. } = self;
        *is_complete = means.credentials.is_complete(environment);
        let in_use = means.credentials.tokens(environment);
        let whole = sources.settle(&in_use, &lines.speak_for(), *is_complete);
        sources.advance(Instant::now(), lines.last_signs());
        let served = means.snapshots.load(environment);
        if sources.is_dirty() || (whole && served.is_none()) {
            let before = served.and_then(|served| served.confirmed());
            let confirmed = if whole { heard.max(before) } else { before };
            let (parts, replaced) = (sources.parts(), sources.take_replaced());
            let make = move || {
                drop(replaced);
                merged(&parts)
            };
            let scope = Scope { environment: environment.clone(), projects: sources.projects() };
            let published = publish(&means.snapshots, scope, confirmed, make).await?;
            sources.published();
            if let Some(snapshot) = published {
                let run = EarlierRun { upstream_revision: sources.revision() };
                let key = Key::Flags(environment.clone());
                means.saver.save(key, move || stored_form(&snapshot, run));
            }
        } else if whole && let (Some(served), Some(heard)) = (served, heard) {
            served.confirm(heard);
        }
        Ok(())
    }

    /// Follows the streams until flags are to be asked for: when that is due and not every token in use
    /// has a stream that speaks for it, when other tokens are in use, or when somebody kicks.
    async fn listen(&mut self, mut due: Instant, kicked: &mut watch::Receiver<()>) {
        let look_every = LOOK_EVERY.min(self.means.config.interval);
        let mut looks = interval_at(Instant::now() + look_every, look_every);
        loop {
            let (sources, spoke) = (&self.sources, self.lines.speak_for_all());
            let next_change = sources.next_change();
            let (at, happened) = tokio::select! {
                () = sleep_until(due), if !spoke => return,
                () = sleep_until(next_change.unwrap_or(due)), if next_change.is_some() => {
                    // A round tries again, and tells of it.
                    if self.publish(self.lines.heard()).await.is_err() {
                        return;
                    }
                    continue;
                }
                // The sender lives as long as the owner of this.
                Ok(()) = kicked.changed() => return,
                _ = looks.tick() => {
                    let in_use = self.means.credentials.tokens(&self.environment);
                    if !self.is_served() || in_use != self.lines.in_use() || self.has_completed() {
                        return;
                    }
                    continue;
                }
                happened = self.lines.next(|token| sources.event(token)) => happened,
            };
            let then = match happened {
                Happened::Told(events) => self.follow(at, events).await,
                Happened::Refused(refusal, next, error) => {
                    self.miss(Want::of(refusal), error.map(|it| report(&it)).as_deref());
                    Then::Lost(next)
                }
                Happened::Ended(End::Over(_), next, None) => {
                    debug!(environment = %self.environment, "Upstream has ended its stream");
                    Then::Lost(next)
                }
                Happened::Ended(_, next, error) => {
                    self.miss(Want::Lost, error.map(|it| report(&it)).as_deref());
                    Then::Lost(next)
                }
            };
            match then {
                Then::Ask | Then::Lost(Next { polls_now: true, .. }) => due = Instant::now(),
                Then::Lost(_) if spoke => {
                    due = Instant::now() + self.pace.after_success(rand::random());
                }
                Then::Lost(_) | Then::Listen => {}
            }
        }
    }

    /// Whether flags of an earlier run may go since the last look.
    fn has_completed(&mut self) -> bool {
        let before = self.is_complete;
        self.is_complete = self.means.credentials.is_complete(&self.environment);
        self.is_complete && !before && self.sources.has_inherited()
    }

    /// Takes what a line told.
    async fn follow(&mut self, at: usize, events: Vec<Event>) -> Then {
        let (step, news) = match self.read(at, events).await {
            Ok(read) => read,
            Err(error) => return Then::Lost(self.leave(at, &error)),
        };
        let mut then = Then::Listen;
        if let Some(Reached { id, gone, .. }) = step.reached {
            let credential = self.lines.credential(at);
            let has_others = self.lines.in_use().len() > 1;
            let now = Instant::now();
            let digest = credential.token.digest();
            if news.is_some() && self.sources.is_event_outdated(&digest, id, now) {
                self.miss(Want::Lost, Some("it told an older state than is known"));
                return Then::Lost(self.lines.close(at, End::Outdated));
            }
            let until = now + self.held_for;
            // One that fails, or wants to be left alone, is not asked for this.
            if has_others
                && self.sources.hold(credential, &gone, until)
                && self.pace.failures() == 0
            {
                then = Then::Ask;
            }
            self.sources.follow(credential, id, news, now);
            self.means.credentials.accept(&self.environment, &digest);
            self.lines.understood(at);
            if self.lines.speak_for_all() {
                self.arrive();
            }
        }
        if let Err(error) = self.publish(self.lines.heard()).await {
            return Then::Lost(self.leave(at, &error));
        }
        if step.dismissed {
            self.miss(Want::Dismissed, None);
            then = Then::Lost(self.lines.close(at, End::Dismissed));
        }
        then
    }

    /// Reads what a line told, on a thread for such work.
    fn read(
        &self,
        at: usize,
        events: Vec<Event>,
    ) -> impl Future<Output = Result<(Step, Option<Received>), Untold>> + use<> {
        let digest = self.lines.credential(at).token.digest();
        let goes_on = self.lines.goes_on(at, self.sources.event(&digest));
        let known = self.sources.document(&digest).cloned();
        let is_shared = self.lines.in_use().len() > 1;
        async move {
            // Most signs of life are comments.
            if events.is_empty() {
                return Ok((Step::default(), None));
            }
            let step = move || {
                let mut step = told::follow(known.as_deref(), goes_on, &events, is_shared)?;
                let news = step.reached.as_mut().and_then(|reached| {
                    let passed = mem::take(&mut reached.passed);
                    Some(Received::new(reached.news.take()?).having_passed(&passed))
                });
                Ok((step, news))
            };
            spawn_blocking(step).await?
        }
    }

    /// Closes a line that told what cannot be followed; the next is to tell everything.
    fn leave(&mut self, at: usize, error: &dyn std::error::Error) -> Next {
        self.miss(Want::Lost, Some(&report(error)));
        self.sources.forget_event(&self.lines.credential(at).token.digest());
        self.lines.close(at, End::Unreadable)
    }

    /// Takes note that upstream tells by itself what changes, for every token in use.
    fn arrive(&mut self) {
        // Failed polls are nobody's concern any more.
        self.pace.after_success(rand::random());
        if self.way != Way::Streams {
            info!(environment = %self.environment, "Follows upstream's stream");
            self.way = Way::Streams;
        }
    }

    /// Takes note of want of a stream; says so when that is new.
    fn miss(&mut self, want: Want, error: Option<&str>) {
        let (environment, why, before) = (&self.environment, want.as_str(), self.way);
        let is_new = match (before, want) {
            (Way::Polls | Way::Streams, _) => true,
            // Why streams are missing is said already; that they still are is no news.
            (Way::PollsFor(_), Want::Failed | Want::Lost) => false,
            (Way::PollsFor(said), want) => said != want,
        };
        if !is_new {
            return debug!(%environment, error, "Still polls upstream: {why}");
        }
        self.way = Way::PollsFor(want);
        let is_expected = self.means.config.mode == Mode::Stream;
        match (before, want) {
            (_, Want::NotOffered | Want::NotAdmitted) if is_expected => {
                warn!(%environment, "Polls upstream, although --upstream-mode is stream: {why}");
            }
            (Way::Streams, _) => info!(%environment, error, "Polls upstream again: {why}"),
            (Way::Polls | Way::PollsFor(_), _) => {
                info!(%environment, error, "Polls upstream: {why}");
            }
        }
    }
}

/// The flags of a snapshot as they are stored, with what the next run is to know of this one. The query of
/// their listing names their projects.
fn stored_form(snapshot: &Snapshot, run: EarlierRun) -> Bytes {
    let all = snapshot.listing(snapshot.projects(), Filter::default(), Segments::Separate);
    Document::to_store(&all.make(Coding::Identity).bytes, run).into()
}

/// Why what a stream told leads nowhere.
#[derive(Debug, thiserror::Error)]
enum Untold {
    #[error(transparent)]
    Events(#[from] told::Error),
    #[error("reading or compiling what upstream's stream told has panicked")]
    Panic(#[from] JoinError),
}

#[cfg(test)]
mod tests;
