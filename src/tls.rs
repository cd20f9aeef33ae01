//! TLS for the listeners: certificates and their keys, client certificates, handshakes.
//!
//! All files of a listener are loaded and checked together ([`Server::new`]), and again when their
//! contents change ([`Server::run`]). A change that cannot be used is reported, and what was loaded last
//! stays in use. Handshakes under way finish with the configuration that they began with.
//!
//! Nothing here accepts connections or knows HTTP. TLS towards upstream is the HTTP client's business;
//! it shares [`pem`] only.

mod certificate;
mod client;
mod config;
mod handshake;
mod load;
pub mod pem;
mod problem;
mod resolver;
mod server;
mod watch;

pub use self::{
    certificate::Certificate,
    client::ClientCertificate,
    config::{ClientAuth, Clients, Config, Pair, Version},
    handshake::{Alpn, HandshakeError, Tls},
    problem::{Problem, Problems, Setting},
    server::Server,
};

#[cfg(test)]
mod tests;
