//! Session identifiers for requests that have none.
//!
//! Unleash's frontend API makes one up for each such request, so that a rollout or a split by session
//! treats requests of unknown users as different sessions. Nothing here draws: the random number of an
//! evaluation arrives from outside, and the identifier follows from it.

use std::io::Write as _;

use xxhash_rust::xxh3::xxh3_128;

/// As many hexadecimal digits as the identifiers have that Unleash makes up.
const LENGTH: usize = 36;

/// An identifier for where it matters only that there is one and that no flag names it. One for all
/// lets requests share what is cached.
pub const ANY: &str = "000000000000000000000000000000000000";

/// A session identifier that was made up for one evaluation.
#[derive(Clone, Copy, Debug)]
pub struct MadeUpSession([u8; LENGTH]);

impl MadeUpSession {
    /// The identifier that follows from an evaluation's random number.
    pub fn new(draw: u64) -> Self {
        let mut text = [0; LENGTH];
        let (hash, rest) = (xxh3_128(&draw.to_le_bytes()), draw & 0xffff);
        write!(&mut text[..], "{hash:032x}{rest:04x}").expect("36 digits fit into 36 bytes");
        Self(text)
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("digits are ASCII")
    }
}
