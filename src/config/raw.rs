//! Raw values, merged from the command line, the environment and the configuration file.
//!
//! Parsing a value never stops at an error: the error is recorded, and the default is used until the
//! configuration is rejected as a whole. `Debug` shows which options are set and where, never their
//! values.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use sha2::{Digest as _, Sha256};

use super::{
    cli::{CliValues, Subcommand},
    error::ConfigError,
    file,
    option_spec::{Arity, CommandScope, Compatibility, OptionSpec, split_list, split_list_file},
    options::{CONFIG, OPTIONS},
    settings_digests::SettingsDigests,
};
use crate::{secret_file, telemetry::error_chain, token::Token};

/// The path of the configuration file if none is named.
const DEFAULT_FILE: &str = "config/parapet.toml";

/// Looks up an environment variable.
pub(super) type EnvironmentLookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// All values for one command.
pub(super) struct RawSettings {
    pub(super) subcommand: Subcommand,
    values: BTreeMap<&'static str, RawValue>,
    pub(super) errors: Vec<ConfigError>,
    pub(super) warnings: Vec<String>,
    /// Hosts that are reached without a proxy. Like the proxies themselves, which the HTTP client looks
    /// up, they are a setting of the system and no option.
    pub(super) no_proxy: String,
}

struct RawValue {
    texts: Vec<String>,
    /// The source as the operator knows it: `--port`, `PORT` or `config/parapet.toml:3: port`.
    location: String,
    /// The secret file that contains the values.
    file: Option<PathBuf>,
}

impl fmt::Debug for RawSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.values.iter().map(|(name, given)| (name, &given.location)))
            .finish()
    }
}

impl RawSettings {
    /// Merges the three sources: command line over environment over file.
    pub(super) fn from_sources(
        subcommand: Subcommand,
        flags: CliValues,
        variable: EnvironmentLookup<'_>,
    ) -> Self {
        let no_proxy = ["NO_PROXY", "no_proxy"].into_iter().filter_map(variable);
        let mut settings = Self {
            subcommand,
            values: BTreeMap::new(),
            errors: Vec::new(),
            warnings: Vec::new(),
            no_proxy: no_proxy.collect::<Vec<_>>().join(","),
        };
        settings.add_cli_values(flags);
        settings.add_environment(variable);
        settings.add_file();
        settings.check_edge_options();
        settings
    }

    fn add_cli_values(&mut self, flags: CliValues) {
        for (key, texts) in flags {
            let location = format!("--{}", key.name);
            if !self.accepts(key) {
                let reason = format!("does not apply to `{}`", self.subcommand.name());
                self.errors.push(ConfigError { location, reason });
                continue;
            }
            let texts = match key.arity {
                Arity::List => texts.iter().flat_map(|text| split_list(text)).collect(),
                Arity::One | Arity::Switch => texts,
            };
            self.add(key, texts, location);
        }
    }

    fn add_environment(&mut self, variable: EnvironmentLookup<'_>) {
        for key in OPTIONS.iter() {
            let place = key.env_name();
            self.check_file_variable(key, variable);
            let Some(text) = variable(&place).filter(|text| !text.trim().is_empty()) else {
                continue;
            };
            if self.accepts(key) {
                let texts = match key.arity {
                    Arity::List => split_list(&text),
                    Arity::One | Arity::Switch => vec![text.trim().to_owned()],
                };
                self.add(key, texts, place);
            } else {
                self.warn_of_inapplicable_variable(key, &place);
            }
        }
    }

    /// Warns of a variable of another command: commands may share an environment, so it is no error.
    fn warn_of_inapplicable_variable(&mut self, key: &OptionSpec, variable: &str) {
        if self.is_serving()
            && key.scope != CommandScope::Probe
            && key.compatibility == Compatibility::Supported
        {
            self.warnings
                .push(format!("{variable} does not apply to `{}`", self.subcommand.name()));
        }
    }

    /// Reports variables such as `PORT_FILE`, which would otherwise be ignored silently.
    fn check_file_variable(&mut self, key: &OptionSpec, variable: EnvironmentLookup<'_>) {
        let location = format!("{}_FILE", key.env_name());
        let is_given = variable(&location).is_some_and(|text| !text.trim().is_empty());
        let is_own = key.file_for.is_some() || OPTIONS.iter().any(|it| it.env_name() == location);
        if !is_given || !self.is_serving() || is_own {
            return;
        }
        if !self.accepts(key) {
            self.warn_of_inapplicable_variable(key, &location);
            return;
        }
        match key.compatibility {
            Compatibility::Supported => {
                let reason = format!("{} cannot be read from a file", key.env_name());
                self.errors.push(ConfigError { location, reason });
            }
            Compatibility::Ignored => {
                self.warnings.push(format!("{location} has no effect: {}", key.help_text()));
            }
            Compatibility::Rejected => {
                let reason = format!("is not supported by Parapet; {}", key.help_text());
                self.errors.push(ConfigError { location, reason });
            }
        }
    }

    /// Reads the secret files of the options for which `wanted` is true, and sets the options to their
    /// contents.
    pub(super) fn read_secret_files(&mut self, wanted: impl Fn(&OptionSpec) -> bool) {
        for key in OPTIONS.iter() {
            let Some(secret) = key.file_for.filter(|secret| wanted(secret)) else { continue };
            let Some(path) = self.text(key).map(|path| PathBuf::from(path.trim())) else {
                continue;
            };
            if self.is_set(secret) {
                self.report_error(key, format!("cannot be combined with --{}", secret.name));
                continue;
            }
            match read_secret(secret, &path) {
                Ok(texts) => {
                    let location =
                        format!("{} ({})", self.values[key.name].location, path.display());
                    self.values.insert(secret.name, RawValue { texts, location, file: Some(path) });
                }
                // The path may be the secret itself, so it is not repeated.
                Err(secret_file::Error::Read { source, .. })
                    if !can_be_printed(&path.to_string_lossy()) =>
                {
                    self.report_error(key, format!("expected the path of a file: {source}"));
                }
                Err(error) => {
                    self.report_error(
                        key,
                        format!("expected a file with a secret: {}", error_chain(&error)),
                    );
                }
            }
        }
    }

    /// The file that contains the value of a secret.
    pub(super) fn secret_file(&self, secret: &OptionSpec) -> Option<&Path> {
        self.values.get(secret.name)?.file.as_deref()
    }

    /// Digests of the effective values; for secret files those of their contents.
    pub(super) fn digests(&self) -> SettingsDigests {
        let keys = OPTIONS.iter().filter(|key| {
            self.accepts(key)
                && key.compatibility == Compatibility::Supported
                && key.file_for.is_none()
        });
        let digest = |texts: &[String]| {
            let mut hash = Sha256::new();
            for text in texts {
                hash.update(text.len().to_le_bytes());
                hash.update(text);
            }
            hash.finalize().into()
        };
        let digests = keys.filter_map(|key| {
            let default = || key.default.map(|text| vec![text.to_owned()]);
            let texts = self.values.get(key.name).map(|given| given.texts.clone());
            Some((key.name, digest(&texts.or_else(default)?)))
        });
        SettingsDigests::new(digests)
    }

    fn add_file(&mut self) {
        let named = self.text(&CONFIG).map(PathBuf::from);
        let present = || Some(PathBuf::from(DEFAULT_FILE)).filter(|path| path.exists());
        let Some(path) = named.or_else(present) else { return };
        for file::Entry { key, texts, line } in file::read(&path, &mut self.errors) {
            // Commands may share a file, and an empty string counts as not set, as in the environment.
            if self.accepts(key) && !texts.iter().all(|text| text.trim().is_empty()) {
                let place = format!("{}:{line}: {}", path.display(), key.toml_name());
                self.add(key, texts, place);
            }
        }
    }

    /// Adds the value of one source, unless a source of higher precedence has set it.
    fn add(&mut self, key: &OptionSpec, texts: Vec<String>, location: String) {
        self.values.entry(key.name).or_insert(RawValue { texts, location, file: None });
    }

    fn accepts(&self, key: &OptionSpec) -> bool {
        self.subcommand.accepts(key)
    }

    fn is_serving(&self) -> bool {
        matches!(self.subcommand, Subcommand::Serve(_))
    }

    /// Warns of options of Unleash Edge that have no effect, and rejects those that would need one.
    fn check_edge_options(&mut self) {
        if !self.is_serving() {
            return;
        }
        for key in OPTIONS.iter() {
            let wanted = match (self.values.get(key.name), key.arity) {
                (None, _) => continue,
                (Some(given), Arity::Switch) => parse_bool(&given.texts[0]) != Some(false),
                (Some(_), Arity::One | Arity::List) => true,
            };
            let place = &self.values[key.name].location;
            match key.compatibility {
                Compatibility::Ignored if wanted => {
                    self.warnings.push(format!("{place} has no effect: {}", key.help_text()));
                }
                Compatibility::Rejected if wanted => {
                    let reason = format!("is not supported by Parapet; {}", key.help_text());
                    self.errors.push(ConfigError { location: place.clone(), reason });
                }
                Compatibility::Supported | Compatibility::Ignored | Compatibility::Rejected => {}
            }
        }
    }

    /// Whether `key` is set by any source.
    pub(super) fn is_set(&self, key: &OptionSpec) -> bool {
        self.values.contains_key(key.name)
    }

    /// Replaces the value of an option that is set by a corrected one.
    pub(super) fn replace(&mut self, key: &OptionSpec, text: String) {
        if let Some(given) = self.values.get_mut(key.name) {
            given.texts = vec![text];
        }
    }

    /// The raw value of `key`, or its default.
    pub(super) fn text(&self, key: &OptionSpec) -> Option<&str> {
        match self.values.get(key.name) {
            Some(given) => given.texts.first().map(String::as_str),
            None => key.default,
        }
    }

    /// The raw values of a list, without default.
    pub(super) fn texts(&self, key: &OptionSpec) -> Vec<String> {
        self.values.get(key.name).map(|given| given.texts.clone()).unwrap_or_default()
    }

    /// Records an error of `key`.
    pub(super) fn report_error(&mut self, key: &OptionSpec, reason: impl Into<String>) {
        let location = match self.values.get(key.name) {
            Some(given) => given.location.clone(),
            None => format!("--{} ({})", key.name, key.env_name()),
        };
        let mistake = ConfigError { location, reason: reason.into() };
        // An option that is parsed twice is reported once.
        if !self.errors.contains(&mistake) {
            self.errors.push(mistake);
        }
    }

    /// The parsed value of `key`, or of its default. `None` if there is neither, or if it is invalid.
    pub(super) fn parse_optional<T>(
        &mut self,
        key: &OptionSpec,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.text(key)?.trim().to_owned();
        let value = parse(&text);
        if value.is_none() {
            self.report_invalid(key, expected, &text);
        }
        value
    }

    /// The parsed value of a key that has a default. The default replaces an invalid value.
    pub(super) fn parse_or_default<T>(
        &mut self,
        key: &OptionSpec,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> T {
        self.parse_optional(key, expected, &parse)
            .or_else(|| parse(key.default?))
            .expect("options read by this method have a valid default")
    }

    /// The valid values of a list.
    pub(super) fn parse_list<T>(
        &mut self,
        key: &OptionSpec,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Vec<T> {
        let texts = match self.values.get(key.name) {
            Some(given) => given.texts.clone(),
            None => key.default.map(split_list).unwrap_or_default(),
        };
        let mut values = Vec::with_capacity(texts.len());
        for text in &texts {
            match parse(text.trim()) {
                Some(value) => values.push(value),
                None => self.report_invalid(key, expected, text),
            }
        }
        values
    }

    fn report_invalid(&mut self, key: &OptionSpec, expected: &str, text: &str) {
        let but = if !key.secret && can_be_printed(text) {
            format!(", not `{text}`")
        } else {
            String::new()
        };
        self.report_error(key, format!("expected {expected}{but}"));
    }

    /// Whether a switch is on.
    pub(super) fn switch(&mut self, key: &OptionSpec) -> bool {
        self.parse_or_default(key, "true or false", parse_bool)
    }

    /// A number of at least 1.
    pub(super) fn count(&mut self, key: &OptionSpec) -> usize {
        self.parse_or_default(key, EXPECTED_COUNT, parse_positive)
    }

    /// A number of at least 1; `otherwise` if it is not set.
    pub(super) fn count_or(&mut self, key: &OptionSpec, otherwise: usize) -> usize {
        self.optional_count(key).unwrap_or(otherwise)
    }

    /// A number of at least 1, if it is set.
    pub(super) fn optional_count(&mut self, key: &OptionSpec) -> Option<usize> {
        self.parse_optional(key, EXPECTED_COUNT, parse_positive)
    }

    /// A time that may be 0.
    pub(super) fn delay(&mut self, key: &OptionSpec) -> Duration {
        self.parse_or_default(key, "a number of seconds, at most a year", |text| {
            parse_seconds(text, MAX_WAIT_SECONDS)
        })
    }

    /// A retention time, which may be 0.
    pub(super) fn retention(&mut self, key: &OptionSpec) -> Duration {
        let expected = "a number of seconds, at most a hundred years";
        self.parse_or_default(key, expected, |text| parse_seconds(text, MAX_RETENTION_SECONDS))
    }

    /// A time above 0.
    pub(super) fn interval(&mut self, key: &OptionSpec) -> Duration {
        self.parse_or_default(key, EXPECTED_INTERVAL, parse_interval)
    }

    /// A time above 0, if it is set.
    pub(super) fn optional_interval(&mut self, key: &OptionSpec) -> Option<Duration> {
        self.parse_optional(key, EXPECTED_INTERVAL, parse_interval)
    }

    /// A list of tokens. An error names the position of the token, not its text.
    pub(super) fn tokens(&mut self, key: &OptionSpec) -> Vec<Token> {
        let texts = match self.values.get(key.name) {
            Some(given) => given.texts.clone(),
            None => return Vec::new(),
        };
        let mut tokens = Vec::with_capacity(texts.len());
        for (at, text) in texts.iter().enumerate() {
            match Token::parse(text) {
                Ok(token) => tokens.push(token),
                Err(error) => {
                    self.report_error(key, format!("expected tokens; token {}: {error}", at + 1));
                }
            }
        }
        tokens
    }

    /// A path, if it is set or has a default.
    pub(super) fn path_value(&self, key: &OptionSpec) -> Option<PathBuf> {
        self.text(key).map(PathBuf::from)
    }

    /// The effective settings as a configuration file, without secrets.
    pub(super) fn to_toml(&self) -> String {
        let mut text =
            format!("# The effective configuration of `parapet {}`.\n", self.subcommand.name());
        let ours = OPTIONS.iter().filter(|key| {
            self.accepts(key)
                && key.compatibility == Compatibility::Supported
                && key.name != CONFIG.name
        });
        for key in ours {
            // The path of the file is printed instead.
            if self.secret_file(key).is_some() {
                continue;
            }
            let (texts, place) = match (self.values.get(key.name), key.default) {
                (Some(given), _) => (given.texts.clone(), given.location.as_str()),
                (None, Some(default)) if key.arity == Arity::List => {
                    (split_list(default), "default")
                }
                (None, Some(default)) => (vec![default.to_owned()], "default"),
                (None, None) => continue,
            };
            let value =
                if key.secret { "\"<secret>\"".to_owned() } else { to_toml_value(key, &texts) };
            writeln!(text, "{} = {value} # {place}", key.toml_name())
                .expect("writing to a string cannot fail");
        }
        text
    }
}

/// Whether a value may be repeated in an error. A token, a private key or a URL with a password may be
/// in the wrong place, and is still a secret.
fn can_be_printed(text: &str) -> bool {
    Token::parse(text).is_err() && !text.contains(['@', '?']) && !text.contains("-----BEGIN")
}

fn read_secret(secret: &OptionSpec, path: &Path) -> Result<Vec<String>, secret_file::Error> {
    let text = secret_file::read(path)?;
    let texts = match secret.arity {
        Arity::List => split_list_file(&text),
        Arity::One | Arity::Switch => vec![text.to_string()],
    };
    if texts.is_empty() {
        return Err(secret_file::Error::Empty { path: path.to_owned() });
    }
    Ok(texts)
}

impl Subcommand {
    fn accepts(self, key: &OptionSpec) -> bool {
        key.scope.applies_to(self.scope())
    }
}

/// The value of `key` as TOML: numbers and booleans bare, everything else quoted.
pub(super) fn to_toml_value(key: &OptionSpec, texts: &[String]) -> String {
    let quoted = |text: &String| toml::Value::String(text.clone()).to_string();
    match (key.arity, texts) {
        (Arity::List, texts) => {
            format!("[{}]", texts.iter().map(quoted).collect::<Vec<_>>().join(", "))
        }
        (Arity::Switch, [text, ..]) if parse_bool(text).is_some() => {
            (parse_bool(text) == Some(true)).to_string()
        }
        (Arity::One, [text, ..]) if text.parse::<u64>().is_ok() => text.clone(),
        (Arity::One | Arity::Switch, texts) => texts.first().map(quoted).unwrap_or_default(),
    }
}

fn parse_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "t" | "yes" | "y" | "on" | "1" => Some(true),
        "false" | "f" | "no" | "n" | "off" | "0" => Some(false),
        _ => None,
    }
}

/// One year in seconds: longer than any useful timeout, and within the range of timers.
const MAX_WAIT_SECONDS: f64 = 366.0 * 86_400.0;

/// A hundred years in seconds: longer than any useful retention, and without an overflow of clocks.
const MAX_RETENTION_SECONDS: f64 = 100.0 * MAX_WAIT_SECONDS;

/// Parses seconds, whole or decimal.
fn parse_seconds(text: &str, most: f64) -> Option<Duration> {
    let seconds: f64 = text.parse().ok()?;
    (0.0..=most).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}

const EXPECTED_INTERVAL: &str = "a number of seconds above 0, at most a year";
const EXPECTED_COUNT: &str = "a whole number above 0";

fn parse_interval(text: &str) -> Option<Duration> {
    parse_seconds(text, MAX_WAIT_SECONDS).filter(|time| !time.is_zero())
}

fn parse_positive(text: &str) -> Option<usize> {
    text.parse().ok().filter(|&number| number > 0)
}

#[cfg(test)]
mod tests;
