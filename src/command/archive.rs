//! `parapet backup` and `parapet restore`: what a standalone has in its database, in a file.

use crate::{
    config::{Archive, ArchiveAction},
    control::backup::{self, BackupError},
};

/// Does what was asked for; what it gives is to be printed.
pub async fn run(asked: Archive) -> Result<String, BackupError> {
    let Archive { action, file, replace, location } = asked;
    let shown = file.display();
    match action {
        ArchiveAction::Backup => {
            let rows = backup::save(&location, &file, replace).await?;
            Ok(format!("wrote {rows} rows to {shown}\n"))
        }
        ArchiveAction::Restore => {
            let rows = backup::restore(&location, &file, replace).await?;
            Ok(format!("restored {rows} rows from {shown}; no session is open\n"))
        }
    }
}
