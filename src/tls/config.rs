//! The TLS settings of one listener.

use std::{path::PathBuf, time::Duration};

/// The TLS settings of one listener.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    /// The listener's name in metrics and logs, `data` or `admin`.
    pub listener: &'static str,
    /// Certificates with their keys, never empty. The server name of a handshake (SNI) selects one; the
    /// first is the default.
    pub pairs: Vec<Pair>,
    /// The lowest version that is negotiated.
    pub min_version: Version,
    /// Client certificates; `None` requests none.
    pub clients: Option<Clients>,
    /// The longest that a handshake may take, waiting for its turn included.
    pub handshake_timeout: Duration,
    /// How many handshakes are processed at once, so that they leave processors to other work; others wait
    /// for their turn. Above 0.
    pub max_handshakes: usize,
}

/// A certificate and its key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pair {
    /// The certificate chain (PEM), leaf first.
    pub certificate_file: PathBuf,
    /// The private key of the leaf (PEM).
    pub key_file: PathBuf,
}

/// Which client certificates are accepted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Clients {
    /// The authorities (PEM) that issue them.
    pub ca_file: PathBuf,
    /// Whether every client needs one.
    pub auth: ClientAuth,
    /// Revocation lists (PEM) of every authority in their chains.
    pub crl_file: Option<PathBuf>,
}

/// Whether clients need a certificate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ClientAuth {
    /// A handshake without one fails.
    Required,
    /// A handshake without one succeeds; one with a certificate that is not accepted fails.
    Optional,
}

impl ClientAuth {
    /// Reads `required` or `optional`.
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
    /// Reads `1.2` or `1.3`.
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
