//! `parapet backup` and `parapet restore`: what may be written there, and what was.
//!
//! They find the database of a standalone instance by the same settings as that, whether it runs or not.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::checked::ArchiveAction;

const FILE: &str = "file";
const FORCE: &str = "force";

/// What was written of one of the two.
#[derive(Clone, Debug)]
pub(super) struct Order {
    pub(super) action: ArchiveAction,
    pub(super) file: PathBuf,
    pub(super) replace: bool,
}

impl ArchiveAction {
    const ALL: [Self; 2] = [Self::Backup, Self::Restore];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Restore => "restore",
        }
    }

    /// The one of this name.
    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|it| it.name() == name)
    }

    fn command(self) -> Command {
        let (about, file, force, example) = match self {
            Self::Backup => (
                "Write accounts, tokens, the audit log and usage of a standalone to a file",
                "The file to write; for its owner alone, since it holds password hashes",
                "Replace the file if it is there",
                "Running instances need not be stopped. Flags are files, and not part of it.\n\n\
                 Example:\n  parapet backup parapet.backup",
            ),
            Self::Restore => (
                "Replace what the database of a standalone holds by a file of `backup`",
                "The file to read",
                "Delete what the database holds, if it holds anything",
                "Either kind of database takes what was written from either. Sessions end; tokens \
                 that were deleted since are valid again.\n\n\
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

/// The two commands.
pub(super) fn commands() -> [Command; 2] {
    ArchiveAction::ALL.map(ArchiveAction::command)
}

/// Reads what was written of one of the two.
pub(super) fn read(action: ArchiveAction, matches: &ArgMatches) -> Order {
    Order {
        action,
        file: matches.get_one::<PathBuf>(FILE).expect("clap insists on it").clone(),
        replace: matches.get_flag(FORCE),
    }
}
