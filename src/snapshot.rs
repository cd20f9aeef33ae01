//! The served state: one immutable snapshot per environment, swapped as a whole.
//!
//! A [`Snapshot`] holds everything that a response can need: the compiled engine, the flags' text as
//! upstream sent it, and prepared bodies, each built once and shared. A request loads one snapshot and
//! uses it to the end. This module does not fetch, store or schedule anything. The caller chooses the
//! thread that builds a snapshot; building yields the processor between its steps.

pub mod body;
mod client_features;
mod evaluation_cache;
mod flag_states;
mod fragments;
mod frontend_view;
mod hot_contexts;
mod recent_hashes;
mod result_cache;
mod scope_cache;

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

use self::{
    body::PreparedBody,
    client_features::{ClientFeaturesKey, CountedBody},
    scope_cache::{ScopeCache, ScopeData},
};
pub use self::{
    client_features::{Filter, SegmentFormat, filter_document},
    evaluation_cache::EvaluationCache,
    flag_states::{FlagState, FlagStates},
    fragments::{Fragment, FragmentId, Fragments, OfrepHashes},
    frontend_view::{FrontendView, ScopedFlag},
    hot_contexts::{HotContext, Include},
};
use crate::{
    engine::{Engine, Flag, Problem},
    protocol::features::Document,
    token::{Environment, Projects, Scope},
};

/// Memory limit of one snapshot's filtered client-features bodies, in bytes. Beyond it the least used
/// are evicted and built again on the next request.
const MAX_FILTERED_BYTES: u64 = 64 << 20;

/// Number of filtered bodies that a snapshot builds in advance because the previous one had them. The
/// limit keeps a client that sends a new filter each time from making every flag change more expensive.
const MAX_INHERITED_FILTERS: usize = 64;

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
    received_at: Instant,
    /// When the source last confirmed this state; `None` if it has not since the process started.
    confirmed_at: Mutex<Option<Instant>>,
    filtered_client_features: Cache<ClientFeaturesKey, Arc<CountedBody>>,
    fragments: Fragments,
    scopes: ScopeCache,
    next_view_id: AtomicU64,
    evaluation_cache: EvaluationCache,
}

impl Snapshot {
    /// Compiles a document that has every flag of the scope's projects. Problems with single flags do
    /// not fail the build; they are available as [`Snapshot::problems`].
    ///
    /// Takes milliseconds for thousands of flags.
    pub fn build(scope: Scope, document: Document, confirmed_at: Option<Instant>) -> Self {
        let received_at = Instant::now();
        let (engine, problems) = Engine::compile(&document);
        let (fragments, cache) = (Fragments::build(&engine, None), EvaluationCache::new(None));
        let stored = document.stored_revision().and_then(|it| u32::try_from(it).ok());
        let revision = stored.unwrap_or_else(|| revision_at(Timestamp::now()));
        let times = (received_at, confirmed_at);
        Self::assemble(scope, document, revision, (engine, problems, fragments), cache, times)
    }

    /// Like [`Snapshot::build`], to replace a snapshot of the same environment. Builds in advance what
    /// requests after the swap are likely to need: the views and unfiltered bodies that the previous
    /// snapshot has, and the filtered bodies that were requested from it most often.
    ///
    /// Reuses what did not change: compiled flags, and bodies with all their content codings.
    pub fn rebuild_from(
        previous: &Self,
        scope: Scope,
        document: Document,
        confirmed_at: Option<Instant>,
    ) -> Self {
        let times = (Instant::now(), confirmed_at);
        let Self { document: before, engine, problems, fragments, .. } = previous;
        let document = document.reuse_unchanged(before);
        yield_cpu();
        let (new, problems) = engine.recompile(before, problems, &document);
        yield_cpu();
        let fragments = Fragments::build(&new, Some((engine, fragments)));
        yield_cpu();
        let cache = EvaluationCache::new(Some(&previous.evaluation_cache));
        let revision = revision_at(Timestamp::now()).max(previous.revision.saturating_add(1));
        let new = (new, problems, fragments);
        let snapshot = Self::assemble(scope, document, revision, new, cache, times);
        snapshot.prebuild_requested(previous);
        snapshot
    }

    fn assemble(
        Scope { environment, projects }: Scope,
        document: Document,
        revision: u32,
        (engine, problems, fragments): (Engine, Vec<Problem>, Fragments),
        evaluation_cache: EvaluationCache,
        (received_at, confirmed_at): (Instant, Option<Instant>),
    ) -> Self {
        Self {
            fragments,
            filtered_client_features: Cache::builder()
                .max_capacity(MAX_FILTERED_BYTES)
                .weigher(|_, listing: &Arc<CountedBody>| {
                    u32::try_from(listing.body().weight()).unwrap_or(u32::MAX)
                })
                .build(),
            scopes: ScopeCache::default(),
            next_view_id: AtomicU64::new(0),
            evaluation_cache,
            environment,
            projects,
            document: Arc::new(document),
            revision,
            engine,
            problems,
            received_at,
            confirmed_at: Mutex::new(confirmed_at),
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
    pub fn received_at(&self) -> Instant {
        self.received_at
    }

    /// When the source last confirmed that this is the current state; `None` if it has not since the
    /// process started, as for flags read from the store.
    pub fn confirmed_at(&self) -> Option<Instant> {
        *self.lock_confirmed_at()
    }

    /// The time since the source last confirmed this state, measured at `now`.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        Some(now.saturating_duration_since(self.confirmed_at()?))
    }

    /// Records that the source confirmed this state. A time before the latest confirmation is ignored.
    pub fn confirm(&self, at: Instant) {
        let mut confirmed = self.lock_confirmed_at();
        *confirmed = (*confirmed).max(Some(at));
    }

    /// Ignores poisoning: a panic under this lock leaves a valid time.
    fn lock_confirmed_at(&self) -> MutexGuard<'_, Option<Instant>> {
        self.confirmed_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The flag configuration limited to `projects` and `filter`, as `/api/client/features` sends it.
    /// Built on first use.
    pub fn client_features(
        &self,
        projects: &Projects,
        filter: Filter,
        segments: SegmentFormat,
    ) -> Arc<PreparedBody> {
        if filter == Filter::default() {
            return self.unfiltered_client_features(
                &self.scopes.get_or_insert(projects),
                projects,
                segments,
            );
        }
        let key = ClientFeaturesKey { projects: projects.clone(), filter, segments };
        let build = || {
            CountedBody::new(Arc::new(client_features::build(
                &self.environment,
                &self.document,
                &key,
                self.revision,
            )))
        };
        self.filtered_client_features.get_with_by_ref(&key, build).body_for_request()
    }

    /// The flag configuration of `projects`, without a filter.
    fn unfiltered_client_features(
        &self,
        data: &ScopeData,
        projects: &Projects,
        segments: SegmentFormat,
    ) -> Arc<PreparedBody> {
        let slot = data.client_features(segments);
        if let Some(body) = slot.get() {
            return Arc::clone(body);
        }
        let key =
            ClientFeaturesKey { projects: projects.clone(), filter: Filter::default(), segments };
        let build = || {
            Arc::new(client_features::build(&self.environment, &self.document, &key, self.revision))
        };
        let body = Arc::clone(slot.get_or_init(build));
        self.scopes.enforce_limit(projects);
        body
    }

    /// The flags of `projects`, prepared for evaluation. Built on first use.
    pub fn frontend_view(&self, projects: &Projects) -> Arc<FrontendView> {
        let data = self.scopes.get_or_insert(projects);
        if let Some(view) = data.frontend_view().get() {
            return Arc::clone(view);
        }
        let view = Arc::clone(data.frontend_view().get_or_init(|| {
            let id = self.next_view_id.fetch_add(1, Ordering::Relaxed);
            Arc::new(FrontendView::build(&self.engine, &self.fragments, projects, id))
        }));
        self.scopes.enforce_limit(projects);
        view
    }

    /// The prepared JSON of each flag.
    pub fn fragments(&self) -> &Fragments {
        &self.fragments
    }

    /// Cached evaluation results, bodies and events for frontend clients.
    pub fn evaluation_cache(&self) -> &EvaluationCache {
        &self.evaluation_cache
    }

    /// Builds what was requested from the previous snapshot.
    fn prebuild_requested(&self, previous: &Self) {
        for (projects, old) in &*previous.scopes.all() {
            let new = self.scopes.get_or_insert(projects);
            if old.frontend_view().get().is_some() {
                self.frontend_view(projects);
            }
            yield_cpu();
            for segments in [SegmentFormat::Separate, SegmentFormat::Inlined] {
                let Some(old) = old.client_features(segments).get() else { continue };
                let filter = Filter::default();
                let key = ClientFeaturesKey { projects: projects.clone(), filter, segments };
                new.client_features(segments)
                    .get_or_init(|| self.rebuild_client_features(&key, old));
            }
            self.scopes.enforce_limit(projects);
        }
        let mut filtered: Vec<_> = previous
            .filtered_client_features
            .iter()
            .filter(|(_, listing)| listing.requests() > 0)
            .collect();
        filtered.sort_by_key(|(_, listing)| Reverse(listing.requests()));
        filtered.truncate(MAX_INHERITED_FILTERS);
        for (key, old) in filtered {
            let body = self.rebuild_client_features(&key, old.body());
            self.filtered_client_features.insert((*key).clone(), CountedBody::new(body));
        }
    }

    /// The body of this snapshot for `key`, compressed in the codings that `old` was compressed in.
    fn rebuild_client_features(
        &self,
        key: &ClientFeaturesKey,
        old: &Arc<PreparedBody>,
    ) -> Arc<PreparedBody> {
        let new = client_features::build(&self.environment, &self.document, key, self.revision);
        if new.etag() == old.etag() {
            return Arc::clone(old);
        }
        for coding in body::ContentCoding::COMPRESSING {
            if old.encoded(coding).is_some() {
                new.get_or_encode(coding);
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
fn yield_cpu() {
    thread::yield_now();
}

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
    snapshots: Arc<HashMap<Environment, Arc<Snapshot>, RandomState>>,
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
    pub fn swap(&self, snapshot: Snapshot) -> Arc<Snapshot> {
        let snapshot = Arc::new(snapshot);
        self.0.current.rcu(|current| {
            let mut next = State::clone(current);
            if next.environment_filter.contains(&snapshot.environment) {
                let entry = (snapshot.environment.clone(), Arc::clone(&snapshot));
                Arc::make_mut(&mut next.snapshots).extend([entry]);
            }
            next
        });
        self.0.swap_count.send_modify(|count| *count += 1);
        snapshot
    }

    /// Notifies of each swap and of each change of the served environments.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.swap_count.subscribe()
    }

    /// Waits until the environment has a snapshot; `None` once it is not served. Dropping the future
    /// is safe.
    pub async fn wait_for(&self, environment: &Environment) -> Option<Arc<Snapshot>> {
        self.wait_until_found(environment, || self.load(environment)).await
    }

    /// Waits until the scope's environment has a snapshot with the flags of the scope's projects;
    /// `None` once it is not served. Dropping the future is safe.
    pub async fn wait_for_scope(&self, scope: &Scope) -> Option<Arc<Snapshot>> {
        self.wait_until_found(&scope.environment, || self.load_for(scope)).await
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
        find: impl Fn() -> Option<Arc<Snapshot>>,
    ) -> Option<Arc<Snapshot>> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(flag: &str, previous: Option<&Snapshot>) -> Snapshot {
        let text = format!(r#"{{"features":[{{"name":"{flag}"}}]}}"#);
        let document = Document::parse(text.as_bytes()).unwrap();
        let environment = Environment::new("development");
        let scope = Scope { environment, projects: Projects::All };
        match previous {
            Some(previous) => Snapshot::rebuild_from(previous, scope, document, None),
            None => Snapshot::build(scope, document, None),
        }
    }

    #[test]
    fn age_is_measured_from_the_latest_confirmation_and_never_falls_below_zero() {
        let (snapshot, start) = (snapshot("a", None), Instant::now());
        let second = Duration::from_secs(1);
        assert_eq!((snapshot.confirmed_at(), snapshot.age(start)), (None, None));
        snapshot.confirm(start + second * 10);
        assert_eq!(snapshot.age(start + second * 13), Some(second * 3));
        snapshot.confirm(start + second * 2);
        assert_eq!(snapshot.age(start + second * 13), Some(second * 3), "not moved back");
        assert_eq!(snapshot.age(start), Some(Duration::ZERO));
    }

    fn request(snapshot: &Snapshot, prefix: usize) -> Arc<PreparedBody> {
        let filter = Filter { name_prefix: Some(prefix.to_string().into()), ..Filter::default() };
        snapshot.client_features(&Projects::All, filter, SegmentFormat::Separate)
    }

    fn cached_filters(snapshot: &Snapshot) -> usize {
        snapshot.filtered_client_features.iter().count()
    }

    #[test]
    fn rebuilt_snapshot_prebuilds_requested_bodies_and_only_the_most_requested_filters() {
        let first = snapshot("a", None);
        let whole =
            || first.client_features(&Projects::All, Filter::default(), SegmentFormat::Separate);
        let (body, _) = (whole(), request(&first, 0));
        request(&first, 0);
        for prefix in 1..1000 {
            request(&first, prefix);
        }
        let second = snapshot("a", Some(&first));
        assert_eq!(cached_filters(&second), MAX_INHERITED_FILTERS);
        let reused =
            second.client_features(&Projects::All, Filter::default(), SegmentFormat::Separate);
        assert!(Arc::ptr_eq(&body, &reused), "nothing has changed");
        assert!(Arc::ptr_eq(&request(&first, 0), &request(&second, 0)), "requested twice");
        let third = snapshot("b", Some(&second));
        assert_eq!(cached_filters(&third), 1, "the others were not requested since");
        let fourth = snapshot("b", Some(&third));
        assert_eq!(cached_filters(&fourth), 0, "nothing was requested");
        assert_eq!(fourth.scopes.all().len(), 1, "scopes are kept: clients cannot invent them");
    }
}
