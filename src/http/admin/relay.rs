//! Relays the admin API of the upstream Unleash server.
//!
//! Callers use their own token or session, which upstream checks. The edge adds no credentials. After a
//! successful change of tokens upstream, the affected tokens are invalidated here. Relayed data is
//! neither stored nor parsed, except for the tokens in paths.

use std::{borrow::Cow, net::IpAddr};

use bytes::Bytes;
use hyper::{
    HeaderMap, Method, Request,
    header::{
        ACCEPT_ENCODING, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, COOKIE, HOST, HeaderName,
        HeaderValue, ORIGIN, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
    },
    http::request::Parts,
};
use percent_encoding::percent_decode_str;
use tracing::warn;

use super::{
    csrf::is_same_origin,
    headers::{BACKGROUND_HEADER, presented_token},
};
use crate::{
    auth::Authenticator,
    http::response::{self, HttpError, HttpResponse},
    protocol::{tokens::ListedSecret, user::User},
    telemetry::error_chain,
    upstream::Upstream,
};

/// Relays requests to an upstream server.
#[derive(Debug)]
pub struct Relay {
    /// The upstream server.
    pub upstream: Upstream,
}

/// Headers that apply to one connection only (RFC 9110, section 7.6.1).
const HOP_BY_HOP_HEADERS: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("proxy-authenticate"),
    HeaderName::from_static("proxy-authorization"),
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Whether a normalised path is relayed to upstream. The flags that this edge serves and their
/// explanations are not.
pub(super) fn is_relayed(path: &str) -> bool {
    let is_own =
        |root: &str| path.strip_prefix(root).is_some_and(|it| it.is_empty() || it.starts_with('/'));
    let is_upstreams =
        path.starts_with("/api/admin/") || path.starts_with("/auth/") || path == "/logout";
    is_upstreams && !is_own("/api/admin/flags") && !is_own("/api/admin/explain")
}

/// The request header with an admin token at this edge, and the edge's own token cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct RelayContext<'a> {
    pub(super) token_header: &'a HeaderName,
    pub(super) auth: &'a Authenticator,
}

impl Relay {
    /// Forwards a request to upstream and returns its response.
    pub(super) async fn forward(
        &self,
        context: RelayContext<'_>,
        head: &Parts,
        path: &str,
        body: Bytes,
        address: IpAddr,
    ) -> Result<HttpResponse, HttpError> {
        let changes = !matches!(head.method, Method::GET | Method::HEAD | Method::OPTIONS);
        let is_browser = [COOKIE, ORIGIN].iter().any(|it| head.headers.contains_key(it));
        let token = presented_token(&head.headers, context.token_header);
        let is_own_page = is_same_origin(&head.headers);
        if changes && is_browser && token.is_none() && !is_own_page {
            return Err(HttpError::CrossOrigin);
        }
        if has_path_traversal(path) {
            return Err(HttpError::NotFound);
        }
        let mut headers = end_to_end_headers(&head.headers);
        headers.remove(context.token_header);
        if let Some(token) = token {
            headers.insert(self.upstream.token_header_name(), token.clone());
        }
        if is_own_page && headers.contains_key(ORIGIN) {
            // Upstream compares the origin with its own host name.
            let origin = HeaderValue::try_from(self.upstream.origin());
            headers.insert(ORIGIN, origin.expect("an origin is visible ASCII"));
        }
        append_forwarded_for(&mut headers, address);
        let target = match head.uri.query() {
            Some(query) => Cow::Owned(format!("{path}?{query}")),
            None => Cow::Borrowed(path),
        };
        let answer = self.send(&head.method, &target, headers, body).await?;
        if changes && answer.status().is_success() {
            invalidate_token(context.auth, &head.method, path);
        }
        let (mut head, body) = answer.into_parts();
        head.headers = end_to_end_headers(&head.headers);
        Ok(response::relayed(head, body))
    }

    /// The user that is signed in upstream with these cookies.
    pub(super) async fn signed_in_user(&self, headers: &HeaderMap) -> Result<User, HttpError> {
        if !headers.contains_key(COOKIE) {
            return Err(HttpError::SignInRequired);
        }
        let passed = [COOKIE, BACKGROUND_HEADER].into_iter().flat_map(|name| {
            headers.get_all(&name).iter().map(move |value| (name.clone(), value.clone()))
        });
        let passed = passed.collect();
        let answer = self.send(&Method::GET, "/api/admin/user", passed, Bytes::new()).await?;
        if !answer.status().is_success() {
            return Err(if answer.status().is_server_error() {
                HttpError::BadGateway
            } else {
                HttpError::SignInRequired
            });
        }
        User::parse(answer.body()).map_err(|_| HttpError::BadGateway)
    }

    async fn send(
        &self,
        method: &Method,
        target: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<hyper::Response<Bytes>, HttpError> {
        let uri = target.parse().map_err(|_| HttpError::NotFound)?;
        let mut request = Request::new(body);
        *request.method_mut() = method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        self.upstream.relay(request).await.map_err(|error| {
            warn!(
                error = error_chain(&error),
                "Upstream did not respond to a relayed request; the client gets a 502"
            );
            HttpError::BadGateway
        })
    }
}

/// The end-to-end headers of a message. Length and content coding are left out, because bodies are
/// buffered and decoded.
fn end_to_end_headers(headers: &HeaderMap) -> HeaderMap {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let rewritten = [HOST, CONTENT_LENGTH, CONTENT_ENCODING, ACCEPT_ENCODING];
    let is_dropped = |name: &HeaderName| {
        HOP_BY_HOP_HEADERS.contains(name) || rewritten.contains(name) || named.contains(name)
    };
    let passed = headers.iter().filter(|(name, _)| !is_dropped(name));
    let mut headers = HeaderMap::new();
    for (name, value) in passed {
        headers.append(name, value.clone());
    }
    headers
}

/// Appends the peer's address to `X-Forwarded-For`.
fn append_forwarded_for(headers: &mut HeaderMap, address: IpAddr) {
    let before = headers.get(X_FORWARDED_FOR).and_then(|it| it.to_str().ok());
    let chain = before.map_or_else(|| address.to_string(), |it| format!("{it}, {address}"));
    if let Ok(chain) = HeaderValue::from_str(&chain) {
        headers.insert(X_FORWARDED_FOR, chain);
    }
}

/// Whether a path has a `.` or `..` segment or an encoded separator, percent-encoded or not.
fn has_path_traversal(path: &str) -> bool {
    path.split('/').any(|part| {
        let decoded = percent_decode_str(part).collect::<Vec<_>>();
        decoded == b"." || decoded == b".." || decoded.contains(&b'/') || decoded.contains(&b'\\')
    })
}

/// Revokes or revalidates the tokens that a successful request to upstream has changed.
fn invalidate_token(auth: &Authenticator, method: &Method, path: &str) {
    let Some(token) = AffectedTokens::from_path(path) else { return };
    let named = match token {
        AffectedTokens::All => None,
        AffectedTokens::One(token) => ListedSecret::parse(&token),
    };
    match named {
        Some(named) if *method == Method::DELETE => auth.revoke(&named),
        named => auth.revalidate(named.as_ref()),
    }
}

/// The API tokens that a path refers to.
#[derive(Debug, Eq, PartialEq)]
enum AffectedTokens<'a> {
    All,
    /// The token's secret or identifier, as in the path.
    One(Cow<'a, str>),
}

impl<'a> AffectedTokens<'a> {
    fn from_path(path: &'a str) -> Option<Self> {
        let rest = match path.strip_prefix("/api/admin/projects/") {
            Some(rest) => rest.split_once('/')?.1,
            None => path.strip_prefix("/api/admin/")?,
        };
        match rest.strip_prefix("api-tokens")? {
            "" => Some(Self::All),
            one => percent_decode_str(one.strip_prefix('/')?).decode_utf8().ok().map(Self::One),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::admin::headers::headers;

    #[test]
    fn admin_api_is_relayed_except_for_flags_and_explain() {
        for path in ["/api/admin/api-tokens", "/auth/simple/login", "/logout", "/api/admin/user"] {
            assert!(is_relayed(path), "{path}");
        }
        for path in ["/api/admin/flags", "/api/admin/flags/a", "/api/admin/explain", "/status"] {
            assert!(!is_relayed(path), "{path}");
        }
        assert!(is_relayed("/api/admin/flagship"));
    }

    #[test]
    fn headers_of_the_connection_stay() {
        let passed = end_to_end_headers(&headers(&[
            ("connection", "close, X-Secret-Hop"),
            ("x-secret-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("proxy-authorization", "Basic x"),
            ("host", "edge"),
            ("cookie", "a=1"),
            ("authorization", "t"),
        ]));
        let names: Vec<_> = passed.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["cookie", "authorization"]);
    }

    #[test]
    fn peer_address_is_appended_to_forwarded_for() {
        let mut chain = headers(&[("x-forwarded-for", "10.0.0.1")]);
        append_forwarded_for(&mut chain, [127, 0, 0, 1].into());
        assert_eq!(chain[X_FORWARDED_FOR], "10.0.0.1, 127.0.0.1");
    }

    #[test]
    fn path_traversal_is_detected() {
        for path in [
            "/api/admin/../client",
            "/api/admin/%2e%2e/x",
            "/api/admin/.%2E",
            "/a/%2e",
            "/a/x%2f..%2fy",
            "/a/x%5c",
        ] {
            assert!(has_path_traversal(path), "{path}");
        }
        for path in ["/api/admin/user", "/api/admin/api-tokens/a:b.c..d", "/a/..."] {
            assert!(!has_path_traversal(path), "{path}");
        }
    }

    #[test]
    fn affected_tokens_are_read_from_the_path() {
        let one = |name: &'static str| Some(AffectedTokens::One(name.into()));
        assert_eq!(AffectedTokens::from_path("/api/admin/api-tokens"), Some(AffectedTokens::All));
        assert_eq!(AffectedTokens::from_path("/api/admin/api-tokens/a%3Ab.c"), one("a:b.c"));
        assert_eq!(AffectedTokens::from_path("/api/admin/projects/p/api-tokens/x"), one("x"));
        assert_eq!(AffectedTokens::from_path("/api/admin/projects/p"), None);
        assert_eq!(AffectedTokens::from_path("/api/admin/user"), None);
        assert_eq!(AffectedTokens::from_path("/api/admin/api-tokens-of-others"), None);
    }
}
