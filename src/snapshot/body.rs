//! A prepared response body: its bytes in each content coding, with their entity tags.
//!
//! Most bodies are built once and shared by every response that sends them; some are for one response.
//! A body is compressed on first use of a coding. The caller chooses the thread that compresses.

use std::sync::OnceLock;

use bytes::Bytes;
use hyper::header::HeaderValue;
use xxhash_rust::xxh3::xxh3_128;

/// Smaller bodies are not compressed: below this many bytes compression costs more than it saves.
const WORTH_COMPRESSING: usize = 1024;

/// Bodies for one response up to this many bytes are compressed on the thread that handles the request.
const QUICKLY_COMPRESSED: usize = 64 << 10;

/// A content coding. They are ordered by how well they compress the JSON that is served here.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Coding {
    /// No compression.
    Identity,
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
    /// RFC 7932.
    Brotli,
}

impl Coding {
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
pub enum Audience {
    /// Probably for one response: fast compression levels.
    One,
    /// For many responses: the highest levels that still make a difference.
    Many,
}

/// The bytes in one content coding, and the strong entity tag of exactly these bytes.
#[derive(Clone, Debug)]
pub struct Coded {
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
pub struct Body {
    audience: Audience,
    identity: Coded,
    gzip: OnceLock<Coded>,
    zstd: OnceLock<Coded>,
    brotli: OnceLock<Coded>,
}

impl Body {
    /// The body of these bytes, tagged by their XXH3 hash.
    pub fn new(bytes: Bytes) -> Self {
        let hash = xxh3_128(&bytes);
        Self::tagged(bytes, hash)
    }

    /// The body of these bytes, tagged by a hash that identifies them.
    pub fn tagged(bytes: Bytes, hash: u128) -> Self {
        let identity = Coded { bytes, etag: etag_of(hash) };
        let (gzip, zstd, brotli) = Default::default();
        Self { audience: Audience::Many, identity, gzip, zstd, brotli }
    }

    /// The same body for another [`Reuse`].
    #[must_use]
    pub fn for_audience(self, audience: Audience) -> Self {
        Self { audience, ..self }
    }

    /// Whether a coding may be used. Brotli is not used for a single response: it takes longer than it
    /// saves.
    pub fn offers(&self, coding: Coding) -> bool {
        self.audience == Audience::Many || coding != Coding::Brotli
    }

    /// Whether compressing takes some hundred microseconds at most.
    pub fn is_quick(&self) -> bool {
        self.audience == Audience::One && self.identity.bytes.len() <= QUICKLY_COMPRESSED
    }

    /// The entity tag of the uncoded bytes; those of the codings add a suffix to its opaque part.
    pub fn etag(&self) -> &HeaderValue {
        &self.identity.etag
    }

    /// The coding to send when a client prefers `coding`: identity for small bodies.
    pub fn effective(&self, coding: Coding) -> Coding {
        if self.identity.bytes.len() < WORTH_COMPRESSING { Coding::Identity } else { coding }
    }

    /// The bytes in `coding`, if they exist already.
    pub fn ready(&self, coding: Coding) -> Option<&Coded> {
        match self.slot(coding) {
            None => Some(&self.identity),
            Some(slot) => slot.get(),
        }
    }

    /// The bytes in `coding`, compressed on first use, which takes milliseconds for a large body.
    pub fn make(&self, coding: Coding) -> &Coded {
        match self.slot(coding) {
            None => &self.identity,
            Some(slot) => slot.get_or_init(|| Coded {
                bytes: compress(&self.identity.bytes, coding, self.audience),
                etag: suffixed(&self.identity.etag, coding, self.audience),
            }),
        }
    }

    /// The maximum memory of the body with all its codings, in bytes.
    ///
    /// Caches weigh a body once, before it is compressed, so its codings are counted from the start: all
    /// together as much as the uncoded bytes. The JSON of flags takes less than a third of its size in
    /// each coding.
    pub fn weight(&self) -> usize {
        let plain = self.identity.bytes.len();
        let compressed = if plain < WORTH_COMPRESSING { 0 } else { plain };
        size_of::<Self>() + plain + compressed
    }

    fn slot(&self, coding: Coding) -> Option<&OnceLock<Coded>> {
        match coding {
            Coding::Identity => None,
            Coding::Gzip => Some(&self.gzip),
            Coding::Zstd => Some(&self.zstd),
            Coding::Brotli => Some(&self.brotli),
        }
    }
}

/// The entity tag of uncoded bytes that `hash` identifies: 32 hexadecimal digits in quotes.
pub fn etag_of(hash: u128) -> HeaderValue {
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
fn suffixed(etag: &HeaderValue, coding: Coding, audience: Audience) -> HeaderValue {
    let etag = etag.to_str().expect("etag_of makes visible ASCII").trim_end_matches('"');
    let level = match audience {
        Audience::One => ".1",
        Audience::Many => "",
    };
    let etag = format!("{etag}-{}{level}\"", coding.name().unwrap_or("identity"));
    HeaderValue::try_from(etag).expect("a coding's name is visible ASCII")
}

fn compress(bytes: &[u8], coding: Coding, audience: Audience) -> Bytes {
    use std::io::Write as _;
    const TO_MEMORY: &str = "writing to memory cannot fail";
    let (gzip, zstd, brotli) = match audience {
        Audience::One => (1, 1, 1),
        Audience::Many => (6, 9, 5),
    };
    let compressed = match coding {
        Coding::Identity => bytes.to_vec(),
        Coding::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(gzip));
            encoder.write_all(bytes).expect(TO_MEMORY);
            encoder.finish().expect(TO_MEMORY)
        }
        Coding::Zstd => zstd::bulk::compress(bytes, zstd).expect(TO_MEMORY),
        Coding::Brotli => {
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

    fn decoded(coded: &Coded, coding: Coding) -> Vec<u8> {
        let mut bytes = Vec::new();
        match coding {
            Coding::Identity => bytes.extend_from_slice(&coded.bytes),
            Coding::Gzip => {
                flate2::read::GzDecoder::new(&*coded.bytes).read_to_end(&mut bytes).unwrap();
            }
            Coding::Zstd => bytes = zstd::decode_all(&*coded.bytes).unwrap(),
            Coding::Brotli => {
                brotli::BrotliDecompress(&mut &*coded.bytes, &mut bytes).unwrap();
            }
        }
        bytes
    }

    #[test]
    fn every_coding_decodes_to_the_content_and_has_its_own_tag() {
        let content = Bytes::from("{\"name\":\"flag\"},".repeat(500));
        let body = Body::new(content.clone());
        let mut tags = std::collections::HashSet::new();
        for coding in [Coding::Identity, Coding::Gzip, Coding::Zstd, Coding::Brotli] {
            assert_eq!(body.effective(coding), coding);
            let coded = body.make(coding);
            assert_eq!(decoded(coded, coding), content, "{coding:?}");
            assert!(tags.insert(coded.etag.clone()), "{coding:?}");
            assert!(body.ready(coding).is_some());
        }
        let sizes = [Coding::Identity, Coding::Gzip, Coding::Zstd, Coding::Brotli]
            .map(|coding| body.make(coding).bytes.len());
        let weight = Body::new(content).weight();
        assert!(sizes.iter().sum::<usize>() <= weight, "weighed before it is compressed");
    }

    #[test]
    fn body_for_one_response_has_other_bytes_under_other_tags() {
        let content = Bytes::from("{\"name\":\"flag\"},".repeat(500));
        let [one, many] = [Audience::One, Audience::Many]
            .map(|audience| Body::new(content.clone()).for_audience(audience));
        assert_eq!(one.etag(), many.etag());
        for coding in [Coding::Gzip, Coding::Zstd] {
            assert!(one.offers(coding) && many.offers(coding));
            assert_eq!(decoded(one.make(coding), coding), content);
            assert_ne!(one.make(coding).etag, many.make(coding).etag);
        }
        assert!(many.offers(Coding::Brotli) && !one.offers(Coding::Brotli));
        assert!(one.is_quick() && !many.is_quick());
        let large = Body::new(Bytes::from(vec![b'x'; QUICKLY_COMPRESSED + 1]));
        assert!(!large.for_audience(Audience::One).is_quick());
    }

    #[test]
    fn tags_are_equal_if_and_only_if_content_is_equal() {
        let tag =
            |text: &'static str| Body::new(Bytes::from_static(text.as_bytes())).etag().clone();
        assert_eq!(tag("a"), tag("a"));
        assert_ne!(tag("a"), tag("b"));
    }

    #[test]
    fn etag_is_the_hash_in_hexadecimal_digits() {
        for hash in [0, 1, u128::MAX, 0x0123_4567_89ab_cdef_0011_2233_4455_6677] {
            assert_eq!(etag_of(hash).to_str().unwrap(), format!("\"{hash:032x}\""));
        }
    }

    #[test]
    fn small_bodies_are_not_compressed() {
        assert_eq!(Body::new(Bytes::from_static(b"{}")).effective(Coding::Gzip), Coding::Identity);
    }
}
