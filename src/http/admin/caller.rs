//! Who is asking, and whether a page of somebody else's made them ask.
//!
//! A caller presents an admin token, or the cookie of a session. What they may do is judged where it
//! is done.

use std::net::IpAddr;

use hyper::{
    HeaderMap,
    header::{COOKIE, HOST, HeaderName, ORIGIN},
    http::request::Parts,
};

use crate::{
    auth::Authenticator,
    control::{Account, Actor, Control, Operator},
    http::reply::Failure,
    token::{Token, TokenKind},
};

/// The cookie of a session.
pub(super) const SESSION: &str = "parapet-session";

/// The cookie of a browser from which somebody has signed in before.
pub(super) const DEVICE: &str = "parapet-device";

/// Says whether a request comes from a page of the same origin; sent by browsers, and not to be
/// chosen by pages.
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

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
        if let Some(header) = head.headers.get(self.token_header) {
            let header = header.to_str().map_err(|_| Failure::Unauthorized)?;
            return self.by_token(header, address).await;
        }
        let control = self.control.ok_or(Failure::Unauthorized)?;
        let cookie = cookie(&head.headers, SESSION).ok_or(Failure::SignIn)?;
        if changes && !is_same_origin(&head.headers) {
            return Err(Failure::CrossOrigin);
        }
        let account = control.session(cookie, address).await?.ok_or(Failure::SignIn)?;
        let actor = Actor { operator: account.operator(), address: Some(address) };
        Ok(Caller { actor, account: Some(account) })
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
        let actor = Actor { operator: Operator::Token { name }, address: Some(address) };
        Ok(Caller { actor, account: None })
    }
}

/// The value of a cookie.
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let cookies = headers.get_all(COOKIE).into_iter().filter_map(|value| value.to_str().ok());
    let mut pairs = cookies.flat_map(|cookies| cookies.split(';')).map(str::trim);
    pairs.find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

/// Whether a page of this very origin made the request.
///
/// Behind a proxy that rewrites `Host` the browser's own word decides.
pub(super) fn is_same_origin(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(site) = text(FETCH_SITE) {
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

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().expect("a header")));
        pairs.collect()
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
    fn only_pages_of_the_same_origin_change_anything() {
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
