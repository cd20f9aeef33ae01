//! TLS for the listeners: certificates and their keys, client certificates, handshakes.
//!
//! All files of a listener are loaded and validated together ([`TlsAcceptor::new`]), and again when
//! their contents change ([`TlsAcceptor::watch_files`]). Invalid changes are logged, and the last valid
//! files stay in use. A handshake in progress finishes with the configuration it started with.
//!
//! This module accepts no connections and does not know HTTP. TLS towards upstream is configured in the
//! HTTP client, which shares only [`pem`].

mod acceptor;
mod certificate;
mod client_verification;
mod config;
mod file_error;
mod handshake;
mod load;
pub mod pem;
mod sni_resolver;
mod watch;

pub use self::{
    acceptor::TlsAcceptor,
    certificate::Certificate,
    client_verification::VerifiedClientCertificate,
    config::{ClientAuth, ClientVerification, Config, KeyPairFiles, Version},
    file_error::{FileError, FileErrors, FileSetting},
    handshake::{Alpn, HandshakeError, NegotiatedTls},
};

#[cfg(test)]
mod tests;
