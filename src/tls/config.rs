//! The TLS configuration of one listener.

use std::{path::PathBuf, time::Duration};

/// The TLS configuration of one listener.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    /// The listener's name in metrics and logs, `data` or `admin`.
    pub listener: &'static str,
    /// Certificates with their keys; at least one. The server name of a handshake (SNI) selects one, and
    /// the first is the default.
    pub key_pairs: Vec<KeyPairFiles>,
    /// The minimum version.
    pub min_version: Version,
    /// Verification of client certificates; `None` requests none.
    pub client_verification: Option<ClientVerification>,
    /// The timeout of a handshake, including its time in the queue.
    pub handshake_timeout: Duration,
    /// The maximum number of handshakes that are processed at once, so that other work gets CPU time.
    /// Above 0. Further handshakes are queued.
    pub max_handshakes: usize,
}

/// The files of a certificate and its key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeyPairFiles {
    /// The certificate chain (PEM), leaf first.
    pub certificate_file: PathBuf,
    /// The private key of the leaf (PEM).
    pub key_file: PathBuf,
}

/// How client certificates are verified.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ClientVerification {
    /// The certificate authorities (PEM) that issue them.
    pub ca_file: PathBuf,
    /// Whether every client needs one.
    pub auth: ClientAuth,
    /// The revocation lists (PEM) of every authority in their chains.
    pub crl_file: Option<PathBuf>,
}

/// Whether clients need a certificate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ClientAuth {
    /// A handshake without one fails.
    Required,
    /// A handshake without one succeeds. A handshake with an invalid one fails.
    Optional,
}

impl ClientAuth {
    /// Parses `required` or `optional`.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "required" => Some(Self::Required),
            "optional" => Some(Self::Optional),
            _ => None,
        }
    }
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Version {
    /// TLS 1.2
    Tls12,
    /// TLS 1.3
    Tls13,
}

impl Version {
    /// Parses `1.2` or `1.3`.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "1.2" => Some(Self::Tls12),
            "1.3" => Some(Self::Tls13),
            _ => None,
        }
    }

    /// `1.2` or `1.3`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tls12 => "1.2",
            Self::Tls13 => "1.3",
        }
    }
}
