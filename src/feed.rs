//! The change feed for server SDKs: the latest states of each environment, with ids, and the deltas
//! between them.
//!
//! Subscribers pull. A state is a document that shares unchanged parts with its neighbours. A subscriber
//! remembers the id that it received last and requests the changes since. Nothing is queued per
//! subscriber: a slow one skips the states in between, and one that was disconnected for too long gets
//! the whole state. An update is written once for all subscribers with the same scope and base state.
//!
//! Permissions and connections are not handled here.

mod frame;
mod log;
mod topic;

use std::{
    collections::HashMap,
    panic::resume_unwind,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use moka::sync::Cache;
use tokio::{sync::watch, task::spawn_blocking};

use self::log::Log;
pub use self::{
    frame::{Frame, News},
    log::Number,
    topic::Topic,
};
use crate::{snapshot::Snapshots, token::Environment, wire::delta::EventId};

/// Memory limit of cached updates, in bytes. Beyond it the least used are evicted and written again on
/// their next use.
const FRAME_BYTES: u64 = 64 << 20;

/// The states of all environments. A cheap handle.
#[derive(Clone, Debug)]
pub struct Feed(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    snapshots: Snapshots,
    logs: Mutex<HashMap<Environment, Arc<Log>>>,
    frames: Cache<FrameKey, Arc<Frame>>,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct FrameKey {
    topic: Arc<Topic>,
    from: Option<Number>,
    to: Number,
}

impl Feed {
    /// The change feed of these snapshots.
    pub fn new(snapshots: Snapshots) -> Self {
        let frames = Cache::builder()
            .max_capacity(FRAME_BYTES)
            .weigher(|_, frame: &Arc<Frame>| u32::try_from(frame.weight()).unwrap_or(u32::MAX))
            .build();
        Self(Arc::new(Inner { snapshots, logs: Mutex::default(), frames }))
    }

    /// Assigns an id to each new state and notifies subscribers, until dropped.
    pub async fn run(&self) {
        let mut swaps = self.0.snapshots.swaps();
        loop {
            swaps.borrow_and_update();
            // Blocking, because it compares all flags.
            let feed = self.clone();
            let result = spawn_blocking(move || feed.catch_up()).await;
            if let Some(panic) = result.err().and_then(|it| it.try_into_panic().ok()) {
                resume_unwind(panic);
            }
            if swaps.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    fn catch_up(&self) {
        let served = self.0.snapshots.all();
        // Dropping the history of a removed environment ends its subscriptions.
        self.lock().retain(|environment, _| served.contains_key(environment));
        for environment in served.keys() {
            self.log(environment);
        }
    }

    /// The id of the environment's current state and of each later one; `None` while the environment has
    /// no flags. The channel closes when the environment is removed.
    pub fn follow(&self, environment: &Environment) -> Option<watch::Receiver<Number>> {
        Some(self.log(environment)?.follow())
    }

    /// The changes since the state with the event id `from`; the whole state if `from` is unknown or
    /// belongs to another subscription key.
    ///
    /// Compares all flags once for all subscribers with the same key and base state.
    pub fn since(&self, key: &Arc<Topic>, from: Option<EventId>) -> Option<Arc<Frame>> {
        let from = from.and_then(|id| key.number(id));
        let (from, to) = self.log(&key.environment)?.between(from);
        let update_key = FrameKey {
            topic: Arc::clone(key),
            from: from.as_ref().map(|state| state.number),
            to: to.number,
        };
        Some(self.0.frames.get_with(update_key, || Arc::new(Frame::of(key, from.as_ref(), &to))))
    }

    /// The history of an environment, which includes its current state.
    fn log(&self, environment: &Environment) -> Option<Arc<Log>> {
        let history = {
            let mut histories = self.lock();
            if let Some(history) = histories.get(environment) {
                Arc::clone(history)
            } else {
                let history = Arc::new(Log::of(&*self.0.snapshots.load(environment)?));
                histories.insert(environment.clone(), Arc::clone(&history));
                history
            }
        };
        history.catch_up(|| self.0.snapshots.load(environment));
        Some(history)
    }

    /// Ignores poisoning: a panic under this lock leaves a consistent map.
    fn lock(&self) -> MutexGuard<'_, HashMap<Environment, Arc<Log>>> {
        self.0.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::{
        snapshot::{Filter, Snapshot, cut},
        token::{Projects, Scope},
        wire::{
            delta,
            features::{Document, Feature, Segment},
        },
    };

    fn development() -> Environment {
        Environment::new("development")
    }

    fn swap(snapshots: &Snapshots, text: &str) {
        let mut document = Document::parse(text.as_bytes()).unwrap();
        if let Some(previous) = snapshots.load(&development()) {
            document = document.sharing(previous.document());
        }
        let scope = Scope { environment: development(), projects: Projects::All };
        snapshots.swap(Snapshot::build(scope, document, None));
    }

    fn key(projects: Projects, prefix: Option<&str>) -> Arc<Topic> {
        let filter = Filter { name_prefix: prefix.map(Into::into), ..Filter::default() };
        Arc::new(Topic::new(development(), projects, filter))
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
            let feed = Feed::new(snapshots.clone());
            let projects = if whole { Projects::All } else { Projects::from_list(["p1"]) };
            let key = key(projects, prefixed.then_some("a"));
            let mut subscribers: Vec<(Option<EventId>, Document)> = vec![];
            for text in &states {
                subscribers.push((None, Document::default()));
                swap(&snapshots, text);
                let document = Document::parse(text.as_bytes()).unwrap();
                let expect = cut(&document, &key.projects, &key.filter);
                // The first subscriber gets each state, the others only one and, at the end, the last.
                let (newest, last) = (subscribers.len() - 1, text == states.last().unwrap());
                for (n, (id, state)) in subscribers.iter_mut().enumerate() {
                    if n != 0 && n != newest && !last {
                        continue;
                    }
                    let update = feed.since(&key, *id).unwrap();
                    prop_assert_eq!(id.is_none(), update.news() == News::Everything);
                    let events = delta::parse(update.json()).unwrap();
                    prop_assert!(events.iter().all(|event| event.id == update.id()));
                    prop_assert_eq!(events.is_empty(), update.news() == News::Nothing);
                    *state = delta::apply(state, events.iter().map(|event| &event.change));
                    *id = Some(update.id());
                    prop_assert_eq!(texts(state), texts(&expect));
                }
            }
        }
    }

    #[test]
    fn unknown_state_id_gets_the_whole_state() {
        let snapshots = Snapshots::default();
        let feed = Feed::new(snapshots.clone());
        let key = key(Projects::All, None);
        assert!(feed.since(&key, None).is_none(), "there are no flags yet");
        swap(&snapshots, r#"{"features":[{"name":"a"}]}"#);
        let first = feed.since(&key, None).unwrap();
        assert_eq!(first.news(), News::Everything);
        assert_eq!(feed.since(&key, Some(first.id())).unwrap().news(), News::Nothing);
        for unknown in [0, first.id() - 1, first.id() + 1, u32::MAX] {
            assert_eq!(feed.since(&key, Some(unknown)).unwrap().news(), News::Everything);
        }
    }

    #[test]
    fn update_is_written_once_and_ignores_changes_outside_the_scope() {
        let snapshots = Snapshots::default();
        let feed = Feed::new(snapshots.clone());
        let (web, all) = (key(Projects::from_list(["web"]), None), key(Projects::All, None));
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"}]}"#);
        let first = feed.since(&web, None).unwrap();
        assert!(Arc::ptr_eq(&first, &feed.since(&web, None).unwrap()));
        let current = feed.follow(&development()).unwrap();
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"}],"meta":{"revisionId":2}}"#);
        assert_eq!(feed.since(&web, Some(first.id())).unwrap().id(), first.id(), "no new state");
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"},{"name":"b"}]}"#);
        let then = feed.since(&web, Some(first.id())).unwrap();
        assert_eq!((then.news(), then.id()), (News::Nothing, first.id() + 1));
        assert_eq!(web.id(*current.borrow()), then.id());
        let before = feed.since(&all, None).unwrap();
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"},{"name":"c"}]}"#);
        assert_eq!(feed.since(&all, Some(before.id())).unwrap().news(), News::Changes);
    }

    #[test]
    fn changed_scope_gets_the_whole_state() {
        let snapshots = Snapshots::default();
        let feed = Feed::new(snapshots.clone());
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"},{"name":"b"}]}"#);
        let keys = [
            key(Projects::All, None),
            key(Projects::from_list(["web"]), None),
            key(Projects::from_list(["web", "default"]), None),
            key(Projects::All, Some("b")),
        ];
        for (n, now) in keys.iter().enumerate() {
            for (m, before) in keys.iter().enumerate() {
                let base = feed.since(before, None).unwrap();
                let update = feed.since(now, Some(base.id())).unwrap();
                let expect = if n == m { News::Nothing } else { News::Everything };
                assert_eq!(update.news(), expect, "{before:?} became {now:?}");
            }
        }
    }
}
