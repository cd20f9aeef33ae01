//! `parapet token` and `parapet account`: management of tokens and accounts from the command line.
//!
//! Each task works on the database of a standalone instance, or through the admin API of a running
//! server.

mod admin_api;
mod database;
mod error;
mod output;
mod secret_input;

pub use self::error::Error;
use crate::config::{ManageOptions, Target};

/// Runs a task; returns the text to print.
pub async fn run(command: ManageOptions) -> Result<String, Error> {
    let output = match command.target {
        Target::Database(location) => database::run(location, command.task).await?,
        Target::Server(server) => admin_api::run(server, command.task).await?,
    };
    Ok(if command.json { output.to_json() } else { output.to_text() })
}
