//! The `parapet` binary: runs a command and maps its result to an exit status. The library does the
//! rest.
//!
//! The status is 0 after a graceful shutdown, 64 (`EX_USAGE`) for an invalid configuration, including
//! ports that are in use, and 1 for any other failure.

use std::{
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use futures_util::{Stream, stream};
use parapet::{
    app::{self, App, Signal},
    commands,
    config::{Command, Config},
    probe, telemetry,
};
use tikv_jemallocator::Jemalloc;
use tokio::signal::unix::{SignalKind, signal};

/// Returns memory to the system in the background after a burst. The C library's allocator keeps the
/// memory of password hashing: 19 MiB for each thread that hashed.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// The exit status for wrong usage, from BSD's `sysexits.h`.
const EX_USAGE: u8 = 64;

/// How long shutdown waits for blocked threads.
const THREAD_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let command = match Command::from_process() {
        Ok(command) => command,
        Err(mistakes) => {
            let _ = writeln!(io::stderr(), "{mistakes}");
            return ExitCode::from(EX_USAGE);
        }
    };
    match execute(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(app::Error::Listen(mistakes)) = error.downcast_ref() {
                let _ = writeln!(io::stderr(), "{mistakes}");
                return ExitCode::from(EX_USAGE);
            }
            let _ = writeln!(io::stderr(), "parapet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Print(text) => write!(io::stdout(), "{text}").context("cannot write"),
        Command::Manage(command) => {
            let output = build_runtime()?.block_on(commands::manage::run(command))?;
            write!(io::stdout(), "{output}").context("cannot write")
        }
        Command::Backup(command) => {
            let output = build_runtime()?.block_on(commands::backup::run(command))?;
            write!(io::stdout(), "{output}").context("cannot write")
        }
        Command::Explain(request) => {
            write!(io::stdout(), "{}", commands::explain::run(&request)?).context("cannot write")
        }
        Command::Probe(probe) => Ok(build_runtime()?.block_on(probe::check(&probe))?),
        Command::Run(config) => {
            telemetry::start_logging(&config.log);
            for warning in &config.warnings {
                tracing::warn!("{warning}");
            }
            let runtime = build_runtime()?;
            let outcome = runtime.block_on(run(*config));
            // A thread that hangs in a disk or network file system would block the exit forever.
            runtime.shutdown_timeout(THREAD_SHUTDOWN_TIMEOUT);
            outcome
        }
    }
}

fn build_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

async fn run(config: Config) -> anyhow::Result<()> {
    // Installed before the start, because SIGHUP would otherwise kill the process. A reload requested
    // during the start is done afterwards.
    let reloads = reload_signals().context("cannot listen to signals")?;
    let app = App::start(config).await?;
    let terminations = termination_signals().context("cannot listen to signals")?;
    Ok(app.run(stream::select(terminations, reloads)).await?)
}

/// Yields each SIGTERM and SIGINT.
fn termination_signals() -> io::Result<impl Stream<Item = Signal>> {
    let signals = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(stream::unfold(signals, |(mut terminate, mut interrupt)| async move {
        let signal = tokio::select! {
            _ = terminate.recv() => Signal::Terminate,
            _ = interrupt.recv() => Signal::Interrupt,
        };
        Some((signal, (terminate, interrupt)))
    }))
}

/// Yields the newly read configuration on each SIGHUP.
fn reload_signals() -> io::Result<impl Stream<Item = Signal>> {
    let hangup = signal(SignalKind::hangup())?;
    Ok(stream::unfold(hangup, |mut hangup| async move {
        loop {
            hangup.recv().await?;
            // Reads files, which may block.
            let read = tokio::task::spawn_blocking(Command::from_process).await;
            let loaded = match read.expect("reading the configuration does not panic") {
                Ok(Command::Run(config)) => Ok(config),
                Err(mistakes) => Err(mistakes),
                Ok(_) => continue,
            };
            return Some((Signal::Reload(loaded), hangup));
        }
    }))
}
