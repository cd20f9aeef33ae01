//! What goes back: the only place that chooses status codes.
//!
//! A [`Failure`] says what is wrong; a table says which status that is, and
//! its `Display` is the message that the client reads. Messages never repeat what a client sent.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Response, StatusCode,
    header::{
        ALLOW, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, ETAG, HeaderValue, RETRY_AFTER, VARY,
        WWW_AUTHENTICATE,
    },
};

use super::{coding, conditional};
use crate::snapshot::body::{Body, Coded, Coding};

/// A response, whole: every body that is served is in memory.
pub type Reply = Response<Full<Bytes>>;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const PROMETHEUS_TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4");
const BY_CODING: HeaderValue = HeaderValue::from_static("accept-encoding");
const REVALIDATE: HeaderValue = HeaderValue::from_static("no-cache");

/// Why a request is not served.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// No authorization header, or one that no issuer knows. The text is Unleash's own, which SDKs'
    /// users search for.
    #[error(
        "This endpoint requires an API token. Please add an authorization header to your request \
         with a valid token"
    )]
    Unauthorized,
    /// A valid token of another kind. The text is Unleash's own.
    #[error("invalid token: expected a different token type for this endpoint")]
    WrongKind,
    /// A valid token of an environment that is not served here, and will not be by itself.
    #[error("this instance does not serve the environment of this token")]
    NotServed,
    /// The client's address is not served here.
    #[error("requests from this address are not allowed")]
    Blocked,
    /// Something that would answer is not there yet, or not reachable.
    #[error("{what}; try again later")]
    Unavailable {
        /// What is missing.
        what: &'static str,
        /// When trying again makes sense.
        retry_after: Duration,
    },
    /// No resource of this path.
    #[error("not found")]
    NotFound,
    /// The resource knows other methods.
    #[error("this resource allows {0}")]
    Method(&'static str),
    /// A body in something else than JSON.
    #[error("the body must be JSON, sent with content-type application/json")]
    MediaType,
    /// A body or query that says nothing usable; the text tells where.
    #[error("{0}")]
    Malformed(String),
    /// A body beyond the limit.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// A request that took longer than one may, mostly to arrive.
    #[error("the request took longer than {0:?}")]
    TooSlow(Duration),
    /// Our own fault.
    #[error("internal error")]
    Internal,
}

impl Failure {
    fn status(&self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::WrongKind | Self::NotServed | Self::Blocked => StatusCode::FORBIDDEN,
            Self::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::MediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Malformed(_) => StatusCode::BAD_REQUEST,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooSlow(_) => StatusCode::REQUEST_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The name that Unleash gives errors of this status in its JSON.
    fn name(&self) -> &'static str {
        match self {
            Self::Unauthorized => "AuthenticationRequired",
            Self::WrongKind | Self::NotServed | Self::Blocked => "NoAccessError",
            Self::Unavailable { .. } => "UnavailableError",
            Self::NotFound => "NotFoundError",
            Self::Method(_) => "MethodNotAllowedError",
            Self::MediaType => "UnsupportedMediaTypeError",
            Self::Malformed(_) => "BadDataError",
            Self::TooLarge(_) => "ContentTooLargeError",
            Self::TooSlow(_) => "RequestTimeoutError",
            Self::Internal => "InternalError",
        }
    }
}

impl From<Failure> for Reply {
    fn from(failure: Failure) -> Self {
        let text = serde_json::json!({ "name": failure.name(), "message": failure.to_string() });
        let mut reply = json(failure.status(), Bytes::from(text.to_string()));
        let headers = reply.headers_mut();
        match failure {
            Failure::Unavailable { retry_after, .. } => {
                let seconds = retry_after.as_secs().max(1);
                headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
            }
            Failure::Method(methods) => {
                headers.insert(ALLOW, HeaderValue::from_static(methods));
            }
            Failure::Unauthorized => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
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

/// A JSON document that is served as it is.
pub fn ok(text: impl Into<Bytes>) -> Reply {
    json(StatusCode::OK, text.into())
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
