//! Kinds of log lines, told apart by level, module and fields, so that tests do not depend on sentences.

use serde_json::Value;

/// A kind of log line, in plain or in JSON format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogEvent {
    level: &'static str,
    /// Its module below `parapet`. With `::` at the end, every module below it as well.
    module: &'static str,
    /// A field that it has.
    present: Option<&'static str>,
    /// A field that it does not have.
    absent: Option<&'static str>,
}

impl LogEvent {
    /// The start of an instance.
    pub(crate) const LISTENING: Self = Self::info("app").with("data");
    /// Every token has a stream from upstream.
    pub(crate) const STREAMING: Self = Self::info("sync::").with("transport=stream");
    /// A token has no stream from upstream.
    pub(crate) const POLLING: Self = Self::info("sync::").with("transport=poll");
    /// A reload that was applied.
    pub(crate) const RELOADED: Self = Self::info("app::reload");
    /// A flag file that cannot be read.
    pub(crate) const FLAG_FILE_FAILED: Self =
        Self::warn("sync::").with("error").without("environment");

    const fn new(level: &'static str, module: &'static str) -> Self {
        Self { level, module, present: None, absent: None }
    }

    pub(crate) const fn info(module: &'static str) -> Self {
        Self::new("INFO", module)
    }

    pub(crate) const fn warn(module: &'static str) -> Self {
        Self::new("WARN", module)
    }

    pub(crate) const fn error(module: &'static str) -> Self {
        Self::new("ERROR", module)
    }

    /// Requires a field, given as `name`, or as `name=text` with its value.
    pub(crate) const fn with(self, field: &'static str) -> Self {
        Self { present: Some(field), ..self }
    }

    /// Excludes lines with this field.
    pub(crate) const fn without(self, field: &'static str) -> Self {
        Self { absent: Some(field), ..self }
    }

    pub(crate) fn matches(&self, line: &str) -> bool {
        let json = serde_json::from_str::<Value>(line).ok();
        let (level, target) = if let Some(fields) = &json {
            (fields["level"].as_str(), fields["target"].as_str())
        } else {
            let mut words = line.split_whitespace().skip(1);
            (words.next(), words.next().and_then(|word| word.strip_suffix(':')))
        };
        let has_field = |field: &str| match &json {
            Some(fields) => has_json_field(fields, field),
            None => has_plain_field(line, field),
        };
        level == Some(self.level)
            && target.is_some_and(|target| is_within(target, self.module))
            && self.present.is_none_or(has_field)
            && !self.absent.is_some_and(has_field)
    }
}

/// Whether `target` is this module below `parapet`; with `::` at the end, or a module below it. `main` is
/// that of the binary.
pub(crate) fn is_within(target: &str, module: &str) -> bool {
    let target = if target == "parapet" { "parapet::main" } else { target };
    let Some(target) = target.strip_prefix("parapet::") else { return false };
    target == module.trim_end_matches("::") || module.ends_with("::") && target.starts_with(module)
}

fn has_json_field(fields: &Value, field: &str) -> bool {
    match field.split_once('=') {
        Some((name, value)) => fields[name] == value,
        None => !fields[field].is_null(),
    }
}

fn has_plain_field(line: &str, field: &str) -> bool {
    match field.split_once('=') {
        Some((name, value)) => line.contains(&format!(" {name}=\"{value}\"")),
        None => line.contains(&format!(" {field}=")),
    }
}

#[test]
fn events_match_by_level_module_and_fields_in_both_formats() {
    let plain = r#"2026-01-01T00:00:00Z  INFO parapet::sync::runner: It streams environment=a transport="stream""#;
    let json = r#"{"timestamp":"2026-01-01T00:00:00Z","level":"INFO","message":"It streams","environment":"a","transport":"stream","target":"parapet::sync::runner"}"#;
    for line in [plain, json] {
        assert!(LogEvent::STREAMING.matches(line), "{line}");
        assert!(LogEvent::info("sync::runner").without("error").matches(line), "{line}");
        for other in [
            LogEvent::POLLING,
            LogEvent::warn("sync::"),
            LogEvent::info("sync"),
            LogEvent::info("sync::").with("error"),
            LogEvent::info("sync::").without("environment"),
        ] {
            assert!(!other.matches(line), "{other:?} {line}");
        }
    }
}
