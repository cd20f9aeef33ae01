//! Errors in the files of a configuration, reported all at once.

use std::fmt;

/// The option that names a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FileSetting {
    /// A certificate chain of the server.
    Certificate,
    /// A private key of the server.
    Key,
    /// The certificate authorities of clients.
    ClientCa,
    /// The revocation lists for client certificates.
    Crl,
}

/// The error in one file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FileError {
    /// The option that names the file.
    pub setting: FileSetting,
    /// The reason, as a sentence that names the file and does not contain its contents.
    pub reason: String,
}

/// The errors in all files; at least one.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub struct FileErrors(Vec<FileError>);

impl FileErrors {
    /// Returns `Ok` if the list is empty.
    pub(super) fn check_empty(problems: Vec<FileError>) -> Result<(), Self> {
        if problems.is_empty() { Ok(()) } else { Err(Self(problems)) }
    }

    /// Iterates over the errors in the order of the configuration.
    pub fn iter(&self) -> impl Iterator<Item = &FileError> {
        self.0.iter()
    }
}

impl fmt::Display for FileErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, problem) in self.0.iter().enumerate() {
            let separator = if n > 0 { "; " } else { "" };
            write!(f, "{separator}{}", problem.reason)?;
        }
        Ok(())
    }
}
