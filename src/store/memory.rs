//! A store in memory, for instances that have no writable directory or must leave nothing behind.
//!
//! Its records end with the process.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};
use tokio::sync::Mutex as AsyncMutex;

use super::{
    key::RecordKey,
    store_trait::{Error, RecordLock, Store},
};

/// A [`Store`] in memory.
#[derive(Default)]
pub struct MemoryStore {
    records: Mutex<BTreeMap<RecordKey, Bytes>>,
    locks: Mutex<BTreeMap<RecordKey, Arc<AsyncMutex<()>>>>,
}

impl Store for MemoryStore {
    fn load<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Vec<u8>>, Error>> {
        async { Ok(lock_map(&self.records).get(key).map(|bytes| bytes.to_vec())) }.boxed()
    }

    fn save<'a>(&'a self, key: &'a RecordKey, bytes: Bytes) -> BoxFuture<'a, Result<(), Error>> {
        let save = async {
            lock_map(&self.records).insert(key.clone(), bytes);
            Ok(())
        };
        save.boxed()
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<RecordKey>, Error>> {
        async { Ok(lock_map(&self.records).keys().cloned().collect()) }.boxed()
    }

    fn try_lock<'a>(
        &'a self,
        key: &'a RecordKey,
    ) -> BoxFuture<'a, Result<Option<RecordLock>, Error>> {
        let try_lock = async {
            let lock = Arc::clone(lock_map(&self.locks).entry(key.clone()).or_default());
            Ok(lock.try_lock_owned().ok().map(RecordLock::local))
        };
        try_lock.boxed()
    }
}

/// Omits the records.
impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").finish_non_exhaustive()
    }
}

fn lock_map<T>(map: &Mutex<BTreeMap<RecordKey, T>>) -> MutexGuard<'_, BTreeMap<RecordKey, T>> {
    map.lock().expect("nothing panics while it holds this lock")
}
