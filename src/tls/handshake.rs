//! The result of a handshake: the negotiated parameters, or the error.

use std::{io, sync::Arc, time::Duration};

use metrics::counter;
use rustls::{Error as TlsError, HandshakeKind, ProtocolVersion, ServerConnection};

use super::{client_verification::VerifiedClientCertificate, config::Version};

pub(super) const HANDSHAKES: &str = "parapet_tls_handshakes_total";

/// The parameters that a handshake negotiated.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NegotiatedTls {
    /// The version of TLS.
    pub version: Version,
    /// The application protocol (ALPN); `None` if the client offered none.
    pub alpn: Option<Alpn>,
    /// The verified client certificate; `None` if the client sent none.
    pub client_certificate: Option<Arc<VerifiedClientCertificate>>,
}

/// An application protocol over TLS.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Alpn {
    /// HTTP/2
    H2,
    /// HTTP/1.1
    Http1,
}

impl Alpn {
    /// All protocols, the preferred one first.
    pub(super) const ALL: [Self; 2] = [Self::H2, Self::Http1];

    /// The registered ALPN identifier.
    pub(super) fn as_bytes(self) -> &'static [u8] {
        match self {
            Self::H2 => b"h2",
            Self::Http1 => b"http/1.1",
        }
    }
}

impl NegotiatedTls {
    /// Reads the parameters of a connection whose handshake has succeeded.
    pub(super) fn from_connection(connection: &ServerConnection) -> Self {
        let version = match connection.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => Version::Tls13,
            _ => Version::Tls12,
        };
        let agreed = connection.alpn_protocol();
        let alpn = Alpn::ALL.into_iter().find(|it| agreed == Some(it.as_bytes()));
        let leaf = connection.peer_certificates().and_then(<[_]>::first);
        let client_certificate =
            leaf.map(|leaf| Arc::new(VerifiedClientCertificate::from_verified(leaf)));
        Self { version, alpn, client_certificate }
    }
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The handshake timed out.
    #[error("the TLS handshake took longer than {0:?}")]
    TimedOut(Duration),
    /// The client closed the connection.
    #[error("the client closed the connection during the TLS handshake")]
    Closed,
    /// The client sent no certificate, or an invalid one.
    #[error("the client sent no valid certificate")]
    ClientCertificate(#[source] TlsError),
    /// The two sides support no common parameters, or the connection failed.
    #[error("the TLS handshake failed")]
    Failed(#[source] io::Error),
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()) {
            Some(
                cause @ (TlsError::NoCertificatesPresented
                | TlsError::InvalidCertificate(_)
                | TlsError::InvalidCertRevocationList(_)),
            ) => Self::ClientCertificate(cause.clone()),
            Some(_) => Self::Failed(error),
            None => match error.kind() {
                io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::BrokenPipe => Self::Closed,
                _ => Self::Failed(error),
            },
        }
    }
}

/// Counts a handshake of a listener by version and outcome.
pub(super) fn record_handshake(
    listener: &'static str,
    outcome: Result<(&ServerConnection, &NegotiatedTls), &HandshakeError>,
) {
    let (version, outcome) = match outcome {
        Ok((connection, tls)) => {
            let is_resumed = connection.handshake_kind() == Some(HandshakeKind::Resumed);
            (tls.version.as_str(), if is_resumed { "resumed" } else { "full" })
        }
        Err(error) => {
            let outcome = match error {
                HandshakeError::TimedOut(_) => "timed_out",
                HandshakeError::Closed => "closed",
                HandshakeError::ClientCertificate(_) => "client_certificate",
                HandshakeError::Failed(_) => "failed",
            };
            ("none", outcome)
        }
    };
    counter!(HANDSHAKES, "listener" => listener, "version" => version, "outcome" => outcome)
        .increment(1);
}
