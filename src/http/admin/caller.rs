//! Who is asking, and whether a page of somebody else's made them ask.
//!
//! A caller presents an admin token, or the cookie of a session. What they may do is judged where it
//! is done.

use std::net::IpAddr;

use hyper::{
    HeaderMap,
    header::{COOKIE, HeaderName, HeaderValue},
    http::request::Parts,
};

use super::{origin::is_same_origin, relay::Relay};

use crate::{
    auth::Authenticator,
    control::{Account, Actor, Cause, Control, Operator},
    http::reply::Failure,
    token::{Token, TokenKind},
    wire::person::Person,
};

/// The cookie of a session over an unencrypted connection.
pub(super) const SESSION: &str = "parapet-session";

/// The cookie of a session over an encrypted one. By the prefix browsers take it from this very host
/// alone and over encrypted connections only, so that no page of a neighbouring domain can plant one.
pub(super) const SECURE_SESSION: &str = "__Host-parapet-session";

/// The cookie of a browser from which somebody has signed in before.
pub(super) const DEVICE: &str = "parapet-device";

/// The header by which a page says that nobody made it ask.
pub(super) const BACKGROUND: HeaderName = HeaderName::from_static("parapet-background");

/// Who is asking.
#[derive(Debug)]
pub(super) struct Caller {
    /// In the control plane's words.
    pub(super) actor: Actor,
    /// The account, where it is one.
    pub(super) account: Option<Account>,
}

/// What knows callers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gate<'a> {
    /// The header of admin tokens.
    pub(super) token_header: &'a HeaderName,
    /// Who judges them.
    pub(super) auth: &'a Authenticator,
    /// Where sessions are kept, if there are any.
    pub(super) control: Option<&'a Control>,
    /// The server that has the sessions instead.
    pub(super) relay: Option<&'a Relay>,
    /// Whether this listener's connections are encrypted.
    pub(super) is_tls: bool,
}

impl Gate<'_> {
    /// Who is asking: by an admin token, else by a session, which changes things only from its own
    /// pages.
    pub(super) async fn admit(
        &self,
        head: &Parts,
        address: IpAddr,
        changes: bool,
    ) -> Result<Caller, Failure> {
        if let Some(header) = presented(&head.headers, self.token_header) {
            let header = header.to_str().map_err(|_| Failure::Unauthorized)?;
            return self.by_token(header, address).await;
        }
        let is_foreign = changes && !is_same_origin(&head.headers);
        if let Some(relay) = self.relay {
            let person = relay.person(&head.headers).await?;
            return if is_foreign {
                Err(Failure::CrossOrigin)
            } else {
                Ok(of_upstream(&person, address))
            };
        }
        let control = self.control.ok_or(Failure::Unauthorized)?;
        let cookie = session_cookie(&head.headers, self.is_tls).ok_or(Failure::SignIn)?;
        if is_foreign {
            return Err(Failure::CrossOrigin);
        }
        let by_itself = !changes && head.headers.contains_key(&BACKGROUND);
        let cause = if by_itself { Cause::Page } else { Cause::Person };
        let session = control.session(cookie, address, cause).await?.ok_or(Failure::SignIn)?;
        let actor = Actor { operator: session.operator(), address: Some(address) };
        Ok(Caller { actor, account: Some(session.account) })
    }

    async fn by_token(&self, header: &str, address: IpAddr) -> Result<Caller, Failure> {
        let admission = self.auth.authenticate(header).await?;
        match admission.grant.kind {
            TokenKind::Admin => {}
            TokenKind::Client | TokenKind::Frontend => return Err(Failure::WrongKind),
        }
        let token = Token::from_header(header).map_err(|_| Failure::Unauthorized)?;
        let named = self.control.and_then(|control| control.token_name(&token.digest()));
        let name = named.unwrap_or_else(|| token.masked().to_string());
        let operator = Operator::Token { name, digest: token.digest() };
        let actor = Actor { operator, address: Some(address) };
        Ok(Caller { actor, account: None })
    }
}

/// Somebody whom upstream knows. What is asked of this edge itself needs no permission.
fn of_upstream(person: &Person, address: IpAddr) -> Caller {
    let operator = Operator::Upstream { name: person.name() };
    Caller { actor: Actor { operator, address: Some(address) }, account: None }
}

/// The token that a request presents. Basic credentials are for a proxy on the way, to which browsers
/// send them with every request.
pub(super) fn presented<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a HeaderValue> {
    let is_basic = |value: &HeaderValue| {
        let scheme = value.as_bytes().split(|byte| *byte == b' ').next();
        scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"basic"))
    };
    headers.get(name).filter(|value| !is_basic(value))
}

/// Whether the browser's connection is encrypted: it is one of this listener's own, with `is_tls`, or a proxy
/// in front of us says so.
///
/// Whoever lies about it changes the own cookie only.
pub(super) fn is_encrypted(headers: &HeaderMap, is_tls: bool) -> bool {
    let text = |name| headers.get(name).and_then(|it| it.to_str().ok()).unwrap_or_default();
    // A value may stand in quotes (RFC 7239, section 4).
    let forwarded = text("forwarded").to_ascii_lowercase().replace('"', "");
    is_tls
        || text("x-forwarded-proto").eq_ignore_ascii_case("https")
        || forwarded.contains("proto=https")
        || text("origin").starts_with("https://")
}

/// The value of the session's cookie. The one without prefix, which others may have planted, does not
/// count where the connection is known to be encrypted.
pub(super) fn session_cookie(headers: &HeaderMap, is_tls: bool) -> Option<&str> {
    let unencrypted = || cookie(headers, SESSION).filter(|_| !is_encrypted(headers, is_tls));
    cookie(headers, SECURE_SESSION).or_else(unencrypted)
}

/// The value of a cookie.
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let cookies = headers.get_all(COOKIE).into_iter().filter_map(|value| value.to_str().ok());
    let mut pairs = cookies.flat_map(|cookies| cookies.split(';')).map(str::trim);
    pairs.find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().expect("a header")));
        pairs.collect()
    }

    #[test]
    fn credentials_for_a_proxy_are_no_token() {
        let name = HeaderName::from_static("authorization");
        for (value, is_token) in
            [("Basic YTpi", false), ("basic x", false), ("Bearer a", true), ("*:*.basic", true)]
        {
            let headers = headers(&[("authorization", value)]);
            assert_eq!(presented(&headers, &name).is_some(), is_token, "{value}");
        }
    }

    #[test]
    fn a_cookie_is_found_among_others_and_by_its_whole_name() {
        let headers = headers(&[("cookie", "a=1; parapet-session=x=y;b=2"), ("cookie", "c=3")]);
        assert_eq!(cookie(&headers, SESSION), Some("x=y"));
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
