//! Persists state across restarts: bytes by key, saved atomically.
//!
//! A record that is damaged, or written by a newer version, is renamed and reported; its owner continues
//! without it. The owners define the contents and must not store plaintext tokens.

pub mod edge_backup;
mod lock;
mod record;

use std::{
    collections::HashMap,
    fmt,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use metrics::{Unit, counter, describe_counter, describe_histogram, histogram};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use tokio::{
    sync::{Mutex as AsyncMutex, Semaphore},
    task::spawn_blocking,
    time::{Instant, timeout},
};
use ulid::Ulid;

pub use self::lock::{RecordLock, SlotId};
use crate::token::Environment;

/// A store of records that survive restarts.
///
/// A cheap handle. Records of one key are saved in order. A disk that hangs delays callers only for a
/// few seconds and costs one thread per key. Several processes may share a directory; a record that must
/// not be shared is [locked](Self::try_lock).
#[derive(Clone)]
pub struct Store(Arc<Backend>);

enum Backend {
    Directory(Directory),
    Memory(Mutex<HashMap<RecordKey, Bytes>>),
}

struct Directory {
    path: PathBuf,
    /// One lock per record that is being saved.
    write_locks: Mutex<HashMap<RecordKey, Arc<AsyncMutex<()>>>>,
    /// Limits the number of concurrent reads.
    read_permits: Arc<Semaphore>,
}

/// The key of a record.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum RecordKey {
    /// The flags of an environment.
    Flags(Environment),
    /// Validated tokens, by their digests.
    TokenCache,
    /// The encrypted token that the edge itself uses for an environment.
    Credentials(Environment),
    /// The tokens of a registry in a remote database, by their digests.
    Registry,
    /// Unsent usage; each process that shares the store has its own slot.
    Usage(SlotId),
}

/// Why an operation on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be created or is not writable.
    #[error("the directory {} is not writable", directory.display())]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A record cannot be read.
    #[error("{} cannot be read", file.display())]
    Read {
        /// Its file.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A record cannot be locked, for instance on a file system without locks.
    #[error("{} cannot be locked", file.display())]
    Lock {
        /// The lock file of the record.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A record cannot be written; the previous one is unchanged.
    #[error("{} cannot be written", file.display())]
    Write {
        /// Its file.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A record is damaged and no longer used.
    #[error("{} is damaged and was renamed to {}", file.display(), aside.display())]
    Damaged {
        /// Its file.
        file: PathBuf,
        /// Its new name.
        aside: PathBuf,
    },
    /// A record comes from a newer version of Parapet and is no longer used.
    #[error("{} has the newer format version {version} and was renamed to {}", file.display(), aside.display())]
    UnsupportedVersion {
        /// Its file.
        file: PathBuf,
        /// The version of its format.
        version: u32,
        /// Its new name.
        aside: PathBuf,
    },
}

impl Store {
    /// Stores records as files in `directory`, which is created if missing, readable only by its owner.
    ///
    /// Files of interrupted saves are removed once they are an hour old.
    pub fn directory(directory: impl Into<PathBuf>) -> Result<Self, Error> {
        let directory = directory.into();
        match prepare_directory(&directory) {
            Ok(()) => {
                describe();
                let read_permits = Arc::new(Semaphore::new(MAX_READERS));
                let directory =
                    Directory { path: directory, write_locks: Mutex::default(), read_permits };
                Ok(Self(Arc::new(Backend::Directory(directory))))
            }
            Err(source) => Err(Error::Directory { directory, source }),
        }
    }

    /// Stores records in memory until the process ends.
    pub fn memory() -> Self {
        Self(Arc::new(Backend::Memory(Mutex::default())))
    }

    /// The bytes last saved under `key`, if any.
    pub async fn load(&self, key: &RecordKey) -> Result<Option<Vec<u8>>, Error> {
        match &*self.0 {
            Backend::Memory(records) => Ok(lock_map(records).get(key).map(|bytes| bytes.to_vec())),
            Backend::Directory(directory) => {
                let file = directory.path.join(key.file_name());
                let path = file.clone();
                let loaded = directory.read(move || load_record(&path)).await;
                loaded.unwrap_or_else(|source| Err(Error::Read { file, source }))
            }
        }
    }

    /// Whether there is a record of `key`, readable or not; true if that cannot be determined.
    pub async fn contains(&self, key: &RecordKey) -> bool {
        match &*self.0 {
            Backend::Memory(records) => lock_map(records).contains_key(key),
            Backend::Directory(directory) => {
                let file = directory.path.join(key.file_name());
                let found = directory.read(move || file.try_exists()).await.flatten();
                found.unwrap_or(true)
            }
        }
    }

    /// Replaces the record of `key`.
    ///
    /// Once this returns, the bytes survive a power loss. Dropping the future leaves either the old or
    /// the new record. Fails after five seconds; a write that hangs on the disk may still complete
    /// later, but never after one that was started later.
    pub async fn save(&self, key: &RecordKey, bytes: impl Into<Bytes>) -> Result<(), Error> {
        let bytes = bytes.into();
        match &*self.0 {
            Backend::Memory(records) => {
                lock_map(records).insert(key.clone(), bytes);
                Ok(())
            }
            Backend::Directory(directory) => {
                let file = directory.path.join(key.file_name());
                let path = file.clone();
                let begun = Instant::now();
                let saved = directory.write(key, move || replace_record(&path, &bytes)).await;
                let record = key.metric_label();
                histogram!(SAVE_SECONDS, "record" => record).record(begun.elapsed());
                counter!(SAVE_FAILURES, "record" => record).increment(saved.is_err().into());
                saved.map_err(|source| Error::Write { file, source })
            }
        }
    }

    /// Blocks saves of this record until the guard is dropped, like the hanging thread of an earlier
    /// save.
    #[cfg(test)]
    pub(crate) async fn block_saves(&self, key: &RecordKey) -> tokio::sync::OwnedMutexGuard<()> {
        let Backend::Directory(directory) = &*self.0 else { panic!("{self:?}") };
        let writer = Arc::clone(lock_map(&directory.write_locks).entry(key.clone()).or_default());
        writer.lock_owned().await
    }

    /// Locks the record of `key` until the lock is dropped or the process ends; `None` if it is already
    /// locked. Loading and saving are possible without the lock.
    pub async fn try_lock(&self, key: &RecordKey) -> Result<Option<RecordLock>, Error> {
        let Backend::Directory(directory) = &*self.0 else {
            return Ok(Some(RecordLock::in_memory()));
        };
        let file = directory.path.join(key.file_name()).with_extension(LOCK_EXTENSION);
        let path = file.clone();
        let locked = directory.read(move || RecordLock::try_acquire(&path)).await;
        locked.flatten().map_err(|source| Error::Lock { file, source })
    }

    /// The slots that have a record of usage.
    pub async fn usage_slots(&self) -> Result<Vec<SlotId>, Error> {
        let mut slots: Vec<_> = match &*self.0 {
            Backend::Memory(records) => {
                let slot = |key: &RecordKey| {
                    if let RecordKey::Usage(slot) = key { Some(*slot) } else { None }
                };
                lock_map(records).keys().filter_map(slot).collect()
            }
            Backend::Directory(directory) => {
                let names = directory.names().await?;
                let all = SlotId::all();
                all.filter(|slot| names.contains(&RecordKey::Usage(*slot).file_name())).collect()
            }
        };
        slots.sort_unstable();
        Ok(slots)
    }

    /// The environments with stored flags, ordered by name.
    pub async fn environments(&self) -> Result<Vec<Environment>, Error> {
        let mut environments: Vec<_> = match &*self.0 {
            Backend::Memory(records) => {
                let flags = |key: &RecordKey| match key {
                    RecordKey::Flags(environment) => Some(environment.clone()),
                    _ => None,
                };
                lock_map(records).keys().filter_map(flags).collect()
            }
            Backend::Directory(directory) => {
                let names = directory.names().await?;
                names.iter().filter_map(|name| parse_flags_file_name(name)).collect()
            }
        };
        environments.sort_unstable();
        Ok(environments)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            Backend::Directory(directory) => write!(f, "Store({})", directory.path.display()),
            Backend::Memory(_) => f.write_str("Store(memory)"),
        }
    }
}

const FLAGS_PREFIX: &str = "flags-";
const RECORD_SUFFIX: &str = ".parapet";
const TEMPORARY_SUFFIX: &str = ".parapet-tmp";
const LOCK_EXTENSION: &str = "lock";

/// Timeouts of a save and of a read, including the wait for a thread.
const SAVE_TIMEOUT: Duration = Duration::from_secs(5);
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Number of threads that may read concurrently.
const MAX_READERS: usize = 8;

const SAVE_SECONDS: &str = "parapet_store_save_seconds";
const SAVE_FAILURES: &str = "parapet_store_save_failures_total";

/// Registers the descriptions of the metrics.
fn describe() {
    describe_histogram!(SAVE_SECONDS, Unit::Seconds, "Duration of saves, by kind of record");
    describe_counter!(SAVE_FAILURES, "Saves that failed or took too long, by kind of record");
}

/// Age at which a temporary file must be left from a crash: no save takes this long, but another process
/// may be saving right now.
const TEMPORARY_FILE_TTL: Duration = Duration::from_hours(1);

/// Upper case is encoded too, because some file systems do not distinguish it from lower case.
const FILE_NAME_ESCAPES: &AsciiSet = &{
    let mut set = NON_ALPHANUMERIC.remove(b'-').remove(b'_');
    let mut letter = b'A';
    while letter <= b'Z' {
        set = set.add(letter);
        letter += 1;
    }
    set
};

impl Directory {
    /// Runs file operations that save the record of `key`, on a blocking thread.
    async fn write(
        &self,
        key: &RecordKey,
        work: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let writer = Arc::clone(lock_map(&self.write_locks).entry(key.clone()).or_default());
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

    async fn names(&self) -> Result<Vec<String>, Error> {
        let path = self.path.clone();
        let names = self.read(move || file_names(&path)).await.flatten();
        names.map_err(|source| Error::Read { file: self.path.clone(), source })
    }
}

fn timeout_error(deadline: Duration) -> io::Error {
    let text = format!("the file system did not respond within {deadline:?}");
    io::Error::new(io::ErrorKind::TimedOut, text)
}

impl RecordKey {
    /// Its label value in metrics.
    fn metric_label(&self) -> &'static str {
        match self {
            Self::Flags(_) => "flags",
            Self::TokenCache => "verdicts",
            Self::Credentials(_) => "credentials",
            Self::Registry => "registry",
            Self::Usage(_) => "usage",
        }
    }

    fn file_name(&self) -> String {
        let encoded =
            |name: &Environment| utf8_percent_encode(name.as_str(), FILE_NAME_ESCAPES).to_string();
        match self {
            Self::Flags(environment) => {
                format!("{FLAGS_PREFIX}{}{RECORD_SUFFIX}", encoded(environment))
            }
            Self::TokenCache => format!("verdicts{RECORD_SUFFIX}"),
            Self::Credentials(environment) => {
                format!("credentials-{}{RECORD_SUFFIX}", encoded(environment))
            }
            Self::Registry => format!("registry{RECORD_SUFFIX}"),
            Self::Usage(slot) => format!("usage{slot}{RECORD_SUFFIX}"),
        }
    }
}

fn parse_flags_file_name(file_name: &str) -> Option<Environment> {
    let encoded = file_name.strip_prefix(FLAGS_PREFIX)?.strip_suffix(RECORD_SUFFIX)?;
    let name = percent_decode_str(encoded).decode_utf8().ok()?;
    Some(Environment::new(&name))
}

fn lock_map<T>(records: &Mutex<HashMap<RecordKey, T>>) -> MutexGuard<'_, HashMap<RecordKey, T>> {
    records.lock().expect("nothing panics while it holds this lock")
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
    let record = match fs::read(file) {
        Ok(record) => record,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Read { file: file.to_owned(), source }),
    };
    let (extension, version) = match record::decode(record) {
        Ok(bytes) => return Ok(Some(bytes)),
        Err(record::DecodeError::Damaged) => ("damaged", None),
        Err(record::DecodeError::UnsupportedVersion(version)) => ("newer", Some(version)),
    };
    let aside = file.with_extension(extension);
    let file = file.to_owned();
    match (fs::rename(&file, &aside), version) {
        (Err(source), _) => Err(Error::Read { file, source }),
        (Ok(()), Some(version)) => Err(Error::UnsupportedVersion { file, version, aside }),
        (Ok(()), None) => Err(Error::Damaged { file, aside }),
    }
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

    fn flags(name: &str) -> RecordKey {
        RecordKey::Flags(Environment::new(name))
    }

    async fn check(store: &Store) {
        assert_eq!(store.load(&RecordKey::TokenCache).await.expect("load"), None);
        for bytes in [&b"one"[..], b"", b"two\nlines\xff"] {
            store.save(&RecordKey::TokenCache, bytes).await.expect("save");
            assert_eq!(
                store.load(&RecordKey::TokenCache).await.expect("load").as_deref(),
                Some(bytes)
            );
        }
        for name in ["production", "Dev", "dev", "../été/%"] {
            store.save(&flags(name), name).await.expect("save");
        }
        let environments = store.environments().await.expect("list");
        let environments: Vec<_> = environments.iter().map(Environment::as_str).collect();
        assert_eq!(environments, ["../été/%", "Dev", "dev", "production"]);
        assert_eq!(store.load(&flags("Dev")).await.expect("load").as_deref(), Some(&b"Dev"[..]));
    }

    #[tokio::test]
    async fn memory_store_loads_what_was_saved() {
        check(&Store::memory()).await;
    }

    #[tokio::test]
    async fn directory_store_loads_what_was_saved() {
        let folder = tempfile::tempdir().expect("folder");
        let inside = folder.path().join("a/b");
        check(&Store::directory(&inside).expect("store")).await;
        let reopened = Store::directory(&inside).expect("store");
        assert!(reopened.load(&RecordKey::TokenCache).await.expect("load").is_some());
        assert_eq!(file_names(folder.path()).expect("names"), ["a"]);
        let left = file_names(&inside).expect("names");
        assert!(left.iter().all(|name| name.ends_with(RECORD_SUFFIX)), "{left:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn hanging_disk_times_out_and_does_not_overwrite_newer_records() {
        let folder = tempfile::tempdir().expect("folder");
        let store = Store::directory(folder.path()).expect("store");
        let hangs = store.block_saves(&RecordKey::TokenCache).await;
        for bytes in ["one", "two"] {
            let begun = Instant::now();
            let error = store.save(&RecordKey::TokenCache, bytes).await.expect_err("it hangs");
            let Error::Write { source, .. } = error else { panic!("{error:?}") };
            assert_eq!((source.kind(), begun.elapsed()), (io::ErrorKind::TimedOut, SAVE_TIMEOUT));
        }
        store.save(&RecordKey::Usage(SlotId::FIRST), "another").await.expect("save");
        drop(hangs);
        store.save(&RecordKey::TokenCache, "three").await.expect("save");
        let loaded = store.load(&RecordKey::TokenCache).await.expect("load");
        assert_eq!(loaded.as_deref(), Some(&b"three"[..]));
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn files_are_readable_only_by_their_owner() {
        use std::os::unix::fs::PermissionsExt as _;

        let folder = tempfile::tempdir().expect("folder");
        let inside = folder.path().join("data");
        let store = Store::directory(&inside).expect("store");
        store.save(&RecordKey::Usage(SlotId::FIRST), "x").await.expect("save");
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!(mode(&inside), 0o700);
        assert_eq!(mode(&inside.join("usage.parapet")), 0o600);
    }

    #[tokio::test]
    async fn temporary_file_of_a_crash_is_removed_and_never_loaded() {
        let folder = tempfile::tempdir().expect("folder");
        let store = Store::directory(folder.path()).expect("store");
        store.save(&RecordKey::Usage(SlotId::FIRST), "whole").await.expect("save");
        let half = temporary_path(&folder.path().join(RecordKey::Usage(SlotId::FIRST).file_name()));
        fs::write(&half, b"parapet 1 5").expect("write");
        let store_of_another = Store::directory(folder.path());
        assert!(store_of_another.is_ok() && half.exists(), "it may be about to become a record");
        let long_ago = SystemTime::now() - TEMPORARY_FILE_TTL;
        File::open(&half).and_then(|half| half.set_modified(long_ago)).expect("set the time");
        let store = Store::directory(folder.path()).expect("store");
        assert!(!half.exists());
        assert_eq!(
            store.load(&RecordKey::Usage(SlotId::FIRST)).await.expect("load").as_deref(),
            Some(&b"whole"[..])
        );
    }

    #[tokio::test]
    async fn damaged_and_newer_records_are_renamed() {
        let folder = tempfile::tempdir().expect("folder");
        let store = Store::directory(folder.path()).expect("store");
        let file = folder.path().join(RecordKey::Usage(SlotId::FIRST).file_name());
        fs::write(&file, b"something else").expect("write");
        let error = store.load(&RecordKey::Usage(SlotId::FIRST)).await.expect_err("damaged");
        assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
        assert!(folder.path().join("usage.damaged").exists());
        assert_eq!(store.load(&RecordKey::Usage(SlotId::FIRST)).await.expect("load"), None);

        fs::write(&file, b"parapet 2 anything\nmore").expect("write");
        let error = store.load(&RecordKey::Usage(SlotId::FIRST)).await.expect_err("newer");
        assert!(matches!(error, Error::UnsupportedVersion { version: 2, .. }), "{error:?}");
        assert!(folder.path().join("usage.newer").exists());
    }

    #[tokio::test]
    async fn lock_excludes_others_until_dropped() {
        let folder = tempfile::tempdir().expect("folder");
        let (one, other) = (Store::directory(folder.path()), Store::directory(folder.path()));
        let (one, other) = (one.expect("store"), other.expect("store"));
        let [first, second] = [0, 1].map(|n| RecordKey::Usage(SlotId::all().nth(n).expect("slot")));
        let lock = one.try_lock(&first).await.expect("lock").expect("not locked");
        assert!(other.try_lock(&first).await.expect("lock").is_none());
        assert!(other.try_lock(&second).await.expect("lock").is_some());
        drop(lock);
        assert!(other.try_lock(&first).await.expect("lock").is_some());
    }

    #[tokio::test]
    async fn usage_slots_lists_slots_with_a_record() {
        let folder = tempfile::tempdir().expect("folder");
        for store in [Store::memory(), Store::directory(folder.path()).expect("store")] {
            assert_eq!(store.usage_slots().await.expect("slots"), []);
            let slots: Vec<_> = [0, 2].map(|n| SlotId::all().nth(n).expect("slot")).into();
            for slot in slots.iter().rev() {
                store.save(&RecordKey::Usage(*slot), "x").await.expect("save");
            }
            store.save(&RecordKey::TokenCache, "x").await.expect("save");
            assert!(
                store.try_lock(&RecordKey::Usage(SlotId::FIRST)).await.expect("lock").is_some()
            );
            assert_eq!(store.usage_slots().await.expect("slots"), slots);
        }
        let files = ["usage.lock", "usage.parapet", "usage-3.parapet"];
        assert!(files.iter().all(|name| folder.path().join(name).exists()));
    }

    #[test]
    fn error_names_the_directory_that_is_not_writable() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let error = Store::directory(file.path().join("data")).expect_err("a file is in the way");
        assert!(error.to_string().contains(&*file.path().to_string_lossy()), "{error}");
    }
}
