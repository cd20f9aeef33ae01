//! The interface of a store.
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
    ///
    /// A record that is damaged, or has a newer format, is set aside: one call fails and names its new
    /// place, and later calls find no record.
    fn load<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Vec<u8>>, Error>>;

    /// Replaces the record of `key`.
    ///
    /// Once this returns, the bytes are as durable as the store makes them; a directory syncs them to disk.
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
