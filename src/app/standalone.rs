//! Standalone mode: flags from files, and tokens from the registry.

use std::{
    fs::{self, File},
    io::Write as _,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tracing::{info, warn};

use super::{
    configured_tokens::sdk_environments,
    mode::{Error, ModeParts},
    persistence::SaveLog,
    reload::Reloadable,
    store,
};
use crate::{
    config::{FlagsPath, StandaloneConfig},
    control_plane::{BootstrapReport, ControlPlane, DatabaseLocation, InitialSetting},
    secret_file::parent_dir,
    served::Snapshots,
    store::{RecordKey, Store},
    sync::file_source::FileSource,
    telemetry::{ReadinessCondition, error_chain},
};

/// Standalone mode: an independent server. Calls `announce` once, after the first start has created
/// accounts and tokens.
pub(super) async fn build(
    standalone: StandaloneConfig,
    snapshots: &Snapshots,
    ready_when: ReadinessCondition,
    announce: impl FnOnce(&BootstrapReport),
) -> Result<ModeParts, Error> {
    let store = store::open(&standalone.store)?.store;
    // Comes before the database is created, so that a start that fails here is not the first one.
    let flags = prepare_flags_path(standalone.flags)?;
    // A SQLite database is a local file, so a copy would not be more available than the file.
    let is_remote = matches!(standalone.control.location, DatabaseLocation::Postgres(_));
    let copy = if is_remote { load_registry_copy(&*store).await } else { None };
    let (control, opened) =
        ControlPlane::open(standalone.control, copy.as_deref(), announce).await?;
    let tokens = control.grants();
    let named = sdk_environments(&tokens);
    let served = named.iter().cloned().chain(standalone.environments).collect();
    let files = FileSource::new(flags, served, snapshots.clone(), None);
    let reloadable = Reloadable::Standalone(files.reload_handle());
    let mut parts =
        ModeParts::from_files("standalone", files, tokens, store, ready_when, reloadable).await?;
    parts.usage_sink = Some(Arc::new(control.usage_sink(snapshots.clone())));
    parts.saves_registry_copies = is_remote;
    parts.control_plane = Some(control);
    for environment in named.difference(&snapshots.environments()) {
        warn!(%environment, "Tokens exist for an environment that no file has flags of");
    }
    for setting in opened.ignored_settings {
        match setting {
            InitialSetting::Tokens => warn!(
                "INIT_*_API_TOKENS have changed since the first start and are ignored: the registry already has tokens"
            ),
            InitialSetting::Password => warn!(
                "UNLEASH_DEFAULT_ADMIN_PASSWORD has changed since the first start and is ignored; change the password with `parapet account password`"
            ),
        }
    }
    Ok(parts)
}

/// The path of the flags; writes an example if there are none.
fn prepare_flags_path(flags: FlagsPath) -> Result<PathBuf, Error> {
    /// Example flags for every feature.
    const EXAMPLE: &[u8] = include_bytes!("../../config/flags.json");
    let path = match flags {
        FlagsPath::Existing(path) => return Ok(path),
        FlagsPath::Example(path) => path,
    };
    let write = || {
        fs::create_dir_all(parent_dir(&path))?;
        File::create_new(&path)?.write_all(EXAMPLE)
    };
    match write() {
        Ok(()) => {
            let file = path.display();
            info!(%file, "No flags found; wrote an example to edit");
            Ok(path)
        }
        Err(source) => Err(Error::ExampleFlags { path, source }),
    }
}

/// The copy of the registry's tokens from an earlier run.
async fn load_registry_copy(store: &dyn Store) -> Option<Vec<u8>> {
    let copy = store.load(&RecordKey::Registry).await;
    copy.unwrap_or_else(|error| {
        if !error.is_unavailable() {
            warn!(error = error_chain(&error), "Cannot read the copy of the registry's tokens");
        }
        None
    })
}

/// Saves copies of the registry's tokens until dropped, so that a start can serve them while the
/// database is unavailable.
pub(super) async fn save_registry_copies(control: &ControlPlane, store: &dyn Store) {
    /// Delay before a failed save is retried.
    const RETRY: Duration = Duration::from_secs(5);
    let mut changes = control.subscribe_to_tokens();
    let (mut saved, mut log) = (None, SaveLog::new("The copy of the registry's tokens"));
    loop {
        changes.borrow_and_update();
        let copy = Bytes::from(control.token_snapshot());
        if saved.as_ref() != Some(&copy) {
            match store.save(&RecordKey::Registry, copy.clone()).await {
                Ok(()) => {
                    saved = Some(copy);
                    log.record_success();
                }
                Err(error) => {
                    log.record_failure(&error);
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}
