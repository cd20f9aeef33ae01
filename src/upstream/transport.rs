//! Sends requests to the Unleash server: addresses, tokens, redirects, sizes, and the outcome in metrics
//! and health.
//!
//! It does not know what is requested (`client` does). Nothing here retries. Redirects are followed only
//! within upstream's origin.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use jiff::Timestamp;
use reqwest::{
    Client, Method, RequestBuilder, Response, StatusCode, Url,
    header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER},
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{
    error::{self, Error},
    health::{self, HealthTracker},
    http_client::{self, Config},
    redirect_policy::Redirect,
    request_metrics::{self, RequestOutcome, UpstreamOperation},
};
use crate::{protocol::byte_order_mark::without_byte_order_mark, token::Token};

pub(super) const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The largest number of redirects followed per request.
const MAX_REDIRECTS: u32 = 5;

/// The largest response body accepted from upstream, in bytes after decompression.
const MAX_BODY: usize = 256 << 20;

/// The HTTP client for one server, with its address and limits.
pub(super) struct Transport {
    pub(super) http_client: Client,
    pub(super) url: Url,
    pub(super) token_header: HeaderName,
    pub(super) request_timeout: Duration,
    pub(super) max_body: usize,
    pub(super) health_tracker: Arc<HealthTracker>,
}

/// A successful response with its complete body.
pub(super) struct BufferedResponse {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Transport {
    /// Builds the HTTP client for the server of `config`. Does not connect yet.
    pub(super) fn new(config: Config) -> Result<Self, Error> {
        if !matches!(config.url.scheme(), "http" | "https") {
            return Err(Error::InvalidScheme);
        }
        health::describe_metrics();
        request_metrics::describe_metrics();
        let http_client = http_client::build(&config)?;
        let Config { url, token_header, request_timeout, .. } = config;
        let health_tracker = Arc::default();
        Ok(Self {
            http_client,
            url,
            token_header,
            request_timeout,
            max_body: MAX_BODY,
            health_tracker,
        })
    }

    /// A request for a path below the server's URL, with a token if given.
    pub(super) fn request(
        &self,
        method: Method,
        path: &[&str],
        token: Option<&Token>,
    ) -> RequestBuilder {
        self.without_timeout(method, path, token).timeout(self.request_timeout)
    }

    /// A request without a total timeout.
    pub(super) fn without_timeout(
        &self,
        method: Method,
        path: &[&str],
        token: Option<&Token>,
    ) -> RequestBuilder {
        self.request_url(method, self.url_of(path), token)
    }

    /// The URL of a path below the server's URL.
    pub(super) fn url_of(&self, path: &[&str]) -> Url {
        let mut url = self.url.clone();
        url.path_segments_mut()
            .expect("URLs of http and https have a path")
            .pop_if_empty()
            .extend(path);
        url
    }

    /// A request for a URL of the server, without a total timeout.
    pub(super) fn request_url(
        &self,
        method: Method,
        url: Url,
        token: Option<&Token>,
    ) -> RequestBuilder {
        let mut request = self.http_client.request(method, url);
        if let Some(token) = token {
            let mut value =
                HeaderValue::from_str(token.expose()).expect("tokens are visible ASCII");
            value.set_sensitive(true);
            let headers = HeaderMap::from_iter([(self.token_header.clone(), value)]);
            request = request.headers(headers);
        }
        request
    }

    /// Sends a request, parses its response and records the outcome.
    pub(super) async fn call<T>(
        &self,
        purpose: UpstreamOperation,
        request: RequestBuilder,
        parse: impl FnOnce(BufferedResponse) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let started = Instant::now();
        let answer = self.send(request).await;
        let status = answer.as_ref().ok().map(|answer| answer.status);
        let result = answer.and_then(parse);
        self.record(purpose, status, &result, started);
        result
    }

    /// Records the outcome of a request in metrics and health.
    pub(super) fn record<T>(
        &self,
        purpose: UpstreamOperation,
        status: Option<StatusCode>,
        result: &Result<T, Error>,
        started: Instant,
    ) {
        request_metrics::record(
            purpose,
            RequestOutcome::from_result(status, result),
            started.elapsed(),
        );
        self.health_tracker.record(result);
    }

    /// Sends a request and reads its response, with any successful status.
    pub(super) async fn send(&self, request: RequestBuilder) -> Result<BufferedResponse, Error> {
        let response = self.send_following_redirects(request).await?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = read_body(response, self.max_body).await?;
        Ok(BufferedResponse { status, headers, body })
    }

    /// Sends a request and follows redirects within upstream's origin; returns the response, its body
    /// unread.
    pub(super) async fn send_following_redirects(
        &self,
        request: RequestBuilder,
    ) -> Result<Response, Error> {
        let mut request = request.build().map_err(Error::from_transport)?;
        let mut followed = 0;
        loop {
            let again = request.try_clone();
            let (method, url) = (request.method().clone(), request.url().clone());
            let response =
                self.http_client.execute(request).await.map_err(Error::from_transport)?;
            let status = response.status();
            if status.is_success() || status == StatusCode::NOT_MODIFIED {
                return Ok(response);
            }
            if !status.is_redirection() {
                let pause = response.headers().get(RETRY_AFTER);
                let pause = pause.and_then(|it| error::parse_retry_after(it, Timestamp::now()));
                return Err(Error::Status { status, retry_after: pause });
            }
            let redirect = Redirect::from_response(&response, method, url);
            let next = redirect.followable_target(&self.url).filter(|_| followed < MAX_REDIRECTS);
            let (Some(url), Some(again)) = (next, again) else {
                return Err(Error::Redirect { status, target: redirect.display_target(&self.url) });
            };
            request = again;
            *request.url_mut() = url;
            followed += 1;
        }
    }
}

pub(super) fn with_json_body(request: RequestBuilder, body: &impl Serialize) -> RequestBuilder {
    let body = serde_json::to_vec(body).expect("shapes of text always serialize");
    request.header(CONTENT_TYPE, JSON).body(body)
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that `call` wants")]
pub(super) fn parse_json<T: for<'de> Deserialize<'de>>(
    answer: BufferedResponse,
) -> Result<T, Error> {
    serde_json::from_slice(without_byte_order_mark(&answer.body)).map_err(Error::from_decode)
}

#[expect(clippy::unnecessary_wraps, reason = "the shape that `call` wants")]
pub(super) fn accept_any_body(_: BufferedResponse) -> Result<(), Error> {
    Ok(())
}

/// Reads a body of at most `limit` bytes.
pub(super) async fn read_body(mut response: Response, limit: usize) -> Result<Bytes, Error> {
    let Some(first) = response.chunk().await.map_err(Error::from_transport)? else {
        return Ok(Bytes::new());
    };
    let mut whole = BytesMut::from(first);
    while whole.len() <= limit {
        match response.chunk().await.map_err(Error::from_transport)? {
            Some(chunk) => whole.extend_from_slice(&chunk),
            None => return Ok(whole.freeze()),
        }
    }
    Err(Error::TooLarge { limit })
}
