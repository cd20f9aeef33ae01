//! Where unsent usage is stored: each process that keeps a folder has a record of its own.
//!
//! Two that shared one would lose each other's counts or send them twice. A process takes the first
//! record that nobody has claimed, and sends what it finds in any other of those: the usage of
//! processes that have ended, by a crash or because upstream was away.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest as _, Sha256};
use tracing::{info, warn};

use crate::{
    store::{Claim, Error, Key, Slot, Store},
    telemetry::report,
    usage::Usage,
};

/// How many slots may fail to be claimed before the search ends.
const MAX_FAILURES: usize = 8;

/// Why usage is not stored.
#[derive(Debug, thiserror::Error)]
pub(super) enum SaveError {
    /// The record cannot be written.
    #[error(transparent)]
    Store(#[from] Error),
    /// There is no record for this process.
    #[error("other instances keep this folder, and no slot is left")]
    NoSlot,
}

/// The record of this process, and those of others that it has taken over.
#[derive(Debug)]
pub(super) struct Spools {
    /// The folder, which several processes may keep.
    folder: Store,
    own: Mutex<Own>,
    /// Read, and to be emptied as soon as what they held is stored again.
    adopted: Mutex<Vec<(Slot, Claim)>>,
    /// What this process last read or wrote in the first slot without a claim. While the record there
    /// is the same, it holds nothing that is not here too.
    unclaimed: Mutex<Option<Fingerprint>>,
}

/// Stands for the bytes of a record.
type Fingerprint = [u8; 32];

fn digest(bytes: &[u8]) -> Fingerprint {
    Sha256::digest(bytes).into()
}

/// Where the usage of this process is stored.
#[derive(Clone, Debug)]
enum Own {
    /// In a slot that no other process can claim meanwhile.
    Claimed { slot: Slot, _claim: Arc<Claim> },
    /// In the first slot of a folder where no slot can be claimed and none is seen to be: whether
    /// another process keeps it cannot be told, so that nobody's usage is taken over.
    Unclaimed,
    /// Nowhere: other processes have claimed slots, and no other can be claimed.
    None,
}

impl Own {
    /// Takes the first slot that nobody has; also the first failure on the way.
    ///
    /// A slot that cannot be claimed may be another process's. It is not used as long as any slot
    /// shows that claims work in this folder.
    async fn choose(folder: &Store) -> (Self, Option<Error>) {
        let mut is_shared = false;
        let mut failure = None;
        let mut failures = 0;
        for slot in Slot::all() {
            match folder.claim(&Key::Usage(slot)).await {
                Ok(Some(claim)) => {
                    return (Self::Claimed { slot, _claim: Arc::new(claim) }, failure);
                }
                Ok(None) => is_shared = true,
                Err(error) => {
                    failure.get_or_insert(error);
                    failures += 1;
                    if failures == MAX_FAILURES {
                        break;
                    }
                }
            }
        }
        (if is_shared { Self::None } else { Self::Unclaimed }, failure)
    }

    /// Warns where usage is not stored as it is by a process that is alone.
    fn warn(&self, failure: Option<&Error>) {
        let error = failure.map(|error| report(error));
        match self {
            Self::Claimed { slot: Slot::FIRST, .. } => {}
            Self::Claimed { .. } => warn!(
                error,
                "Another instance keeps this folder: usage is stored apart from its own, verdicts and flags are shared"
            ),
            Self::Unclaimed => warn!(
                error,
                "Whether another instance keeps this folder cannot be told: two would lose or double stored usage"
            ),
            Self::None => warn!(
                error,
                "Other instances keep this folder and no slot is left: usage that is not sent ends with this one"
            ),
        }
    }

    fn slot(&self) -> Option<Slot> {
        match self {
            Self::Claimed { slot, .. } => Some(*slot),
            Self::Unclaimed => Some(Slot::FIRST),
            Self::None => None,
        }
    }
}

impl Spools {
    /// Takes the first record that nobody has, and takes in what it holds.
    pub(super) async fn open(folder: Store, usage: &Usage) -> Self {
        let (own, failure) = Own::choose(&folder).await;
        own.warn(failure.as_ref());
        let slot = own.slot();
        let spools = Self {
            folder,
            own: Mutex::new(own),
            adopted: Mutex::default(),
            unclaimed: Mutex::default(),
        };
        if let Some(slot) = slot {
            spools.read(slot, usage).await;
        }
        spools
    }

    /// Takes over the usage of processes that have ended; says whether everything is to be stored
    /// at once.
    ///
    /// A process without a slot of its own tries first to claim one, and takes over nothing until
    /// it has one.
    pub(super) async fn adopt(&self, usage: &Usage) -> bool {
        let mut any = self.claim_again(usage).await;
        let Own::Claimed { slot: own, .. } = self.own() else { return any };
        let slots = self.folder.slots().await.unwrap_or_else(|error| {
            warn!(error = report(&error), "Usage that other instances have left is not looked for");
            Vec::new()
        });
        for slot in slots.into_iter().filter(|slot| *slot != own && !self.has(*slot)) {
            match self.folder.claim(&Key::Usage(slot)).await {
                Ok(Some(claim)) => {
                    if self.read(slot, usage).await {
                        self.adopted().push((slot, claim));
                        any = true;
                    }
                }
                Ok(None) => {}
                Err(error) => warn!(error = report(&error), "Usage of another instance is left"),
            }
        }
        any
    }

    /// Claims a slot where none could be claimed before; true if there is one now.
    async fn claim_again(&self, usage: &Usage) -> bool {
        let before = self.own();
        if matches!(before, Own::Claimed { .. }) {
            return false;
        }
        let (own, failure) = Own::choose(&self.folder).await;
        *self.own.lock().unwrap_or_else(PoisonError::into_inner) = own.clone();
        let is_claimed = matches!(own, Own::Claimed { .. });
        if is_claimed {
            info!("Usage that is not sent is stored in a slot of its own from here on");
        } else if own.slot() != before.slot() {
            own.warn(failure.as_ref());
        }
        if let Some(slot) = own.slot().filter(|slot| is_claimed || before.slot() != Some(*slot)) {
            self.read(slot, usage).await;
        }
        is_claimed
    }

    /// Stores everything that waits. What was taken over is in it, and is then stored only here.
    pub(super) async fn save(&self, bytes: Vec<u8>) -> Result<(), SaveError> {
        let own = self.own();
        let Some(slot) = own.slot() else {
            return if bytes.is_empty() { Ok(()) } else { Err(SaveError::NoSlot) };
        };
        let written = matches!(own, Own::Unclaimed).then(|| digest(&bytes));
        self.folder.save(&Key::Usage(slot), bytes).await?;
        if slot == Slot::FIRST {
            *self.unclaimed() = written;
        } else {
            self.remove_unclaimed().await;
        }
        let adopted = std::mem::take(&mut *self.adopted());
        for (slot, claim) in adopted {
            if let Err(error) = self.folder.save(&Key::Usage(slot), Vec::new()).await {
                warn!(error = report(&error), "Usage of an ended instance cannot be removed yet");
                // Nobody else may send it meanwhile.
                self.adopted().push((slot, claim));
            }
        }
        Ok(())
    }

    /// Empties the first slot where it holds what this process stored there before it had a slot of
    /// its own.
    async fn remove_unclaimed(&self) {
        if self.unclaimed().is_none() || self.has(Slot::FIRST) {
            return;
        }
        let first = Key::Usage(Slot::FIRST);
        // Held until the end, if it can be had. Where it cannot be told whose the slot is, it is used
        // once more as it was used before.
        let _claim = match self.folder.claim(&first).await {
            Ok(Some(claim)) => Some(claim),
            Ok(None) => return,
            Err(_) => None,
        };
        let Ok(saved) = self.folder.load(&first).await else { return };
        let is_ours = saved.is_some_and(|saved| *self.unclaimed() == Some(digest(&saved)));
        if is_ours && let Err(error) = self.folder.save(&first, Vec::new()).await {
            return warn!(error = report(&error), "Usage that is stored twice is not removed yet");
        }
        *self.unclaimed() = None;
    }

    /// Takes in what is stored; whether there was something, which the next save replaces.
    async fn read(&self, slot: Slot, usage: &Usage) -> bool {
        match self.folder.load(&Key::Usage(slot)).await {
            Ok(Some(saved)) if !saved.is_empty() => {
                if slot == Slot::FIRST {
                    let fingerprint = digest(&saved);
                    if *self.unclaimed() == Some(fingerprint) {
                        // This process has it already.
                        return true;
                    }
                    if matches!(self.own(), Own::Unclaimed) {
                        *self.unclaimed() = Some(fingerprint);
                    }
                }
                match usage.restore(&saved) {
                    Ok(()) => info!("Usage of an earlier run waits to be sent"),
                    Err(error) => warn!(error = report(&error), "Stored usage is lost"),
                }
                true
            }
            Ok(_) => false,
            Err(error) => {
                warn!(error = report(&error), "Stored usage is not used");
                false
            }
        }
    }

    fn own(&self) -> Own {
        self.own.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn has(&self, slot: Slot) -> bool {
        self.adopted().iter().any(|(adopted, _)| *adopted == slot)
    }

    fn unclaimed(&self) -> MutexGuard<'_, Option<Fingerprint>> {
        self.unclaimed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn adopted(&self) -> MutexGuard<'_, Vec<(Slot, Claim)>> {
        self.adopted.lock().unwrap_or_else(PoisonError::into_inner)
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
    use crate::{usage::Config, wire::usage::ConnectVia};

    /// Five evaluations that wait.
    const STORED: &[u8] = br#"{"version":1,"environments":{"dev":{"batch":[],"pieces":[],
        "applications":[],"impact":[],"metrics":[{"featureName":"f","appName":"a",
        "environment":"dev","timestamp":"2026-01-02T04:00:00Z","yes":5,"no":0,"variants":{}}]}}}"#;

    fn usage() -> Usage {
        let config = Config { interval: Duration::from_mins(1), max_counters: 100 };
        Usage::new(&config, ConnectVia { app_name: "parapet".into(), instance_id: "i".into() })
    }

    fn waiting(usage: &Usage) -> usize {
        usage.pending()["metrics"].as_array().unwrap().len()
    }

    /// Makes a slot fail to be claimed, as a lock file that only another user may open does.
    fn obstruct(folder: &Path, slot: usize) -> PathBuf {
        let name = if slot == 1 { "usage.lock".to_owned() } else { format!("usage-{slot}.lock") };
        let path = folder.join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    /// A store in a folder where no slot can be claimed, and what is in the way of each.
    fn obstructed() -> (TempDir, Store, Vec<PathBuf>) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::directory(folder.path()).unwrap();
        let obstacles = (1..20).map(|slot| obstruct(folder.path(), slot)).collect();
        (folder, store, obstacles)
    }

    fn slot(n: usize) -> Slot {
        Slot::all().nth(n - 1).unwrap()
    }

    #[tokio::test]
    async fn slot_that_cannot_be_claimed_is_skipped() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::directory(folder.path()).unwrap();
        let _other = store.claim(&Key::Usage(Slot::FIRST)).await.unwrap().unwrap();
        store.save(&Key::Usage(Slot::FIRST), STORED).await.unwrap();
        obstruct(folder.path(), 2);
        let usage = usage();
        let spools = Spools::open(store.clone(), &usage).await;
        assert_eq!(spools.own().slot(), Some(slot(3)));
        spools.adopt(&usage).await;
        spools.save(b"ours".to_vec()).await.unwrap();
        assert_eq!(waiting(&usage), 0);
        assert_eq!(store.load(&Key::Usage(Slot::FIRST)).await.unwrap().unwrap(), STORED);
        assert_eq!(store.load(&Key::Usage(slot(3))).await.unwrap().unwrap(), b"ours");
    }

    #[tokio::test]
    async fn first_slot_that_cannot_be_claimed_is_left_where_another_can() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::directory(folder.path()).unwrap();
        store.save(&Key::Usage(Slot::FIRST), STORED).await.unwrap();
        obstruct(folder.path(), 1);
        let usage = usage();
        let spools = Spools::open(store.clone(), &usage).await;
        spools.adopt(&usage).await;
        spools.save(b"ours".to_vec()).await.unwrap();
        assert_eq!((spools.own().slot(), waiting(&usage)), (Some(slot(2)), 0));
        assert_eq!(store.load(&Key::Usage(Slot::FIRST)).await.unwrap().unwrap(), STORED);
    }

    #[tokio::test]
    async fn without_a_slot_nothing_is_stored_until_one_can_be_claimed() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::directory(folder.path()).unwrap();
        let other = store.claim(&Key::Usage(Slot::FIRST)).await.unwrap().unwrap();
        store.save(&Key::Usage(Slot::FIRST), STORED).await.unwrap();
        let obstacles: Vec<_> = (2..20).map(|slot| obstruct(folder.path(), slot)).collect();
        let usage = usage();
        let spools = Spools::open(store.clone(), &usage).await;
        assert!(!spools.adopt(&usage).await);
        assert!(matches!(spools.save(b"ours".to_vec()).await, Err(SaveError::NoSlot)));
        assert_eq!(store.load(&Key::Usage(Slot::FIRST)).await.unwrap().unwrap(), STORED);

        fs::remove_dir(&obstacles[0]).unwrap();
        assert!(spools.adopt(&usage).await);
        assert_eq!((spools.own().slot(), waiting(&usage)), (Some(slot(2)), 0));
        drop(other);
        assert!(spools.adopt(&usage).await);
        assert_eq!(waiting(&usage), 1);
    }

    #[tokio::test]
    async fn folder_without_locks_is_kept_by_one_until_locks_work() {
        let (_folder, store, obstacles) = obstructed();
        store.save(&Key::Usage(Slot::FIRST), STORED).await.unwrap();
        let usage = usage();
        let spools = Spools::open(store.clone(), &usage).await;
        assert_eq!(waiting(&usage), 1);
        assert!(!spools.adopt(&usage).await);
        spools.save(b"ours".to_vec()).await.unwrap();
        assert_eq!(store.load(&Key::Usage(Slot::FIRST)).await.unwrap().unwrap(), b"ours");

        for obstacle in obstacles {
            fs::remove_dir(obstacle).unwrap();
        }
        // Another process was faster.
        let other = store.claim(&Key::Usage(Slot::FIRST)).await.unwrap().unwrap();
        assert!(spools.adopt(&usage).await);
        assert_eq!((spools.own().slot(), waiting(&usage)), (Some(slot(2)), 1));
        drop(other);
    }

    #[tokio::test]
    async fn own_usage_in_a_slot_that_was_not_claimed_is_counted_once() {
        let (_folder, store, mut obstacles) = obstructed();
        store.save(&Key::Usage(Slot::FIRST), STORED).await.unwrap();
        let usage = usage();
        let spools = Spools::open(store.clone(), &usage).await;
        let evaluations = || usage.pending()["metrics"][0]["bucket"]["yes"].as_u64();
        assert_eq!(evaluations(), Some(5));

        // The second slot can be claimed, and the first one cannot be told whose it is.
        fs::remove_dir(obstacles.remove(1)).unwrap();
        assert!(spools.adopt(&usage).await);
        assert_eq!((spools.own().slot(), evaluations()), (Some(slot(2)), Some(5)));
        for is_stored in [false, true] {
            if is_stored {
                spools.save(usage.save().unwrap()).await.unwrap();
            }
            for obstacle in obstacles.drain(..) {
                fs::remove_dir(obstacle).unwrap();
            }
            spools.adopt(&usage).await;
            assert_eq!(evaluations(), Some(5), "{is_stored}");
        }
        spools.save(usage.save().unwrap()).await.unwrap();
        // The next run finds it in one place.
        drop(spools);
        let next = self::usage();
        Spools::open(store, &next).await.adopt(&next).await;
        assert_eq!(next.pending()["metrics"][0]["bucket"]["yes"].as_u64(), Some(5));
    }

    #[tokio::test]
    async fn own_usage_is_removed_where_it_was_stored_without_a_claim() {
        let (_folder, store, mut obstacles) = obstructed();
        let usage = usage();
        let spools = Spools::open(store.clone(), &usage).await;
        spools.save(STORED.to_vec()).await.unwrap();
        fs::remove_dir(obstacles.remove(1)).unwrap();
        assert!(spools.adopt(&usage).await);
        spools.save(STORED.to_vec()).await.unwrap();
        let load = async |slot| store.load(&Key::Usage(slot)).await.unwrap().unwrap_or_default();
        assert_eq!((load(slot(1)).await, load(slot(2)).await), (Vec::new(), STORED.to_vec()));

        // What somebody else has written there stays.
        let spools = Spools { unclaimed: Mutex::new(Some(digest(STORED))), ..spools };
        store.save(&Key::Usage(slot(1)), "theirs").await.unwrap();
        spools.save(STORED.to_vec()).await.unwrap();
        assert_eq!(load(slot(1)).await, b"theirs");
    }

    #[tokio::test]
    async fn usage_that_is_stored_nowhere_is_an_error_and_is_not_taken_in_again() {
        let (_folder, store, mut obstacles) = obstructed();
        store.save(&Key::Usage(Slot::FIRST), STORED).await.unwrap();
        let usage = usage();
        let spools = Spools::open(store.clone(), &usage).await;
        // Another process can claim a slot, so that this one may not use the first any more.
        fs::remove_dir(obstacles.remove(1)).unwrap();
        let _other = store.claim(&Key::Usage(slot(2))).await.unwrap().unwrap();
        assert!(!spools.adopt(&usage).await);
        assert_eq!(spools.own().slot(), None);
        let refused = spools.save(usage.save().unwrap()).await;
        assert!(matches!(refused, Err(SaveError::NoSlot)), "{refused:?}");
        spools.save(Vec::new()).await.unwrap();

        fs::remove_dir(obstacles.remove(0)).unwrap();
        assert!(spools.adopt(&usage).await);
        assert_eq!(spools.own().slot(), Some(slot(1)));
        assert_eq!(usage.pending()["metrics"][0]["bucket"]["yes"].as_u64(), Some(5));
        spools.save(b"ours".to_vec()).await.unwrap();
        assert_eq!(store.load(&Key::Usage(slot(1))).await.unwrap().unwrap(), b"ours");
    }
}
