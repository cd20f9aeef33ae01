//! Opens the store that the configuration names. Nothing connects here.

use std::sync::Arc;

use tracing::warn;

use crate::{
    config::{BackupFolder, StoreConfig},
    redis_client::{self, RedisClient},
    store::{
        BucketError, BucketStore, EdgeBackup, FileStore, MemoryStore, OpenError, RedisStore, Store,
    },
    telemetry::error_chain,
};

/// A store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder is not writable.
    #[error(transparent)]
    Folder(#[from] OpenError),
    /// The settings of Redis cannot be used.
    #[error(transparent)]
    Redis(#[from] redis_client::ConfigError),
    /// The settings of object storage cannot be used.
    #[error(transparent)]
    Bucket(#[from] BucketError),
}

/// An open store, and the backup that Unleash Edge may have left in the same place.
#[derive(Debug)]
pub(super) struct OpenedStore {
    pub(super) store: Arc<dyn Store>,
    pub(super) edge_backup: EdgeBackup,
    /// The Redis that the store is in, for a fleet.
    pub(super) redis: Option<RedisClient>,
}

/// Opens a store. Falls back to memory if a folder is not writable and is only the default: Unleash Edge
/// starts in a container without a writable folder, and so must its replacement.
pub(super) fn open(config: &StoreConfig) -> Result<OpenedStore, StoreError> {
    let opened = match config {
        StoreConfig::Folder(folder) => OpenedStore {
            store: open_folder(folder)?,
            edge_backup: EdgeBackup::Folder(folder.path().to_owned()),
            redis: None,
        },
        StoreConfig::Redis(redis) => {
            let client = RedisClient::new(redis.client.clone())?;
            OpenedStore {
                store: Arc::new(RedisStore::new(client.clone(), &redis.prefix, redis.timeouts)),
                edge_backup: EdgeBackup::Redis(client.clone()),
                redis: Some(client),
            }
        }
        StoreConfig::Bucket(bucket) => OpenedStore {
            store: Arc::new(BucketStore::new(bucket)?),
            edge_backup: EdgeBackup::Bucket(bucket.clone()),
            redis: None,
        },
    };
    Ok(opened)
}

fn open_folder(folder: &BackupFolder) -> Result<Arc<dyn Store>, OpenError> {
    match (FileStore::open(folder.path()), folder) {
        (Ok(store), _) => Ok(Arc::new(store)),
        (Err(error), BackupFolder::Configured(_)) => Err(error),
        (Err(error), BackupFolder::Default(_)) => {
            warn!(
                error = error_chain(&error),
                "State cannot be stored: the next start needs upstream for flags and tokens, and usage still unsent at shutdown is lost. Name a writable folder with --backup-folder, or a store with --store"
            );
            Ok(Arc::new(MemoryStore::default()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::RecordKey;

    #[tokio::test]
    async fn only_a_configured_folder_must_be_writable() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let nowhere = file.path().join("backup");
        open_folder(&BackupFolder::Configured(nowhere.clone())).expect_err("a file is in the way");
        let store = open_folder(&BackupFolder::Default(nowhere)).expect("memory");
        store.save(&RecordKey::TokenCache, "x".into()).await.expect("save");

        let folder = tempfile::tempdir().expect("folder");
        open_folder(&BackupFolder::Default(folder.path().join("backup"))).expect("store");
        assert!(folder.path().join("backup").is_dir());
    }
}
