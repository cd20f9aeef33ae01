//! Protection against cross-site request forgery.

use hyper::{
    HeaderMap,
    header::{HOST, HeaderName, ORIGIN},
};

/// Browsers send this header to state which site initiated a request. Pages cannot set it.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Whether a page of the same origin initiated the request.
///
/// `Sec-Fetch-Site` takes precedence, because a proxy may rewrite `Host`.
pub(super) fn is_same_origin(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(site) = text(SEC_FETCH_SITE) {
        return site == "same-origin";
    }
    let origin = text(ORIGIN).and_then(|origin| origin.split_once("://"));
    origin.is_some_and(|(_, authority)| {
        text(HOST).is_some_and(|host| host.eq_ignore_ascii_case(authority))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::admin::headers::headers;

    #[test]
    fn only_requests_from_the_same_origin_are_accepted() {
        let check = |pairs: &[(&'static str, &str)], expect| {
            assert_eq!(is_same_origin(&headers(pairs)), expect, "{pairs:?}");
        };
        check(&[("sec-fetch-site", "same-origin")], true);
        check(
            &[("sec-fetch-site", "same-origin"), ("origin", "https://proxy"), ("host", "x")],
            true,
        );
        check(&[("sec-fetch-site", "same-site"), ("origin", "http://a"), ("host", "a")], false);
        check(&[("sec-fetch-site", "cross-site")], false);
        check(&[("sec-fetch-site", "none")], false);
        check(&[("origin", "http://a:3064"), ("host", "a:3064")], true);
        check(&[("origin", "http://a:3065"), ("host", "a:3064")], false);
        check(&[("origin", "http://b"), ("host", "a")], false);
        check(&[("origin", "null"), ("host", "a")], false);
        check(&[("host", "a")], false);
        check(&[], false);
    }
}
