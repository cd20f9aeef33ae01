//! Flags from files: a bootstrap file, or a folder with a file per environment; read again on
//! change.
//!
//! One file serves every environment that is asked for. Files are looked at once a second, which
//! works on every kind of mount, Kubernetes' links included. An environment whose file has vanished
//! from the folder keeps the flags last known, unconfirmed from then on: a file that is being
//! replaced, or was deleted by mistake, takes no flags away before a restart.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use jiff::Timestamp;
use tokio::{
    task::{JoinError, spawn_blocking},
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::warn;
use xxhash_rust::xxh3::Xxh3;

use super::publish::publish;
use crate::{
    snapshot::{Served, Snapshots},
    telemetry::report,
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
    #[error("{} holds no flags that can be read", path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// Flags cannot be compiled.
    #[error("compiling flags has panicked")]
    Panic {
        /// The cause.
        source: JoinError,
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

/// What a look at the files is compared with.
#[derive(Clone, Debug, Default)]
struct Memory {
    seen: Vec<Seen>,
    /// Of the files' names and content.
    hash: u64,
}

/// What a look has found: the files, and their flags if anything has changed.
type Found = (Memory, Option<Vec<(PathBuf, Document)>>);

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

    /// Reads and serves the flags; from then on [`Running::run`] keeps them current.
    pub async fn start(self) -> Result<Running, Error> {
        let mut memory = Memory::default();
        self.look(&mut memory, true).await?;
        Ok(Running { files: self, memory })
    }

    /// Reads the files if they may have changed and publishes what did.
    async fn look(&self, memory: &mut Memory, reread: bool) -> Result<(), Error> {
        let (path, known) = (self.path.clone(), memory.clone());
        let found = spawn_blocking(move || find(&path, &known, reread)).await;
        let (found, documents) = found.map_err(|source| Error::Panic { source })??;
        let before = self.environments_in(memory);
        let now = self.environments_in(&found);
        if documents.is_some() {
            // Files alone say what there is; an environment without one has nothing to wait for.
            let served = self.snapshots.environments().union(&now).cloned().collect();
            self.snapshots.limit(&Served::Only(served));
        }
        for (path, document) in documents.unwrap_or_default() {
            let document = Arc::new(document);
            for environment in self.environments_of(&path) {
                let document = Arc::clone(&document);
                let make = move || Document::clone(&document);
                let scope = Scope { environment, projects: Projects::All };
                let published = publish(&self.snapshots, scope, Timestamp::now(), make).await;
                published.map_err(|source| Error::Panic { source })?;
            }
        }
        *memory = found;
        for environment in before.difference(&now) {
            warn!(%environment, "The file of an environment has vanished, the flags known stay");
        }
        for environment in now {
            if let Some(snapshot) = self.snapshots.load(&environment) {
                snapshot.confirm(Timestamp::now());
            }
        }
        Ok(())
    }

    fn environments_in(&self, memory: &Memory) -> BTreeSet<Environment> {
        memory.seen.iter().flat_map(|seen| self.environments_of(&seen.path)).collect()
    }

    fn environments_of(&self, file: &Path) -> BTreeSet<Environment> {
        match file.file_stem().and_then(|stem| stem.to_str()) {
            Some(name) if file != self.path => BTreeSet::from([Environment::new(name)]),
            _ => self.environments.clone(),
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
            let failure = failure.map(|error| report(&error));
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
        // An editor's lock and the like is hidden, and may be a link to nothing.
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden || path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => files.push(Seen::of(path, &metadata)),
            Ok(_) => {}
            // It went between the listing and now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
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

/// Looks at the files of `path`, and reads them if they may differ from those `known`.
fn find(path: &Path, known: &Memory, reread: bool) -> Result<Found, Error> {
    let seen = seen(path)?;
    if seen == known.seen && !reread {
        return Ok((known.clone(), None));
    }
    let (mut hasher, mut texts) = (Xxh3::new(), Vec::new());
    for Seen { path, .. } in &seen {
        let failed = |source| Error::Read { path: path.clone(), source };
        let text = std::fs::read(path).map_err(failed)?;
        for part in [path.as_os_str().as_encoded_bytes(), &text] {
            hasher.update(&part.len().to_le_bytes());
            hasher.update(part);
        }
        texts.push((path.clone(), text));
    }
    let found = Memory { seen, hash: hasher.digest() };
    if found.hash == known.hash {
        return Ok((found, None));
    }
    let parse = |(path, text): (PathBuf, Vec<u8>)| match Document::parse_file(&text) {
        Ok(document) => Ok((path, document)),
        Err(source) => Err(Error::Document { path, source }),
    };
    let documents = texts.into_iter().map(parse).collect::<Result<_, _>>()?;
    Ok((found, Some(documents)))
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
        std::os::unix::fs::symlink("nowhere", path.join(".#dev.json")).unwrap();
        std::os::unix::fs::symlink("nowhere", path.join("gone.json")).unwrap();
        files().start().await.unwrap();
        assert_eq!(names(&snapshots, "dev"), ["one"]);
        assert_eq!(names(&snapshots, "prod"), ["two"]);
    }

    #[tokio::test]
    async fn a_renamed_file_is_published_and_its_former_environment_stays_unconfirmed() {
        let folder = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::default();
        let path = folder.path().to_owned();
        std::fs::write(path.join("dev.json"), flags("one")).unwrap();
        let files = Files::new(path.clone(), BTreeSet::new(), snapshots.clone(), None);
        let mut running = files.start().await.unwrap();
        std::fs::rename(path.join("dev.json"), path.join("prod.json")).unwrap();
        running.files.look(&mut running.memory, false).await.unwrap();
        assert_eq!(names(&snapshots, "prod"), ["one"]);
        assert_eq!(names(&snapshots, "dev"), ["one"]);
        let confirmed = |name| snapshots.load(&Environment::new(name)).unwrap().confirmed();
        let (before, since) = (confirmed("dev"), confirmed("prod"));
        running.files.look(&mut running.memory, false).await.unwrap();
        assert_eq!(confirmed("dev"), before);
        assert!(confirmed("prod") >= since);
    }
}
