//! `parapet backup` and `parapet restore`: the database of a standalone instance in a file.

use crate::{
    config::{BackupAction, BackupOptions},
    control_plane::backup::{self, BackupError},
};

/// Runs the command; returns the text to print.
pub async fn run(command: BackupOptions) -> Result<String, BackupError> {
    let BackupOptions { action, file, replace, location } = command;
    let shown = file.display();
    match action {
        BackupAction::Backup => {
            let rows = backup::save(&location, &file, replace).await?;
            Ok(format!("wrote {rows} rows to {shown}\n"))
        }
        BackupAction::Restore => {
            let rows = backup::restore(&location, &file, replace).await?;
            Ok(format!("restored {rows} rows from {shown}; all sessions are ended\n"))
        }
    }
}
