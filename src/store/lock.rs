//! Locks for records in a directory that several processes share.
//!
//! Locking a record locks a small file beside it, because each save replaces the record itself. The lock
//! is advisory and belongs to the process: a crash releases it. The lock file is never removed, because
//! after a removal two processes could each hold a lock. Slots are numbered so that such files remain
//! few.

use std::{
    fmt,
    fs::{File, OpenOptions, TryLockError},
    io,
    path::Path,
};

/// Locks a record until dropped.
#[derive(Debug)]
#[must_use = "dropping the lock releases the record"]
pub struct RecordLock {
    /// Locked while open. `None` if no other process has access to the record.
    _lock: Option<File>,
}

impl RecordLock {
    /// Locks a record that no other process can access.
    pub(super) fn in_memory() -> Self {
        Self { _lock: None }
    }

    /// Locks the record that has this lock file; `None` if another process has locked it.
    pub(super) fn try_acquire(file: &Path) -> io::Result<Option<Self>> {
        let mut options = OpenOptions::new();
        // Over NFS only a file that is open for writing can be locked exclusively.
        options.write(true).create(true).truncate(false);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(file)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { _lock: Some(file) })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

/// The number of a record that belongs to one of several processes.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SlotId(u16);

impl SlotId {
    /// The slot of a process that does not share the store.
    pub const FIRST: Self = Self(1);

    /// All slots, in the order in which to try them: more than there are processes.
    pub fn all() -> impl Iterator<Item = Self> {
        (Self::FIRST.0..=1000).map(Self)
    }
}

/// Formats the suffix of a record's name; empty for the first slot.
impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::FIRST => Ok(()),
            Self(n) => write!(f, "-{n}"),
        }
    }
}
