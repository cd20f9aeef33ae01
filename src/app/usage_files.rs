//! Stores unsent usage; each process that shares a folder has its own record.
//!
//! Two processes sharing one record would lose each other's counts or send them twice. A process
//! acquires the first record that is not locked, and recovers usage from all other unlocked records:
//! their processes ended in a crash or while upstream was unavailable. In a remote store a lock is a
//! lease; a process that cannot renew it for minutes may lose its record to another, which then sends
//! what was stored there a second time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tracing::{info, warn};

use crate::{
    store::{Error, ProcessSlot, RecordKey, RecordLock, Store},
    telemetry::error_chain,
    usage::Usage,
};

/// Number of failed locks after which the search for a slot ends.
const MAX_LOCK_FAILURES: usize = 8;

/// Why usage is not stored.
#[derive(Debug, thiserror::Error)]
pub(super) enum SaveError {
    /// The record cannot be written.
    #[error(transparent)]
    Store(#[from] Error),
    /// This process has no slot.
    #[error("no slot could be locked")]
    NoSlot,
}

/// The record of this process, and the records that it has recovered from others.
#[derive(Debug)]
pub(super) struct UsageFiles {
    /// The store, which other processes may share.
    store: Arc<dyn Store>,
    own_slot: Mutex<OwnSlot>,
    /// Records that were recovered, and must be emptied once their usage is stored again.
    recovered: Mutex<Vec<(ProcessSlot, RecordLock)>>,
    /// Digest of the record that this process last read or wrote in the first slot without a lock. While
    /// the record has this digest, its usage is also in memory here.
    first_slot_digest: Mutex<Option<RecordDigest>>,
}

/// The digest of a record's bytes.
type RecordDigest = [u8; 32];

fn digest(bytes: &[u8]) -> RecordDigest {
    Sha256::digest(bytes).into()
}

/// The slot where this process stores usage.
#[derive(Clone, Debug)]
enum OwnSlot {
    /// A slot that is locked for this process.
    Locked { slot: ProcessSlot, lock: Arc<RecordLock> },
    /// The first slot of a folder where no slot can be locked and none is locked by others. Other
    /// processes may be using it, so their usage is not recovered.
    Unlocked,
    /// None: other processes have locked slots, and no other slot can be locked. In a remote store, which
    /// others must be expected to use, no slot is ever used without a lock.
    NoSlot,
}

impl OwnSlot {
    /// Acquires the first free slot; also returns the first error on the way.
    ///
    /// A slot that cannot be locked may belong to another process. It is not used if any other slot
    /// shows that locks work in this folder.
    async fn acquire(store: &dyn Store) -> (Self, Option<Error>) {
        let mut is_shared = store.is_remote();
        let mut failure = None;
        let mut failures = 0;
        for slot in ProcessSlot::all() {
            match store.try_lock(&RecordKey::Usage(slot)).await {
                Ok(Some(lock)) => {
                    return (Self::Locked { slot, lock: Arc::new(lock) }, failure);
                }
                Ok(None) => is_shared = true,
                Err(error) => {
                    let is_unavailable = error.is_unavailable();
                    failure.get_or_insert(error);
                    failures += 1;
                    if failures == MAX_LOCK_FAILURES || is_unavailable {
                        break;
                    }
                }
            }
        }
        (if is_shared { Self::NoSlot } else { Self::Unlocked }, failure)
    }

    /// Logs a warning unless this process has the first slot to itself, or shares a remote store.
    fn log_degradation(&self, store: &dyn Store, failure: Option<&Error>) {
        let is_logged_by_store = failure.is_some_and(Error::is_unavailable);
        let is_expected = store.is_remote() && matches!(self, Self::Locked { .. });
        if is_logged_by_store || is_expected {
            return;
        }
        let error = failure.map(|error| error_chain(error));
        match self {
            Self::Locked { slot: ProcessSlot::FIRST, .. } => {}
            Self::Locked { .. } => warn!(
                error,
                "Another instance uses this folder: usage is stored separately, validated tokens and flags are shared"
            ),
            Self::Unlocked => warn!(
                error,
                "Cannot determine whether another instance uses this folder: two would lose or double stored usage"
            ),
            Self::NoSlot => warn!(
                error,
                "No slot can be locked for unsent usage: usage still unsent at shutdown is lost"
            ),
        }
    }

    fn slot(&self) -> Option<ProcessSlot> {
        match self {
            Self::Locked { slot, .. } => Some(*slot),
            Self::Unlocked => Some(ProcessSlot::FIRST),
            Self::NoSlot => None,
        }
    }
}

/// Logs a failure, unless the store as a whole is unavailable, which it logs itself.
fn log_failure(error: &Error, consequence: &'static str) {
    if !error.is_unavailable() {
        warn!(error = error_chain(error), "{consequence}");
    }
}

/// Renews a lock; false if another process has it. A failure leaves time for further attempts.
async fn is_still_locked(lock: &RecordLock) -> bool {
    match lock.renew().await {
        Ok(true) => true,
        Ok(false) => {
            warn!(
                "Another instance has taken over a record of this one, whose lock could not be renewed in time: usage that was stored there may be sent twice"
            );
            false
        }
        Err(error) => {
            log_failure(&error, "Cannot renew the lock of stored usage yet");
            true
        }
    }
}

async fn release(lock: RecordLock) {
    if let Err(error) = lock.release().await {
        log_failure(&error, "Cannot release a lock; it expires");
    }
}

impl UsageFiles {
    /// Acquires a slot and restores its usage.
    pub(super) async fn open(store: Arc<dyn Store>, usage: &Usage) -> Self {
        let (own, failure) = OwnSlot::acquire(&*store).await;
        own.log_degradation(&*store, failure.as_ref());
        let slot = own.slot();
        let files = Self {
            store,
            own_slot: Mutex::new(own),
            recovered: Mutex::default(),
            first_slot_digest: Mutex::default(),
        };
        if let Some(slot) = slot {
            files.restore_slot(slot, usage).await;
        }
        files
    }

    /// Recovers the usage of processes that have ended; whether everything must be stored at once.
    ///
    /// A process without a locked slot first tries to acquire one, and recovers nothing until it has
    /// one.
    pub(super) async fn recover_orphans(&self, usage: &Usage) -> bool {
        let mut any = self.retry_acquire(usage).await;
        let OwnSlot::Locked { slot: own, .. } = self.own_slot() else { return any };
        let keys = self.store.list().await.unwrap_or_else(|error| {
            log_failure(&error, "Cannot list slots; usage of ended instances is not recovered");
            Vec::new()
        });
        for key in keys {
            let RecordKey::Usage(slot) = key else { continue };
            if slot == own || self.is_recovered(slot) {
                continue;
            }
            match self.store.try_lock(&key).await {
                Ok(Some(lock)) => {
                    if self.restore_slot(slot, usage).await {
                        self.lock_recovered().push((slot, lock));
                        any = true;
                    } else {
                        release(lock).await;
                    }
                }
                Ok(None) => {}
                Err(error) => log_failure(&error, "Cannot lock a slot; its usage is not recovered"),
            }
        }
        any
    }

    /// Tries again to lock a slot if none could be locked before; true if there is one now.
    async fn retry_acquire(&self, usage: &Usage) -> bool {
        let before = self.own_slot();
        if matches!(before, OwnSlot::Locked { .. }) {
            return false;
        }
        let (own, failure) = OwnSlot::acquire(&*self.store).await;
        *self.own_slot.lock().unwrap_or_else(PoisonError::into_inner) = own.clone();
        let is_locked = matches!(own, OwnSlot::Locked { .. });
        if is_locked {
            info!("A slot could be locked; unsent usage is stored in it from now on");
        } else if own.slot() != before.slot() {
            own.log_degradation(&*self.store, failure.as_ref());
        }
        if let Some(slot) = own.slot().filter(|slot| is_locked || before.slot() != Some(*slot)) {
            self.restore_slot(slot, usage).await;
        }
        is_locked
    }

    /// Stores all pending usage. It includes recovered usage, whose former records are then emptied.
    pub(super) async fn save(&self, bytes: Vec<u8>) -> Result<(), SaveError> {
        let own = self.own_slot();
        let Some(slot) = own.slot() else {
            return if bytes.is_empty() { Ok(()) } else { Err(SaveError::NoSlot) };
        };
        let written = matches!(own, OwnSlot::Unlocked).then(|| digest(&bytes));
        self.store.save(&RecordKey::Usage(slot), bytes.into()).await?;
        if slot == ProcessSlot::FIRST {
            *self.lock_first_slot_digest() = written;
        } else {
            self.empty_own_copy_in_first_slot().await;
        }
        let recovered = std::mem::take(&mut *self.lock_recovered());
        for (slot, lock) in recovered {
            match self.store.save(&RecordKey::Usage(slot), Bytes::new()).await {
                Ok(()) => release(lock).await,
                Err(error) => {
                    log_failure(&error, "Cannot empty the record of an ended instance yet");
                    // Kept locked, so that no other process sends it meanwhile.
                    self.lock_recovered().push((slot, lock));
                }
            }
        }
        Ok(())
    }

    /// Renews the locks, which expire in a remote store; call every [`RecordLock::RENEWAL_INTERVAL`].
    ///
    /// A slot that another process has locked meanwhile is given up; the next search for ended processes
    /// acquires another one.
    pub(super) async fn renew_locks(&self) {
        if let OwnSlot::Locked { lock, .. } = self.own_slot()
            && !is_still_locked(&lock).await
        {
            *self.own_slot.lock().unwrap_or_else(PoisonError::into_inner) = OwnSlot::NoSlot;
        }
        let recovered = std::mem::take(&mut *self.lock_recovered());
        for (slot, lock) in recovered {
            if is_still_locked(&lock).await {
                self.lock_recovered().push((slot, lock));
            }
        }
    }

    /// Releases all slots, so that another process can recover what is stored in them.
    pub(super) async fn release_locks(&self) {
        let own = std::mem::replace(
            &mut *self.own_slot.lock().unwrap_or_else(PoisonError::into_inner),
            OwnSlot::NoSlot,
        );
        if let OwnSlot::Locked { lock, .. } = own
            && let Some(lock) = Arc::into_inner(lock)
        {
            release(lock).await;
        }
        let recovered = std::mem::take(&mut *self.lock_recovered());
        for (_, lock) in recovered {
            release(lock).await;
        }
    }

    /// Empties the first slot if it still contains what this process stored there before it had a locked
    /// slot.
    async fn empty_own_copy_in_first_slot(&self) {
        if self.lock_first_slot_digest().is_none() || self.is_recovered(ProcessSlot::FIRST) {
            return;
        }
        let first = RecordKey::Usage(ProcessSlot::FIRST);
        // Kept until the end if available. If the slot cannot be locked, it is used without a lock once
        // more.
        let lock = match self.store.try_lock(&first).await {
            Ok(Some(lock)) => Some(lock),
            Ok(None) => return,
            Err(_) => None,
        };
        self.empty_own_copy(&first).await;
        if let Some(lock) = lock {
            release(lock).await;
        }
    }

    async fn empty_own_copy(&self, first: &RecordKey) {
        let Ok(saved) = self.store.load(first).await else { return };
        let is_ours =
            saved.is_some_and(|saved| *self.lock_first_slot_digest() == Some(digest(&saved)));
        if is_ours && let Err(error) = self.store.save(first, Bytes::new()).await {
            return log_failure(&error, "Cannot empty the former copy of usage yet");
        }
        *self.lock_first_slot_digest() = None;
    }

    /// Restores the usage in a slot; whether there was any, which the next save replaces.
    async fn restore_slot(&self, slot: ProcessSlot, usage: &Usage) -> bool {
        match self.store.load(&RecordKey::Usage(slot)).await {
            Ok(Some(saved)) if !saved.is_empty() => {
                if slot == ProcessSlot::FIRST {
                    let fingerprint = digest(&saved);
                    if *self.lock_first_slot_digest() == Some(fingerprint) {
                        // This process already has it.
                        return true;
                    }
                    if matches!(self.own_slot(), OwnSlot::Unlocked) {
                        *self.lock_first_slot_digest() = Some(fingerprint);
                    }
                }
                match usage.restore(&saved) {
                    Ok(()) => info!("Restored usage of an earlier run; it will be sent"),
                    Err(error) => {
                        warn!(
                            error = error_chain(&error),
                            "Stored usage cannot be used and is lost"
                        );
                    }
                }
                true
            }
            Ok(_) => false,
            Err(error) => {
                log_failure(&error, "Cannot read stored usage");
                false
            }
        }
    }

    fn own_slot(&self) -> OwnSlot {
        self.own_slot.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn is_recovered(&self, slot: ProcessSlot) -> bool {
        self.lock_recovered().iter().any(|(recovered, _)| *recovered == slot)
    }

    fn lock_first_slot_digest(&self) -> MutexGuard<'_, Option<RecordDigest>> {
        self.first_slot_digest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_recovered(&self) -> MutexGuard<'_, Vec<(ProcessSlot, RecordLock)>> {
        self.recovered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
        time::Duration,
    };

    use tempfile::TempDir;

    use super::*;
    use crate::{protocol::usage::ConnectVia, store::FileStore, usage::Config};

    /// Five pending evaluations.
    const STORED: &[u8] = br#"{"version":1,"environments":{"dev":{"batch":[],"pieces":[],
        "applications":[],"impact":[],"metrics":[{"featureName":"f","appName":"a",
        "environment":"dev","timestamp":"2026-01-02T04:00:00Z","yes":5,"no":0,"variants":{}}]}}}"#;

    fn usage() -> Usage {
        let config = Config { interval: Duration::from_mins(1), max_counters: 100 };
        Usage::new(&config, ConnectVia { app_name: "parapet".into(), instance_id: "i".into() })
    }

    fn pending_metrics(usage: &Usage) -> usize {
        usage.pending()["metrics"].as_array().unwrap().len()
    }

    /// Makes locking a slot fail, like a lock file that belongs to another user.
    fn block_lock_file(folder: &Path, slot: usize) -> PathBuf {
        let name = if slot == 1 { "usage.lock".to_owned() } else { format!("usage-{slot}.lock") };
        let path = folder.join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    fn open(folder: &Path) -> Arc<dyn Store> {
        Arc::new(FileStore::open(folder).unwrap())
    }

    /// A store in a folder where no slot can be locked, and the obstacle for each slot.
    fn store_without_locks() -> (TempDir, Arc<dyn Store>, Vec<PathBuf>) {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let obstacles = (1..20).map(|slot| block_lock_file(folder.path(), slot)).collect();
        (folder, store, obstacles)
    }

    fn slot(n: usize) -> ProcessSlot {
        ProcessSlot::all().nth(n - 1).unwrap()
    }

    #[tokio::test]
    async fn slot_that_cannot_be_locked_is_skipped() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let _other = store.try_lock(&RecordKey::Usage(ProcessSlot::FIRST)).await.unwrap().unwrap();
        store.save(&RecordKey::Usage(ProcessSlot::FIRST), STORED.into()).await.unwrap();
        block_lock_file(folder.path(), 2);
        let usage = usage();
        let files = UsageFiles::open(Arc::clone(&store), &usage).await;
        assert_eq!(files.own_slot().slot(), Some(slot(3)));
        files.recover_orphans(&usage).await;
        files.save(b"ours".to_vec()).await.unwrap();
        assert_eq!(pending_metrics(&usage), 0);
        assert_eq!(
            store.load(&RecordKey::Usage(ProcessSlot::FIRST)).await.unwrap().unwrap(),
            STORED
        );
        assert_eq!(store.load(&RecordKey::Usage(slot(3))).await.unwrap().unwrap(), b"ours");
    }

    #[tokio::test]
    async fn first_slot_is_not_used_unlocked_if_another_can_be_locked() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        store.save(&RecordKey::Usage(ProcessSlot::FIRST), STORED.into()).await.unwrap();
        block_lock_file(folder.path(), 1);
        let usage = usage();
        let files = UsageFiles::open(Arc::clone(&store), &usage).await;
        files.recover_orphans(&usage).await;
        files.save(b"ours".to_vec()).await.unwrap();
        assert_eq!((files.own_slot().slot(), pending_metrics(&usage)), (Some(slot(2)), 0));
        assert_eq!(
            store.load(&RecordKey::Usage(ProcessSlot::FIRST)).await.unwrap().unwrap(),
            STORED
        );
    }

    #[tokio::test]
    async fn without_a_slot_nothing_is_stored_until_one_can_be_locked() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let other = store.try_lock(&RecordKey::Usage(ProcessSlot::FIRST)).await.unwrap().unwrap();
        store.save(&RecordKey::Usage(ProcessSlot::FIRST), STORED.into()).await.unwrap();
        let obstacles: Vec<_> = (2..20).map(|slot| block_lock_file(folder.path(), slot)).collect();
        let usage = usage();
        let files = UsageFiles::open(Arc::clone(&store), &usage).await;
        assert!(!files.recover_orphans(&usage).await);
        assert!(matches!(files.save(b"ours".to_vec()).await, Err(SaveError::NoSlot)));
        assert_eq!(
            store.load(&RecordKey::Usage(ProcessSlot::FIRST)).await.unwrap().unwrap(),
            STORED
        );

        fs::remove_dir(&obstacles[0]).unwrap();
        assert!(files.recover_orphans(&usage).await);
        assert_eq!((files.own_slot().slot(), pending_metrics(&usage)), (Some(slot(2)), 0));
        drop(other);
        assert!(files.recover_orphans(&usage).await);
        assert_eq!(pending_metrics(&usage), 1);
    }

    #[tokio::test]
    async fn folder_without_locks_uses_first_slot_until_locks_work() {
        let (_folder, store, obstacles) = store_without_locks();
        store.save(&RecordKey::Usage(ProcessSlot::FIRST), STORED.into()).await.unwrap();
        let usage = usage();
        let files = UsageFiles::open(Arc::clone(&store), &usage).await;
        assert_eq!(pending_metrics(&usage), 1);
        assert!(!files.recover_orphans(&usage).await);
        files.save(b"ours".to_vec()).await.unwrap();
        assert_eq!(
            store.load(&RecordKey::Usage(ProcessSlot::FIRST)).await.unwrap().unwrap(),
            b"ours"
        );

        for obstacle in obstacles {
            fs::remove_dir(obstacle).unwrap();
        }
        // Another process was faster.
        let other = store.try_lock(&RecordKey::Usage(ProcessSlot::FIRST)).await.unwrap().unwrap();
        assert!(files.recover_orphans(&usage).await);
        assert_eq!((files.own_slot().slot(), pending_metrics(&usage)), (Some(slot(2)), 1));
        drop(other);
    }

    #[tokio::test]
    async fn own_usage_in_an_unlocked_slot_is_counted_once() {
        let (_folder, store, mut obstacles) = store_without_locks();
        store.save(&RecordKey::Usage(ProcessSlot::FIRST), STORED.into()).await.unwrap();
        let usage = usage();
        let files = UsageFiles::open(Arc::clone(&store), &usage).await;
        let evaluations = || usage.pending()["metrics"][0]["bucket"]["yes"].as_u64();
        assert_eq!(evaluations(), Some(5));

        // The second slot can be locked; the first still cannot.
        fs::remove_dir(obstacles.remove(1)).unwrap();
        assert!(files.recover_orphans(&usage).await);
        assert_eq!((files.own_slot().slot(), evaluations()), (Some(slot(2)), Some(5)));
        for is_stored in [false, true] {
            if is_stored {
                files.save(usage.serialize().unwrap()).await.unwrap();
            }
            for obstacle in obstacles.drain(..) {
                fs::remove_dir(obstacle).unwrap();
            }
            files.recover_orphans(&usage).await;
            assert_eq!(evaluations(), Some(5), "{is_stored}");
        }
        files.save(usage.serialize().unwrap()).await.unwrap();
        // The next run finds it in one place.
        drop(files);
        let next = self::usage();
        UsageFiles::open(store, &next).await.recover_orphans(&next).await;
        assert_eq!(next.pending()["metrics"][0]["bucket"]["yes"].as_u64(), Some(5));
    }

    #[tokio::test]
    async fn own_usage_is_removed_from_the_unlocked_slot() {
        let (_folder, store, mut obstacles) = store_without_locks();
        let usage = usage();
        let files = UsageFiles::open(Arc::clone(&store), &usage).await;
        files.save(STORED.to_vec()).await.unwrap();
        fs::remove_dir(obstacles.remove(1)).unwrap();
        assert!(files.recover_orphans(&usage).await);
        files.save(STORED.to_vec()).await.unwrap();
        let load =
            async |slot| store.load(&RecordKey::Usage(slot)).await.unwrap().unwrap_or_default();
        assert_eq!((load(slot(1)).await, load(slot(2)).await), (Vec::new(), STORED.to_vec()));

        // Data that another process wrote there is preserved.
        let files = UsageFiles { first_slot_digest: Mutex::new(Some(digest(STORED))), ..files };
        store.save(&RecordKey::Usage(slot(1)), "theirs".into()).await.unwrap();
        files.save(STORED.to_vec()).await.unwrap();
        assert_eq!(load(slot(1)).await, b"theirs");
    }

    #[tokio::test]
    async fn saving_without_a_slot_fails_and_usage_is_not_restored_twice() {
        let (_folder, store, mut obstacles) = store_without_locks();
        store.save(&RecordKey::Usage(ProcessSlot::FIRST), STORED.into()).await.unwrap();
        let usage = usage();
        let files = UsageFiles::open(Arc::clone(&store), &usage).await;
        // Another process has locked a slot, so this one may no longer use the first.
        fs::remove_dir(obstacles.remove(1)).unwrap();
        let _other = store.try_lock(&RecordKey::Usage(slot(2))).await.unwrap().unwrap();
        assert!(!files.recover_orphans(&usage).await);
        assert_eq!(files.own_slot().slot(), None);
        let refused = files.save(usage.serialize().unwrap()).await;
        assert!(matches!(refused, Err(SaveError::NoSlot)), "{refused:?}");
        files.save(Vec::new()).await.unwrap();

        fs::remove_dir(obstacles.remove(0)).unwrap();
        assert!(files.recover_orphans(&usage).await);
        assert_eq!(files.own_slot().slot(), Some(slot(1)));
        assert_eq!(usage.pending()["metrics"][0]["bucket"]["yes"].as_u64(), Some(5));
        files.save(b"ours".to_vec()).await.unwrap();
        assert_eq!(store.load(&RecordKey::Usage(slot(1))).await.unwrap().unwrap(), b"ours");
    }
}
