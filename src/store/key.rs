//! Keys of records, and their names in a store.

use std::fmt;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::token::Environment;

/// The key of a record.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum RecordKey {
    /// The flags of an environment.
    Flags(Environment),
    /// Validated tokens, by their digests.
    TokenCache,
    /// The encrypted token that the edge itself uses for an environment.
    Credentials(Environment),
    /// The tokens of a registry in a remote database, by their digests.
    Registry,
    /// Unsent usage; each process that shares the store has its own slot.
    Usage(ProcessSlot),
}

/// Upper case is encoded too, because some file systems do not distinguish it from lower case.
const NAME_ESCAPES: &AsciiSet = &{
    let mut set = NON_ALPHANUMERIC.remove(b'-').remove(b'_');
    let mut letter = b'A';
    while letter <= b'Z' {
        set = set.add(letter);
        letter += 1;
    }
    set
};

impl RecordKey {
    /// Its label value in metrics, and the start of its name.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Flags(_) => "flags",
            Self::TokenCache => "verdicts",
            Self::Credentials(_) => "credentials",
            Self::Registry => "registry",
            Self::Usage(_) => "usage",
        }
    }

    /// The name of its record, for instance `flags-development`: lower case letters, digits, `-`, `_` and
    /// `%`.
    pub(super) fn name(&self) -> String {
        let kind = self.kind();
        match self {
            Self::Flags(environment) | Self::Credentials(environment) => {
                format!("{kind}-{}", utf8_percent_encode(environment.as_str(), NAME_ESCAPES))
            }
            Self::TokenCache | Self::Registry => kind.to_owned(),
            Self::Usage(slot) => format!("{kind}{slot}"),
        }
    }

    /// The key whose record has this name.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        let environment = |encoded: &str| {
            let decoded = percent_decode_str(encoded).decode_utf8().ok()?;
            Some(Environment::new(&decoded))
        };
        let key = match name.split_once('-') {
            None => match name {
                "verdicts" => Self::TokenCache,
                "registry" => Self::Registry,
                "usage" => Self::Usage(ProcessSlot::FIRST),
                _ => return None,
            },
            Some(("flags", encoded)) => Self::Flags(environment(encoded)?),
            Some(("credentials", encoded)) => Self::Credentials(environment(encoded)?),
            Some(("usage", number)) => Self::Usage(ProcessSlot::new(number.parse().ok()?)?),
            Some(_) => return None,
        };
        // Another spelling of a name is not found when the record is loaded.
        (key.name() == name).then_some(key)
    }
}

/// The number of a record that belongs to one of several processes.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ProcessSlot(u16);

impl ProcessSlot {
    /// The slot of a process that does not share the store.
    pub const FIRST: Self = Self(1);

    /// More than there are processes.
    const LAST: Self = Self(1000);

    /// All slots, in the order in which to try them.
    pub fn all() -> impl Iterator<Item = Self> {
        (Self::FIRST.0..=Self::LAST.0).map(Self)
    }

    fn new(number: u16) -> Option<Self> {
        (Self::FIRST.0..=Self::LAST.0).contains(&number).then_some(Self(number))
    }
}

/// Formats the suffix of a record's name; empty for the first slot.
impl fmt::Display for ProcessSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::FIRST => Ok(()),
            Self(n) => write!(f, "-{n}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_released_versions_are_unchanged() {
        let name = |key: RecordKey| key.name();
        assert_eq!(
            name(RecordKey::Flags(Environment::new("Dev é/%"))),
            "flags-%44ev%20%C3%A9%2F%25"
        );
        assert_eq!(
            name(RecordKey::Credentials(Environment::new("dev-1_a"))),
            "credentials-dev-1_a"
        );
        assert_eq!(name(RecordKey::TokenCache), "verdicts");
        assert_eq!(name(RecordKey::Registry), "registry");
        let slots = ProcessSlot::all().take(2).map(|slot| name(RecordKey::Usage(slot)));
        assert!(slots.eq(["usage", "usage-2"]));
    }

    #[test]
    fn only_names_that_keys_have_are_keys() {
        for name in
            ["flags-dev", "credentials-%44ev", "verdicts", "registry", "usage", "usage-1000"]
        {
            assert_eq!(RecordKey::from_name(name).map(|key| key.name()).as_deref(), Some(name));
        }
        for name in [
            "",
            "flags",
            "flags-Dev",
            "flags-%64ev",
            "verdicts-1",
            "usage-1",
            "usage-02",
            "usage-1001",
        ] {
            assert_eq!(RecordKey::from_name(name), None, "{name}");
        }
    }
}
