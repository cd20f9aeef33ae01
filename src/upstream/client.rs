//! The requests of Parapet to the Unleash server.
//!
//! Most go through [`Upstream::call`], which limits, times, counts and classifies them. Relayed
//! requests, streams and access probes do this themselves. Nothing here retries. Redirects are followed
//! only within upstream's origin.

use std::{fmt, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use jiff::Timestamp;
use reqwest::{
    Client, Method, RequestBuilder, Response, StatusCode, Url,
    header::{
        ACCEPT, ACCEPT_ENCODING, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue,
        IF_NONE_MATCH, RETRY_AFTER,
    },
};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};

use super::{
    admin_token::AdminToken,
    error::{self, Error},
    event_stream::UpstreamEventStream,
    health::{self, Health, HealthTracker, RequestOutcome, UpstreamOperation},
    http_client::{self, Config},
    redirect_policy::Redirect,
};
use crate::{
    protocol::{
        byte_order_mark::without_byte_order_mark,
        delta::EventId,
        tokens::{
            CreateTokenRequest, CreatedToken, EnvironmentList, ListedEnvironment, ListedSecret,
            ListedToken, TokenList, ValidateRequest, ValidateResponse, ValidatedToken,
        },
    },
    token::{Environment, Token, TokenKind},
};

/// A name that exists on no server, neither as a flag nor as a path.
const NONEXISTENT_NAME: &str = "parapet-asks-for-nothing";

/// The timeout for sending usage and creating a token. It is longer than for other requests: a retry of
/// a batch that upstream is still storing would count it twice, and the secret of a created token is
/// returned only once.
const LONG_TIMEOUT: Duration = Duration::from_secs(30);

/// The largest number of redirects followed per request.
const MAX_REDIRECTS: u32 = 5;

/// The largest response body accepted from upstream, in bytes after decompression.
const MAX_BODY: usize = 256 << 20;

/// The largest response body that is relayed, in bytes.
const MAX_RELAYED_BODY: usize = 32 << 20;

/// The client of the upstream Unleash server.
///
/// A cheap handle: clones share connections and [`Health`]. Dropping a request's future cancels the
/// request.
#[derive(Clone)]
pub struct Upstream(Arc<Inner>);

struct Inner {
    http_client: Client,
    url: Url,
    token_header: HeaderName,
    request_timeout: Duration,
    max_body: usize,
    health_tracker: Arc<HealthTracker>,
}

/// The response to a request for flags.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FeaturesResponse {
    /// The flags.
    pub flags: FetchResult,
    /// Whether upstream asks polling clients to use its streams.
    pub prefers_streaming: bool,
}

/// The result of a conditional request for flags.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FetchResult {
    /// The flags with the `ETag` of the request are still current (304).
    NotModified,
    /// A flag set.
    Changed {
        /// The JSON as upstream sent it, decompressed.
        body: Bytes,
        /// The `ETag` for the next request.
        etag: Option<String>,
    },
}

/// Whether upstream's API accepts a token that its validation called valid.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TokenAccess {
    /// It accepts the token.
    Granted,
    /// It knows the token, but grants it no access (403).
    Forbidden,
    /// It no longer knows the token (401).
    Unauthorized,
}

/// A successful response with its complete body.
struct BufferedResponse {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Upstream {
    /// Builds the client for the server of `config`. Does not connect yet.
    pub fn new(config: Config) -> Result<Self, Error> {
        Self::with_max_body(config, MAX_BODY)
    }

    fn with_max_body(config: Config, max_body: usize) -> Result<Self, Error> {
        if !matches!(config.url.scheme(), "http" | "https") {
            return Err(Error::InvalidScheme);
        }
        health::describe();
        let http_client = http_client::build(&config)?;
        let Config { url, token_header, request_timeout, .. } = config;
        let health_tracker = Arc::default();
        Ok(Self(Arc::new(Inner {
            http_client,
            url,
            token_header,
            request_timeout,
            max_body,
            health_tracker,
        })))
    }

    /// The scheme, host and port of upstream's URL, without credentials and path.
    pub fn origin(&self) -> String {
        self.0.url.origin().ascii_serialization()
    }

    /// The health of upstream as seen by this client.
    pub fn health(&self) -> Health {
        self.0.health_tracker.health()
    }

    /// Fetches the flags of `token`; a conditional request if `etag` is given.
    pub async fn fetch_features(
        &self,
        token: &Token,
        etag: Option<&str>,
    ) -> Result<FeaturesResponse, Error> {
        let mut request = self.request(Method::GET, &["api", "client", "features"], Some(token));
        let known = etag.and_then(strong_etag);
        let conditional = known.is_some();
        if let Some(known) = known {
            request = request.header(IF_NONE_MATCH, known);
        }
        self.call(UpstreamOperation::Features, request, |answer| {
            let prefers_streaming =
                answer.headers.get(FETCH_MODE).is_some_and(|mode| mode == "streaming");
            let flags = match answer.status {
                StatusCode::NOT_MODIFIED if conditional => FetchResult::NotModified,
                StatusCode::NOT_MODIFIED => return Err(Error::UnexpectedNotModified),
                _ => {
                    let etag = answer.headers.get(ETAG).and_then(|it| it.to_str().ok());
                    FetchResult::Changed { etag: etag.map(str::to_owned), body: answer.body }
                }
            };
            Ok(FeaturesResponse { flags, prefers_streaming })
        })
        .await
    }

    /// Opens the event stream of `token`'s flags, resuming after the event `last` if given. `None` if
    /// upstream does not support streaming.
    pub async fn open_stream(
        &self,
        token: &Token,
        last: Option<EventId>,
    ) -> Result<Option<UpstreamEventStream>, Error> {
        let started = Instant::now();
        let path = &["api", "client", "streaming"];
        // No compression: a proxy may fail to flush the encoder after each event.
        let request = self
            .without_timeout(Method::GET, path, Some(token))
            .header(ACCEPT, EVENT_STREAM)
            .header(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let request = last.into_iter().fold(request, |it, last| it.header(LAST_EVENT_ID, last));
        let limit = self.0.request_timeout;
        let head = timeout(limit, self.send_following_redirects(request)).await;
        let answer = match head.unwrap_or(Err(Error::StreamTimeout(limit))) {
            Ok(response) if is_event_stream(&response) => Ok(Some(UpstreamEventStream::new(
                response,
                self.0.max_body,
                &self.0.health_tracker,
            ))),
            Ok(_) => Ok(None),
            Err(Error::Status { status, .. }) if is_path_missing(status) => Ok(None),
            Err(error) => Err(error),
        };
        let outcome = match &answer {
            Ok(None) => RequestOutcome::NotSupported,
            Ok(Some(_)) | Err(_) => RequestOutcome::from_result(None, &answer),
        };
        health::record_request(UpstreamOperation::Stream, outcome, started.elapsed());
        self.0.health_tracker.record(&answer);
        answer
    }

    /// Validates `tokens`. The reply contains the valid ones with their grants, and omits the others.
    ///
    /// The requests (Unleash's `POST /edge/validate`) carry no `Authorization`. The tokens are split
    /// into several requests if one would exceed upstream's size limit.
    pub async fn validate_tokens(&self, tokens: &[Token]) -> Result<Vec<ValidatedToken>, Error> {
        let mut valid = Vec::new();
        let mut rest = tokens;
        while !rest.is_empty() {
            let (batch, more) = rest.split_at(batch_len(rest));
            let body = ValidateRequest { tokens: batch.into() };
            let request =
                with_json_body(self.request(Method::POST, &["edge", "validate"], None), &body);
            let reply: ValidateResponse =
                self.call(UpstreamOperation::Validate, request, parse_json).await?;
            valid.extend(reply.tokens);
            rest = more;
        }
        Ok(valid)
    }

    /// Probes whether upstream's API still accepts a token of this kind that its validation called
    /// valid.
    ///
    /// Unleash's `/edge/validate` keeps calling a deleted token valid (measured on 7.5.1 and 8.2.0),
    /// while its APIs refuse it within a minute. The probe requests a resource that does not exist. The
    /// response is 404 if the token is accepted, 401 if it is unknown, and 403 if it is known but has no
    /// access: a client token of all environments (measured on 8.2.0), or a token of an environment that
    /// an upstream edge does not serve.
    pub async fn probe_access(&self, token: &Token, kind: TokenKind) -> Result<TokenAccess, Error> {
        let path: &[&str] = match kind {
            TokenKind::Client => &["api", "client", "features", NONEXISTENT_NAME],
            // Edges serve this path too; they reject every token on others.
            TokenKind::Frontend => &["api", "frontend", "features", NONEXISTENT_NAME],
            TokenKind::Admin => &["api", "admin", "environments"],
        };
        let started = Instant::now();
        let answer = self.send(self.request(Method::GET, path, Some(token))).await;
        // These are expected results of the probe, not failures of upstream.
        let access = match answer {
            Err(Error::Status { status: StatusCode::UNAUTHORIZED, .. }) => {
                Ok(TokenAccess::Unauthorized)
            }
            Err(Error::Status { status: StatusCode::FORBIDDEN, .. }) => Ok(TokenAccess::Forbidden),
            Ok(_) | Err(Error::Status { status: StatusCode::NOT_FOUND, .. }) => {
                Ok(TokenAccess::Granted)
            }
            Err(error) => Err(error),
        };
        self.record(UpstreamOperation::Probe, None, &access, started);
        access
    }

    /// Sends a batch of usage: a body of `/api/client/metrics/bulk`.
    ///
    /// Upstream silently drops usage that does not belong to the environment of `token`.
    pub(super) async fn send_usage(&self, token: &Token, body: Bytes) -> Result<(), Error> {
        let path = &["api", "client", "metrics", "bulk"];
        let request =
            self.request(Method::POST, path, Some(token)).timeout(LONG_TIMEOUT).body(body);
        self.call(UpstreamOperation::Usage, request.header(CONTENT_TYPE, JSON), ignore_body).await
    }

    /// Lists upstream's environments.
    pub async fn list_environments(
        &self,
        admin: &AdminToken,
    ) -> Result<Vec<ListedEnvironment>, Error> {
        let request = |token: &Token| {
            self.request(Method::GET, &["api", "admin", "environments"], Some(token))
        };
        let list: EnvironmentList =
            self.call_as_admin(admin, UpstreamOperation::Environments, request, parse_json).await?;
        Ok(list.environments)
    }

    /// Lists upstream's tokens.
    pub async fn list_api_tokens(&self, admin: &AdminToken) -> Result<TokenList, Error> {
        let request =
            |token: &Token| self.request(Method::GET, &["api", "admin", "api-tokens"], Some(token));
        self.call_as_admin(admin, UpstreamOperation::ListTokens, request, parse_json).await
    }

    /// Lists upstream's tokens with this name.
    pub async fn list_api_tokens_named(
        &self,
        admin: &AdminToken,
        name: &str,
    ) -> Result<Vec<ListedToken>, Error> {
        let path = &["api", "admin", "api-tokens", name];
        let request = |token: &Token| self.request(Method::GET, path, Some(token));
        let list: TokenList =
            self.call_as_admin(admin, UpstreamOperation::ListTokens, request, parse_json).await?;
        Ok(list.tokens)
    }

    /// Creates a backend token for all projects of `environment`.
    pub async fn create_token(
        &self,
        admin: &AdminToken,
        name: &str,
        environment: &Environment,
    ) -> Result<Token, Error> {
        let body = CreateTokenRequest::backend(name, environment);
        let path = &["api", "admin", "api-tokens"];
        let request = |token: &Token| {
            with_json_body(self.request(Method::POST, path, Some(token)), &body)
                .timeout(LONG_TIMEOUT)
        };
        let created: CreatedToken =
            self.call_as_admin(admin, UpstreamOperation::CreateToken, request, parse_json).await?;
        Ok(created.secret)
    }

    /// Deletes a token. An unknown token is not an error.
    pub async fn delete_token(
        &self,
        admin: &AdminToken,
        secret: &ListedSecret,
    ) -> Result<(), Error> {
        let path = &["api", "admin", "api-tokens", secret.expose()];
        let request = |token: &Token| self.request(Method::DELETE, path, Some(token));
        self.call_as_admin(admin, UpstreamOperation::DeleteToken, request, ignore_body).await
    }

    /// The header that carries tokens to upstream.
    pub fn token_header(&self) -> &HeaderName {
        &self.0.token_header
    }

    /// Relays a request, whose URI is a path and query below the server's URL, and returns the response
    /// with any status.
    ///
    /// Adds only the default headers of the configuration.
    pub async fn relay(
        &self,
        original: hyper::Request<Bytes>,
    ) -> Result<hyper::Response<Bytes>, Error> {
        let started = Instant::now();
        let (head, content) = original.into_parts();
        let mut url = self.0.url.clone();
        url.set_path(&format!("{}{}", url.path().trim_end_matches('/'), head.uri.path()));
        url.set_query(head.uri.query());
        let request =
            self.0.http_client.request(head.method, url).headers(head.headers).body(content);
        let request = request.timeout(self.0.request_timeout);
        let answer = async {
            let response = request.send().await.map_err(Error::from_transport)?;
            let (status, headers) = (response.status(), response.headers().clone());
            let mut answer = hyper::Response::new(read_body(response, MAX_RELAYED_BODY).await?);
            *answer.status_mut() = status;
            *answer.headers_mut() = headers;
            Ok(answer)
        };
        let answer = answer.await;
        let status = answer.as_ref().ok().map(hyper::Response::status);
        self.record(UpstreamOperation::Relay, status, &answer, started);
        answer
    }

    fn request(&self, method: Method, path: &[&str], token: Option<&Token>) -> RequestBuilder {
        self.without_timeout(method, path, token).timeout(self.0.request_timeout)
    }

    /// A request without a total timeout.
    fn without_timeout(
        &self,
        method: Method,
        path: &[&str],
        token: Option<&Token>,
    ) -> RequestBuilder {
        let mut url = self.0.url.clone();
        url.path_segments_mut()
            .expect("URLs of http and https have a path")
            .pop_if_empty()
            .extend(path);
        let mut request = self.0.http_client.request(method, url);
        if let Some(token) = token {
            let mut value =
                HeaderValue::from_str(token.expose()).expect("tokens are visible ASCII");
            value.set_sensitive(true);
            let headers = HeaderMap::from_iter([(self.0.token_header.clone(), value)]);
            request = request.headers(headers);
        }
        request
    }

    /// Sends a request, parses its response and records the outcome.
    async fn call<T>(
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

    /// Sends a request with the admin token, and records whether upstream accepts the token.
    ///
    /// Only the token lists decide that: a proxy may block a single other endpoint.
    async fn call_as_admin<T>(
        &self,
        admin: &AdminToken,
        purpose: UpstreamOperation,
        request: impl FnOnce(&Token) -> RequestBuilder,
        parse: impl FnOnce(BufferedResponse) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let token = admin.current();
        let result = self.call(purpose, request(&token), parse).await;
        match (&result, purpose) {
            (Ok(_), UpstreamOperation::ListTokens) => admin.mark_accepted(&token),
            (
                Err(Error::Status { status: StatusCode::UNAUTHORIZED, .. }),
                UpstreamOperation::ListTokens,
            ) => {
                admin.mark_refused(&token);
            }
            (Err(Error::Status { status: StatusCode::UNAUTHORIZED, .. }), _) => {
                admin.request_reload();
            }
            (Ok(_) | Err(_), _) => {}
        }
        result
    }

    /// Records the outcome of a request in metrics and health.
    fn record<T>(
        &self,
        purpose: UpstreamOperation,
        status: Option<StatusCode>,
        result: &Result<T, Error>,
        started: Instant,
    ) {
        health::record_request(
            purpose,
            RequestOutcome::from_result(status, result),
            started.elapsed(),
        );
        self.0.health_tracker.record(result);
    }

    async fn send(&self, request: RequestBuilder) -> Result<BufferedResponse, Error> {
        let response = self.send_following_redirects(request).await?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = read_body(response, self.0.max_body).await?;
        Ok(BufferedResponse { status, headers, body })
    }

    /// Sends a request and follows redirects within upstream's origin; returns the response, its body
    /// unread.
    async fn send_following_redirects(&self, request: RequestBuilder) -> Result<Response, Error> {
        let mut request = request.build().map_err(Error::from_transport)?;
        let mut followed = 0;
        loop {
            let again = request.try_clone();
            let (method, url) = (request.method().clone(), request.url().clone());
            let response =
                self.0.http_client.execute(request).await.map_err(Error::from_transport)?;
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
            let next = redirect.followable_target(&self.0.url).filter(|_| followed < MAX_REDIRECTS);
            let (Some(url), Some(again)) = (next, again) else {
                return Err(Error::Redirect {
                    status,
                    target: redirect.display_target(&self.0.url),
                });
            };
            request = again;
            *request.url_mut() = url;
            followed += 1;
        }
    }
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The URL may hold a password.
        f.debug_struct("Upstream").field("host", &self.0.url.host_str()).finish_non_exhaustive()
    }
}

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const EVENT_STREAM: HeaderValue = HeaderValue::from_static("text/event-stream");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// The header in which upstream tells clients whether to poll or to stream.
const FETCH_MODE: HeaderName = HeaderName::from_static("fetch-mode");

fn with_json_body(request: RequestBuilder, body: &impl Serialize) -> RequestBuilder {
    let body = serde_json::to_vec(body).expect("shapes of text always serialize");
    request.header(CONTENT_TYPE, JSON).body(body)
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that `call` wants")]
fn parse_json<T: for<'de> Deserialize<'de>>(answer: BufferedResponse) -> Result<T, Error> {
    serde_json::from_slice(without_byte_order_mark(&answer.body)).map_err(Error::from_decode)
}

#[expect(clippy::unnecessary_wraps, reason = "the shape that `call` wants")]
fn ignore_body(_: BufferedResponse) -> Result<(), Error> {
    Ok(())
}

/// Whether a response is an event stream, rather than a server's default page for unknown paths.
fn is_event_stream(response: &Response) -> bool {
    let kind = response.headers().get(CONTENT_TYPE).and_then(|it| it.to_str().ok());
    let kind = kind.and_then(|it| it.split(';').next()).map(str::trim);
    response.status() == StatusCode::OK
        && kind.is_some_and(|it| it.eq_ignore_ascii_case("text/event-stream"))
}

/// Whether a status means that the server does not have the path, for any token.
fn is_path_missing(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED
    )
}

/// How many of `tokens`, at least one, fit into one request: Unleash accepts at most 100 kB of JSON.
fn batch_len(tokens: &[Token]) -> usize {
    const MOST: usize = 90_000;
    let mut size = 0;
    let fit = tokens.iter().take_while(|token| {
        size += token.expose().len() + r#""","#.len();
        size <= MOST
    });
    fit.count().max(1)
}

/// The `ETag` as upstream issued it, without `W/`. Unleash compares `ETag`s as text, so a `W/` that a
/// proxy has added would never match.
fn strong_etag(etag: &str) -> Option<HeaderValue> {
    HeaderValue::from_str(etag.strip_prefix("W/").unwrap_or(etag)).ok()
}

/// Reads a body of at most `limit` bytes.
async fn read_body(mut response: Response, limit: usize) -> Result<Bytes, Error> {
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

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU16, Ordering},
        time::Duration,
    };

    use super::{
        super::{
            error::{Fault, Retry},
            scripted::{ScriptedReply, ScriptedServer, config},
        },
        *,
    };
    use crate::telemetry::error_chain;

    const SECRET: &str = "*:development.964a287e1b728cb5f4f3e0120df92cb5f4f3e0120df92cb5964a287e";

    fn token() -> Token {
        Token::parse(SECRET).expect("token")
    }

    /// Fetches flags from a server that always sends this reply.
    async fn fetch(
        reply: ScriptedReply,
        etag: Option<&str>,
    ) -> (Result<FetchResult, Error>, Upstream) {
        let server = ScriptedServer::start(move |_| reply.clone()).await;
        let upstream = Upstream::with_max_body(server.config(), 64).expect("client");
        (upstream.fetch_features(&token(), etag).await.map(|it| it.flags), upstream)
    }

    #[tokio::test]
    async fn requests_carry_token_app_names_and_configured_headers() {
        let server = ScriptedServer::start(|_| (202, &[], String::new())).await;
        let mut config = server.config();
        config.token_header = HeaderName::from_static("x-token");
        let name = |text| HeaderName::from_static(text);
        config.extra_headers = vec![
            (name("x-extra"), HeaderValue::from_static("a")),
            (name("unleash-instanceid"), HeaderValue::from_static("mine")),
        ];
        let upstream = Upstream::new(config).expect("client");
        upstream.send_usage(&token(), Bytes::from_static(b"{}")).await.expect("202");
        let seen = server.received_requests();
        let [request] = seen.as_slice() else { panic!("{seen:?}") };
        assert_eq!(request.line, "POST /base/api/client/metrics/bulk");
        assert_eq!(request.body, "{}");
        for (name, value) in [
            ("x-token", SECRET),
            ("x-extra", "a"),
            ("unleash-instanceid", "mine"),
            ("unleash-appname", "parapet"),
            ("unleash-client-spec", "6.1.0"),
            ("content-type", "application/json"),
            ("user-agent", concat!("parapet/", env!("CARGO_PKG_VERSION"))),
        ] {
            assert_eq!(request.headers[name], value, "{name}");
        }
        assert_eq!(request.headers["unleash-connection-id"].len(), 26);
        assert!(request.headers.get("authorization").is_none());
    }

    #[tokio::test]
    async fn etag_is_sent_in_strong_form_and_yields_304() {
        let server = ScriptedServer::start(|request| match request.headers.get(IF_NONE_MATCH) {
            Some(known) if known == "\"a:1:v1\"" => (304, &[], String::new()),
            _ => (200, &[("etag", "W/\"a:1:v1\"")], "{}".to_owned()),
        })
        .await;
        let upstream = Upstream::new(server.config()).expect("client");
        let first = upstream.fetch_features(&token(), None).await.expect("200").flags;
        let FetchResult::Changed { body, etag } = first else { panic!("{first:?}") };
        assert_eq!((&body[..], etag.as_deref()), (&b"{}"[..], Some("W/\"a:1:v1\"")));
        let second = upstream.fetch_features(&token(), etag.as_deref()).await.expect("304");
        assert_eq!(
            second,
            FeaturesResponse { flags: FetchResult::NotModified, prefers_streaming: false }
        );
    }

    #[tokio::test]
    async fn invalid_etags_never_panic() {
        let (fetched, _) = fetch((200, &[("etag", "\"~\"")], "{}".to_owned()), Some("\n")).await;
        assert_eq!(
            fetched.expect("200"),
            FetchResult::Changed { body: Bytes::from_static(b"{}"), etag: None }
        );
        let (unasked, _) = fetch((304, &[], String::new()), None).await;
        assert!(matches!(unasked, Err(Error::UnexpectedNotModified)), "{unasked:?}");
    }

    #[tokio::test]
    async fn fetch_mode_header_can_request_streaming() {
        for (mode, prefers_streaming) in [("streaming", true), ("polling", false)] {
            let headers: &'static [_] = vec![("fetch-mode", mode)].leak();
            let server = ScriptedServer::start(move |_| (200, headers, "{}".to_owned())).await;
            let upstream = Upstream::new(server.config()).expect("client");
            let polled = upstream.fetch_features(&token(), None).await.expect("200");
            assert_eq!(polled.prefers_streaming, prefers_streaming, "{mode}");
        }
    }

    const STREAM: &[(&str, &str)] = &[("content-type", "Text/Event-Stream; charset=utf-8")];

    #[tokio::test]
    async fn stream_request_sends_last_event_id_and_yields_events() {
        let events = "event: e\nid: 7\ndata: x\n\n";
        let server = ScriptedServer::start(move |_| (200, STREAM, events.to_owned())).await;
        let upstream = Upstream::new(server.config()).expect("client");
        for last in [None, Some(7)] {
            let stream = upstream.open_stream(&token(), last).await.expect("200");
            let mut stream = stream.expect("a stream");
            let events = stream.next_events().await.expect("no failure").expect("events");
            assert_eq!((events.len(), &*events[0].id), (1, "7"));
            assert_eq!(stream.next_events().await.expect("no failure"), None);
        }
        let [first, second] = &server.received_requests()[..] else {
            panic!("{:?}", server.received_requests())
        };
        assert_eq!(first.line, "GET /base/api/client/streaming");
        let header = |name: &str| second.headers[name].to_str().expect("text");
        assert_eq!(header("accept"), "text/event-stream");
        assert_eq!(header("accept-encoding"), "identity");
        assert_eq!(header("authorization"), SECRET);
        assert_eq!(header("unleash-appname"), "parapet");
        assert_eq!((first.headers.get("last-event-id"), header("last-event-id")), (None, "7"));
    }

    #[tokio::test]
    async fn missing_stream_support_is_not_an_error_but_failure_is() {
        let follow = async |status: u16, headers: &'static [_]| {
            let server =
                ScriptedServer::start(move |_| (status, headers, "<html>".to_owned())).await;
            let upstream = Upstream::new(server.config()).expect("client");
            (upstream.open_stream(&token(), None).await, upstream.health())
        };
        for (status, headers) in [(404, STREAM), (405, &[]), (501, &[]), (200, &[]), (204, STREAM)]
        {
            let (answer, health) = follow(status, headers).await;
            assert!(answer.expect("an answer").is_none(), "{status}");
            assert_eq!((health.consecutive_failures, health.last_error), (0, None));
        }
        for status in [401, 429, 500] {
            let (answer, health) = follow(status, &[("retry-after", "7")]).await;
            let error = answer.expect_err("a failure");
            assert_eq!(error.status().map(|it| it.as_u16()), Some(status));
            assert_eq!(health.last_error.map(|(_, text)| text), Some(error_chain(&error)));
        }
    }

    #[tokio::test]
    async fn stream_head_and_other_responses_time_out() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let mut config = config(&format!("http://{}", listener.local_addr().expect("an address")));
        config.request_timeout = Duration::from_millis(50);
        let upstream = Upstream::new(config).expect("client");
        let error = upstream.open_stream(&token(), None).await.expect_err("no head");
        assert!(matches!(error, Error::StreamTimeout(_)), "{error:?}");
        let error = upstream.fetch_features(&token(), None).await.expect_err("no answer");
        assert!(matches!(error, Error::Timeout(_)), "{error:?}");
        let relayed = upstream.relay(hyper::Request::new(Bytes::new())).await;
        let error = relayed.expect_err("no answer");
        assert!(matches!(error, Error::Timeout(_)), "{error:?}");
    }

    #[tokio::test]
    async fn body_larger_than_limit_is_rejected() {
        let (fits, _) = fetch((200, &[], "x".repeat(64)), None).await;
        assert!(fits.is_ok(), "{fits:?}");
        let (large, _) = fetch((200, &[], "x".repeat(65)), None).await;
        assert!(matches!(large, Err(Error::TooLarge { limit: 64 })), "{large:?}");
    }

    #[tokio::test]
    async fn failures_are_classified_and_recorded_in_health() {
        let (throttled, upstream) =
            fetch((429, &[("retry-after", "7")], String::new()), None).await;
        let error = throttled.expect_err("429");
        assert_eq!(error.retry(), Retry::Later(Some(Duration::from_secs(7))));
        assert_eq!(error.status(), Some(StatusCode::TOO_MANY_REQUESTS));
        let health = upstream.health();
        assert_eq!((health.consecutive_failures, health.last_success), (1, None));
        let (_, text) = health.last_error.expect("an error");
        assert_eq!(text, "upstream answered 429 Too Many Requests");

        let (refused, upstream) = fetch((403, &[], String::new()), None).await;
        assert!(refused.expect_err("403").is_unauthorized());
        assert_eq!(upstream.health().consecutive_failures, 0);
    }

    #[tokio::test]
    async fn redirect_to_another_origin_is_an_error_and_does_not_leak_the_token() {
        let away = ScriptedServer::start(|_| (200, &[], "{}".to_owned())).await;
        let place = away.config().url;
        let location =
            place.join("api/client/features?key=s3cret").expect("url").to_string().leak();
        let location: &'static [_] = vec![("location", &*location)].leak();
        let (fetched, _) = fetch((302, location, String::new()), None).await;
        let error = fetched.expect_err("302");
        assert!(matches!(error, Error::Redirect { status: StatusCode::FOUND, .. }), "{error:?}");
        let message = error.to_string();
        assert!(message.contains(place.as_str().trim_end_matches('/')), "{message}");
        assert!(!message.contains("s3cret") && !message.contains("features"), "{message}");
        assert_eq!(error.fault(), Fault::Local);
        assert!(away.received_requests().is_empty());
    }

    #[tokio::test]
    async fn redirect_within_origin_is_followed_with_token_and_body() {
        const FEATURES: &[(&str, &str)] = &[("location", "/moved/api/client/features")];
        const BULK: &[(&str, &str)] = &[("location", "/moved/api/client/metrics/bulk")];
        const VALIDATE: &[(&str, &str)] = &[("location", "/moved/edge/validate")];
        let server = ScriptedServer::start(|request| match request.line.as_str() {
            "GET /moved/api/client/features" => (200, &[], "{}".to_owned()),
            "POST /moved/api/client/metrics/bulk" => (202, &[], String::new()),
            line if line.starts_with("GET /base/") => (301, FEATURES, String::new()),
            line if line.contains("/bulk") => (308, BULK, String::new()),
            _ => (302, VALIDATE, String::new()),
        })
        .await;
        let upstream = Upstream::new(server.config()).expect("client");
        upstream.fetch_features(&token(), None).await.expect("301 is followed");
        upstream.send_usage(&token(), Bytes::from_static(b"[7]")).await.expect("308 is followed");
        let seen = server.received_requests();
        assert_eq!(seen[1].headers["authorization"], SECRET);
        let moved = "POST /moved/api/client/metrics/bulk";
        assert_eq!((seen[3].line.as_str(), seen[3].body.as_str()), (moved, "[7]"));
        // A browser would turn this POST into a GET.
        let error = upstream.validate_tokens(&[token()]).await.expect_err("302");
        assert!(error.to_string().contains("/moved"), "{error}");
        assert_eq!(server.received_requests().len(), 5);
    }

    #[tokio::test]
    async fn redirect_to_login_page_grants_no_access() {
        const LOGIN: &[(&str, &str)] = &[("location", "/base/login")];
        for status in [200, 404] {
            let server = ScriptedServer::start(move |request| match request.line.as_str() {
                "GET /base/login" => (status, &[], "{}".to_owned()),
                _ => (302, LOGIN, String::new()),
            })
            .await;
            let upstream = Upstream::new(server.config()).expect("client");
            for kind in [TokenKind::Client, TokenKind::Frontend, TokenKind::Admin] {
                let admitted = upstream.probe_access(&token(), kind).await;
                assert!(matches!(admitted, Err(Error::Redirect { .. })), "{admitted:?}");
            }
        }
    }

    #[tokio::test]
    async fn circular_redirect_is_an_error() {
        const CIRCLE: &[(&str, &str)] = &[("location", "/base/api/client/features")];
        let server = ScriptedServer::start(|_| (307, CIRCLE, String::new())).await;
        let upstream = Upstream::new(server.config()).expect("client");
        let error = upstream.fetch_features(&token(), None).await.expect_err("a circle");
        assert!(matches!(error, Error::Redirect { .. }), "{error:?}");
        assert_eq!(server.received_requests().len(), 6);
    }

    #[tokio::test]
    async fn decode_error_does_not_contain_the_body() {
        let server =
            ScriptedServer::start(|_| (200, &[], format!(r#"{{"tokens":"{SECRET}"}}"#))).await;
        let upstream = Upstream::new(server.config()).expect("client");
        let error = upstream.validate_tokens(&[token()]).await.expect_err("no list");
        assert!(matches!(error, Error::Decode { line: 1, .. }), "{error:?}");
        assert!(!format!("{error:?} {}", error_chain(&error)).contains("964a"));
        assert!(server.received_requests()[0].headers.get("authorization").is_none());
        assert_eq!(server.received_requests()[0].body, format!(r#"{{"tokens":["{SECRET}"]}}"#));
    }

    #[tokio::test]
    async fn admin_token_is_marked_refused_only_by_401_on_token_list() {
        let status = Arc::new(AtomicU16::new(200));
        let answer = Arc::clone(&status);
        let server = ScriptedServer::start(move |request| match answer.load(Ordering::Relaxed) {
            200 if request.line.ends_with("environments") => {
                (200, &[], r#"{"environments":[]}"#.to_owned())
            }
            200 => (200, &[], r#"{"tokens":[]}"#.to_owned()),
            other => (other, &[], String::new()),
        })
        .await;
        let upstream = Upstream::new(server.config()).expect("client");
        let admin = AdminToken::new(Token::parse("*:*.secret").expect("token"), None);
        for other in [200, 403, 404, 429, 500, 503, 302] {
            status.store(other, Ordering::Relaxed);
            assert_eq!(upstream.list_api_tokens(&admin).await.is_ok(), other == 200);
            assert_eq!(admin.refused_since(), None, "{other}");
        }
        status.store(401, Ordering::Relaxed);
        upstream.list_environments(&admin).await.expect_err("401");
        assert_eq!(admin.refused_since(), None, "a proxy may block one endpoint");
        // But a reload of the file is requested.
        admin.reload_requested().await;
        upstream.list_api_tokens(&admin).await.expect_err("401");
        assert!(admin.refused_since().is_some());
        status.store(500, Ordering::Relaxed);
        upstream.list_api_tokens(&admin).await.expect_err("500");
        assert!(admin.refused_since().is_some(), "a 500 is not an acceptance");
        status.store(200, Ordering::Relaxed);
        upstream.list_environments(&admin).await.expect("200");
        assert!(admin.refused_since().is_some(), "another endpoint does not decide");
        upstream.list_api_tokens(&admin).await.expect("200");
        assert_eq!(admin.refused_since(), None);
    }

    #[tokio::test]
    async fn many_tokens_are_validated_in_requests_below_size_limit() {
        let server = ScriptedServer::start(|_| (200, &[], r#"{"tokens":[]}"#.to_owned())).await;
        let upstream = Upstream::new(server.config()).expect("client");
        let tokens = vec![token(); 3000];
        assert_eq!(upstream.validate_tokens(&tokens).await.expect("a reply"), []);
        let sizes: Vec<_> = server.received_requests().iter().map(|it| it.body.len()).collect();
        assert!(sizes.iter().all(|&size| size <= 100_000), "{sizes:?}");
        let sent = server
            .received_requests()
            .iter()
            .map(|it| it.body.matches(SECRET).count())
            .sum::<usize>();
        assert_eq!(sent, tokens.len());
    }

    #[tokio::test]
    async fn unreachable_error_does_not_contain_the_url() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        drop(listener);
        let config = config(&format!("http://user:hunter2@{address}/"));
        let upstream = Upstream::new(config).expect("client");
        let error = upstream.fetch_features(&token(), None).await.expect_err("nobody listens");
        assert!(matches!(error, Error::Unreachable(_)), "{error:?}");
        assert!(!error.is_ambiguous());
        let shown = format!("{error:?} {} {upstream:?}", error_chain(&error));
        assert!(!shown.contains("hunter2") && !shown.contains("964a"), "{shown}");
    }

    #[tokio::test]
    async fn connection_that_breaks_midway_is_ambiguous() {
        use tokio::io::AsyncWriteExt as _;

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let head = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{";
            stream.write_all(head).await.expect("a peer");
        });
        let upstream = Upstream::new(config(&format!("http://{address}"))).expect("client");
        let error = upstream.fetch_features(&token(), None).await.expect_err("half a body");
        assert!(matches!(error, Error::Interrupted(_)), "{error:?}");
        assert!(error.is_ambiguous());
    }

    #[test]
    fn url_without_http_scheme_is_rejected() {
        // This parses as a URL with the scheme `unleash`.
        let error = Upstream::new(config("unleash:4242")).expect_err("no scheme");
        assert!(matches!(error, Error::InvalidScheme), "{error:?}");
    }

    #[test]
    fn error_names_invalid_certificate_file() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let mut config = config("https://unleash.example");
        config.certificate_file = Some(file.path().to_owned());
        let error = Upstream::new(config).expect_err("no certificate");
        assert!(error.to_string().contains(&*file.path().to_string_lossy()), "{error}");
    }
}
