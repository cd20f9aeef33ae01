//! Locks for records in a directory that several processes share.
//!
//! Locking a record locks a small file beside it, because each save replaces the record itself. The lock
//! is advisory and belongs to the process: a crash releases it. The lock file is never removed, because
//! after a removal two processes could each hold a lock. Slots are numbered so that such files remain
//! few.

use std::{
    fs::{OpenOptions, TryLockError},
    io,
    path::Path,
};

use super::store_trait::RecordLock;

/// Locks the record that has this lock file; `None` if another process has locked it.
pub(super) fn try_lock_file(file: &Path) -> io::Result<Option<RecordLock>> {
    let mut options = OpenOptions::new();
    // Over NFS only a file that is open for writing can be locked exclusively.
    options.write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(file)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(RecordLock::local(file))),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}
