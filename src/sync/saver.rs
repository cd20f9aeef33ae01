//! Saves the flags that are served, for a start without upstream.
//!
//! Nobody waits for it: a disk or network file system that hangs must not stop flags. Of each environment
//! only the newest flags are saved.

use std::{
    collections::BTreeMap,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    snapshot::{Filter, Segments, Snapshot, body::Coding},
    store::{Error, Key, Store},
    telemetry::report,
    token::Environment,
    wire::features::{Document, EarlierRun},
};

/// How long after a failure flags are saved again.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Where flags wait to be saved. A cheap handle.
#[derive(Clone, Debug)]
pub struct Saver(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    /// What is not saved yet.
    waiting: Mutex<BTreeMap<Environment, (Arc<Snapshot>, EarlierRun)>>,
    has_more: Notify,
}

impl Saver {
    /// Saves to this store.
    pub fn new(store: Store) -> Self {
        Self(Arc::new(Inner { store, waiting: Mutex::default(), has_more: Notify::new() }))
    }

    /// Has these flags saved, instead of older ones of their environment, with what the next run is to
    /// know of this one.
    pub(super) fn save(&self, snapshot: Arc<Snapshot>, run: EarlierRun) {
        self.waiting().insert(snapshot.environment().clone(), (snapshot, run));
        self.0.has_more.notify_one();
    }

    /// Saves until `stop`, and then once more what waits; the store bounds how long that takes.
    pub async fn run(&self, stop: &CancellationToken) {
        let mut is_failing = false;
        loop {
            let is_last = stop.is_cancelled();
            let failure = self.save_waiting().await;
            match &failure {
                Some(error) if !is_failing => {
                    warn!(error = report(error), "Cannot save flags, which is tried again");
                }
                None if is_failing => info!("Flags are saved again"),
                Some(_) | None => {}
            }
            is_failing = failure.is_some();
            if is_last {
                return;
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.0.has_more.notified() => {}
                () = sleep(RETRY_AFTER), if is_failing => {}
            }
        }
    }

    /// Saves what waits; what cannot be saved waits on, unless there is newer.
    async fn save_waiting(&self) -> Option<Error> {
        let waiting = mem::take(&mut *self.waiting());
        let saves = waiting.into_iter().map(async |(environment, (snapshot, run))| {
            let saved = self.save_one(&snapshot, run).await;
            if saved.is_err() {
                self.waiting().entry(environment).or_insert((snapshot, run));
            }
            saved
        });
        join_all(saves).await.into_iter().find_map(Result::err)
    }

    async fn save_one(&self, snapshot: &Snapshot, run: EarlierRun) -> Result<(), Error> {
        // Its query says whose flags these are.
        let all = snapshot.listing(snapshot.projects(), Filter::default(), Segments::Separate);
        let text = Document::to_store(&all.make(Coding::Identity).bytes, run);
        self.0.store.save(&Key::Flags(snapshot.environment().clone()), text).await
    }

    /// A panic under this lock leaves a whole map.
    fn waiting(&self) -> MutexGuard<'_, BTreeMap<Environment, (Arc<Snapshot>, EarlierRun)>> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::{Projects, Scope};

    const RUN: EarlierRun = EarlierRun { upstream_revision: Some(7) };

    fn snapshot(environment: &str, flag: &str) -> Arc<Snapshot> {
        let text = format!(r#"{{"features":[{{"name":"{flag}"}}]}}"#);
        let document = Document::parse(text.as_bytes()).unwrap();
        let scope = Scope { environment: Environment::new(environment), projects: Projects::All };
        Arc::new(Snapshot::build(scope, document, None))
    }

    async fn saved(store: &Store, environment: &str) -> Option<String> {
        let bytes = store.load(&Key::Flags(Environment::new(environment))).await.unwrap()?;
        Some(String::from_utf8(bytes).unwrap())
    }

    #[tokio::test]
    async fn newest_flags_of_each_environment_are_saved_before_the_end() {
        let store = Store::memory();
        let (saver, stop) = (Saver::new(store.clone()), CancellationToken::new());
        for (environment, flag) in [("dev", "old"), ("prod", "other"), ("dev", "new")] {
            saver.save(snapshot(environment, flag), RUN);
        }
        stop.cancel();
        saver.run(&stop).await;
        assert!(saved(&store, "dev").await.unwrap().contains("new"));
        assert!(saved(&store, "prod").await.unwrap().contains("other"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_could_not_be_saved_is_saved_later_unless_there_is_newer() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::directory(folder.path()).unwrap();
        // A directory in the place of the record.
        let in_the_way = folder.path().join("flags-dev.parapet");
        std::fs::create_dir(&in_the_way).unwrap();
        let (saver, stop) = (Saver::new(store.clone()), CancellationToken::new());
        saver.save(snapshot("dev", "old"), RUN);
        assert!(saver.save_waiting().await.is_some());
        saver.save(snapshot("dev", "new"), RUN);
        assert!(saver.save_waiting().await.is_some());
        std::fs::remove_dir(&in_the_way).unwrap();
        tokio::join!(saver.run(&stop), async {
            while saved(&store, "dev").await.is_none() {
                sleep(RETRY_AFTER).await;
            }
            stop.cancel();
        });
        assert!(saved(&store, "dev").await.unwrap().contains("new"));
    }
}
