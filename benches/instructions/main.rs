//! Counts the instructions of the hot paths, and reports when one has grown.
//!
//! ```console
//! $ cargo bench --bench instructions                      # count all, compare with counts.toml
//! $ cargo bench --bench instructions -- frontend          # those whose names contain this
//! $ cargo bench --bench instructions -- --update          # and store the new counts
//! ```
//!
//! Every scenario runs in its own process under `valgrind --tool=callgrind`, which counts user-space
//! instructions. Unlike time, this hardly depends on other load on the machine. A count that grows by
//! more than [`TOLERANCE_PERCENT`] is an error, with exit code 1. The counts do not measure speed:
//! memory and the kernel cost nothing here, and valgrind's processor has no SHA extensions, so that a
//! token's digest costs about ten times its real cost. Other versions of the compiler and of the
//! system's libraries give other counts.
//!
//! To see the parts of a count, run one scenario by hand, `…/deps/instructions-… --run NAME` under
//! `valgrind --tool=callgrind`, and read its output with `callgrind_annotate`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is a command")]

#[path = "../flags.rs"]
mod flags;
mod requests;
mod scenarios;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, ensure};

use self::scenarios::{SCENARIOS, Scenario};

/// The percentage by which a count may differ from the stored one.
const TOLERANCE_PERCENT: f64 = 5.0;

const COUNTS_FILE: &str = "benches/instructions/counts.toml";

const HEADER: &str = "\
# Instructions per request, or per operation in the name; see main.rs in this directory.
# Written by `cargo bench --bench instructions -- --update`; do not edit.
";

/// The name of [`counted`] in callgrind's symbols.
const COUNTED: &str = "instructions::counted";

/// Runs `work`; callgrind counts the instructions of this thread meanwhile.
#[inline(never)]
fn counted(work: &mut dyn FnMut()) {
    work();
    // Otherwise this would be a tail call, and the function would never return.
    std::hint::black_box(());
}

fn main() -> anyhow::Result<ExitCode> {
    #[allow(clippy::disallowed_methods, reason = "it is no setting of Parapet")]
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (update, filter) = match arguments[..] {
        ["--run", name] => {
            let scenario = SCENARIOS.iter().find(|scenario| scenario.name == name);
            scenario.context("there is no such scenario")?.run();
            return Ok(ExitCode::SUCCESS);
        }
        [] => (false, ""),
        ["--update"] => (true, ""),
        ["--update", filter] | [filter, "--update"] => (true, filter),
        [filter] => (false, filter),
        _ => anyhow::bail!("usage: cargo bench --bench instructions -- [--update] [PART-OF-NAME]"),
    };
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(COUNTS_FILE);
    let kept = read_counts(&file)?;
    let chosen: Vec<_> = SCENARIOS.iter().filter(|it| it.name.contains(filter)).collect();
    ensure!(!chosen.is_empty(), "no scenario's name contains `{filter}`");
    let counts = count_all(&chosen)?;
    let sound = report(&chosen, &counts, &kept);
    if update {
        std::fs::write(&file, counts_toml(&kept, &counts))?;
        println!("\nWritten to {COUNTS_FILE}.");
        return Ok(ExitCode::SUCCESS);
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The stored counts, by scenario.
fn read_counts(file: &Path) -> anyhow::Result<BTreeMap<String, u64>> {
    if !file.exists() {
        return Ok(BTreeMap::new());
    }
    toml::from_str(&std::fs::read_to_string(file)?)
        .with_context(|| format!("{COUNTS_FILE} is unreadable"))
}

/// The new contents of the file: the new count of each scenario, or else the stored one.
fn counts_toml(kept: &BTreeMap<String, u64>, counts: &BTreeMap<&str, u64>) -> String {
    let count = |scenario: &Scenario| {
        let new = counts.get(scenario.name).or_else(|| kept.get(scenario.name));
        Some((scenario.name, *new?))
    };
    let mut text = HEADER.to_owned();
    for (name, count) in SCENARIOS.iter().filter_map(count) {
        writeln!(text, "{name:?} = {}", thousands(count, '_')).expect("memory takes it");
    }
    text
}

/// Prints the table. Returns true if no count has grown and every scenario has a stored count.
fn report(
    chosen: &[&Scenario],
    counts: &BTreeMap<&str, u64>,
    kept: &BTreeMap<String, u64>,
) -> bool {
    let mut sound = true;
    println!("{:<48}{:>14}{:>14}", "instructions", "stored", "counted");
    for Scenario { name, .. } in chosen {
        let count = counts[name];
        let Some(&before) = kept.get(*name) else {
            println!("{name:<48}{:>14}{:>14}  NEW", "", thousands(count, ','));
            sound = false;
            continue;
        };
        #[allow(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let change = (count as f64 / before as f64 - 1.0) * 100.0;
        let remark = match change {
            grown if grown > TOLERANCE_PERCENT => {
                sound = false;
                "  GROWN"
            }
            fallen if fallen < -TOLERANCE_PERCENT => "  fallen",
            _ => "",
        };
        let (before, count) = (thousands(before, ','), thousands(count, ','));
        println!("{name:<48}{before:>14}{count:>14} {change:>+6.1} %{remark}");
    }
    for name in kept.keys().filter(|name| SCENARIOS.iter().all(|it| it.name != **name)) {
        println!("{name:<48} is stored, but has no scenario");
        sound = false;
    }
    if !sound {
        println!(
            "\nMake it cheaper, or explain in the change why it may cost more, and store the new"
        );
        println!("counts: cargo bench --bench instructions -- --update");
    }
    sound
}

fn thousands(count: u64, separator: char) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(separator);
        }
        text.push(digit);
    }
    text
}

/// Counts all scenarios, one per processor at a time.
fn count_all(chosen: &[&Scenario]) -> anyhow::Result<BTreeMap<&'static str, u64>> {
    let version = Command::new("valgrind").arg("--version").output();
    version.context("valgrind is missing: apt-get install valgrind")?;
    let (next, counts) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let work = || -> anyhow::Result<()> {
        while let Some(scenario) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
            let count = count(scenario).with_context(|| scenario.name)?;
            counts.lock().unwrap_or_else(PoisonError::into_inner).insert(scenario.name, count);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("workers do not panic"))
    })?;
    Ok(counts.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// The instructions of one iteration of a scenario.
fn count(scenario: &Scenario) -> anyhow::Result<u64> {
    let folder = tempfile::tempdir()?;
    let written: PathBuf = folder.path().join("callgrind.out");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--quiet", &format!("--toggle-collect={COUNTED}")])
        .arg(format!("--callgrind-out-file={}", written.display()))
        .arg(std::env::current_exe()?)
        .args(["--run", scenario.name])
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let written = std::fs::read_to_string(&written)?;
    let total = written.lines().find_map(|line| line.strip_prefix("totals: "));
    let total: u64 = total.context("callgrind reported no total")?.trim().parse()?;
    ensure!(total > 0, "callgrind found no function {COUNTED}");
    Ok(total / scenario.iterations)
}
