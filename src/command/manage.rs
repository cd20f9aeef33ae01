//! `parapet token` and `parapet account`: the control plane from a shell.
//!
//! The same tasks are done on the database of a standalone instance, or by asking a running server.

mod database;
mod error;
mod input;
mod server;
mod told;

pub use self::error::Error;
use crate::config::{Manage, Place};

/// Does a task; what it gives is to be printed.
pub async fn run(asked: Manage) -> Result<String, Error> {
    let told = match asked.place {
        Place::Database(location) => database::run(location, asked.task).await?,
        Place::Server(server) => server::run(server, asked.task).await?,
    };
    Ok(if asked.json { told.json() } else { told.text() })
}
