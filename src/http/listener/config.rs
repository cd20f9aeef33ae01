//! How a listener takes connections.

use ipnet::IpNet;

use super::limits::Limits;
use crate::tls;

/// How a listener takes connections.
#[derive(Clone, Debug)]
pub struct Config {
    /// What connections may take.
    pub limits: Limits,
    /// The load balancers that begin connections with the PROXY protocol.
    pub balancers: Vec<IpNet>,
    /// What encrypts connections.
    pub tls: Option<tls::Server>,
}
