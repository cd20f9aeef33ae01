//! Flags from files: a bootstrap file, or a folder with a file per environment; read again on
//! change.
//!
//! One file serves every environment that is asked for. Files are looked at once a second, which
//! works on every kind of mount, Kubernetes' links included.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use jiff::Timestamp;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::warn;
use xxhash_rust::xxh3::xxh3_64;

use super::publish::publish;
use crate::{
    snapshot::Snapshots,
    token::{Environment, Projects, Scope},
    wire::features::Document,
};

/// How often files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Why flags cannot be read from files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file or folder cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file holds no flags.
    #[error("{} is not a client-features document", path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// Flags cannot be compiled.
    #[error("compiling flags came to no end")]
    Panic {
        /// The cause.
        source: tokio::task::JoinError,
    },
    /// A folder holds no flags.
    #[error("{} holds no file named <environment>.json", path.display())]
    Empty {
        /// The folder.
        path: PathBuf,
    },
}

/// Flags kept in files.
#[derive(Clone, Debug)]
pub struct Files {
    path: PathBuf,
    environments: BTreeSet<Environment>,
    snapshots: Snapshots,
    reread_every: Option<Duration>,
}

/// What was last seen of a file: enough to tell that it may have changed.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Seen {
    path: PathBuf,
    modified: Option<SystemTime>,
    length: u64,
}

/// A file that was read.
#[derive(Debug)]
struct Read {
    path: PathBuf,
    text: Vec<u8>,
}

/// What a look at the files is compared with.
#[derive(Clone, Debug, Default)]
struct Memory {
    seen: Vec<Seen>,
    hash: u64,
}

impl Files {
    /// The flags of `path`; where that is one file, it serves each of `environments`.
    ///
    /// With `reread_every` the content is compared at that interval even if nothing tells of a
    /// change.
    pub fn new(
        path: PathBuf,
        environments: BTreeSet<Environment>,
        snapshots: Snapshots,
        reread_every: Option<Duration>,
    ) -> Self {
        Self { path, environments, snapshots, reread_every }
    }

    /// Reads and serves the flags; from then on [`Files::run`] keeps them current.
    pub async fn start(self) -> Result<Running, Error> {
        let mut memory = Memory::default();
        self.look(&mut memory, true).await?;
        Ok(Running { files: self, memory })
    }

    /// Reads the files if they may have changed and publishes what did.
    async fn look(&self, memory: &mut Memory, reread: bool) -> Result<(), Error> {
        let seen = seen(&self.path)?;
        if seen == memory.seen && !reread {
            self.confirm();
            return Ok(());
        }
        let files = seen.iter().map(|seen| read(&seen.path)).collect::<Result<Vec<_>, _>>()?;
        let hash = xxh3_64(&files.iter().flat_map(|file| file.text.clone()).collect::<Vec<_>>());
        if hash == memory.hash {
            memory.seen = seen;
            self.confirm();
            return Ok(());
        }
        let mut documents = Vec::new();
        for file in &files {
            let document = Document::parse(&file.text)
                .map_err(|source| Error::Document { path: file.path.clone(), source })?;
            documents.push((self.environments_of(&file.path), document));
        }
        for (environments, document) in documents {
            for environment in environments {
                let document = document.clone();
                let scope = Scope { environment, projects: Projects::All };
                let published =
                    publish(&self.snapshots, scope, Timestamp::now(), || document).await;
                published.map_err(|source| Error::Panic { source })?;
            }
        }
        *memory = Memory { seen, hash };
        Ok(())
    }

    fn environments_of(&self, file: &Path) -> BTreeSet<Environment> {
        match file.file_stem().and_then(|stem| stem.to_str()) {
            Some(name) if file != self.path => BTreeSet::from([Environment::new(name)]),
            _ => self.environments.clone(),
        }
    }

    fn confirm(&self) {
        let now = Timestamp::now();
        for snapshot in self.snapshots.all().values() {
            snapshot.confirm(now);
        }
    }
}

/// Flags of files that are being served.
#[derive(Clone, Debug)]
pub struct Running {
    files: Files,
    memory: Memory,
}

impl Running {
    /// Reads changed files until dropped; what cannot be read changes nothing.
    pub async fn run(mut self) {
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reread_at = self.next_reread();
        let mut failing = None;
        loop {
            looks.tick().await;
            let reread = reread_at.is_some_and(|at| at <= Instant::now());
            if reread {
                reread_at = self.next_reread();
            }
            let failure = self.files.look(&mut self.memory, reread).await.err();
            let failure = failure.map(|error| match std::error::Error::source(&error) {
                Some(cause) => format!("{error}: {cause}"),
                None => error.to_string(),
            });
            if failure != failing
                && let Some(error) = &failure
            {
                warn!(error, "Flags cannot be read again, those known stay");
            }
            failing = failure;
        }
    }

    fn next_reread(&self) -> Option<Instant> {
        self.files.reread_every.map(|every| Instant::now() + every)
    }
}

/// The files of a path: itself, or the folder's `*.json`, sorted.
fn seen(path: &Path) -> Result<Vec<Seen>, Error> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if !metadata.is_dir() {
        return Ok(vec![Seen::of(path.to_owned(), &metadata)]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let metadata = std::fs::metadata(&path).map_err(failed)?;
        if metadata.is_file() && path.extension().is_some_and(|it| it == "json") {
            files.push(Seen::of(path, &metadata));
        }
    }
    if files.is_empty() {
        return Err(Error::Empty { path: path.to_owned() });
    }
    files.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(files)
}

impl Seen {
    fn of(path: PathBuf, metadata: &std::fs::Metadata) -> Self {
        Self { path, modified: metadata.modified().ok(), length: metadata.len() }
    }
}

fn read(path: &Path) -> Result<Read, Error> {
    let text =
        std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    Ok(Read { path: path.to_owned(), text })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(name: &str) -> String {
        format!(r#"{{"features":[{{"name":"{name}","enabled":true}}]}}"#)
    }

    fn names(snapshots: &Snapshots, environment: &str) -> Vec<String> {
        let snapshot = snapshots.load(&Environment::new(environment)).unwrap();
        snapshot.document().features().iter().map(|it| it.name().to_string()).collect()
    }

    #[tokio::test]
    async fn one_file_serves_every_environment_and_a_bad_edit_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flags.json");
        std::fs::write(&path, flags("one")).unwrap();
        let snapshots = Snapshots::default();
        let environments = ["dev", "prod"].map(Environment::new).into();
        let files = Files::new(path.clone(), environments, snapshots.clone(), None);
        let mut running = files.start().await.unwrap();
        assert_eq!(names(&snapshots, "prod"), ["one"]);
        std::fs::write(&path, "{ no JSON").unwrap();
        let error = running.files.look(&mut running.memory, false).await.unwrap_err();
        assert!(error.to_string().contains("flags.json"), "{error}");
        assert_eq!(names(&snapshots, "dev"), ["one"]);
        std::fs::write(&path, flags("another")).unwrap();
        running.files.look(&mut running.memory, false).await.unwrap();
        assert_eq!(names(&snapshots, "dev"), ["another"]);
    }

    #[tokio::test]
    async fn a_folder_has_a_file_per_environment() {
        let folder = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::default();
        let path = folder.path().to_owned();
        let files = || Files::new(path.clone(), BTreeSet::new(), snapshots.clone(), None);
        assert!(matches!(files().start().await, Err(Error::Empty { .. })));
        std::fs::write(path.join("dev.json"), flags("one")).unwrap();
        std::fs::write(path.join("prod.json"), flags("two")).unwrap();
        files().start().await.unwrap();
        assert_eq!(names(&snapshots, "dev"), ["one"]);
        assert_eq!(names(&snapshots, "prod"), ["two"]);
    }
}
