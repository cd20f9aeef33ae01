//! The change feed for server SDKs: the latest states of each environment, with ids, and the deltas
//! between them.
//!
//! Subscribers pull. A state is a document that shares unchanged parts with its neighbours; its snapshot
//! has its id. A subscriber remembers the id that it received last and requests the changes since. Nothing
//! is queued per subscriber: a slow one skips the states in between, and one that was disconnected for too
//! long gets the whole state. An update is written once for all subscribers with the same scope and base
//! state.
//!
//! Permissions and connections are not handled here.

mod history;
mod subscription_key;
mod update;

use std::{
    collections::HashMap,
    panic::resume_unwind,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::watch, task::spawn_blocking};

use self::history::StateHistory;
pub use self::{
    subscription_key::SubscriptionKey,
    update::{Update, UpdateKind},
};
use crate::{
    cache::BoundedCache,
    protocol::delta::EventId,
    served::{Snapshots, StateId},
    token::Environment,
};

/// Memory limit of cached updates, in bytes. Beyond it the least used are evicted and written again on
/// their next use.
const MAX_UPDATE_BYTES: u64 = 64 << 20;

/// The states of all environments. A cheap handle.
#[derive(Clone, Debug)]
pub struct ChangeFeed(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    snapshots: Snapshots,
    histories: Mutex<HashMap<Environment, Arc<StateHistory>>>,
    updates: BoundedCache<UpdateKey, Arc<Update>>,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct UpdateKey {
    subscription: Arc<SubscriptionKey>,
    from: Option<StateId>,
    to: StateId,
}

impl ChangeFeed {
    /// The change feed of these snapshots.
    pub fn new(snapshots: Snapshots) -> Self {
        let updates =
            BoundedCache::new("updates", MAX_UPDATE_BYTES, |it: &Arc<Update>| it.memory_size());
        Self(Arc::new(Inner { snapshots, histories: Mutex::default(), updates }))
    }

    /// Records each new state and notifies subscribers, until dropped.
    pub async fn run(&self) {
        let mut swaps = self.0.snapshots.subscribe();
        loop {
            swaps.borrow_and_update();
            // Blocking, because it compares all flags.
            let feed = self.clone();
            let result = spawn_blocking(move || feed.refresh()).await;
            if let Some(panic) = result.err().and_then(|it| it.try_into_panic().ok()) {
                resume_unwind(panic);
            }
            if swaps.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    fn refresh(&self) {
        let served = self.0.snapshots.all();
        // Dropping the history of a removed environment ends its subscriptions.
        self.lock_histories().retain(|environment, _| served.contains_key(environment));
        for environment in served.keys() {
            self.history(environment);
        }
    }

    /// The id of the environment's current state and of each later one; `None` while the environment has
    /// no flags. The channel closes when the environment is removed.
    pub fn subscribe(&self, environment: &Environment) -> Option<watch::Receiver<StateId>> {
        Some(self.history(environment)?.subscribe())
    }

    /// The changes since the state with the event id `from`; the whole state if `from` is unknown or
    /// belongs to another subscription key.
    ///
    /// Compares all flags once for all subscribers with the same key and base state.
    pub fn update_since(
        &self,
        key: &Arc<SubscriptionKey>,
        from: Option<EventId>,
    ) -> Option<Arc<Update>> {
        let from = from.and_then(|id| key.state_id(id));
        let (from, to) = self.history(&key.environment)?.base_and_current(from);
        let update_key = UpdateKey {
            subscription: Arc::clone(key),
            from: from.as_ref().map(|state| state.id),
            to: to.id,
        };
        Some(
            self.0
                .updates
                .get_or_build(&update_key, || Arc::new(Update::build(key, from.as_ref(), &to))),
        )
    }

    /// The history of an environment, which includes its current state.
    fn history(&self, environment: &Environment) -> Option<Arc<StateHistory>> {
        let history = {
            let mut histories = self.lock_histories();
            if let Some(history) = histories.get(environment) {
                Arc::clone(history)
            } else {
                let history = Arc::new(StateHistory::new(&*self.0.snapshots.load(environment)?));
                histories.insert(environment.clone(), Arc::clone(&history));
                history
            }
        };
        history.refresh(|| self.0.snapshots.load(environment));
        Some(history)
    }

    /// Ignores poisoning: a panic under this lock leaves a consistent map.
    fn lock_histories(&self) -> MutexGuard<'_, HashMap<Environment, Arc<StateHistory>>> {
        self.0.histories.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::{
        protocol::{
            delta,
            features::{Document, Feature, Segment},
        },
        snapshot::{Filter, filter_document},
        token::{Projects, Scope},
    };

    fn development() -> Environment {
        Environment::new("development")
    }

    fn swap(snapshots: &Snapshots, text: &str) {
        let mut document = Document::parse(text.as_bytes()).unwrap();
        if let Some(previous) = snapshots.load(&development()) {
            document = document.reuse_unchanged(previous.document());
        }
        let scope = Scope { environment: development(), projects: Projects::All };
        snapshots.replace(scope, document);
    }

    fn key(projects: Projects, prefix: Option<&str>) -> Arc<SubscriptionKey> {
        let filter = Filter { name_prefix: prefix.map(Into::into), ..Filter::default() };
        Arc::new(SubscriptionKey::new(development(), projects, filter))
    }

    fn texts(document: &Document) -> (Vec<&str>, Vec<&str>) {
        let features = document.features().iter().map(Feature::raw).collect();
        (features, document.segments().iter().map(Segment::raw).collect())
    }

    /// The JSON of a state. Flags move between projects and refer to different segments.
    fn state() -> impl Strategy<Value = String> {
        let feature = (0..5_u8, 0..3_u8, 0..3_u8).prop_map(|(name, project, segment)| {
            format!(
                r#"{{"name":"{}{name}","project":"p{project}","strategies":[{{"name":"default","segments":[{segment}]}}]}}"#,
                if name % 2 == 0 { "a" } else { "b" }
            )
        });
        let segment = (0..3_u8, 0..3_u8).prop_map(|(id, x)| format!(r#"{{"id":{id},"x":{x}}}"#));
        (vec(feature, 0..6), vec(segment, 0..4)).prop_map(|(features, segments)| {
            let (features, segments) = (features.join(","), segments.join(","));
            format!(r#"{{"features":[{features}],"segments":[{segments}]}}"#)
        })
    }

    proptest! {
        #[test]
        fn subscriber_reaches_the_current_state_from_any_state_in_the_history(
            states in vec(state(), 1..6),
            whole in any::<bool>(),
            prefixed in any::<bool>(),
        ) {
            let snapshots = Snapshots::default();
            let feed = ChangeFeed::new(snapshots.clone());
            let projects = if whole { Projects::All } else { Projects::from_list(["p1"]) };
            let key = key(projects, prefixed.then_some("a"));
            let mut subscribers: Vec<(Option<EventId>, Document)> = vec![];
            for text in &states {
                subscribers.push((None, Document::default()));
                swap(&snapshots, text);
                let document = Document::parse(text.as_bytes()).unwrap();
                let expect = filter_document(&document, &key.projects, &key.filter);
                // The first subscriber gets each state, the others only one and, at the end, the last.
                let (newest, last) = (subscribers.len() - 1, text == states.last().unwrap());
                for (n, (id, state)) in subscribers.iter_mut().enumerate() {
                    if n != 0 && n != newest && !last {
                        continue;
                    }
                    let update = feed.update_since(&key, *id).unwrap();
                    prop_assert_eq!(id.is_none(), update.kind() == UpdateKind::Snapshot);
                    let events = delta::parse(update.json()).unwrap();
                    prop_assert!(events.iter().all(|event| event.id == update.event_id()));
                    prop_assert_eq!(events.is_empty(), update.kind() == UpdateKind::Unchanged);
                    *state = delta::apply(state, events.iter().map(|event| &event.change));
                    *id = Some(update.event_id());
                    prop_assert_eq!(texts(state), texts(&expect));
                }
            }
        }
    }

    #[test]
    fn unknown_state_id_gets_the_whole_state() {
        let snapshots = Snapshots::default();
        let feed = ChangeFeed::new(snapshots.clone());
        let key = key(Projects::All, None);
        assert!(feed.update_since(&key, None).is_none(), "there are no flags yet");
        swap(&snapshots, r#"{"features":[{"name":"a"}]}"#);
        let first = feed.update_since(&key, None).unwrap();
        assert_eq!(first.kind(), UpdateKind::Snapshot);
        assert_eq!(
            feed.update_since(&key, Some(first.event_id())).unwrap().kind(),
            UpdateKind::Unchanged
        );
        for unknown in [0, first.event_id() - 1, first.event_id() + 1, u32::MAX] {
            assert_eq!(
                feed.update_since(&key, Some(unknown)).unwrap().kind(),
                UpdateKind::Snapshot
            );
        }
    }

    #[test]
    fn update_is_written_once_and_ignores_changes_outside_the_scope() {
        let snapshots = Snapshots::default();
        let feed = ChangeFeed::new(snapshots.clone());
        let (web, all) = (key(Projects::from_list(["web"]), None), key(Projects::All, None));
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"}]}"#);
        let first = feed.update_since(&web, None).unwrap();
        assert!(Arc::ptr_eq(&first, &feed.update_since(&web, None).unwrap()));
        let current = feed.subscribe(&development()).unwrap();
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"},{"name":"b"}]}"#);
        let then = feed.update_since(&web, Some(first.event_id())).unwrap();
        assert_eq!((then.kind(), then.event_id()), (UpdateKind::Unchanged, first.event_id() + 1));
        assert_eq!(web.event_id(*current.borrow()), then.event_id());
        let before = feed.update_since(&all, None).unwrap();
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"},{"name":"c"}]}"#);
        assert_eq!(
            feed.update_since(&all, Some(before.event_id())).unwrap().kind(),
            UpdateKind::Delta
        );
    }

    #[test]
    fn changed_scope_gets_the_whole_state() {
        let snapshots = Snapshots::default();
        let feed = ChangeFeed::new(snapshots.clone());
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"},{"name":"b"}]}"#);
        let keys = [
            key(Projects::All, None),
            key(Projects::from_list(["web"]), None),
            key(Projects::from_list(["web", "default"]), None),
            key(Projects::All, Some("b")),
        ];
        for (n, now) in keys.iter().enumerate() {
            for (m, before) in keys.iter().enumerate() {
                let base = feed.update_since(before, None).unwrap();
                let update = feed.update_since(now, Some(base.event_id())).unwrap();
                let expect = if n == m { UpdateKind::Unchanged } else { UpdateKind::Snapshot };
                assert_eq!(update.kind(), expect, "{before:?} became {now:?}");
            }
        }
    }
}
