//! What outlives a restart: bytes by key, saved whole or not at all.
//!
//! A record that was damaged on disk, or written by a newer version, is set aside and reported;
//! whoever wanted it goes on without. What the bytes mean is their owner's matter, and so is keeping
//! plaintext tokens out of them.

pub mod edge_backup;
mod envelope;

use std::{
    collections::HashMap,
    fmt,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use ulid::Ulid;

use crate::token::Environment;

/// A place for what must outlive a restart.
///
/// A cheap handle. Each key should have one owner that awaits a `save` before the next one: of two
/// at once either may win.
#[derive(Clone)]
pub struct Store(Arc<Backend>);

enum Backend {
    Directory(PathBuf),
    Memory(Mutex<HashMap<Key, Bytes>>),
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
    /// Usage that is not sent yet.
    Usage,
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
    /// Files that an interrupted save has left are removed.
    pub fn directory(directory: impl Into<PathBuf>) -> Result<Self, Error> {
        let directory = directory.into();
        match prepare(&directory) {
            Ok(()) => Ok(Self(Arc::new(Backend::Directory(directory)))),
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
                let file = directory.join(key.file_name());
                let path = file.clone();
                blocking(move || load(&path))
                    .await
                    .unwrap_or_else(|source| Err(Error::Read { file, source }))
            }
        }
    }

    /// Replaces what is kept under `key`.
    ///
    /// When this returns, a loss of power no longer takes the bytes away. Dropping the future leaves
    /// either the old record or the new one.
    pub async fn save(&self, key: &Key, bytes: impl Into<Bytes>) -> Result<(), Error> {
        let bytes = bytes.into();
        match &*self.0 {
            Backend::Memory(records) => {
                lock(records).insert(key.clone(), bytes);
                Ok(())
            }
            Backend::Directory(directory) => {
                let file = directory.join(key.file_name());
                let path = file.clone();
                blocking(move || replace(&path, &bytes))
                    .await
                    .flatten()
                    .map_err(|source| Error::Write { file, source })
            }
        }
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
                let path = directory.clone();
                let names = blocking(move || names(&path))
                    .await
                    .flatten()
                    .map_err(|source| Error::Read { file: directory.clone(), source })?;
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
            Backend::Directory(directory) => write!(f, "Store({})", directory.display()),
            Backend::Memory(_) => f.write_str("Store(memory)"),
        }
    }
}

const FLAGS: &str = "flags-";
const SUFFIX: &str = ".parapet";
const TEMPORARY: &str = ".parapet-tmp";

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

impl Key {
    fn file_name(&self) -> String {
        let encoded = |name: &Environment| utf8_percent_encode(name.as_str(), PLAIN).to_string();
        match self {
            Self::Flags(environment) => format!("{FLAGS}{}{SUFFIX}", encoded(environment)),
            Self::Verdicts => format!("verdicts{SUFFIX}"),
            Self::Credentials(environment) => {
                format!("credentials-{}{SUFFIX}", encoded(environment))
            }
            Self::Usage => format!("usage{SUFFIX}"),
        }
    }
}

fn environment_of(file_name: &str) -> Option<Environment> {
    let encoded = file_name.strip_prefix(FLAGS)?.strip_suffix(SUFFIX)?;
    let name = percent_decode_str(encoded).decode_utf8().ok()?;
    Some(Environment::new(&name))
}

fn lock(records: &Mutex<HashMap<Key, Bytes>>) -> MutexGuard<'_, HashMap<Key, Bytes>> {
    records.lock().expect("nothing panics while it holds this lock")
}

/// Runs file operations where they hold nobody up; fails only when the runtime is going away.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)
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
        fs::remove_file(directory.join(name))?;
    }
    Ok(())
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

    #[cfg(unix)]
    #[tokio::test]
    async fn only_the_owner_may_read() {
        use std::os::unix::fs::PermissionsExt as _;

        let folder = tempfile::tempdir().expect("folder");
        let inside = folder.path().join("data");
        let store = Store::directory(&inside).expect("store");
        store.save(&Key::Usage, "x").await.expect("save");
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!(mode(&inside), 0o700);
        assert_eq!(mode(&inside.join("usage.parapet")), 0o600);
    }

    #[tokio::test]
    async fn what_a_crash_has_left_is_removed_and_never_loaded() {
        let folder = tempfile::tempdir().expect("folder");
        let store = Store::directory(folder.path()).expect("store");
        store.save(&Key::Usage, "whole").await.expect("save");
        let half = temporary(&folder.path().join(Key::Usage.file_name()));
        fs::write(&half, b"parapet 1 5").expect("write");
        let store = Store::directory(folder.path()).expect("store");
        assert!(!half.exists());
        assert_eq!(store.load(&Key::Usage).await.expect("load").as_deref(), Some(&b"whole"[..]));
    }

    #[tokio::test]
    async fn damaged_and_newer_records_are_set_aside() {
        let folder = tempfile::tempdir().expect("folder");
        let store = Store::directory(folder.path()).expect("store");
        let file = folder.path().join(Key::Usage.file_name());
        fs::write(&file, b"something else").expect("write");
        let error = store.load(&Key::Usage).await.expect_err("damaged");
        assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
        assert!(folder.path().join("usage.damaged").exists());
        assert_eq!(store.load(&Key::Usage).await.expect("load"), None);

        fs::write(&file, b"parapet 2 anything\nmore").expect("write");
        let error = store.load(&Key::Usage).await.expect_err("newer");
        assert!(matches!(error, Error::Newer { version: 2, .. }), "{error:?}");
        assert!(folder.path().join("usage.newer").exists());
    }

    #[test]
    fn a_directory_that_cannot_be_written_to_is_named() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let error = Store::directory(file.path().join("data")).expect_err("a file is in the way");
        assert!(error.to_string().contains(&*file.path().to_string_lossy()), "{error}");
    }
}
