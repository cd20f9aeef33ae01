//! TLS for the listeners: certificates and their keys, client certificates, handshakes.
//!
//! All files of a listener are loaded and validated together ([`TlsAcceptor::new`]), and again when
//! their contents change ([`TlsAcceptor::watch_files`]). Invalid changes are logged, and the last valid
//! files stay in use. A handshake in progress finishes with the configuration it started with.
//!
//! This module accepts no connections and does not know HTTP. TLS towards upstream is configured in the
//! HTTP client, which shares only [`pem`].

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
    config::{ClientAuth, ClientVerification, Config, KeyPairFiles, Version},
    handshake::{Alpn, HandshakeError, NegotiatedTls},
    problem::{FileError, FileErrors, FileSetting},
    server::TlsAcceptor,
};

#[cfg(test)]
mod tests;
