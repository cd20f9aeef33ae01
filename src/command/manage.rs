//! `parapet token` and `parapet account`: management of tokens and accounts from the command line.
//!
//! Each task works on the database of a standalone instance, or through the admin API of a running
//! server.

mod database;
mod error;
mod input;
mod server;
mod told;

pub use self::error::Error;
use crate::config::{Manage, Place};

/// Runs a task; returns the text to print.
pub async fn run(command: Manage) -> Result<String, Error> {
    let output = match command.place {
        Place::Database(location) => database::run(location, command.task).await?,
        Place::Server(server) => server::run(server, command.task).await?,
    };
    Ok(if command.json { output.json() } else { output.text() })
}
