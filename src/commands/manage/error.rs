//! Errors of the tasks.

use std::{fmt, io};

use crate::{
    control_plane::{Error as Failed, PasswordError},
    token::ParseError,
};

/// Why a task failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The control plane denied the operation, or failed.
    #[error(transparent)]
    Control(#[from] Failed),
    /// A file, or the standard input, cannot be read.
    #[error("cannot read {0}")]
    Read(String, #[source] io::Error),
    /// The text is not a valid password.
    #[error("the password {0}")]
    InvalidPassword(PasswordError),
    /// There is no account with that username.
    #[error("there is no account `{0}`")]
    AccountNotFound(String),
    /// There is no such token.
    #[error("there is no such token")]
    TokenNotFound,
    /// The file does not contain a token.
    #[error("{0} contains no token in its first line")]
    InvalidToken(String, #[source] ParseError),
    /// The server could not be reached, or did not respond.
    #[error("no answer from {0}")]
    NoResponse(String, #[source] reqwest::Error),
    /// The server responded with an error status.
    #[error("{origin} answered {status}{}", ServerMessage(message))]
    ErrorResponse {
        /// The origin of the server's URL.
        origin: String,
        /// The HTTP status.
        status: u16,
        /// The error message of the response; may be empty.
        message: String,
    },
    /// The response is not one of the admin API.
    #[error("the response of {0} is not one of the admin API")]
    InvalidResponse(String, #[source] serde_json::Error),
}

struct ServerMessage<'a>(&'a str);

impl fmt::Display for ServerMessage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ": {}", self.0) }
    }
}
