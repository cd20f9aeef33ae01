//! The served state: one immutable snapshot per environment, swapped as a whole.
//!
//! A [`Snapshot`] holds everything that a response can need: the compiled engine, the flags' text as
//! upstream sent it, and prepared bodies, each built once and shared. A request loads one snapshot and
//! uses it to the end. This module does not fetch, store or schedule anything. The caller chooses the
//! thread that builds a snapshot; building yields the processor between its steps.

mod answers;
mod asked;
pub mod body;
mod fragments;
mod listing;
mod outcomes;
mod part;
mod recent;
mod table;
mod view;

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use arc_swap::ArcSwap;
use foldhash::fast::RandomState;
use jiff::Timestamp;
use moka::sync::Cache;
use tokio::{sync::watch, time::Instant};

pub use self::{
    answers::Answers,
    asked::{Asked, Shown},
    fragments::{Fragment, FragmentId, Fragments, Reworded},
    listing::{Filter, Segments, cut},
    outcomes::{Listed, Outcomes},
    view::{Toggle, View},
};
use self::{
    body::Body,
    listing::{Listing, ListingKey},
    part::{Part, Parts},
};
use crate::{
    engine::{Engine, Flag, Problem},
    token::{Environment, Projects, Scope},
    wire::features::Document,
};

/// Memory limit of one snapshot's filtered client-features bodies, in bytes. Beyond it the least used
/// are evicted and built again on the next request.
const FILTERED_BYTES: u64 = 64 << 20;

/// Number of filtered bodies that a snapshot builds in advance because the previous one had them. The
/// limit keeps a client that sends a new filter each time from making every flag change more expensive.
const INHERITED_FILTERS: usize = 64;

/// The state of one environment, as of one response of its source.
#[derive(Debug)]
pub struct Snapshot {
    environment: Environment,
    projects: Projects,
    document: Arc<Document>,
    revision: u32,
    engine: Engine,
    problems: Vec<Problem>,
    /// When the source sent this state.
    received: Instant,
    /// When the source last confirmed this state; `None` if it has not since the process started.
    confirmed: Mutex<Option<Instant>>,
    listings: Cache<ListingKey, Arc<Listing>>,
    fragments: Fragments,
    parts: Parts,
    viewed: AtomicU64,
    answers: Answers,
}

impl Snapshot {
    /// Compiles a document that has every flag of the scope's projects. Problems with single flags do
    /// not fail the build; they are available as [`Snapshot::problems`].
    ///
    /// Takes milliseconds for thousands of flags.
    pub fn build(scope: Scope, document: Document, confirmed_at: Option<Instant>) -> Self {
        let received_at = Instant::now();
        let (engine, problems) = Engine::compile(&document);
        let (fragments, cache) = (Fragments::of(&engine, None), Answers::new(None));
        let stored = document.stored_revision().and_then(|it| u32::try_from(it).ok());
        let revision = stored.unwrap_or_else(|| revision_at(Timestamp::now()));
        let times = (received_at, confirmed_at);
        Self::of(scope, document, revision, (engine, problems, fragments), cache, times)
    }

    /// Like [`Snapshot::build`], to replace a snapshot of the same environment. Builds in advance what
    /// requests after the swap are likely to need: the views and unfiltered bodies that the previous
    /// snapshot has, and the filtered bodies that were requested from it most often.
    ///
    /// Reuses what did not change: compiled flags, and bodies with all their content codings.
    pub fn after(
        previous: &Self,
        scope: Scope,
        document: Document,
        confirmed_at: Option<Instant>,
    ) -> Self {
        let times = (Instant::now(), confirmed_at);
        let Self { document: before, engine, problems, fragments, .. } = previous;
        let document = document.sharing(before);
        give_way();
        let (new, problems) = engine.recompile(before, problems, &document);
        give_way();
        let fragments = Fragments::of(&new, Some((engine, fragments)));
        give_way();
        let cache = Answers::new(Some(&previous.answers));
        let revision = revision_at(Timestamp::now()).max(previous.revision.saturating_add(1));
        let new = (new, problems, fragments);
        let snapshot = Self::of(scope, document, revision, new, cache, times);
        snapshot.inherit(previous);
        snapshot
    }

    fn of(
        Scope { environment, projects }: Scope,
        document: Document,
        revision: u32,
        (engine, problems, fragments): (Engine, Vec<Problem>, Fragments),
        evaluation_cache: Answers,
        (received_at, confirmed_at): (Instant, Option<Instant>),
    ) -> Self {
        Self {
            fragments,
            listings: Cache::builder()
                .max_capacity(FILTERED_BYTES)
                .weigher(|_, listing: &Arc<Listing>| {
                    u32::try_from(listing.body().weight()).unwrap_or(u32::MAX)
                })
                .build(),
            parts: Parts::default(),
            viewed: AtomicU64::new(0),
            answers: evaluation_cache,
            environment,
            projects,
            document: Arc::new(document),
            revision,
            engine,
            problems,
            received: received_at,
            confirmed: Mutex::new(confirmed_at),
        }
    }

    /// The environment whose state this is.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// The projects whose flags are complete. Flags of other projects may be present, too.
    pub fn projects(&self) -> &Projects {
        &self.projects
    }

    /// The flags and segments as the source sent them.
    pub fn document(&self) -> &Arc<Document> {
        &self.document
    }

    /// The compiled flags.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The compiled flag of this name.
    pub fn flag(&self, name: &str) -> Option<&Flag> {
        self.engine.find(name).map(|id| self.engine.flag(id))
    }

    /// Problems with the definitions of single flags.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// When the source sent this state, or when it was read from the store.
    pub fn received(&self) -> Instant {
        self.received
    }

    /// When the source last confirmed that this is the current state; `None` if it has not since the
    /// process started, as for flags read from the store.
    pub fn confirmed(&self) -> Option<Instant> {
        *self.lock_confirmed()
    }

    /// The time since the source last confirmed this state, measured at `now`.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        Some(now.saturating_duration_since(self.confirmed()?))
    }

    /// Records that the source confirmed this state. A time before the latest confirmation is ignored.
    pub fn confirm(&self, at: Instant) {
        let mut confirmed = self.lock_confirmed();
        *confirmed = (*confirmed).max(Some(at));
    }

    /// Ignores poisoning: a panic under this lock leaves a valid time.
    fn lock_confirmed(&self) -> MutexGuard<'_, Option<Instant>> {
        self.confirmed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The flag configuration limited to `projects` and `filter`, as `/api/client/features` sends it.
    /// Built on first use.
    pub fn listing(&self, projects: &Projects, filter: Filter, segments: Segments) -> Arc<Body> {
        if filter == Filter::default() {
            return self.whole(&self.parts.of(projects), projects, segments);
        }
        let key = ListingKey { projects: projects.clone(), filter, segments };
        let build = || {
            Listing::of(Arc::new(listing::build(
                &self.environment,
                &self.document,
                &key,
                self.revision,
            )))
        };
        self.listings.get_with_by_ref(&key, build).body_counted()
    }

    /// The flag configuration of `projects`, without a filter.
    fn whole(&self, data: &Part, projects: &Projects, segments: Segments) -> Arc<Body> {
        let slot = data.listing(segments);
        if let Some(body) = slot.get() {
            return Arc::clone(body);
        }
        let key = ListingKey { projects: projects.clone(), filter: Filter::default(), segments };
        let build =
            || Arc::new(listing::build(&self.environment, &self.document, &key, self.revision));
        let body = Arc::clone(slot.get_or_init(build));
        self.parts.keep_within_bounds(projects);
        body
    }

    /// The flags of `projects`, prepared for evaluation. Built on first use.
    pub fn view(&self, projects: &Projects) -> Arc<View> {
        let data = self.parts.of(projects);
        if let Some(view) = data.view().get() {
            return Arc::clone(view);
        }
        let view = Arc::clone(data.view().get_or_init(|| {
            let id = self.viewed.fetch_add(1, Ordering::Relaxed);
            Arc::new(View::of(&self.engine, &self.fragments, projects, id))
        }));
        self.parts.keep_within_bounds(projects);
        view
    }

    /// The prepared JSON of each flag.
    pub fn fragments(&self) -> &Fragments {
        &self.fragments
    }

    /// Cached evaluation results, bodies and events for frontend clients.
    pub fn answers(&self) -> &Answers {
        &self.answers
    }

    /// Builds what was requested from the previous snapshot.
    fn inherit(&self, previous: &Self) {
        for (projects, old) in &*previous.parts.all() {
            let new = self.parts.of(projects);
            if old.view().get().is_some() {
                self.view(projects);
            }
            give_way();
            for segments in [Segments::Separate, Segments::Inlined] {
                let Some(old) = old.listing(segments).get() else { continue };
                let filter = Filter::default();
                let key = ListingKey { projects: projects.clone(), filter, segments };
                new.listing(segments).get_or_init(|| self.rebuilt(&key, old));
            }
            self.parts.keep_within_bounds(projects);
        }
        let mut filtered: Vec<_> =
            previous.listings.iter().filter(|(_, listing)| listing.asked() > 0).collect();
        filtered.sort_by_key(|(_, listing)| Reverse(listing.asked()));
        filtered.truncate(INHERITED_FILTERS);
        for (key, old) in filtered {
            let body = self.rebuilt(&key, old.body());
            self.listings.insert((*key).clone(), Listing::of(body));
        }
    }

    /// The body of this snapshot for `key`, compressed in the codings that `old` was compressed in.
    fn rebuilt(&self, key: &ListingKey, old: &Arc<Body>) -> Arc<Body> {
        let new = listing::build(&self.environment, &self.document, key, self.revision);
        if new.etag() == old.etag() {
            return Arc::clone(old);
        }
        for coding in body::Coding::COMPRESSING {
            if old.ready(coding).is_some() {
                new.make(coding);
            }
        }
        Arc::new(new)
    }
}

/// The revision of a state that begins now: seconds since 1970. It grows from state to state, across
/// restarts and instances, and fits the 32 bits into which SDKs read it.
fn revision_at(now: Timestamp) -> u32 {
    u32::try_from(now.as_second()).unwrap_or(1)
}

/// Yields the processor to waiting threads between two steps of a task that takes milliseconds.
/// A server kernel may preempt only at ticks of 4 ms, and a request that needs microseconds would wait
/// that long.
fn give_way() {
    thread::yield_now();
}

/// The snapshots of all environments. A cheap handle.
///
/// Reading is one atomic load and a look-up. A swap does not block readers.
#[derive(Clone, Debug)]
pub struct Snapshots(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    current: ArcSwap<Current>,
    swaps: watch::Sender<u64>,
}

#[derive(Clone, Debug, Default)]
struct Current {
    served: Served,
    snapshots: Arc<HashMap<Environment, Arc<Snapshot>, RandomState>>,
}

/// The environments that are served.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Served {
    /// All environments that have a snapshot.
    #[default]
    Any,
    /// Only these environments.
    Only(BTreeSet<Environment>),
    /// All environments except these.
    Except(BTreeSet<Environment>),
}

impl Served {
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
        Self(Arc::new(Inner { current, swaps: watch::Sender::new(0) }))
    }
}

impl Snapshots {
    /// The current state of an environment.
    pub fn load(&self, environment: &Environment) -> Option<Arc<Snapshot>> {
        self.0.current.load().snapshots.get(environment).cloned()
    }

    /// The current state of the scope's environment, if it has the flags of the scope's projects.
    pub fn load_for(&self, scope: &Scope) -> Option<Arc<Snapshot>> {
        self.load(&scope.environment).filter(|it| it.projects.covers(&scope.projects))
    }

    /// The current state of every environment.
    pub fn all(&self) -> Arc<HashMap<Environment, Arc<Snapshot>, RandomState>> {
        Arc::clone(&self.0.current.load().snapshots)
    }

    /// Whether the environment has a snapshot or may get one.
    pub fn serves(&self, environment: &Environment) -> bool {
        self.0.current.load().served.contains(environment)
    }

    /// Serves only these environments from now on and drops the snapshots of others. Returns whether
    /// the filter changed.
    pub fn limit(&self, served: &Served) -> bool {
        let before = self.0.current.rcu(|current| {
            let snapshots = current.snapshots.iter().filter(|(name, _)| served.contains(name));
            let snapshots = snapshots.map(|(name, it)| (name.clone(), Arc::clone(it)));
            Current { served: served.clone(), snapshots: Arc::new(snapshots.collect()) }
        });
        self.0.swaps.send_modify(|count| *count += 1);
        before.served != *served
    }

    /// Makes a snapshot the current one of its environment, if that environment is served.
    pub fn swap(&self, snapshot: Snapshot) -> Arc<Snapshot> {
        let snapshot = Arc::new(snapshot);
        self.0.current.rcu(|current| {
            let mut next = Current::clone(current);
            if next.served.contains(&snapshot.environment) {
                let entry = (snapshot.environment.clone(), Arc::clone(&snapshot));
                Arc::make_mut(&mut next.snapshots).extend([entry]);
            }
            next
        });
        self.0.swaps.send_modify(|count| *count += 1);
        snapshot
    }

    /// Notifies of each swap and of each change of the served environments.
    pub fn swaps(&self) -> watch::Receiver<u64> {
        self.0.swaps.subscribe()
    }

    /// Waits until the environment has a snapshot; `None` once it is not served. Dropping the future
    /// is safe.
    pub async fn wait_for(&self, environment: &Environment) -> Option<Arc<Snapshot>> {
        self.wait(environment, || self.load(environment)).await
    }

    /// Waits until the scope's environment has a snapshot with the flags of the scope's projects;
    /// `None` once it is not served. Dropping the future is safe.
    pub async fn wait_for_scope(&self, scope: &Scope) -> Option<Arc<Snapshot>> {
        self.wait(&scope.environment, || self.load_for(scope)).await
    }

    /// Waits until any environment has a snapshot. Dropping the future is safe.
    pub async fn wait_for_any(&self) {
        let mut swaps = self.0.swaps.subscribe();
        while self.0.current.load().snapshots.is_empty() {
            if swaps.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    async fn wait(
        &self,
        environment: &Environment,
        find: impl Fn() -> Option<Arc<Snapshot>>,
    ) -> Option<Arc<Snapshot>> {
        let mut swaps = self.0.swaps.subscribe();
        loop {
            let found = find();
            if found.is_some() || !self.serves(environment) {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(flag: &str, previous: Option<&Snapshot>) -> Snapshot {
        let text = format!(r#"{{"features":[{{"name":"{flag}"}}]}}"#);
        let document = Document::parse(text.as_bytes()).unwrap();
        let environment = Environment::new("development");
        let scope = Scope { environment, projects: Projects::All };
        match previous {
            Some(previous) => Snapshot::after(previous, scope, document, None),
            None => Snapshot::build(scope, document, None),
        }
    }

    #[test]
    fn age_is_measured_from_the_latest_confirmation_and_never_falls_below_zero() {
        let (snapshot, start) = (snapshot("a", None), Instant::now());
        let second = Duration::from_secs(1);
        assert_eq!((snapshot.confirmed(), snapshot.age(start)), (None, None));
        snapshot.confirm(start + second * 10);
        assert_eq!(snapshot.age(start + second * 13), Some(second * 3));
        snapshot.confirm(start + second * 2);
        assert_eq!(snapshot.age(start + second * 13), Some(second * 3), "not moved back");
        assert_eq!(snapshot.age(start), Some(Duration::ZERO));
    }

    fn request(snapshot: &Snapshot, prefix: usize) -> Arc<Body> {
        let filter = Filter { name_prefix: Some(prefix.to_string().into()), ..Filter::default() };
        snapshot.listing(&Projects::All, filter, Segments::Separate)
    }

    fn cached_filters(snapshot: &Snapshot) -> usize {
        snapshot.listings.iter().count()
    }

    #[test]
    fn rebuilt_snapshot_prebuilds_requested_bodies_and_only_the_most_requested_filters() {
        let first = snapshot("a", None);
        let whole = || first.listing(&Projects::All, Filter::default(), Segments::Separate);
        let (body, _) = (whole(), request(&first, 0));
        request(&first, 0);
        for prefix in 1..1000 {
            request(&first, prefix);
        }
        let second = snapshot("a", Some(&first));
        assert_eq!(cached_filters(&second), INHERITED_FILTERS);
        let reused = second.listing(&Projects::All, Filter::default(), Segments::Separate);
        assert!(Arc::ptr_eq(&body, &reused), "nothing has changed");
        assert!(Arc::ptr_eq(&request(&first, 0), &request(&second, 0)), "requested twice");
        let third = snapshot("b", Some(&second));
        assert_eq!(cached_filters(&third), 1, "the others were not requested since");
        let fourth = snapshot("b", Some(&third));
        assert_eq!(cached_filters(&fourth), 0, "nothing was requested");
        assert_eq!(fourth.parts.all().len(), 1, "scopes are kept: clients cannot invent them");
    }
}
