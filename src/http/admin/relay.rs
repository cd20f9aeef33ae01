//! The admin API of the Unleash server upstream, by way of this edge.
//!
//! Who asks does so with their own token or session, and upstream judges them: nothing of the edge's
//! goes along. A change of tokens takes effect here when upstream has made it. What is relayed is
//! neither kept nor read, but for the names of tokens in paths.

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
    caller::{BACKGROUND, presented},
    origin::is_same_origin,
};
use crate::{
    auth::Authenticator,
    http::reply::{self, Failure, Reply},
    telemetry::report,
    upstream::Upstream,
    wire::{person::Person, tokens::ListedSecret},
};

/// The server whose admin API is passed on.
#[derive(Debug)]
pub struct Relay {
    /// The server.
    pub upstream: Upstream,
}

/// What concerns one connection only (RFC 9110, section 7.6.1), or is said anew for the next one.
const OF_THE_HOP: [HeaderName; 9] = [
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

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Whether upstream answers a normalised path. What is not the server's own stays here: the flags
/// that this edge serves, and why they come out as they do.
pub(super) fn concerns(path: &str) -> bool {
    let is_own =
        |root: &str| path.strip_prefix(root).is_some_and(|it| it.is_empty() || it.starts_with('/'));
    let is_upstreams =
        path.starts_with("/api/admin/") || path.starts_with("/auth/") || path == "/logout";
    is_upstreams && !is_own("/api/admin/flags") && !is_own("/api/admin/explain")
}

/// The header of admin tokens at this edge, and who judges tokens here.
#[derive(Clone, Copy, Debug)]
pub(super) struct Here<'a> {
    pub(super) token_header: &'a HeaderName,
    pub(super) auth: &'a Authenticator,
}

impl Relay {
    /// Passes a request on, and the answer back.
    pub(super) async fn pass(
        &self,
        here: Here<'_>,
        head: &Parts,
        path: &str,
        body: Bytes,
        address: IpAddr,
    ) -> Result<Reply, Failure> {
        let changes = !matches!(head.method, Method::GET | Method::HEAD | Method::OPTIONS);
        let is_browser = [COOKIE, ORIGIN].iter().any(|it| head.headers.contains_key(it));
        let token = presented(&head.headers, here.token_header);
        let is_own_page = is_same_origin(&head.headers);
        if changes && is_browser && token.is_none() && !is_own_page {
            return Err(Failure::CrossOrigin);
        }
        if climbs(path) {
            return Err(Failure::NotFound);
        }
        let mut headers = forwarded(&head.headers);
        headers.remove(here.token_header);
        if let Some(token) = token {
            headers.insert(self.upstream.token_header(), token.clone());
        }
        if is_own_page && headers.contains_key(ORIGIN) {
            // What is of the same origin here is so there, whose name is another.
            let origin = HeaderValue::try_from(self.upstream.origin());
            headers.insert(ORIGIN, origin.expect("an origin is visible ASCII"));
        }
        append_address(&mut headers, address);
        let target = match head.uri.query() {
            Some(query) => Cow::Owned(format!("{path}?{query}")),
            None => Cow::Borrowed(path),
        };
        let answer = self.ask(&head.method, &target, headers, body).await?;
        if changes && answer.status().is_success() {
            take_note(here.auth, &head.method, path);
        }
        let (mut head, body) = answer.into_parts();
        head.headers = forwarded(&head.headers);
        Ok(reply::relayed(head, body))
    }

    /// Who has signed in upstream with these cookies.
    pub(super) async fn person(&self, headers: &HeaderMap) -> Result<Person, Failure> {
        if !headers.contains_key(COOKIE) {
            return Err(Failure::SignIn);
        }
        let passed = [COOKIE, BACKGROUND].into_iter().flat_map(|name| {
            headers.get_all(&name).iter().map(move |value| (name.clone(), value.clone()))
        });
        let passed = passed.collect();
        let answer = self.ask(&Method::GET, "/api/admin/user", passed, Bytes::new()).await?;
        if !answer.status().is_success() {
            return Err(if answer.status().is_server_error() {
                Failure::Upstream
            } else {
                Failure::SignIn
            });
        }
        Person::parse(answer.body()).map_err(|_| Failure::Upstream)
    }

    async fn ask(
        &self,
        method: &Method,
        target: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<hyper::Response<Bytes>, Failure> {
        let uri = target.parse().map_err(|_| Failure::NotFound)?;
        let mut request = Request::new(body);
        *request.method_mut() = method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        self.upstream.relay(request).await.map_err(|error| {
            warn!(error = report(&error), "Upstream gives no answer to be passed on");
            Failure::Upstream
        })
    }
}

/// What of a message's headers concerns both ends. The length and the coding are said anew, because
/// bodies are read whole and uncoded.
fn forwarded(headers: &HeaderMap) -> HeaderMap {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let said_anew = [HOST, CONTENT_LENGTH, CONTENT_ENCODING, ACCEPT_ENCODING];
    let stays = |name: &HeaderName| {
        OF_THE_HOP.contains(name) || said_anew.contains(name) || named.contains(name)
    };
    let passed = headers.iter().filter(|(name, _)| !stays(name));
    let mut kept = HeaderMap::new();
    for (name, value) in passed {
        kept.append(name, value.clone());
    }
    kept
}

/// Adds whom we see to the addresses that the request came through.
fn append_address(headers: &mut HeaderMap, address: IpAddr) {
    let before = headers.get(FORWARDED_FOR).and_then(|it| it.to_str().ok());
    let chain = before.map_or_else(|| address.to_string(), |it| format!("{it}, {address}"));
    if let Ok(chain) = HeaderValue::from_str(&chain) {
        headers.insert(FORWARDED_FOR, chain);
    }
}

/// Whether a path has a part that leads upwards, however it is written.
fn climbs(path: &str) -> bool {
    path.split('/').any(|part| {
        let decoded = percent_decode_str(part).collect::<Vec<_>>();
        decoded == b"." || decoded == b".." || decoded.contains(&b'/') || decoded.contains(&b'\\')
    })
}

/// Makes a change that upstream has made take effect here.
fn take_note(auth: &Authenticator, method: &Method, path: &str) {
    let Some(token) = Tokens::of(path) else { return };
    let named = match token {
        Tokens::All => None,
        Tokens::One(token) => ListedSecret::parse(&token),
    };
    match named {
        Some(named) if *method == Method::DELETE => auth.withdraw(&named),
        named => auth.reconsider(named.as_ref()),
    }
}

/// The API tokens that a path is of.
#[derive(Debug, Eq, PartialEq)]
enum Tokens<'a> {
    All,
    /// What the path calls it: its secret or its identifier.
    One(Cow<'a, str>),
}

impl<'a> Tokens<'a> {
    fn of(path: &'a str) -> Option<Self> {
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

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().expect("a header")));
        pairs.collect()
    }

    #[test]
    fn upstream_answers_for_what_is_its_own() {
        for path in ["/api/admin/api-tokens", "/auth/simple/login", "/logout", "/api/admin/user"] {
            assert!(concerns(path), "{path}");
        }
        for path in ["/api/admin/flags", "/api/admin/flags/a", "/api/admin/explain", "/status"] {
            assert!(!concerns(path), "{path}");
        }
        assert!(concerns("/api/admin/flagship"));
    }

    #[test]
    fn headers_of_the_connection_stay() {
        let passed = forwarded(&headers(&[
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
    fn the_address_joins_the_chain() {
        let mut chain = headers(&[("x-forwarded-for", "10.0.0.1")]);
        append_address(&mut chain, [127, 0, 0, 1].into());
        assert_eq!(chain[FORWARDED_FOR], "10.0.0.1, 127.0.0.1");
    }

    #[test]
    fn no_path_leads_upwards() {
        for path in [
            "/api/admin/../client",
            "/api/admin/%2e%2e/x",
            "/api/admin/.%2E",
            "/a/%2e",
            "/a/x%2f..%2fy",
            "/a/x%5c",
        ] {
            assert!(climbs(path), "{path}");
        }
        for path in ["/api/admin/user", "/api/admin/api-tokens/a:b.c..d", "/a/..."] {
            assert!(!climbs(path), "{path}");
        }
    }

    #[test]
    fn paths_name_tokens() {
        let one = |name: &'static str| Some(Tokens::One(name.into()));
        assert_eq!(Tokens::of("/api/admin/api-tokens"), Some(Tokens::All));
        assert_eq!(Tokens::of("/api/admin/api-tokens/a%3Ab.c"), one("a:b.c"));
        assert_eq!(Tokens::of("/api/admin/projects/p/api-tokens/x"), one("x"));
        assert_eq!(Tokens::of("/api/admin/projects/p"), None);
        assert_eq!(Tokens::of("/api/admin/user"), None);
        assert_eq!(Tokens::of("/api/admin/api-tokens-of-others"), None);
    }
}
