//! The format of a record wherever it outlives the process: a header line, then the bytes.
//!
//! The header is `parapet <version> <length> <checksum>`. The checksum is the XXH3-128 of the bytes in
//! hexadecimal: it detects damage, not tampering.

use std::io;

use xxhash_rust::xxh3::xxh3_128;

use super::store_trait::Error;

/// The longest record that is loaded from a remote store, in bytes. The longest document that is
/// fetched from upstream fits.
pub(super) const MAX_RECORD_LEN: usize = 300 << 20;

/// No header is longer, in bytes.
pub(super) const MAX_HEADER_LEN: usize = 128;

const MAGIC: &str = "parapet";
const VERSION: u32 = 1;

/// Why a record cannot be decoded.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum DecodeError {
    /// It differs from what was written.
    Damaged,
    /// It has a format version that only newer versions of Parapet support.
    UnsupportedVersion(u32),
}

impl DecodeError {
    /// The suffix of the name under which the record is set aside.
    pub(super) const fn extension(&self) -> &'static str {
        match self {
            Self::Damaged => "damaged",
            Self::UnsupportedVersion(_) => "newer",
        }
    }

    /// The error for a record at `record`, which is now at `aside`.
    pub(super) fn into_error(self, record: String, aside: String) -> Error {
        match self {
            Self::UnsupportedVersion(version) => {
                Error::UnsupportedVersion { record, version, aside }
            }
            Self::Damaged => Error::Damaged { record, aside },
        }
    }
}

/// The error for a record that is too long to be loaded.
pub(super) fn too_large_error(len: u64) -> io::Error {
    let text = format!("it has {len} bytes, and at most {MAX_RECORD_LEN} are supported");
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// The bytes of `record`; reuses its memory.
pub(super) fn decode(mut record: Vec<u8>) -> Result<Vec<u8>, DecodeError> {
    let end = record.iter().position(|&byte| byte == b'\n').ok_or(DecodeError::Damaged)?;
    let (found, bytes) = record.split_at(end + 1);
    if found != header(bytes).as_bytes() {
        return Err(
            newer_version(found).map_or(DecodeError::Damaged, DecodeError::UnsupportedVersion)
        );
    }
    record.drain(..=end);
    Ok(record)
}

/// The record of `bytes`.
pub(super) fn encode(bytes: &[u8]) -> Vec<u8> {
    [header(bytes).as_bytes(), bytes].concat()
}

/// The header for `bytes`; followed by them it forms their record.
pub(super) fn header(bytes: &[u8]) -> String {
    format!("{MAGIC} {VERSION} {} {:032x}\n", bytes.len(), xxh3_128(bytes))
}

/// The format version in a header, if it is newer.
fn newer_version(head: &[u8]) -> Option<u32> {
    let mut words = str::from_utf8(head).ok()?.split_whitespace();
    let version = words.next().filter(|&name| name == MAGIC).and(words.next())?.parse().ok()?;
    (version > VERSION).then_some(version)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn version_1_record_is_decoded() {
        let record = b"parapet 1 12 3bb56003d51430a7d562f0f0edb90540\nhello\nworld\x00";
        assert_eq!(
            String::from_utf8_lossy(&encode(b"hello\nworld\x00")),
            String::from_utf8_lossy(record)
        );
        assert_eq!(decode(record.to_vec()), Ok(b"hello\nworld\x00".to_vec()));
    }

    proptest! {
        #[test]
        fn records_round_trip_and_any_damage_is_detected(
            bytes in prop::collection::vec(any::<u8>(), 0..64),
            at in any::<prop::sample::Index>(),
            flip in 1..=u8::MAX,
        ) {
            let record = encode(&bytes);
            prop_assert_eq!(decode(record.clone()), Ok(bytes));
            let at = at.index(record.len());
            prop_assert!(decode(record[..at].to_vec()).is_err());
            let mut damaged = record;
            damaged[at] ^= flip;
            prop_assert!(decode(damaged).is_err());
        }
    }
}
