//! The validated configuration, from which the rest of the program is built.
//!
//! No field is an `Option` that means "default", no value needs further validation, and `Debug` shows no
//! secret. Values are collected in `raw` and validated in `from_raw`, not here.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use reqwest::{Url, header::HeaderName};

use super::{
    manage::{ManageTask, RemoteServer},
    settings_digests::SettingsDigests,
};
use ipnet::IpNet;

use crate::{
    auth, control_plane, fleet,
    http::{client_address, cors, ofrep::StreamTicketKey, routes::OptionalEndpoint, streaming},
    redis_client,
    server::ConnectionLimits,
    store::{Bucket, RedisStoreTimeouts},
    sync, telemetry, tls,
    token::{Environment, Token},
    upstream, usage,
};

/// The configuration of a serving instance.
#[derive(Clone, Debug)]
pub struct Config {
    /// The source of flags and token validation, and the destination of usage.
    pub mode: Mode,
    /// The listener for SDKs.
    pub data: DataListenerConfig,
    /// The listener for operators.
    pub admin: AdminListenerConfig,
    /// Intervals and capacity of the token cache.
    pub auth: auth::Config,
    /// Interval and bound of usage reports.
    pub usage: usage::Config,
    /// Log format and filter.
    pub log: telemetry::Config,
    /// The directory where state is stored between runs.
    pub data_dir: PathBuf,
    /// The timing of a shutdown.
    pub shutdown: ShutdownConfig,
    /// The names under which this instance reports.
    pub identity: InstanceInfo,
    /// Warnings for the operator, one sentence each, to be logged at the start.
    pub warnings: Vec<String>,
    /// Digests of the effective values, to be compared with those of a later configuration.
    pub settings_digests: SettingsDigests,
}

/// The source of flags and token validation, and the destination of usage.
#[derive(Clone, Debug)]
pub enum Mode {
    /// In front of an Unleash server.
    Edge(Box<EdgeConfig>),
    /// Flags from a file and a fixed list of tokens; usage is not reported.
    Offline(OfflineConfig),
    /// A server without upstream: flags from files, accounts and tokens in a database.
    Standalone(Box<StandaloneConfig>),
}

/// The configuration of edge mode, in front of an Unleash server.
#[derive(Clone, Debug)]
pub struct EdgeConfig {
    /// The connection to upstream.
    pub upstream: upstream::Config,
    /// The tokens for upstream.
    pub credentials: Credentials,
    /// Polling and streaming of flags.
    pub sync: sync::Config,
    /// Where flags and token digests are stored, which allow a start without upstream.
    pub store: StoreConfig,
    /// The fleet that this instance is part of; only with an admin token and a Redis as the store.
    pub fleet: Option<fleet::Config>,
    /// Whether the leader of the fleet sends the usage of all instances.
    pub shares_usage: bool,
    /// Whether upstream's admin API is relayed.
    pub admin_relay: bool,
}

/// Where state is stored between runs.
#[derive(Clone, Debug)]
pub enum StoreConfig {
    /// In a directory.
    Folder(BackupFolder),
    /// In Redis or Valkey.
    Redis(Box<RedisStoreConfig>),
    /// In object storage.
    Bucket(Bucket),
}

/// A store in Redis or Valkey.
#[derive(Clone, Debug)]
pub struct RedisStoreConfig {
    /// The servers.
    pub client: redis_client::Config,
    /// The start of all keys.
    pub prefix: String,
    /// How long loads and saves may take.
    pub timeouts: RedisStoreTimeouts,
}

/// The directory in which an edge stores its backup.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum BackupFolder {
    /// Set by the operator; it must be writable.
    Configured(PathBuf),
    /// The default; it need not be writable.
    Default(PathBuf),
}

impl BackupFolder {
    /// The path of the directory.
    pub fn path(&self) -> &Path {
        match self {
            Self::Configured(path) | Self::Default(path) => path,
        }
    }
}

/// The tokens with which the edge fetches flags and sends usage.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// An admin token, exchanged for one backend token per environment.
    Admin {
        /// The admin token.
        token: Token,
        /// The file that contains it; read again when it changes.
        file: Option<PathBuf>,
        /// The name that all edges of this deployment share; their tokens are named `parapet-<fleet>`.
        fleet: String,
        /// The environments to serve; `None` is all that upstream has enabled.
        environments: Option<BTreeSet<Environment>>,
    },
    /// Backend tokens. If the list is empty, each environment is fetched with the first of its SDK
    /// tokens that upstream finds valid.
    BackendTokens(Vec<Token>),
}

/// The configuration of offline mode: flags from a file, and a fixed list of tokens.
#[derive(Clone, Debug)]
pub struct OfflineConfig {
    /// The file with the flags.
    pub bootstrap_file: PathBuf,
    /// Tokens that may read flag configuration.
    pub client_tokens: Vec<Token>,
    /// Tokens that may read evaluated flags.
    pub frontend_tokens: Vec<Token>,
    /// Tokens for the admin listener.
    pub admin_tokens: Vec<Token>,
    /// The interval at which the file is read again even if no change was detected; `None` is never.
    pub reload_interval: Option<Duration>,
}

/// The configuration of standalone mode: a server without upstream.
#[derive(Clone, Debug)]
pub struct StandaloneConfig {
    /// The file or folder of flags.
    pub flags: FlagsPath,
    /// The environments that a single file of flags serves, in addition to those of the tokens that exist
    /// at the start.
    pub environments: BTreeSet<Environment>,
    /// Where state is stored beside the database.
    pub store: StoreConfig,
    /// Accounts and tokens.
    pub control: control_plane::Config,
}

/// The path of the flags in standalone mode.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FlagsPath {
    /// A file, or a folder of files.
    Existing(PathBuf),
    /// An example is to be written to this file: no path is configured, the default does not exist, and
    /// this is the first start.
    Example(PathBuf),
}

/// The listener for SDKs.
#[derive(Clone, Debug)]
pub struct DataListenerConfig {
    /// The address to listen on, with TLS if `tls` is set. `[::]` includes IPv4, and means `0.0.0.0` on
    /// a machine without IPv6.
    pub address: SocketAddr,
    /// Certificates and their settings; `None` is plain HTTP.
    pub tls: Option<tls::Config>,
    /// The address where plain HTTP requests are redirected to `address`; only with `tls`.
    pub redirect_from: Option<SocketAddr>,
    /// The prefix of every path: empty, or `/…` without a final slash.
    pub base_path: String,
    /// The header with the token of an SDK.
    pub token_header: HeaderName,
    /// The rules for browsers on other origins.
    pub cors: cors::Config,
    /// The addresses that are served, and the trusted proxies.
    pub access: client_address::Config,
    /// Endpoints that respond as if they did not exist.
    pub disabled_endpoints: BTreeSet<OptionalEndpoint>,
    /// Limits and timeouts of connections.
    pub connection_limits: ConnectionLimits,
    /// Whether the operator has set the maximum number of connections; otherwise it is the default.
    pub has_explicit_max_connections: bool,
    /// Networks of load balancers whose connections begin with the PROXY protocol.
    pub load_balancers: Vec<IpNet>,
    /// The maximum size of a request body, in bytes, after decompression.
    pub max_body_bytes: usize,
    /// The timeout of a request, from its head until its body has been received. It is the longest
    /// timeout of a service.
    pub request_timeout: Duration,
    /// Limits and lifetime of streams.
    pub streams: streaming::Config,
    /// Signs the event stream URLs of OpenFeature providers. `None` derives the key from the admin
    /// token, or without one generates a key for this run.
    pub stream_ticket_key: Option<StreamTicketKey>,
}

/// The listener for operators.
#[derive(Clone, Debug)]
pub struct AdminListenerConfig {
    /// The address to listen on, with TLS if `tls` is set.
    pub address: SocketAddr,
    /// Certificates and their settings; `None` is plain HTTP.
    pub tls: Option<tls::Config>,
    /// Networks of load balancers whose connections begin with the PROXY protocol.
    pub load_balancers: Vec<IpNet>,
}

/// The timing of a shutdown.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ShutdownConfig {
    /// How long requests are still accepted after readiness is withdrawn.
    pub drain_delay: Duration,
    /// The timeout after that for requests in progress and the last usage.
    pub timeout: Duration,
}

/// The names under which this instance reports to upstream and in its instance data.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct InstanceInfo {
    /// The name that all instances of a deployment share.
    pub app_name: String,
    /// The name of this instance.
    pub instance_id: String,
    /// The kind of hosting, as Unleash names it: `self-hosted`, `hosted` or `enterprise-self-hosted`.
    pub hosting: String,
    /// The region that it runs in, if known.
    pub region: Option<String>,
}

/// The options of the `health` and `ready` commands.
#[derive(Clone, Debug)]
pub struct ProbeOptions {
    /// The full URL of the endpoint.
    pub url: Url,
    /// The certificates to accept.
    pub trust: ProbeTrust,
}

/// The certificates that a probe accepts.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ProbeTrust {
    /// Certificates for the host name, issued by an authority of the platform or of a file (PEM).
    Platform(Option<PathBuf>),
    /// Certificates for any name, issued by an authority of a file (PEM): the probe stays on this
    /// machine.
    Authority(PathBuf),
    /// Any certificate: the probe stays on this machine and sends no secret.
    Any,
}

/// The options of the `token` and `account` commands.
#[derive(Clone, Debug)]
pub struct ManageOptions {
    /// The database or server to work on.
    pub target: Target,
    /// The task.
    pub task: ManageTask,
    /// Whether the result is printed as JSON.
    pub json: bool,
}

/// The database or server where tokens and accounts are managed.
#[derive(Clone, Debug)]
pub enum Target {
    /// The database of a standalone instance.
    Database(control_plane::DatabaseLocation),
    /// A running server.
    Server(RemoteServer),
}

/// The options of the `backup` and `restore` commands.
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// Backup or restore.
    pub action: BackupAction,
    /// The file of the backup.
    pub file: PathBuf,
    /// Whether existing data may be replaced: the file, or the contents of the database.
    pub replace: bool,
    /// The database.
    pub location: control_plane::DatabaseLocation,
}

/// Writing a backup, or restoring it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BackupAction {
    /// `backup`
    Backup,
    /// `restore`
    Restore,
}

/// The options of the `explain` command.
#[derive(Clone, Debug)]
pub struct ExplainOptions {
    /// The file with the flags, or the folder with one file per environment.
    pub flags: PathBuf,
    /// The name of the flag.
    pub flag: String,
    /// The environment of the flags.
    pub environment: Environment,
    /// The context's `userId`.
    pub user_id: Option<String>,
    /// The context's `sessionId`.
    pub session_id: Option<String>,
    /// The context's `remoteAddress`.
    pub remote_address: Option<String>,
    /// Other fields of the context.
    pub properties: Vec<(String, String)>,
    /// The time; `None` is now.
    pub at: Option<Timestamp>,
    /// Whether to print JSON instead of text.
    pub json: bool,
}
