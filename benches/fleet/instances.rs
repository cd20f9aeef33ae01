//! The measured instances, and what clients see of them.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::future::try_join_all;
use serde_json::json;

use super::{
    counted_upstream::{ADMIN, CHANGED_FLAG, CountedUpstream},
    server_process::ServerProcess,
};

/// How long instances may take to start, to get a change, or to accept a token.
const TIMEOUT: Duration = Duration::from_mins(2);

/// The interval at which an instance is checked for a change.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// How the instances are connected.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Setup {
    /// Each asks upstream for itself.
    Alone,
    /// One Redis is their store, and they act as one.
    Fleet {
        /// The port of the Redis.
        redis: u16,
    },
    /// Unleash Edge, each for itself.
    UnleashEdge,
}

impl Setup {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Alone => "Parapet, each alone",
            Self::Fleet { .. } => "Parapet, a fleet on one Redis",
            Self::UnleashEdge => "Unleash Edge",
        }
    }
}

/// Running instances in front of one upstream.
pub(crate) struct Instances {
    processes: Vec<ServerProcess>,
    client: reqwest::Client,
    /// The token of the SDKs.
    token: String,
}

impl Instances {
    /// Starts `count` instances with the default settings, and waits until each serves flags.
    pub(crate) async fn start(
        folder: &Path,
        setup: Setup,
        count: usize,
        upstream: &CountedUpstream,
        unleash_edge: &Path,
    ) -> Result<Self> {
        let token = upstream.create_token("sdk");
        let mut processes = Vec::new();
        for n in 0..count {
            let own_folder = folder.join(n.to_string());
            std::fs::create_dir_all(&own_folder)?;
            let log = own_folder.join("log");
            processes.push(ServerProcess::start(&log, |port| {
                command(setup, &own_folder, port, upstream.address, &token, unleash_edge)
            })?);
        }
        let client = reqwest::Client::builder().timeout(Duration::from_secs(10)).build()?;
        let instances = Self { processes, client, token };
        instances.wait_until_served(None).await.context("the first flags")?;
        Ok(instances)
    }

    /// The end of the log of the first instance.
    pub(crate) fn log(&self) -> String {
        self.processes.first().map(ServerProcess::log).unwrap_or_default()
    }

    /// Waits until each instance serves this revision of the changing flag, or any; returns when each
    /// first did.
    pub(crate) async fn wait_until_served(&self, revision: Option<u64>) -> Result<Vec<Instant>> {
        let wait = |process: &ServerProcess| {
            // Unleash Edge responds to the path of a single flag with 404.
            let query = format!("namePrefix={CHANGED_FLAG}");
            let url = format!("http://{}/api/client/features?{query}", process.address);
            let revision = revision.map(|it| it.to_string());
            async move {
                let started = Instant::now();
                loop {
                    if let Some(served) = self.served_revision(&url).await
                        && revision.as_ref().is_none_or(|revision| *revision == served)
                    {
                        return Ok(Instant::now());
                    }
                    if started.elapsed() > TIMEOUT {
                        bail!("{url} does not serve revision {revision:?}");
                    }
                    tokio::time::sleep(CHECK_INTERVAL).await;
                }
            }
        };
        try_join_all(self.processes.iter().map(wait)).await
    }

    async fn served_revision(&self, url: &str) -> Option<String> {
        let response =
            self.client.get(url).header("Authorization", &self.token).send().await.ok()?;
        let flags: serde_json::Value =
            serde_json::from_slice(&response.bytes().await.ok()?).ok()?;
        flags["features"][0]["description"].as_str().map(str::to_owned)
    }

    /// Presents a token to every instance at the same time, and waits until each accepts it.
    pub(crate) async fn present_token(&self, token: &str) -> Result<()> {
        let present = |process: &ServerProcess| {
            let url = format!("http://{}/api/client/features", process.address);
            async move {
                let started = Instant::now();
                loop {
                    let request = self.client.get(&url).header("Authorization", token);
                    if request.send().await.is_ok_and(|it| it.status().is_success()) {
                        return Ok(());
                    }
                    ensure!(started.elapsed() < TIMEOUT, "{url} does not accept a new token");
                    tokio::time::sleep(CHECK_INTERVAL).await;
                }
            }
        };
        try_join_all(self.processes.iter().map(present)).await?;
        Ok(())
    }

    /// Reports one evaluation to every instance.
    pub(crate) async fn report_usage(&self) -> Result<()> {
        let now = jiff::Timestamp::now().to_string();
        let report = json!({
            "appName": "benchmark", "instanceId": "benchmark",
            "bucket": {
                "start": now, "stop": now, "toggles": { CHANGED_FLAG: { "yes": 1, "no": 0 } },
            },
        });
        for process in &self.processes {
            let url = format!("http://{}/api/client/metrics", process.address);
            let request = self.client.post(url).header("Authorization", &self.token);
            let request = request.header("Content-Type", "application/json");
            let status = request.body(report.to_string()).send().await?.status();
            ensure!(status.is_success(), "usage is rejected: {status}");
        }
        Ok(())
    }
}

fn command(
    setup: Setup,
    folder: &Path,
    port: u16,
    upstream: SocketAddr,
    token: &str,
    unleash_edge: &Path,
) -> Command {
    let upstream_url = format!("http://{upstream}");
    if setup == Setup::UnleashEdge {
        let mut command = Command::new(unleash_edge);
        command.args(["--interface", "127.0.0.1", "--port", &port.to_string(), "edge"]);
        command.args(["--upstream-url", &upstream_url, "--tokens", token]);
        return command;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_parapet"));
    command.args(["edge", "--interface=127.0.0.1", "--admin-port=0"]);
    command.arg(format!("--port={port}")).args(["--upstream-url", &upstream_url]);
    command.args(["--upstream-admin-token", ADMIN]);
    match setup {
        Setup::Fleet { redis } => command.arg(format!("--store=redis://127.0.0.1:{redis}")),
        Setup::Alone | Setup::UnleashEdge => {
            command.arg("--backup-folder").arg(PathBuf::from(folder).join("backup"))
        }
    };
    command
}
