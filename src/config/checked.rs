//! The checked configuration: what the rest of the program is built from.
//!
//! No field is an `Option` that means "default", nothing needs a second look, and `Debug` shows no
//! secret. How the values were found is `settings`' and `check`'s business.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use reqwest::{Url, header::HeaderName};

use super::{
    manage::{Server, Task},
    settings::Effective,
};
use ipnet::IpNet;

use crate::{
    auth, control,
    http::{access, cors, listener::Limits, ofrep::TicketKey, route::Endpoint, streaming},
    sync, telemetry, tls,
    token::{Environment, Token},
    upstream, usage,
};

/// Everything that a running Parapet is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where flags, verdicts and usage come from and go to.
    pub mode: Mode,
    /// The listener that SDKs talk to.
    pub data: DataListener,
    /// The listener for operators.
    pub admin: AdminListener,
    /// How verdicts on tokens are kept.
    pub auth: auth::Config,
    /// How usage is kept and sent.
    pub usage: usage::Config,
    /// What is logged, and how.
    pub log: telemetry::Config,
    /// Where state is kept between runs.
    pub data_dir: PathBuf,
    /// How a run ends.
    pub shutdown: Shutdown,
    /// Who this instance says it is.
    pub identity: Identity,
    /// What the operator should know, one sentence each; to be logged at the start.
    pub warnings: Vec<String>,
    /// Which values are in effect, to be compared with those of a later configuration.
    pub effective: Effective,
}

/// Where flags come from, who vouches for tokens, and where usage goes.
#[derive(Clone, Debug)]
pub enum Mode {
    /// In front of an Unleash server.
    Edge(Box<Edge>),
    /// Flags of a file, tokens that are given, and nothing else.
    Offline(Offline),
    /// A server of its own.
    Standalone(Standalone),
}

/// In front of an Unleash server.
#[derive(Clone, Debug)]
pub struct Edge {
    /// How to reach it.
    pub upstream: upstream::Config,
    /// In whose name.
    pub credentials: Credentials,
    /// How flags are kept current.
    pub sync: sync::Config,
    /// Where flags and digests of tokens are kept for a start without upstream.
    pub backup_folder: Folder,
    /// Whether upstream's admin API is passed on.
    pub admin_relay: bool,
}

/// A folder to keep state in.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Folder {
    /// The operator's choice, which must do.
    Named(PathBuf),
    /// Nobody's choice, which a machine need not have.
    Default(PathBuf),
}

impl Folder {
    /// Where it is.
    pub fn path(&self) -> &Path {
        match self {
            Self::Named(path) | Self::Default(path) => path,
        }
    }
}

/// In whose name the edge fetches flags and sends usage.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// An admin token, exchanged for one backend token per environment.
    Admin {
        /// The admin token.
        token: Token,
        /// The file that it is read from, again when that changes.
        file: Option<PathBuf>,
        /// The name that all edges of this deployment share; their tokens are `parapet-<fleet>`.
        fleet: String,
        /// Which environments are served; `None` is all that upstream has enabled.
        environments: Option<BTreeSet<Environment>>,
    },
    /// These backend tokens. When there are none, the first SDK token of an environment that
    /// upstream finds valid is used for it.
    Given(Vec<Token>),
}

/// Flags of a file, tokens of the command line, and nothing else.
#[derive(Clone, Debug)]
pub struct Offline {
    /// The file of flags.
    pub bootstrap_file: PathBuf,
    /// Tokens that may read flag configuration.
    pub client_tokens: Vec<Token>,
    /// Tokens that may read evaluated flags.
    pub frontend_tokens: Vec<Token>,
    /// Tokens that open the admin listener.
    pub admin_tokens: Vec<Token>,
    /// How often the file is read again although nothing told of a change; `None` is never.
    pub reload_interval: Option<Duration>,
}

/// A server of its own.
#[derive(Clone, Debug)]
pub struct Standalone {
    /// Where flags are.
    pub flags: FlagsPath,
    /// Which environments one file of flags serves, besides those that the first tokens name.
    pub environments: BTreeSet<Environment>,
    /// Accounts and tokens.
    pub control: control::Config,
}

/// Where the flags of a standalone are.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FlagsPath {
    /// A file, or a folder of files.
    Existing(PathBuf),
    /// Where nobody has named a place, nothing is at the default one, and this is the first start: an
    /// example is to be written there.
    Example(PathBuf),
}

/// The listener that SDKs talk to.
#[derive(Clone, Debug)]
pub struct DataListener {
    /// Where it listens, over TLS with `tls`. `[::]` means IPv4 too; where the machine has no IPv6, `0.0.0.0`.
    pub address: SocketAddr,
    /// Certificates; without them HTTP is not encrypted.
    pub tls: Option<tls::Config>,
    /// Where unencrypted requests are redirected to `address`; only with `tls`.
    pub redirect_from: Option<SocketAddr>,
    /// What precedes every path: empty, or `/…` without a final slash.
    pub base_path: String,
    /// The header in which SDKs present their token.
    pub token_header: HeaderName,
    /// What browsers on other origins may do.
    pub cors: cors::Config,
    /// Which addresses are served.
    pub access: access::Config,
    /// Endpoints that answer as if they did not exist.
    pub disabled: BTreeSet<Endpoint>,
    /// What connections may take.
    pub limits: Limits,
    /// Whether how many there may be was given, and is not the default.
    pub are_connections_given: bool,
    /// Those whose PROXY protocol is read.
    pub balancers: Vec<IpNet>,
    /// The largest request body, in bytes, after decompression.
    pub body_bytes: usize,
    /// The longest that one request may take, from its head until its body is there; services wait
    /// for nothing else as long.
    pub request_timeout: Duration,
    /// How streams are kept.
    pub streams: streaming::Config,
    /// Seals the tickets of OpenFeature's providers; `None` derives the key from the admin token, or
    /// without one draws a key for this run.
    pub ticket_key: Option<TicketKey>,
}

/// The listener for operators.
#[derive(Clone, Debug)]
pub struct AdminListener {
    /// Where it listens, over TLS with `tls`.
    pub address: SocketAddr,
    /// Certificates; without them HTTP is not encrypted.
    pub tls: Option<tls::Config>,
    /// Those whose PROXY protocol is read.
    pub balancers: Vec<IpNet>,
}

/// How a run ends.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Shutdown {
    /// How long requests are still accepted after readiness was withdrawn.
    pub drain_delay: Duration,
    /// The longest that requests under way and the last usage may then take.
    pub timeout: Duration,
}

/// Who this instance says it is, to upstream and in its instance data.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Identity {
    /// The name that all instances of a deployment share.
    pub app_name: String,
    /// The name of this instance.
    pub instance_id: String,
    /// Who runs it, in Unleash's words: `self-hosted`, `hosted` or `enterprise-self-hosted`.
    pub hosting: String,
    /// The region that it runs in, where known.
    pub region: Option<String>,
}

/// What the `health` and `ready` commands ask, and whom.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The full address of the endpoint.
    pub url: Url,
    /// Which certificates are accepted.
    pub trust: Trust,
}

/// Which certificates a probe accepts.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Trust {
    /// Those for the host's name by the platform's authorities, and by those of a file (PEM).
    Platform(Option<PathBuf>),
    /// Those by the authorities of a file (PEM), for whatever name: it is this machine that is asked.
    Authority(PathBuf),
    /// Any: it is this machine that is asked, and nothing secret is sent.
    Any,
}

/// What `token` and `account` do, and where.
#[derive(Clone, Debug)]
pub struct Manage {
    /// Where.
    pub place: Place,
    /// What to do.
    pub task: Task,
    /// Whether the outcome is printed as JSON.
    pub json: bool,
}

/// Where tokens and accounts are managed.
#[derive(Clone, Debug)]
pub enum Place {
    /// The database of a standalone instance.
    Database(control::Location),
    /// A running server.
    Server(Server),
}

/// What `backup` and `restore` do, and where.
#[derive(Clone, Debug)]
pub struct Archive {
    /// What to do.
    pub action: ArchiveAction,
    /// The file of the backup.
    pub file: PathBuf,
    /// Whether what is there may be replaced: the file, or what the database holds.
    pub replace: bool,
    /// The database.
    pub location: control::Location,
}

/// Into a file, or out of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ArchiveAction {
    /// `backup`
    Backup,
    /// `restore`
    Restore,
}

/// What `explain` explains.
#[derive(Clone, Debug)]
pub struct Explain {
    /// The file of flags, or the folder with one per environment.
    pub flags: PathBuf,
    /// The flag's name.
    pub flag: String,
    /// Whose flags they are.
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
    /// Whether JSON is wanted instead of text.
    pub json: bool,
}
