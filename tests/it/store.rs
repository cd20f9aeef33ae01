//! Stores on real servers: the contract that every store fulfils, and edges that start from them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parapet::redis_client::{Config, Credentials, RedisClient, Server, Timeouts, Tls, Topology};
use parapet::store::{
    Bucket, BucketStore, Cloud, Error, ProcessSlot, RecordKey, RedisStore, RedisStoreTimeouts,
    Store,
};
use parapet::token::Environment;
use zeroize::Zeroizing;

use crate::rig::{
    AzureServer, LogEvent, Parapet, RedisCluster, RedisSentinels, RedisServer, S3Server,
    ScriptedUpstream, Setup, free_port, wait_until,
};

mod contract;
mod edge_backups;
mod edges;
mod faults;
mod object_storage;
mod redis;

const TIMEOUT: Duration = Duration::from_secs(30);

/// A token of all projects, which upstreams of these tests know.
const TOKEN: &str = "*:development.store-0123456789abcdef";

/// An edge with this store; its disk is empty at each start.
fn edge(upstream_url: &str, store_url: &str) -> Setup {
    let edge = Parapet::edge(upstream_url).with_short_intervals().env("TOKENS", TOKEN);
    edge.env("PARAPET_STORE", store_url).flag("--drain-delay-seconds", "0")
}

/// Sets the variables of a cloud.
fn with_settings(setup: Setup, settings: Vec<(&str, String)>) -> Setup {
    settings.into_iter().fold(setup, |setup, (name, value)| setup.env(name.to_uppercase(), value))
}

/// A URL where nothing listens.
fn unused_url() -> String {
    format!("http://127.0.0.1:{}", free_port())
}

/// Waits until a store has records of flags and tokens.
async fn wait_until_filled(store: &dyn Store) {
    wait_until("flags and tokens are stored", TIMEOUT, async || {
        let keys = store.list().await.ok()?;
        let has_flags = keys.iter().any(|key| matches!(key, RecordKey::Flags(_)));
        (has_flags && keys.contains(&RecordKey::TokenCache)).then_some(())
    })
    .await;
}
