//! The settings of a client: which servers, how to authenticate, and how long to wait.

use std::{fmt, time::Duration};

use itertools::Itertools as _;
use zeroize::Zeroizing;

/// The settings of a [`RedisClient`](super::RedisClient). `Debug` omits user names and passwords.
#[derive(Clone, Debug)]
pub struct Config {
    /// The servers.
    pub topology: Topology,
    /// Authenticates at the data servers.
    pub credentials: Credentials,
    /// How to encrypt connections; `None` for plain TCP.
    pub tls: Option<Tls>,
    /// The number of the database; a Cluster has only number 0.
    pub database: u16,
    /// How long to wait.
    pub timeouts: Timeouts,
}

/// How the servers are organized.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Topology {
    /// One server.
    Single(Server),
    /// A Cluster. The other nodes are found through any of these.
    Cluster(Vec<Server>),
    /// A master that Sentinels elect.
    Sentinel {
        /// The Sentinels, in the order in which they are asked.
        sentinels: Vec<Server>,
        /// The name under which the Sentinels monitor the master.
        master: String,
        /// Authenticates at the Sentinels.
        credentials: Credentials,
    },
}

/// The address of a server. `Display` formats `host:port`.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Server {
    /// A name or an address; an IPv6 address has no brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

/// A user and a password, both optional. `Debug` omits them.
#[derive(Clone, Default, Eq, PartialEq)]
pub struct Credentials {
    /// The ACL user; `None` for the default user.
    pub username: Option<String>,
    /// The password.
    pub password: Option<Zeroizing<String>>,
}

/// How to verify the servers' certificates.
#[derive(Clone, Default, Eq, PartialEq)]
pub struct Tls {
    /// The certificates of the accepted authorities, in PEM; `None` for those that the system trusts.
    pub ca: Option<Vec<u8>>,
}

/// How long a client waits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Timeouts {
    /// Until one server has accepted a connection and its credentials.
    pub connect: Duration,
    /// Until a command is answered, once connected.
    pub command: Duration,
}

impl Default for Timeouts {
    /// 2 s each, which are the defaults of Unleash Edge.
    fn default() -> Self {
        Self { connect: Duration::from_secs(2), command: Duration::from_secs(2) }
    }
}

impl Config {
    /// The servers as a URL without credentials, for logs and errors.
    pub(super) fn location(&self) -> String {
        let scheme = if self.tls.is_some() { "rediss" } else { "redis" };
        let database = self.database;
        match &self.topology {
            Topology::Single(server) => format!("{scheme}://{server}/{database}"),
            Topology::Cluster(nodes) => format!("{scheme}+cluster://{}", nodes.iter().join(",")),
            Topology::Sentinel { sentinels, master, .. } => {
                format!("{scheme}+sentinel://{}/{master}/{database}", sentinels.iter().join(","))
            }
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

/// Names the kind of authorities, without their certificates.
impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.ca.is_some() { "Tls(own CA)" } else { "Tls(system)" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(host: &str, port: u16) -> Server {
        Server { host: host.to_owned(), port }
    }

    fn config(topology: Topology) -> Config {
        let secret = || Some(Zeroizing::new("s3cr3t".to_owned()));
        Config {
            topology,
            credentials: Credentials { username: Some("ann".to_owned()), password: secret() },
            tls: None,
            database: 2,
            timeouts: Timeouts::default(),
        }
    }

    #[test]
    fn location_names_the_servers() {
        let single = config(Topology::Single(server("::1", 6379)));
        assert_eq!(single.location(), "redis://[::1]:6379/2");
        let tls = Config { tls: Some(Tls::default()), ..single };
        assert_eq!(tls.location(), "rediss://[::1]:6379/2");
        let cluster = config(Topology::Cluster(vec![server("a", 1), server("b", 2)]));
        assert_eq!(cluster.location(), "redis+cluster://a:1,b:2");
        let sentinel = config(Topology::Sentinel {
            sentinels: vec![server("a", 1), server("b", 2)],
            master: "main".to_owned(),
            credentials: Credentials::default(),
        });
        assert_eq!(sentinel.location(), "redis+sentinel://a:1,b:2/main/2");
    }

    #[test]
    fn debug_omits_credentials() {
        let text = format!("{:?}", config(Topology::Single(server("a", 1))));
        assert!(!text.contains("s3cr3t") && !text.contains("ann"), "{text}");
    }
}
