//! Reads request bodies: complete, within a size limit and a timeout, and decompressed.
//!
//! This module does not parse them; `protocol` does.

use std::{
    io::Read,
    time::{Duration, Instant},
};

use bytes::{Buf as _, Bytes};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::{
    HeaderMap,
    body::{Body as _, Incoming},
    header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderValue},
};

use super::{cpu_bound, response::HttpError};
use crate::protocol::byte_order_mark::without_byte_order_mark;

/// A request body that has not been read, with the request's timeout. The time to receive the body
/// counts towards that timeout.
#[derive(Debug)]
pub struct RequestBody {
    /// `None` once it is read.
    body: Option<Incoming>,
    started: Instant,
    timeout: Duration,
}

/// The most that is read of an unused body, in bytes.
const MAX_DISCARDED_BYTES: usize = 64 << 10;
/// The longest time to read an unused body.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(1);

impl RequestBody {
    /// The body of a request whose head arrived at `started`.
    pub fn new(body: Incoming, started: Instant, timeout: Duration) -> Self {
        Self { body: Some(body), started, timeout }
    }

    /// Reads the whole body, JSON of at most `limit` bytes, within the timeout. A second call returns
    /// nothing.
    pub async fn read(&mut self, headers: &HeaderMap, limit: usize) -> Result<Bytes, HttpError> {
        let Some(body) = self.body.take() else { return Ok(Bytes::new()) };
        let body = read_json(headers, body, limit);
        let body = tokio::time::timeout_at((self.started + self.timeout).into(), body).await;
        body.unwrap_or(Err(HttpError::RequestTimeout(self.timeout)))
    }

    /// Discards the rest of an unread body, within limits. If a request is answered before its body has
    /// arrived, the connection closes, and a client that is still sending may lose the response.
    pub async fn discard(self) {
        let Some(body) = self.body.filter(|body| !body.is_end_stream()) else { return };
        let rest = Limited::new(body, MAX_DISCARDED_BYTES).collect();
        let _ = tokio::time::timeout(DISCARD_TIMEOUT, rest).await;
    }
}

/// Reads a JSON body of at most `limit` bytes, both before and after decompression.
///
/// A missing content type counts as JSON; any other type is rejected. Dropping the future drops the
/// bytes read so far.
async fn read_json(headers: &HeaderMap, body: Incoming, limit: usize) -> Result<Bytes, HttpError> {
    if headers.get(CONTENT_TYPE).is_some_and(|value| !is_json(value.as_bytes())) {
        return Err(HttpError::UnsupportedMediaType);
    }
    let bytes = match Limited::new(body, limit).collect().await {
        Err(error) if error.is::<LengthLimitError>() => return Err(HttpError::BodyTooLarge(limit)),
        Err(_) => return Err(HttpError::Malformed("the body broke off".to_owned())),
        Ok(collected) => collected.to_bytes(),
    };
    let coding = headers.get(CONTENT_ENCODING).map_or(&b""[..], HeaderValue::as_bytes);
    // The decompressed size is not known in advance: a small one is handled inline, a large one
    // elsewhere.
    let mut json = match decompress(coding, bytes.clone(), limit.min(cpu_bound::MAX_INLINE_BYTES)) {
        Err(HttpError::BodyTooLarge(short)) if short < limit => {
            cpu_bound::run(limit, || decompress(coding, bytes, limit)).await?
        }
        json => json?,
    };
    json.advance(json.len() - without_byte_order_mark(&json).len());
    Ok(json)
}

fn is_json(content_type: &[u8]) -> bool {
    let media = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    media.eq_ignore_ascii_case(b"application/json")
        || (media.len() > 5 && media[media.len() - 5..].eq_ignore_ascii_case(b"+json"))
}

fn decompress(coding: &[u8], bytes: Bytes, limit: usize) -> Result<Bytes, HttpError> {
    let compressed = &*bytes;
    let decoder: Box<dyn Read + '_> = match coding.trim_ascii().to_ascii_lowercase().as_slice() {
        b"" | b"identity" => return Ok(bytes),
        b"gzip" | b"x-gzip" => Box::new(flate2::read::MultiGzDecoder::new(compressed)),
        b"deflate" => Box::new(flate2::read::ZlibDecoder::new(compressed)),
        b"br" => Box::new(brotli::Decompressor::new(compressed, 4096)),
        b"zstd" => match zstd::Decoder::new(compressed) {
            Ok(decoder) => Box::new(decoder),
            Err(_) => return Err(invalid_compression()),
        },
        _ => {
            return Err(HttpError::Malformed(
                "content-encoding must be gzip, deflate, br or zstd".to_owned(),
            ));
        }
    };
    let mut plain = Vec::new();
    let room = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    decoder.take(room).read_to_end(&mut plain).map_err(|_| invalid_compression())?;
    if plain.len() > limit {
        return Err(HttpError::BodyTooLarge(limit));
    }
    Ok(plain.into())
}

fn invalid_compression() -> HttpError {
    HttpError::Malformed("the body is not compressed as content-encoding says".to_owned())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn gzip(text: &[u8]) -> Bytes {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap().into()
    }

    #[test]
    fn compressed_bodies_are_decompressed_within_the_limit() {
        assert_eq!(decompress(b"GZIP", gzip(b"{}"), 10).unwrap(), "{}");
        let zstd = Bytes::from(zstd::bulk::compress(b"{}", 1).unwrap());
        assert_eq!(decompress(b"zstd", zstd, 10).unwrap(), "{}");
        let bomb = gzip(&vec![b' '; 1_000_000]);
        assert!(bomb.len() < 10_000);
        assert!(matches!(decompress(b"gzip", bomb, 10_000), Err(HttpError::BodyTooLarge(10_000))));
        let plain = Bytes::from_static(b"{}");
        assert!(matches!(decompress(b"gzip", plain.clone(), 10), Err(HttpError::Malformed(_))));
        assert!(matches!(decompress(b"snappy", plain, 10), Err(HttpError::Malformed(_))));
    }

    #[test]
    fn json_is_recognised_by_its_media_type() {
        for yes in ["application/json", "Application/JSON; charset=utf-8", "application/ld+json"] {
            assert!(is_json(yes.as_bytes()), "{yes}");
        }
        for no in ["text/plain", "application/x-www-form-urlencoded", "", "json"] {
            assert!(!is_json(no.as_bytes()), "{no}");
        }
    }
}
