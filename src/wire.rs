//! Unleash JSON as it is on the network: the only place that derives serde for Unleash's shapes.
//!
//! Reading is lenient where servers and SDKs differ, and what is passed on keeps fields unknown
//! here. Nothing is judged or kept.

pub mod admin;
pub mod context;
pub mod delta;
pub mod excerpt;
pub mod explain;
pub mod features;
pub mod instant;
pub mod ofrep;
pub mod person;
pub mod sse;
pub mod text;
pub mod tokens;
pub mod usage;
