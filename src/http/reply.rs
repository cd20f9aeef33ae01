//! What goes back: the only place that chooses status codes.
//!
//! A [`Failure`] says what is wrong; a table says which status that is, and
//! its `Display` is the message that the client reads. Messages never repeat what a client sent.

mod failure;
mod outgoing;

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

pub use self::{
    failure::Failure,
    outgoing::{Live, Outgoing},
};
use super::{coding, conditional};
use crate::snapshot::body::{Body, Coded, Coding};

/// A response.
pub type Reply = Response<Outgoing>;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const PROMETHEUS_TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4");
const BY_CODING: HeaderValue = HeaderValue::from_static("accept-encoding");
const BY_CODING_AND_TOKEN: HeaderValue =
    HeaderValue::from_static("accept-encoding, authorization, x-api-key");
const EVENT_STREAM: HeaderValue = HeaderValue::from_static("text/event-stream");
const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");
const PERSONAL: HeaderValue = HeaderValue::from_static("private, no-cache");
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

/// A failure in other words than Unleash's: `document` is the whole body.
pub fn refusal(failure: &Failure, document: &impl Serialize) -> Reply {
    let mut reply = private(failure.status(), document);
    if let Some((name, value)) = failure.header() {
        reply.headers_mut().insert(name, value);
    }
    reply
}

/// Whether caches between us and the client must ask again before using an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Freshness {
    /// Nothing is said, as Unleash does for flag configuration.
    Unsaid,
    /// `Cache-Control: no-cache`, as Unleash does for evaluated flags.
    Revalidate,
    /// The same, and that nobody else may be given it.
    Personal,
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
/// Awaits only while a coding is made for the first time, on a thread for such work and for a free place
/// among a few; what is quick to make is made at once. Dropping the future leaves that work to finish for
/// the next who asks.
pub async fn body(request: &HeaderMap, body: &Arc<Body>, freshness: Freshness) -> Reply {
    match body_at_once(request, body, freshness) {
        Ok(reply) => reply,
        Err(coding) => Box::pin(body_made(Arc::clone(body), coding, freshness)).await,
    }
}

/// The same, or the coding that has to be waited for.
pub fn body_at_once(
    request: &HeaderMap,
    body: &Body,
    freshness: Freshness,
) -> Result<Reply, Coding> {
    if conditional::none_match_names(request, body.etag()) {
        return Ok(not_modified(body.etag(), freshness));
    }
    let coding = body.effective(coding::preferred(request, |coding| body.offers(coding)));
    match body.ready(coding) {
        Some(coded) => Ok(body_as(coded.clone(), coding, freshness)),
        None if body.is_quick() => Ok(body_as(body.make(coding).clone(), coding, freshness)),
        None => Err(coding),
    }
}

/// How many bodies are compressed at a time: more threads would take memory and finish no sooner.
static COMPRESSIONS: Semaphore = Semaphore::const_new(8);

async fn body_made(body: Arc<Body>, coding: Coding, freshness: Freshness) -> Reply {
    let permit = COMPRESSIONS.acquire().await.expect("nobody closes it");
    let shared = Arc::clone(&body);
    let make = move || {
        // Held until the work is done, also where nobody waits for it any more.
        let _permit = permit;
        shared.make(coding).clone()
    };
    match tokio::task::spawn_blocking(make).await {
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
    match freshness {
        Freshness::Unsaid => {}
        Freshness::Revalidate => drop(headers.insert(CACHE_CONTROL, REVALIDATE)),
        Freshness::Personal => {
            headers.insert(VARY, BY_CODING_AND_TOKEN);
            headers.insert(CACHE_CONTROL, PERSONAL);
        }
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
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    reply
}

/// A JSON document that is served as it is.
pub fn ok(text: impl Into<Bytes>) -> Reply {
    json(StatusCode::OK, text.into())
}

/// An answer of somebody else, as it came.
pub fn relayed(head: hyper::http::response::Parts, body: Bytes) -> Reply {
    let mut reply = Response::new(Outgoing::from(body));
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

/// Sends the client elsewhere; it repeats method and body there, and asks here again the next time.
pub fn redirect(location: &str) -> Reply {
    let mut reply = empty(StatusCode::PERMANENT_REDIRECT);
    reply.headers_mut().insert(CACHE_CONTROL, NO_STORE);
    if let Ok(location) = HeaderValue::from_str(location) {
        reply.headers_mut().insert(LOCATION, location);
    }
    reply
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

/// A list of delta events that lead to the state `id`, which is its entity tag in every coding: SDKs
/// name by it the state that they have. Awaits as [`body()`].
pub async fn delta(request: &HeaderMap, events: &Arc<Body>, id: u32) -> Reply {
    let mut reply = body(request, events, Freshness::Unsaid).await;
    reply.headers_mut().insert(ETAG, state_tag(id));
    reply
}

/// The answer to a client that has all that is to be told of the state `id`.
pub fn no_delta(id: u32) -> Reply {
    not_modified(&state_tag(id), Freshness::Unsaid)
}

fn state_tag(id: u32) -> HeaderValue {
    HeaderValue::try_from(format!("\"{id}\"")).expect("digits are visible ASCII")
}

/// Server-sent events, as they come about; proxies are told to hold nothing back.
pub fn event_stream(events: Live) -> Reply {
    let mut reply = Response::new(Outgoing::Live(events));
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, EVENT_STREAM);
    headers.insert(CACHE_CONTROL, NO_STORE);
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    reply
}

/// Says that SDKs which can had better follow a stream.
pub fn prefer_streaming(reply: &mut Reply) {
    reply.headers_mut().insert("fetch-mode", HeaderValue::from_static("streaming"));
}

/// The Prometheus exposition.
pub fn prometheus(text: String) -> Reply {
    let mut reply = Response::new(Outgoing::from(Bytes::from(text)));
    reply.headers_mut().insert(CONTENT_TYPE, PROMETHEUS_TEXT);
    reply
}

/// The answer to a preflight; its headers come from `cors`.
pub fn preflight() -> Reply {
    empty(StatusCode::OK)
}

/// How long the body of a reply is, in bytes; 0 where that is not known yet.
pub fn length(reply: &Reply) -> u64 {
    use hyper::body::Body as _;
    reply.body().size_hint().lower()
}

/// Keeps a response for an operator out of caches, unless it says otherwise itself, and keeps browsers
/// from guessing another type for it.
pub fn protect(reply: &mut Reply) {
    let headers = reply.headers_mut();
    headers.entry(CACHE_CONTROL).or_insert(NO_STORE);
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
}

/// The reply without its body, for `HEAD`; the length stays told.
pub fn without_body(method: &Method, mut reply: Reply) -> Reply {
    use hyper::body::Body as _;
    if method == Method::HEAD {
        if let Some(length) = reply.body().size_hint().exact() {
            reply.headers_mut().insert(hyper::header::CONTENT_LENGTH, length.into());
        }
        *reply.body_mut() = Outgoing::default();
    }
    reply
}

fn json(status: StatusCode, bytes: Bytes) -> Reply {
    let mut reply = Response::new(Outgoing::from(bytes));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, JSON);
    reply
}

fn empty(status: StatusCode) -> Reply {
    let mut reply = Response::new(Outgoing::default());
    *reply.status_mut() = status;
    reply
}
