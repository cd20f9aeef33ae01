//! Persists state across restarts: bytes by key, saved atomically.
//!
//! [`Store`] is the interface, which a directory, Redis, object storage and memory implement. A record
//! that is damaged, or written by a newer version, is set aside and reported; its owner continues without
//! it. The owners define the contents and must not store plaintext tokens.

pub mod edge_backup;
mod file;
mod key;
mod lock;
mod memory;
mod object;
mod object_lease;
mod object_storage;
mod outage_log;
mod record;
mod redis;
mod save_metrics;
mod store_trait;
#[cfg(test)]
mod tests;

pub use self::{
    edge_backup::EdgeBackup,
    file::{FileStore, OpenError},
    key::{ProcessSlot, RecordKey},
    memory::MemoryStore,
    object::BucketStore,
    object_storage::{Bucket, BucketError, Cloud},
    redis::{RedisStore, RedisStoreTimeouts},
    store_trait::{Error, RecordLock, Store},
};
