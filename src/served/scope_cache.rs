//! Prepared data of a snapshot for each set of projects (the scope of a token). It is built on first use
//! and then read without a lock, because nearly every request reads it: the snapshot and the body take 570
//! of a request's 21,000 instructions. A cache that records its reads takes 900, as that of tokens does.
//!
//! Filtered bodies are not here. Clients can send any number of filters, so those are in a cache that
//! evicts the least used.

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use foldhash::fast::RandomState;

use crate::{
    snapshot::{FrontendView, SegmentFormat, prepared_body::PreparedBody},
    token::Projects,
};

/// Memory limit of a snapshot's scopes, in bytes. Beyond it all scopes but the newest are evicted and
/// built again on their next use.
const MAX_BYTES: usize = 128 << 20;

/// Maximum number of scopes; the next one evicts all others. A deployment has as many scopes as its
/// tokens have distinct sets of projects.
const MAX_SCOPES: usize = 1_000;

/// The prepared data for one set of projects.
#[derive(Debug, Default)]
pub(super) struct ScopeData {
    frontend_view: OnceLock<Arc<FrontendView>>,
    separate: OnceLock<Arc<PreparedBody>>,
    inlined: OnceLock<Arc<PreparedBody>>,
}

impl ScopeData {
    /// The flags, prepared for evaluation.
    pub(super) fn frontend_view(&self) -> &OnceLock<Arc<FrontendView>> {
        &self.frontend_view
    }

    /// The unfiltered flag configuration.
    pub(super) fn client_features(&self, segments: SegmentFormat) -> &OnceLock<Arc<PreparedBody>> {
        match segments {
            SegmentFormat::Separate => &self.separate,
            SegmentFormat::Inlined => &self.inlined,
        }
    }

    fn memory_size(&self) -> usize {
        let bodies = [&self.separate, &self.inlined].into_iter().filter_map(OnceLock::get);
        let bodies: usize = bodies.map(|body| body.max_memory_size()).sum();
        size_of::<Self>() + bodies + self.frontend_view.get().map_or(0, |view| view.memory_size())
    }
}

/// The scopes that have been requested.
#[derive(Debug, Default)]
pub(super) struct ScopeCache {
    scopes: ArcSwap<HashMap<Projects, Arc<ScopeData>, RandomState>>,
    next_view_id: AtomicU64,
}

impl ScopeCache {
    /// The flags of `projects`, prepared for evaluation; on first use built by `build` with a new id.
    pub(super) fn frontend_view(
        &self,
        projects: &Projects,
        build: impl FnOnce(u64) -> FrontendView,
    ) -> Arc<FrontendView> {
        let build = || Arc::new(build(self.next_view_id.fetch_add(1, Ordering::Relaxed)));
        self.get_or_build(projects, ScopeData::frontend_view, build)
    }

    /// The unfiltered flag configuration of `projects`; on first use built by `build`.
    pub(super) fn client_features(
        &self,
        projects: &Projects,
        segments: SegmentFormat,
        build: impl FnOnce() -> Arc<PreparedBody>,
    ) -> Arc<PreparedBody> {
        self.get_or_build(projects, |scope| scope.client_features(segments), build)
    }

    fn get_or_build<T>(
        &self,
        projects: &Projects,
        slot: impl Fn(&ScopeData) -> &OnceLock<Arc<T>>,
        build: impl FnOnce() -> Arc<T>,
    ) -> Arc<T> {
        let scope = self.get_or_insert(projects);
        let slot = slot(&scope);
        if let Some(built) = slot.get() {
            return Arc::clone(built);
        }
        let built = Arc::clone(slot.get_or_init(build));
        self.enforce_limit(projects);
        built
    }

    /// The data of `projects`, empty on first use.
    fn get_or_insert(&self, projects: &Projects) -> Arc<ScopeData> {
        if let Some(scope) = self.scopes.load().get(projects) {
            return Arc::clone(scope);
        }
        let new = Arc::<ScopeData>::default();
        self.scopes.rcu(|scopes| {
            let mut scopes = HashMap::clone(scopes);
            if scopes.len() >= MAX_SCOPES {
                scopes.clear();
            }
            scopes.entry(projects.clone()).or_insert_with(|| Arc::clone(&new));
            scopes
        });
        self.scopes.load().get(projects).map_or(new, Arc::clone)
    }

    /// Evicts all scopes but that of `projects`, which has grown, if they exceed the memory limit.
    fn enforce_limit(&self, projects: &Projects) {
        if self.scopes.load().values().map(|scope| scope.memory_size()).sum::<usize>() > MAX_BYTES {
            self.scopes.rcu(|scopes| {
                let newest = scopes.get_key_value(projects);
                let newest = newest.map(|(projects, scope)| (projects.clone(), Arc::clone(scope)));
                newest.into_iter().collect::<HashMap<_, _, _>>()
            });
        }
    }

    /// All scopes by their projects.
    pub(super) fn all(&self) -> Arc<HashMap<Projects, Arc<ScopeData>, RandomState>> {
        self.scopes.load_full()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::token::Project;

    fn only(n: usize) -> Projects {
        Projects::Only([Project::new(&format!("p{n}"))].into())
    }

    #[test]
    fn scopes_are_limited_in_number_and_in_bytes() {
        let scopes = ScopeCache::default();
        let first = scopes.get_or_insert(&only(0));
        assert!(Arc::ptr_eq(&first, &scopes.get_or_insert(&only(0))));
        for n in 0..3 * MAX_SCOPES {
            scopes.get_or_insert(&only(n));
            assert!(scopes.all().len() <= MAX_SCOPES);
        }
        let fill = |n: usize| {
            let large = || Arc::new(PreparedBody::new(Bytes::from(vec![b'x'; MAX_BYTES / 5])));
            scopes.client_features(&only(n), SegmentFormat::Inlined, large);
        };
        fill(1);
        fill(2);
        assert!(
            scopes.get_or_insert(&only(1)).client_features(SegmentFormat::Inlined).get().is_some()
        );
        fill(3);
        assert_eq!(scopes.all().len(), 1, "three with their codings are more than the bound");
        assert!(
            scopes.get_or_insert(&only(3)).client_features(SegmentFormat::Inlined).get().is_some()
        );
    }
}
