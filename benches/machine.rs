//! The conditions of a measurement: machine, versions and date.

use std::{fs, process::Command};

use anyhow::Result;
use jiff::Timestamp;

/// The facts that a reader needs to judge the numbers, as a Markdown list: the machine, the build, and
/// these further facts. `sharers` names other users of processor time beside the servers.
pub(crate) fn describe(sharers: &str, facts: &[(&str, &str)]) -> Result<String> {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let memory = memory.and_then(|it| it.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    // Without the distribution's suffix.
    let kernel = kernel.split('-').next().unwrap_or_default();
    let cores = std::thread::available_parallelism()?;
    let machine = format!(
        "{}, {cores} cores that {sharers}, {:.0} GiB, Linux {}",
        model.map_or("unknown processor", |(_, model)| model),
        memory.map_or(f64::NAN, super::numbers::to_f64) / 1024.0 / 1024.0,
        kernel.trim(),
    );
    let built = first_line("rustc", "--version");
    let parapet = format!("{} ({})", env!("CARGO_PKG_VERSION"), revision());
    let date = Timestamp::now().strftime("%Y-%m-%d").to_string();
    let first = [("machine", &*machine), ("built by", &built), ("Parapet", &parapet)];
    let all = [&first, facts, &[("date", &date)]].concat();
    Ok(all.iter().map(|(name, value)| format!("* {name}: {value}")).collect::<Vec<_>>().join("\n"))
}

/// The first line of a program's output.
pub(crate) fn first_line(program: &str, argument: &str) -> String {
    let output = Command::new(program).arg(argument).output();
    let text = output.map(|it| String::from_utf8_lossy(&it.stdout).into_owned());
    let line = text.ok().and_then(|text| text.lines().next().map(str::to_owned));
    let line = line.unwrap_or_else(|| format!("{program}, unknown"));
    line.split(" Copyright").next().unwrap_or_default().trim().to_owned()
}

/// The measured commit.
fn revision() -> String {
    let git = |arguments: &[&str]| {
        let output =
            Command::new("git").current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments).output();
        output.ok().filter(|it| it.status.success())
    };
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else {
        return "no commit".to_owned();
    };
    let clean = git(&["diff", "--quiet", "HEAD", "--", "src", "Cargo.lock"]).is_some();
    let changed = if clean { "" } else { ", changed" };
    format!("{}{changed}", String::from_utf8_lossy(&commit.stdout).trim())
}
