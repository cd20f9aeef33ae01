//! What a handler may know of the connection that a request came on.

use std::net::SocketAddr;

/// A connection, as far as requests are concerned.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Who is at the other end.
    pub peer: SocketAddr,
}

impl ConnectionInfo {
    /// A connection without TLS.
    pub fn plain(peer: SocketAddr) -> Self {
        Self { peer }
    }
}
