//! The client of a Redis or Valkey server, a Cluster, or a set of servers behind Sentinels.
//!
//! [`RedisClient`] runs commands, pipelines and scripts over one shared connection, and subscribes to
//! channels over connections of their own. It connects when the first command runs, limits how long
//! each step may take, and reconnects after a failure: at most one attempt at a time, with growing
//! delays in between, during which commands fail at once.
//!
//! It does not repeat a command whose outcome is unknown, because only the caller knows whether the
//! command may run twice. It does not know keys or their contents either; [`crate::store`] does.

mod client;
mod config;
mod connection;
mod connection_state;
mod error;

use std::time::Duration;

pub use self::{
    client::RedisClient,
    config::{Config, Credentials, Server, Timeouts, Tls, Topology},
    error::{ConfigError, Error},
};

/// A duration as commands and scripts take it, in whole milliseconds.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
