//! Errors of a configuration, reported all at once.

use std::fmt;

/// An error in the configuration.
///
/// Its text never repeats a secret; the code that creates one makes sure of that.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ConfigError {
    /// The option, the environment variable or the line of the file to correct.
    pub location: String,
    /// The expectation that the value does not meet.
    pub reason: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.location, self.reason)
    }
}

/// All errors of a configuration; never empty.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// `Ok` if the list is empty.
    pub(crate) fn check_empty(list: Vec<ConfigError>) -> Result<(), Self> {
        if list.is_empty() { Ok(()) } else { Err(Self(list)) }
    }

    /// The errors, in the order of the options.
    pub fn iter(&self) -> impl Iterator<Item = &ConfigError> {
        self.0.iter()
    }
}

impl From<ConfigError> for ConfigErrors {
    fn from(mistake: ConfigError) -> Self {
        Self(vec![mistake])
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = self.0.iter();
        if let Some(first) = lines.next() {
            write!(f, "{first}")?;
        }
        lines.try_for_each(|mistake| write!(f, "\n{mistake}"))
    }
}
