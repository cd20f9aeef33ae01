//! Why a task was not done.

use std::{fmt, io};

use crate::{
    control::{Error as Failed, PasswordError},
    token::ParseError,
};

/// Why a task was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The control plane refused, or failed.
    #[error(transparent)]
    Control(#[from] Failed),
    /// A file, or the standard input, cannot be read.
    #[error("cannot read {0}")]
    Read(String, #[source] io::Error),
    /// What was read is no password.
    #[error("the password {0}")]
    Password(PasswordError),
    /// There is nobody of that name.
    #[error("there is no account `{0}`")]
    NoAccount(String),
    /// There is no such token.
    #[error("there is no such token")]
    NoToken,
    /// What was read is no token.
    #[error("{0} holds no token in its first line")]
    Token(String, #[source] ParseError),
    /// The server cannot be talked to, or did not answer.
    #[error("no answer from {0}")]
    Silent(String, #[source] reqwest::Error),
    /// The server said no.
    #[error("{origin} answered {status}{}", Said(message))]
    Refused {
        /// Whom was asked.
        origin: String,
        /// The status of its answer.
        status: u16,
        /// What it said; may be empty.
        message: String,
    },
    /// The server's answer is none of the admin API.
    #[error("{0} does not answer as the admin API does")]
    Foreign(String, #[source] serde_json::Error),
}

struct Said<'a>(&'a str);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ": {}", self.0) }
    }
}
