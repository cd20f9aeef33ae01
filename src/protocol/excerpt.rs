//! Truncates and escapes texts of clients, upstream and files for one line of a log or an error.
//!
//! The caller decides whether a text may be shown at all.

use std::fmt::{self, Write as _};

/// Displays a text, truncated to a number of bytes. A longer text is followed by `…` and its length.
/// Control characters are escaped, so that a value cannot start a new line.
#[derive(Clone, Copy, Debug)]
pub struct Excerpt<'a> {
    text: &'a str,
    len: usize,
}

impl<'a> Excerpt<'a> {
    /// The default length of an excerpt, in bytes.
    pub const DEFAULT_LEN: usize = 200;

    /// An excerpt of at most [`Excerpt::DEFAULT_LEN`] bytes.
    pub fn of(text: &'a str) -> Self {
        Self::up_to(Self::DEFAULT_LEN, text)
    }

    /// An excerpt of at most `len` bytes.
    pub fn up_to(len: usize, text: &'a str) -> Self {
        Self { text, len }
    }
}

impl fmt::Display for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.text[..self.text.floor_char_boundary(self.len)];
        for letter in shown.chars() {
            if letter.is_control() {
                write!(f, "{}", letter.escape_default())?;
            } else {
                f.write_char(letter)?;
            }
        }
        if shown.len() < self.text.len() {
            write!(f, "… ({} bytes)", self.text.len())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_truncated_between_characters_and_followed_by_its_length() {
        let check = |text: &str, expect: &str| {
            assert_eq!(Excerpt::up_to(5, text).to_string(), expect);
        };
        check("", "");
        check("short", "short");
        check("longer", "longe… (6 bytes)");
        check("äöü", "äö… (6 bytes)");
        check("🦀🦀", "🦀… (8 bytes)");
        let long = "x".repeat(100_000);
        assert_eq!(Excerpt::of(&long).to_string(), format!("{}… (100000 bytes)", &long[..200]));
    }

    #[test]
    fn control_characters_are_escaped() {
        let text = "a\nERROR forged\r\x1b[31m\u{85}é";
        assert_eq!(Excerpt::of(text).to_string(), r"a\nERROR forged\r\u{1b}[31m\u{85}é");
    }
}
