//! Offline mode: flags from a file, tokens from the configuration.

use std::sync::Arc;

use super::{
    configured_tokens::offline_tokens,
    mode::{Error, ModeParts},
    reload::Reloadable,
};
use crate::{
    config::OfflineConfig, served::Snapshots, store::MemoryStore, sync::file_source::FileSource,
    telemetry::ReadinessCondition,
};

/// Connects the components of offline mode.
pub(super) async fn build(
    offline: OfflineConfig,
    snapshots: &Snapshots,
    ready_when: ReadinessCondition,
) -> Result<ModeParts, Error> {
    let (tokens, environments) = offline_tokens(&offline);
    let path = offline.bootstrap_file;
    let files = FileSource::new(path, environments, snapshots.clone(), offline.reload_interval);
    let reloadable = Reloadable::Offline(files.reload_handle());
    ModeParts::from_files(
        "offline",
        files,
        tokens,
        Arc::new(MemoryStore::default()),
        ready_when,
        reloadable,
    )
    .await
}
