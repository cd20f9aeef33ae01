//! A wall clock that tests can set.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use super::parapet::Setup;

/// The wall clock of child processes, which a test can set while they run. Their monotonic clock stays
/// the machine's.
pub(crate) struct FakeWallClock(TempDir);

impl FakeWallClock {
    /// A clock that shows the real time.
    pub(crate) fn new() -> Self {
        let clock = Self(tempfile::tempdir().unwrap());
        clock.set_offset("+0");
        clock
    }

    /// Makes Parapet read this clock.
    pub(crate) fn apply_to(&self, setup: Setup) -> Setup {
        setup
            .env("LD_PRELOAD", faketime_library())
            .env("FAKETIME_TIMESTAMP_FILE", self.file())
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    }

    /// Sets the offset from the real time, for instance `-47h`.
    pub(crate) fn set_offset(&self, offset: &str) {
        let new = self.0.path().join("new");
        fs::write(&new, offset).unwrap();
        fs::rename(new, self.file()).unwrap();
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("offset")
    }
}

/// Finds the library: Debian keeps it in a directory for each architecture.
fn faketime_library() -> PathBuf {
    let architectures = fs::read_dir("/usr/lib").unwrap().filter_map(Result::ok);
    let mut libraries = architectures.map(|it| it.path().join("faketime/libfaketimeMT.so.1"));
    libraries.find(|it| it.exists()).expect("libfaketime is not installed: tests/run installs it")
}
