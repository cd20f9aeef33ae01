//! Where unsent usage is stored: each process that keeps a folder has a record of its own.
//!
//! Two that shared one would lose each other's counts or send them twice. A process takes the first
//! record that nobody has claimed, and sends what it finds in any other of those: the usage of
//! processes that have ended, by a crash or because upstream was away.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::{info, warn};

use crate::{
    store::{Claim, Error, Key, Slot, Store},
    telemetry::report,
    usage::Usage,
};

/// How many slots may fail to be claimed before the search ends.
const MAX_FAILURES: usize = 8;

/// The record of this process, and those of others that it has taken over.
#[derive(Debug)]
pub(super) struct Spools {
    /// The folder, which several processes may keep.
    folder: Store,
    own: Mutex<Own>,
    /// Read, and to be emptied as soon as what they held is stored again.
    adopted: Mutex<Vec<(Slot, Claim)>>,
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
        let spools = Self { folder, own: Mutex::new(own), adopted: Mutex::default() };
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
        let (own, _) = Own::choose(&self.folder).await;
        let claimed = if let Own::Claimed { slot, .. } = &own { Some(*slot) } else { None };
        // What this process has stored there itself is not taken in once more.
        if let Some(slot) = claimed.filter(|slot| before.slot() != Some(*slot)) {
            self.read(slot, usage).await;
        }
        if claimed.is_some() {
            info!("Usage that is not sent is stored in a slot of its own from here on");
        }
        *self.own.lock().unwrap_or_else(PoisonError::into_inner) = own;
        claimed.is_some()
    }

    /// Stores everything that waits. What was taken over is in it, and is then stored only here.
    pub(super) async fn save(&self, bytes: Vec<u8>) -> Result<(), Error> {
        let own = self.own();
        let Some(slot) = own.slot() else { return Ok(()) };
        self.folder.save(&Key::Usage(slot), bytes).await?;
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

    /// Takes in what is stored; whether there was something, which the next save replaces.
    async fn read(&self, slot: Slot, usage: &Usage) -> bool {
        match self.folder.load(&Key::Usage(slot)).await {
            Ok(Some(saved)) if !saved.is_empty() => match usage.restore(&saved) {
                Ok(()) => {
                    info!("Usage of an earlier run waits to be sent");
                    true
                }
                Err(error) => {
                    warn!(error = report(&error), "Stored usage is lost");
                    true
                }
            },
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
        spools.save(b"ours".to_vec()).await.unwrap();
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
        let folder = tempfile::tempdir().unwrap();
        let store = Store::directory(folder.path()).unwrap();
        store.save(&Key::Usage(Slot::FIRST), STORED).await.unwrap();
        let obstacles: Vec<_> = (1..20).map(|slot| obstruct(folder.path(), slot)).collect();
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
}
