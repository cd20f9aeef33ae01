//! The HTTP surface: listeners, routes and replies.
//!
//! A request goes from `listener` to the service of its port (`data`), is parsed to a `route`,
//! admitted, and answered by the module of its family; `reply` turns every outcome into a response
//! and is the only place that chooses status codes. State is owned by the services below.

pub mod access;
pub mod admin;
pub mod client;
pub mod coding;
pub mod conditional;
pub mod console;
pub mod cors;
pub mod data;
pub mod edge;
pub mod frontend;
pub mod guesses;
pub mod listener;
mod long;
pub mod meter;
pub mod ofrep;
pub mod ops;
pub mod payload;
pub mod redirect;
pub mod reply;
pub mod report;
pub mod route;
pub mod stop;
pub mod streaming;
