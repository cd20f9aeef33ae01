//! Builds every response; the only module that chooses status codes.
//!
//! Handlers return an [`HttpError`] or call one of the functions here. A table in `error` maps each
//! error to its status, and its `Display` is the message for the client. Messages never repeat client
//! input.

mod error;

use std::sync::Arc;

use bytes::Bytes;
use hyper::{
    HeaderMap, Method, Response, StatusCode,
    header::{
        CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, HeaderValue,
        LOCATION, REFERRER_POLICY, SET_COOKIE, VARY, X_CONTENT_TYPE_OPTIONS,
    },
};
use serde::Serialize;
use tokio::sync::Semaphore;

pub use self::error::HttpError;
use super::{conditional, content_encoding};
pub use crate::server::{ByteStream, HttpResponse, ResponseBody};
use crate::snapshot::prepared_body::{ContentCoding, PreparedBody, Representation};

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const PROMETHEUS_TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4");
const VARY_ENCODING: HeaderValue = HeaderValue::from_static("accept-encoding");
const VARY_ENCODING_AND_TOKEN: HeaderValue =
    HeaderValue::from_static("accept-encoding, authorization, x-api-key");
const EVENT_STREAM: HeaderValue = HeaderValue::from_static("text/event-stream");
const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");
const PRIVATE_NO_CACHE: HeaderValue = HeaderValue::from_static("private, no-cache");
const NO_CACHE: HeaderValue = HeaderValue::from_static("no-cache");

/// Content security policy of the console: own scripts, styles and images, and requests to its own
/// origin.
const CONSOLE_CSP: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
     img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
);

impl From<HttpError> for HttpResponse {
    fn from(failure: HttpError) -> Self {
        let text = serde_json::to_vec(&failure.error_body()).expect("errors are plain text");
        let mut reply = json(failure.status(), text.into());
        if let Some((name, value)) = failure.header() {
            reply.headers_mut().insert(name, value);
        }
        reply
    }
}

/// An error in another format than Unleash's: `document` is the whole body.
pub fn error_with_body(failure: &HttpError, document: &impl Serialize) -> HttpResponse {
    let mut reply = uncached_json(failure.status(), document);
    if let Some((name, value)) = failure.header() {
        reply.headers_mut().insert(name, value);
    }
    reply
}

/// The `Cache-Control` of a response: whether caches must revalidate it before reuse.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CachePolicy {
    /// No header, as Unleash does for flag configuration.
    Unspecified,
    /// `Cache-Control: no-cache`, as Unleash does for evaluated flags.
    NoCache,
    /// `Cache-Control: private, no-cache`: shared caches must not store it.
    PrivateNoCache,
}

/// 304: the client already has the representation of `etag`.
pub fn not_modified(etag: &HeaderValue, policy: CachePolicy) -> HttpResponse {
    let mut reply = empty(StatusCode::NOT_MODIFIED);
    reply.headers_mut().insert(ETAG, etag.clone());
    add_cache_headers(&mut reply, policy);
    reply
}

/// The body in the coding that the client prefers, or a 304.
///
/// Waits only if the body is large and has not been compressed with this coding before; compression then
/// runs on a blocking thread, at most eight at a time. If the future is dropped, compression continues,
/// and the next request for this body uses its result.
pub async fn negotiate_body(
    request: &HeaderMap,
    body: &Arc<PreparedBody>,
    policy: CachePolicy,
) -> HttpResponse {
    match negotiate_body_now(request, body, policy) {
        Ok(reply) => reply,
        Err(coding) => Box::pin(compress_and_respond(Arc::clone(body), coding, policy)).await,
    }
}

/// Like [`negotiate_body`], without waiting. `Err` is the coding that has to be compressed first.
pub fn negotiate_body_now(
    request: &HeaderMap,
    body: &PreparedBody,
    policy: CachePolicy,
) -> Result<HttpResponse, ContentCoding> {
    if conditional::if_none_match_matches(request, body.etag()) {
        return Ok(not_modified(body.etag(), policy));
    }
    let coding =
        body.effective_coding(content_encoding::negotiate(request, |coding| body.supports(coding)));
    match body.encoded(coding) {
        Some(representation) => Ok(representation_response(representation.clone(), coding, policy)),
        None if body.is_cheap_to_encode() => {
            Ok(representation_response(body.get_or_encode(coding).clone(), coding, policy))
        }
        None => Err(coding),
    }
}

/// Limits concurrent compressions: more threads would use memory without finishing sooner.
static COMPRESSIONS: Semaphore = Semaphore::const_new(8);

async fn compress_and_respond(
    body: Arc<PreparedBody>,
    coding: ContentCoding,
    policy: CachePolicy,
) -> HttpResponse {
    let permit = COMPRESSIONS.acquire().await.expect("the semaphore is never closed");
    let shared = Arc::clone(&body);
    let make = move || {
        // Held until compression is done, even if the request is gone.
        let _permit = permit;
        shared.get_or_encode(coding).clone()
    };
    match tokio::task::spawn_blocking(make).await {
        Ok(representation) => representation_response(representation, coding, policy),
        // The runtime is shutting down; the plain bytes are always available.
        Err(_) => representation_response(
            body.get_or_encode(ContentCoding::Identity).clone(),
            ContentCoding::Identity,
            policy,
        ),
    }
}

fn representation_response(
    representation: Representation,
    coding: ContentCoding,
    policy: CachePolicy,
) -> HttpResponse {
    let mut reply = json(StatusCode::OK, representation.bytes);
    let headers = reply.headers_mut();
    headers.insert(ETAG, representation.etag);
    if let Some(name) = coding.name() {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static(name));
    }
    add_cache_headers(&mut reply, policy);
    reply
}

fn add_cache_headers(reply: &mut HttpResponse, policy: CachePolicy) {
    let headers = reply.headers_mut();
    headers.insert(VARY, VARY_ENCODING);
    match policy {
        CachePolicy::Unspecified => {}
        CachePolicy::NoCache => drop(headers.insert(CACHE_CONTROL, NO_CACHE)),
        CachePolicy::PrivateNoCache => {
            headers.insert(VARY, VARY_ENCODING_AND_TOKEN);
            headers.insert(CACHE_CONTROL, PRIVATE_NO_CACHE);
        }
    }
}

/// A file of the console, in the coding that the client prefers, or a 304. Waits like
/// [`negotiate_body`].
pub async fn console_file(
    request: &HeaderMap,
    content_type: HeaderValue,
    file: &Arc<PreparedBody>,
) -> HttpResponse {
    let mut reply = negotiate_body(request, file, CachePolicy::NoCache).await;
    let is_whole = reply.status() == StatusCode::OK;
    let headers = reply.headers_mut();
    if is_whole {
        headers.insert(CONTENT_TYPE, content_type);
    }
    headers.insert(CONTENT_SECURITY_POLICY, CONSOLE_CSP);
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    reply
}

/// A ready-made JSON document.
pub fn json_text(text: impl Into<Bytes>) -> HttpResponse {
    json(StatusCode::OK, text.into())
}

/// A response relayed unchanged.
pub fn relayed(head: hyper::http::response::Parts, body: Bytes) -> HttpResponse {
    let mut reply = Response::new(ResponseBody::from(body));
    *reply.status_mut() = head.status;
    *reply.headers_mut() = head.headers;
    reply
}

/// A JSON document that must not be cached.
pub fn json_document(document: &impl Serialize) -> HttpResponse {
    uncached_json(StatusCode::OK, document)
}

/// 201 for a created resource, with its `Location`.
pub fn created(document: &impl Serialize, location: &str) -> HttpResponse {
    let mut reply = uncached_json(StatusCode::CREATED, document);
    if let Ok(location) = HeaderValue::from_str(location) {
        reply.headers_mut().insert(LOCATION, location);
    }
    reply
}

/// 200 without a body.
pub fn empty_ok() -> HttpResponse {
    empty(StatusCode::OK)
}

/// 204.
pub fn no_content() -> HttpResponse {
    empty(StatusCode::NO_CONTENT)
}

/// 308: the client repeats method and body at `location`. Not cached, so it comes here again next time.
pub fn permanent_redirect(location: &str) -> HttpResponse {
    let mut reply = empty(StatusCode::PERMANENT_REDIRECT);
    reply.headers_mut().insert(CACHE_CONTROL, NO_STORE);
    if let Ok(location) = HeaderValue::from_str(location) {
        reply.headers_mut().insert(LOCATION, location);
    }
    reply
}

/// Adds a cookie to a response.
pub fn with_cookie(mut reply: HttpResponse, cookie: &str) -> HttpResponse {
    // Cookies consist of random text and fixed attributes.
    let mut cookie = HeaderValue::from_str(cookie).expect("a cookie is visible ASCII");
    cookie.set_sensitive(true);
    reply.headers_mut().append(SET_COOKIE, cookie);
    reply
}

fn uncached_json(status: StatusCode, document: &impl Serialize) -> HttpResponse {
    let text = serde_json::to_vec(document).expect("documents are plain data");
    let mut reply = json(status, text.into());
    reply.headers_mut().insert(CACHE_CONTROL, NO_STORE);
    reply
}

/// 202, for accepted usage reports.
pub fn accepted() -> HttpResponse {
    empty(StatusCode::ACCEPTED)
}

/// The response to a probe: 200 if ready, otherwise 503 with the reasons in `text`.
pub fn probe(ready: bool, text: impl Into<Bytes>) -> HttpResponse {
    json(if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text.into())
}

/// Delta events that lead to the state `id`. The id is the entity tag in every coding, and SDKs send it
/// back as the state that they have. Waits like [`negotiate_body`].
pub async fn delta(request: &HeaderMap, events: &Arc<PreparedBody>, id: u32) -> HttpResponse {
    let mut reply = negotiate_body(request, events, CachePolicy::Unspecified).await;
    reply.headers_mut().insert(ETAG, state_etag(id));
    reply
}

/// 304 for a client that already has the state `id`.
pub fn delta_not_modified(id: u32) -> HttpResponse {
    not_modified(&state_etag(id), CachePolicy::Unspecified)
}

fn state_etag(id: u32) -> HeaderValue {
    HeaderValue::try_from(format!("\"{id}\"")).expect("digits are visible ASCII")
}

/// A stream of server-sent events; proxies must not buffer it.
pub fn event_stream(events: ByteStream) -> HttpResponse {
    let mut reply = Response::new(ResponseBody::Stream(events));
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, EVENT_STREAM);
    headers.insert(CACHE_CONTROL, NO_STORE);
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    reply
}

/// Tells SDKs that support streaming to switch to it.
pub fn suggest_streaming(reply: &mut HttpResponse) {
    reply.headers_mut().insert("fetch-mode", HeaderValue::from_static("streaming"));
}

/// The Prometheus exposition.
pub fn prometheus(text: String) -> HttpResponse {
    let mut reply = Response::new(ResponseBody::from(Bytes::from(text)));
    reply.headers_mut().insert(CONTENT_TYPE, PROMETHEUS_TEXT);
    reply
}

/// The response to a CORS preflight; `cors` adds its headers.
pub fn empty_preflight() -> HttpResponse {
    empty(StatusCode::OK)
}

/// The length of a response's body, in bytes; 0 for a stream, whose length is not known.
pub fn body_length(reply: &HttpResponse) -> u64 {
    use hyper::body::Body as _;
    reply.body().size_hint().lower()
}

/// Forbids caching of an admin response unless it already has a `Cache-Control`, and forbids browsers to
/// guess its content type.
pub fn add_private_headers(reply: &mut HttpResponse) {
    let headers = reply.headers_mut();
    headers.entry(CACHE_CONTROL).or_insert(NO_STORE);
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
}

/// Drops the body for `HEAD` requests, but keeps its `Content-Length`.
pub fn drop_body_for_head(method: &Method, mut reply: HttpResponse) -> HttpResponse {
    use hyper::body::Body as _;
    if method == Method::HEAD {
        if let Some(length) = reply.body().size_hint().exact() {
            reply.headers_mut().insert(hyper::header::CONTENT_LENGTH, length.into());
        }
        *reply.body_mut() = ResponseBody::default();
    }
    reply
}

fn json(status: StatusCode, bytes: Bytes) -> HttpResponse {
    let mut reply = Response::new(ResponseBody::from(bytes));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, JSON);
    reply
}

fn empty(status: StatusCode) -> HttpResponse {
    let mut reply = Response::new(ResponseBody::default());
    *reply.status_mut() = status;
    reply
}
