//! Session identifiers for requests that have none.
//!
//! Unleash's frontend API generates one for each such request, so that a rollout or a variant by session
//! treats requests of anonymous users as different sessions. This module has no source of randomness:
//! the identifier is derived from the random seed of the evaluation.

use std::io::Write as _;

use xxhash_rust::xxh3::xxh3_128;

/// Number of hexadecimal digits, the same as in the identifiers that Unleash generates.
const LENGTH: usize = 36;

/// An identifier for requests for which only its presence matters and which no flag names. A constant
/// lets requests share cached results.
pub const PLACEHOLDER: &str = "000000000000000000000000000000000000";

/// A session identifier that was generated for one evaluation.
#[derive(Clone, Copy, Debug)]
pub struct GeneratedSessionId([u8; LENGTH]);

impl GeneratedSessionId {
    /// Derives the identifier from an evaluation's random seed.
    pub fn new(seed: u64) -> Self {
        let mut text = [0; LENGTH];
        let (hash, rest) = (xxh3_128(&seed.to_le_bytes()), seed & 0xffff);
        write!(&mut text[..], "{hash:032x}{rest:04x}").expect("36 digits fit into 36 bytes");
        Self(text)
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("digits are ASCII")
    }
}
