//! What outlives a restart: bytes by key, saved whole or not at all.
//!
//! A record that was damaged on disk, or written by a newer version, is set aside and reported;
//! whoever wanted it goes on without. What the bytes mean is their owner's matter, and so is keeping
//! plaintext tokens out of them.

mod claim;
pub mod edge_backup;
mod envelope;

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

pub use self::claim::{Claim, Slot};
use crate::token::Environment;

/// A place for what must outlive a restart.
///
/// A cheap handle. Records of one key are saved one after the other. A disk that hangs keeps nobody
/// waiting for longer than some seconds, and costs one thread for each key. Several processes may keep a
/// directory; what must not be shared among them is [claimed](Self::claim).
#[derive(Clone)]
pub struct Store(Arc<Backend>);

enum Backend {
    Directory(Directory),
    Memory(Mutex<HashMap<Key, Bytes>>),
}

struct Directory {
    path: PathBuf,
    /// Whose record is being saved.
    writers: Mutex<HashMap<Key, Arc<AsyncMutex<()>>>>,
    /// Who reads at a time.
    readers: Arc<Semaphore>,
}

/// What is kept.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Key {
    /// The flags of an environment.
    Flags(Environment),
    /// The verdicts on tokens, by their digests.
    Verdicts,
    /// The sealed token with which the edge itself speaks for an environment.
    Credentials(Environment),
    /// The tokens of a registry that is kept elsewhere, by their digests.
    Registry,
    /// Usage that is not sent yet; each process that keeps the store has a slot of its own.
    Usage(Slot),
}

/// Why the store did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be made or written to.
    #[error("the directory {} cannot be written to", directory.display())]
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
    /// Whose a record is cannot be told, as on a file system without locks.
    #[error("{} cannot be locked", file.display())]
    Lock {
        /// The file that is locked in the record's stead.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A record cannot be written; the previous one is untouched.
    #[error("{} cannot be written", file.display())]
    Write {
        /// Its file.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A record is not as it was written; it is no longer used.
    #[error("{} is damaged and was set aside as {}", file.display(), aside.display())]
    Damaged {
        /// Its file.
        file: PathBuf,
        /// Where it is now.
        aside: PathBuf,
    },
    /// A record comes from a later version of Parapet; it is no longer used.
    #[error("{} has the later format {version} and was set aside as {}", file.display(), aside.display())]
    Newer {
        /// Its file.
        file: PathBuf,
        /// The version of its format.
        version: u32,
        /// Where it is now.
        aside: PathBuf,
    },
}

impl Store {
    /// Keeps records as files of `directory`, which is made if it is missing, for its owner only.
    ///
    /// Files that an interrupted save has left are removed once they are old.
    pub fn directory(directory: impl Into<PathBuf>) -> Result<Self, Error> {
        let directory = directory.into();
        match prepare(&directory) {
            Ok(()) => {
                describe();
                let readers = Arc::new(Semaphore::new(READERS));
                let directory = Directory { path: directory, writers: Mutex::default(), readers };
                Ok(Self(Arc::new(Backend::Directory(directory))))
            }
            Err(source) => Err(Error::Directory { directory, source }),
        }
    }

    /// Keeps records until the process ends.
    pub fn memory() -> Self {
        Self(Arc::new(Backend::Memory(Mutex::default())))
    }

    /// The bytes last saved under `key`, if any.
    pub async fn load(&self, key: &Key) -> Result<Option<Vec<u8>>, Error> {
        match &*self.0 {
            Backend::Memory(records) => Ok(lock(records).get(key).map(|bytes| bytes.to_vec())),
            Backend::Directory(directory) => {
                let file = directory.path.join(key.file_name());
                let path = file.clone();
                let loaded = directory.read(move || load(&path)).await;
                loaded.unwrap_or_else(|source| Err(Error::Read { file, source }))
            }
        }
    }

    /// Whether there is a record of `key`, readable or not; also where that cannot be told.
    pub async fn has(&self, key: &Key) -> bool {
        match &*self.0 {
            Backend::Memory(records) => lock(records).contains_key(key),
            Backend::Directory(directory) => {
                let file = directory.path.join(key.file_name());
                let found = directory.read(move || file.try_exists()).await.flatten();
                found.unwrap_or(true)
            }
        }
    }

    /// Replaces what is kept under `key`.
    ///
    /// When this returns, a loss of power no longer takes the bytes away. Dropping the future leaves
    /// either the old record or the new one. Fails after some seconds; what a disk that hangs has begun to
    /// write may become the record later, but never after one that is saved later.
    pub async fn save(&self, key: &Key, bytes: impl Into<Bytes>) -> Result<(), Error> {
        let bytes = bytes.into();
        match &*self.0 {
            Backend::Memory(records) => {
                lock(records).insert(key.clone(), bytes);
                Ok(())
            }
            Backend::Directory(directory) => {
                let file = directory.path.join(key.file_name());
                let path = file.clone();
                let begun = Instant::now();
                let saved = directory.write(key, move || replace(&path, &bytes)).await;
                let record = key.kind();
                histogram!(SECONDS, "record" => record).record(begun.elapsed());
                counter!(FAILURES, "record" => record).increment(saved.is_err().into());
                saved.map_err(|source| Error::Write { file, source })
            }
        }
    }

    /// Has every save of this record hang until the guard is dropped, as if a thread of an earlier one did.
    #[cfg(test)]
    pub(crate) async fn stall(&self, key: &Key) -> tokio::sync::OwnedMutexGuard<()> {
        let Backend::Directory(directory) = &*self.0 else { panic!("{self:?}") };
        let writer = Arc::clone(lock(&directory.writers).entry(key.clone()).or_default());
        writer.lock_owned().await
    }

    /// Makes the record of `key` this claim's alone until it is dropped or the process ends; none
    /// where another claim has it. Nobody is kept from loading and saving without a claim.
    pub async fn claim(&self, key: &Key) -> Result<Option<Claim>, Error> {
        let Backend::Directory(directory) = &*self.0 else { return Ok(Some(Claim::of_memory())) };
        let file = directory.path.join(key.file_name()).with_extension(LOCK);
        let path = file.clone();
        let claimed = directory.read(move || Claim::of_file(&path)).await;
        claimed.flatten().map_err(|source| Error::Lock { file, source })
    }

    /// The slots in which usage is kept, or was.
    pub async fn slots(&self) -> Result<Vec<Slot>, Error> {
        let mut slots: Vec<_> = match &*self.0 {
            Backend::Memory(records) => {
                let slot = |key: &Key| if let Key::Usage(slot) = key { Some(*slot) } else { None };
                lock(records).keys().filter_map(slot).collect()
            }
            Backend::Directory(directory) => {
                let names = directory.names().await?;
                let all = Slot::all();
                all.filter(|slot| names.contains(&Key::Usage(*slot).file_name())).collect()
            }
        };
        slots.sort_unstable();
        Ok(slots)
    }

    /// The environments of which flags are kept, in the order of their names.
    pub async fn environments(&self) -> Result<Vec<Environment>, Error> {
        let mut environments: Vec<_> = match &*self.0 {
            Backend::Memory(records) => {
                let flags = |key: &Key| match key {
                    Key::Flags(environment) => Some(environment.clone()),
                    _ => None,
                };
                lock(records).keys().filter_map(flags).collect()
            }
            Backend::Directory(directory) => {
                let names = directory.names().await?;
                names.iter().filter_map(|name| environment_of(name)).collect()
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

const FLAGS: &str = "flags-";
const SUFFIX: &str = ".parapet";
const TEMPORARY: &str = ".parapet-tmp";
const LOCK: &str = "lock";

/// How long a save may take, and a look at the directory.
const SAVE_DEADLINE: Duration = Duration::from_secs(5);
const READ_DEADLINE: Duration = Duration::from_secs(10);

/// How many threads may be reading.
const READERS: usize = 8;

const SECONDS: &str = "parapet_store_save_seconds";
const FAILURES: &str = "parapet_store_save_failures_total";

/// Tells the metric registry what the metrics of this module mean.
fn describe() {
    describe_histogram!(SECONDS, Unit::Seconds, "Duration of saves by kind of record");
    describe_counter!(FAILURES, "Saves that failed or took too long, by kind of record");
}

/// How old a file becomes that only a crash can have left: a save takes no such time, but another
/// process may be about one right now.
const ABANDONED_AFTER: Duration = Duration::from_hours(1);

/// Upper case is encoded too: some file systems do not tell it from lower case.
const PLAIN: &AsciiSet = &{
    let mut set = NON_ALPHANUMERIC.remove(b'-').remove(b'_');
    let mut letter = b'A';
    while letter <= b'Z' {
        set = set.add(letter);
        letter += 1;
    }
    set
};

impl Directory {
    /// Runs file operations that save the record of `key`, on a thread for such work.
    async fn write(
        &self,
        key: &Key,
        work: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let writer = Arc::clone(lock(&self.writers).entry(key.clone()).or_default());
        let write = async {
            let turn = writer.lock_owned().await;
            let work = move || {
                // The thread's: it may go on when nobody waits for it any more.
                let _turn = turn;
                work()
            };
            spawn_blocking(work).await.map_err(io::Error::other).flatten()
        };
        timeout(SAVE_DEADLINE, write).await.unwrap_or_else(|_| Err(no_answer(SAVE_DEADLINE)))
    }

    /// Runs file operations that save nothing.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let readers = Arc::clone(&self.readers);
        let read = async {
            let turn = readers.acquire_owned().await.map_err(io::Error::other)?;
            let work = move || {
                let _turn = turn;
                work()
            };
            // Fails only when the runtime is going away.
            spawn_blocking(work).await.map_err(io::Error::other)
        };
        timeout(READ_DEADLINE, read).await.unwrap_or_else(|_| Err(no_answer(READ_DEADLINE)))
    }

    async fn names(&self) -> Result<Vec<String>, Error> {
        let path = self.path.clone();
        let names = self.read(move || names(&path)).await.flatten();
        names.map_err(|source| Error::Read { file: self.path.clone(), source })
    }
}

fn no_answer(deadline: Duration) -> io::Error {
    let text = format!("the file system does not answer within {deadline:?}");
    io::Error::new(io::ErrorKind::TimedOut, text)
}

impl Key {
    /// Its name in metrics.
    fn kind(&self) -> &'static str {
        match self {
            Self::Flags(_) => "flags",
            Self::Verdicts => "verdicts",
            Self::Credentials(_) => "credentials",
            Self::Registry => "registry",
            Self::Usage(_) => "usage",
        }
    }

    fn file_name(&self) -> String {
        let encoded = |name: &Environment| utf8_percent_encode(name.as_str(), PLAIN).to_string();
        match self {
            Self::Flags(environment) => format!("{FLAGS}{}{SUFFIX}", encoded(environment)),
            Self::Verdicts => format!("verdicts{SUFFIX}"),
            Self::Credentials(environment) => {
                format!("credentials-{}{SUFFIX}", encoded(environment))
            }
            Self::Registry => format!("registry{SUFFIX}"),
            Self::Usage(slot) => format!("usage{slot}{SUFFIX}"),
        }
    }
}

fn environment_of(file_name: &str) -> Option<Environment> {
    let encoded = file_name.strip_prefix(FLAGS)?.strip_suffix(SUFFIX)?;
    let name = percent_decode_str(encoded).decode_utf8().ok()?;
    Some(Environment::new(&name))
}

fn lock<T>(records: &Mutex<HashMap<Key, T>>) -> MutexGuard<'_, HashMap<Key, T>> {
    records.lock().expect("nothing panics while it holds this lock")
}

/// Makes the directory, shows that it can be written to and removes what a crash has left.
fn prepare(directory: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(directory)?;
    let probe = temporary(&directory.join("probe"));
    create(&probe)?;
    fs::remove_file(&probe)?;
    for name in names(directory)?.iter().filter(|name| name.ends_with(TEMPORARY)) {
        remove_abandoned(&directory.join(name))?;
    }
    Ok(())
}

fn remove_abandoned(file: &Path) -> io::Result<()> {
    let remove = || {
        // One from the future is no older.
        let age = fs::metadata(file)?.modified()?.elapsed().unwrap_or_default();
        if age < ABANDONED_AFTER { Ok(()) } else { fs::remove_file(file) }
    };
    match remove() {
        // Whoever made it, or another that starts, was faster.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn names(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        // What is not UTF-8 is none of ours.
        names.extend(entry?.file_name().into_string());
    }
    Ok(names)
}

fn load(file: &Path) -> Result<Option<Vec<u8>>, Error> {
    let record = match fs::read(file) {
        Ok(record) => record,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Read { file: file.to_owned(), source }),
    };
    let (extension, version) = match envelope::unwrap(record) {
        Ok(bytes) => return Ok(Some(bytes)),
        Err(envelope::Error::Damaged) => ("damaged", None),
        Err(envelope::Error::Newer(version)) => ("newer", Some(version)),
    };
    let aside = file.with_extension(extension);
    let file = file.to_owned();
    match (fs::rename(&file, &aside), version) {
        (Err(source), _) => Err(Error::Read { file, source }),
        (Ok(()), Some(version)) => Err(Error::Newer { file, version, aside }),
        (Ok(()), None) => Err(Error::Damaged { file, aside }),
    }
}

/// Puts the record of `bytes` in the place of `file` so that no reader and no crash sees a part of it.
fn replace(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = temporary(file);
    let write = || {
        let mut new = create(&temporary)?;
        new.write_all(envelope::head(bytes).as_bytes())?;
        new.write_all(bytes)?;
        new.sync_all()?;
        fs::rename(&temporary, file)
    };
    let written = write();
    if written.is_err() {
        // The cause is what matters; a file left behind is removed at the next start.
        let _ = fs::remove_file(&temporary);
    }
    written?;
    // The new name is durable only once its directory is.
    #[cfg(unix)]
    if let Some(directory) = file.parent() {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

fn temporary(file: &Path) -> PathBuf {
    file.with_extension(format!("{}{TEMPORARY}", Ulid::generate()))
}

fn create(file: &Path) -> io::Result<File> {
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

    fn flags(name: &str) -> Key {
        Key::Flags(Environment::new(name))
    }

    async fn check(store: &Store) {
        assert_eq!(store.load(&Key::Verdicts).await.expect("load"), None);
        for bytes in [&b"one"[..], b"", b"two\nlines\xff"] {
            store.save(&Key::Verdicts, bytes).await.expect("save");
            assert_eq!(store.load(&Key::Verdicts).await.expect("load").as_deref(), Some(bytes));
        }
        for name in ["production", "Dev", "dev", "../été/%"] {
            store.save(&flags(name), name).await.expect("save");
        }
        let kept = store.environments().await.expect("list");
        let kept: Vec<_> = kept.iter().map(Environment::as_str).collect();
        assert_eq!(kept, ["../été/%", "Dev", "dev", "production"]);
        assert_eq!(store.load(&flags("Dev")).await.expect("load").as_deref(), Some(&b"Dev"[..]));
    }

    #[tokio::test]
    async fn what_is_saved_is_loaded_in_memory() {
        check(&Store::memory()).await;
    }

    #[tokio::test]
    async fn what_is_saved_is_loaded_from_files() {
        let folder = tempfile::tempdir().expect("folder");
        let inside = folder.path().join("a/b");
        check(&Store::directory(&inside).expect("store")).await;
        let reopened = Store::directory(&inside).expect("store");
        assert!(reopened.load(&Key::Verdicts).await.expect("load").is_some());
        assert_eq!(names(folder.path()).expect("names"), ["a"]);
        let left = names(&inside).expect("names");
        assert!(left.iter().all(|name| name.ends_with(SUFFIX)), "{left:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn disk_that_hangs_costs_one_thread_for_each_record_and_writes_nothing_old_later() {
        let folder = tempfile::tempdir().expect("folder");
        let store = Store::directory(folder.path()).expect("store");
        let hangs = store.stall(&Key::Verdicts).await;
        for bytes in ["one", "two"] {
            let begun = Instant::now();
            let error = store.save(&Key::Verdicts, bytes).await.expect_err("it hangs");
            let Error::Write { source, .. } = error else { panic!("{error:?}") };
            assert_eq!((source.kind(), begun.elapsed()), (io::ErrorKind::TimedOut, SAVE_DEADLINE));
        }
        store.save(&Key::Usage(Slot::FIRST), "another").await.expect("save");
        drop(hangs);
        store.save(&Key::Verdicts, "three").await.expect("save");
        let kept = store.load(&Key::Verdicts).await.expect("load");
        assert_eq!(kept.as_deref(), Some(&b"three"[..]));
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn only_the_owner_may_read() {
        use std::os::unix::fs::PermissionsExt as _;

        let folder = tempfile::tempdir().expect("folder");
        let inside = folder.path().join("data");
        let store = Store::directory(&inside).expect("store");
        store.save(&Key::Usage(Slot::FIRST), "x").await.expect("save");
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!(mode(&inside), 0o700);
        assert_eq!(mode(&inside.join("usage.parapet")), 0o600);
    }

    #[tokio::test]
    async fn what_a_crash_has_left_is_removed_and_never_loaded() {
        let folder = tempfile::tempdir().expect("folder");
        let store = Store::directory(folder.path()).expect("store");
        store.save(&Key::Usage(Slot::FIRST), "whole").await.expect("save");
        let half = temporary(&folder.path().join(Key::Usage(Slot::FIRST).file_name()));
        fs::write(&half, b"parapet 1 5").expect("write");
        let store_of_another = Store::directory(folder.path());
        assert!(store_of_another.is_ok() && half.exists(), "it may be about to become a record");
        let long_ago = SystemTime::now() - ABANDONED_AFTER;
        File::open(&half).and_then(|half| half.set_modified(long_ago)).expect("set the time");
        let store = Store::directory(folder.path()).expect("store");
        assert!(!half.exists());
        assert_eq!(
            store.load(&Key::Usage(Slot::FIRST)).await.expect("load").as_deref(),
            Some(&b"whole"[..])
        );
    }

    #[tokio::test]
    async fn damaged_and_newer_records_are_set_aside() {
        let folder = tempfile::tempdir().expect("folder");
        let store = Store::directory(folder.path()).expect("store");
        let file = folder.path().join(Key::Usage(Slot::FIRST).file_name());
        fs::write(&file, b"something else").expect("write");
        let error = store.load(&Key::Usage(Slot::FIRST)).await.expect_err("damaged");
        assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
        assert!(folder.path().join("usage.damaged").exists());
        assert_eq!(store.load(&Key::Usage(Slot::FIRST)).await.expect("load"), None);

        fs::write(&file, b"parapet 2 anything\nmore").expect("write");
        let error = store.load(&Key::Usage(Slot::FIRST)).await.expect_err("newer");
        assert!(matches!(error, Error::Newer { version: 2, .. }), "{error:?}");
        assert!(folder.path().join("usage.newer").exists());
    }

    #[tokio::test]
    async fn a_claim_excludes_others_until_it_is_dropped() {
        let folder = tempfile::tempdir().expect("folder");
        let (one, other) = (Store::directory(folder.path()), Store::directory(folder.path()));
        let (one, other) = (one.expect("store"), other.expect("store"));
        let [first, second] = [0, 1].map(|n| Key::Usage(Slot::all().nth(n).expect("slot")));
        let claim = one.claim(&first).await.expect("claim").expect("nobody has it");
        assert!(other.claim(&first).await.expect("claim").is_none());
        assert!(other.claim(&second).await.expect("claim").is_some());
        drop(claim);
        assert!(other.claim(&first).await.expect("claim").is_some());
    }

    #[tokio::test]
    async fn slots_are_those_that_have_a_record() {
        let folder = tempfile::tempdir().expect("folder");
        for store in [Store::memory(), Store::directory(folder.path()).expect("store")] {
            assert_eq!(store.slots().await.expect("slots"), []);
            let kept: Vec<_> = [0, 2].map(|n| Slot::all().nth(n).expect("slot")).into();
            for slot in kept.iter().rev() {
                store.save(&Key::Usage(*slot), "x").await.expect("save");
            }
            store.save(&Key::Verdicts, "x").await.expect("save");
            assert!(store.claim(&Key::Usage(Slot::FIRST)).await.expect("claim").is_some());
            assert_eq!(store.slots().await.expect("slots"), kept);
        }
        let files = ["usage.lock", "usage.parapet", "usage-3.parapet"];
        assert!(files.iter().all(|name| folder.path().join(name).exists()));
    }

    #[test]
    fn a_directory_that_cannot_be_written_to_is_named() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let error = Store::directory(file.path().join("data")).expect_err("a file is in the way");
        assert!(error.to_string().contains(&*file.path().to_string_lossy()), "{error}");
    }
}
