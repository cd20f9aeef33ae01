//! Flags from upstream: one loop per environment, and one that finds the environments.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use tokio::{
    sync::{Notify, oneshot, watch},
    task::{Id, JoinError, JoinSet, spawn_blocking},
    time::sleep,
};
use tracing::{debug, error, info, warn};

use super::{
    pace::Pace,
    publish::publish,
    roll::Roll,
    sources::{Sources, merged},
};
use crate::{
    snapshot::{Filter, Segments, Served, Snapshot, Snapshots, body::Coding},
    store::{Key, Store},
    telemetry::{Latch, report},
    token::{Environment, Scope, Token},
    upstream::{Credential, Credentials, Error, ExchangeError, Fetched, Retry, Upstream},
    wire::features::{Document, projects_of},
};

/// How often upstream is asked which environments it has.
const ENVIRONMENTS_EVERY: Duration = Duration::from_mins(1);

/// How long following an environment waits after it ended of a panic.
const BEGIN_ANEW_AFTER: Duration = Duration::from_secs(1);

/// With how many tokens of an environment flags are fetched at a time.
const FETCHES_AT_ONCE: usize = 4;

/// Which environments are followed.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// Those that upstream has enabled, by this admin token.
    Enabled(Token),
    /// These.
    Named(BTreeSet<Environment>),
    /// Those that the edge has been given, or offered, tokens of.
    Offered,
}

/// How snapshots are kept current.
#[derive(Clone, Debug)]
pub struct Config {
    /// The time between two fetches of an environment's flags.
    pub interval: Duration,
}

/// Follows upstream.
#[derive(Clone, Debug)]
pub struct Follower {
    /// How often.
    pub config: Config,
    /// Which environments.
    pub wanted: Wanted,
    /// Whom to ask.
    pub upstream: Upstream,
    /// In whose name.
    pub credentials: Credentials,
    /// Tells that an offered token widened what can be fetched.
    pub discovered: Arc<Notify>,
    /// Where flags are served from.
    pub snapshots: Snapshots,
    /// Where flags are kept for a start without upstream.
    pub store: Store,
}

impl Follower {
    /// Serves what the store has kept of wanted environments, until upstream tells more; damaged records are left out.
    pub async fn restore(&self) {
        if let Wanted::Named(wanted) = &self.wanted {
            self.snapshots.limit(&Served::Only(wanted.clone()));
        }
        let stored = match self.store.environments().await {
            Ok(stored) => stored,
            Err(error) => return warn!(error = %report(&error), "Cannot look for stored flags"),
        };
        for environment in stored {
            match self.store.load(&Key::Flags(environment.clone())).await {
                Ok(Some(bytes)) => {
                    let scope = Scope { environment, projects: projects_of(&bytes) };
                    self.serve(scope, &bytes).await;
                }
                Ok(None) => {}
                Err(error) => warn!(error = %report(&error), "Cannot read stored flags"),
            }
        }
    }

    /// Serves the flags of `scope` that were kept somewhere, unless the environment has some already
    /// or is not wanted.
    pub async fn serve(&self, scope: Scope, text: &[u8]) {
        let environment = scope.environment.clone();
        if self.snapshots.load(&environment).is_some() || !self.snapshots.serves(&environment) {
            return;
        }
        // Its age is not known any more; it has not been confirmed by this process.
        let never = Timestamp::UNIX_EPOCH;
        let published = match Document::parse(text) {
            Ok(document) => publish(&self.snapshots, scope, never, || document).await,
            Err(error) => return warn!(%environment, %error, "Stored flags cannot be read"),
        };
        if let Err(error) = published {
            warn!(%environment, %error, "Stored flags cannot be compiled");
        }
    }

    /// Follows every wanted environment until dropped; those that upstream has no more, or has
    /// disabled, are neither followed nor served. The latch is released when each of those wanted
    /// at the start has had flags; without one, readiness was settled before.
    pub async fn run(self, latch: Option<Latch>) {
        let (tell, first) = oneshot::channel();
        tokio::join!(self.follow_all(tell), self.await_first(first, latch));
    }

    /// Releases the latch when each environment that was found first has had flags, or is not served
    /// any more.
    async fn await_first(
        &self,
        first: oneshot::Receiver<BTreeSet<Environment>>,
        latch: Option<Latch>,
    ) {
        let Some(latch) = latch else { return };
        // Told by the loop beside this one, which does not end.
        let Ok(first) = first.await else { return };
        for environment in &first {
            self.snapshots.wait_for(environment).await;
        }
        latch.release();
    }

    async fn follow_all(&self, tell: oneshot::Sender<BTreeSet<Environment>>) {
        let mut tell = Some(tell);
        let mut loops = JoinSet::new();
        let mut followed: BTreeMap<Environment, Id> = BTreeMap::new();
        let kick = watch::Sender::new(());
        let mut pace = Pace::new(ENVIRONMENTS_EVERY);
        let mut roll = Roll::default();
        loop {
            let (found, pause) = self.environments(&mut pace, &mut roll).await;
            if matches!(self.wanted, Wanted::Enabled(_))
                && self.snapshots.limit(&Served::Except(roll.gone()))
            {
                // Those that follow a gone one notice that.
                kick.send_replace(());
            }
            for environment in found.iter().flatten() {
                if !followed.contains_key(environment) {
                    let follower = self.clone();
                    let (name, kicked) = (environment.clone(), kick.subscribe());
                    let task = loops.spawn(follower.follow(name, kicked));
                    followed.insert(environment.clone(), task.id());
                }
            }
            // What was found first is what readiness waits for.
            if let Some(found) = found
                && (!found.is_empty() || !self.expects_environments())
                && let Some(tell) = tell.take()
            {
                // Whoever waits for it does so as long as this runs.
                let _ = tell.send(found);
            }
            let mut next = pin!(sleep(pause));
            loop {
                tokio::select! {
                    () = &mut next => break,
                    () = self.discovered.notified() => {
                        kick.send_replace(());
                        break;
                    }
                    Some(ended) = loops.join_next_with_id() => match ended {
                        // Its environment is gone: no reason to ask for another list before its time.
                        Ok((id, ())) => followed.retain(|_, task| *task != id),
                        Err(error) => {
                            error!(%error, "Following an environment ended, it begins anew");
                            followed.retain(|_, task| *task != error.id());
                            sleep(BEGIN_ANEW_AFTER).await;
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Whether readiness waits for environments that are yet to be found.
    fn expects_environments(&self) -> bool {
        !matches!(self.wanted, Wanted::Offered)
    }

    /// The environments to follow, if they can be known now, and when to look again.
    async fn environments(
        &self,
        pace: &mut Pace,
        roll: &mut Roll,
    ) -> (Option<BTreeSet<Environment>>, Duration) {
        let admin = match &self.wanted {
            Wanted::Named(named) => return (Some(named.clone()), ENVIRONMENTS_EVERY),
            Wanted::Offered => return (Some(self.credentials.environments()), ENVIRONMENTS_EVERY),
            Wanted::Enabled(admin) => admin,
        };
        let served = self.snapshots.environments();
        let wish = match self.upstream.environments(admin).await {
            Ok(list) => {
                if let Some(enabled) = roll.call(&list, served.clone()) {
                    return (Some(enabled), pace.after_success(rand::random()));
                }
                if pace.failures() == 0 {
                    warn!("Upstream lists no enabled environment, which changes nothing");
                }
                None
            }
            Err(error) => {
                if pace.failures() == 0 {
                    warn!(error = error.report(), "Cannot read upstream's environments");
                }
                wish(&error)
            }
        };
        let pause = pace.after_failure(wish, rand::random());
        (Some(served).filter(|served| !served.is_empty()), pause)
    }

    async fn follow(self, environment: Environment, mut kicked: watch::Receiver<()>) {
        let mut pace = Pace::new(self.config.interval);
        let mut sources = Sources::new(self.snapshots.load(&environment).as_deref());
        loop {
            if !self.snapshots.serves(&environment) {
                info!(%environment, "Upstream has this environment no more, or has disabled it");
                return;
            }
            let pause = match self.refresh(&environment, &mut sources).await {
                Ok(()) => {
                    if pace.failures() > 0 {
                        info!(%environment, "Upstream answers again");
                    }
                    pace.after_success(rand::random())
                }
                Err(error) => {
                    if pace.failures() == 0 {
                        warn!(%environment, error = %report(&error), "Cannot refresh, what is known stays");
                    } else {
                        debug!(%environment, error = %report(&error), "Still cannot refresh");
                    }
                    let pause = pace.after_failure(error.wish(), rand::random());
                    // One token's failure does not make the others' flags older.
                    let sound = sources.heard() && error.wish().is_none();
                    if sound { pause.min(self.config.interval) } else { pause }
                }
            };
            tokio::select! {
                () = sleep(pause) => {}
                // The sender lives as long as this loop's owner.
                Ok(()) = kicked.changed() => {}
            }
        }
    }

    /// Asks once for the environment's flags, with every token in hand, and publishes what is new.
    ///
    /// What some tokens brought is published although others failed.
    async fn refresh(
        &self,
        environment: &Environment,
        sources: &mut Sources,
    ) -> Result<(), Failure> {
        sources.begin();
        let asked = self.ask_all(environment, sources).await;
        let whole = sources.settle(&self.credentials.tokens(environment));
        let served = self.snapshots.load(environment);
        if sources.is_dirty() || (whole && served.is_none()) {
            let confirmed = match &served {
                Some(served) if !whole => served.confirmed(),
                _ => Timestamp::now(),
            };
            let parts = sources.parts();
            let make = move || merged(&parts);
            let scope = Scope { environment: environment.clone(), projects: sources.projects() };
            let snapshot = publish(&self.snapshots, scope, confirmed, make).await?;
            sources.published();
            self.keep(&snapshot).await;
        } else if whole && let Some(served) = served {
            served.confirm(Timestamp::now());
        }
        asked
    }

    /// Asks with every token in hand; fails unless all answered, a refusal of some aside.
    async fn ask_all(
        &self,
        environment: &Environment,
        sources: &mut Sources,
    ) -> Result<(), Failure> {
        let mut tokens = self.credentials.obtain(environment).await?;
        let mut asked = BTreeSet::new();
        let (mut answered, mut refusal, mut failure) = (false, None, None);
        while !tokens.is_empty() {
            let mut others = Vec::new();
            for (credential, answer) in self.fetch(tokens, sources).await {
                let digest = credential.token.digest();
                asked.insert(digest);
                match take(&credential, answer, sources).await {
                    Ok(()) => {
                        self.credentials.accept(environment, &digest);
                        answered = true;
                    }
                    Err(Failure::Upstream(error)) if error.is_unauthorized() => {
                        let cause = match self.credentials.replace(environment, &digest).await {
                            // One replacement in a round: upstream may refuse every token.
                            Ok(found) if refusal.is_none() => {
                                others = found;
                                Failure::Upstream(error)
                            }
                            Ok(_) => Failure::Upstream(error),
                            Err(cause) => Failure::Credentials(cause),
                        };
                        refusal.get_or_insert(cause);
                    }
                    Err(cause) => {
                        failure.get_or_insert(cause);
                    }
                }
            }
            others.retain(|it| !asked.contains(&it.token.digest()));
            tokens = others;
        }
        match failure.or(refusal.filter(|_| !answered)) {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    /// Asks with each of `tokens`, with a few at a time.
    async fn fetch(
        &self,
        tokens: Vec<Credential>,
        sources: &Sources,
    ) -> Vec<(Credential, Result<Fetched, Error>)> {
        let fetch = |credential: Credential| {
            let upstream = self.upstream.clone();
            let known = sources.etag(&credential.token.digest()).map(str::to_owned);
            async move {
                let fetched = upstream.features(&credential.token, known.as_deref()).await;
                (credential, fetched.map(|it| it.flags))
            }
        };
        let fetches: Vec<_> = tokens.into_iter().map(fetch).collect();
        stream::iter(fetches).buffered(FETCHES_AT_ONCE).collect().await
    }

    async fn keep(&self, snapshot: &Snapshot) {
        // Its query says whose flags these are.
        let all = snapshot.listing(snapshot.projects(), Filter::default(), Segments::Separate);
        let text = all.make(Coding::Identity).bytes.clone();
        let key = Key::Flags(snapshot.environment().clone());
        if let Err(error) = self.store.save(&key, &text).await {
            warn!(error = %report(&error), "Cannot store flags");
        }
    }
}

/// Takes what a token was answered.
async fn take(
    credential: &Credential,
    answer: Result<Fetched, Error>,
    sources: &mut Sources,
) -> Result<(), Failure> {
    match answer.map_err(Failure::Upstream)? {
        Fetched::NotModified => sources.confirm(credential),
        Fetched::Changed { body, etag } => {
            let document = spawn_blocking(move || Document::parse(&body)).await?;
            sources.insert(credential, etag, document.map_err(Failure::Document)?);
        }
    }
    Ok(())
}

/// Why a refresh brought nothing.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("no token to ask with")]
    Credentials(#[from] ExchangeError),
    #[error("upstream gives no flags")]
    Upstream(#[source] Error),
    #[error("upstream's answer is no client-features document")]
    Document(#[source] serde_json::Error),
    #[error("reading and compiling flags came to no end")]
    Panic(#[from] JoinError),
}

impl Failure {
    /// When the source wants to be asked again.
    fn wish(&self) -> Option<Duration> {
        match self {
            Self::Upstream(error) => wish(error),
            Self::Credentials(_) | Self::Document(_) | Self::Panic(_) => None,
        }
    }
}

fn wish(error: &Error) -> Option<Duration> {
    match error.retry() {
        Retry::Later(wish) => wish,
        Retry::Never => None,
    }
}
