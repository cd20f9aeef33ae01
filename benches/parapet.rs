//! How a Parapet is started for a benchmark.

use std::{path::Path, process::Command, thread::sleep, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    exchange::{Answer, Request},
    process::Process,
};

/// The setting of the port on which SDKs are served.
pub(crate) const PORT: &str = "--port";

/// Starts it in `mode` with this configuration, its files in `folder`, and waits until it has flags.
pub(crate) fn start(folder: &Path, mode: &str, config: &str) -> Result<Process> {
    let process = spawn(folder, mode, config, PORT)?;
    await_ready(&process, |probe| probe.ask(process.address, 0))?;
    Ok(process)
}

/// The same without waiting for flags; `port` is the setting that its port is given by.
pub(crate) fn spawn(folder: &Path, mode: &str, config: &str, port: &str) -> Result<Process> {
    let file = folder.join("parapet.toml");
    std::fs::write(&file, config)?;
    let data = tempfile::tempdir_in(folder)?.keep();
    Process::start(&folder.join("parapet.log"), |free| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_parapet"));
        command.args([mode, "--interface=127.0.0.1", "--admin-port=0"]);
        command.arg(format!("{port}={free}")).arg("--config").arg(file);
        command.arg("--data-dir").arg(data);
        command
    })
}

/// Waits until it has flags, by asking it as `ask` does.
pub(crate) fn await_ready(
    parapet: &Process,
    ask: impl Fn(&Request) -> Result<Answer>,
) -> Result<()> {
    let probe = Request::get("/internal-backstage/ready");
    for _ in 0..500 {
        if ask(&probe).is_ok_and(|answer| answer.status == 200) {
            return Ok(());
        }
        sleep(Duration::from_millis(20));
    }
    None.with_context(|| format!("Parapet is not ready: {}", parapet.log()))
}
