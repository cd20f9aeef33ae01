//! Real Redis servers: one alone, a Cluster of three, or a master with a replica and Sentinels.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use super::guarded_process::{GuardedProcess, OnParentExit};
use super::net::{free_port, wait_until};

/// How long servers may take to form a Cluster, or to elect a master.
const TIMEOUT: Duration = Duration::from_mins(1);

/// A running server; killed when dropped.
#[derive(Debug)]
pub(crate) struct RedisServer {
    process: Option<GuardedProcess>,
    arguments: Vec<String>,
    folder: TempDir,
    port: u16,
}

impl RedisServer {
    /// Starts a server that keeps nothing on disk.
    pub(crate) async fn start() -> Self {
        let port = free_port();
        Self::start_with(port, &["--port", &port.to_string()]).await
    }

    /// Starts a server with these arguments, of which one sets this port, for TLS or without.
    pub(crate) async fn start_with(port: u16, arguments: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("redis-").tempdir().unwrap();
        let arguments = arguments.iter().map(|&it| it.to_owned()).collect();
        let mut server = Self { process: None, arguments, folder, port };
        server.restart().await;
        server
    }

    /// Starts the server again, without data.
    pub(crate) async fn restart(&mut self) {
        drop(self.process.take());
        let mut command = Command::new("redis-server");
        command.current_dir(self.folder.path());
        let fixed = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
        command.args(&self.arguments).args(fixed);
        let mut process = GuardedProcess::spawn("Redis", &command, OnParentExit::Kill);
        let address = ("127.0.0.1", self.port);
        process.wait_until(async || tokio::net::TcpStream::connect(address).await.is_ok()).await;
        self.process = Some(process);
    }

    /// Kills the server.
    pub(crate) fn kill(&mut self) {
        drop(self.process.take());
    }

    /// Sends it the signal of this name, for instance `STOP`.
    pub(crate) fn send_signal(&self, name: &str) {
        self.process.as_ref().expect("it is running").send_signal(name);
    }

    /// Its loopback port.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Its URL.
    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// The output of `redis-cli` with these arguments, at this server.
    pub(crate) async fn cli(&self, arguments: &[&str]) -> String {
        redis_cli(self.port, arguments).await
    }
}

/// A Cluster of three nodes.
#[derive(Debug)]
pub(crate) struct RedisCluster {
    nodes: Vec<RedisServer>,
}

impl RedisCluster {
    /// Starts three nodes and waits until they serve as a Cluster.
    pub(crate) async fn start() -> Self {
        let mut nodes = Vec::new();
        for _ in 0..3 {
            let port = free_port();
            let (text, bus) = (port.to_string(), free_port().to_string());
            let arguments = ["--port", &text, "--cluster-enabled", "yes", "--cluster-port", &bus];
            nodes.push(RedisServer::start_with(port, &arguments).await);
        }
        let addresses: Vec<_> =
            nodes.iter().map(|node| format!("127.0.0.1:{}", node.port)).collect();
        let mut create = vec!["--cluster", "create"];
        create.extend(addresses.iter().map(String::as_str));
        create.push("--cluster-yes");
        let output = nodes[0].cli(&create).await;
        assert!(output.contains("All 16384 slots covered"), "{output}");
        for node in &nodes {
            wait_until("the Cluster serves", TIMEOUT, async || {
                node.cli(&["cluster", "info"]).await.contains("cluster_state:ok").then_some(())
            })
            .await;
        }
        Self { nodes }
    }

    /// The ports of its nodes.
    pub(crate) fn ports(&self) -> Vec<u16> {
        self.nodes.iter().map(RedisServer::port).collect()
    }
}

/// A master and its replica, which a Sentinel watches under the name `main`.
#[derive(Debug)]
pub(crate) struct RedisSentinels {
    pub(crate) master: RedisServer,
    _replica: RedisServer,
    sentinel: RedisServer,
}

impl RedisSentinels {
    /// Starts all three and waits until the Sentinel knows the replica.
    pub(crate) async fn start() -> Self {
        let master = RedisServer::start().await;
        let port = free_port();
        let (own, other) = (port.to_string(), master.port.to_string());
        let replica =
            RedisServer::start_with(port, &["--port", &own, "--replicaof", "127.0.0.1", &other])
                .await;
        let folder = tempfile::Builder::new().prefix("sentinel-").tempdir().unwrap().keep();
        let file = folder.join("sentinel.conf");
        std::fs::write(
            &file,
            format!(
                "sentinel monitor main 127.0.0.1 {other} 1\n\
                 sentinel down-after-milliseconds main 1000\n\
                 sentinel failover-timeout main 5000\n"
            ),
        )
        .unwrap();
        let port = free_port();
        let arguments = [path(&file), "--sentinel", "--port", &port.to_string()];
        let sentinel = RedisServer::start_with(port, &arguments).await;
        wait_until("the Sentinel knows the replica", TIMEOUT, async || {
            let info = sentinel.cli(&["info", "sentinel"]).await;
            info.contains("status=ok").then_some(()).filter(|()| info.contains("slaves=1"))
        })
        .await;
        Self { master, _replica: replica, sentinel }
    }

    /// The port of the Sentinel.
    pub(crate) fn sentinel_port(&self) -> u16 {
        self.sentinel.port
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

async fn redis_cli(port: u16, arguments: &[&str]) -> String {
    let mut command = tokio::process::Command::new("redis-cli");
    command.args(["-h", "127.0.0.1", "-p", &port.to_string()]).args(arguments);
    let output = command.output().await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8(text).unwrap()
}
