//! A lock in object storage: an object that its owner replaces at intervals.
//!
//! Clocks of different machines are never compared. A process that finds the object unchanged for the
//! duration of a lease, measured by its own clock, may take it over. Every change is conditional on the
//! version that was read, so that of several processes one succeeds. Storage that ignores such
//! conditions is detected, and nothing is locked there.

use std::{
    io,
    sync::{Arc, Mutex},
};

use futures_util::{FutureExt as _, future::BoxFuture};
use object_store::{PutMode, UpdateVersion};
use tokio::time::Instant;
use ulid::Ulid;

use super::{
    object_storage::{Failure, ObjectStorage},
    store_trait::{Error, LEASE_DURATION, Lease},
};

/// The version of another process's lease, and when this process first saw it.
pub(super) type Observation = (UpdateVersion, Instant);

/// A held lock.
#[derive(Debug)]
pub(super) struct ObjectLease {
    storage: Arc<ObjectStorage>,
    name: String,
    owner: Ulid,
    version: Mutex<UpdateVersion>,
}

/// The outcome of an attempt to lock.
pub(super) enum Attempt {
    Locked(ObjectLease),
    /// Another process has the lock, or has just taken it.
    Held(Option<Observation>),
}

/// The contents of a lock that nobody holds begin with this.
const FREE: &str = "free";

/// The contents differ each time, because entity tags may depend on nothing else.
fn held_by(owner: Ulid) -> String {
    format!("held {owner} {}", Ulid::generate())
}

/// Tries to lock the object `name`, given what was seen of it before.
pub(super) async fn try_lock(
    storage: &Arc<ObjectStorage>,
    name: String,
    seen: Option<Observation>,
) -> Result<Attempt, Error> {
    let owner = Ulid::generate();
    let locked = |version, name| {
        let version = Mutex::new(version);
        Attempt::Locked(ObjectLease { storage: Arc::clone(storage), name, owner, version })
    };
    match storage.put(&name, held_by(owner), PutMode::Create).await {
        Ok(version) => {
            check_conditions(storage, &name).await?;
            return Ok(locked(version, name));
        }
        Err(Failure::Conflict) => {}
        Err(failure) => return Err(lock_error(storage, &name, failure)),
    }
    let found = storage.get(&name).await.map_err(|it| lock_error(storage, &name, it))?;
    let Some((contents, version)) = found else { return Ok(Attempt::Held(None)) };
    let now = Instant::now();
    let since = match seen {
        Some((seen, since)) if seen == version => since,
        _ => now,
    };
    let is_expired = now.saturating_duration_since(since) > LEASE_DURATION;
    if !contents.starts_with(FREE.as_bytes()) && !is_expired {
        return Ok(Attempt::Held(Some((version, since))));
    }
    match storage.put(&name, held_by(owner), PutMode::Update(version)).await {
        Ok(version) => Ok(locked(version, name)),
        Err(Failure::Conflict) => Ok(Attempt::Held(None)),
        Err(failure) => Err(lock_error(storage, &name, failure)),
    }
}

/// Fails if the storage creates an object that exists already, although it must not.
async fn check_conditions(storage: &ObjectStorage, name: &str) -> Result<(), Error> {
    match storage.put(name, FREE, PutMode::Create).await {
        Err(Failure::Conflict) => Ok(()),
        Err(failure) => Err(lock_error(storage, name, failure)),
        Ok(_) => {
            let text =
                "the storage ignores conditions (If-None-Match), so that nothing can be locked";
            Err(Error::Lock { record: storage.place(name), source: io::Error::other(text) })
        }
    }
}

fn lock_error(storage: &ObjectStorage, name: &str, failure: Failure) -> Error {
    let record = storage.place(name);
    storage.error(failure, |source| Error::Lock { record, source })
}

impl ObjectLease {
    /// Replaces the object if it still has the version that this process wrote last. If that write's
    /// result is unknown, the contents tell whether the object is still this process's own.
    async fn replace(&self, contents: impl Fn() -> String) -> Result<bool, Error> {
        let failed = |failure| lock_error(&self.storage, &self.name, failure);
        let mut version = self.known_version();
        for _ in 0..2 {
            match self.storage.put(&self.name, contents(), PutMode::Update(version)).await {
                Ok(version) => {
                    *self.version.lock().expect("nothing panics while it holds this lock") =
                        version;
                    return Ok(true);
                }
                Err(Failure::Conflict) => {}
                Err(failure) => return Err(failed(failure)),
            }
            let found = self.storage.get(&self.name).await.map_err(failed)?;
            let own = format!("held {} ", self.owner);
            match found {
                Some((contents, current)) if contents.starts_with(own.as_bytes()) => {
                    version = current;
                }
                Some(_) | None => return Ok(false),
            }
        }
        Ok(false)
    }

    fn known_version(&self) -> UpdateVersion {
        self.version.lock().expect("nothing panics while it holds this lock").clone()
    }
}

impl Lease for ObjectLease {
    fn renew(&self) -> BoxFuture<'_, Result<bool, Error>> {
        self.replace(|| held_by(self.owner)).boxed()
    }

    fn release(&self) -> BoxFuture<'_, Result<(), Error>> {
        let release = self.replace(|| format!("{FREE} {}", Ulid::generate()));
        release.map(|released| released.map(|_| ())).boxed()
    }
}
