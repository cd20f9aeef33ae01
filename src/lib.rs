//! Parapet: an open-source edge for Unleash feature flags.

pub mod answers;
pub mod app;
pub mod auth;
pub mod config;
pub mod control;
pub mod engine;
pub mod http;
pub mod probe;
pub mod snapshot;
pub mod store;
pub mod sync;
pub mod telemetry;
pub mod token;
pub mod upstream;
pub mod usage;
pub mod wire;
