//! An option: its names, its arity, the commands that it applies to, and its help text.
//!
//! The options themselves are in `options`.

use clap::builder::StyledStr;

use self::Arity::{List, One, Switch};

/// An option.
#[derive(Debug)]
pub(super) struct OptionSpec {
    /// The name on the command line, without dashes; every other name derives from it.
    pub(super) name: &'static str,
    pub(super) short: Option<char>,
    env: Option<&'static str>,
    pub(super) arity: Arity,
    pub(super) scope: CommandScope,
    pub(super) heading: &'static str,
    /// The default as an operator would write it. `None` if it is computed; the help text describes it
    /// then.
    pub(super) default: Option<&'static str>,
    help_text: &'static str,
    pub(super) compatibility: Compatibility,
    /// The value is neither printed nor repeated in errors.
    pub(super) secret: bool,
    /// The secret whose value is in the file that this option names.
    pub(super) file_for: Option<&'static Self>,
}

/// How many values an option takes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Arity {
    /// One string.
    One,
    /// Several strings, separated by commas or by repeating the option.
    List,
    /// A boolean; the option without a value is `true`.
    Switch,
}

/// The commands that an option applies to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum CommandScope {
    All,
    Edge,
    Offline,
    Standalone,
    /// `offline` and `standalone`, which have no upstream.
    WithoutUpstream,
    /// `edge` and `standalone`, which send or store usage.
    WithUsage,
    /// `health` and `ready`.
    Probe,
}

impl CommandScope {
    /// Whether an option of this scope applies to the command whose own scope is `command`.
    pub(super) fn applies_to(self, command: Self) -> bool {
        match self {
            Self::All => true,
            Self::WithUsage => matches!(command, Self::Edge | Self::Standalone),
            Self::WithoutUpstream => matches!(command, Self::Offline | Self::Standalone),
            own => own == command,
        }
    }
}

/// How a value is treated, with regard to Unleash Edge.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Compatibility {
    /// It has the effect that its help text describes.
    Supported,
    /// An option of Unleash Edge that has no effect here; it is accepted with a warning.
    Ignored,
    /// An option of Unleash Edge without which a start would not be what the operator wants; an error.
    Rejected,
}

/// An option with one value.
pub(super) const fn one(name: &'static str) -> OptionSpec {
    OptionSpec {
        name,
        short: None,
        env: None,
        arity: One,
        scope: CommandScope::All,
        heading: "",
        default: None,
        help_text: "",
        compatibility: Compatibility::Supported,
        secret: false,
        file_for: None,
    }
}

/// An option with several values.
pub(super) const fn list(name: &'static str) -> OptionSpec {
    OptionSpec { arity: List, ..one(name) }
}

/// A boolean option, off by default.
pub(super) const fn switch(name: &'static str) -> OptionSpec {
    OptionSpec { arity: Switch, default: Some("false"), ..one(name) }
}

/// An option of Unleash Edge that is accepted with a warning; its help text says why it has no effect.
pub(super) const fn ignored(name: &'static str, arity: Arity) -> OptionSpec {
    OptionSpec { arity, compatibility: Compatibility::Ignored, secret: true, ..one(name) }
}

/// An option of Unleash Edge that prevents a start; its help text says what to do instead.
pub(super) const fn rejected(name: &'static str, arity: Arity) -> OptionSpec {
    OptionSpec { arity, compatibility: Compatibility::Rejected, secret: true, ..one(name) }
}

impl OptionSpec {
    pub(super) const fn short(self, short: char) -> Self {
        Self { short: Some(short), ..self }
    }

    pub(super) const fn env(self, env: &'static str) -> Self {
        Self { env: Some(env), ..self }
    }

    pub(super) const fn default(self, default: &'static str) -> Self {
        Self { default: Some(default), ..self }
    }

    pub(super) const fn secret(self) -> Self {
        Self { secret: true, ..self }
    }

    pub(super) const fn in_section(
        self,
        scope: CommandScope,
        heading: &'static str,
        help: &'static str,
    ) -> Self {
        Self { scope, heading, help_text: help, ..self }
    }

    /// Whether the value may be in a file instead: true for every secret that has an effect.
    pub(super) fn accepts_file(&self) -> bool {
        self.secret && self.compatibility == Compatibility::Supported
    }

    /// The option that names a file with the value of this one; created once, for the list of all options.
    pub(super) fn file_option(&'static self) -> Option<&'static Self> {
        if !self.accepts_file() {
            return None;
        }
        let text = |text: String| -> &'static str { text.leak() };
        let help = match self.arity {
            List => {
                format!("A file with the values of --{}, separated by commas or lines.", self.name)
            }
            One | Switch => format!("A file with the value of --{}.", self.name),
        };
        let file = Self {
            env: self.env.map(|env| text(format!("{env}_FILE"))),
            scope: self.scope,
            heading: self.heading,
            help_text: text(help),
            file_for: Some(self),
            ..one(text(format!("{}-file", self.name)))
        };
        Some(Box::leak(Box::new(file)))
    }

    /// The help text without its final period. For an option of Unleash Edge without effect: the reason.
    pub(super) fn help_text(&self) -> &'static str {
        self.help_text.trim().trim_end_matches('.')
    }

    /// The name as an environment variable.
    pub(super) fn env_name(&self) -> String {
        self.env.map_or_else(|| self.name.replace('-', "_").to_ascii_uppercase(), str::to_owned)
    }

    /// The name as a key of the configuration file.
    pub(super) fn toml_name(&self) -> String {
        self.name.replace('-', "_")
    }

    /// The text in `--help`, with default and environment variable.
    pub(super) fn cli_help(&self) -> StyledStr {
        let default = match (self.arity, self.default) {
            (Switch, _) | (_, None | Some("")) => String::new(),
            (_, Some(default)) => format!(" [default: {default}]"),
        };
        format!("{}{default} [env: {}]", self.help_text(), self.env_name()).into()
    }
}

/// The items of a list in one string, separated by commas.
pub(super) fn split_list(text: &str) -> Vec<String> {
    split_at(text, &[','])
}

/// The items of a list in a file, separated by commas or lines.
pub(super) fn split_list_file(text: &str) -> Vec<String> {
    split_at(text, &[',', '\n', '\r'])
}

fn split_at(text: &str, separators: &[char]) -> Vec<String> {
    text.split(separators)
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .map(str::to_owned)
        .collect()
}
