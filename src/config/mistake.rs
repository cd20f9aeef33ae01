//! What is wrong with a configuration: all of it, in one list.

use std::fmt;

/// One thing that is wrong.
///
/// Its text never repeats a secret; whoever makes one sees to that.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Mistake {
    /// The flag, the variable or the line of the file that is to be mended.
    pub place: String,
    /// What is expected there.
    pub reason: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.reason)
    }
}

/// Everything that is wrong; never empty.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub struct Mistakes(Vec<Mistake>);

impl Mistakes {
    /// `Ok` where nothing is wrong.
    pub(crate) fn none_in(list: Vec<Mistake>) -> Result<(), Self> {
        if list.is_empty() { Ok(()) } else { Err(Self(list)) }
    }

    /// Each of them, in the order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = &Mistake> {
        self.0.iter()
    }
}

impl From<Mistake> for Mistakes {
    fn from(mistake: Mistake) -> Self {
        Self(vec![mistake])
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = self.0.iter();
        if let Some(first) = lines.next() {
            write!(f, "{first}")?;
        }
        lines.try_for_each(|mistake| write!(f, "\n{mistake}"))
    }
}
