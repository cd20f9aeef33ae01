//! What a handler may know of the connection that a request came on.

use std::net::SocketAddr;

use crate::tls::Tls;

/// A connection, as far as requests are concerned.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Who is at the other end: the client, or a proxy that does not say whose connection it is.
    pub peer: SocketAddr,
    /// What was agreed on in the handshake, where the connection is encrypted.
    pub tls: Option<Tls>,
}
