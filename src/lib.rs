//! Parapet: an open-source edge for Unleash feature flags.

pub mod auth;
pub mod http;
pub mod snapshot;
pub mod sync;
pub mod token;
pub mod upstream;
pub mod usage;
pub mod wire;
