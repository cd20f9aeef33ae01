//! Unleash's JSON on the network. No other module derives serde for Unleash's shapes.
//!
//! Parsing is lenient where servers and SDKs differ ([`lenient`]). Data that is forwarded keeps fields
//! unknown here.
//! This module evaluates and stores nothing.

pub mod admin;
pub mod byte_order_mark;
pub mod context;
pub mod delta;
pub mod event_log;
pub mod excerpt;
pub mod explain;
pub mod features;
pub mod lenient;
pub mod ofrep;
pub mod rfc3339;
pub mod sse;
pub mod tokens;
pub mod usage;
pub mod user;
