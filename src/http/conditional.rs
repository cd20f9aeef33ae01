//! Conditional requests: matches `If-None-Match` against strong entity tags (RFC 9110, 8.8.3 and
//! 13.1.2).

use hyper::header::{HeaderMap, HeaderValue, IF_NONE_MATCH};

/// Whether one of the request's `If-None-Match` headers lists `etag` or is `*`.
///
/// `etag` is a strong tag, quoted. The comparison is weak, as the RFC requires for this header, so a tag
/// that a proxy weakened still matches. All codings of a body share the opaque part: the suffix after
/// the dash names the coding and is ignored here. Text that is not an entity tag matches nothing.
pub fn if_none_match_matches(headers: &HeaderMap, etag: &HeaderValue) -> bool {
    let opaque = etag.as_bytes();
    let opaque = opaque.get(1..opaque.len().saturating_sub(1)).unwrap_or_default();
    let names = |value: &str| value.trim() == "*" || list_matches(value, opaque);
    // Fast path: clients usually send the tag back unchanged.
    headers
        .get_all(IF_NONE_MATCH)
        .iter()
        .any(|value| value == etag || value.to_str().is_ok_and(names))
}

fn list_matches(mut list: &str, opaque: &[u8]) -> bool {
    loop {
        list = list.trim_start_matches([' ', '\t', ',']);
        let tag = list.strip_prefix("W/").unwrap_or(list);
        let Some((candidate, rest)) = tag.strip_prefix('"').and_then(|tag| tag.split_once('"'))
        else {
            return false;
        };
        if let Some(coding) = candidate.as_bytes().strip_prefix(opaque)
            && (coding.is_empty() || coding.starts_with(b"-"))
        {
            return true;
        }
        list = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(values: &[&'static str], expect: bool) {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(IF_NONE_MATCH, HeaderValue::from_static(value));
        }
        assert_eq!(
            if_none_match_matches(&headers, &HeaderValue::from_static("\"abc\"")),
            expect,
            "{values:?}"
        );
    }

    #[test]
    fn equal_weak_and_listed_tags_and_star_match() {
        check(&["\"abc\""], true);
        check(&["W/\"abc\""], true);
        check(&["\"x\", W/\"y\" ,\"abc\""], true);
        check(&["\"x\"", "\"abc-gzip\""], true);
        check(&["\"a,b\", \"abc\""], true);
        check(&[" * "], true);
    }

    #[test]
    fn other_and_malformed_tags_do_not_match() {
        for values in [&[][..], &["\"abcd\""], &["abc"], &["\"abc"], &["w/\"abc\""], &[""], &[",,"]]
        {
            check(values, false);
        }
    }
}
