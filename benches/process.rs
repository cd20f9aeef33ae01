//! Processes under measurement: started, watched through `/proc`, and ended whatever happens.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// How long a contender may take until it listens; compiling 10,000 flags takes some of them seconds.
const PATIENCE: Duration = Duration::from_mins(1);

/// Memory is read when so many looks in a row have seen about the same.
const LOOKS: usize = 5;
const LOOK_EVERY: Duration = Duration::from_millis(200);
const SAME: u64 = 64 << 10;
const LONGEST_SETTLING: usize = 50;

/// A server that is ended when this is dropped.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    pub(crate) address: SocketAddr,
    log: PathBuf,
}

impl Process {
    /// Runs what `command` makes of a free port, its output in `log`, and waits until it listens.
    pub(crate) fn start(log: &Path, command: impl FnOnce(u16) -> Command) -> Result<Self> {
        let port = free_port()?;
        let mut command = command(port);
        let output = File::create(log)?;
        command.stdout(output.try_clone()?).stderr(output);
        // Every server but the changing upstream ignores its input.
        let child = command.stdin(Stdio::piped()).spawn();
        let child = child.with_context(|| format!("cannot start {command:?}"))?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut process = Self { child, address, log: log.to_owned() };
        let started = Instant::now();
        while TcpStream::connect(address).is_err() {
            if let Some(status) = process.child.try_wait()? {
                bail!("{command:?} ended with {status}: {}", process.log());
            }
            if started.elapsed() > PATIENCE {
                bail!("{command:?} does not listen: {}", process.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(process)
    }

    /// Its input.
    pub(crate) fn input(&mut self) -> Result<&mut ChildStdin> {
        self.child.stdin.as_mut().context("no input")
    }

    /// The end of what it printed.
    pub(crate) fn log(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned()
    }

    /// Its folder below `/proc`.
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

    /// Its resident memory once that changes no more, in bytes.
    pub(crate) fn settled(&self) -> Result<u64> {
        let mut looks = Vec::new();
        for _ in 0..LONGEST_SETTLING {
            looks.push(self.resident()?);
            let last = looks.iter().rev().take(LOOKS);
            let (low, high) =
                last.clone().fold((u64::MAX, 0), |(low, high), &it| (low.min(it), high.max(it)));
            if last.count() == LOOKS && high - low <= SAME {
                break;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        self.resident()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Lets this process and those that it starts open as many files as the system allows.
pub(crate) fn raise_room() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?)
}

/// How many files this process, and each that it starts, may have open.
pub(crate) fn room() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
