//! Writes records (flags and credentials) to the store in the background, for starts without upstream.
//!
//! [`BackgroundWriter::save`] never waits, because a disk or network file system that hangs must not
//! delay flags. Only the newest version of each record is written. This module neither reads records nor
//! knows their contents.

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
    store::{Error, RecordKey, Store},
    telemetry::error_chain,
};

/// Delay before a failed write is retried.
const RETRY_DELAY: Duration = Duration::from_secs(5);

/// Writes records in the background. A cheap handle.
#[derive(Clone)]
pub struct BackgroundWriter(Arc<Inner>);

struct Inner {
    store: Arc<dyn Store>,
    /// Records that are not written yet.
    pending: Mutex<HashMap<RecordKey, Encode>>,
    notify: Notify,
}

/// Encodes a record; called for each attempt to write it.
type Encode = Box<dyn Fn() -> Bytes + Send + Sync>;

impl BackgroundWriter {
    /// A writer to this store; [`run`](Self::run) does the writing.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self(Arc::new(Inner { store, pending: Mutex::default(), notify: Notify::new() }))
    }

    /// The store, to read records from.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.0.store
    }

    /// Queues a record, in place of an older version that is still queued.
    pub fn save(&self, key: RecordKey, encode: impl Fn() -> Bytes + Send + Sync + 'static) {
        self.lock_pending().insert(key, Box::new(encode));
        self.0.notify.notify_one();
    }

    /// Writes until `stop`, and then makes one last attempt; the store's timeout bounds that.
    pub async fn run(&self, stop: &CancellationToken) {
        let mut is_logged = false;
        loop {
            let is_last = stop.is_cancelled();
            let failure = self.save_pending().await;
            match &failure {
                // The store logs that itself.
                Some(error) if error.is_unavailable() => {}
                Some(error) if !is_logged => {
                    is_logged = true;
                    warn!(
                        error = error_chain(error),
                        "Saving flags or credentials failed; retrying every 5 s"
                    );
                }
                None if is_logged => {
                    is_logged = false;
                    info!("Saving flags and credentials works again");
                }
                Some(_) | None => {}
            }
            let is_failing = failure.is_some();
            if is_last {
                return;
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.0.notify.notified() => {}
                () = sleep(RETRY_DELAY), if is_failing => {}
            }
        }
    }

    /// Tries to write each queued record once. A record that fails is queued again, unless a newer
    /// version is queued already. Returns the first error.
    async fn save_pending(&self) -> Option<Error> {
        let waiting = mem::take(&mut *self.lock_pending());
        let saves = waiting.into_iter().map(async |(key, encode)| {
            let saved = self.0.store.save(&key, encode()).await;
            if saved.is_err() {
                self.lock_pending().entry(key).or_insert(encode);
            }
            saved
        });
        join_all(saves).await.into_iter().find_map(Result::err)
    }

    /// Ignores poisoning: a panic under this lock leaves the map intact.
    fn lock_pending(&self) -> MutexGuard<'_, HashMap<RecordKey, Encode>> {
        self.0.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for BackgroundWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackgroundWriter").field("store", &self.0.store).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        store::{FileStore, MemoryStore},
        token::Environment,
    };

    fn flags(environment: &str) -> RecordKey {
        RecordKey::Flags(Environment::new(environment))
    }

    fn save(writer: &BackgroundWriter, key: &RecordKey, text: &'static str) {
        writer.save(key.clone(), || Bytes::from_static(text.as_bytes()));
    }

    #[tokio::test]
    async fn newest_version_of_each_record_is_saved_before_shutdown() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let (writer, stop) = (BackgroundWriter::new(Arc::clone(&store)), CancellationToken::new());
        let credentials = RecordKey::Credentials(Environment::new("dev"));
        let expected = [(flags("dev"), "new"), (flags("prod"), "other"), (credentials, "sealed")];
        save(&writer, &flags("dev"), "old");
        for (key, text) in &expected {
            save(&writer, key, text);
        }
        stop.cancel();
        writer.run(&stop).await;
        for (key, text) in &expected {
            let saved = store.load(key).await.expect("loads");
            assert_eq!(saved.as_deref(), Some(text.as_bytes()), "{key:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn failed_record_is_saved_later_unless_a_newer_version_exists() {
        let folder = tempfile::tempdir().expect("folder");
        let store: Arc<dyn Store> = Arc::new(FileStore::open(folder.path()).expect("store"));
        // A directory at the record's path makes writing fail.
        let in_the_way = folder.path().join("flags-dev.parapet");
        std::fs::create_dir(&in_the_way).expect("directory");
        let (writer, stop) = (BackgroundWriter::new(Arc::clone(&store)), CancellationToken::new());
        save(&writer, &flags("dev"), "old");
        assert!(writer.save_pending().await.is_some());
        save(&writer, &flags("dev"), "new");
        assert!(writer.save_pending().await.is_some());
        std::fs::remove_dir(&in_the_way).expect("removed");
        tokio::join!(writer.run(&stop), async {
            while store.load(&flags("dev")).await.expect("loads").is_none() {
                sleep(RETRY_DELAY).await;
            }
            stop.cancel();
        });
        assert_eq!(store.load(&flags("dev")).await.expect("loads").as_deref(), Some(&b"new"[..]));
    }
}
