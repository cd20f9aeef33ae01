//! Documents that a leader shares, and which of them an instance serves.
//!
//! # Order
//!
//! An instance never replaces a document by an older one. Documents of one leader are ordered by their
//! sequence numbers. Those of different leaders, and those that the instance has fetched itself, are
//! ordered by the time at which upstream confirmed them, because neither Redis, which may lose its data,
//! nor revisions, which not every upstream has, can order them.
//!
//! Times are never compared between the clocks of two instances. A leader tells Redis how old its
//! confirmation is, and Redis, whose clock all of them share, tells the others how old it is now.
//! A confirmation belongs to one document: a leader reports it only while the document that it has written
//! last is the one being served. The time that a write takes makes its confirmation appear newer, but by less
//! than a lease, because Redis accepts a write only during the lease.
//!
//! Pure, except that compressing takes CPU time: milliseconds per megabyte.

use std::{fmt, io::Read as _, time::Duration};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::role::Fence;

/// The largest document that is shared, in bytes before compression. Redis stores values up to 512 MiB.
pub(super) const MAX_DOCUMENT_BYTES: u64 = 256 << 20;

const COMPRESSION_LEVEL: i32 = 3;

/// The version of a shared document: the fence of its leader, and its number among that leader's.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Version {
    /// The fence of the leader.
    pub fence: Fence,
    /// Counts the documents of that leader.
    pub sequence: u64,
}

/// The SHA-256 of a document before compression.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) struct DocumentDigest([u8; 32]);

impl DocumentDigest {
    fn of(body: &[u8]) -> Self {
        Self(Sha256::digest(body).into())
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for DocumentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A document that a leader has shared, for its user to serve.
#[derive(Clone, Debug)]
pub struct SharedDocument {
    /// The document, as [`Member::share`](super::Member::share) got it.
    pub body: Bytes,
    /// When upstream confirmed it, or a little earlier; `None` if it has not since the leader started.
    pub confirmed_at: Option<Instant>,
    pub(super) head: DocumentHead,
}

/// The description of a shared document.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct DocumentHead {
    pub(super) version: Version,
    pub(super) digest: DocumentDigest,
    /// When upstream confirmed it, or a little earlier.
    pub(super) confirmed_at: Option<Instant>,
}

/// The document that an instance serves, as far as that decides what may replace it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum ServedDocument {
    /// None.
    #[default]
    Nothing,
    /// One of an earlier run, which upstream has not confirmed.
    Unconfirmed,
    /// One that this instance has fetched from upstream, which confirmed it last at this time.
    Fetched { confirmed_at: Instant },
    /// One that a leader has shared.
    Shared(DocumentHead),
}

impl ServedDocument {
    /// Whether `candidate` is newer, or replaces nothing.
    pub(super) fn is_superseded_by(&self, candidate: &DocumentHead) -> bool {
        match self {
            Self::Nothing => true,
            Self::Unconfirmed => candidate.confirmed_at.is_some(),
            Self::Fetched { confirmed_at } => candidate.confirmed_at >= Some(*confirmed_at),
            Self::Shared(served) if served.version.fence == candidate.version.fence => {
                served.version < candidate.version
            }
            Self::Shared(served) => {
                served.version < candidate.version && served.confirmed_at <= candidate.confirmed_at
            }
        }
    }

    /// The version, if a leader has shared it.
    pub(super) fn version(&self) -> Option<Version> {
        match self {
            Self::Shared(head) => Some(head.version),
            Self::Nothing | Self::Unconfirmed | Self::Fetched { .. } => None,
        }
    }

    /// When upstream confirmed it last.
    pub(super) fn confirmed_at(&self) -> Option<Instant> {
        match self {
            Self::Nothing | Self::Unconfirmed => None,
            Self::Fetched { confirmed_at } => Some(*confirmed_at),
            Self::Shared(head) => head.confirmed_at,
        }
    }
}

/// A document as it is stored in Redis.
#[derive(Clone, Debug)]
pub(super) struct EncodedDocument {
    pub(super) digest: DocumentDigest,
    /// Compressed by Zstandard.
    pub(super) compressed: Vec<u8>,
}

impl EncodedDocument {
    /// Compresses a document.
    pub(super) fn encode(body: &[u8]) -> Result<Self, EncodeError> {
        if body.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(EncodeError::TooLarge);
        }
        let compressed =
            zstd::bulk::compress(body, COMPRESSION_LEVEL).map_err(EncodeError::Compression)?;
        Ok(Self { digest: DocumentDigest::of(body), compressed })
    }

    /// Decompresses a document, and compares it with its digest.
    pub(super) fn decode(&self) -> Result<Bytes, DecodeError> {
        let decoder = zstd::Decoder::new(&*self.compressed).map_err(DecodeError::Compression)?;
        let mut body = Vec::new();
        decoder
            .take(MAX_DOCUMENT_BYTES + 1)
            .read_to_end(&mut body)
            .map_err(DecodeError::Compression)?;
        if body.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(DecodeError::TooLarge);
        }
        if DocumentDigest::of(&body) != self.digest {
            return Err(DecodeError::Digest);
        }
        Ok(body.into())
    }
}

/// Why a document cannot be shared.
#[derive(Debug, thiserror::Error)]
pub(super) enum EncodeError {
    #[error("it is larger than {MAX_DOCUMENT_BYTES} bytes")]
    TooLarge,
    #[error("it cannot be compressed")]
    Compression(#[source] std::io::Error),
}

/// Why a shared document cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum DecodeError {
    #[error("it is larger than {MAX_DOCUMENT_BYTES} bytes")]
    TooLarge,
    #[error("it cannot be decompressed")]
    Compression(#[source] std::io::Error),
    #[error("it does not match its digest")]
    Digest,
}

/// The time of a confirmation that is `age` old according to a reply to a request sent at `sent_at`.
/// `None` if that is before the machine started.
pub(super) fn confirmed_at(sent_at: Instant, age: Duration) -> Option<Instant> {
    sent_at.checked_sub(age)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(fence: u64, sequence: u64, confirmed_at: Option<Instant>) -> DocumentHead {
        let version = Version { fence: Fence::new(fence), sequence };
        DocumentHead { version, digest: DocumentDigest::of(b""), confirmed_at }
    }

    #[test]
    fn documents_of_one_leader_are_ordered_by_sequence() {
        let (early, late) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        let served = ServedDocument::Shared(head(2, 5, Some(late)));
        assert!(served.is_superseded_by(&head(2, 6, Some(early))));
        for sequence in [4, 5] {
            assert!(!served.is_superseded_by(&head(2, sequence, Some(late))));
        }
    }

    #[test]
    fn documents_of_different_leaders_are_ordered_by_confirmation() {
        let (early, late) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        let served = ServedDocument::Shared(head(2, 5, Some(late)));
        assert!(served.is_superseded_by(&head(3, 1, Some(late))));
        assert!(!served.is_superseded_by(&head(3, 1, Some(early))));
        assert!(!served.is_superseded_by(&head(3, 1, None)));
        assert!(!served.is_superseded_by(&head(1, 9, Some(late))), "a leader of the past");
    }

    #[test]
    fn fetched_document_is_replaced_only_by_one_confirmed_later() {
        let (early, late) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        let served = ServedDocument::Fetched { confirmed_at: late };
        assert!(served.is_superseded_by(&head(1, 1, Some(late))));
        assert!(!served.is_superseded_by(&head(9, 9, Some(early))));
        assert!(!served.is_superseded_by(&head(9, 9, None)));
    }

    #[test]
    fn unconfirmed_document_is_replaced_only_by_a_confirmed_one() {
        assert!(ServedDocument::Unconfirmed.is_superseded_by(&head(1, 1, Some(Instant::now()))));
        assert!(!ServedDocument::Unconfirmed.is_superseded_by(&head(1, 1, None)));
        assert!(ServedDocument::Nothing.is_superseded_by(&head(1, 1, None)));
    }

    #[test]
    fn damaged_document_is_not_decoded() {
        let body = vec![b'x'; 10_000];
        let encoded = EncodedDocument::encode(&body).expect("small");
        assert!(encoded.compressed.len() < 100);
        assert_eq!(encoded.decode().expect("sound"), body);
        let other = EncodedDocument { digest: DocumentDigest::of(b"other"), ..encoded.clone() };
        assert!(matches!(other.decode(), Err(DecodeError::Digest)));
        let cut = encoded.compressed[..encoded.compressed.len() - 1].to_vec();
        let cut = EncodedDocument { compressed: cut, ..encoded };
        assert!(matches!(cut.decode(), Err(DecodeError::Compression(_))));
    }
}
