//! The measured servers: the baseline, Parapet, and Unleash Edge if it is installed.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use super::{
    exchange::{RawResponse, Request},
    flags::document,
    handshake_load,
    load::Transport,
    parapet,
    server_process::ServerProcess,
};

/// The measured servers, in the order of the tables.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Contender {
    /// Hyper that always sends the same response.
    Bare,
    Parapet,
    /// Unleash Edge.
    Edge,
}

impl Contender {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare hyper",
            Self::Parapet => "Parapet",
            Self::Edge => "Unleash Edge",
        }
    }
}

/// The version of Unleash Edge in the published tables.
pub(crate) const EDGE_VERSION: &str = "20.1.0";

const CLIENT: &str = "*:development.client-of-the-benchmark-0123456789abcdef";
const FRONTEND: &str = "*:development.frontend-of-the-benchmark-0123456789ab";

/// The token of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum TokenChoice {
    Client,
    Frontend,
    /// One of several numbered client tokens, chosen for each request.
    Numbered,
}

impl TokenChoice {
    pub(crate) fn token(self) -> String {
        match self {
            Self::Client => CLIENT.to_owned(),
            Self::Frontend => FRONTEND.to_owned(),
            Self::Numbered => numbered_token(super::exchange::NUMBER),
        }
    }
}

fn numbered_token(n: &str) -> String {
    format!("*:development.client-0123456789abcdef0123456789abcdef-{n}")
}

/// A running server.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) process: ServerProcess,
    is_encrypted: bool,
}

impl Server {
    /// Sends a request on a new connection, with `n` as its number, and returns the response.
    pub(crate) fn send(&self, request: &Request, n: u64) -> Result<RawResponse> {
        if self.is_encrypted {
            request.send_on(
                &mut handshake_load::connect_tls(self.process.address)?,
                self.process.address,
                n,
            )
        } else {
            request.send(self.process.address, n)
        }
    }
}

/// Starts the measured servers; `folder` is for their files.
#[derive(Debug)]
pub(crate) struct Contenders {
    folder: PathBuf,
    /// The executable of Unleash Edge, if it is installed.
    edge: Option<PathBuf>,
}

impl Contenders {
    /// Uses this executable of Unleash Edge, or the installed one.
    pub(crate) fn new(folder: &Path, edge: Option<&Path>) -> Result<Self> {
        let program = edge.unwrap_or(Path::new("unleash-edge"));
        let found =
            Command::new(program).arg("--help").output().is_ok_and(|it| it.status.success());
        if let (Some(edge), false) = (edge, found) {
            anyhow::bail!("{} cannot be run", edge.display());
        }
        let stable = Self { folder: folder.to_owned(), edge: found.then(|| program.to_owned()) };
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        std::fs::write(stable.certificate(), made.cert.pem())?;
        std::fs::write(stable.key(), made.signing_key.serialize_pem())?;
        Ok(stable)
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    fn certificate(&self) -> PathBuf {
        self.folder.join("certificate.pem")
    }

    fn key(&self) -> PathBuf {
        self.folder.join("key.pem")
    }

    pub(crate) fn has_edge(&self) -> bool {
        self.edge.is_some()
    }

    /// The baseline, which sends the response in `file`.
    pub(crate) fn bare(&self, file: &Path, over: Transport) -> Result<Server> {
        let this = std::env::current_exe()?;
        let process = ServerProcess::start(&self.folder.join("bare.log"), |port| {
            let mut command = Command::new(this);
            command.args(["bare", "--port", &port.to_string(), "--answer"]).arg(file);
            if over.is_encrypted() {
                command.arg("--certificate").arg(self.certificate()).arg("--key").arg(self.key());
            }
            command
        })?;
        Ok(Server { process, is_encrypted: over.is_encrypted() })
    }

    /// An upstream whose flags change.
    pub(crate) fn upstream(&self, flags: usize) -> Result<ServerProcess> {
        let this = std::env::current_exe()?;
        ServerProcess::start(&self.folder.join("upstream.log"), |port| {
            let mut command = Command::new(this);
            let (port, flags) = (port.to_string(), flags.to_string());
            command.args(["upstream", "--port", &port, "--flags", &flags]);
            command
        })
    }

    /// Parapet, offline, with this many flags, and this many numbered client tokens in addition to the
    /// two fixed ones.
    pub(crate) fn parapet(&self, flags: usize, tokens: u64, over: Transport) -> Result<Server> {
        // All connections come from one address.
        let mut config = format!(
            "bootstrap_file = '{}'\nmax_connections_per_address = 20000\n",
            self.flags_file(flags)?.display()
        );
        if over.is_encrypted() {
            writeln!(config, "tls_enable = true")?;
            writeln!(config, "tls_server_cert = ['{}']", self.certificate().display())?;
            writeln!(config, "tls_server_key = ['{}']", self.key().display())?;
        }
        let clients = std::iter::once(CLIENT.to_owned());
        let clients = clients.chain((0..tokens).map(|n| numbered_token(&n.to_string())));
        write!(config, "frontend_tokens = [{FRONTEND:?}]\nclient_tokens = [\n")?;
        for token in clients {
            writeln!(config, "{token:?},")?;
        }
        config.push_str("]\n");
        let port = if over.is_encrypted() { "--tls-server-port" } else { parapet::PORT_FLAG };
        let process = parapet::spawn(&self.folder, "offline", &config, port)?;
        let server = Server { process, is_encrypted: over.is_encrypted() };
        parapet::wait_until_ready(&server.process, |probe| server.send(probe, 0))?;
        Ok(server)
    }

    /// Parapet as an edge in front of `upstream`, which fetches every change at once.
    pub(crate) fn parapet_edge(&self, upstream: &ServerProcess) -> Result<Server> {
        let config = format!(
            "upstream_url = \"http://{}\"\ntokens = [{CLIENT:?}]\n\
             features_refresh_interval_seconds = 0.001\n",
            upstream.address
        );
        Ok(Server { process: parapet::start(&self.folder, "edge", &config)?, is_encrypted: false })
    }

    /// Unleash Edge, offline, if it is installed.
    pub(crate) fn edge(&self, flags: usize) -> Result<Option<Server>> {
        let Some(program) = &self.edge else { return Ok(None) };
        let file = self.flags_file(flags)?;
        let process = ServerProcess::start(&self.folder.join("edge.log"), |port| {
            let mut command = Command::new(program);
            command.args(["--interface", "127.0.0.1", "--port", &port.to_string(), "offline"]);
            command.args(["--client-tokens", CLIENT, "--frontend-tokens", FRONTEND]);
            command.arg("--bootstrap-file").arg(file);
            command
        })?;
        Ok(Some(Server { process, is_encrypted: false }))
    }

    fn flags_file(&self, flags: usize) -> Result<PathBuf> {
        let file = self.folder.join(format!("flags-{flags}.json"));
        if !file.exists() {
            std::fs::write(&file, document(flags))?;
        }
        Ok(file)
    }
}
