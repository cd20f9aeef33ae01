//! Measured processes: started, observed through `/proc`, and always killed at the end.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The timeout until a contender listens; compiling 10,000 flags takes some of them several seconds.
const START_TIMEOUT: Duration = Duration::from_mins(1);

/// Memory counts as settled when this many samples in a row are about the same.
const SETTLED_SAMPLES: usize = 5;
const SAMPLE_INTERVAL: Duration = Duration::from_millis(200);
const SETTLED_TOLERANCE: u64 = 64 << 10;
const MAX_SAMPLES: usize = 50;

/// A server process; killed when dropped.
#[derive(Debug)]
pub(crate) struct ServerProcess {
    child: Child,
    pub(crate) address: SocketAddr,
    log: PathBuf,
}

impl ServerProcess {
    /// Runs the command that `command` returns for a free port, with its output in `log`, and waits
    /// until it listens.
    pub(crate) fn start(log: &Path, command: impl FnOnce(u16) -> Command) -> Result<Self> {
        let port = free_port()?;
        let mut command = command(port);
        let output = File::create(log)?;
        command.stdout(output.try_clone()?).stderr(output);
        // Only servers whose flags change read their input.
        let child = command.stdin(Stdio::piped()).spawn();
        let child = child.with_context(|| format!("cannot start {command:?}"))?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut process = Self { child, address, log: log.to_owned() };
        let started = Instant::now();
        while TcpStream::connect(address).is_err() {
            if let Some(status) = process.child.try_wait()? {
                bail!("{command:?} ended with {status}: {}", process.log());
            }
            if started.elapsed() > START_TIMEOUT {
                bail!("{command:?} does not listen: {}", process.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(process)
    }

    /// Its standard input.
    pub(crate) fn input(&mut self) -> Result<&mut ChildStdin> {
        self.child.stdin.as_mut().context("no input")
    }

    /// The end of its output.
    pub(crate) fn log(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned()
    }

    /// Its directory in `/proc`.
    pub(crate) fn proc(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.child.id()))
    }

    /// Its resident memory, in bytes.
    pub(crate) fn resident(&self) -> Result<u64> {
        let status = std::fs::read_to_string(self.proc().join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|it| it.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        Ok(number.context("/proc/PID/status has VmRSS")? * 1024)
    }

    /// Its resident memory once it has settled, in bytes.
    pub(crate) fn settled_resident(&self) -> Result<u64> {
        let mut samples = Vec::new();
        for _ in 0..MAX_SAMPLES {
            samples.push(self.resident()?);
            let last = samples.iter().rev().take(SETTLED_SAMPLES);
            let (low, high) =
                last.clone().fold((u64::MAX, 0), |(low, high), &it| (low.min(it), high.max(it)));
            if last.count() == SETTLED_SAMPLES && high - low <= SETTLED_TOLERANCE {
                break;
            }
            std::thread::sleep(SAMPLE_INTERVAL);
        }
        self.resident()
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // It may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Raises the limit on open files of this process and its children to the hard limit.
pub(crate) fn raise_fd_limit() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?)
}

/// The limit on open files of this process and its children.
pub(crate) fn fd_limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
