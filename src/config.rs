//! The configuration: command line over environment over file over defaults, validated before a start.
//!
//! Raw values are merged by the list of all options (`config/options.rs`) and then parsed into
//! [`Config`], whose types need no further validation. All errors are reported at once, and none repeats
//! a secret. Only this module reads the environment. It starts nothing.

mod archive;
mod check;
mod checked;
mod cli;
mod file;
mod keys;
mod manage;
mod mistake;
mod settings;
mod tls;

use std::ffi::OsString;

pub use self::{
    checked::{
        AdminListener, Archive, ArchiveAction, Config, Credentials, DataListener, Edge, Explain,
        FlagsPath, Folder, Identity, Manage, Mode, Offline, Place, Probe, Shutdown, Standalone,
        Trust,
    },
    manage::{PasswordSource, Server, Task},
    mistake::{Mistake, Mistakes},
    settings::Effective,
};
use self::{
    cli::{Line, Purpose, Verb},
    settings::Settings,
};

/// The command that the process was started with.
#[derive(Debug)]
pub enum Command {
    /// Serve.
    Run(Box<Config>),
    /// Probe the health or readiness of a running instance.
    Probe(Probe),
    /// Manage tokens or accounts.
    Manage(Manage),
    /// Back up the database of the control plane, or restore it.
    Archive(Archive),
    /// Explain the result of a flag.
    Explain(Explain),
    /// Print a text: help, the version, or the effective configuration without secrets.
    Show(String),
}

impl Command {
    /// Parses the command line and the environment of this process.
    #[expect(clippy::disallowed_methods, reason = "nothing else reads the environment")]
    pub fn from_process() -> Result<Self, Mistakes> {
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
    ) -> Result<Self, Mistakes> {
        let (verb, purpose, flags) = match cli::parse(args)? {
            Line::Show(text) => return Ok(Self::Show(text)),
            Line::Explain(asked) => return Ok(Self::Explain(asked)),
            Line::Manage { errand, flags } => {
                let verb = Verb::Serve(cli::Role::Standalone);
                let settings = Settings::gather(verb, flags, variable);
                return check::manage(settings, errand).map(Self::Manage);
            }
            Line::Archive { order, flags } => {
                let verb = Verb::Serve(cli::Role::Standalone);
                let settings = Settings::gather(verb, flags, variable);
                return check::archive(settings, order).map(Self::Archive);
            }
            Line::Do { verb, purpose, flags } => (verb, purpose, flags),
        };
        let mut settings = Settings::gather(verb, flags, variable);
        let command = match verb {
            Verb::Serve(role) => Self::Run(Box::new(check::config(&mut settings, role)?)),
            Verb::Ask(question) => Self::Probe(check::probe(&mut settings, question)?),
        };
        if purpose == Purpose::Run {
            return Ok(command);
        }
        let warnings = if let Self::Run(config) = &command { &config.warnings[..] } else { &[] };
        let warnings = warnings.iter().map(|it| format!("# Warning: {it}\n"));
        Ok(Self::Show(warnings.chain([settings.to_toml()]).collect()))
    }
}

#[cfg(test)]
mod tests;
