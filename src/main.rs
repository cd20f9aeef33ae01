//! The `parapet` binary: three exits, and everything else in the library.
//!
//! 64 (`EX_USAGE`) where the configuration is wrong, which includes ports that are taken; 1 where the
//! start fails; 0 after a graceful end.

use std::{
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use futures_util::{Stream, stream};
use parapet::{
    app::{self, App, Signal},
    command,
    config::{Command, Config},
    probe, telemetry,
};
use tikv_jemallocator::Jemalloc;
use tokio::signal::unix::{SignalKind, signal};

/// Gives back to the system what a burst has taken, in the background: the C library's keeps what the
/// hashing of passwords had, 19 MiB for each thread that it was done on.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// The exit status of a command that was used wrongly, from BSD's `sysexits.h`.
const EX_USAGE: u8 = 64;

/// How long threads are waited for that are left at the end.
const LEFT_THREADS: Duration = Duration::from_secs(1);

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
        Command::Show(text) => write!(io::stdout(), "{text}").context("cannot write"),
        Command::Manage(asked) => {
            let told = runtime()?.block_on(command::manage::run(asked))?;
            write!(io::stdout(), "{told}").context("cannot write")
        }
        Command::Archive(asked) => {
            let told = runtime()?.block_on(command::archive::run(asked))?;
            write!(io::stdout(), "{told}").context("cannot write")
        }
        Command::Explain(asked) => {
            write!(io::stdout(), "{}", command::explain(&asked)?).context("cannot write")
        }
        Command::Probe(probe) => Ok(runtime()?.block_on(probe::ask(&probe))?),
        Command::Run(config) => {
            telemetry::start_logging(&config.log);
            for warning in &config.warnings {
                tracing::warn!("{warning}");
            }
            let runtime = runtime()?;
            let outcome = runtime.block_on(run(*config));
            // A thread that a disk or network file system keeps would be waited for without end.
            runtime.shutdown_timeout(LEFT_THREADS);
            outcome
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

async fn run(config: Config) -> anyhow::Result<()> {
    // Before the start, which it would end; what it asks for is done afterwards.
    let reloads = reloads().context("cannot listen to signals")?;
    let app = App::start(config).await?;
    let terminations = terminations().context("cannot listen to signals")?;
    Ok(app.run(stream::select(terminations, reloads)).await?)
}

/// Yields each time that the process is asked to end, by the system or at the terminal.
fn terminations() -> io::Result<impl Stream<Item = Signal>> {
    let both = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(stream::unfold(both, |(mut terminate, mut interrupt)| async move {
        let signal = tokio::select! {
            _ = terminate.recv() => Signal::Terminate,
            _ = interrupt.recv() => Signal::Interrupt,
        };
        Some((signal, (terminate, interrupt)))
    }))
}

/// Yields the configuration, read again, each time that the process is told to reload (SIGHUP).
fn reloads() -> io::Result<impl Stream<Item = Signal>> {
    let hangup = signal(SignalKind::hangup())?;
    Ok(stream::unfold(hangup, |mut hangup| async move {
        loop {
            hangup.recv().await?;
            // Reads files, which may take as long as the file system likes.
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
