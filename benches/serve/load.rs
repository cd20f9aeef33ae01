//! Load from `wrk`: one thread, and a configurable number of connections. If each request needs its own
//! connection, the load comes from this executable instead, with the subcommand `connect`.

use std::{fmt::Write as _, net::SocketAddr, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::exchange::{NUMBER, OCTET, OCTETS, Request, UNIQUE_NUMBER};

/// How the number for [`NUMBER`] is chosen.
#[derive(Clone, Copy, Debug)]
pub(crate) enum NumberSource {
    /// The next number, different for each request.
    Sequential,
    /// A random number below this.
    RandomBelow(u64),
}

/// The transport of requests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Transport {
    /// Reused TCP connections.
    Tcp,
    /// Reused TLS connections.
    Tls,
    /// A TLS connection for each request, with a full handshake.
    NewTls,
    /// A TLS connection for each request, which resumes the session of the previous one.
    ResumedTls,
}

impl Transport {
    pub(crate) fn is_encrypted(self) -> bool {
        self != Self::Tcp
    }
}

/// The result of one run.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Sample {
    pub(crate) requests: f64,
    /// The size of all responses, heads and bodies.
    pub(crate) bytes: f64,
    /// The duration of the run.
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

/// Precedes a sample in the output of the load generator.
pub(crate) const SAMPLE_PREFIX: &str = "SAMPLE ";

/// A function that `wrk` calls at the end.
const WRK_DONE_SCRIPT: &str = r#"
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    'SAMPLE {"requests":%d,"bytes":%.0f,"micros":%d,"p50_micros":%d,"p99_micros":%d,"socket_errors":%d,"status_errors":%d}\n',
    summary.requests, summary.bytes, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.timeout, errors.status))
end
"#;

/// Errors if `wrk` is not installed.
pub(crate) fn check_wrk() -> Result<()> {
    // `wrk --version` always fails, so its exit code is ignored.
    Command::new("wrk").arg("--version").output().context(WRK_MISSING)?;
    Ok(())
}

const WRK_MISSING: &str = "cannot run `wrk` (the package of this name in Debian)";

/// Loads `host` for a time. An invalid response or a status above 399 is an error.
///
/// With [`NumberSource::Sequential`] numbers start after `first`. Each connection pauses before each
/// request.
pub(crate) fn run(
    folder: &Path,
    (host, over): (SocketAddr, Transport),
    request: &Request,
    (draw, first): (NumberSource, u64),
    (connections, pause): (usize, Duration),
    time: Duration,
) -> Result<Sample> {
    let scheme = match over {
        Transport::Tcp => "http",
        Transport::Tls => "https",
        Transport::NewTls | Transport::ResumedTls => {
            let file = folder.join("request");
            std::fs::write(&file, request.text(host))?;
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["connect", "--host", &host.to_string(), "--request"]).arg(file);
            command.args(["--first", &first.to_string()]);
            command.args(["--connections", &connections.to_string()]);
            command.args(["--seconds", &time.as_secs().to_string()]);
            command.args((over == Transport::ResumedTls).then_some("--resume"));
            return run_for_sample(&mut command);
        }
    };
    let script = folder.join("load.lua");
    std::fs::write(&script, wrk_script(host, request, draw, first, pause))?;
    let mut command = Command::new("wrk");
    command.args(["-t1", &format!("-c{connections}"), &format!("-d{}s", time.as_secs())]);
    command.args(["--timeout", "30s", "--latency", "-s"]).arg(&script);
    run_for_sample(command.arg(format!("{scheme}://{host}{}", request.path)))
}

/// Runs a load generator that prints a sample.
fn run_for_sample(command: &mut Command) -> Result<Sample> {
    let output = command.output().with_context(|| format!("{WRK_MISSING}: {command:?}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let sample = text.lines().find_map(|line| line.strip_prefix(SAMPLE_PREFIX));
    let Some(sample) = sample else {
        bail!("{command:?} failed: {text}{}", String::from_utf8_lossy(&output.stderr));
    };
    let sample: Sample = serde_json::from_str(sample)?;
    if sample.socket_errors + sample.status_errors > 0 || sample.requests < 1.0 {
        bail!("not every request got a valid response: {sample:?}");
    }
    Ok(sample)
}

/// The script for `wrk`. Identical requests use its fastest path, without a function.
fn wrk_script(
    host: SocketAddr,
    request: &Request,
    draw: NumberSource,
    first: u64,
    pause: Duration,
) -> String {
    let mut script = String::new();
    let mut line = |text: String| writeln!(script, "{text}").expect("a string takes all");
    let text = request.text(host);
    let numbers = [(NUMBER, "drawn"), (UNIQUE_NUMBER, "each"), (OCTET, "byte")];
    if numbers.iter().any(|(mark, _)| text.contains(mark)) {
        // The text in pieces, with numbers between them.
        let mut pieces = vec![];
        let mut rest = &*text;
        let next = |rest: &str| {
            let found =
                numbers.iter().filter_map(|(mark, name)| Some((rest.find(mark)?, mark, name)));
            found.min()
        };
        while let Some((at, mark, name)) = next(rest) {
            pieces.extend([format!("{:?}", &rest[..at]), (*name).to_owned()]);
            rest = &rest[at + mark.len()..];
        }
        pieces.push(format!("{rest:?}"));
        let drawn = match draw {
            NumberSource::Sequential => "each".to_owned(),
            NumberSource::RandomBelow(end) => {
                format!("string.format(\"%d\", math.random(0, {}))", end - 1)
            }
        };
        line(format!("math.randomseed({first})\nlocal n = {first}"));
        line("function request()\n  n = n + 1\n  local each = string.format(\"%d\", n)".to_owned());
        line(format!("  local drawn, byte = {drawn}, n % {OCTETS}"));
        line(format!("  return {}\nend", pieces.join(" .. ")));
    } else {
        for (name, value) in &request.headers {
            line(format!("wrk.headers[{name:?}] = {value:?}"));
        }
    }
    if !pause.is_zero() {
        line(format!("function delay()\n  return {}\nend", pause.as_millis()));
    }
    line(WRK_DONE_SCRIPT.to_owned());
    script
}
