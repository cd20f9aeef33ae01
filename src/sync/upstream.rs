//! Flags from upstream: finds the environments, and has each followed.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Notify, oneshot, watch},
    task::{Id, JoinSet},
    time::sleep,
};
use tracing::{error, warn};

use super::{
    followed::{Config, Followed, Means},
    lines,
    pace::Pace,
    publish::publish,
    roll::Roll,
};
use crate::{
    saver::Saver,
    snapshot::{Served, Snapshots},
    store::{Key, Store},
    telemetry::{Latch, report},
    token::{Environment, Scope},
    upstream::{AdminToken, Credentials, Upstream},
    wire::features::{Document, projects_of},
};

/// How often upstream is asked which environments it has.
const ENVIRONMENTS_EVERY: Duration = Duration::from_mins(1);

/// How long following an environment waits after it ended of a panic.
const BEGIN_ANEW_AFTER: Duration = Duration::from_secs(1);

/// Which environments are followed.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// Those that upstream has enabled, by this admin token.
    Enabled(AdminToken),
    /// These.
    Named(BTreeSet<Environment>),
    /// Those that the edge has been given, or offered, tokens of.
    Offered,
}

/// Follows upstream.
#[derive(Clone, Debug)]
pub struct Follower {
    /// How.
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
    /// By whom they are saved there.
    pub saver: Saver,
}

impl Follower {
    /// Serves what the store has kept of wanted environments, until upstream tells more; damaged records are left out.
    pub async fn restore(&self) {
        if let Wanted::Named(wanted) = &self.wanted {
            self.snapshots.limit(&Served::Only(wanted.clone()));
        }
        let stored = match self.store.environments().await {
            Ok(stored) => stored,
            Err(error) => return warn!(error = report(&error), "Cannot look for stored flags"),
        };
        for environment in stored {
            match self.store.load(&Key::Flags(environment.clone())).await {
                Ok(Some(bytes)) => {
                    let scope = Scope { environment, projects: projects_of(&bytes) };
                    self.serve(scope, &bytes).await;
                }
                Ok(None) => {}
                Err(error) => warn!(error = report(&error), "Cannot read stored flags"),
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
        let published = match Document::parse_stored(text) {
            // Its age is not known: upstream has not confirmed it since this process started.
            Ok(document) => publish(&self.snapshots, scope, None, || document).await,
            Err(error) => {
                return warn!(%environment, error = report(&error), "Stored flags cannot be read");
            }
        };
        if let Err(error) = published {
            warn!(%environment, error = report(&error), "Stored flags cannot be compiled");
        }
    }

    /// Follows every wanted environment until dropped; those that upstream has no more, or has
    /// disabled, are neither followed nor served. The latch is released when each of those wanted
    /// at the start has had flags, and there are flags to serve at all.
    pub async fn run(self, latch: &Latch) {
        lines::describe();
        let (tell, first) = oneshot::channel();
        tokio::join!(self.follow_all(tell), self.await_first(first, latch));
    }

    /// Releases the latch when each environment that was found first has had flags, or is not served
    /// any more.
    async fn await_first(&self, first: oneshot::Receiver<BTreeSet<Environment>>, latch: &Latch) {
        if self.expects_environments() {
            latch.waits_for("upstream's list of environments");
        }
        // Told by the loop beside this one, which does not end.
        let Ok(first) = first.await else { return };
        for environment in &first {
            latch.waits_for(format!("the first flags of environment {environment}"));
            self.snapshots.wait_for(environment).await;
        }
        latch.waits_for(
            "a valid client token, which brings the first flags: none is configured, or upstream \
             accepts none of them",
        );
        self.snapshots.wait_for_any().await;
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
                    let follow = self.followed(environment.clone()).run(kick.subscribe());
                    let task = loops.spawn(follow);
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
                            error!(error = report(&error), "Following an environment ended, it begins anew");
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
                    warn!(error = report(&error), "Cannot read upstream's environments");
                }
                error.retry().wish()
            }
        };
        let pause = pace.after_failure(wish, rand::random());
        (Some(served).filter(|served| !served.is_empty()), pause)
    }

    /// Follows one environment.
    fn followed(&self, environment: Environment) -> Followed {
        let Self { config, upstream, credentials, snapshots, saver, .. } = self.clone();
        Followed::new(environment, Means { config, upstream, credentials, snapshots, saver })
    }
}
