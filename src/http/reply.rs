//! What goes back: the only place that chooses status codes.
//!
//! A [`Failure`] says what is wrong; a table says which status that is, and
//! its `Display` is the message that the client reads. Messages never repeat what a client sent.

mod failure;

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Response, StatusCode,
    header::{
        CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, HeaderValue,
        LOCATION, REFERRER_POLICY, SET_COOKIE, VARY, X_CONTENT_TYPE_OPTIONS,
    },
};
use serde::Serialize;

pub use self::failure::Failure;
use super::{coding, conditional};
use crate::snapshot::body::{Body, Coded, Coding};

/// A response, whole: every body that is served is in memory.
pub type Reply = Response<Full<Bytes>>;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const PROMETHEUS_TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4");
const BY_CODING: HeaderValue = HeaderValue::from_static("accept-encoding");
const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");
const REVALIDATE: HeaderValue = HeaderValue::from_static("no-cache");

/// What the console's pages may do: run and show what came with them, and ask where they came from.
const PAGE_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
     img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
);

impl From<Failure> for Reply {
    fn from(failure: Failure) -> Self {
        let text = serde_json::to_vec(&failure.error()).expect("errors are plain text");
        let mut reply = json(failure.status(), text.into());
        if let Some((name, value)) = failure.header() {
            reply.headers_mut().insert(name, value);
        }
        reply
    }
}

/// Whether caches between us and the client must ask again before using an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Freshness {
    /// Nothing is said, as Unleash does for flag configuration.
    Unsaid,
    /// `Cache-Control: no-cache`, as Unleash does for evaluated flags.
    Revalidate,
}

/// The answer to a condition that names the representation of `etag`.
pub fn not_modified(etag: &HeaderValue, freshness: Freshness) -> Reply {
    let mut reply = empty(StatusCode::NOT_MODIFIED);
    reply.headers_mut().insert(ETAG, etag.clone());
    describe(&mut reply, freshness);
    reply
}

/// The body in the coding that the client prefers, or a 304.
///
/// Awaits only while a coding is made for the first time, on a thread for such work. Dropping the
/// future leaves that work to finish for the next who asks.
pub async fn body(request: &HeaderMap, body: &Arc<Body>, freshness: Freshness) -> Reply {
    if conditional::none_match_names(request, body.etag()) {
        return not_modified(body.etag(), freshness);
    }
    let coding = body.effective(coding::preferred(request));
    if let Some(coded) = body.ready(coding) {
        return body_as(coded.clone(), coding, freshness);
    }
    Box::pin(body_made(Arc::clone(body), coding, freshness)).await
}

async fn body_made(body: Arc<Body>, coding: Coding, freshness: Freshness) -> Reply {
    let shared = Arc::clone(&body);
    match tokio::task::spawn_blocking(move || shared.make(coding).clone()).await {
        Ok(coded) => body_as(coded, coding, freshness),
        // The runtime is going down; the plain bytes are always there.
        Err(_) => body_as(body.make(Coding::Identity).clone(), Coding::Identity, freshness),
    }
}

fn body_as(coded: Coded, coding: Coding, freshness: Freshness) -> Reply {
    let mut reply = json(StatusCode::OK, coded.bytes);
    let headers = reply.headers_mut();
    headers.insert(ETAG, coded.etag);
    if let Some(name) = coding.name() {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static(name));
    }
    describe(&mut reply, freshness);
    reply
}

fn describe(reply: &mut Reply, freshness: Freshness) {
    let headers = reply.headers_mut();
    headers.insert(VARY, BY_CODING);
    if freshness == Freshness::Revalidate {
        headers.insert(CACHE_CONTROL, REVALIDATE);
    }
}

/// A file that browsers show, in the coding that the client prefers, or a 304; awaits as [`body()`].
pub async fn page(request: &HeaderMap, content_type: HeaderValue, file: &Arc<Body>) -> Reply {
    let mut reply = body(request, file, Freshness::Revalidate).await;
    let is_whole = reply.status() == StatusCode::OK;
    let headers = reply.headers_mut();
    if is_whole {
        headers.insert(CONTENT_TYPE, content_type);
    }
    headers.insert(CONTENT_SECURITY_POLICY, PAGE_POLICY);
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    reply
}

/// A JSON document that is served as it is.
pub fn ok(text: impl Into<Bytes>) -> Reply {
    json(StatusCode::OK, text.into())
}

/// An answer of somebody else, as it came.
pub fn relayed(head: hyper::http::response::Parts, body: Bytes) -> Reply {
    let mut reply = Response::new(Full::new(body));
    *reply.status_mut() = head.status;
    *reply.headers_mut() = head.headers;
    reply
}

/// A document made for this answer, which nobody else may keep.
pub fn document(document: &impl Serialize) -> Reply {
    private(StatusCode::OK, document)
}

/// The answer to something that was created, with where it can be found.
pub fn created(document: &impl Serialize, location: &str) -> Reply {
    let mut reply = private(StatusCode::CREATED, document);
    if let Ok(location) = HeaderValue::from_str(location) {
        reply.headers_mut().insert(LOCATION, location);
    }
    reply
}

/// The answer to something that was done and has nothing to tell.
pub fn done() -> Reply {
    empty(StatusCode::OK)
}

/// The same where the protocol wants that said.
pub fn nothing() -> Reply {
    empty(StatusCode::NO_CONTENT)
}

/// The answer with a cookie to be kept.
pub fn with_cookie(mut reply: Reply, cookie: &str) -> Reply {
    // Cookies hold random text and fixed attributes.
    let mut cookie = HeaderValue::from_str(cookie).expect("a cookie is visible ASCII");
    cookie.set_sensitive(true);
    reply.headers_mut().append(SET_COOKIE, cookie);
    reply
}

fn private(status: StatusCode, document: &impl Serialize) -> Reply {
    let text = serde_json::to_vec(document).expect("documents are plain data");
    let mut reply = json(status, text.into());
    reply.headers_mut().insert(CACHE_CONTROL, NO_STORE);
    reply
}

/// The answer to usage that was taken in.
pub fn accepted() -> Reply {
    empty(StatusCode::ACCEPTED)
}

/// The state of the instance, for probes: 200, or 503 with what is missing.
pub fn probe(ready: bool, text: impl Into<Bytes>) -> Reply {
    json(if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text.into())
}

/// The Prometheus exposition.
pub fn prometheus(text: String) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::from(text)));
    reply.headers_mut().insert(CONTENT_TYPE, PROMETHEUS_TEXT);
    reply
}

/// The answer to a preflight; its headers come from `cors`.
pub fn preflight() -> Reply {
    empty(StatusCode::OK)
}

/// The reply without its body, for `HEAD`; the length stays told.
pub fn without_body(method: &Method, mut reply: Reply) -> Reply {
    use hyper::body::Body as _;
    if method == Method::HEAD {
        if let Some(length) = reply.body().size_hint().exact() {
            reply.headers_mut().insert(hyper::header::CONTENT_LENGTH, length.into());
        }
        *reply.body_mut() = Full::default();
    }
    reply
}

fn json(status: StatusCode, bytes: Bytes) -> Reply {
    let mut reply = Response::new(Full::new(bytes));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, JSON);
    reply
}

fn empty(status: StatusCode) -> Reply {
    let mut reply = Response::new(Full::default());
    *reply.status_mut() = status;
    reply
}
