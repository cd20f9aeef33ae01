//! Parapet: an open-source edge for Unleash feature flags.

pub mod token;
