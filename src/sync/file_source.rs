//! Serves flags from files: one file, or a folder with one file per environment. Changed files are
//! reloaded.
//!
//! A single file serves every environment of the configured tokens. Files are checked once a second,
//! which works on every kind of mount, including Kubernetes' symbolic links. Each file is independent:
//! if an environment's file disappears from the folder or cannot be read, its last known flags stay,
//! unconfirmed from then on. So a file that is being replaced, or was deleted by mistake, removes no
//! flags before a restart.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use tokio::{
    sync::Notify,
    task::{JoinError, spawn_blocking},
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::{info, warn};
use xxhash_rust::xxh3::xxh3_64;

use super::publish::publish;
use crate::{
    protocol::features::Document,
    served::{EnvironmentFilter, Snapshots},
    telemetry::{ReadinessCondition, error_chain},
    token::{Environment, Projects, Scope},
};

/// The interval of checks for changed files.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Why flags cannot be loaded from files.
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
    /// A file is not a valid flags document.
    #[error("{} holds no flags that can be read", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The JSON error, with its position.
        source: serde_json::Error,
    },
    /// Flags cannot be compiled.
    #[error("compiling flags panicked")]
    Panic {
        /// The cause.
        source: JoinError,
    },
    /// A folder contains no flags file.
    #[error("{} contains no file named <environment>.json", path.display())]
    EmptyFolder {
        /// The folder.
        path: PathBuf,
    },
    /// Several files of a folder cannot be read.
    #[error("{}", .0.join("; "))]
    Multiple(Vec<String>),
}

/// Flags in a file or folder.
#[derive(Clone, Debug)]
pub struct FileSource {
    path: PathBuf,
    environments: Arc<ArcSwap<BTreeSet<Environment>>>,
    snapshots: Snapshots,
    reload_interval: Option<Duration>,
    reload_requested: Arc<Notify>,
}

/// Triggers a reload of a running [`FileSource`]. A cheap handle.
#[derive(Clone, Debug)]
pub struct ReloadHandle {
    environments: Arc<ArcSwap<BTreeSet<Environment>>>,
    reload_requested: Arc<Notify>,
}

impl ReloadHandle {
    /// Reloads the files, whether or not they seem to have changed.
    pub fn reload(&self) {
        self.reload_requested.notify_one();
    }

    /// Replaces the environments that a single file serves, and reloads it.
    pub fn set_environments(&self, environments: BTreeSet<Environment>) {
        self.environments.store(Arc::new(environments));
        self.reload();
    }
}

/// File metadata that changes when a file may have changed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct FileMeta {
    modified: Option<SystemTime>,
    length: u64,
    /// Device, inode, and the inode's change time, which cannot be set back.
    #[cfg(unix)]
    inode: (u64, u64, i64, i64),
}

/// The number of consecutive checks that read a file after a change. A second write within the same tick
/// of the file system's clock (up to 2 s) changes only the content, not the metadata.
const READS_AFTER_CHANGE_DETECTED: u8 = 3;

/// The last known state of a file.
#[derive(Clone, Debug)]
struct FileState {
    meta: FileMeta,
    /// A hash of the content last read.
    content_hash: Option<u64>,
    /// The number of further reads even if the metadata does not change.
    reads_left: u8,
    /// Why the content last read is not served.
    failure: Option<Arc<Error>>,
}

/// The state of all files.
type FileStates = BTreeMap<PathBuf, FileState>;

/// The files found by a check, and the parsed documents of the changed ones.
type ScanResult = (FileStates, Vec<(PathBuf, Document)>);

impl FileSource {
    /// Serves the flags of `path`. If it is a single file, it serves each of `environments`.
    ///
    /// With `reload_interval` the content is compared at that interval even if the metadata is unchanged.
    pub fn new(
        path: PathBuf,
        environments: BTreeSet<Environment>,
        snapshots: Snapshots,
        reload_interval: Option<Duration>,
    ) -> Self {
        let environments = Arc::new(ArcSwap::from_pointee(environments));
        Self { path, environments, snapshots, reload_interval, reload_requested: Arc::default() }
    }

    /// A handle to trigger a reload.
    pub fn reload_handle(&self) -> ReloadHandle {
        let (environments, reload_requested) =
            (Arc::clone(&self.environments), Arc::clone(&self.reload_requested));
        ReloadHandle { environments, reload_requested }
    }

    /// Loads and serves the flags; [`FlagFileWatcher::run`] then keeps them current.
    ///
    /// Meets `ready_when` once any environment has flags, which may be later.
    ///
    /// # Errors
    /// If any file cannot be read. A file that breaks later affects only its own environment. At the
    /// start, however, there are no earlier flags to fall back to, and this instance would reject an
    /// environment that the previous instance still serves.
    pub async fn start(self, ready_when: ReadinessCondition) -> Result<FlagFileWatcher, Error> {
        let served_environments = self.environments.load_full();
        let mut file_states = FileStates::new();
        self.publish_changed_files(&mut file_states, true).await?;
        let mut failures: Vec<_> =
            file_states.values_mut().filter_map(|it| it.failure.take()).collect();
        match (failures.len(), failures.pop()) {
            (_, None) => {
                ready_when.describe("an environment: no configured token names one");
                let watcher = FlagFileWatcher {
                    source: self,
                    file_states,
                    served_environments,
                    ready_when: Arc::new(ready_when),
                };
                watcher.mark_ready_if_served();
                Ok(watcher)
            }
            (1, Some(failure)) => {
                Err(Arc::into_inner(failure).expect("the only reference was in the state"))
            }
            (_, Some(last)) => {
                failures.push(last);
                Err(Error::Multiple(failures.iter().map(|error| error_chain(&**error)).collect()))
            }
        }
    }

    /// Reads the files that may have changed and publishes those that did. If a file cannot be read, the
    /// flags of its environment stay, unconfirmed.
    ///
    /// # Errors
    /// Only if the folder itself cannot be read.
    async fn publish_changed_files(
        &self,
        state: &mut FileStates,
        reread: bool,
    ) -> Result<(), Error> {
        let (path, known) = (self.path.clone(), state.clone());
        let found = spawn_blocking(move || scan(&path, &known, reread)).await;
        let (mut found, documents) = found.map_err(|source| Error::Panic { source })??;
        let before = self.environments_in(state);
        let now = self.environments_in(&found);
        if now != before {
            // Only files define environments: requests for others must not wait.
            let served = self.snapshots.environments().union(&now).cloned().collect();
            self.snapshots.set_environments(&EnvironmentFilter::Only(served));
        }
        for (path, document) in documents {
            if let Err(error) = self.publish(&path, document).await
                && let Some(file) = found.get_mut(&path)
            {
                file.failure = Some(Arc::new(error));
            }
        }
        *state = found;
        for environment in before.difference(&now) {
            warn!(%environment, "The environment's file was removed; its last known flags stay");
        }
        for (path, _) in state.iter().filter(|(_, file)| file.failure.is_none()) {
            for environment in self.environments_of(path) {
                if let Some(snapshot) = self.snapshots.load(&environment) {
                    snapshot.confirm(Instant::now());
                }
            }
        }
        Ok(())
    }

    /// Publishes the flags of a file.
    async fn publish(&self, path: &Path, document: Document) -> Result<(), Error> {
        let document = Arc::new(document);
        for environment in self.environments_of(path) {
            let document = Arc::clone(&document);
            let make = move || Document::clone(&document);
            let scope = Scope { environment, projects: Projects::All };
            let published = publish(&self.snapshots, scope, Some(Instant::now()), make).await;
            published.map_err(|source| Error::Panic { source })?;
        }
        Ok(())
    }

    fn environments_in(&self, state: &FileStates) -> BTreeSet<Environment> {
        state.keys().flat_map(|path| self.environments_of(path)).collect()
    }

    fn environments_of(&self, file: &Path) -> BTreeSet<Environment> {
        match file.file_stem().and_then(|stem| stem.to_str()) {
            Some(name) if file != self.path => BTreeSet::from([Environment::new(name)]),
            _ => BTreeSet::clone(&self.environments.load()),
        }
    }
}

/// Watches the files of a started [`FileSource`].
#[derive(Clone, Debug)]
pub struct FlagFileWatcher {
    source: FileSource,
    file_states: FileStates,
    /// The environments for which the single file was last loaded.
    served_environments: Arc<BTreeSet<Environment>>,
    /// Met once any environment has flags.
    ready_when: Arc<ReadinessCondition>,
}

impl FlagFileWatcher {
    /// Reloads changed files until dropped. Files that cannot be read change nothing.
    pub async fn run(mut self) {
        let mut ticks = interval(CHECK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reread_at = self.next_reload();
        let mut reported = BTreeMap::<PathBuf, String>::new();
        loop {
            let requested = tokio::select! {
                _ = ticks.tick() => false,
                () = self.source.reload_requested.notified() => true,
            };
            if requested {
                // Log persisting errors again after an explicit request.
                reported.clear();
                if !Arc::ptr_eq(&self.served_environments, &self.source.environments.load()) {
                    self.served_environments = self.source.environments.load_full();
                    // New environments have no flags yet: load everything again.
                    self.file_states = FileStates::new();
                }
            }
            let reread = requested || reread_at.is_some_and(|at| at <= Instant::now());
            if reread {
                reread_at = self.next_reload();
            }
            let failures = self.check_and_collect_failures(reread).await;
            self.mark_ready_if_served();
            for (path, error) in &failures {
                if reported.get(path) != Some(error) {
                    warn!(error, "Reloading flags failed; the last known flags stay");
                }
            }
            for path in reported.keys().filter(|path| !failures.contains_key(*path)) {
                info!("{} is readable again", path.display());
            }
            reported = failures;
        }
    }

    /// Checks the files; returns the errors by path.
    async fn check_and_collect_failures(&mut self, reread: bool) -> BTreeMap<PathBuf, String> {
        if let Err(error) = self.source.publish_changed_files(&mut self.file_states, reread).await {
            return BTreeMap::from([(self.source.path.clone(), error_chain(&error))]);
        }
        let failures = self.file_states.iter().filter_map(|(path, file)| {
            let error = file.failure.as_deref()?;
            Some((path.clone(), error_chain(error)))
        });
        failures.collect()
    }

    fn mark_ready_if_served(&self) {
        if !self.source.snapshots.environments().is_empty() {
            self.ready_when.mark_met();
        }
    }

    fn next_reload(&self) -> Option<Instant> {
        self.source.reload_interval.map(|every| Instant::now() + every)
    }
}

/// Lists the files of a path: the file itself, or the folder's `*.json`.
fn list_files(path: &Path) -> Result<BTreeMap<PathBuf, FileMeta>, Error> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if !metadata.is_dir() {
        return Ok(BTreeMap::from([(path.to_owned(), FileMeta::from_metadata(&metadata))]));
    }
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        // Skip hidden files: editors' lock files, for example, may be dangling links.
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden || path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => {
                files.insert(path, FileMeta::from_metadata(&metadata));
            }
            Ok(_) => {}
            // Removed since the folder was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Reading the file will report the error.
            Err(_) => {
                files.insert(path, FileMeta::default());
            }
        }
    }
    if files.is_empty() {
        return Err(Error::EmptyFolder { path: path.to_owned() });
    }
    Ok(files)
}

impl FileMeta {
    fn from_metadata(metadata: &std::fs::Metadata) -> Self {
        #[cfg(unix)]
        use std::os::unix::fs::MetadataExt as _;
        Self {
            modified: metadata.modified().ok(),
            length: metadata.len(),
            #[cfg(unix)]
            inode: (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Lists the files of `path` and reads those that may have changed since `known`.
fn scan(path: &Path, known: &FileStates, reread: bool) -> Result<ScanResult, Error> {
    let (mut state, mut documents) = (FileStates::new(), Vec::new());
    for (path, meta) in list_files(path)? {
        let file = match known.get(&path) {
            Some(file) if file.meta == meta && file.reads_left == 0 && !reread => file.clone(),
            file => {
                let (file, document) = read_file(&path, meta, file);
                documents.extend(document.map(|document| (path.clone(), document)));
                file
            }
        };
        state.insert(path, file);
    }
    Ok((state, documents))
}

/// Reads a file; parses it if its content has changed.
fn read_file(
    path: &Path,
    meta: FileMeta,
    known: Option<&FileState>,
) -> (FileState, Option<Document>) {
    let reads_left = match known {
        Some(file) if file.meta == meta => file.reads_left.saturating_sub(1),
        Some(_) | None => READS_AFTER_CHANGE_DETECTED - 1,
    };
    let path = path.to_owned();
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(source) => {
            let failure = Some(Arc::new(Error::Read { path, source }));
            // The cause may disappear without a change of the file: read it again at the next check.
            return (FileState { meta, content_hash: None, reads_left: 1, failure }, None);
        }
    };
    let content_hash = Some(xxh3_64(&text));
    if let Some(file) = known
        && file.content_hash == content_hash
    {
        let failure = file.failure.clone();
        return (FileState { meta, content_hash, reads_left, failure }, None);
    }
    let (document, failure) = match Document::parse_file(&text) {
        Ok(document) => (Some(document), None),
        Err(source) => (None, Some(Arc::new(Error::Parse { path, source }))),
    };
    (FileState { meta, content_hash, reads_left, failure }, document)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Readiness;

    fn flags_json(name: &str) -> String {
        format!(r#"{{"features":[{{"name":"{name}","enabled":true}}]}}"#)
    }

    fn ready_when() -> ReadinessCondition {
        Readiness::new().1
    }

    fn flag_names(snapshots: &Snapshots, environment: &str) -> Vec<String> {
        let snapshot = snapshots.load(&Environment::new(environment)).unwrap();
        snapshot.document().features().iter().map(|it| it.name().to_string()).collect()
    }

    #[tokio::test]
    async fn single_file_serves_every_environment_and_invalid_edit_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flags.json");
        std::fs::write(&path, flags_json("one")).unwrap();
        let snapshots = Snapshots::default();
        let environments = ["dev", "prod"].map(Environment::new).into();
        let files = FileSource::new(path.clone(), environments, snapshots.clone(), None);
        let mut watcher = files.start(ready_when()).await.unwrap();
        assert_eq!(flag_names(&snapshots, "prod"), ["one"]);
        std::fs::write(&path, "{ no JSON").unwrap();
        let failures = watcher.check_and_collect_failures(false).await;
        assert!(failures[&path].contains("flags.json"), "{failures:?}");
        assert_eq!(flag_names(&snapshots, "dev"), ["one"]);
        std::fs::write(&path, flags_json("another")).unwrap();
        assert!(watcher.check_and_collect_failures(false).await.is_empty());
        assert_eq!(flag_names(&snapshots, "dev"), ["another"]);
    }

    #[tokio::test]
    async fn folder_serves_one_environment_per_file() {
        let folder = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::default();
        let path = folder.path().to_owned();
        let files = || FileSource::new(path.clone(), BTreeSet::new(), snapshots.clone(), None);
        assert!(matches!(files().start(ready_when()).await, Err(Error::EmptyFolder { .. })));
        std::fs::write(path.join("dev.json"), flags_json("one")).unwrap();
        std::fs::write(path.join("prod.json"), flags_json("two")).unwrap();
        std::os::unix::fs::symlink("nowhere", path.join(".#dev.json")).unwrap();
        std::os::unix::fs::symlink("nowhere", path.join("gone.json")).unwrap();
        files().start(ready_when()).await.unwrap();
        assert_eq!(flag_names(&snapshots, "dev"), ["one"]);
        assert_eq!(flag_names(&snapshots, "prod"), ["two"]);
    }

    #[tokio::test]
    async fn renamed_file_is_published_and_former_environment_stays_unconfirmed() {
        let folder = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::default();
        let path = folder.path().to_owned();
        std::fs::write(path.join("dev.json"), flags_json("one")).unwrap();
        let files = FileSource::new(path.clone(), BTreeSet::new(), snapshots.clone(), None);
        let mut watcher = files.start(ready_when()).await.unwrap();
        std::fs::rename(path.join("dev.json"), path.join("prod.json")).unwrap();
        assert!(watcher.check_and_collect_failures(false).await.is_empty());
        assert_eq!(flag_names(&snapshots, "prod"), ["one"]);
        assert_eq!(flag_names(&snapshots, "dev"), ["one"]);
        let confirmed = |name| snapshots.load(&Environment::new(name)).unwrap().confirmed_at();
        let (before, since) = (confirmed("dev"), confirmed("prod"));
        assert!(watcher.check_and_collect_failures(false).await.is_empty());
        assert_eq!(confirmed("dev"), before);
        assert!(confirmed("prod") >= since);
    }

    #[tokio::test(start_paused = true)]
    async fn instance_is_ready_once_the_first_environment_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flags.json");
        std::fs::write(&path, flags_json("one")).unwrap();
        let snapshots = Snapshots::default();
        let files = FileSource::new(path, BTreeSet::new(), snapshots.clone(), None);
        let reload_handle = files.reload_handle();
        let (readiness, ready_when) = Readiness::new();
        let task = tokio::spawn(files.start(ready_when).await.unwrap().run());
        assert!(readiness.pending_conditions()[0].contains("no configured token names one"));
        reload_handle.set_environments([Environment::new("dev")].into());
        let ready = async {
            while !readiness.is_ready() {
                tokio::time::sleep(CHECK_INTERVAL).await;
            }
        };
        tokio::time::timeout(60 * CHECK_INTERVAL, ready).await.expect("ready");
        assert_eq!(flag_names(&snapshots, "dev"), ["one"]);
        task.abort();
    }
}
