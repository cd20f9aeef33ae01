//! The interface of a store.
//!
//! Records are not deleted: an owner without data saves an empty record.

use std::{any::Any, fmt, io, time::Duration};

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
    /// later. Only object storage cannot guarantee that order.
    fn save<'a>(&'a self, key: &'a RecordKey, bytes: Bytes) -> BoxFuture<'a, Result<(), Error>>;

    /// The keys of all records, readable or not, in ascending order.
    fn list(&self) -> BoxFuture<'_, Result<Vec<RecordKey>, Error>>;

    /// Locks the record of `key` until the lock is released; `None` if it is already locked. Loading and
    /// saving are possible without the lock.
    fn try_lock<'a>(
        &'a self,
        key: &'a RecordKey,
    ) -> BoxFuture<'a, Result<Option<RecordLock>, Error>>;

    /// Whether instances on different machines share this store as a rule, so that locks of others are
    /// nothing unusual.
    fn is_remote(&self) -> bool {
        false
    }
}

/// Locks a record until [released](Self::release).
///
/// A lock of a directory ends with the process, too. A lock of a remote store is a lease, which must be
/// [renewed](Self::renew) every [`RENEWAL_INTERVAL`](Self::RENEWAL_INTERVAL) and expires otherwise.
#[derive(Debug)]
#[must_use = "the record stays locked only while the lock exists"]
pub struct RecordLock {
    guard: Guard,
}

#[derive(Debug)]
enum Guard {
    Local { _guard: Box<dyn Any + Send + Sync> },
    Lease(Box<dyn Lease>),
}

/// A lock that expires unless it is renewed.
pub(super) trait Lease: fmt::Debug + Send + Sync {
    /// Extends the lease; false if another process has it.
    fn renew(&self) -> BoxFuture<'_, Result<bool, Error>>;

    /// Ends the lease, if it is still held.
    fn release(&self) -> BoxFuture<'_, Result<(), Error>>;
}

/// How long a lease lasts without renewal. A shorter time would let others take the records of an
/// instance that a network failure separates from the store for a moment; a longer one delays recovery
/// after a crash.
pub(super) const LEASE_DURATION: Duration = Duration::from_mins(3);

impl RecordLock {
    /// The interval at which to [renew](Self::renew) a lock.
    pub const RENEWAL_INTERVAL: Duration = Duration::from_secs(30);

    /// A lock that dropping `guard` releases.
    pub(super) fn local(guard: impl Any + Send + Sync) -> Self {
        Self { guard: Guard::Local { _guard: Box::new(guard) } }
    }

    /// A lock that is a lease.
    pub(super) fn lease(lease: impl Lease + 'static) -> Self {
        Self { guard: Guard::Lease(Box::new(lease)) }
    }

    /// Keeps the record locked; false if another process has locked it since, because the lock was not
    /// renewed in time.
    pub async fn renew(&self) -> Result<bool, Error> {
        match &self.guard {
            Guard::Local { .. } => Ok(true),
            Guard::Lease(lease) => lease.renew().await,
        }
    }

    /// Releases the record. If that fails, a lease still expires.
    pub async fn release(self) -> Result<(), Error> {
        match self.guard {
            Guard::Local { .. } => Ok(()),
            Guard::Lease(lease) => lease.release().await,
        }
    }
}

/// Why an operation on a store failed. `record` is where the store has the record, a path for instance.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store cannot be reached. The store itself logs the beginning and the end of such a time.
    #[error("the store {store} is unavailable")]
    Unavailable {
        /// Where the store is.
        store: String,
        /// The cause.
        source: io::Error,
    },
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

impl Error {
    /// Whether the store is out of reach as a whole, which the store logs.
    pub const fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}
