//! How a Parapet is started for a benchmark.

use std::{path::Path, process::Command, thread::sleep, time::Duration};

use anyhow::{Context as _, Result};

use super::{exchange::Request, process::Process};

/// Starts it in `mode` with this configuration, its files in `folder`, and waits until it has flags.
pub(crate) fn start(folder: &Path, mode: &str, config: &str) -> Result<Process> {
    let file = folder.join("parapet.toml");
    std::fs::write(&file, config)?;
    let data = tempfile::tempdir_in(folder)?.keep();
    let process = Process::start(&folder.join("parapet.log"), |port| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_parapet"));
        command.args([mode, "--interface=127.0.0.1", "--admin-port=0"]);
        command.arg(format!("--port={port}")).arg("--config").arg(file);
        command.arg("--data-dir").arg(data);
        command
    })?;
    ready(&process)?;
    Ok(process)
}

fn ready(parapet: &Process) -> Result<()> {
    let probe = Request::get("/internal-backstage/ready");
    for _ in 0..500 {
        if probe.ask(parapet.address, 0).is_ok_and(|answer| answer.status == 200) {
            return Ok(());
        }
        sleep(Duration::from_millis(20));
    }
    None.with_context(|| format!("Parapet is not ready: {}", parapet.log()))
}
