//! The HTTP API: routes, handlers and responses.
//!
//! The server passes each request to the service of its port: [`sdk`] or [`admin`]. The service matches
//! the path to a [`route`], authenticates the token and calls the handler of that API. [`response`]
//! builds every response and is the only module that chooses status codes. This module owns no state:
//! the services below it do.

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
