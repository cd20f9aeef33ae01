//! Connection details for request handlers.

use std::net::SocketAddr;

use crate::tls::NegotiatedTls;

/// The connection that a request arrived on.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// The client's address, or that of a proxy that does not name its client.
    pub peer: SocketAddr,
    /// The result of the TLS handshake; `None` for a plain connection.
    pub tls: Option<NegotiatedTls>,
}
