//! What changed, for those who follow: the states of each environment, numbered, and what leads from
//! one to the next.
//!
//! Followers pull. A state is a document that shares with its neighbours what did not change; whoever
//! follows remembers the number that it was told last, and asks what has changed since. So nothing
//! is queued for anyone: one that is slow misses the states between, and one that was away for too
//! long is told everything. What is told is written once for all who see the same and come from the
//! same state.
//!
//! Who may follow, and over what connection, is not known here.

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

/// The most memory that frames which were written may hold, in bytes; beyond it the least used are
/// written again when they are asked for.
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
    /// Follows what is served.
    pub fn new(snapshots: Snapshots) -> Self {
        let frames = Cache::builder()
            .max_capacity(FRAME_BYTES)
            .weigher(|_, frame: &Arc<Frame>| u32::try_from(frame.weight()).unwrap_or(u32::MAX))
            .build();
        Self(Arc::new(Inner { snapshots, logs: Mutex::default(), frames }))
    }

    /// Numbers the states as they come, and tells followers, until dropped.
    pub async fn run(&self) {
        let mut swaps = self.0.snapshots.swaps();
        loop {
            swaps.borrow_and_update();
            // All flags are compared.
            let feed = self.clone();
            let caught_up = spawn_blocking(move || feed.catch_up()).await;
            if let Some(panic) = caught_up.err().and_then(|it| it.try_into_panic().ok()) {
                resume_unwind(panic);
            }
            if swaps.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    fn catch_up(&self) {
        let served = self.0.snapshots.all();
        // Those who follow an environment that is gone notice that nobody tells of it any more.
        self.lock().retain(|environment, _| served.contains_key(environment));
        for environment in served.keys() {
            self.log(environment);
        }
    }

    /// The number of the environment's current state, and of each that follows; `None` while it has
    /// no flags. It ends with the environment.
    pub fn follow(&self, environment: &Environment) -> Option<watch::Receiver<Number>> {
        Some(self.log(environment)?.follow())
    }

    /// What has changed of the topic since the state of the id `from`: everything, where that is not
    /// known, or was told of another topic.
    ///
    /// Work for as many flags as there are, once for all who ask the same.
    pub fn since(&self, topic: &Arc<Topic>, from: Option<EventId>) -> Option<Arc<Frame>> {
        let from = from.and_then(|id| topic.number(id));
        let (from, to) = self.log(&topic.environment)?.between(from);
        let key = FrameKey {
            topic: Arc::clone(topic),
            from: from.as_ref().map(|state| state.number),
            to: to.number,
        };
        Some(self.0.frames.get_with(key, || Arc::new(Frame::of(topic, from.as_ref(), &to))))
    }

    /// The log of an environment, which has its current state.
    fn log(&self, environment: &Environment) -> Option<Arc<Log>> {
        let log = {
            let mut logs = self.lock();
            if let Some(log) = logs.get(environment) {
                Arc::clone(log)
            } else {
                let log = Arc::new(Log::of(&*self.0.snapshots.load(environment)?));
                logs.insert(environment.clone(), Arc::clone(&log));
                log
            }
        };
        log.catch_up(|| self.0.snapshots.load(environment));
        Some(log)
    }

    /// A panic under this lock leaves a whole map.
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

    fn topic(projects: Projects, prefix: Option<&str>) -> Arc<Topic> {
        let filter = Filter { name_prefix: prefix.map(Into::into), ..Filter::default() };
        Arc::new(Topic::new(development(), projects, filter))
    }

    fn texts(document: &Document) -> (Vec<&str>, Vec<&str>) {
        let features = document.features().iter().map(Feature::raw).collect();
        (features, document.segments().iter().map(Segment::raw).collect())
    }

    /// The text of a state: flags move between projects, and refer to other segments.
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
        fn from_any_state_in_the_log_a_follower_comes_to_the_current_one(
            states in vec(state(), 1..6),
            whole in any::<bool>(),
            prefixed in any::<bool>(),
        ) {
            let snapshots = Snapshots::default();
            let feed = Feed::new(snapshots.clone());
            let projects = if whole { Projects::All } else { Projects::from_list(["p1"]) };
            let topic = topic(projects, prefixed.then_some("a"));
            let mut followers: Vec<(Option<EventId>, Document)> = vec![];
            for text in &states {
                followers.push((None, Document::default()));
                swap(&snapshots, text);
                let document = Document::parse(text.as_bytes()).unwrap();
                let expect = cut(&document, &topic.projects, &topic.filter);
                // The first follower hears of each state; the others come once, and at the end again.
                let (newest, last) = (followers.len() - 1, text == states.last().unwrap());
                for (n, (id, state)) in followers.iter_mut().enumerate() {
                    if n != 0 && n != newest && !last {
                        continue;
                    }
                    let frame = feed.since(&topic, *id).unwrap();
                    prop_assert_eq!(id.is_none(), frame.news() == News::Everything);
                    let events = delta::parse(frame.json()).unwrap();
                    prop_assert!(events.iter().all(|event| event.id == frame.id()));
                    prop_assert_eq!(events.is_empty(), frame.news() == News::Nothing);
                    *state = delta::apply(state, events.iter().map(|event| &event.change));
                    *id = Some(frame.id());
                    prop_assert_eq!(texts(state), texts(&expect));
                }
            }
        }
    }

    #[test]
    fn whoever_comes_from_a_state_that_is_not_known_is_told_everything() {
        let snapshots = Snapshots::default();
        let feed = Feed::new(snapshots.clone());
        let topic = topic(Projects::All, None);
        assert!(feed.since(&topic, None).is_none(), "there are no flags yet");
        swap(&snapshots, r#"{"features":[{"name":"a"}]}"#);
        let first = feed.since(&topic, None).unwrap();
        assert_eq!(first.news(), News::Everything);
        assert_eq!(feed.since(&topic, Some(first.id())).unwrap().news(), News::Nothing);
        for unknown in [0, first.id() - 1, first.id() + 1, u32::MAX] {
            assert_eq!(feed.since(&topic, Some(unknown)).unwrap().news(), News::Everything);
        }
    }

    #[test]
    fn the_same_is_written_once_and_a_change_elsewhere_is_no_news() {
        let snapshots = Snapshots::default();
        let feed = Feed::new(snapshots.clone());
        let (web, all) = (topic(Projects::from_list(["web"]), None), topic(Projects::All, None));
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"}]}"#);
        let first = feed.since(&web, None).unwrap();
        assert!(Arc::ptr_eq(&first, &feed.since(&web, None).unwrap()));
        let numbers = feed.follow(&development()).unwrap();
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"}],"meta":{"revisionId":2}}"#);
        assert_eq!(feed.since(&web, Some(first.id())).unwrap().id(), first.id(), "no new state");
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"},{"name":"b"}]}"#);
        let then = feed.since(&web, Some(first.id())).unwrap();
        assert_eq!((then.news(), then.id()), (News::Nothing, first.id() + 1));
        assert_eq!(web.id(*numbers.borrow()), then.id());
        let before = feed.since(&all, None).unwrap();
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"},{"name":"c"}]}"#);
        assert_eq!(feed.since(&all, Some(before.id())).unwrap().news(), News::Changes);
    }

    #[test]
    fn whoever_sees_something_else_than_before_is_told_everything() {
        let snapshots = Snapshots::default();
        let feed = Feed::new(snapshots.clone());
        swap(&snapshots, r#"{"features":[{"name":"a","project":"web"},{"name":"b"}]}"#);
        let topics = [
            topic(Projects::All, None),
            topic(Projects::from_list(["web"]), None),
            topic(Projects::from_list(["web", "default"]), None),
            topic(Projects::All, Some("b")),
        ];
        for (n, now) in topics.iter().enumerate() {
            for (m, before) in topics.iter().enumerate() {
                let told = feed.since(before, None).unwrap();
                let frame = feed.since(now, Some(told.id())).unwrap();
                let expect = if n == m { News::Nothing } else { News::Everything };
                assert_eq!(frame.news(), expect, "{before:?} became {now:?}");
            }
        }
    }
}
