//! What is served: immutable state per environment, swapped whole.
//!
//! A [`Snapshot`] holds everything that a response can need: the compiled engine, the flags' text as
//! it came, and ready-made bodies, each built once and shared. A request loads one snapshot and uses
//! it to the end. This module fetches, stores and schedules nothing; whoever builds a snapshot chooses
//! the thread, whose processor others may have between the steps.

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

/// The most memory that one snapshot's filtered listings may hold, in bytes; beyond it the least used
/// are built again when they are asked for.
const FILTERED_BYTES: u64 = 64 << 20;

/// How many filtered listings a snapshot takes over from the one before. Who sends a new filter each
/// time must not make each change of flags cost more.
const INHERITED_FILTERS: usize = 64;

/// The state of one environment, as of one answer of its source.
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
    /// The filtered ones.
    listings: Cache<ListingKey, Arc<Listing>>,
    fragments: Fragments,
    parts: Parts,
    /// How many views there have been.
    viewed: AtomicU64,
    answers: Answers,
}

impl Snapshot {
    /// Compiles a document that has every flag of the scope's projects; what is wrong with single
    /// flags is kept as [`Snapshot::problems`].
    ///
    /// Milliseconds of work for thousands of flags.
    pub fn build(scope: Scope, document: Document, confirmed: Option<Instant>) -> Self {
        let received = Instant::now();
        let (engine, problems) = Engine::compile(&document);
        let (fragments, answers) = (Fragments::of(&engine, None), Answers::new(None));
        let stored = document.stored_revision().and_then(|it| u32::try_from(it).ok());
        let revision = stored.unwrap_or_else(|| revision_at(Timestamp::now()));
        let times = (received, confirmed);
        Self::of(scope, document, revision, (engine, problems, fragments), answers, times)
    }

    /// The same, to take the place of a snapshot of this environment: with all that requests after the
    /// swap will ask for, so that none waits for it. That is the parts that the previous one holds, and
    /// of the filtered listings that it was itself asked for the most wanted.
    ///
    /// What did not change is taken over: flags as they are compiled, and bodies with all their codings.
    pub fn after(
        previous: &Self,
        scope: Scope,
        document: Document,
        confirmed: Option<Instant>,
    ) -> Self {
        let times = (Instant::now(), confirmed);
        let Self { document: before, engine, problems, fragments, .. } = previous;
        let document = document.sharing(before);
        give_way();
        let (new, problems) = engine.recompile(before, problems, &document);
        give_way();
        let fragments = Fragments::of(&new, Some((engine, fragments)));
        give_way();
        let answers = Answers::new(Some(&previous.answers));
        let revision = revision_at(Timestamp::now()).max(previous.revision.saturating_add(1));
        let new = (new, problems, fragments);
        let snapshot = Self::of(scope, document, revision, new, answers, times);
        snapshot.inherit(previous);
        snapshot
    }

    fn of(
        Scope { environment, projects }: Scope,
        document: Document,
        revision: u32,
        (engine, problems, fragments): (Engine, Vec<Problem>, Fragments),
        answers: Answers,
        (received, confirmed): (Instant, Option<Instant>),
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
            answers,
            environment,
            projects,
            document: Arc::new(document),
            revision,
            engine,
            problems,
            received,
            confirmed: Mutex::new(confirmed),
        }
    }

    /// The environment whose state this is.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// The projects whose flags are known; of others there may be some, or none.
    pub fn projects(&self) -> &Projects {
        &self.projects
    }

    /// The flags and segments as they came.
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

    /// What is wrong with single flags.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// When the source sent this state, or when it was read from the store.
    pub fn received(&self) -> Instant {
        self.received
    }

    /// When the source last confirmed that this is the current state; `None` if it has not since the
    /// process started, as of flags from the store.
    pub fn confirmed(&self) -> Option<Instant> {
        *self.lock_confirmed()
    }

    /// The time since the source last confirmed this state, measured at `now`.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        Some(now.saturating_duration_since(self.confirmed()?))
    }

    /// Records that the source confirmed this state; an earlier time than is known changes nothing.
    pub fn confirm(&self, at: Instant) {
        let mut confirmed = self.lock_confirmed();
        *confirmed = (*confirmed).max(Some(at));
    }

    /// A panic under this lock leaves a whole time.
    fn lock_confirmed(&self) -> MutexGuard<'_, Option<Instant>> {
        self.confirmed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The flag configuration that `projects` and `filter` leave, as `/api/client/features` sends
    /// it; built on the first wish.
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

    /// The flag configuration of a part, without a filter.
    fn whole(&self, part: &Part, projects: &Projects, segments: Segments) -> Arc<Body> {
        let slot = part.listing(segments);
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

    /// What `projects` see, prepared for answering frontends; on the first wish.
    pub fn view(&self, projects: &Projects) -> Arc<View> {
        let part = self.parts.of(projects);
        if let Some(view) = part.view().get() {
            return Arc::clone(view);
        }
        let view = Arc::clone(part.view().get_or_init(|| {
            let number = self.viewed.fetch_add(1, Ordering::Relaxed);
            Arc::new(View::of(&self.engine, &self.fragments, projects, number))
        }));
        self.parts.keep_within_bounds(projects);
        view
    }

    /// The ready-made JSON of each flag.
    pub fn fragments(&self) -> &Fragments {
        &self.fragments
    }

    /// What is remembered of answers to frontends.
    pub fn answers(&self) -> &Answers {
        &self.answers
    }

    /// Builds what the previous snapshot was asked for.
    fn inherit(&self, previous: &Self) {
        for (projects, old) in &*previous.parts.all() {
            let part = self.parts.of(projects);
            if old.view().get().is_some() {
                self.view(projects);
            }
            give_way();
            for segments in [Segments::Separate, Segments::Inlined] {
                let Some(old) = old.listing(segments).get() else { continue };
                let filter = Filter::default();
                let key = ListingKey { projects: projects.clone(), filter, segments };
                part.listing(segments).get_or_init(|| self.rebuilt(&key, old));
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

    /// A listing of this snapshot in the codings that it had in the previous one.
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

/// The revision of a state that begins now: the time in seconds since 1970. It grows from state to
/// state, over restarts and from one instance to the next, and SDKs read it into 32 bits.
fn revision_at(now: Timestamp) -> u32 {
    u32::try_from(now.as_second()).unwrap_or(1)
}

/// Lets others have the processor, if any wait for it, between two steps of work for milliseconds.
/// Kernels of servers may take it away at ticks of 4 ms only, and so long a request would wait that
/// needs it for microseconds.
fn give_way() {
    thread::yield_now();
}

/// The snapshots of all environments. A cheap handle.
///
/// Reading is one atomic load and a look-up; whoever swaps a snapshot blocks no reader.
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

/// Which environments are served at all.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Served {
    /// All that there are snapshots of.
    #[default]
    Any,
    /// These.
    Only(BTreeSet<Environment>),
    /// All but these.
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

    /// Whether the environment has a snapshot, or may get one.
    pub fn serves(&self, environment: &Environment) -> bool {
        self.0.current.load().served.contains(environment)
    }

    /// Serves these environments only, from now on; true if that is a change.
    pub fn limit(&self, served: &Served) -> bool {
        let before = self.0.current.rcu(|current| {
            let kept = current.snapshots.iter().filter(|(name, _)| served.contains(name));
            let kept = kept.map(|(name, snapshot)| (name.clone(), Arc::clone(snapshot)));
            Current { served: served.clone(), snapshots: Arc::new(kept.collect()) }
        });
        self.0.swaps.send_modify(|count| *count += 1);
        before.served != *served
    }

    /// Puts a snapshot in its environment's place, if that is served.
    pub fn swap(&self, snapshot: Snapshot) -> Arc<Snapshot> {
        let snapshot = Arc::new(snapshot);
        self.0.current.rcu(|current| {
            let mut next = Current::clone(current);
            if next.served.contains(&snapshot.environment) {
                let place = (snapshot.environment.clone(), Arc::clone(&snapshot));
                Arc::make_mut(&mut next.snapshots).extend([place]);
            }
            next
        });
        self.0.swaps.send_modify(|count| *count += 1);
        snapshot
    }

    /// Is told of each swap and of each change of what is served.
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
        look: impl Fn() -> Option<Arc<Snapshot>>,
    ) -> Option<Arc<Snapshot>> {
        let mut swaps = self.0.swaps.subscribe();
        loop {
            let found = look();
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
        assert_eq!(snapshot.age(start + second * 13), Some(second * 3), "it is known by then");
        assert_eq!(snapshot.age(start), Some(Duration::ZERO));
    }

    fn ask(snapshot: &Snapshot, prefix: usize) -> Arc<Body> {
        let filter = Filter { name_prefix: Some(prefix.to_string().into()), ..Filter::default() };
        snapshot.listing(&Projects::All, filter, Segments::Separate)
    }

    fn kept(snapshot: &Snapshot) -> usize {
        snapshot.listings.iter().count()
    }

    #[test]
    fn a_snapshot_inherits_what_is_asked_for_and_of_filters_only_the_most_wanted() {
        let first = snapshot("a", None);
        let whole = || first.listing(&Projects::All, Filter::default(), Segments::Separate);
        let (body, _) = (whole(), ask(&first, 0));
        ask(&first, 0);
        for prefix in 1..1000 {
            ask(&first, prefix);
        }
        let second = snapshot("a", Some(&first));
        assert_eq!(kept(&second), INHERITED_FILTERS);
        let taken = second.listing(&Projects::All, Filter::default(), Segments::Separate);
        assert!(Arc::ptr_eq(&body, &taken), "nothing has changed");
        assert!(Arc::ptr_eq(&ask(&first, 0), &ask(&second, 0)), "it was asked for twice");
        let third = snapshot("b", Some(&second));
        assert_eq!(kept(&third), 1, "the others were not asked for since");
        let fourth = snapshot("b", Some(&third));
        assert_eq!(kept(&fourth), 0, "nobody asked");
        assert_eq!(fourth.parts.all().len(), 1, "but the part is kept, which no client made up");
    }
}
