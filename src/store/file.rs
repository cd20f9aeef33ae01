//! A store in a directory: each record is a file, replaced atomically.
//!
//! A disk that hangs delays callers only for a few seconds and costs one thread per key.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};
use tokio::{
    sync::{Mutex as AsyncMutex, Semaphore},
    task::spawn_blocking,
    time::{Instant, timeout},
};
use ulid::Ulid;

use super::{
    key::RecordKey,
    lock::try_lock_file,
    record, save_metrics,
    store_trait::{Error, RecordLock, Store},
};

/// A [`Store`] in a directory, which several processes may share.
#[derive(Debug)]
pub struct FileStore {
    directory: PathBuf,
    /// One lock per record that is being saved.
    write_locks: Mutex<HashMap<RecordKey, Arc<AsyncMutex<()>>>>,
    /// Limits the number of concurrent reads.
    read_permits: Arc<Semaphore>,
}

/// The directory cannot be created or is not writable.
#[derive(Debug, thiserror::Error)]
#[error("the directory {} is not writable", directory.display())]
pub struct OpenError {
    directory: PathBuf,
    source: io::Error,
}

const RECORD_SUFFIX: &str = ".parapet";
const TEMPORARY_SUFFIX: &str = ".parapet-tmp";
const LOCK_EXTENSION: &str = "lock";

/// Timeouts of a save and of a read, including the wait for a thread.
const SAVE_TIMEOUT: Duration = Duration::from_secs(5);
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Number of threads that may read concurrently.
const MAX_READERS: usize = 8;

/// Age at which a temporary file must be left from a crash: no save takes this long, but another process
/// may be saving right now.
const TEMPORARY_FILE_TTL: Duration = Duration::from_hours(1);

impl FileStore {
    /// Stores records in `directory`, which is created if missing, readable only by its owner.
    ///
    /// Files of interrupted saves are removed once they are an hour old.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, OpenError> {
        let directory = directory.into();
        match prepare_directory(&directory) {
            Ok(()) => {
                save_metrics::describe();
                let read_permits = Arc::new(Semaphore::new(MAX_READERS));
                Ok(Self { directory, write_locks: Mutex::default(), read_permits })
            }
            Err(source) => Err(OpenError { directory, source }),
        }
    }

    /// The file of a record.
    fn path(&self, key: &RecordKey) -> PathBuf {
        self.directory.join(key.name() + RECORD_SUFFIX)
    }

    fn write_lock(&self, key: &RecordKey) -> Arc<AsyncMutex<()>> {
        let mut locks = self.write_locks.lock().expect("nothing panics while it holds this lock");
        Arc::clone(locks.entry(key.clone()).or_default())
    }

    /// Runs file operations that save the record of `key`, on a blocking thread.
    async fn write(
        &self,
        key: &RecordKey,
        work: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let writer = self.write_lock(key);
        let write = async {
            let permit = writer.lock_owned().await;
            let work = move || {
                // Owned by the thread, which may continue after the timeout.
                let _permit = permit;
                work()
            };
            spawn_blocking(work).await.map_err(io::Error::other).flatten()
        };
        timeout(SAVE_TIMEOUT, write).await.unwrap_or_else(|_| Err(timeout_error(SAVE_TIMEOUT)))
    }

    /// Runs file operations that save nothing.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let readers = Arc::clone(&self.read_permits);
        let read = async {
            let permit = readers.acquire_owned().await.map_err(io::Error::other)?;
            let work = move || {
                let _permit = permit;
                work()
            };
            // Fails only while the runtime shuts down.
            spawn_blocking(work).await.map_err(io::Error::other)
        };
        timeout(READ_TIMEOUT, read).await.unwrap_or_else(|_| Err(timeout_error(READ_TIMEOUT)))
    }

    /// Blocks saves of this record until the guard is dropped, like the hanging thread of an earlier
    /// save.
    #[cfg(test)]
    pub(crate) async fn block_saves(&self, key: &RecordKey) -> tokio::sync::OwnedMutexGuard<()> {
        self.write_lock(key).lock_owned().await
    }
}

impl Store for FileStore {
    fn load<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Vec<u8>>, Error>> {
        let file = self.path(key);
        let record = location(&file);
        let loaded = self.read(move || load_record(&file));
        loaded.map(|it| it.unwrap_or_else(|source| Err(Error::Read { record, source }))).boxed()
    }

    fn save<'a>(&'a self, key: &'a RecordKey, bytes: Bytes) -> BoxFuture<'a, Result<(), Error>> {
        let save = async move {
            let file = self.path(key);
            let record = location(&file);
            let begun = Instant::now();
            let saved = self.write(key, move || replace_record(&file, &bytes)).await;
            save_metrics::record(key, begun.elapsed(), saved.is_ok());
            saved.map_err(|source| Error::Write { record, source })
        };
        save.boxed()
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<RecordKey>, Error>> {
        let list = async {
            let directory = self.directory.clone();
            let names = self
                .read(move || file_names(&directory))
                .await
                .flatten()
                .map_err(|source| Error::Read { record: location(&self.directory), source })?;
            let names = names.iter().filter_map(|name| name.strip_suffix(RECORD_SUFFIX));
            let mut keys: Vec<_> = names.filter_map(RecordKey::from_name).collect();
            keys.sort_unstable();
            Ok(keys)
        };
        list.boxed()
    }

    fn try_lock<'a>(
        &'a self,
        key: &'a RecordKey,
    ) -> BoxFuture<'a, Result<Option<RecordLock>, Error>> {
        let file = self.path(key).with_extension(LOCK_EXTENSION);
        let record = location(&file);
        let locked = self.read(move || try_lock_file(&file));
        locked.map(|it| it.flatten().map_err(|source| Error::Lock { record, source })).boxed()
    }
}

/// A path as errors name it.
fn location(path: &Path) -> String {
    path.display().to_string()
}

fn timeout_error(deadline: Duration) -> io::Error {
    let text = format!("the file system did not respond within {deadline:?}");
    io::Error::new(io::ErrorKind::TimedOut, text)
}

/// Creates the directory, checks that it is writable, and removes files left from crashes.
fn prepare_directory(directory: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(directory)?;
    let probe = temporary_path(&directory.join("probe"));
    create_private_file(&probe)?;
    fs::remove_file(&probe)?;
    for name in file_names(directory)?.iter().filter(|name| name.ends_with(TEMPORARY_SUFFIX)) {
        remove_abandoned(&directory.join(name))?;
    }
    Ok(())
}

fn remove_abandoned(file: &Path) -> io::Result<()> {
    let remove = || {
        // A time in the future counts as age zero.
        let age = fs::metadata(file)?.modified()?.elapsed().unwrap_or_default();
        if age < TEMPORARY_FILE_TTL { Ok(()) } else { fs::remove_file(file) }
    };
    match remove() {
        // Its owner, or another process that starts, removed it first.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn file_names(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        // Names that are not UTF-8 are not ours.
        names.extend(entry?.file_name().into_string());
    }
    Ok(names)
}

fn load_record(file: &Path) -> Result<Option<Vec<u8>>, Error> {
    let read_error = |source| Error::Read { record: location(file), source };
    let record = match fs::read(file) {
        Ok(record) => record,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(read_error(error)),
    };
    let reason = match record::decode(record) {
        Ok(bytes) => return Ok(Some(bytes)),
        Err(reason) => reason,
    };
    let aside = file.with_extension(reason.extension());
    fs::rename(file, &aside).map_err(read_error)?;
    Err(reason.into_error(location(file), location(&aside)))
}

/// Replaces `file` with the record of `bytes` atomically, for readers and in a crash.
fn replace_record(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = temporary_path(file);
    let write = || {
        let mut new = create_private_file(&temporary)?;
        new.write_all(record::header(bytes).as_bytes())?;
        new.write_all(bytes)?;
        new.sync_all()?;
        fs::rename(&temporary, file)
    };
    let written = write();
    if written.is_err() {
        // Ignored in favour of the cause; a file left behind is removed at a later start.
        let _ = fs::remove_file(&temporary);
    }
    written?;
    // The rename is durable only once the directory is synced.
    #[cfg(unix)]
    if let Some(directory) = file.parent() {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

fn temporary_path(file: &Path) -> PathBuf {
    file.with_extension(format!("{}{TEMPORARY_SUFFIX}", Ulid::generate()))
}

fn create_private_file(file: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(file)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::store::key::ProcessSlot;

    const USAGE: RecordKey = RecordKey::Usage(ProcessSlot::FIRST);

    fn open(directory: &Path) -> FileStore {
        FileStore::open(directory).expect("store")
    }

    #[tokio::test(start_paused = true)]
    async fn hanging_disk_times_out_and_does_not_overwrite_newer_records() {
        let folder = tempfile::tempdir().expect("folder");
        let store = open(folder.path());
        let hangs = store.block_saves(&RecordKey::TokenCache).await;
        for bytes in ["one", "two"] {
            let begun = Instant::now();
            let error =
                store.save(&RecordKey::TokenCache, bytes.into()).await.expect_err("it hangs");
            let Error::Write { source, .. } = error else { panic!("{error:?}") };
            assert_eq!((source.kind(), begun.elapsed()), (io::ErrorKind::TimedOut, SAVE_TIMEOUT));
        }
        store.save(&USAGE, "another".into()).await.expect("save");
        drop(hangs);
        store.save(&RecordKey::TokenCache, "three".into()).await.expect("save");
        let loaded = store.load(&RecordKey::TokenCache).await.expect("load");
        assert_eq!(loaded.as_deref(), Some(&b"three"[..]));
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn files_are_readable_only_by_their_owner() {
        use std::os::unix::fs::PermissionsExt as _;

        let folder = tempfile::tempdir().expect("folder");
        let inside = folder.path().join("data");
        let store = open(&inside);
        store.save(&USAGE, "x".into()).await.expect("save");
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!(mode(&inside), 0o700);
        assert_eq!(mode(&inside.join("usage.parapet")), 0o600);
    }

    #[tokio::test]
    async fn temporary_file_of_a_crash_is_removed_and_never_loaded() {
        let folder = tempfile::tempdir().expect("folder");
        let store = open(folder.path());
        store.save(&USAGE, "whole".into()).await.expect("save");
        let half = temporary_path(&folder.path().join("usage.parapet"));
        fs::write(&half, b"parapet 1 5").expect("write");
        let store_of_another = FileStore::open(folder.path());
        assert!(store_of_another.is_ok() && half.exists(), "it may be about to become a record");
        let long_ago = SystemTime::now() - TEMPORARY_FILE_TTL;
        File::open(&half).and_then(|half| half.set_modified(long_ago)).expect("set the time");
        let store = open(folder.path());
        assert!(!half.exists());
        assert_eq!(store.load(&USAGE).await.expect("load").as_deref(), Some(&b"whole"[..]));
    }

    #[tokio::test]
    async fn damaged_and_newer_records_are_renamed() {
        let folder = tempfile::tempdir().expect("folder");
        let store = open(folder.path());
        let file = folder.path().join("usage.parapet");
        fs::write(&file, b"something else").expect("write");
        let error = store.load(&USAGE).await.expect_err("damaged");
        assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
        assert!(folder.path().join("usage.damaged").exists());
        assert_eq!(store.load(&USAGE).await.expect("load"), None);

        fs::write(&file, b"parapet 2 anything\nmore").expect("write");
        let error = store.load(&USAGE).await.expect_err("newer");
        assert!(matches!(error, Error::UnsupportedVersion { version: 2, .. }), "{error:?}");
        assert!(folder.path().join("usage.newer").exists());
    }

    #[test]
    fn error_names_the_directory_that_is_not_writable() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let error = FileStore::open(file.path().join("data")).expect_err("a file is in the way");
        assert!(error.to_string().contains(&*file.path().to_string_lossy()), "{error}");
    }
}
