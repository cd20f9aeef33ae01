//! Configuration of the HTTP server of one listener.

use ipnet::IpNet;

use super::connection_limits::ConnectionLimits;
use crate::tls;

/// Configuration of the HTTP server of one listener.
#[derive(Clone, Debug)]
pub struct Config {
    /// Limits of connections.
    pub limits: ConnectionLimits,
    /// Networks of the load balancers whose connections begin with a PROXY protocol header.
    pub load_balancers: Vec<IpNet>,
    /// TLS for all connections; `None` serves plain HTTP.
    pub tls: Option<tls::TlsAcceptor>,
}
