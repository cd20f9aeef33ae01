//! The requests of Parapet to the Unleash server.
//!
//! Most go through [`Transport::call`], which limits, times, counts and classifies them. Relayed
//! requests, streams and access probes record their outcome themselves. Nothing here retries.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use jiff::civil::Date;
use reqwest::{
    Method, RequestBuilder, Response, StatusCode,
    header::{ACCEPT, ACCEPT_ENCODING, CONTENT_TYPE, ETAG, HeaderName, HeaderValue, IF_NONE_MATCH},
};
use tokio::time::{Instant, timeout};

use super::{
    admin_token::AdminToken,
    error::Error,
    event_stream::UpstreamEventStream,
    health::UpstreamHealth,
    http_client::Config,
    request_metrics::{self, RequestOutcome, UpstreamOperation},
    transport::{
        BufferedResponse, JSON, Transport, accept_any_body, parse_json, read_body, with_json_body,
    },
};
use crate::{
    protocol::{
        delta::EventId,
        event_log::EventPage,
        tokens::{
            CreateTokenRequest, CreatedToken, EnvironmentList, ListedEnvironment, ListedSecret,
            ListedToken, TokenList, ValidateRequest, ValidateResponse, ValidatedToken,
        },
        usage::BATCH_ID_HEADER,
    },
    token::{Environment, Token, TokenKind},
    usage::BatchId,
};

/// A name that exists on no server, neither as a flag nor as a path.
const NONEXISTENT_NAME: &str = "parapet-asks-for-nothing";

/// The timeout for sending usage and creating a token. It is longer than for other requests: a retry of
/// a batch that upstream is still storing would count it twice, and the secret of a created token is
/// returned only once.
const LONG_TIMEOUT: Duration = Duration::from_secs(30);

/// The largest response body that is relayed, in bytes.
const MAX_RELAYED_BODY: usize = 32 << 20;

/// The client of the upstream Unleash server.
///
/// A cheap handle: clones share connections and [`UpstreamHealth`]. Dropping a request's future cancels the
/// request.
#[derive(Clone)]
pub struct Upstream(Arc<Transport>);

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

impl Upstream {
    /// Builds the client for the server of `config`. Does not connect yet.
    pub fn new(config: Config) -> Result<Self, Error> {
        Ok(Self(Arc::new(Transport::new(config)?)))
    }

    /// The scheme, host and port of upstream's URL, without credentials and path.
    pub fn origin(&self) -> String {
        self.0.url.origin().ascii_serialization()
    }

    /// The health of upstream as seen by this client.
    pub fn health(&self) -> UpstreamHealth {
        self.0.health_tracker.health()
    }

    /// Fetches the flags of `token`; a conditional request if `etag` is given.
    pub async fn fetch_features(
        &self,
        token: &Token,
        etag: Option<&str>,
    ) -> Result<FeaturesResponse, Error> {
        let mut request = self.0.request(Method::GET, &["api", "client", "features"], Some(token));
        let known = etag.and_then(strong_etag);
        let conditional = known.is_some();
        if let Some(known) = known {
            request = request.header(IF_NONE_MATCH, known);
        }
        self.0
            .call(UpstreamOperation::Features, request, |answer| {
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
            .0
            .without_timeout(Method::GET, path, Some(token))
            .header(ACCEPT, EVENT_STREAM)
            .header(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let request = last.into_iter().fold(request, |it, last| it.header(LAST_EVENT_ID, last));
        let limit = self.0.request_timeout;
        let head = timeout(limit, self.0.send_following_redirects(request)).await;
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
        request_metrics::record(UpstreamOperation::Stream, outcome, started.elapsed());
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
                with_json_body(self.0.request(Method::POST, &["edge", "validate"], None), &body);
            let reply: ValidateResponse =
                self.0.call(UpstreamOperation::Validate, request, parse_json).await?;
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
        let answer = self.0.send(self.0.request(Method::GET, path, Some(token))).await;
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
        self.0.record(UpstreamOperation::Probe, None, &access, started);
        access
    }

    /// Sends a batch of usage: a body of `/api/client/metrics/bulk`, with the id that identifies it to
    /// another Parapet.
    ///
    /// Upstream silently drops usage that does not belong to the environment of `token`.
    pub(super) async fn send_usage(
        &self,
        token: &Token,
        id: BatchId,
        body: Bytes,
    ) -> Result<(), Error> {
        let path = &["api", "client", "metrics", "bulk"];
        let request = self
            .0
            .request(Method::POST, path, Some(token))
            .timeout(LONG_TIMEOUT)
            .header(CONTENT_TYPE, JSON)
            .header(BATCH_ID_HEADER, id.to_string())
            .body(body);
        self.0.call(UpstreamOperation::Usage, request, accept_any_body).await
    }

    /// Lists upstream's environments.
    pub async fn list_environments(
        &self,
        admin: &AdminToken,
    ) -> Result<Vec<ListedEnvironment>, Error> {
        let request = |token: &Token| {
            self.0.request(Method::GET, &["api", "admin", "environments"], Some(token))
        };
        let list: EnvironmentList =
            self.call_as_admin(admin, UpstreamOperation::Environments, request, parse_json).await?;
        Ok(list.environments)
    }

    /// Reads the newest `limit` events of upstream's event log, up to 1,000; `None` if upstream has none that
    /// the admin token can read. `since` leaves out events of earlier days; without it, upstream counts its
    /// whole log.
    ///
    /// Upstream applies `since` in its own time zone, so that it may leave out events of that day too.
    pub async fn search_events(
        &self,
        admin: &AdminToken,
        since: Option<Date>,
        limit: u16,
    ) -> Result<Option<EventPage>, Error> {
        let mut url = self.0.url_of(&["api", "admin", "search", "events"]);
        url.query_pairs_mut().append_pair("limit", &limit.to_string());
        if let Some(day) = since {
            url.query_pairs_mut().append_pair("from", &format!("IS:{day}"));
        }
        let request = |token: &Token| {
            self.0.request_url(Method::GET, url, Some(token)).timeout(self.0.request_timeout)
        };
        match self.call_as_admin(admin, UpstreamOperation::EventLog, request, parse_json).await {
            Ok(page) => Ok(Some(page)),
            Err(
                Error::Decode { .. }
                | Error::Status { status: StatusCode::BAD_REQUEST | StatusCode::FORBIDDEN, .. },
            ) => Ok(None),
            Err(Error::Status { status, .. }) if is_path_missing(status) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Lists upstream's tokens.
    pub async fn list_api_tokens(&self, admin: &AdminToken) -> Result<TokenList, Error> {
        let request = |token: &Token| {
            self.0.request(Method::GET, &["api", "admin", "api-tokens"], Some(token))
        };
        self.call_as_admin(admin, UpstreamOperation::ListTokens, request, parse_json).await
    }

    /// Lists upstream's tokens with this name.
    pub async fn list_api_tokens_named(
        &self,
        admin: &AdminToken,
        name: &str,
    ) -> Result<Vec<ListedToken>, Error> {
        let path = &["api", "admin", "api-tokens", name];
        let request = |token: &Token| self.0.request(Method::GET, path, Some(token));
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
            with_json_body(self.0.request(Method::POST, path, Some(token)), &body)
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
        let request = |token: &Token| self.0.request(Method::DELETE, path, Some(token));
        self.call_as_admin(admin, UpstreamOperation::DeleteToken, request, accept_any_body).await
    }

    /// The header that carries tokens to upstream.
    pub fn token_header_name(&self) -> &HeaderName {
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
        self.0.record(UpstreamOperation::Relay, status, &answer, started);
        answer
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
        let result = self.0.call(purpose, request(&token), parse).await;
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
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The URL may hold a password.
        f.debug_struct("Upstream").field("host", &self.0.url.host_str()).finish_non_exhaustive()
    }
}

const EVENT_STREAM: HeaderValue = HeaderValue::from_static("text/event-stream");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// The header in which upstream tells clients whether to poll or to stream.
const FETCH_MODE: HeaderName = HeaderName::from_static("fetch-mode");

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

#[cfg(test)]
mod tests;
