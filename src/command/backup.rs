//! `parapet backup` and `parapet restore`: the database of a standalone instance in a file.

use crate::{
    config::{ArchiveAction, ArchiveOptions},
    control_plane::backup::{self, BackupError},
};

/// Runs the command; returns the text to print.
pub async fn run(command: ArchiveOptions) -> Result<String, BackupError> {
    let ArchiveOptions { action, file, replace, location } = command;
    let shown = file.display();
    match action {
        ArchiveAction::Backup => {
            let rows = backup::save(&location, &file, replace).await?;
            Ok(format!("wrote {rows} rows to {shown}\n"))
        }
        ArchiveAction::Restore => {
            let rows = backup::restore(&location, &file, replace).await?;
            Ok(format!("restored {rows} rows from {shown}; all sessions are ended\n"))
        }
    }
}
