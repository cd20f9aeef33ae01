//! Negotiates the content coding of a response by `Accept-Encoding` (RFC 9110, 12.5.3).

use hyper::header::{ACCEPT_ENCODING, HeaderMap};

use crate::snapshot::prepared_body::ContentCoding;

/// The offered coding with the client's highest weight; between equal weights, the one that makes JSON
/// smallest.
///
/// Returns identity if nothing offered is acceptable, as the RFC permits; there is no 406.
pub fn negotiate(headers: &HeaderMap, is_offered: impl Fn(ContentCoding) -> bool) -> ContentCoding {
    let mut named: [Option<u16>; ContentCoding::ALL.len()] = Default::default();
    let mut others = None;
    for value in headers.get_all(ACCEPT_ENCODING) {
        let Ok(value) = value.to_str() else { continue };
        for item in value.split(',') {
            let (name, weight) = parse_weighted(item);
            let place = match name {
                "*" => &mut others,
                name => match parse_coding(name) {
                    Some(coding) => &mut named[coding as usize],
                    None => continue,
                },
            };
            *place = (*place).max(Some(weight));
        }
    }
    // `*` covers the codings that are not listed.
    let weight = |coding: ContentCoding| named[coding as usize].or(others).unwrap_or(0);
    let offered = ContentCoding::ALL.into_iter().filter(|coding| is_offered(*coding));
    let accepted = offered.filter(|coding| weight(*coding) > 0);
    accepted.max_by_key(|coding| (weight(*coding), *coding)).unwrap_or(ContentCoding::Identity)
}

fn parse_coding(name: &str) -> Option<ContentCoding> {
    let is = |other| name.eq_ignore_ascii_case(other);
    match () {
        () if is("br") => Some(ContentCoding::Brotli),
        () if is("zstd") => Some(ContentCoding::Zstd),
        () if is("gzip") || is("x-gzip") => Some(ContentCoding::Gzip),
        () if is("identity") => Some(ContentCoding::Identity),
        () => None,
    }
}

/// Splits a list item into the coding's name and its weight in thousandths.
fn parse_weighted(item: &str) -> (&str, u16) {
    let (name, parameters) = item.split_once(';').unwrap_or((item, ""));
    let weight = parameters.split(';').find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("q").then_some(value.trim())
    });
    let weight = match weight.map(str::parse::<f32>) {
        None => 1000,
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped to 0 to 1000 just before"
        )]
        Some(Ok(weight)) => (weight.clamp(0.0, 1.0) * 1000.0) as u16,
        Some(Err(_)) => 0,
    };
    (name.trim(), weight)
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    #[track_caller]
    fn check(value: &'static str, expect: ContentCoding) {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static(value));
        assert_eq!(negotiate(&headers, |_| true), expect, "{value}");
    }

    #[test]
    fn highest_weight_wins_then_smallest_body() {
        check("gzip", ContentCoding::Gzip);
        check("gzip, deflate, br", ContentCoding::Brotli);
        check("gzip;q=1.0, br;q=0.5", ContentCoding::Gzip);
        check("gzip, zstd", ContentCoding::Zstd);
        check("*", ContentCoding::Brotli);
        check("br;q=0, gzip;q=0.1", ContentCoding::Gzip);
        check("identity, gzip;q=0.5", ContentCoding::Identity);
        check("br; foo=1 ; Q=0, gzip;q=0.1", ContentCoding::Gzip);
    }

    #[test]
    fn star_covers_codings_that_are_not_listed() {
        check("br;q=0, *", ContentCoding::Zstd);
        check("*, br;q=0", ContentCoding::Zstd);
        check("*;q=0.5, br;q=0", ContentCoding::Zstd);
        check("*;q=0.5, gzip", ContentCoding::Gzip);
        check("gzip;q=0, zstd;q=0, br;q=0, *", ContentCoding::Identity);
        check("*;q=0", ContentCoding::Identity);
    }

    #[test]
    fn identity_is_used_when_no_offered_coding_is_acceptable() {
        assert_eq!(negotiate(&HeaderMap::new(), |_| true), ContentCoding::Identity);
        check("deflate", ContentCoding::Identity);
        check("gzip;q=nonsense", ContentCoding::Identity);
        check("", ContentCoding::Identity);
    }
}
