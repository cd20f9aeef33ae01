//! What Parapet tells about itself: logs, the registry of metrics, and whether it is ready.
//!
//! No event of the log is longer than 4 KiB, whatever clients, upstream or files put into it.
//!
//! Metrics are named and described by the modules that count; this module only decides where they
//! are kept and which buckets their histograms have. Nothing here listens or serves: `http` renders
//! the registry, and `app` spawns the upkeep.

mod sparing;

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

pub use self::sparing::Sparing;
use crate::wire::excerpt::Excerpt;

/// The source revision that this binary was built from, where the build tells it.
pub const REVISION: &str = match option_env!("PARAPET_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

/// Bounds of histograms whose names end in `_seconds`: from 50 µs, a cached answer, to 10 s, the
/// longest that a request may wait by default.
pub const SECONDS: [f64; 17] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0,
];

/// Bounds of histograms whose names end in `_bytes`: from an empty reply to a large flag set.
pub const BYTES: [f64; 8] =
    [256.0, 1_024.0, 4_096.0, 16_384.0, 65_536.0, 262_144.0, 1_048_576.0, 8_388_608.0];

/// How logs look.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum LogFormat {
    /// One line per event.
    #[default]
    Plain,
    /// One JSON object per event.
    Json,
    /// Several lines per event, for a person at a terminal.
    Pretty,
}

impl LogFormat {
    /// Reads a format's name, in any case.
    pub fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "plain" => Some(Self::Plain),
            "json" => Some(Self::Json),
            "pretty" => Some(Self::Pretty),
            _ => None,
        }
    }
}

/// What is logged, and how.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    /// The form of the lines.
    pub format: LogFormat,
    /// Levels per target, in the syntax of `RUST_LOG`.
    pub filter: String,
}

impl Config {
    /// Reads a [`Config::filter`].
    ///
    /// A bare word that is no level would name a target, and turn everything else off: it is far more
    /// likely a level that is misspelt.
    pub fn parse_filter(text: &str) -> Option<String> {
        let directives: Option<Vec<_>> = text.split(',').map(directive).collect();
        let filter = directives?.join(",");
        EnvFilter::try_new(&filter).is_ok().then_some(filter)
    }
}

/// What is understood as a level where no target is named.
const LEVELS: [&str; 12] =
    ["off", "error", "warn", "info", "debug", "trace", "0", "1", "2", "3", "4", "5"];

/// A directive, if it is none that only looks like one. `warning` is a level in many programs.
fn directive(text: &str) -> Option<String> {
    let text = text.trim();
    let (target, level) =
        text.rsplit_once('=').map_or((None, text), |(target, level)| (Some(target), level));
    let level = if level.eq_ignore_ascii_case("warning") { "warn" } else { level };
    match target {
        Some(target) => Some(format!("{target}={level}")),
        // A path and a span are meant as such; and nothing between two commas means nothing.
        None if text.is_empty() || text.contains("::") || text.contains(['[', ']', '{', '}']) => {
            Some(text.to_owned())
        }
        None => LEVELS.iter().any(|it| it.eq_ignore_ascii_case(level)).then(|| level.to_owned()),
    }
}

/// What is not logged unless its target is named: an error for each handshake that fails, since the
/// request that failed by it is logged with the same cause, and once only; and what PostgreSQL remarks
/// on statements that succeed.
const QUIET: &str = "rustls=off,rustls_platform_verifier=off,sqlx::postgres::notice=off";

/// The filter of `config`, behind what it may override.
fn filter(config: &Config) -> Option<EnvFilter> {
    EnvFilter::try_new(format!("{QUIET},{}", config.filter)).ok()
}

/// Starts logging, once per process; later calls change nothing.
///
/// Lines go to standard output, as Unleash Edge's do, so that a deployment that collects them from
/// there keeps working; standard error is left to what prevents a start.
pub fn start_logging(config: &Config) {
    let filter = filter(config).unwrap_or_else(|| EnvFilter::new("info"));
    let colours = io::stdout().is_terminal();
    let format = config.format;
    let writer = move || Bounded { out: io::stdout(), format };
    let lines = fmt::fmt().with_env_filter(filter).with_writer(writer).with_ansi(colours);
    // An error means that a test, or an earlier call, has set a subscriber: that one stays.
    match config.format {
        LogFormat::Plain => install(lines),
        LogFormat::Json => install(lines.json().flatten_event(true)),
        LogFormat::Pretty => install(lines.pretty()),
    }
}

/// What replaces the filter of the subscriber that [`start_logging`] has installed.
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

/// Replaces what is logged by the filter of `config`; the form of the lines stays.
pub fn set_log_filter(config: &Config) {
    if let (Some(set), Some(filter)) = (SET_FILTER.get(), filter(config)) {
        set(filter);
    }
}

/// An error and its causes in one line, for a log. Each is cut at `CAUSE_BYTES`, because it may quote
/// what could not be read. A cause that the error before it ends with is not said again.
///
/// Not for errors whose causes may quote what they could not read where that holds tokens.
pub fn report(error: &dyn Error) -> String {
    let causes = iter::successors(Some(error), |error| Error::source(*error));
    let mut texts: Vec<String> = causes.map(ToString::to_string).collect();
    texts.dedup_by(|cause, before| before.ends_with(&**cause));
    let excerpt = |text: &String| Excerpt::up_to(CAUSE_BYTES, text).to_string();
    texts.iter().map(excerpt).collect::<Vec<_>>().join(": ")
}

/// How much of one error's own text is logged, in bytes.
const CAUSE_BYTES: usize = 1024;

/// How long an event in the log may be, in bytes, with its line break.
const EVENT_BYTES: usize = 4096;

/// Passes events on, each written at once, and cuts those beyond [`EVENT_BYTES`].
#[derive(Debug)]
struct Bounded<W> {
    out: W,
    format: LogFormat,
}

impl<W: io::Write> io::Write for Bounded<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        if event.len() <= EVENT_BYTES {
            self.out.write_all(event)?;
        } else {
            let text = String::from_utf8_lossy(event);
            let cut = match self.format {
                LogFormat::Json => cut_json(&text),
                LogFormat::Plain | LogFormat::Pretty => None,
            };
            self.out.write_all(cut.unwrap_or_else(|| cut_text(&text)).as_bytes())?;
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The beginning of an event, without the colour that may be on where it is cut.
fn cut_text(event: &str) -> String {
    let plain = if event.contains('\u{1b}') { "\u{1b}[0m" } else { "" };
    let tail = format!("{plain}… ({} bytes)\n", event.len());
    let kept = event.floor_char_boundary(EVENT_BYTES - tail.len());
    format!("{}{tail}", &event[..kept])
}

/// The event with its longest texts cut, so that it is JSON still; `None` where it was none, or has too
/// many texts for that.
fn cut_json(event: &str) -> Option<String> {
    let event: Value = serde_json::from_str(event).ok()?;
    [1024, 256, 64, 8].into_iter().find_map(|len| {
        let mut cut = event.clone();
        shorten(&mut cut, len);
        Some(format!("{cut}\n")).filter(|line| line.len() <= EVENT_BYTES)
    })
}

fn shorten(value: &mut Value, len: usize) {
    match value {
        Value::String(text) if text.len() > len => {
            *text = Excerpt::up_to(len, text).to_string();
        }
        Value::Array(items) => items.iter_mut().for_each(|item| shorten(item, len)),
        Value::Object(members) => members.values_mut().for_each(|item| shorten(item, len)),
        _ => {}
    }
}

/// Starts the registry of metrics, once per process; later calls return the same one.
///
/// Its owner must call [`PrometheusHandle::run_upkeep`] every few seconds, else the samples of
/// histograms pile up between scrapes.
pub fn start_metrics() -> PrometheusHandle {
    static REGISTRY: OnceLock<PrometheusHandle> = OnceLock::new();
    REGISTRY.get_or_init(install_recorder).clone()
}

fn install_recorder() -> PrometheusHandle {
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .and_then(|builder| {
            builder.set_buckets_for_metric(Matcher::Suffix("_bytes".to_owned()), &BYTES)
        })
        .expect("only an empty list of bounds is refused")
        .build_recorder();
    let registry = recorder.handle();
    // Refused only where a test has set a recorder of its own, which then counts instead.
    let _ = metrics::set_global_recorder(recorder);
    metrics::describe_gauge!("build_info", "One, labelled with what was built");
    let version = env!("CARGO_PKG_VERSION");
    metrics::gauge!("build_info", "version" => version, "revision" => REVISION).set(1.0);
    registry
}

/// Whether this process should be sent requests: from the moment when the last [`Latch`] is
/// released until [`Readiness::drain`].
///
/// Once ready, nothing but draining makes it unready: losing the upstream does not.
#[derive(Clone, Debug)]
pub struct Readiness {
    pending: Pending,
    draining: Arc<AtomicBool>,
}

/// What is waited for: a text for each latch that is not released, by their order.
#[derive(Clone, Debug, Default)]
struct Pending(Arc<Mutex<BTreeMap<u32, String>>>);

impl Pending {
    /// A panic under this lock leaves a whole map.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn latch(&self) -> Latch {
        let mut pending = self.lock();
        let id = pending.last_key_value().map_or(0, |(last, _)| last + 1);
        pending.insert(id, "the first flags of an environment".to_owned());
        Latch { pending: self.clone(), id, is_released: AtomicBool::new(false) }
    }
}

/// Something that must happen before the process is ready.
///
/// One that is dropped unreleased keeps the process unready for good: what was waited for has not
/// happened. A task that may be started again after a panic is therefore lent its latch.
#[derive(Debug)]
#[must_use = "a process is never ready whose latch is dropped"]
pub struct Latch {
    pending: Pending,
    id: u32,
    is_released: AtomicBool,
}

impl Readiness {
    /// An unready process and its first latch.
    pub fn new() -> (Self, Latch) {
        let pending = Pending::default();
        let latch = pending.latch();
        (Self { pending, draining: Arc::default() }, latch)
    }

    /// Whether requests are welcome.
    pub fn is_ready(&self) -> bool {
        !self.is_draining() && self.pending.lock().is_empty()
    }

    /// What has to happen before requests are welcome.
    pub fn waits_for(&self) -> Vec<String> {
        self.pending.lock().values().cloned().collect()
    }

    /// Makes the process unready for good, because it is about to end.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Whether [`Readiness::drain`] was called.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
}

impl Latch {
    /// Another thing that must happen, to be made before this one is released.
    pub fn another(&self) -> Self {
        self.pending.latch()
    }

    /// Says what is waited for, for people to read.
    pub fn waits_for(&self, what: impl Into<String>) {
        if let Some(text) = self.pending.lock().get_mut(&self.id) {
            *text = what.into();
        }
    }

    /// Says that what was waited for has happened; saying it again changes nothing.
    pub fn release(&self) {
        if !self.is_released.swap(true, Ordering::Relaxed) {
            self.pending.lock().remove(&self.id);
        }
    }

    /// Whether it was released.
    pub fn is_released(&self) -> bool {
        self.is_released.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_ready_when_its_last_latch_is_released_and_until_it_drains() {
        let (readiness, first) = Readiness::new();
        let second = first.another();
        assert!(!readiness.is_ready());
        first.release();
        first.release();
        assert!(!readiness.is_ready());
        second.waits_for("rain");
        assert_eq!(readiness.waits_for(), ["rain"]);
        second.release();
        assert!(readiness.is_ready() && readiness.waits_for().is_empty());
        readiness.drain();
        assert!(!readiness.is_ready());
    }

    #[test]
    fn a_task_that_dies_of_a_panic_makes_no_process_ready() {
        let (readiness, latch) = Readiness::new();
        let task = latch.another();
        let death = std::thread::spawn(move || {
            let _ = &task;
            std::panic::resume_unwind(Box::new("the task dies"));
        });
        assert!(death.join().is_err());
        latch.release();
        assert!(!readiness.is_ready());
    }

    fn written(format: LogFormat, event: &str) -> String {
        let mut bounded = Bounded { out: Vec::new(), format };
        io::Write::write_all(&mut bounded, event.as_bytes()).unwrap();
        String::from_utf8(bounded.out).unwrap()
    }

    #[test]
    fn short_events_are_written_as_they_are() {
        let longest = "x".repeat(EVENT_BYTES - 1) + "\n";
        for event in ["\n", "äöü\n", r#"{"b":1,"a":[]}"#, &longest] {
            assert_eq!(written(LogFormat::Json, event), event);
        }
    }

    #[test]
    fn long_events_are_cut_to_one_line_within_the_limit() {
        for (value, colour) in [("x", ""), ("🦀", ""), ("x", "\u{1b}[32m"), ("\u{1b}[3m", "")] {
            let event = format!("{colour}WARN flag{}\n", value.repeat(100_000));
            for format in [LogFormat::Plain, LogFormat::Pretty] {
                let line = written(format, &event);
                assert!(line.len() <= EVENT_BYTES && line.len() > EVENT_BYTES - 10, "{line}");
                assert!(line.ends_with(&format!("… ({} bytes)\n", event.len())), "{line}");
                assert_eq!(line.matches('\n').count(), 1);
                assert_eq!(event.contains('\u{1b}'), line.contains("\u{1b}[0m…"));
            }
        }
    }

    #[test]
    fn long_json_events_are_cut_and_remain_json() {
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
                assert!(line.len() <= EVENT_BYTES && line.ends_with('\n'), "{line}");
                let read: Value = serde_json::from_str(&line).unwrap();
                assert_eq!((&read["level"], &read["count"]), (&"WARN".into(), &7.into()));
                let field = read["field0"].as_str().unwrap();
                assert!(field.ends_with(&format!("… ({} bytes)", long.len())), "{field}");
            }
        }
    }

    #[test]
    fn cause_that_an_error_repeats_is_reported_once() {
        let repeating = sqlx::Error::Io(io::Error::other("no answer"));
        assert_eq!(report(&repeating), "error communicating with database: no answer");
    }

    #[test]
    fn reported_errors_are_cut() {
        let error = serde_json::from_str::<u8>(&format!("\"{}\"", "x".repeat(100_000)));
        let text = report(&error.unwrap_err());
        assert!(text.starts_with("invalid type: string \"xxx"), "{text}");
        assert!(text.len() < 1100, "{text}");
    }

    #[test]
    fn the_registry_is_one_and_knows_the_build() {
        start_metrics();
        let text = start_metrics().render();
        let version = env!("CARGO_PKG_VERSION");
        assert!(text.contains(&format!("version=\"{version}\"")), "{text}");
    }

    #[test]
    fn a_misspelt_level_is_no_target() {
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
    fn log_formats_are_read_in_any_case() {
        assert_eq!(LogFormat::parse("JSON"), Some(LogFormat::Json));
        assert_eq!(LogFormat::parse("pretty"), Some(LogFormat::Pretty));
        assert_eq!(LogFormat::parse("xml"), None);
    }
}
