//! A ready-made response body: its bytes in each content coding, with their entity tags.
//!
//! Most bodies are built once and shared by every response that sends them; some are for one response.
//! Compressing happens on the first wish for a coding; this module does not decide who compresses when.

use std::sync::OnceLock;

use bytes::Bytes;
use hyper::header::HeaderValue;
use xxhash_rust::xxh3::xxh3_128;

/// Below this many bytes compressing costs more than it saves on the wire.
const WORTH_COMPRESSING: usize = 1024;

/// Up to so many bytes are compressed for one response without leaving the thread that answers.
const QUICKLY_COMPRESSED: usize = 64 << 10;

/// How a body is coded on the wire; a greater one makes the JSON that is served here smaller.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Coding {
    /// As it is.
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

/// For how many responses a body is, which decides how much work compressing it is worth.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Audience {
    /// Probably one: as little work as makes the body much smaller.
    One,
    /// Many: as much work as still makes a difference.
    Many,
}

/// Bytes as they go out, and the strong entity tag of exactly these bytes.
#[derive(Clone, Debug)]
pub struct Coded {
    /// The bytes.
    pub bytes: Bytes,
    /// The entity tag, quoted.
    pub etag: HeaderValue,
}

/// A body in all its codings.
///
/// Its tags share one opaque part, a hash of the content, so that equal content has equal tags on
/// every instance and across restarts. Its maker may leave out of the hash what says nothing of the flags
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

    /// The body of these bytes, tagged by a hash that its maker knows to identify them.
    pub fn tagged(bytes: Bytes, hash: u128) -> Self {
        let identity = Coded { bytes, etag: etag_of(hash) };
        let (gzip, zstd, brotli) = Default::default();
        Self { audience: Audience::Many, identity, gzip, zstd, brotli }
    }

    /// The same body for another audience.
    #[must_use]
    pub fn for_audience(self, audience: Audience) -> Self {
        Self { audience, ..self }
    }

    /// Whether a coding may be used. For one response Brotli takes longer than it saves.
    pub fn offers(&self, coding: Coding) -> bool {
        self.audience == Audience::Many || coding != Coding::Brotli
    }

    /// Whether making a coding is a matter of some hundred microseconds at most.
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

    /// The bytes in `coding`, if they have been made.
    pub fn ready(&self, coding: Coding) -> Option<&Coded> {
        match self.slot(coding) {
            None => Some(&self.identity),
            Some(slot) => slot.get(),
        }
    }

    /// The bytes in `coding`, compressed now unless they have been before: milliseconds of work for
    /// a large body.
    pub fn make(&self, coding: Coding) -> &Coded {
        match self.slot(coding) {
            None => &self.identity,
            Some(slot) => slot.get_or_init(|| Coded {
                bytes: compress(&self.identity.bytes, coding, self.audience),
                etag: suffixed(&self.identity.etag, coding, self.audience),
            }),
        }
    }

    /// The memory that the body may come to hold, in bytes.
    ///
    /// Caches weigh a body before it is compressed and never again, so that its codings are counted
    /// from the start: all together as much as the uncoded bytes. Flags' JSON takes less than a
    /// third of that in each.
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
    // Each answer that is asked for again has its tag written, which formatting takes long for.
    for (pair, byte) in etag[1..33].chunks_exact_mut(2).zip(hash.to_be_bytes()) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
    HeaderValue::from_bytes(&etag).expect("hexadecimal digits are visible ASCII")
}

/// The tag of other bytes than the uncoded ones, and others again for another audience.
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
    // Encoders take room for the worst, which would stay taken.
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
    fn every_coding_gives_the_content_back_under_a_tag_of_its_own() {
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
        let held = [Coding::Identity, Coding::Gzip, Coding::Zstd, Coding::Brotli]
            .map(|coding| body.make(coding).bytes.len());
        let weight = Body::new(content).weight();
        assert!(held.iter().sum::<usize>() <= weight, "weighed before it is compressed");
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
    fn equal_content_has_equal_tags_and_other_content_has_others() {
        let tag =
            |text: &'static str| Body::new(Bytes::from_static(text.as_bytes())).etag().clone();
        assert_eq!(tag("a"), tag("a"));
        assert_ne!(tag("a"), tag("b"));
    }

    #[test]
    fn a_tag_is_the_hash_in_hexadecimal_digits() {
        for hash in [0, 1, u128::MAX, 0x0123_4567_89ab_cdef_0011_2233_4455_6677] {
            assert_eq!(etag_of(hash).to_str().unwrap(), format!("\"{hash:032x}\""));
        }
    }

    #[test]
    fn small_bodies_go_uncompressed() {
        assert_eq!(Body::new(Bytes::from_static(b"{}")).effective(Coding::Gzip), Coding::Identity);
    }
}
