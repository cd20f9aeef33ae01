//! The configuration: flags over environment over file over defaults, checked before anything runs.
//!
//! Texts are gathered under the one list of keys (`config/keys.rs`), then read into [`Config`],
//! whose types leave nothing to check. Every mistake is reported at once, none repeats a secret.
//! Nothing else reads the environment, and nothing here starts anything.

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

/// What the process was started for.
#[derive(Debug)]
pub enum Command {
    /// To serve.
    Run(Box<Config>),
    /// To ask a running instance how it is.
    Probe(Probe),
    /// To manage tokens or accounts.
    Manage(Manage),
    /// To keep what the control plane's database holds, or to bring it back.
    Archive(Archive),
    /// To tell why a flag comes out as it does.
    Explain(Explain),
    /// To tell something: help, the version, or the effective configuration without secrets.
    Show(String),
}

impl Command {
    /// Reads the command line and the environment of this process.
    #[expect(clippy::disallowed_methods, reason = "nothing else reads the environment")]
    pub fn from_process() -> Result<Self, Mistakes> {
        let variable =
            |name: &str| std::env::var_os(name).map(|text| text.to_string_lossy().into_owned());
        Self::parse(std::env::args_os(), &variable)
    }

    /// Reads a command line, the program's name first, and an environment.
    ///
    /// An environment variable that is empty counts as not set.
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
