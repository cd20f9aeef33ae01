//! Where unsent usage is stored: each process that keeps a folder has a record of its own.
//!
//! Two that shared one would lose each other's counts or send them twice. A process takes the first
//! record that nobody has claimed, and sends what it finds in any other of those: the usage of
//! processes that have ended, by a crash or because upstream was away.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::{info, warn};

use crate::{
    store::{Claim, Error, Key, Slot, Store},
    telemetry::report,
    usage::Usage,
};

/// The record of this process, and those of others that it has taken over.
#[derive(Debug)]
pub(super) struct Spools {
    store: Store,
    own: Slot,
    hold: Hold,
    /// Read, and to be emptied as soon as what they held is stored again.
    adopted: Mutex<Vec<(Slot, Claim)>>,
}

/// How the own record is kept from others.
#[derive(Debug)]
enum Hold {
    Claimed {
        _claim: Claim,
    },
    /// It is not: who else keeps the folder cannot be told, so that nobody's usage is taken over.
    Shared,
}

impl Spools {
    /// Takes the first record that nobody has, and takes in what it holds.
    pub(super) async fn open(store: Store, usage: &Usage) -> Self {
        let (store, own, hold) = choose(store).await;
        let spools = Self { store, own, hold, adopted: Mutex::default() };
        spools.read(own, usage).await;
        spools
    }

    /// Takes over the usage of processes that have ended; says whether there was any, which is to
    /// be stored at once.
    pub(super) async fn adopt(&self, usage: &Usage) -> bool {
        if matches!(self.hold, Hold::Shared) {
            return false;
        }
        let slots = self.store.slots().await.unwrap_or_else(|error| {
            warn!(error = report(&error), "Usage that other instances have left is not looked for");
            Vec::new()
        });
        let mut any = false;
        for slot in slots.into_iter().filter(|slot| *slot != self.own && !self.has(*slot)) {
            match self.store.claim(&Key::Usage(slot)).await {
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

    /// Stores everything that waits. What was taken over is in it, and is then stored only here.
    pub(super) async fn save(&self, bytes: Vec<u8>) -> Result<(), Error> {
        self.store.save(&Key::Usage(self.own), bytes).await?;
        let adopted = std::mem::take(&mut *self.adopted());
        for (slot, claim) in adopted {
            if let Err(error) = self.store.save(&Key::Usage(slot), Vec::new()).await {
                warn!(error = report(&error), "Usage of an ended instance cannot be removed yet");
                // Nobody else may send it meanwhile.
                self.adopted().push((slot, claim));
            }
        }
        Ok(())
    }

    /// Takes in what is stored; whether there was something, which the next save replaces.
    async fn read(&self, slot: Slot, usage: &Usage) -> bool {
        match self.store.load(&Key::Usage(slot)).await {
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

    fn has(&self, slot: Slot) -> bool {
        self.adopted().iter().any(|(adopted, _)| *adopted == slot)
    }

    fn adopted(&self) -> MutexGuard<'_, Vec<(Slot, Claim)>> {
        self.adopted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The record of this process, where it is, and how it is held.
async fn choose(store: Store) -> (Store, Slot, Hold) {
    for slot in Slot::all() {
        match store.claim(&Key::Usage(slot)).await {
            Ok(Some(claim)) => {
                if slot != Slot::FIRST {
                    warn!(
                        "Another instance keeps this folder: usage is stored apart from its own, verdicts and flags are shared"
                    );
                }
                return (store, slot, Hold::Claimed { _claim: claim });
            }
            Ok(None) => {}
            Err(error) => {
                warn!(
                    error = report(&error),
                    "Whether another instance keeps this folder cannot be told: two would lose or double stored usage"
                );
                return (store, Slot::FIRST, Hold::Shared);
            }
        }
    }
    warn!("Too many instances keep this folder: usage that is not sent ends with this one");
    (Store::memory(), Slot::FIRST, Hold::Shared)
}
