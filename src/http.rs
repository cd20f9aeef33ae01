//! The HTTP API: routes, handlers and responses.
//!
//! The server passes each request to the service of its port: [`sdk`] or [`admin`]. The service matches
//! the path to one of the [`routes`], authorizes the token ([`authorizer`]) and calls the handler of that
//! API. [`response`] builds every response and is the only module that chooses status codes. This module
//! owns no state: the services below it do.

pub mod admin;
pub mod authorizer;
pub mod client_address;
pub mod client_api;
pub mod conditional;
pub mod console;
pub mod content_encoding;
pub mod cors;
mod cpu_bound;
pub mod failed_request_limiter;
pub mod frontend_api;
pub mod health;
pub mod https_redirect;
pub mod metrics_ingest;
pub mod ofrep;
pub mod request_body;
mod request_log;
pub mod request_metrics;
pub mod response;
pub mod routes;
pub mod sdk;
pub mod streaming;
pub mod token_validation;
