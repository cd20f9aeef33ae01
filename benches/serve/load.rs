//! Load, by `wrk`: one thread, and as many connections as it is told.

use std::{fmt::Write as _, net::SocketAddr, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::exchange::{DRAWN, Request};

/// Which number a request gets in the place of [`DRAWN`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum Draw {
    /// None: all requests are the same.
    Nothing,
    /// The next: no two requests have the same.
    Next,
    /// Any below this.
    Below(u64),
}

/// What one run showed.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Sample {
    pub(crate) requests: f64,
    /// Of responses, heads and bodies.
    pub(crate) bytes: f64,
    /// How long it took.
    pub(crate) micros: f64,
    pub(crate) p50_micros: f64,
    pub(crate) p99_micros: f64,
    pub(crate) socket_errors: u64,
    pub(crate) status_errors: u64,
}

impl Sample {
    pub(crate) fn per_second(&self) -> f64 {
        self.requests / self.micros * 1e6
    }
}

/// What `wrk` is to do at its end.
const DONE: &str = r#"
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    'SAMPLE {"requests":%d,"bytes":%.0f,"micros":%d,"p50_micros":%d,"p99_micros":%d,"socket_errors":%d,"status_errors":%d}\n',
    summary.requests, summary.bytes, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.timeout, errors.status))
end
"#;

/// Fails where there is no `wrk`.
pub(crate) fn installed() -> Result<()> {
    // It has no way of telling its version that it counts as a success.
    Command::new("wrk").arg("--version").output().context(MISSING)?;
    Ok(())
}

const MISSING: &str = "cannot run `wrk` (the package of this name in Debian)";

/// Loads `host` for a time. An answer that is not one, or of a status above 399, is an error.
///
/// Numbers that are [`Draw::Next`] begin after `first`. Each connection pauses before each request.
pub(crate) fn run(
    folder: &Path,
    host: SocketAddr,
    request: &Request,
    (draw, first): (Draw, u64),
    (connections, pause): (usize, Duration),
    time: Duration,
) -> Result<Sample> {
    let script = folder.join("load.lua");
    std::fs::write(&script, lua(host, request, draw, first, pause))?;
    let mut command = Command::new("wrk");
    command.args(["-t1", &format!("-c{connections}"), &format!("-d{}s", time.as_secs())]);
    command.args(["--timeout", "30s", "--latency", "-s"]).arg(&script);
    let output = command.arg(format!("http://{host}{}", request.path)).output();
    let output = output.context(MISSING)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let sample = text.lines().find_map(|line| line.strip_prefix("SAMPLE "));
    let Some(sample) = sample else {
        bail!("wrk failed: {text}{}", String::from_utf8_lossy(&output.stderr));
    };
    let sample: Sample = serde_json::from_str(sample)?;
    if sample.socket_errors + sample.status_errors > 0 || sample.requests < 1.0 {
        bail!("not every request was answered: {sample:?}");
    }
    Ok(sample)
}

/// The script for `wrk`. Requests that are all the same are left to its fastest way.
fn lua(host: SocketAddr, request: &Request, draw: Draw, first: u64, pause: Duration) -> String {
    let mut script = String::new();
    let mut line = |text: String| writeln!(script, "{text}").expect("a string takes all");
    if let Draw::Nothing = draw {
        for (name, value) in &request.headers {
            line(format!("wrk.headers[{name:?}] = {value:?}"));
        }
    } else {
        let text = request.text(host);
        let parts: Vec<String> = text.split(DRAWN).map(|part| format!("{part:?}")).collect();
        let number = match draw {
            Draw::Nothing | Draw::Next => "n + 1".to_owned(),
            Draw::Below(end) => format!("math.random(0, {})", end - 1),
        };
        line(format!("math.randomseed({first})\nlocal n = {first}"));
        line(format!("local parts = {{ {} }}", parts.join(", ")));
        let names: Vec<String> = (1..=parts.len()).map(|n| format!("part{n}")).collect();
        line(format!("local {} = unpack(parts)", names.join(", ")));
        line(format!("function request()\n  n = {number}"));
        line(format!(
            "  local drawn = string.format(\"%d\", n)\n  return {}\nend",
            names.join(" .. drawn .. ")
        ));
    }
    if !pause.is_zero() {
        line(format!("function delay()\n  return {}\nend", pause.as_millis()));
    }
    line(DONE.to_owned());
    script
}
