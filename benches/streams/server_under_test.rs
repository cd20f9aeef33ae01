//! The streaming servers, Parapet and the baseline, and how to trigger a change in either.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;

use super::{exchange::Request, flags::document, parapet, server_process::ServerProcess};

/// The number of flags.
pub(crate) const FLAGS: usize = 350;

/// The log message of either server right before it sends a change.
pub(crate) const CHANGE_LOG_TEXT: &str = "New flags";

const CLIENT: &str = "*:development.client-of-the-benchmark-0123456789abcdef";

/// The text that changes: the description of one flag.
const DESCRIPTION: &str = "Some description of feature 0 ";

/// The timeout until closed connections have ended.
const TIMEOUT: Duration = Duration::from_mins(1);

/// A streaming server.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) process: ServerProcess,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Parapet {
        flags: PathBuf,
        changes: u32,
    },
    /// Writes fixed bytes.
    Bare,
}

impl Server {
    /// Parapet, offline, with limits for this many clients.
    pub(crate) fn parapet(folder: &Path, clients: u64) -> Result<Self> {
        let flags = folder.join("flags.json");
        std::fs::write(&flags, document(FLAGS))?;
        let connections = clients * 2;
        let config = format!(
            "bootstrap_file = '{}'\nclient_tokens = [{CLIENT:?}]\nmax_streams = {clients}\n\
             max_streams_per_address = {clients}\nmax_streams_per_token = {clients}\n\
             max_connections = {connections}\nmax_connections_per_address = {connections}\n\
             edge_keepalive_timeout = 600\n",
            flags.display()
        );
        let process = parapet::start(folder, "offline", &config)?;
        Ok(Self { process, kind: Kind::Parapet { flags, changes: 0 } })
    }

    /// The baseline, which sends `first` to each client, and `then` at each change.
    pub(crate) fn bare(folder: &Path, first: &[u8], then: &[u8]) -> Result<Self> {
        let this = std::env::current_exe()?;
        let files = [folder.join("first"), folder.join("then")];
        std::fs::write(&files[0], first)?;
        std::fs::write(&files[1], then)?;
        let process = ServerProcess::start(&folder.join("bare.log"), |port| {
            let mut command = Command::new(this);
            command.args(["bare", "--port", &port.to_string()]);
            command.arg("--first").arg(&files[0]).arg("--then").arg(&files[1]);
            command
        })?;
        Ok(Self { process, kind: Kind::Bare })
    }

    /// A client's request for a stream.
    pub(crate) fn request(&self) -> String {
        authorized_get("/api/client/streaming")
            .header("Accept", "text/event-stream")
            .text(self.process.address)
    }

    /// The request of a polling client that is up to date.
    pub(crate) fn poll(&self) -> Result<Request> {
        let request = authorized_get("/api/client/features");
        let answer = request.send(self.process.address, 0)?;
        let tag = answer.header("etag").context("flags have an entity tag")?;
        Ok(request.header("If-None-Match", tag))
    }

    /// Changes a flag, which the server then sends to all clients.
    pub(crate) fn change_flag(&mut self) -> Result<()> {
        match &mut self.kind {
            Kind::Parapet { flags, changes } => {
                *changes += 1;
                // Each change has the same length.
                let change = format!("{DESCRIPTION}(as of {changes:06}) ");
                let text = document(FLAGS).replacen(DESCRIPTION, &change, 1);
                ensure!(text.contains(&change), "the first flag is described");
                let new = flags.with_extension("new");
                std::fs::write(&new, text)?;
                Ok(std::fs::rename(new, flags)?)
            }
            Kind::Bare => Ok(writeln!(self.process.input()?, "change")?),
        }
    }

    /// When the server began to send the last change.
    pub(crate) fn changed_at(&self) -> Result<Timestamp> {
        let log = self.process.log();
        let line = log.lines().rev().find(|line| line.contains(CHANGE_LOG_TEXT));
        let time = line.and_then(|line| line.split_whitespace().next());
        time.and_then(|time| time.parse().ok())
            .with_context(|| format!("no change in the log: {log}"))
    }

    /// Waits until Parapet has closed the streams of all disconnected clients.
    pub(crate) fn wait_until_no_streams(&self) -> Result<()> {
        let began = Instant::now();
        loop {
            let metrics =
                Request::get("/internal-backstage/metrics").send(self.process.address, 0)?;
            if String::from_utf8_lossy(&metrics.body).lines().any(|it| it == "parapet_streams 0") {
                return Ok(());
            }
            ensure!(began.elapsed() < TIMEOUT, "streams do not end with their clients");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn authorized_get(path: &str) -> Request {
    Request::get(path).header("Authorization", CLIENT)
}
