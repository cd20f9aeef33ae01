//! Raw values, merged from the command line, the environment and the configuration file.
//!
//! Parsing a value never stops at an error: the error is recorded, and the default is used until the
//! configuration is rejected as a whole. `Debug` shows which options are set and where, never their
//! values.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use sha2::{Digest as _, Sha256};

use super::{
    cli::{Flags, Verb},
    file,
    keys::{CONFIG, KEYS, Key, Scope, Shape, Support, split, split_lines},
    mistake::Mistake,
};
use crate::{secret_file, telemetry::error_chain, token::Token};

/// The path of the configuration file if none is named.
const DEFAULT_FILE: &str = "config/parapet.toml";

/// Looks up an environment variable.
pub(super) type Variable<'a> = &'a dyn Fn(&str) -> Option<String>;

/// All values for one command.
pub(super) struct Settings {
    pub(super) verb: Verb,
    given: BTreeMap<&'static str, Given>,
    pub(super) mistakes: Vec<Mistake>,
    pub(super) warnings: Vec<String>,
    /// Hosts that are reached without a proxy. Like the proxies themselves, which the HTTP client looks
    /// up, they are a setting of the system and no option.
    pub(super) no_proxy: String,
}

struct Given {
    texts: Vec<String>,
    /// The source as the operator knows it: `--port`, `PORT` or `config/parapet.toml:3: port`.
    place: String,
    /// The secret file that contains the values.
    file: Option<PathBuf>,
}

/// Digests of the effective values, to find out later which of them have changed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Effective(BTreeMap<&'static str, [u8; 32]>);

impl Effective {
    /// The names of the options whose values differ from `earlier`.
    pub fn changed_since(&self, earlier: &Self) -> Vec<&'static str> {
        let names: BTreeSet<_> = self.0.keys().chain(earlier.0.keys()).copied().collect();
        names.into_iter().filter(|name| self.0.get(name) != earlier.0.get(name)).collect()
    }

    /// Copies the digest of one option from `newer`.
    pub fn update(&mut self, name: &'static str, newer: &Self) {
        match newer.0.get(name) {
            Some(digest) => drop(self.0.insert(name, *digest)),
            None => drop(self.0.remove(name)),
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.given.iter().map(|(name, given)| (name, &given.place))).finish()
    }
}

impl Settings {
    /// Merges the three sources: command line over environment over file.
    pub(super) fn gather(verb: Verb, flags: Flags, variable: Variable<'_>) -> Self {
        let no_proxy = ["NO_PROXY", "no_proxy"].into_iter().filter_map(variable);
        let mut settings = Self {
            verb,
            given: BTreeMap::new(),
            mistakes: Vec::new(),
            warnings: Vec::new(),
            no_proxy: no_proxy.collect::<Vec<_>>().join(","),
        };
        settings.add_flags(flags);
        settings.add_variables(variable);
        settings.add_file();
        settings.judge_foreign_keys();
        settings
    }

    fn add_flags(&mut self, flags: Flags) {
        for (key, texts) in flags {
            let place = format!("--{}", key.name);
            if !self.concerns(key) {
                let reason = format!("does not apply to `{}`", self.verb.name());
                self.mistakes.push(Mistake { place, reason });
                continue;
            }
            let texts = match key.shape {
                Shape::List => texts.iter().flat_map(|text| split(text)).collect(),
                Shape::One | Shape::Switch => texts,
            };
            self.add(key, texts, place);
        }
    }

    fn add_variables(&mut self, variable: Variable<'_>) {
        for key in KEYS.iter() {
            let place = key.env_name();
            self.judge_file_variable(key, variable);
            let Some(text) = variable(&place).filter(|text| !text.trim().is_empty()) else {
                continue;
            };
            if self.concerns(key) {
                let texts = match key.shape {
                    Shape::List => split(&text),
                    Shape::One | Shape::Switch => vec![text.trim().to_owned()],
                };
                self.add(key, texts, place);
            } else {
                self.warn_of_foreign_variable(key, &place);
            }
        }
    }

    /// Warns of a variable of another command: commands may share an environment, so it is no error.
    fn warn_of_foreign_variable(&mut self, key: &Key, variable: &str) {
        if self.serves() && key.scope != Scope::Probe && key.support == Support::Full {
            self.warnings.push(format!("{variable} does not apply to `{}`", self.verb.name()));
        }
    }

    /// Reports variables such as `PORT_FILE`, which would otherwise be ignored silently.
    fn judge_file_variable(&mut self, key: &Key, variable: Variable<'_>) {
        let place = format!("{}_FILE", key.env_name());
        let is_given = variable(&place).is_some_and(|text| !text.trim().is_empty());
        let is_own = key.file_of.is_some() || KEYS.iter().any(|it| it.env_name() == place);
        if !is_given || !self.serves() || is_own {
            return;
        }
        if !self.concerns(key) {
            self.warn_of_foreign_variable(key, &place);
            return;
        }
        match key.support {
            Support::Full => {
                let reason = format!("{} cannot be read from a file", key.env_name());
                self.mistakes.push(Mistake { place, reason });
            }
            Support::Ignored => {
                self.warnings.push(format!("{place} has no effect: {}", key.help()));
            }
            Support::Refused => {
                let reason = format!("is not supported by Parapet; {}", key.help());
                self.mistakes.push(Mistake { place, reason });
            }
        }
    }

    /// Reads the secret files of the options for which `wanted` is true, and sets the options to their
    /// contents.
    pub(super) fn read_secret_files(&mut self, wanted: impl Fn(&Key) -> bool) {
        for key in KEYS.iter() {
            let Some(secret) = key.file_of.filter(|secret| wanted(secret)) else { continue };
            let Some(path) = self.text(key).map(|path| PathBuf::from(path.trim())) else {
                continue;
            };
            if self.has(secret) {
                self.mistake(key, format!("cannot be combined with --{}", secret.name));
                continue;
            }
            match read_secret(secret, &path) {
                Ok(texts) => {
                    let place = format!("{} ({})", self.given[key.name].place, path.display());
                    self.given.insert(secret.name, Given { texts, place, file: Some(path) });
                }
                // The path may be the secret itself, so it is not repeated.
                Err(secret_file::Error::Read { source, .. })
                    if !is_repeatable(&path.to_string_lossy()) =>
                {
                    self.mistake(key, format!("expected the path of a file: {source}"));
                }
                Err(error) => {
                    self.mistake(key, format!("expected a file with a secret: {}", error_chain(&error)));
                }
            }
        }
    }

    /// The file that contains the value of a secret.
    pub(super) fn secret_file(&self, secret: &Key) -> Option<&Path> {
        self.given.get(secret.name)?.file.as_deref()
    }

    /// Digests of the effective values; for secret files those of their contents.
    pub(super) fn effective(&self) -> Effective {
        let keys = KEYS.iter().filter(|key| {
            self.concerns(key) && key.support == Support::Full && key.file_of.is_none()
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
            let texts = self.given.get(key.name).map(|given| given.texts.clone());
            Some((key.name, digest(&texts.or_else(default)?)))
        });
        Effective(digests.collect())
    }

    fn add_file(&mut self) {
        let named = self.text(&CONFIG).map(PathBuf::from);
        let present = || Some(PathBuf::from(DEFAULT_FILE)).filter(|path| path.exists());
        let Some(path) = named.or_else(present) else { return };
        for file::Entry { key, texts, line } in file::read(&path, &mut self.mistakes) {
            // Commands may share a file, and an empty string counts as not set, as in the environment.
            if self.concerns(key) && !texts.iter().all(|text| text.trim().is_empty()) {
                let place = format!("{}:{line}: {}", path.display(), key.file_name());
                self.add(key, texts, place);
            }
        }
    }

    /// Adds the value of one source, unless a source of higher precedence has set it.
    fn add(&mut self, key: &Key, texts: Vec<String>, place: String) {
        self.given.entry(key.name).or_insert(Given { texts, place, file: None });
    }

    fn concerns(&self, key: &Key) -> bool {
        self.verb.concerns(key)
    }

    fn serves(&self) -> bool {
        matches!(self.verb, Verb::Serve(_))
    }

    /// Warns of options of Unleash Edge that have no effect, and rejects those that would need one.
    fn judge_foreign_keys(&mut self) {
        if !self.serves() {
            return;
        }
        for key in KEYS.iter() {
            let wanted = match (self.given.get(key.name), key.shape) {
                (None, _) => continue,
                (Some(given), Shape::Switch) => yes_or_no(&given.texts[0]) != Some(false),
                (Some(_), Shape::One | Shape::List) => true,
            };
            let place = &self.given[key.name].place;
            match key.support {
                Support::Ignored if wanted => {
                    self.warnings.push(format!("{place} has no effect: {}", key.help()));
                }
                Support::Refused if wanted => {
                    let reason = format!("is not supported by Parapet; {}", key.help());
                    self.mistakes.push(Mistake { place: place.clone(), reason });
                }
                Support::Full | Support::Ignored | Support::Refused => {}
            }
        }
    }

    /// Whether `key` is set by any source.
    pub(super) fn has(&self, key: &Key) -> bool {
        self.given.contains_key(key.name)
    }

    /// Replaces the value of an option that is set by a corrected one.
    pub(super) fn amend(&mut self, key: &Key, text: String) {
        if let Some(given) = self.given.get_mut(key.name) {
            given.texts = vec![text];
        }
    }

    /// The raw value of `key`, or its default.
    pub(super) fn text(&self, key: &Key) -> Option<&str> {
        match self.given.get(key.name) {
            Some(given) => given.texts.first().map(String::as_str),
            None => key.default,
        }
    }

    /// Records an error of `key`.
    pub(super) fn mistake(&mut self, key: &Key, reason: impl Into<String>) {
        let place = match self.given.get(key.name) {
            Some(given) => given.place.clone(),
            None => format!("--{} ({})", key.name, key.env_name()),
        };
        let mistake = Mistake { place, reason: reason.into() };
        // An option that is parsed twice is reported once.
        if !self.mistakes.contains(&mistake) {
            self.mistakes.push(mistake);
        }
    }

    /// The parsed value of `key`, or of its default. `None` if there is neither, or if it is invalid.
    pub(super) fn read<T>(
        &mut self,
        key: &Key,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.text(key)?.trim().to_owned();
        let value = parse(&text);
        if value.is_none() {
            self.refuse(key, expected, &text);
        }
        value
    }

    /// The parsed value of a key that has a default. The default replaces an invalid value.
    pub(super) fn value<T>(
        &mut self,
        key: &Key,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> T {
        self.read(key, expected, &parse)
            .or_else(|| parse(key.default?))
            .expect("options read by this method have a valid default")
    }

    /// The valid values of a list.
    pub(super) fn list<T>(
        &mut self,
        key: &Key,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Vec<T> {
        let texts = match self.given.get(key.name) {
            Some(given) => given.texts.clone(),
            None => key.default.map(split).unwrap_or_default(),
        };
        let mut values = Vec::with_capacity(texts.len());
        for text in &texts {
            match parse(text.trim()) {
                Some(value) => values.push(value),
                None => self.refuse(key, expected, text),
            }
        }
        values
    }

    fn refuse(&mut self, key: &Key, expected: &str, text: &str) {
        let but = if !key.secret && is_repeatable(text) {
            format!(", not `{text}`")
        } else {
            String::new()
        };
        self.mistake(key, format!("expected {expected}{but}"));
    }

    /// Whether a switch is on.
    pub(super) fn switch(&mut self, key: &Key) -> bool {
        self.value(key, "true or false", yes_or_no)
    }

    /// A number of at least 1.
    pub(super) fn count(&mut self, key: &Key) -> usize {
        self.value(key, COUNT, positive)
    }

    /// A number of at least 1; `otherwise` if it is not set.
    pub(super) fn count_or(&mut self, key: &Key, otherwise: usize) -> usize {
        self.optional_count(key).unwrap_or(otherwise)
    }

    /// A number of at least 1, if it is set.
    pub(super) fn optional_count(&mut self, key: &Key) -> Option<usize> {
        self.read(key, COUNT, positive)
    }

    /// A time that may be 0.
    pub(super) fn delay(&mut self, key: &Key) -> Duration {
        self.value(key, "a number of seconds, at most a year", |text| seconds(text, LONGEST_WAIT))
    }

    /// A retention time, which may be 0.
    pub(super) fn retention(&mut self, key: &Key) -> Duration {
        let expected = "a number of seconds, at most a hundred years";
        self.value(key, expected, |text| seconds(text, LONGEST_KEPT))
    }

    /// A time above 0.
    pub(super) fn interval(&mut self, key: &Key) -> Duration {
        self.value(key, INTERVAL, interval)
    }

    /// A time above 0, if it is set.
    pub(super) fn optional_interval(&mut self, key: &Key) -> Option<Duration> {
        self.read(key, INTERVAL, interval)
    }

    /// A list of tokens. An error names the position of the token, not its text.
    pub(super) fn tokens(&mut self, key: &Key) -> Vec<Token> {
        let texts = match self.given.get(key.name) {
            Some(given) => given.texts.clone(),
            None => return Vec::new(),
        };
        let mut tokens = Vec::with_capacity(texts.len());
        for (at, text) in texts.iter().enumerate() {
            match Token::parse(text) {
                Ok(token) => tokens.push(token),
                Err(error) => {
                    self.mistake(key, format!("expected tokens; token {}: {error}", at + 1));
                }
            }
        }
        tokens
    }

    /// A path, if it is set or has a default.
    pub(super) fn path(&self, key: &Key) -> Option<PathBuf> {
        self.text(key).map(PathBuf::from)
    }

    /// The effective settings as a configuration file, without secrets.
    pub(super) fn to_toml(&self) -> String {
        let mut text =
            format!("# The effective configuration of `parapet {}`.\n", self.verb.name());
        let ours = KEYS.iter().filter(|key| {
            self.concerns(key) && key.support == Support::Full && key.name != CONFIG.name
        });
        for key in ours {
            // The path of the file is printed instead.
            if self.secret_file(key).is_some() {
                continue;
            }
            let (texts, place) = match (self.given.get(key.name), key.default) {
                (Some(given), _) => (given.texts.clone(), given.place.as_str()),
                (None, Some(default)) if key.shape == Shape::List => (split(default), "default"),
                (None, Some(default)) => (vec![default.to_owned()], "default"),
                (None, None) => continue,
            };
            let value = if key.secret { "\"<secret>\"".to_owned() } else { toml(key, &texts) };
            writeln!(text, "{} = {value} # {place}", key.file_name())
                .expect("writing to a string cannot fail");
        }
        text
    }
}

/// Whether a value may be repeated in an error. A token, a private key or a URL with a password may be
/// in the wrong place, and is still a secret.
fn is_repeatable(text: &str) -> bool {
    Token::parse(text).is_err() && !text.contains(['@', '?']) && !text.contains("-----BEGIN")
}

fn read_secret(secret: &Key, path: &Path) -> Result<Vec<String>, secret_file::Error> {
    let text = secret_file::read(path)?;
    let texts = match secret.shape {
        Shape::List => split_lines(&text),
        Shape::One | Shape::Switch => vec![text.to_string()],
    };
    if texts.is_empty() {
        return Err(secret_file::Error::Empty { path: path.to_owned() });
    }
    Ok(texts)
}

impl Verb {
    fn concerns(self, key: &Key) -> bool {
        key.scope.concerns(self.scope())
    }
}

/// The value of `key` as TOML: numbers and booleans bare, everything else quoted.
pub(super) fn toml(key: &Key, texts: &[String]) -> String {
    let quoted = |text: &String| toml::Value::String(text.clone()).to_string();
    match (key.shape, texts) {
        (Shape::List, texts) => {
            format!("[{}]", texts.iter().map(quoted).collect::<Vec<_>>().join(", "))
        }
        (Shape::Switch, [text, ..]) if yes_or_no(text).is_some() => {
            (yes_or_no(text) == Some(true)).to_string()
        }
        (Shape::One, [text, ..]) if text.parse::<u64>().is_ok() => text.clone(),
        (Shape::One | Shape::Switch, texts) => texts.first().map(quoted).unwrap_or_default(),
    }
}

fn yes_or_no(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "t" | "yes" | "y" | "on" | "1" => Some(true),
        "false" | "f" | "no" | "n" | "off" | "0" => Some(false),
        _ => None,
    }
}

/// One year in seconds: longer than any useful timeout, and within the range of timers.
const LONGEST_WAIT: f64 = 366.0 * 86_400.0;

/// A hundred years in seconds: longer than any useful retention, and without an overflow of clocks.
const LONGEST_KEPT: f64 = 100.0 * LONGEST_WAIT;

/// Parses seconds, whole or decimal.
fn seconds(text: &str, most: f64) -> Option<Duration> {
    let seconds: f64 = text.parse().ok()?;
    (0.0..=most).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}

const INTERVAL: &str = "a number of seconds above 0, at most a year";
const COUNT: &str = "a whole number above 0";

fn interval(text: &str) -> Option<Duration> {
    seconds(text, LONGEST_WAIT).filter(|time| !time.is_zero())
}

fn positive(text: &str) -> Option<usize> {
    text.parse().ok().filter(|&number| number > 0)
}
