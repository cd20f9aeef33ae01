//! Logging, the metrics registry and the readiness of the process.
//!
//! Log events are truncated to 4 KiB, because clients, upstream and files can supply parts of them.
//!
//! Each module names and describes its own metrics. This module only installs the registry and sets the
//! histogram buckets. It does not listen or serve: `http` renders the registry, and `app` runs its
//! upkeep.

mod log_limiter;

use std::{
    collections::BTreeMap,
    error::Error,
    io::{self, IsTerminal as _},
    iter,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use serde_json::Value;
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    fmt::{self, FormatEvent, FormatFields, Formatter, MakeWriter, SubscriberBuilder},
    registry::LookupSpan,
    util::SubscriberInitExt as _,
};

pub use self::log_limiter::LogLimiter;
use crate::protocol::excerpt::Excerpt;

/// The source revision of this binary, if the build provides it.
pub const REVISION: &str = match option_env!("PARAPET_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

/// Bucket bounds of histograms whose names end in `_seconds`: from 50 µs, a cached response, to 10 s,
/// the default timeout of a request.
pub const SECONDS_BUCKETS: [f64; 17] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0,
];

/// Bucket bounds of histograms whose names end in `_bytes`: from an empty response to a large flag set.
pub const BYTES_BUCKETS: [f64; 8] =
    [256.0, 1_024.0, 4_096.0, 16_384.0, 65_536.0, 262_144.0, 1_048_576.0, 8_388_608.0];

/// The format of log events.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum LogFormat {
    /// One line per event.
    #[default]
    Plain,
    /// One JSON object per event.
    Json,
    /// Several lines per event, for reading at a terminal.
    Pretty,
}

impl LogFormat {
    /// Parses a format's name, in any case.
    pub fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "plain" => Some(Self::Plain),
            "json" => Some(Self::Json),
            "pretty" => Some(Self::Pretty),
            _ => None,
        }
    }
}

/// Configuration of the log.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    /// The format of events.
    pub format: LogFormat,
    /// Levels per target, in the syntax of `RUST_LOG`.
    pub filter: String,
}

impl Config {
    /// Parses and normalises a [`Config::filter`].
    ///
    /// A bare word that is not a level is rejected. `RUST_LOG` would read it as a target and disable
    /// every other target, but it is far more likely a misspelt level.
    pub fn parse_filter(text: &str) -> Option<String> {
        let directives: Option<Vec<_>> = text.split(',').map(parse_directive).collect();
        let filter = directives?.join(",");
        EnvFilter::try_new(&filter).is_ok().then_some(filter)
    }
}

/// The accepted levels of a directive without a target.
const LEVELS: [&str; 12] =
    ["off", "error", "warn", "info", "debug", "trace", "0", "1", "2", "3", "4", "5"];

/// Parses a directive; `None` for a bare word that is not a level. `warning` is accepted for `warn`.
fn parse_directive(text: &str) -> Option<String> {
    let text = text.trim();
    let (target, level) =
        text.rsplit_once('=').map_or((None, text), |(target, level)| (Some(target), level));
    let level = if level.eq_ignore_ascii_case("warning") { "warn" } else { level };
    match target {
        Some(target) => Some(format!("{target}={level}")),
        // Paths and spans are targets, and empty directives are ignored.
        None if text.is_empty() || text.contains("::") || text.contains(['[', ']', '{', '}']) => {
            Some(text.to_owned())
        }
        None => LEVELS.iter().any(|it| it.eq_ignore_ascii_case(level)).then(|| level.to_owned()),
    }
}

/// Targets that are off by default. rustls logs an error for each failed handshake, which the failed
/// request logs as well, and only once; PostgreSQL sends notices about successful statements; sqlx warns
/// of each pooled connection that has broken, which the failed operation logs.
const QUIET_TARGETS: &str =
    "rustls=off,rustls_platform_verifier=off,sqlx::postgres::notice=off,sqlx_core::pool=off";

/// The filter of `config`, which can override [`QUIET_TARGETS`].
fn filter(config: &Config) -> Option<EnvFilter> {
    EnvFilter::try_new(format!("{QUIET_TARGETS},{}", config.filter)).ok()
}

/// Starts logging, once per process; later calls have no effect.
///
/// Events go to standard output, as with Unleash Edge, so that deployments that collect them there keep
/// working. Standard error is used only for errors that prevent the start.
pub fn start_logging(config: &Config) {
    let filter = filter(config).unwrap_or_else(|| EnvFilter::new("info"));
    let colours = io::stdout().is_terminal();
    let format = config.format;
    let writer = move || BoundedWriter { out: io::stdout(), format };
    let lines = fmt::fmt().with_env_filter(filter).with_writer(writer).with_ansi(colours);
    // Fails if a test or an earlier call has set a subscriber, which then stays.
    match config.format {
        LogFormat::Plain => install(lines),
        LogFormat::Json => install(lines.json().flatten_event(true)),
        LogFormat::Pretty => install(lines.pretty()),
    }
}

/// Replaces the filter of the subscriber that [`start_logging`] installed.
static SET_FILTER: OnceLock<Box<dyn Fn(EnvFilter) -> bool + Send + Sync>> = OnceLock::new();

fn install<N, E, W>(lines: SubscriberBuilder<N, E, EnvFilter, W>)
where
    N: for<'a> FormatFields<'a> + Send + Sync + 'static,
    E: FormatEvent<Registry, N> + Send + Sync + 'static,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
    fmt::Layer<Registry, N, E, W>: Layer<Registry> + Send + Sync + 'static,
    Formatter<N, E, W>: tracing::Subscriber + for<'a> LookupSpan<'a> + Send + Sync + 'static,
{
    let lines = lines.with_filter_reloading();
    let handle = lines.reload_handle();
    if lines.finish().try_init().is_ok() {
        let _ = SET_FILTER.set(Box::new(move |filter| handle.reload(filter).is_ok()));
    }
}

/// Applies the filter of `config`; the format does not change.
pub fn set_log_filter(config: &Config) {
    if let (Some(set), Some(filter)) = (SET_FILTER.get(), filter(config)) {
        set(filter);
    }
}

/// Formats an error and its causes in one line, for the log. Each is truncated to `MAX_CAUSE_BYTES`,
/// because it may quote unreadable input. A cause is omitted if the error before it already ends with
/// it.
///
/// Do not use it for errors whose causes may quote input that contains tokens.
pub fn error_chain(error: &dyn Error) -> String {
    let causes = iter::successors(Some(error), |error| Error::source(*error));
    let mut texts: Vec<String> = causes.map(ToString::to_string).collect();
    texts.dedup_by(|cause, before| before.ends_with(&**cause));
    let excerpt = |text: &String| Excerpt::up_to(MAX_CAUSE_BYTES, text).to_string();
    texts.iter().map(excerpt).collect::<Vec<_>>().join(": ")
}

/// The longest text of one error in the log, in bytes.
const MAX_CAUSE_BYTES: usize = 1024;

/// The longest event in the log, in bytes, including its line break.
const MAX_EVENT_BYTES: usize = 4096;

/// Writes each event with one call, and truncates those longer than [`MAX_EVENT_BYTES`].
#[derive(Debug)]
struct BoundedWriter<W> {
    out: W,
    format: LogFormat,
}

impl<W: io::Write> io::Write for BoundedWriter<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        if event.len() <= MAX_EVENT_BYTES {
            self.out.write_all(event)?;
        } else {
            let text = String::from_utf8_lossy(event);
            let truncated = match self.format {
                LogFormat::Json => truncate_json(&text),
                LogFormat::Plain | LogFormat::Pretty => None,
            };
            self.out.write_all(truncated.unwrap_or_else(|| truncate_text(&text)).as_bytes())?;
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The beginning of an event, with colours reset at the end.
fn truncate_text(event: &str) -> String {
    let reset = if event.contains('\u{1b}') { "\u{1b}[0m" } else { "" };
    let tail = format!("{reset}… ({} bytes)\n", event.len());
    let end = event.floor_char_boundary(MAX_EVENT_BYTES - tail.len());
    format!("{}{tail}", &event[..end])
}

/// The event with its longest strings truncated, so that it is still valid JSON. `None` if it is not
/// JSON or has too many strings.
fn truncate_json(event: &str) -> Option<String> {
    let event: Value = serde_json::from_str(event).ok()?;
    [1024, 256, 64, 8].into_iter().find_map(|len| {
        let mut truncated = event.clone();
        truncate_strings(&mut truncated, len);
        Some(format!("{truncated}\n")).filter(|line| line.len() <= MAX_EVENT_BYTES)
    })
}

fn truncate_strings(value: &mut Value, len: usize) {
    match value {
        Value::String(text) if text.len() > len => {
            *text = Excerpt::up_to(len, text).to_string();
        }
        Value::Array(items) => items.iter_mut().for_each(|item| truncate_strings(item, len)),
        Value::Object(members) => members.values_mut().for_each(|item| truncate_strings(item, len)),
        _ => {}
    }
}

/// Installs the metrics registry, once per process; later calls return the same one.
///
/// Its owner must call [`PrometheusHandle::run_upkeep`] every few seconds, otherwise histogram samples
/// accumulate between scrapes.
pub fn start_metrics() -> PrometheusHandle {
    static REGISTRY: OnceLock<PrometheusHandle> = OnceLock::new();
    REGISTRY.get_or_init(install_recorder).clone()
}

fn install_recorder() -> PrometheusHandle {
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS_BUCKETS)
        .and_then(|builder| {
            builder.set_buckets_for_metric(Matcher::Suffix("_bytes".to_owned()), &BYTES_BUCKETS)
        })
        .expect("the list of bounds is not empty")
        .build_recorder();
    let registry = recorder.handle();
    // Fails only if a test has installed its recorder, which then stays.
    let _ = metrics::set_global_recorder(recorder);
    metrics::describe_gauge!(
        "build_info",
        "Always 1; its labels are the version and revision of this build"
    );
    let version = env!("CARGO_PKG_VERSION");
    metrics::gauge!("build_info", "version" => version, "revision" => REVISION).set(1.0);
    registry
}

/// Whether this process should receive requests: from the moment that its last [`ReadinessCondition`] is
/// met until [`Readiness::drain`].
///
/// Once ready, only draining makes it unready; losing the upstream does not.
#[derive(Clone, Debug)]
pub struct Readiness {
    pending: Pending,
    draining: Arc<AtomicBool>,
}

/// The descriptions of the conditions that are not met, in order of creation.
#[derive(Clone, Debug, Default)]
struct Pending(Arc<Mutex<BTreeMap<u32, String>>>);

impl Pending {
    /// Ignores poisoning: a panic under this lock leaves the map intact.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_condition(&self) -> ReadinessCondition {
        let mut pending = self.lock();
        let id = pending.last_key_value().map_or(0, |(last, _)| last + 1);
        pending.insert(id, "the first flags of an environment".to_owned());
        ReadinessCondition { pending: self.clone(), id, is_met: AtomicBool::new(false) }
    }
}

/// A condition that must hold before the process is ready.
///
/// A condition that is dropped before it is met keeps the process unready permanently. A task that is
/// restarted after a panic therefore only borrows its condition.
#[derive(Debug)]
#[must_use = "dropping a condition that is not met keeps the process unready"]
pub struct ReadinessCondition {
    pending: Pending,
    id: u32,
    is_met: AtomicBool,
}

impl Readiness {
    /// The readiness of a starting process, and its first condition.
    pub fn new() -> (Self, ReadinessCondition) {
        let pending = Pending::default();
        let ready_when = pending.add_condition();
        (Self { pending, draining: Arc::default() }, ready_when)
    }

    /// Whether the process should receive requests.
    pub fn is_ready(&self) -> bool {
        !self.is_draining() && self.pending.lock().is_empty()
    }

    /// Descriptions of the conditions that are not met yet.
    pub fn pending_conditions(&self) -> Vec<String> {
        self.pending.lock().values().cloned().collect()
    }

    /// Makes the process unready permanently, because it is shutting down.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Whether [`Readiness::drain`] was called.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
}

impl ReadinessCondition {
    /// Adds another condition. Call it before this one is met.
    pub fn add_condition(&self) -> Self {
        self.pending.add_condition()
    }

    /// Sets the description of the condition, for operators.
    pub fn describe(&self, description: impl Into<String>) {
        if let Some(text) = self.pending.lock().get_mut(&self.id) {
            *text = description.into();
        }
    }

    /// Marks the condition as met. Repeated calls have no effect.
    pub fn mark_met(&self) {
        if !self.is_met.swap(true, Ordering::Relaxed) {
            self.pending.lock().remove(&self.id);
        }
    }

    /// Whether it is met.
    pub fn is_met(&self) -> bool {
        self.is_met.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_is_ready_once_all_conditions_are_met_until_it_drains() {
        let (readiness, first) = Readiness::new();
        let second = first.add_condition();
        assert!(!readiness.is_ready());
        first.mark_met();
        first.mark_met();
        assert!(!readiness.is_ready());
        second.describe("the first flags");
        assert_eq!(readiness.pending_conditions(), ["the first flags"]);
        second.mark_met();
        assert!(readiness.is_ready() && readiness.pending_conditions().is_empty());
        readiness.drain();
        assert!(!readiness.is_ready());
    }

    #[test]
    fn process_stays_unready_after_a_task_with_a_condition_panics() {
        let (readiness, ready_when) = Readiness::new();
        let task = ready_when.add_condition();
        let panicked = std::thread::spawn(move || {
            let _ = &task;
            std::panic::resume_unwind(Box::new("the task panics"));
        });
        assert!(panicked.join().is_err());
        ready_when.mark_met();
        assert!(!readiness.is_ready());
    }

    fn written(format: LogFormat, event: &str) -> String {
        let mut bounded = BoundedWriter { out: Vec::new(), format };
        io::Write::write_all(&mut bounded, event.as_bytes()).unwrap();
        String::from_utf8(bounded.out).unwrap()
    }

    #[test]
    fn short_events_are_written_unchanged() {
        let longest = "x".repeat(MAX_EVENT_BYTES - 1) + "\n";
        for event in ["\n", "äöü\n", r#"{"b":1,"a":[]}"#, &longest] {
            assert_eq!(written(LogFormat::Json, event), event);
        }
    }

    #[test]
    fn long_events_are_truncated_to_one_line_within_the_limit() {
        for (value, colour) in [("x", ""), ("🦀", ""), ("x", "\u{1b}[32m"), ("\u{1b}[3m", "")] {
            let event = format!("{colour}WARN flag{}\n", value.repeat(100_000));
            for format in [LogFormat::Plain, LogFormat::Pretty] {
                let line = written(format, &event);
                assert!(
                    line.len() <= MAX_EVENT_BYTES && line.len() > MAX_EVENT_BYTES - 10,
                    "{line}"
                );
                assert!(line.ends_with(&format!("… ({} bytes)\n", event.len())), "{line}");
                assert_eq!(line.matches('\n').count(), 1);
                assert_eq!(event.contains('\u{1b}'), line.contains("\u{1b}[0m…"));
            }
        }
    }

    #[test]
    fn long_json_events_are_truncated_and_remain_json() {
        for value in ["x", "🦀", "\u{1}", "\"", "\\n"] {
            for fields in [1, 3, 20] {
                let long = value.repeat(100_000);
                let mut event = serde_json::json!({
                    "level": "WARN", "count": 7, "nested": { "list": [long, true] },
                });
                for field in 0..fields {
                    event[format!("field{field}")] = long.as_str().into();
                }
                let line = written(LogFormat::Json, &format!("{event}\n"));
                assert!(line.len() <= MAX_EVENT_BYTES && line.ends_with('\n'), "{line}");
                let read: Value = serde_json::from_str(&line).unwrap();
                assert_eq!((&read["level"], &read["count"]), (&"WARN".into(), &7.into()));
                let field = read["field0"].as_str().unwrap();
                assert!(field.ends_with(&format!("… ({} bytes)", long.len())), "{field}");
            }
        }
    }

    #[test]
    fn cause_repeated_by_an_error_is_logged_once() {
        let repeating = sqlx::Error::Io(io::Error::other("no answer"));
        assert_eq!(error_chain(&repeating), "error communicating with database: no answer");
    }

    #[test]
    fn long_error_text_is_truncated() {
        let error = serde_json::from_str::<u8>(&format!("\"{}\"", "x".repeat(100_000)));
        let text = error_chain(&error.unwrap_err());
        assert!(text.starts_with("invalid type: string \"xxx"), "{text}");
        assert!(text.len() < 1100, "{text}");
    }

    #[test]
    fn registry_is_installed_once_and_has_the_build_info() {
        start_metrics();
        let text = start_metrics().render();
        let version = env!("CARGO_PKG_VERSION");
        assert!(text.contains(&format!("version=\"{version}\"")), "{text}");
    }

    #[test]
    fn misspelt_level_is_rejected() {
        let check = |text: &str, read: Option<&str>| {
            assert_eq!(Config::parse_filter(text).as_deref(), read, "{text}");
        };
        for text in ["info", "DEBUG", "off", "3", "info,parapet=debug", "hyper::client", "[span]"] {
            check(text, Some(text));
        }
        check("warning", Some("warn"));
        check(" Warning , hyper=warning", Some("warn,hyper=warn"));
        check("parapet[{token=x}]=info", Some("parapet[{token=x}]=info"));
        for text in ["debugg", "info,verbose", "parapet", "hyper=loud", "fatal"] {
            check(text, None);
        }
    }

    #[test]
    fn log_format_is_parsed_in_any_case() {
        assert_eq!(LogFormat::parse("JSON"), Some(LogFormat::Json));
        assert_eq!(LogFormat::parse("pretty"), Some(LogFormat::Pretty));
        assert_eq!(LogFormat::parse("xml"), None);
    }
}
