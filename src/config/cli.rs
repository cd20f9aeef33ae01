//! The command line: definition and parsing.
//!
//! Values remain strings here; they are parsed in `from_raw`.

use std::ffi::OsString;

use clap::{
    Arg, ArgAction, ArgMatches, Command,
    error::{ContextKind, ContextValue, ErrorKind},
};

use super::{
    backup::{self, BackupCommand},
    error::{ConfigError, ConfigErrors},
    manage::{self, ManageArgs},
    model::{BackupAction, ExplainOptions},
    option_spec::{Arity, CommandScope, Compatibility, OptionSpec},
    options::{CONFIG, DATA_DIR, DATABASE_URL, OPTIONS},
};
use crate::{
    protocol::rfc3339,
    telemetry::REVISION,
    token::{Environment, Token},
};

const CHECK_CONFIG: &str = "check-config";
const PRINT_CONFIG: &str = "print-config";
const EXPLAIN: &str = "explain";

/// A parsed command line.
#[derive(Debug)]
pub(super) enum Invocation {
    /// Print a text, such as the help.
    Print(String),
    /// Explain a flag; needs no settings.
    Explain(ExplainOptions),
    /// A task of the control plane.
    Manage { command: ManageArgs, values: CliValues },
    /// Back up the control plane, or restore it.
    Backup { command: BackupCommand, values: CliValues },
    /// Serve, probe, or print the configuration; needs the settings.
    RunOrProbe { subcommand: Subcommand, purpose: Purpose, values: CliValues },
}

/// The subcommands that use the settings.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Subcommand {
    Serve(ServeMode),
    Probe(Probe),
}

/// The mode to serve in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum ServeMode {
    Edge,
    Offline,
    Standalone,
}

/// The probe of a running instance.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Probe {
    Health,
    Ready,
}

/// Whether to use the settings or to print them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Purpose {
    Run,
    PrintConfig,
}

/// The values of the command line, by option. `Debug` shows the names only, because values may be
/// secret.
pub(super) struct CliValues(Vec<(&'static OptionSpec, Vec<String>)>);

impl std::fmt::Debug for CliValues {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(key, _)| key.name)).finish()
    }
}

impl IntoIterator for CliValues {
    type Item = (&'static OptionSpec, Vec<String>);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl Subcommand {
    const ALL: [Self; 5] = [
        Self::Serve(ServeMode::Edge),
        Self::Serve(ServeMode::Offline),
        Self::Serve(ServeMode::Standalone),
        Self::Probe(Probe::Health),
        Self::Probe(Probe::Ready),
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Serve(ServeMode::Edge) => "edge",
            Self::Serve(ServeMode::Offline) => "offline",
            Self::Serve(ServeMode::Standalone) => "standalone",
            Self::Probe(Probe::Health) => "health",
            Self::Probe(Probe::Ready) => "ready",
        }
    }

    pub(super) fn scope(self) -> CommandScope {
        match self {
            Self::Serve(ServeMode::Edge) => CommandScope::Edge,
            Self::Serve(ServeMode::Offline) => CommandScope::Offline,
            Self::Serve(ServeMode::Standalone) => CommandScope::Standalone,
            Self::Probe(_) => CommandScope::Probe,
        }
    }

    fn about(self) -> &'static str {
        match self {
            Self::Serve(ServeMode::Edge) => "Run as an edge in front of an Unleash server",
            Self::Serve(ServeMode::Offline) => {
                "Serve the flags of a file to a fixed list of tokens"
            }
            Self::Serve(ServeMode::Standalone) => {
                "Run without Unleash, with flags from files and its own tokens (the default)"
            }
            Self::Probe(Probe::Health) => {
                "Check whether a running instance is alive; exit 0 if so, else 1"
            }
            Self::Probe(Probe::Ready) => {
                "Check whether a running instance is ready; exit 0 if so, else 1"
            }
        }
    }
}

/// Parses the command line, which starts with the name of the program.
pub(super) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, ConfigErrors> {
    let args: Vec<OsString> = args.into_iter().collect();
    let matches = match clap_command().try_get_matches_from(&args) {
        Ok(matches) => matches,
        Err(error) => {
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                    Ok(Invocation::Print(error.render().to_string()))
                }
                _ => Err(ConfigError {
                    location: "command line".to_owned(),
                    reason: describe_error(&error, &args),
                }
                .into()),
            };
        }
    };
    let (subcommand, below) = match matches.subcommand() {
        Some((name, below)) => {
            if matches!(name, "token" | "account") {
                return parse_manage(name, &matches, below);
            }
            if let Some(action) = BackupAction::from_name(name) {
                let command = backup::parse(action, below);
                reject_config_flags(name, below)?;
                let flags = location_values(name, &[below, &matches])?;
                return Ok(Invocation::Backup { command, values: flags });
            }
            if name == EXPLAIN {
                return parse_explain(&matches, below).map(Invocation::Explain);
            }
            let subcommand =
                Subcommand::ALL.into_iter().find(|subcommand| subcommand.name() == name);
            (subcommand.expect("clap accepts no other subcommand"), below)
        }
        None => (Subcommand::Serve(ServeMode::Standalone), &matches),
    };
    let purpose = if [PRINT_CONFIG, CHECK_CONFIG].iter().any(|flag| below.get_flag(flag)) {
        Purpose::PrintConfig
    } else {
        Purpose::Run
    };
    let flags = OPTIONS.iter().filter_map(|key| {
        let values = values_of(below, key).or_else(|| values_of(&matches, key))?;
        Some((*key, values))
    });
    Ok(Invocation::RunOrProbe { subcommand, purpose, values: CliValues(flags.collect()) })
}

/// The values of `key` at this level of the command line.
fn values_of(matches: &ArgMatches, key: &OptionSpec) -> Option<Vec<String>> {
    let values = matches.try_get_many::<String>(key.name).ok().flatten()?;
    Some(values.cloned().collect())
}

/// `parapet` and its subcommands.
///
/// Options of all commands may precede the subcommand or follow it. Options of `standalone` may be used
/// without naming it.
fn clap_command() -> Command {
    let switch =
        |name, help| Arg::new(name).long(name).help(help).action(ArgAction::SetTrue).global(true);
    // Hidden and rejected for commands that have no configuration to print.
    let refused = || [CHECK_CONFIG, PRINT_CONFIG].map(|name| switch(name, "").hide(true));
    Subcommand::ALL
        .into_iter()
        .fold(Command::new("parapet"), |command, subcommand| {
            let own = Command::new(subcommand.name()).about(subcommand.about());
            command.subcommand(own.args(subcommand_args(subcommand)))
        })
        .subcommand(explain_clap_command().args(refused()))
        .subcommands(manage::commands().into_iter().chain(backup::commands()).map(|command| {
            // Only the options that locate the database are shared with the server.
            let foreign = args_in_scope(|scope| scope == CommandScope::All);
            let foreign = foreign.map(|arg| {
                let ours = location_options().any(|key| arg.get_id().as_str() == key.name);
                arg.global(true).hide(!ours)
            });
            let database = location_options().filter(|key| key.scope != CommandScope::All);
            let database = database.map(|key| arg(key).global(true));
            command.args(database).args(foreign).args(refused())
        }))
        .about("An open-source edge for Unleash feature flags")
        .long_about(
            "An open-source edge for Unleash feature flags.\n\n\
             Every option can also be set by an environment variable, or in the configuration file \
             under its name with underscores. The command line overrides the environment, and the \
             environment overrides the file.",
        )
        .version(env!("CARGO_PKG_VERSION"))
        .propagate_version(true)
        .long_version(format!("{} ({REVISION})", env!("CARGO_PKG_VERSION")))
        .args(args_in_scope(|scope| scope == CommandScope::All).map(|arg| arg.global(true)))
        .args(subcommand_args(Subcommand::Serve(ServeMode::Standalone)))
        .arg(switch(CHECK_CONFIG, "Check the configuration, print it without secrets, and exit"))
        .arg(switch(PRINT_CONFIG, "The same as --check-config"))
}

/// The options of a command, without those of all commands.
fn subcommand_args(subcommand: Subcommand) -> impl Iterator<Item = Arg> {
    args_in_scope(move |scope| scope != CommandScope::All && scope.applies_to(subcommand.scope()))
}

fn args_in_scope(wanted: impl Fn(CommandScope) -> bool) -> impl Iterator<Item = Arg> {
    OPTIONS.iter().filter(move |key| wanted(key.scope)).map(|key| arg(key))
}

fn arg(key: &'static OptionSpec) -> Arg {
    let arg = Arg::new(key.name)
        .long(key.name)
        .help(key.cli_help())
        .help_heading(key.heading)
        .value_name(key.toml_name().to_ascii_uppercase())
        .hide_short_help(key.compatibility != Compatibility::Supported);
    let arg = match key.short {
        Some(short) => arg.short(short),
        None => arg,
    };
    match key.arity {
        Arity::One => arg.action(ArgAction::Set),
        Arity::List => arg.action(ArgAction::Append),
        Arity::Switch => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
    }
}

/// The options that locate the accounts and tokens of a standalone instance.
fn location_options() -> impl Iterator<Item = &'static OptionSpec> {
    let is_one =
        |key: &OptionSpec| [&CONFIG, &DATA_DIR, &DATABASE_URL].iter().any(|it| it.name == key.name);
    OPTIONS.iter().copied().filter(move |key| is_one(key) || key.file_for.is_some_and(is_one))
}

fn parse_manage(
    name: &str,
    above: &ArgMatches,
    below: &ArgMatches,
) -> Result<Invocation, ConfigErrors> {
    let command = manage::parse(name, below)?;
    let deepest = below.subcommand().map_or(below, |(_, deepest)| deepest);
    reject_config_flags(name, deepest)?;
    let values = location_values(name, &[deepest, below, above])?;
    if let (Some(_), Some((key, _))) = (&command.server, values.0.first()) {
        let reason = "cannot be combined with --url".to_owned();
        return Err(ConfigError { location: format!("--{}", key.name), reason }.into());
    }
    Ok(Invocation::Manage { command, values })
}

/// The values of the options that locate the database. `levels` are those of the command line, deepest
/// first.
fn location_values(name: &str, levels: &[&ArgMatches]) -> Result<CliValues, ConfigErrors> {
    let mut flags = Vec::new();
    for key in OPTIONS.iter().copied() {
        let Some(values) = levels.iter().find_map(|level| values_of(level, key)) else { continue };
        if !location_options().any(|ours| ours.name == key.name) {
            let reason = format!("does not apply to `{name}`");
            return Err(ConfigError { location: format!("--{}", key.name), reason }.into());
        }
        flags.push((key, values));
    }
    Ok(CliValues(flags))
}

/// Rejects `--check-config` and `--print-config` for a command that has no configuration to print.
fn reject_config_flags(name: &str, matches: &ArgMatches) -> Result<(), ConfigErrors> {
    for flag in [CHECK_CONFIG, PRINT_CONFIG] {
        if matches.get_flag(flag) {
            let reason = format!("does not apply to `{name}`");
            return Err(ConfigError { location: format!("--{flag}"), reason }.into());
        }
    }
    Ok(())
}

/// `parapet explain`. Its options are neither environment variables nor keys of the file.
fn explain_clap_command() -> Command {
    let text = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(explain_arg_id(name)).long(name).value_name(value).help(help)
    };
    let options = [
        text("flags", "PATH", "The file with the flags, or the folder of such files")
            .required(true),
        text("flag", "NAME", "The flag to explain").required(true),
        text("environment", "NAME", "The environment of the flags; not a field of the context")
            .default_value(Environment::DEFAULT),
        text("user-id", "TEXT", "The context's userId"),
        text("session-id", "TEXT", "The context's sessionId"),
        text("remote-address", "ADDRESS", "The context's remoteAddress"),
        text(
            "property",
            "NAME=VALUE",
            "Another field of the context, for instance environment=…; repeatable",
        )
        .action(ArgAction::Append),
        text(
            "at",
            "TIME",
            "The time of the evaluation, as in 2030-01-01T00:00:00Z; now by default",
        ),
    ];
    let json = Arg::new(explain_arg_id("json")).long("json").action(ArgAction::SetTrue);
    // Options for serving do not apply here; clap would list them otherwise.
    let foreign = args_in_scope(|scope| scope == CommandScope::All).map(|arg| arg.hide(true));
    Command::new(EXPLAIN)
        .about("Explain how a flag from a file is evaluated for a context")
        .after_help(
            "Example:\n  parapet explain --flags config/flags.json --flag demo.checkout-button \
             --user-id 7",
        )
        .args(options)
        .arg(json.help("Print JSON instead of text"))
        .args(foreign)
}

/// A clap id that differs from those of the options, which share some names.
fn explain_arg_id(name: &str) -> String {
    format!("{EXPLAIN}-{name}")
}

fn parse_explain(above: &ArgMatches, own: &ArgMatches) -> Result<ExplainOptions, ConfigErrors> {
    reject_config_flags(EXPLAIN, own)?;
    for key in OPTIONS.iter() {
        if values_of(own, key).or_else(|| values_of(above, key)).is_some() {
            let reason = format!("does not apply to `{EXPLAIN}`");
            return Err(ConfigError { location: format!("--{}", key.name), reason }.into());
        }
    }
    let text = |name: &str| own.get_one::<String>(&explain_arg_id(name)).cloned();
    let mut properties = Vec::new();
    for property in own.get_many::<String>(&explain_arg_id("property")).into_iter().flatten() {
        let Some((name, value)) = property.split_once('=').filter(|(name, _)| !name.is_empty())
        else {
            let (location, reason) = ("--property".to_owned(), "expected NAME=VALUE".to_owned());
            return Err(ConfigError { location, reason }.into());
        };
        properties.push((name.to_owned(), value.to_owned()));
    }
    let at = match text("at").map(|text| rfc3339::parse(&text)) {
        None => None,
        Some(Some(at)) => Some(at),
        Some(None) => {
            let reason = "expected a time, as in 2030-01-01T00:00:00Z".to_owned();
            return Err(ConfigError { location: "--at".to_owned(), reason }.into());
        }
    };
    Ok(ExplainOptions {
        flags: text("flags").expect("clap requires it").into(),
        flag: text("flag").expect("clap requires it"),
        environment: Environment::new(&text("environment").expect("it has a default")),
        user_id: text("user-id"),
        session_id: text("session-id"),
        remote_address: text("remote-address"),
        properties,
        at,
        json: own.get_flag(&explain_arg_id("json")),
    })
}

/// The message for an invalid command line.
///
/// Clap's own message repeats unknown arguments, and such an argument may be a misplaced token or
/// password.
fn describe_error(error: &clap::Error, args: &[OsString]) -> String {
    if error.kind() == ErrorKind::UnknownArgument
        && let Some(ContextValue::String(found)) = error.get(ContextKind::InvalidArg)
    {
        let is_plain = !found.starts_with('-');
        if is_plain && args.iter().any(|arg| arg == "account") {
            return "there is an unexpected argument; it is not repeated here, because it may be a \
                    password. Use --password-file for passwords"
                .to_owned();
        }
        if let Some(message) = found.strip_prefix("--").and_then(belongs_to_other_command) {
            return message;
        }
    }
    mask_tokens(&error.render().to_string(), args)
}

/// The message for an option that belongs to other commands; `None` if there is no such option.
fn belongs_to_other_command(name: &str) -> Option<String> {
    let key = OPTIONS.iter().find(|key| key.name == name)?;
    let names =
        Subcommand::ALL.iter().filter(|subcommand| key.scope.applies_to(subcommand.scope()));
    let names: Vec<_> =
        names.map(|subcommand| format!("`parapet {}`", subcommand.name())).collect();
    Some(format!("`--{name}` belongs to {}", names.join(" and ")))
}

fn mask_tokens(message: &str, args: &[OsString]) -> String {
    let message = message.trim().trim_start_matches("error: ").to_owned();
    args.iter().filter_map(|arg| arg.to_str()).fold(message, |message, arg| {
        let value = arg.split_once('=').map_or(arg, |(_, value)| value);
        match Token::parse(value) {
            Ok(token) => message.replace(value, &token.masked()),
            Err(_) => message,
        }
    })
}
