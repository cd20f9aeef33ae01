//! The command line of `parapet backup` and `parapet restore`.
//!
//! Both find the database of a standalone instance by the settings of that instance, which need not run.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::model::BackupAction;

const FILE: &str = "file";
const FORCE: &str = "force";

/// The parsed command line of `backup` or `restore`.
#[derive(Clone, Debug)]
pub(super) struct BackupCommand {
    pub(super) action: BackupAction,
    pub(super) file: PathBuf,
    pub(super) replace: bool,
}

impl BackupAction {
    const ALL: [Self; 2] = [Self::Backup, Self::Restore];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Restore => "restore",
        }
    }

    /// The action of the subcommand `name`.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|it| it.name() == name)
    }

    fn clap_command(self) -> Command {
        let (about, file, force, example) = match self {
            Self::Backup => (
                "Write accounts, tokens, audit log and usage of a standalone instance to a file",
                "The file to write; readable only by its owner, since it contains password hashes",
                "Overwrite the file if it exists",
                "Running instances need not be stopped. Flags are files and not part of the backup.\n\n\
                 Example:\n  parapet backup parapet.backup",
            ),
            Self::Restore => (
                "Replace the contents of a standalone instance's database with a backup",
                "The file to read, written by `backup`",
                "Delete the contents of the database, if there are any",
                "A backup of either kind of database can be restored into either. All sessions end. \
                 Tokens that were deleted since the backup become valid again.\n\n\
                 Example:\n  parapet restore parapet.backup --database-url postgres://…",
            ),
        };
        let file = Arg::new(FILE)
            .value_name("FILE")
            .value_parser(value_parser!(PathBuf))
            .help(file)
            .required(true);
        let force = Arg::new(FORCE).long(FORCE).action(ArgAction::SetTrue).help(force);
        Command::new(self.name()).about(about).after_help(example).args([file, force])
    }
}

/// The subcommands `backup` and `restore`.
pub(super) fn commands() -> [Command; 2] {
    BackupAction::ALL.map(BackupAction::clap_command)
}

/// Parses the arguments of `backup` or `restore`.
pub(super) fn parse(action: BackupAction, matches: &ArgMatches) -> BackupCommand {
    BackupCommand {
        action,
        file: matches.get_one::<PathBuf>(FILE).expect("clap requires it").clone(),
        replace: matches.get_flag(FORCE),
    }
}
