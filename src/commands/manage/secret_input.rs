//! Reads passwords and tokens from files and the standard input.

use std::io::{self, Read as _};

use super::error::Error;
use crate::{
    config::PasswordSource, control_plane::Password,
    protocol::byte_order_mark::remove_byte_order_mark,
};

/// Reads or generates a password; the second value is its plaintext if it was generated and must be
/// shown.
pub(super) fn read_password(source: PasswordSource) -> Result<(Password, Option<String>), Error> {
    Ok(match source {
        PasswordSource::Generated => {
            let password = Password::generate();
            let shown = password.expose().to_owned();
            (password, Some(shown))
        }
        PasswordSource::File(path) => {
            (Password::parse(&read_first_line(&path)?).map_err(Error::InvalidPassword)?, None)
        }
    })
}

/// The first line of a file, or of the standard input if the path is `-`.
pub(super) fn read_first_line(path: &str) -> Result<String, Error> {
    let mut text = String::new();
    let read = match path {
        "-" => io::stdin().lock().take(64 << 10).read_to_string(&mut text).map(drop),
        path => std::fs::read_to_string(path).map(|read| text = read),
    };
    read.map_err(|error| {
        Error::Read(if path == "-" { "the standard input" } else { path }.to_owned(), error)
    })?;
    remove_byte_order_mark(&mut text);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}
