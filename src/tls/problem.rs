//! What is wrong with the files of a configuration: everything at once.

use std::fmt;

/// The setting that names a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Setting {
    /// A certificate chain of the server.
    Certificate,
    /// A private key of the server.
    Key,
    /// The authorities of client certificates.
    ClientCa,
    /// The revocation lists of client certificates.
    Crl,
}

/// One file that cannot be used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Problem {
    /// The setting that names it.
    pub setting: Setting,
    /// What is wrong, as a sentence that names the file and nothing of its contents.
    pub reason: String,
}

/// Every file that cannot be used; never empty.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// `Ok` if there are none.
    pub(super) fn none_in(problems: Vec<Problem>) -> Result<(), Self> {
        if problems.is_empty() { Ok(()) } else { Err(Self(problems)) }
    }

    /// Each of them, in the order of the configuration.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, problem) in self.0.iter().enumerate() {
            let separator = if n > 0 { "; " } else { "" };
            write!(f, "{separator}{}", problem.reason)?;
        }
        Ok(())
    }
}
