//! A snapshot that is being served, with the responses that were built from it.

use std::{
    cmp::Reverse,
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    evaluation_cache::EvaluationCache,
    scope_cache::ScopeCache,
    state_id::{AssignedId, StateId},
};
use crate::{
    cache::BoundedCache,
    protocol::features::Document,
    snapshot::{
        ClientFeaturesKey, Filter, FrontendView, SegmentFormat, Snapshot,
        prepared_body::{ContentCoding, PreparedBody},
    },
    token::{Projects, Scope},
};

/// Memory limit of one snapshot's filtered client-features bodies, in bytes. Writing one takes 275,000
/// instructions for 350 flags.
const MAX_FILTERED_BYTES: u64 = 64 << 20;

/// Number of filtered bodies that a snapshot builds in advance because the previous one had them. The
/// limit keeps a client that sends a new filter each time from making every flag change more expensive.
const MAX_INHERITED_FILTERS: usize = 64;

/// An immutable snapshot, when it was confirmed, and the caches of what requests need from it.
#[derive(Debug)]
pub struct ServedSnapshot {
    snapshot: Snapshot,
    state_id: AssignedId,
    /// When the source last confirmed this state; `None` if it has not since the process started.
    confirmed_at: Mutex<Option<Instant>>,
    scopes: ScopeCache,
    filtered_bodies: BoundedCache<ClientFeaturesKey, Arc<FilteredBody>>,
    evaluation_cache: EvaluationCache,
}

/// A filtered body, and how often it was requested from the snapshot.
#[derive(Debug)]
struct FilteredBody {
    body: Arc<PreparedBody>,
    requests: AtomicU64,
}

impl FilteredBody {
    fn new(body: Arc<PreparedBody>) -> Arc<Self> {
        Arc::new(Self { body, requests: AtomicU64::new(0) })
    }
}

impl Deref for ServedSnapshot {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.snapshot
    }
}

impl ServedSnapshot {
    /// Builds a snapshot with empty caches, as [`Snapshot::build`].
    pub fn build(scope: Scope, document: Document, confirmed_at: Option<Instant>) -> Self {
        let state_id = AssignedId::of(&document, None);
        let cache = EvaluationCache::new(None);
        Self::new(Snapshot::build(scope, document), state_id, confirmed_at, cache)
    }

    /// Like [`ServedSnapshot::build`], to replace a snapshot of the same environment. Builds in advance
    /// what requests after the swap are likely to need: the views and unfiltered bodies that the previous
    /// snapshot has, and the filtered bodies that were requested from it most often. Bodies that did not
    /// change are reused with all their content codings.
    pub fn rebuild_from(
        previous: &Self,
        scope: Scope,
        document: Document,
        confirmed_at: Option<Instant>,
    ) -> Self {
        let state_id = AssignedId::of(&document, Some(previous.state_id));
        let snapshot = Snapshot::rebuild_from(&previous.snapshot, scope, document);
        let cache = EvaluationCache::new(Some(&previous.evaluation_cache));
        let served = Self::new(snapshot, state_id, confirmed_at, cache);
        served.prebuild_requested(previous);
        served
    }

    fn new(
        snapshot: Snapshot,
        state_id: AssignedId,
        confirmed_at: Option<Instant>,
        evaluation_cache: EvaluationCache,
    ) -> Self {
        let filtered_bodies =
            BoundedCache::new("filtered_features", MAX_FILTERED_BYTES, |it: &Arc<FilteredBody>| {
                it.body.max_memory_size()
            });
        Self {
            snapshot,
            state_id,
            confirmed_at: Mutex::new(confirmed_at),
            scopes: ScopeCache::default(),
            filtered_bodies,
            evaluation_cache,
        }
    }

    /// The id of the state: of two snapshots of an environment with the same id, the flags are equal. A
    /// document that was stored or shared brings its id along.
    pub fn state_id(&self) -> StateId {
        self.state_id.id()
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
            return self.scopes.client_features(projects, segments, || {
                let key = ClientFeaturesKey { projects: projects.clone(), filter, segments };
                Arc::new(self.build_client_features(&key))
            });
        }
        let key = ClientFeaturesKey { projects: projects.clone(), filter, segments };
        let build = || FilteredBody::new(Arc::new(self.build_client_features(&key)));
        let filtered = self.filtered_bodies.get_or_build(&key, build);
        filtered.requests.fetch_add(1, Ordering::Relaxed);
        Arc::clone(&filtered.body)
    }

    /// The flags of `projects`, prepared for evaluation. Built on first use.
    pub fn frontend_view(&self, projects: &Projects) -> Arc<FrontendView> {
        self.scopes.frontend_view(projects, |id| self.build_frontend_view(projects, id))
    }

    /// Cached evaluation results, bodies and events for frontend clients.
    pub fn evaluation_cache(&self) -> &EvaluationCache {
        &self.evaluation_cache
    }

    /// Builds what was requested from the previous snapshot. Yields the processor between its steps.
    fn prebuild_requested(&self, previous: &Self) {
        for (projects, old) in &*previous.scopes.all() {
            if old.frontend_view().get().is_some() {
                self.frontend_view(projects);
            }
            thread::yield_now();
            for segments in [SegmentFormat::Separate, SegmentFormat::Inlined] {
                let Some(old) = old.client_features(segments).get() else { continue };
                let filter = Filter::default();
                let key = ClientFeaturesKey { projects: projects.clone(), filter, segments };
                self.scopes.client_features(projects, segments, || self.rebuild_body(&key, old));
            }
        }
        let mut filtered: Vec<_> = previous
            .filtered_bodies
            .entries()
            .map(|(key, old)| (old.requests.load(Ordering::Relaxed), key, old))
            .filter(|(requests, ..)| *requests > 0)
            .collect();
        filtered.sort_by_key(|(requests, ..)| Reverse(*requests));
        filtered.truncate(MAX_INHERITED_FILTERS);
        for (_, key, old) in filtered {
            let body = self.rebuild_body(&key, &old.body);
            self.filtered_bodies.insert((*key).clone(), FilteredBody::new(body));
        }
    }

    /// The body of this snapshot for `key`, compressed in the codings that `old` was compressed in.
    fn rebuild_body(&self, key: &ClientFeaturesKey, old: &Arc<PreparedBody>) -> Arc<PreparedBody> {
        let new = self.build_client_features(key);
        if new.etag() == old.etag() {
            return Arc::clone(old);
        }
        for coding in ContentCoding::COMPRESSING {
            if old.encoded(coding).is_some() {
                new.get_or_encode(coding);
            }
        }
        Arc::new(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::Environment;

    fn snapshot(flag: &str, previous: Option<&ServedSnapshot>) -> ServedSnapshot {
        let text = format!(r#"{{"features":[{{"name":"{flag}"}}]}}"#);
        let document = Document::parse(text.as_bytes()).unwrap();
        let environment = Environment::new("development");
        let scope = Scope { environment, projects: Projects::All };
        match previous {
            Some(previous) => ServedSnapshot::rebuild_from(previous, scope, document, None),
            None => ServedSnapshot::build(scope, document, None),
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

    fn request(snapshot: &ServedSnapshot, prefix: usize) -> Arc<PreparedBody> {
        let filter = Filter { name_prefix: Some(prefix.to_string().into()), ..Filter::default() };
        snapshot.client_features(&Projects::All, filter, SegmentFormat::Separate)
    }

    fn cached_filters(snapshot: &ServedSnapshot) -> usize {
        snapshot.filtered_bodies.entries().count()
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
