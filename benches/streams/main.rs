//! The cost of thousands of open streams: `cargo bench --bench streams`, `-- --help` for more.
//!
//! It measures real processes from outside, on one machine. Compare the ratios to a bare server that
//! writes the same bytes.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

mod bare_tokio;
mod clients;
#[path = "../exchange.rs"]
mod exchange;
#[path = "../flags.rs"]
mod flags;
#[path = "../machine.rs"]
mod machine;
mod measure;
#[path = "../numbers.rs"]
mod numbers;
#[path = "../parapet.rs"]
mod parapet;
#[path = "../picture.rs"]
mod picture;
mod report;
#[path = "../server_process.rs"]
mod server_process;
mod server_under_test;
#[path = "../table.rs"]
mod table;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, ensure};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use crate::{measure::Session, report::Report};

/// The numbers of streams that are measured.
const STREAM_COUNTS: [u64; 3] = [100, 1_000, 10_000];

/// The number of changes for each number of streams.
const ROUNDS: u16 = 7;

/// How long the cost of keep-alive comments is measured.
const KEEPALIVE_DURATION: Duration = Duration::from_secs(12);

/// Open files in addition to streams.
const RESERVED_FILES: u64 = 100;

fn main() -> Result<()> {
    let matches = command().get_matches();
    match matches.subcommand() {
        Some(("bare", matches)) => {
            let port = *matches.get_one("port").expect("it is required");
            bare_tokio::serve(path(matches, "first"), path(matches, "then"), port)
        }
        Some(_) => unreachable!("clap rejects other subcommands"),
        None if matches.get_flag("bench") => bench(&matches),
        None => {
            // `cargo test --all-targets` runs this, too.
            println!("nothing measured: this runs by `cargo bench --bench streams`");
            Ok(())
        }
    }
}

fn command() -> Command {
    let switch = |name, help| Arg::new(name).long(name).help(help).action(ArgAction::SetTrue);
    let option = |name, help| Arg::new(name).long(name).help(help);
    let needed = |name| Arg::new(name).long(name).required(true);
    Command::new("streams")
        .about("Measures the cost of thousands of open streams, compared with a bare server")
        .arg(switch("quick", "A quick run: two rounds, without the cost of keep-alive comments"))
        .arg(
            option("streams", "Measure only this number of streams; repeatable")
                .action(ArgAction::Append)
                .value_parser(value_parser!(u64).range(1..)),
        )
        .arg(
            option("rounds", "Number of changes [default: 7]")
                .value_parser(value_parser!(u16).range(1..)),
        )
        .arg(
            option(
                "docs",
                "Write streams.md and its plots to this directory [default: docs, after a full run]",
            )
            .value_parser(value_parser!(PathBuf)),
        )
        .arg(switch("bench", "Passed by cargo").hide(true))
        .subcommand(
            Command::new("bare")
                .about("The baseline; started by the benchmark itself")
                .arg(needed("first").value_parser(value_parser!(PathBuf)))
                .arg(needed("then").value_parser(value_parser!(PathBuf)))
                .arg(needed("port").value_parser(value_parser!(u16))),
        )
}

fn path<'a>(matches: &'a ArgMatches, name: &str) -> &'a Path {
    matches.get_one::<PathBuf>(name).expect("it is required")
}

fn bench(matches: &ArgMatches) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let quick = matches.get_flag("quick");
    let rounds = *matches.get_one::<u16>("rounds").unwrap_or(if quick { &2 } else { &ROUNDS });
    let session = Session {
        folder: folder.path().to_owned(),
        rounds: rounds.into(),
        keepalive_duration: (!quick).then_some(KEEPALIVE_DURATION),
    };
    server_process::raise_fd_limit()?;
    let room = server_process::fd_limit().saturating_sub(RESERVED_FILES);
    let selected: Option<Vec<u64>> =
        matches.get_many("streams").map(|them| them.copied().collect());
    let counts = selected.clone().unwrap_or(STREAM_COUNTS.into());
    let (levels, beyond): (Vec<u64>, Vec<u64>) = counts.iter().partition(|&&it| it <= room);
    if !beyond.is_empty() {
        eprintln!(
            "skipping {beyond:?} streams: the limit on open files is {}; raise the hard limit \
             (`ulimit -Hn`)",
            server_process::fd_limit()
        );
    }
    ensure!(!levels.is_empty(), "nothing is left to measure");
    let levels = levels.into_iter().map(|it| session.measure(it)).collect::<Result<_>>()?;
    let report = Report { levels };
    let machine = machine::describe("the clients share", &[])?;
    println!("{machine}\n\n{}", report.tables());
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let whole = !quick && selected.is_none() && beyond.is_empty();
    if let Some(docs) = matches.get_one::<PathBuf>("docs").or(Some(&own).filter(|_| whole)) {
        let command = format!("cargo bench --bench streams -- --rounds {rounds}");
        report.write(docs, &machine, &command)?;
        eprintln!("wrote {}", docs.join("streams.md").display());
    }
    Ok(())
}
