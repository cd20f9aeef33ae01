//! The interface of a store, and the test that every implementation passes.
//!
//! Records are not deleted: an owner without data saves an empty record.

use std::{any::Any, fmt, io};

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::key::RecordKey;

/// A store of records that survive restarts.
///
/// Several processes may share a store; a record that must not be shared is [locked](Self::try_lock). An
/// implementation bounds how long an operation takes.
pub trait Store: fmt::Debug + Send + Sync {
    /// The bytes last saved under `key`, if any.
    fn load<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Vec<u8>>, Error>>;

    /// Replaces the record of `key`.
    ///
    /// Once this returns, the bytes survive whatever the store survives, a power loss for instance.
    /// Dropping the future leaves either the old or the new record. Records of one key are saved in
    /// order: a save that fails late may still complete later, but never after one that was started
    /// later.
    fn save<'a>(&'a self, key: &'a RecordKey, bytes: Bytes) -> BoxFuture<'a, Result<(), Error>>;

    /// The keys of all records, readable or not, in ascending order.
    fn list(&self) -> BoxFuture<'_, Result<Vec<RecordKey>, Error>>;

    /// Locks the record of `key` until the lock is dropped or the process ends; `None` if it is already
    /// locked. Loading and saving are possible without the lock.
    fn try_lock<'a>(
        &'a self,
        key: &'a RecordKey,
    ) -> BoxFuture<'a, Result<Option<RecordLock>, Error>>;
}

/// Locks a record until dropped.
#[derive(Debug)]
#[must_use = "dropping the lock releases the record"]
pub struct RecordLock {
    _guard: Box<dyn Any + Send + Sync>,
}

impl RecordLock {
    /// A lock that dropping `guard` releases.
    pub(super) fn new(guard: impl Any + Send + Sync) -> Self {
        Self { _guard: Box::new(guard) }
    }
}

/// Why an operation on a store failed. `record` is where the store has the record, a path for instance.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A record, or the list of records, cannot be read.
    #[error("{record} cannot be read")]
    Read {
        /// Where it is.
        record: String,
        /// The cause.
        source: io::Error,
    },
    /// A record cannot be locked, for instance on a file system without locks.
    #[error("{record} cannot be locked")]
    Lock {
        /// Where its lock is.
        record: String,
        /// The cause.
        source: io::Error,
    },
    /// A record cannot be written; the previous one is unchanged.
    #[error("{record} cannot be written")]
    Write {
        /// Where it is.
        record: String,
        /// The cause.
        source: io::Error,
    },
    /// A record is damaged and no longer used.
    #[error("{record} is damaged and was renamed to {aside}")]
    Damaged {
        /// Where it was.
        record: String,
        /// Where it is now.
        aside: String,
    },
    /// A record comes from a newer version of Parapet and is no longer used.
    #[error("{record} has the newer format version {version} and was renamed to {aside}")]
    UnsupportedVersion {
        /// Where it was.
        record: String,
        /// The version of its format.
        version: u32,
        /// Where it is now.
        aside: String,
    },
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{store::key::SlotId, token::Environment};

    /// Checks an implementation. Each call of `open` opens the same store, which is empty at first.
    pub(in crate::store) async fn check_contract(open: impl Fn() -> Arc<dyn Store>) {
        let store = open();
        assert_eq!(store.list().await.expect("list"), []);
        assert_eq!(store.load(&RecordKey::TokenCache).await.expect("load"), None);
        for bytes in [&b"one"[..], b"", b"two\nlines\xff"] {
            store.save(&RecordKey::TokenCache, Bytes::from_static(bytes)).await.expect("save");
            let loaded = open().load(&RecordKey::TokenCache).await.expect("load");
            assert_eq!(loaded.as_deref(), Some(bytes));
        }

        let environments = ["../été/%", "Dev", "dev", "production"].map(Environment::new);
        let slots = [0, 2].map(|n| SlotId::all().nth(n).expect("slot"));
        let keys: Vec<_> = [
            &environments.each_ref().map(|it| RecordKey::Flags(it.clone()))[..],
            &[RecordKey::TokenCache],
            &environments.map(RecordKey::Credentials),
            &[RecordKey::Registry],
            &slots.map(RecordKey::Usage),
        ]
        .concat();
        for key in keys.iter().rev() {
            store.save(key, format!("{key:?}").into()).await.expect("save");
        }
        assert_eq!(open().list().await.expect("list"), keys);
        for key in &keys {
            let loaded = open().load(key).await.expect("load");
            assert_eq!(loaded, Some(format!("{key:?}").into_bytes()));
        }

        let [first, second] = [&keys[0], &keys[1]];
        let lock = store.try_lock(first).await.expect("lock").expect("not locked");
        assert!(open().try_lock(first).await.expect("lock").is_none());
        assert!(open().try_lock(second).await.expect("lock").is_some());
        open().save(first, Bytes::from_static(b"unlocked")).await.expect("save");
        assert_eq!(store.load(first).await.expect("load").as_deref(), Some(&b"unlocked"[..]));
        drop(lock);
        assert!(open().try_lock(first).await.expect("lock").is_some());
        assert_eq!(open().list().await.expect("list"), keys, "a lock is not a record");
    }
}
