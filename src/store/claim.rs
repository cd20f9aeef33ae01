//! Whose a record is, where several processes keep one directory.
//!
//! A claim locks a small file beside the record, which itself is replaced by each save. The lock is
//! advisory and the process's: a crash frees it. The file stays, since removing it could part two
//! processes that each hold "the" lock; slots are numbered to keep such files few.

use std::{
    fmt,
    fs::{File, OpenOptions, TryLockError},
    io,
    path::Path,
};

/// Keeps a record for its holder until it is dropped.
#[derive(Debug)]
#[must_use = "a record is nobody's whose claim is dropped"]
pub struct Claim {
    /// Locked as long as it is open. None where no other process can come near.
    _lock: Option<File>,
}

impl Claim {
    /// Of a record that no other process can see.
    pub(super) fn of_memory() -> Self {
        Self { _lock: None }
    }

    /// Of the record that `file` stands for; none where somebody has it.
    pub(super) fn of_file(file: &Path) -> io::Result<Option<Self>> {
        let mut options = OpenOptions::new();
        // Over NFS only what is open for writing can be locked exclusively.
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

/// One of the places for what each process keeps for itself.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Slot(u16);

impl Slot {
    /// That of a process which is alone.
    pub const FIRST: Self = Self(1);

    /// Every slot, to be tried in this order: more than there are processes.
    pub fn all() -> impl Iterator<Item = Self> {
        (Self::FIRST.0..=1000).map(Self)
    }
}

/// As it ends the name of a record, so that the first has the plain name.
impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::FIRST => Ok(()),
            Self(n) => write!(f, "-{n}"),
        }
    }
}
