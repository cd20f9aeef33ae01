//! Parapet compared with a bare hyper server that sends the same bytes, and with Unleash Edge if it is
//! installed: `cargo bench --bench serve`, `-- --help` for more.
//!
//! It measures real processes from outside, on one machine. Absolute numbers depend on the machine;
//! compare the ratios of one run.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

mod bare_hyper;
mod contender;
#[path = "../exchange.rs"]
mod exchange;
#[path = "../flags.rs"]
mod flags;
mod growth_curves;
mod handshake_load;
mod latency_during_updates;
mod load;
#[path = "../machine.rs"]
mod machine;
mod measure;
mod memory;
#[path = "../numbers.rs"]
mod numbers;
#[path = "../parapet.rs"]
mod parapet;
#[path = "../picture.rs"]
mod picture;
mod plot;
mod report;
mod sdk_requests;
#[path = "../server_process.rs"]
mod server_process;
#[path = "../table.rs"]
mod table;
mod upstream;

use std::{
    cell::Cell,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, ensure};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use crate::{
    bare_hyper::TlsIdentity, contender::Contenders, growth_curves::CURVES,
    handshake_load::LoadPlan, measure::Session, report::Report, sdk_requests::ROWS,
};

fn main() -> Result<()> {
    let matches = command().get_matches();
    match matches.subcommand() {
        Some(("bare", matches)) => {
            let files = ["certificate", "key"].map(|name| matches.get_one::<PathBuf>(name));
            let identity = match files {
                [Some(certificate), Some(key)] => Some(TlsIdentity { certificate, key }),
                _ => None,
            };
            bare_hyper::serve(path(matches, "answer"), number(matches, "port"), identity.as_ref())
        }
        Some(("connect", matches)) => handshake_load::run(LoadPlan {
            host: number(matches, "host"),
            request: std::fs::read_to_string(path(matches, "request"))?,
            first: number(matches, "first"),
            connections: number(matches, "connections"),
            duration: Duration::from_secs(number(matches, "seconds")),
            resumes: matches.get_flag("resume"),
        }),
        Some(("upstream", matches)) => {
            upstream::serve(number(matches, "flags"), number(matches, "port"))
        }
        Some(_) => unreachable!("clap rejects other subcommands"),
        None if matches.get_flag("bench") => bench(&matches),
        None => {
            // `cargo test --all-targets` runs this, too.
            println!("nothing measured: this runs by `cargo bench --bench serve`");
            Ok(())
        }
    }
}

fn command() -> Command {
    let switch = |name, help| Arg::new(name).long(name).help(help).action(ArgAction::SetTrue);
    let option = |name, help| Arg::new(name).long(name).help(help);
    let needed = |name| Arg::new(name).long(name).required(true);
    let count = || value_parser!(u16).range(1..);
    Command::new("serve")
        .about(
            "Compares Parapet with a bare hyper server, and with Unleash Edge if it is installed",
        )
        .arg(switch("quick", "A quick run: one round of one second"))
        .arg(
            option("only", "Measure only this part; repeatable")
                .action(ArgAction::Append)
                .value_parser(parts().collect::<Vec<_>>()),
        )
        .arg(option("rounds", "Number of rounds [default: 5]").value_parser(count()))
        .arg(
            option("seconds", "Seconds of load for each server in each round [default: 2]")
                .value_parser(count()),
        )
        .arg(
            option("unleash-edge", "Executable of Unleash Edge, if it is not in PATH")
                .value_parser(value_parser!(PathBuf)),
        )
        .arg(
            option(
                "docs",
                "Write speed.md and its plots to this directory [default: docs, after a full run]",
            )
            .value_parser(value_parser!(PathBuf)),
        )
        .arg(switch("bench", "Passed by cargo").hide(true))
        .subcommand(
            Command::new("bare")
                .about("The baseline; started by the benchmark itself")
                .arg(needed("answer").value_parser(value_parser!(PathBuf)))
                .arg(needed("port").value_parser(value_parser!(u16)))
                .arg(needed("certificate").required(false).value_parser(value_parser!(PathBuf)))
                .arg(needed("key").required(false).value_parser(value_parser!(PathBuf))),
        )
        .subcommand(
            Command::new("connect")
                .about("Clients that connect for each request; started by the benchmark itself")
                .arg(needed("host").value_parser(value_parser!(SocketAddr)))
                .arg(needed("request").value_parser(value_parser!(PathBuf)))
                .arg(needed("first").value_parser(value_parser!(u64)))
                .arg(needed("connections").value_parser(value_parser!(usize)))
                .arg(needed("seconds").value_parser(value_parser!(u64)))
                .arg(switch("resume", "Resume sessions")),
        )
        .subcommand(
            Command::new("upstream")
                .about("A server whose flags change; started by the benchmark itself")
                .arg(needed("flags").value_parser(value_parser!(usize)))
                .arg(needed("port").value_parser(value_parser!(u16))),
        )
}

const SWAP: &str = "swap";
const MEMORY: &str = "memory";

/// The ids of the parts that can be measured alone.
fn parts() -> impl Iterator<Item = &'static str> {
    let rows = ROWS.iter().map(|row| row.id);
    rows.chain(CURVES.iter().map(|curve| curve.id)).chain([SWAP, MEMORY])
}

fn number<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, name: &str) -> T {
    matches.get_one::<T>(name).expect("it is required").clone()
}

fn path<'a>(matches: &'a ArgMatches, name: &str) -> &'a Path {
    matches.get_one::<PathBuf>(name).expect("it is required")
}

fn bench(matches: &ArgMatches) -> Result<()> {
    load::check_wrk()?;
    let folder = tempfile::tempdir()?;
    let edge = matches.get_one::<PathBuf>("unleash-edge");
    let quick = matches.get_flag("quick");
    let count = |name, usual| match matches.get_one::<u16>(name) {
        Some(&count) => count,
        None if quick => 1,
        None => usual,
    };
    let session = Session {
        contenders: Contenders::new(folder.path(), edge.map(PathBuf::as_path))?,
        rounds: usize::from(count("rounds", 5)),
        duration: Duration::from_secs(count("seconds", 2).into()),
        last_number: Cell::new(1_000_000_000),
    };
    if !session.contenders.has_edge() {
        eprintln!(
            "Unleash Edge is not installed and is skipped: `cargo install unleash-edge --version {} --locked`",
            contender::EDGE_VERSION
        );
    }
    server_process::raise_fd_limit()?;
    let only: Vec<&String> = matches.get_many("only").unwrap_or_default().collect();
    let is_selected = |id: &str| only.is_empty() || only.iter().any(|it| *it == id);
    let rows = ROWS.iter().filter(|row| is_selected(row.id));
    let curves = CURVES.iter().filter(|curve| is_selected(curve.id));
    let mut failures = Failures::default();
    let report = Report {
        outcomes: rows.filter_map(|row| failures.attempt(row.id, || row.run(&session))).collect(),
        growths: curves.filter_map(|it| failures.attempt(it.id, || it.run(&session))).collect(),
        swaps: Some(SWAP)
            .filter(|id| is_selected(id))
            .and_then(|id| failures.attempt(id, || latency_during_updates::run(&session)))
            .unwrap_or_default(),
        memory: Some(MEMORY)
            .filter(|id| is_selected(id))
            .and_then(|id| failures.attempt(id, || memory::run(&session)))
            .unwrap_or_default(),
    };
    let edge =
        if session.contenders.has_edge() { contender::EDGE_VERSION } else { "not installed" };
    let load = format!("{}, one thread", machine::first_line("wrk", "--version"));
    let facts = [("Unleash Edge", edge), ("load", &load)];
    let machine = machine::describe("the load generator shares", &facts)?;
    println!("{machine}\n\n{}", report.tables());
    ensure!(
        failures.0.is_empty(),
        "some parts failed, so nothing was written: {}",
        failures.0.join(", ")
    );
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let docs_option = matches.get_one::<PathBuf>("docs");
    let whole = !quick && only.is_empty() && session.contenders.has_edge();
    if let Some(docs) = docs_option.or(Some(&own).filter(|_| whole)) {
        let (rounds, seconds) = (session.rounds, session.duration.as_secs());
        let command = format!("cargo bench --bench serve -- --rounds {rounds} --seconds {seconds}");
        report.write(docs, &machine, &command)?;
        eprintln!("wrote {}", docs.join("speed.md").display());
    }
    Ok(())
}

/// The ids of the parts whose measurement failed.
#[derive(Debug, Default)]
struct Failures(Vec<&'static str>);

impl Failures {
    /// Runs one part. An error is printed, and the other parts continue.
    fn attempt<T>(&mut self, id: &'static str, part: impl FnOnce() -> Result<T>) -> Option<T> {
        part()
            .inspect_err(|error| {
                eprintln!("{id} failed: {error:#}");
                self.0.push(id);
            })
            .ok()
    }
}
