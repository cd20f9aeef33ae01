//! The headers by which callers of the admin API present themselves: tokens and cookies.
//!
//! Nothing is validated here; `authentication` does that.

use hyper::{
    HeaderMap,
    header::{COOKIE, HeaderName, HeaderValue},
};

/// The session cookie on an unencrypted connection.
pub(super) const SESSION_COOKIE: &str = "parapet-session";

/// The session cookie on an encrypted connection. Because of the prefix, browsers accept it only from
/// this host and over encrypted connections, so that no sibling domain can plant one.
pub(super) const SECURE_SESSION_COOKIE: &str = "__Host-parapet-session";

/// The cookie of a browser from which a user has signed in before.
pub(super) const DEVICE_COOKIE: &str = "parapet-device";

/// The header that marks a background request of the console, made without a user's action.
pub(super) const BACKGROUND_HEADER: HeaderName = HeaderName::from_static("parapet-background");

/// The token of a request. Basic credentials are not a token: browsers send them with every request to a
/// proxy in front of Parapet that requires them.
pub(super) fn presented_token<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> Option<&'a HeaderValue> {
    let is_basic = |value: &HeaderValue| {
        let scheme = value.as_bytes().split(|byte| *byte == b' ').next();
        scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"basic"))
    };
    headers.get(name).filter(|value| !is_basic(value))
}

/// Whether the browser's connection is encrypted: this listener uses TLS (`is_tls`), or the headers of a
/// proxy in front of Parapet indicate it.
///
/// The headers are not verified. A client that forges them affects only its own cookie.
pub(super) fn is_encrypted(headers: &HeaderMap, is_tls: bool) -> bool {
    let text = |name| headers.get(name).and_then(|it| it.to_str().ok()).unwrap_or_default();
    // Values may be quoted (RFC 7239, section 4).
    let forwarded = text("forwarded").to_ascii_lowercase().replace('"', "");
    is_tls
        || text("x-forwarded-proto").eq_ignore_ascii_case("https")
        || forwarded.contains("proto=https")
        || text("origin").starts_with("https://")
}

/// The value of the session cookie. On an encrypted connection the cookie without prefix is ignored,
/// because a sibling domain may have planted it.
pub(super) fn session_cookie(headers: &HeaderMap, is_tls: bool) -> Option<&str> {
    let unencrypted = || cookie(headers, SESSION_COOKIE).filter(|_| !is_encrypted(headers, is_tls));
    cookie(headers, SECURE_SESSION_COOKIE).or_else(unencrypted)
}

/// The value of a cookie.
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let cookies = headers.get_all(COOKIE).into_iter().filter_map(|value| value.to_str().ok());
    let mut pairs = cookies.flat_map(|cookies| cookies.split(';')).map(str::trim);
    pairs.find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

/// Headers for the tests of this module and its siblings.
#[cfg(test)]
pub(super) fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    let pair = |(name, value): &(&'static str, &str)| {
        (HeaderName::from_static(name), value.parse().expect("a header"))
    };
    pairs.iter().map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_credentials_are_not_a_token() {
        let name = HeaderName::from_static("authorization");
        for (value, is_token) in
            [("Basic YTpi", false), ("basic x", false), ("Bearer a", true), ("*:*.basic", true)]
        {
            let headers = headers(&[("authorization", value)]);
            assert_eq!(presented_token(&headers, &name).is_some(), is_token, "{value}");
        }
    }

    #[test]
    fn cookie_is_found_among_others_by_its_full_name() {
        let headers = headers(&[("cookie", "a=1; parapet-session=x=y;b=2"), ("cookie", "c=3")]);
        assert_eq!(cookie(&headers, SESSION_COOKIE), Some("x=y"));
        assert_eq!(cookie(&headers, "b"), Some("2"));
        assert_eq!(cookie(&headers, "session"), None);
        assert_eq!(cookie(&headers, "parapet"), None);
    }

    #[test]
    fn unprefixed_session_cookie_is_ignored_over_an_encrypted_connection() {
        let both = ("cookie", "parapet-session=planted; __Host-parapet-session=own");
        assert_eq!(session_cookie(&headers(&[both]), false), Some("own"));
        assert_eq!(session_cookie(&headers(&[both]), true), Some("own"));
        let planted = ("cookie", "parapet-session=planted");
        assert_eq!(session_cookie(&headers(&[planted]), false), Some("planted"));
        assert_eq!(session_cookie(&headers(&[planted]), true), None);
        for encrypted in [
            ("x-forwarded-proto", "https"),
            ("forwarded", "for=192.0.2.7;proto=https"),
            ("origin", "https://flags.example"),
        ] {
            let cookie = |pairs: &[_]| session_cookie(&headers(pairs), false).map(str::to_owned);
            assert_eq!(cookie(&[planted, encrypted]), None, "{encrypted:?}");
            assert_eq!(cookie(&[both, encrypted]).as_deref(), Some("own"), "{encrypted:?}");
        }
    }
}
