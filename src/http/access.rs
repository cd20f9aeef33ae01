//! Who may connect, by address: allow and deny lists, and which proxies are believed.

use ipnet::IpNet;

/// Which addresses are served.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// When not empty, only these networks are served.
    pub allow: Vec<IpNet>,
    /// These networks are never served.
    pub deny: Vec<IpNet>,
    /// Whose word on the client's address is believed.
    pub proxies: Proxies,
}

/// Whose `Forwarded` and `X-Forwarded-For` headers are believed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Proxies {
    /// Nobody's: the client is the peer.
    #[default]
    None,
    /// Anybody's: the leftmost address is the client (`--trust-proxy` alone).
    Any,
    /// Those of these networks: the rightmost address outside them is the client.
    Only(Vec<IpNet>),
}
