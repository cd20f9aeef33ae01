//! Opens connections, according to how the servers are organized.

use std::{fmt, future::Future, io, time::Duration};

use rand::seq::SliceRandom as _;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, IntoConnectionInfo as _,
    Pipeline, RedisConnectionInfo, RedisError, RedisFuture, RedisResult, TlsCertificates, TlsMode,
    Value,
    aio::{ConnectionLike, MultiplexedConnection, PubSub},
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
    sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType},
};
use tokio::time::timeout;

use super::config::{Config, Credentials, Server, Timeouts, Tls, Topology};

/// An open connection, which any number of commands share.
#[derive(Clone)]
pub(super) enum Connection {
    /// To one server.
    Server(MultiplexedConnection),
    /// To the nodes of a Cluster.
    Cluster(ClusterConnection),
}

/// Opens connections.
#[derive(Clone)]
pub(super) struct Connector {
    target: Target,
    timeouts: Timeouts,
}

#[derive(Clone)]
enum Target {
    Server(Box<Client>),
    Cluster { client: Box<ClusterClient>, nodes: Vec<Client> },
    Sentinel(Box<SentinelTarget>),
}

/// The parts of a [`SentinelClient`], which cannot be shared.
#[derive(Clone)]
struct SentinelTarget {
    sentinels: Vec<ConnectionAddr>,
    master: String,
    sentinel_credentials: Credentials,
    credentials: Credentials,
    tls: Option<Tls>,
    database: u16,
}

impl Connector {
    /// Checks the settings; connects to nothing.
    pub(super) fn new(config: Config) -> RedisResult<Self> {
        let Config { topology, credentials, tls, database, timeouts } = config;
        let client = |server: &Server| {
            let settings = connection_settings(&credentials, database);
            let info = address(server, tls.as_ref()).into_connection_info()?;
            let info: ConnectionInfo = info.set_redis_settings(settings);
            match &tls {
                Some(tls) => Client::build_with_tls(info, certificates(tls)),
                None => Client::open(info),
            }
        };
        let target = match topology {
            Topology::Single(server) => Target::Server(Box::new(client(&server)?)),
            Topology::Cluster(nodes) => {
                let nodes: Vec<_> = nodes.iter().map(client).collect::<RedisResult<_>>()?;
                let infos = nodes.iter().map(|node| node.get_connection_info().clone());
                let mut builder = ClusterClient::builder(infos)
                    .connection_timeout(timeouts.connect)
                    .response_timeout(timeouts.command)
                    .retries(CLUSTER_RETRIES);
                if let Some(tls) = &tls {
                    builder = builder.tls(TlsMode::Secure).certs(certificates(tls));
                }
                Target::Cluster { client: Box::new(builder.build()?), nodes }
            }
            Topology::Sentinel { sentinels, master, credentials: sentinel_credentials } => {
                let sentinels = sentinels.iter().map(|it| address(it, tls.as_ref())).collect();
                let target = SentinelTarget {
                    sentinels,
                    master,
                    sentinel_credentials,
                    credentials,
                    tls,
                    database,
                };
                target.client()?;
                Target::Sentinel(Box::new(target))
            }
        };
        Ok(Self { target, timeouts })
    }

    /// Opens a connection for commands.
    pub(super) async fn open(&self) -> RedisResult<Connection> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeouts.connect))
            .set_response_timeout(Some(self.timeouts.command));
        let open = async {
            Ok(match &self.target {
                Target::Server(client) => Connection::Server(
                    client.get_multiplexed_async_connection_with_config(&config).await?,
                ),
                Target::Cluster { client, .. } => {
                    Connection::Cluster(client.get_async_connection().await?)
                }
                Target::Sentinel(target) => Connection::Server(
                    target.client()?.get_async_connection_with_config(&config).await?,
                ),
            })
        };
        self.within_deadline(open).await
    }

    /// Opens a connection for subscriptions. In a Cluster each node delivers every message.
    pub(super) async fn open_pubsub(&self) -> RedisResult<PubSub> {
        let open = async {
            match &self.target {
                Target::Server(client) => client.get_async_pubsub().await,
                Target::Cluster { nodes, .. } => open_first(nodes, self.timeouts.connect).await,
                Target::Sentinel(target) => {
                    target.client()?.async_get_client().await?.get_async_pubsub().await
                }
            }
        };
        self.within_deadline(open).await
    }

    /// How long connecting may take: several servers are tried one after the other.
    fn deadline(&self) -> Duration {
        let attempts = match &self.target {
            Target::Server(_) => 1,
            Target::Cluster { nodes, .. } => nodes.len(),
            // One more to check the master's role, and one to connect to it.
            Target::Sentinel(target) => target.sentinels.len() + 2,
        };
        self.timeouts.connect * u32::try_from(attempts).unwrap_or(u32::MAX)
    }

    async fn within_deadline<T>(
        &self,
        open: impl Future<Output = RedisResult<T>>,
    ) -> RedisResult<T> {
        let deadline = self.deadline();
        timeout(deadline, open).await.unwrap_or_else(|_| Err(timeout_error(deadline)))
    }
}

/// How often the library sends a command to another node of a Cluster if a node redirects it or is
/// away.
const CLUSTER_RETRIES: u32 = 2;

impl SentinelTarget {
    fn client(&self) -> RedisResult<SentinelClient> {
        let sentinels = self.sentinels.iter().cloned();
        let role = SentinelServerType::Master;
        let mut builder = SentinelClientBuilder::new(sentinels, self.master.clone(), role)?
            .set_client_to_redis_db(i64::from(self.database));
        if let Some(username) = &self.credentials.username {
            builder = builder.set_client_to_redis_username(username);
        }
        if let Some(password) = &self.credentials.password {
            builder = builder.set_client_to_redis_password(password.as_str());
        }
        if let Some(username) = &self.sentinel_credentials.username {
            builder = builder.set_client_to_sentinel_username(username);
        }
        if let Some(password) = &self.sentinel_credentials.password {
            builder = builder.set_client_to_sentinel_password(password.as_str());
        }
        if let Some(tls) = &self.tls {
            builder = builder
                .set_client_to_redis_tls_mode(TlsMode::Secure)
                .set_client_to_sentinel_tls_mode(TlsMode::Secure)
                .set_client_to_redis_certificates(certificates(tls))
                .set_client_to_sentinel_certificates(certificates(tls));
        }
        builder.build()
    }
}

/// The subscription connection of the first node that accepts one, in random order.
async fn open_first(nodes: &[Client], deadline: Duration) -> RedisResult<PubSub> {
    let mut nodes: Vec<_> = nodes.iter().collect();
    nodes.shuffle(&mut rand::rng());
    let mut failure = None;
    for node in nodes {
        let opened = timeout(deadline, node.get_async_pubsub()).await;
        match opened.unwrap_or_else(|_| Err(timeout_error(deadline))) {
            Ok(pubsub) => return Ok(pubsub),
            Err(error) => failure = Some(error),
        }
    }
    Err(failure.unwrap_or_else(|| io::Error::from(io::ErrorKind::NotFound).into()))
}

fn address(server: &Server, tls: Option<&Tls>) -> ConnectionAddr {
    let Server { host, port } = server.clone();
    match tls {
        Some(_) => ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None },
        None => ConnectionAddr::Tcp(host, port),
    }
}

fn connection_settings(credentials: &Credentials, database: u16) -> RedisConnectionInfo {
    let mut settings = RedisConnectionInfo::default().set_db(i64::from(database));
    if let Some(username) = &credentials.username {
        settings = settings.set_username(username);
    }
    if let Some(password) = &credentials.password {
        settings = settings.set_password(password.as_str());
    }
    settings
}

fn certificates(tls: &Tls) -> TlsCertificates {
    TlsCertificates { client_tls: None, root_cert: tls.ca.clone() }
}

fn timeout_error(deadline: Duration) -> RedisError {
    let text = format!("no connection within {deadline:?}");
    io::Error::new(io::ErrorKind::TimedOut, text).into()
}

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::Server(connection) => connection.req_packed_command(command),
            Self::Cluster(connection) => connection.req_packed_command(command),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::Server(connection) => connection.req_packed_commands(pipeline, offset, count),
            Self::Cluster(connection) => connection.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::Server(connection) => connection.get_db(),
            Self::Cluster(connection) => connection.get_db(),
        }
    }
}

/// Omits the settings, which include credentials.
impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}
