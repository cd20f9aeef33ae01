//! The registry of the served snapshots, by environment.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use arc_swap::ArcSwap;
use foldhash::fast::RandomState;
use tokio::sync::watch;

use super::served_snapshot::ServedSnapshot;
#[cfg(test)]
use crate::protocol::features::Document;
use crate::token::{Environment, Scope};

/// The snapshots of all environments. A cheap handle.
///
/// Reading is one atomic load and a look-up. A swap does not block readers.
#[derive(Clone, Debug)]
pub struct Snapshots(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    current: ArcSwap<State>,
    swap_count: watch::Sender<u64>,
}

#[derive(Clone, Debug, Default)]
struct State {
    environment_filter: EnvironmentFilter,
    snapshots: Arc<HashMap<Environment, Arc<ServedSnapshot>, RandomState>>,
}

/// The environments that are served.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum EnvironmentFilter {
    /// All environments that have a snapshot.
    #[default]
    Any,
    /// Only these environments.
    Only(BTreeSet<Environment>),
    /// All environments except these.
    Except(BTreeSet<Environment>),
}

impl EnvironmentFilter {
    fn contains(&self, environment: &Environment) -> bool {
        match self {
            Self::Any => true,
            Self::Only(these) => these.contains(environment),
            Self::Except(these) => !these.contains(environment),
        }
    }
}

impl Default for Snapshots {
    fn default() -> Self {
        let current = ArcSwap::default();
        Self(Arc::new(Inner { current, swap_count: watch::Sender::new(0) }))
    }
}

impl Snapshots {
    /// The current state of an environment.
    pub fn load(&self, environment: &Environment) -> Option<Arc<ServedSnapshot>> {
        self.0.current.load().snapshots.get(environment).cloned()
    }

    /// The current state of the scope's environment, if it has the flags of the scope's projects.
    pub fn load_for_scope(&self, scope: &Scope) -> Option<Arc<ServedSnapshot>> {
        self.load(&scope.environment).filter(|it| it.projects().covers(&scope.projects))
    }

    /// The current state of every environment.
    pub fn all(&self) -> Arc<HashMap<Environment, Arc<ServedSnapshot>, RandomState>> {
        Arc::clone(&self.0.current.load().snapshots)
    }

    /// Whether the environment has a snapshot or may get one.
    pub fn is_environment_allowed(&self, environment: &Environment) -> bool {
        self.0.current.load().environment_filter.contains(environment)
    }

    /// Serves only these environments from now on and drops the snapshots of others. Returns whether
    /// the filter changed.
    pub fn set_environments(&self, served: &EnvironmentFilter) -> bool {
        let before = self.0.current.rcu(|current| {
            let snapshots = current.snapshots.iter().filter(|(name, _)| served.contains(name));
            let snapshots = snapshots.map(|(name, it)| (name.clone(), Arc::clone(it)));
            State { environment_filter: served.clone(), snapshots: Arc::new(snapshots.collect()) }
        });
        self.0.swap_count.send_modify(|count| *count += 1);
        before.environment_filter != *served
    }

    /// Makes a snapshot the current one of its environment, if that environment is served.
    pub fn swap(&self, snapshot: ServedSnapshot) -> Arc<ServedSnapshot> {
        let snapshot = Arc::new(snapshot);
        self.0.current.rcu(|current| {
            let mut next = State::clone(current);
            if next.environment_filter.contains(snapshot.environment()) {
                let entry = (snapshot.environment().clone(), Arc::clone(&snapshot));
                Arc::make_mut(&mut next.snapshots).extend([entry]);
            }
            next
        });
        self.0.swap_count.send_modify(|count| *count += 1);
        snapshot
    }

    /// Replaces the flags of an environment, as publishing does.
    #[cfg(test)]
    pub(crate) fn replace(&self, scope: Scope, document: Document) {
        self.swap(match self.load(&scope.environment) {
            None => ServedSnapshot::build(scope, document, None),
            Some(previous) => ServedSnapshot::rebuild_from(&previous, scope, document, None),
        });
    }

    /// Notifies of each swap and of each change of the served environments.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.swap_count.subscribe()
    }

    /// Waits until the environment has a snapshot; `None` once it is not served. Dropping the future
    /// is safe.
    pub async fn wait_for_environment(
        &self,
        environment: &Environment,
    ) -> Option<Arc<ServedSnapshot>> {
        self.wait_until_found(environment, || self.load(environment)).await
    }

    /// Waits until the scope's environment has a snapshot with the flags of the scope's projects;
    /// `None` once it is not served. Dropping the future is safe.
    pub async fn wait_for_scope(&self, scope: &Scope) -> Option<Arc<ServedSnapshot>> {
        self.wait_until_found(&scope.environment, || self.load_for_scope(scope)).await
    }

    /// Waits until any environment has a snapshot. Dropping the future is safe.
    pub async fn wait_for_any(&self) {
        let mut swaps = self.0.swap_count.subscribe();
        while self.0.current.load().snapshots.is_empty() {
            if swaps.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    async fn wait_until_found(
        &self,
        environment: &Environment,
        find: impl Fn() -> Option<Arc<ServedSnapshot>>,
    ) -> Option<Arc<ServedSnapshot>> {
        let mut swaps = self.0.swap_count.subscribe();
        loop {
            let found = find();
            if found.is_some() || !self.is_environment_allowed(environment) {
                return found;
            }
            if swaps.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// The environments that have a snapshot, sorted.
    pub fn environments(&self) -> BTreeSet<Environment> {
        self.0.current.load().snapshots.keys().cloned().collect()
    }
}
