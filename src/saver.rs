//! Saves records in the background: flags and credentials, for a start without upstream.
//!
//! Handing a record over never waits, because a disk or network file system that hangs must not delay
//! flags. Of each record only the newest version is saved. What a record contains, and reading it, is the
//! business of its owner.

use std::{
    collections::HashMap,
    fmt, mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    store::{Error, Key, Store},
    telemetry::report,
};

/// How long after a failure saving is retried.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Saves records in the background. A cheap handle.
#[derive(Clone)]
pub struct Saver(Arc<Inner>);

struct Inner {
    store: Store,
    /// What is not saved yet.
    waiting: Mutex<HashMap<Key, Encode>>,
    has_more: Notify,
}

/// Makes the bytes of a record, each time that saving it is attempted.
type Encode = Box<dyn Fn() -> Bytes + Send + Sync>;

impl Saver {
    /// Saves to this store, while [`run`](Self::run) runs.
    pub fn new(store: Store) -> Self {
        Self(Arc::new(Inner { store, waiting: Mutex::default(), has_more: Notify::new() }))
    }

    /// Where records are saved, to read them.
    pub fn store(&self) -> &Store {
        &self.0.store
    }

    /// Has the record of `key` saved, instead of an older one that is still to be saved.
    pub fn save(&self, key: Key, encode: impl Fn() -> Bytes + Send + Sync + 'static) {
        self.waiting().insert(key, Box::new(encode));
        self.0.has_more.notify_one();
    }

    /// Saves until `stop`, and then once more what is left; the store limits how long that takes.
    pub async fn run(&self, stop: &CancellationToken) {
        let mut is_failing = false;
        loop {
            let is_last = stop.is_cancelled();
            let failure = self.save_waiting().await;
            match &failure {
                Some(error) if !is_failing => {
                    warn!(
                        error = report(error),
                        "Saving flags or credentials failed and is retried"
                    );
                }
                None if is_failing => info!("Flags and credentials are saved again"),
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

    /// Saves each record once; one that cannot be saved is kept for a retry, unless there is a newer one.
    async fn save_waiting(&self) -> Option<Error> {
        let waiting = mem::take(&mut *self.waiting());
        let saves = waiting.into_iter().map(async |(key, encode)| {
            let saved = self.0.store.save(&key, encode()).await;
            if saved.is_err() {
                self.waiting().entry(key).or_insert(encode);
            }
            saved
        });
        join_all(saves).await.into_iter().find_map(Result::err)
    }

    /// A panic under this lock leaves a whole map.
    fn waiting(&self) -> MutexGuard<'_, HashMap<Key, Encode>> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Saver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Saver").field("store", &self.0.store).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::Environment;

    fn flags(environment: &str) -> Key {
        Key::Flags(Environment::new(environment))
    }

    fn save(saver: &Saver, key: &Key, text: &'static str) {
        saver.save(key.clone(), || Bytes::from_static(text.as_bytes()));
    }

    #[tokio::test]
    async fn newest_version_of_each_record_is_saved_before_the_end() {
        let store = Store::memory();
        let (saver, stop) = (Saver::new(store.clone()), CancellationToken::new());
        let credentials = Key::Credentials(Environment::new("dev"));
        let expected = [(flags("dev"), "new"), (flags("prod"), "other"), (credentials, "sealed")];
        save(&saver, &flags("dev"), "old");
        for (key, text) in &expected {
            save(&saver, key, text);
        }
        stop.cancel();
        saver.run(&stop).await;
        for (key, text) in &expected {
            let saved = store.load(key).await.expect("loads");
            assert_eq!(saved.as_deref(), Some(text.as_bytes()), "{key:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_could_not_be_saved_is_saved_later_unless_there_is_newer() {
        let folder = tempfile::tempdir().expect("folder");
        let store = Store::directory(folder.path()).expect("store");
        // A directory in the place of the record.
        let in_the_way = folder.path().join("flags-dev.parapet");
        std::fs::create_dir(&in_the_way).expect("directory");
        let (saver, stop) = (Saver::new(store.clone()), CancellationToken::new());
        save(&saver, &flags("dev"), "old");
        assert!(saver.save_waiting().await.is_some());
        save(&saver, &flags("dev"), "new");
        assert!(saver.save_waiting().await.is_some());
        std::fs::remove_dir(&in_the_way).expect("removed");
        tokio::join!(saver.run(&stop), async {
            while store.load(&flags("dev")).await.expect("loads").is_none() {
                sleep(RETRY_AFTER).await;
            }
            stop.cancel();
        });
        assert_eq!(store.load(&flags("dev")).await.expect("loads").as_deref(), Some(&b"new"[..]));
    }
}
