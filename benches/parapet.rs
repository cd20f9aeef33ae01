//! Starts Parapet for a benchmark.

use std::{path::Path, process::Command, thread::sleep, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    exchange::{RawResponse, Request},
    server_process::ServerProcess,
};

/// The flag for the port that serves SDKs.
pub(crate) const PORT_FLAG: &str = "--port";

/// Starts it in `mode` with this configuration and its files in `folder`, and waits until it has flags.
pub(crate) fn start(folder: &Path, mode: &str, config: &str) -> Result<ServerProcess> {
    let process = spawn(folder, mode, config, PORT_FLAG)?;
    wait_until_ready(&process, |probe| probe.send(process.address, 0))?;
    Ok(process)
}

/// Starts it without waiting for flags; `port` is the flag for its port.
pub(crate) fn spawn(folder: &Path, mode: &str, config: &str, port: &str) -> Result<ServerProcess> {
    let file = folder.join("parapet.toml");
    std::fs::write(&file, config)?;
    let data = tempfile::tempdir_in(folder)?.keep();
    ServerProcess::start(&folder.join("parapet.log"), |free| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_parapet"));
        command.args([mode, "--interface=127.0.0.1", "--admin-port=0"]);
        command.arg(format!("{port}={free}")).arg("--config").arg(file);
        command.arg("--data-dir").arg(data);
        command
    })
}

/// Waits until it has flags; `send` sends the readiness probe.
pub(crate) fn wait_until_ready(
    parapet: &ServerProcess,
    send: impl Fn(&Request) -> Result<RawResponse>,
) -> Result<()> {
    let probe = Request::get("/internal-backstage/ready");
    for _ in 0..500 {
        if send(&probe).is_ok_and(|answer| answer.status == 200) {
            return Ok(());
        }
        sleep(Duration::from_millis(20));
    }
    None.with_context(|| format!("Parapet is not ready: {}", parapet.log()))
}
