//! A store in object storage: a bucket of S3, Google Cloud Storage or Azure, which the instances of a
//! deployment share.
//!
//! Each record is an object `<prefix>/<name>.parapet`. A lock is an object `<prefix>/<name>.lock`
//! ([`object_lease`]). A damaged record is copied to `<name>.damaged` before it is
//! deleted; a save by another instance between the two is lost.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};
use object_store::{PutMode, PutPayload};
use tokio::time::Instant;

use super::{
    key::RecordKey,
    object_lease::{self, Attempt, Observation},
    object_storage::{Bucket, BucketError, ObjectStorage},
    outage_log::Access,
    record, save_metrics,
    store_trait::{Error, RecordLock, Store},
};

/// A [`Store`] in object storage.
pub struct BucketStore {
    storage: Arc<ObjectStorage>,
    /// The locks of other processes by name. As many as there are keys.
    observed_locks: Mutex<HashMap<String, Observation>>,
}

const RECORD_SUFFIX: &str = ".parapet";
const LOCK_SUFFIX: &str = ".lock";

impl BucketStore {
    /// Stores records in a bucket. Connects at the first operation.
    ///
    /// Fails if the environment variables of the cloud are inconsistent.
    pub fn new(bucket: &Bucket) -> Result<Self, BucketError> {
        Self::with_settings(bucket, &[])
    }

    /// Like [`new`](Self::new), with settings that replace variables of the environment. Their names are
    /// those of the variables in lower case, for instance `aws_region`.
    pub fn with_settings(
        bucket: &Bucket,
        settings: &[(&str, String)],
    ) -> Result<Self, BucketError> {
        save_metrics::describe();
        let storage = Arc::new(ObjectStorage::new(bucket, settings)?);
        Ok(Self { storage, observed_locks: Mutex::default() })
    }

    async fn load_record(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let object = format!("{name}{RECORD_SUFFIX}");
        let read_error = |failure| {
            let record = self.storage.place(&object);
            self.storage.error(failure, |source| Error::Read { record, source })
        };
        let Some((found, _)) = self.storage.get(&object).await.map_err(read_error)? else {
            return Ok(None);
        };
        let reason = match record::decode(found.into()) {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(reason) => reason,
        };
        let aside = format!("{name}.{}", reason.extension());
        self.storage.rename(&object, &aside).await.map_err(read_error)?;
        Err(reason.into_error(self.storage.place(&object), self.storage.place(&aside)))
    }

    async fn save_record(&self, name: &str, bytes: Bytes) -> Result<(), Error> {
        let object = format!("{name}{RECORD_SUFFIX}");
        let header = Bytes::from(record::header(&bytes));
        let record = PutPayload::from_iter([header, bytes]);
        let saved = self.storage.put(&object, record, PutMode::Overwrite).await;
        saved.map(drop).map_err(|failure| {
            let record = self.storage.place(&object);
            self.storage.error(failure, |source| Error::Write { record, source })
        })
    }

    async fn list_records(&self) -> Result<Vec<RecordKey>, Error> {
        let names = self.storage.list().await.map_err(|failure| {
            let record = self.storage.place("");
            self.storage.error(failure, |source| Error::Read { record, source })
        })?;
        let names = names.iter().filter_map(|name| name.strip_suffix(RECORD_SUFFIX));
        let mut keys: Vec<_> = names.filter_map(RecordKey::from_name).collect();
        keys.sort_unstable();
        Ok(keys)
    }

    async fn lock_record(&self, name: &str) -> Result<Option<RecordLock>, Error> {
        let object = format!("{name}{LOCK_SUFFIX}");
        let seen = self.observed_locks().remove(&object);
        Ok(match object_lease::try_lock(&self.storage, object.clone(), seen).await? {
            Attempt::Locked(lease) => Some(RecordLock::lease(lease)),
            Attempt::Held(observation) => {
                if let Some(observation) = observation {
                    self.observed_locks().insert(object, observation);
                }
                None
            }
        })
    }

    fn observed_locks(&self) -> MutexGuard<'_, HashMap<String, Observation>> {
        self.observed_locks.lock().expect("nothing panics while it holds this lock")
    }
}

impl Store for BucketStore {
    fn load<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Vec<u8>>, Error>> {
        async { self.storage.log(Access::Read, self.load_record(&key.name()).await) }.boxed()
    }

    fn save<'a>(&'a self, key: &'a RecordKey, bytes: Bytes) -> BoxFuture<'a, Result<(), Error>> {
        let save = async move {
            let begun = Instant::now();
            let saved = self.save_record(&key.name(), bytes).await;
            save_metrics::record(key, begun.elapsed(), saved.is_ok());
            self.storage.log(Access::Write, saved)
        };
        save.boxed()
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<RecordKey>, Error>> {
        async { self.storage.log(Access::Read, self.list_records().await) }.boxed()
    }

    fn try_lock<'a>(
        &'a self,
        key: &'a RecordKey,
    ) -> BoxFuture<'a, Result<Option<RecordLock>, Error>> {
        async { self.storage.log(Access::Write, self.lock_record(&key.name()).await) }.boxed()
    }

    fn is_remote(&self) -> bool {
        true
    }
}

impl fmt::Debug for BucketStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BucketStore({:?})", self.storage)
    }
}
