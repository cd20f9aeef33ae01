//! A prepared response body: its bytes in each content coding, with their entity tags.
//!
//! Most bodies are built once and shared by every response that sends them; some are for one response.
//! A body is compressed on first use of a coding. The caller chooses the thread that compresses.

use std::sync::OnceLock;

use bytes::Bytes;
use hyper::header::HeaderValue;
use xxhash_rust::xxh3::xxh3_128;

/// Smaller bodies are not compressed: below this many bytes compression costs more than it saves.
const MIN_COMPRESSIBLE_BYTES: usize = 1024;

/// Bodies for one response up to this many bytes are compressed on the thread that handles the request.
const MAX_INLINE_COMPRESSION_BYTES: usize = 64 << 10;

/// A content coding. They are ordered by how well they compress the JSON that is served here.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ContentCoding {
    /// No compression.
    Identity,
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
    /// RFC 7932.
    Brotli,
}

impl ContentCoding {
    /// Every coding, in order.
    pub const ALL: [Self; 4] = [Self::Identity, Self::Gzip, Self::Zstd, Self::Brotli];

    /// Every coding that compresses.
    pub const COMPRESSING: [Self; 3] = [Self::Gzip, Self::Zstd, Self::Brotli];

    /// The coding's name in `Content-Encoding`; `None` for identity, which has no header.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::Identity => None,
            Self::Gzip => Some("gzip"),
            Self::Zstd => Some("zstd"),
            Self::Brotli => Some("br"),
        }
    }
}

/// Whether a body is used for many responses, which decides how much work compressing it is worth.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reuse {
    /// Probably for one response: fast compression levels.
    Once,
    /// For many responses: the highest levels that still make a difference.
    Shared,
}

/// The bytes in one content coding, and the strong entity tag of exactly these bytes.
#[derive(Clone, Debug)]
pub struct Representation {
    /// The bytes.
    pub bytes: Bytes,
    /// The entity tag, quoted.
    pub etag: HeaderValue,
}

/// A body in all its codings.
///
/// All tags begin with the same hash of the content, so that equal content has equal tags on every
/// instance and across restarts. The hash may leave out parts that do not describe flags
/// (`meta.revisionId`).
#[derive(Debug)]
pub struct PreparedBody {
    reuse: Reuse,
    identity: Representation,
    gzip: OnceLock<Representation>,
    zstd: OnceLock<Representation>,
    brotli: OnceLock<Representation>,
}

impl PreparedBody {
    /// The body of these bytes, tagged by their XXH3 hash.
    pub fn new(bytes: Bytes) -> Self {
        let hash = xxh3_128(&bytes);
        Self::with_hash(bytes, hash)
    }

    /// The body of these bytes, tagged by a hash that identifies them.
    pub fn with_hash(bytes: Bytes, hash: u128) -> Self {
        let identity = Representation { bytes, etag: etag_from_hash(hash) };
        let (gzip, zstd, brotli) = Default::default();
        Self { reuse: Reuse::Shared, identity, gzip, zstd, brotli }
    }

    /// The same body for another [`Reuse`].
    #[must_use]
    pub fn with_reuse(self, reuse: Reuse) -> Self {
        Self { reuse, ..self }
    }

    /// Whether a coding may be used. Brotli is not used for a single response: it takes longer than it
    /// saves.
    pub fn supports(&self, coding: ContentCoding) -> bool {
        self.reuse == Reuse::Shared || coding != ContentCoding::Brotli
    }

    /// Whether compressing takes some hundred microseconds at most.
    pub fn is_cheap_to_encode(&self) -> bool {
        self.reuse == Reuse::Once && self.identity.bytes.len() <= MAX_INLINE_COMPRESSION_BYTES
    }

    /// The entity tag of the uncoded bytes; those of the codings add a suffix to its opaque part.
    pub fn etag(&self) -> &HeaderValue {
        &self.identity.etag
    }

    /// The coding to send when a client prefers `coding`: identity for small bodies.
    pub fn effective_coding(&self, coding: ContentCoding) -> ContentCoding {
        if self.identity.bytes.len() < MIN_COMPRESSIBLE_BYTES {
            ContentCoding::Identity
        } else {
            coding
        }
    }

    /// The bytes in `coding`, if they exist already.
    pub fn encoded(&self, coding: ContentCoding) -> Option<&Representation> {
        match self.slot(coding) {
            None => Some(&self.identity),
            Some(slot) => slot.get(),
        }
    }

    /// The bytes in `coding`, compressed on first use, which takes milliseconds for a large body.
    pub fn get_or_encode(&self, coding: ContentCoding) -> &Representation {
        match self.slot(coding) {
            None => &self.identity,
            Some(slot) => slot.get_or_init(|| Representation {
                bytes: compress(&self.identity.bytes, coding, self.reuse),
                etag: etag_with_suffix(&self.identity.etag, coding, self.reuse),
            }),
        }
    }

    /// The maximum memory of the body with all its codings, in bytes.
    ///
    /// Caches weigh a body once, before it is compressed, so its codings are counted from the start: all
    /// together as much as the uncoded bytes. The JSON of flags takes less than a third of its size in
    /// each coding.
    pub fn max_memory_size(&self) -> usize {
        let plain = self.identity.bytes.len();
        let compressed = if plain < MIN_COMPRESSIBLE_BYTES { 0 } else { plain };
        size_of::<Self>() + plain + compressed
    }

    fn slot(&self, coding: ContentCoding) -> Option<&OnceLock<Representation>> {
        match coding {
            ContentCoding::Identity => None,
            ContentCoding::Gzip => Some(&self.gzip),
            ContentCoding::Zstd => Some(&self.zstd),
            ContentCoding::Brotli => Some(&self.brotli),
        }
    }
}

/// The entity tag of uncoded bytes that `hash` identifies: 32 hexadecimal digits in quotes.
pub fn etag_from_hash(hash: u128) -> HeaderValue {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut etag = [b'"'; 34];
    // Runs for each request, cached or not; `format!` is too slow here.
    for (pair, byte) in etag[1..33].chunks_exact_mut(2).zip(hash.to_be_bytes()) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
    HeaderValue::from_bytes(&etag).expect("hexadecimal digits are visible ASCII")
}

/// The tag of compressed bytes, which differ by coding and level.
fn etag_with_suffix(etag: &HeaderValue, coding: ContentCoding, audience: Reuse) -> HeaderValue {
    let etag = etag.to_str().expect("etag_of makes visible ASCII").trim_end_matches('"');
    let level = match audience {
        Reuse::Once => ".1",
        Reuse::Shared => "",
    };
    let etag = format!("{etag}-{}{level}\"", coding.name().unwrap_or("identity"));
    HeaderValue::try_from(etag).expect("a coding's name is visible ASCII")
}

fn compress(bytes: &[u8], coding: ContentCoding, audience: Reuse) -> Bytes {
    use std::io::Write as _;
    const TO_MEMORY: &str = "writing to memory cannot fail";
    let (gzip, zstd, brotli) = match audience {
        Reuse::Once => (1, 1, 1),
        Reuse::Shared => (6, 9, 5),
    };
    let compressed = match coding {
        ContentCoding::Identity => bytes.to_vec(),
        ContentCoding::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(gzip));
            encoder.write_all(bytes).expect(TO_MEMORY);
            encoder.finish().expect(TO_MEMORY)
        }
        ContentCoding::Zstd => zstd::bulk::compress(bytes, zstd).expect(TO_MEMORY),
        ContentCoding::Brotli => {
            let params = brotli::enc::BrotliEncoderParams { quality: brotli, ..Default::default() };
            let mut compressed = Vec::new();
            brotli::BrotliCompress(&mut &*bytes, &mut compressed, &params).expect(TO_MEMORY);
            compressed
        }
    };
    // Encoders allocate for the worst case; this frees what they did not use.
    compressed.into_boxed_slice().into()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn decoded(coded: &Representation, coding: ContentCoding) -> Vec<u8> {
        let mut bytes = Vec::new();
        match coding {
            ContentCoding::Identity => bytes.extend_from_slice(&coded.bytes),
            ContentCoding::Gzip => {
                flate2::read::GzDecoder::new(&*coded.bytes).read_to_end(&mut bytes).unwrap();
            }
            ContentCoding::Zstd => bytes = zstd::decode_all(&*coded.bytes).unwrap(),
            ContentCoding::Brotli => {
                brotli::BrotliDecompress(&mut &*coded.bytes, &mut bytes).unwrap();
            }
        }
        bytes
    }

    #[test]
    fn every_coding_decodes_to_the_content_and_has_its_own_tag() {
        let content = Bytes::from("{\"name\":\"flag\"},".repeat(500));
        let body = PreparedBody::new(content.clone());
        let mut tags = std::collections::HashSet::new();
        for coding in [
            ContentCoding::Identity,
            ContentCoding::Gzip,
            ContentCoding::Zstd,
            ContentCoding::Brotli,
        ] {
            assert_eq!(body.effective_coding(coding), coding);
            let coded = body.get_or_encode(coding);
            assert_eq!(decoded(coded, coding), content, "{coding:?}");
            assert!(tags.insert(coded.etag.clone()), "{coding:?}");
            assert!(body.encoded(coding).is_some());
        }
        let sizes = [
            ContentCoding::Identity,
            ContentCoding::Gzip,
            ContentCoding::Zstd,
            ContentCoding::Brotli,
        ]
        .map(|coding| body.get_or_encode(coding).bytes.len());
        let weight = PreparedBody::new(content).max_memory_size();
        assert!(sizes.iter().sum::<usize>() <= weight, "weighed before it is compressed");
    }

    #[test]
    fn body_for_one_response_has_other_bytes_under_other_tags() {
        let content = Bytes::from("{\"name\":\"flag\"},".repeat(500));
        let [one, many] = [Reuse::Once, Reuse::Shared]
            .map(|audience| PreparedBody::new(content.clone()).with_reuse(audience));
        assert_eq!(one.etag(), many.etag());
        for coding in [ContentCoding::Gzip, ContentCoding::Zstd] {
            assert!(one.supports(coding) && many.supports(coding));
            assert_eq!(decoded(one.get_or_encode(coding), coding), content);
            assert_ne!(one.get_or_encode(coding).etag, many.get_or_encode(coding).etag);
        }
        assert!(many.supports(ContentCoding::Brotli) && !one.supports(ContentCoding::Brotli));
        assert!(one.is_cheap_to_encode() && !many.is_cheap_to_encode());
        let large = PreparedBody::new(Bytes::from(vec![b'x'; MAX_INLINE_COMPRESSION_BYTES + 1]));
        assert!(!large.with_reuse(Reuse::Once).is_cheap_to_encode());
    }

    #[test]
    fn tags_are_equal_if_and_only_if_content_is_equal() {
        let tag = |text: &'static str| {
            PreparedBody::new(Bytes::from_static(text.as_bytes())).etag().clone()
        };
        assert_eq!(tag("a"), tag("a"));
        assert_ne!(tag("a"), tag("b"));
    }

    #[test]
    fn etag_is_the_hash_in_hexadecimal_digits() {
        for hash in [0, 1, u128::MAX, 0x0123_4567_89ab_cdef_0011_2233_4455_6677] {
            assert_eq!(etag_from_hash(hash).to_str().unwrap(), format!("\"{hash:032x}\""));
        }
    }

    #[test]
    fn small_bodies_are_not_compressed() {
        assert_eq!(
            PreparedBody::new(Bytes::from_static(b"{}")).effective_coding(ContentCoding::Gzip),
            ContentCoding::Identity
        );
    }
}
