//! The cost of many instances for upstream: `cargo bench --bench fleet`, `-- --help` for more.
//!
//! It starts real instances, alone and as a fleet on one Redis, in front of a stand-in for Unleash that
//! counts requests. Nothing is compared by time but the arrival of changes.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

mod counted_upstream;
#[path = "../flags.rs"]
mod flags;
mod instances;
#[path = "../machine.rs"]
mod machine;
mod measure;
#[path = "../numbers.rs"]
mod numbers;
#[path = "../picture.rs"]
mod picture;
mod report;
#[path = "../server_process.rs"]
#[expect(dead_code, reason = "other benchmarks measure memory")]
mod server_process;
#[path = "../table.rs"]
#[expect(dead_code, reason = "other tables may be empty")]
mod table;

use std::{
    path::{Path, PathBuf},
    process::Command as Process,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use crate::{instances::Setup, measure::Session, report::Report, server_process::ServerProcess};

/// The numbers of instances that are measured.
const COUNTS: [usize; 3] = [1, 10, 100];

/// The largest number of instances of Unleash Edge that is measured.
const MAX_UNLEASH_EDGES: usize = 10;

fn main() -> Result<()> {
    let matches = command().get_matches();
    if !matches.get_flag("bench") {
        // `cargo test --all-targets` runs this, too.
        println!("nothing measured: this runs by `cargo bench --bench fleet`");
        return Ok(());
    }
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow!("a TLS provider is installed already"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(bench(&matches))
}

fn command() -> Command {
    let option = |name, help| Arg::new(name).long(name).help(help);
    Command::new("fleet")
        .about("Measures what instances of Parapet, alone and as a fleet, cost upstream")
        .arg(
            option("instances", "Measure only this number of instances; repeatable")
                .action(ArgAction::Append)
                .value_parser(value_parser!(u64).range(1..=200)),
        )
        .arg(
            option("seconds", "How long requests are counted")
                .default_value("180")
                .value_parser(value_parser!(u64).range(10..)),
        )
        .arg(
            option("changes", "Number of changes")
                .default_value("5")
                .value_parser(value_parser!(u64).range(1..)),
        )
        .arg(
            option("edge", "The executable of Unleash Edge")
                .default_value("unleash-edge")
                .value_parser(value_parser!(PathBuf)),
        )
        .arg(
            option(
                "docs",
                "Write fleet.md and its plot to this directory [default: docs, after a full run]",
            )
            .value_parser(value_parser!(PathBuf)),
        )
        .arg(Arg::new("bench").long("bench").action(ArgAction::SetTrue).hide(true))
}

async fn bench(matches: &ArgMatches) -> Result<()> {
    let number = |name| *matches.get_one::<u64>(name).expect("it has a default");
    let unleash_edge = matches.get_one::<PathBuf>("edge").expect("it has a default");
    let (seconds, changes) = (number("seconds"), number("changes"));
    let folder = tempfile::tempdir()?;
    let session = Session {
        folder: folder.path(),
        unleash_edge,
        duration: Duration::from_secs(seconds),
        changes: usize::try_from(changes)?,
    };
    server_process::raise_fd_limit()?;
    let selected = matches.get_many::<u64>("instances");
    let is_selected = selected.is_some();
    let counts: Vec<usize> = match selected {
        Some(selected) => selected.map(|it| usize::try_from(*it)).collect::<Result<_, _>>()?,
        None => COUNTS.to_vec(),
    };
    let has_redis = can_run("redis-server", "--version");
    // It does not tell its version.
    let has_edge = can_run(unleash_edge, "--help");
    if !has_edge {
        eprintln!("Unleash Edge is not installed and is skipped");
    }
    let mut levels = Vec::new();
    for count in counts {
        levels.push(session.measure(Setup::Alone, count).await?);
        if has_redis {
            let redis = start_redis(folder.path()).context("redis-server")?;
            let setup = Setup::Fleet { redis: redis.address.port() };
            levels.push(session.measure(setup, count).await?);
        } else {
            eprintln!("no fleet is measured, because redis-server is not installed");
        }
        if has_edge && count <= MAX_UNLEASH_EDGES {
            levels.push(session.measure(Setup::UnleashEdge, count).await?);
        }
    }
    let report = Report { levels };
    let redis = machine::first_line("redis-server", "--version");
    let facts = [("Redis", &*redis)];
    let machine = machine::describe("all processes share", &facts)?;
    println!("{machine}\n\n{}", report.tables());
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let is_whole = !is_selected && has_redis;
    if let Some(docs) = matches.get_one::<PathBuf>("docs").or(Some(&own).filter(|_| is_whole)) {
        let command =
            format!("cargo bench --bench fleet -- --seconds {seconds} --changes {changes}");
        report.write(docs, &machine, &command)?;
        eprintln!("wrote {}", docs.join("fleet.md").display());
    }
    Ok(())
}

/// Whether a program is installed, which ends with success for this argument.
fn can_run(program: impl AsRef<std::ffi::OsStr>, argument: &str) -> bool {
    Process::new(program).arg(argument).output().is_ok_and(|it| it.status.success())
}

/// Starts a Redis that keeps nothing on disk.
fn start_redis(folder: &Path) -> Result<ServerProcess> {
    ServerProcess::start(&folder.join("redis.log"), |port| {
        let mut command = Process::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &port.to_string()]);
        command.args(["--save", "", "--appendonly", "no"]);
        command
    })
}
