//! The configuration: command line over environment over file over defaults, validated before a start.
//!
//! Raw values are merged by the list of all options (`config/options.rs`) and then parsed into
//! [`Config`], whose types need no further validation. All errors are reported at once, and none repeats
//! a secret. Only this module reads the environment. It starts nothing.

mod backup;
mod cli;
mod edge;
mod error;
mod file;
mod from_raw;
mod listeners;
mod manage;
mod model;
mod option_spec;
mod options;
mod probe;
mod raw;
mod settings_digests;
mod store;
mod tls;
mod values;

use std::ffi::OsString;

use self::{
    cli::{Invocation, Purpose, Subcommand},
    raw::RawSettings,
};
pub use self::{
    error::{ConfigError, ConfigErrors},
    manage::{ManageTask, PasswordSource, RemoteServer},
    model::{
        AdminListenerConfig, BackupAction, BackupFolder, BackupOptions, Config, Credentials,
        DataListenerConfig, EdgeConfig, ExplainOptions, FlagsPath, InstanceInfo, ManageOptions,
        Mode, OfflineConfig, ProbeOptions, ProbeTrust, RedisStoreConfig, ShutdownConfig,
        StandaloneConfig, StoreConfig, Target,
    },
    settings_digests::SettingsDigests,
};

/// The command that the process was started with.
#[derive(Debug)]
pub enum Command {
    /// Serve.
    Run(Box<Config>),
    /// Probe the health or readiness of a running instance.
    Probe(ProbeOptions),
    /// Manage tokens or accounts.
    Manage(ManageOptions),
    /// Back up the database of the control plane, or restore it.
    Backup(BackupOptions),
    /// Explain the result of a flag.
    Explain(ExplainOptions),
    /// Print a text: help, the version, or the effective configuration without secrets.
    Print(String),
}

impl Command {
    /// Parses the command line and the environment of this process.
    #[expect(clippy::disallowed_methods, reason = "nothing else reads the environment")]
    pub fn from_process() -> Result<Self, ConfigErrors> {
        let variable =
            |name: &str| std::env::var_os(name).map(|text| text.to_string_lossy().into_owned());
        Self::parse(std::env::args_os(), &variable)
    }

    /// Parses a command line, which starts with the name of the program, and an environment.
    ///
    /// An empty environment variable counts as not set.
    pub fn parse(
        args: impl IntoIterator<Item = OsString>,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigErrors> {
        let (subcommand, purpose, values) = match cli::parse(args)? {
            Invocation::Print(text) => return Ok(Self::Print(text)),
            Invocation::Explain(options) => return Ok(Self::Explain(options)),
            Invocation::Manage { command, values } => {
                let subcommand = Subcommand::Serve(cli::ServeMode::Standalone);
                let settings = RawSettings::from_sources(subcommand, values, variable);
                return from_raw::manage(settings, command).map(Self::Manage);
            }
            Invocation::Backup { command, values } => {
                let subcommand = Subcommand::Serve(cli::ServeMode::Standalone);
                let settings = RawSettings::from_sources(subcommand, values, variable);
                return from_raw::backup(settings, command).map(Self::Backup);
            }
            Invocation::RunOrProbe { subcommand, purpose, values } => (subcommand, purpose, values),
        };
        let mut settings = RawSettings::from_sources(subcommand, values, variable);
        let command = match subcommand {
            Subcommand::Serve(role) => Self::Run(Box::new(from_raw::config(&mut settings, role)?)),
            Subcommand::Probe(probe) => Self::Probe(probe::probe(&mut settings, probe)?),
        };
        if purpose == Purpose::Run {
            return Ok(command);
        }
        let warnings = if let Self::Run(config) = &command { &config.warnings[..] } else { &[] };
        let warnings = warnings.iter().map(|it| format!("# Warning: {it}\n"));
        Ok(Self::Print(warnings.chain([settings.to_toml()]).collect()))
    }
}

#[cfg(test)]
mod tests;
