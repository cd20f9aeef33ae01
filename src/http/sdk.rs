//! The service of the SDK port: requests of SDKs, other edges, health probes and metrics scrapes.
//!
//! It serves no secrets and no admin API. Besides its own body, a request waits only for the validation
//! of a first-seen token.

use std::{
    collections::BTreeSet,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::{
    HeaderMap, Method, Request,
    body::Incoming,
    header::{HeaderName, HeaderValue},
    http::request::Parts,
};
use jiff::Timestamp;

use super::{
    client_address::{self, ClientAddresses},
    client_api,
    cors::Cors,
    cpu_bound,
    failed_request_limiter::FailedRequestLimiter,
    frontend_api::{self, EvaluationRequest, EvaluationResponse, Subscriber},
    health::HealthEndpoints,
    metrics_ingest,
    ofrep::{self, StreamTickets},
    request_body::RequestBody,
    request_metrics::{EndpointLabel, RequestMetrics},
    response::{self, CachePolicy, HttpError, HttpResponse},
    route::{OptionalEndpoint, Route, RouteError, normalise},
    server::{ConnectionInfo, HttpService, ServiceResponse},
    streaming::{FetchMode, Streams},
    token_validation,
};
use crate::{
    auth::{AuthError, AuthenticatedToken, Authenticator},
    changes::{ChangeFeed, SubscriptionKey},
    protocol::{
        self,
        context::{FrontendContext, MAX_CONTEXT_BYTES},
    },
    snapshot::{Include, Snapshot, Snapshots},
    token::{Grant, Scope, TokenDigest, TokenKind},
    usage::{ReportingClient, SdkKind, Usage},
};

/// Configuration of the SDK port.
#[derive(Debug)]
pub struct Settings {
    /// Prefix of every path: empty, or `/…` without a trailing slash.
    pub base_path: String,
    /// The request header with the SDK's token.
    pub token_header: HeaderName,
    /// Cross-origin permissions of browsers.
    pub cors: Cors,
    /// Allowed client addresses and trusted proxies.
    pub access: client_address::Config,
    /// Disabled endpoints; they answer 404.
    pub disabled_endpoints: BTreeSet<OptionalEndpoint>,
    /// The largest request body, in bytes.
    pub max_body_bytes: usize,
    /// Timeout from the request's head to the end of its body.
    pub request_timeout: Duration,
    /// How long a request with a first-seen token waits for the first flags of its scope.
    pub first_fetch_timeout: Duration,
    /// This machine's host name, for the `applicationHostname` strategy.
    pub hostname: Arc<str>,
}

/// The service of the SDK port.
#[derive(Debug)]
pub struct SdkService {
    /// Configuration.
    pub settings: Settings,
    /// Validates tokens.
    pub auth: Authenticator,
    /// The flags of each environment.
    pub snapshots: Snapshots,
    /// History of flag changes, for delta requests and streams.
    pub feed: ChangeFeed,
    /// Open event streams.
    pub streams: Streams,
    /// Issues and verifies the tickets of OpenFeature event streams.
    pub stream_tickets: StreamTickets,
    /// Receives usage reports.
    pub usage: Usage,
    /// Health, readiness and metrics.
    pub health: HealthEndpoints,
    /// Counts and times requests.
    pub request_metrics: Arc<RequestMetrics>,
    /// Limits failed unauthenticated requests per address.
    pub failed_attempts: FailedRequestLimiter,
}

impl HttpService for SdkService {
    fn call(
        self: &Arc<Self>,
        request: Request<Incoming>,
        connection: &Arc<ConnectionInfo>,
    ) -> ServiceResponse {
        let started = Instant::now();
        let client =
            self.settings.access.proxies.client_addresses(connection.peer, request.headers());
        if let Some(reply) = self.respond_now(&request, client, started) {
            return ServiceResponse::Ready(reply);
        }
        let data = Arc::clone(self);
        ServiceResponse::deferred(async move { data.respond(request, client, started).await })
    }
}

/// Default `Retry-After`.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// The largest body with a context, in bytes: the largest accepted context with every character written
/// as a six-byte escape.
const MAX_CONTEXT_BODY_BYTES: usize = 6 * MAX_CONTEXT_BYTES + (16 << 10);

/// Alternative token header of OpenFeature providers, accepted on every route.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

const FLAGS_NOT_FETCHED: HttpError = HttpError::Unavailable {
    what: "the flags that this token sees have not been fetched",
    retry_after: RETRY_AFTER,
};

impl SdkService {
    /// Whether a path belongs to the APIs of SDKs and other edges, for any method.
    pub fn is_sdk_path(&self, path: &str) -> bool {
        let path = normalise(path, &self.settings.base_path);
        path.is_some_and(|path| Route::is_sdk_path(&path))
    }

    /// The response, if it is available without waiting, as most are.
    fn respond_now(
        &self,
        request: &Request<Incoming>,
        client: ClientAddresses,
        started: Instant,
    ) -> Option<HttpResponse> {
        let (method, headers) = (request.method(), request.headers());
        let path = normalise(request.uri().path(), &self.settings.base_path);
        let (subject, reply) = match self.match_route(method, path.as_deref(), client) {
            Ok(route) => {
                let query = request.uri().query().unwrap_or_default();
                let reply = match route {
                    Route::ClientFeatures => self.client_features_now(headers, query)?,
                    Route::FrontendFlags(shown) if method != Method::POST => {
                        self.frontend_flags_now(shown, headers, query, client)?
                    }
                    Route::Health => Ok(self.health.liveness()),
                    Route::Ready => Ok(self.health.ready()),
                    Route::Prometheus => Ok(self.health.prometheus()),
                    _ => return None,
                };
                (EndpointLabel::Route(route), reply.unwrap_or_else(HttpResponse::from))
            }
            Err(unrouted) => self.respond_unrouted(unrouted, headers),
        };
        Some(self.finish_response(subject, method, headers, reply, started))
    }

    /// The response, waiting as long as necessary.
    async fn respond(
        &self,
        request: Request<Incoming>,
        client: ClientAddresses,
        started: Instant,
    ) -> HttpResponse {
        let (head, body) = request.into_parts();
        let path = normalise(head.uri.path(), &self.settings.base_path);
        let mut body = RequestBody::new(body, started, self.settings.request_timeout);
        let (subject, reply) = match self.match_route(&head.method, path.as_deref(), client) {
            Ok(route) => {
                let reply = self.dispatch(route, &head, &mut body, client).await;
                (EndpointLabel::Route(route), reply.unwrap_or_else(HttpResponse::from))
            }
            Err(unrouted) => self.respond_unrouted(unrouted, &head.headers),
        };
        body.discard().await;
        self.finish_response(subject, &head.method, &head.headers, reply, started)
    }

    /// Checks the client address and matches method and path to an enabled route.
    fn match_route<'a>(
        &self,
        method: &Method,
        path: Option<&'a str>,
        client: ClientAddresses,
    ) -> Result<Route<'a>, Unrouted> {
        if !self.settings.access.is_allowed(client.verified) {
            return Err(Unrouted::Error(HttpError::AddressBlocked));
        }
        if method == Method::OPTIONS {
            return Err(Unrouted::Preflight);
        }
        match path.map_or(Err(RouteError::NotFound), |path| Route::parse(method, path)) {
            Ok(route) if !self.is_disabled(route) => Ok(route),
            Ok(_) | Err(RouteError::NotFound) => Err(Unrouted::Error(HttpError::NotFound)),
            Err(RouteError::MethodNotAllowed(allow)) => {
                Err(Unrouted::Error(HttpError::MethodNotAllowed(allow.into())))
            }
        }
    }

    /// The response to a request without a route, and its label in the metrics.
    fn respond_unrouted(
        &self,
        unrouted: Unrouted,
        headers: &HeaderMap,
    ) -> (EndpointLabel<'static>, HttpResponse) {
        match unrouted {
            Unrouted::Preflight => {
                let mut reply = response::empty_preflight();
                self.settings.cors.add_preflight_headers(headers, reply.headers_mut());
                (EndpointLabel::Preflight, reply)
            }
            Unrouted::Error(failure) => (EndpointLabel::Unknown, failure.into()),
        }
    }

    /// Adds the CORS headers, drops the body for `HEAD`, and records the request.
    fn finish_response(
        &self,
        subject: EndpointLabel<'_>,
        method: &Method,
        headers: &HeaderMap,
        mut reply: HttpResponse,
        started: Instant,
    ) -> HttpResponse {
        if subject != EndpointLabel::Preflight {
            self.settings.cors.add_headers(headers, reply.headers_mut());
        }
        let reply = response::drop_body_for_head(method, reply);
        self.request_metrics.record(subject, method, &reply, started.elapsed());
        reply
    }

    /// Calls the handler of a route.
    async fn dispatch(
        &self,
        route: Route<'_>,
        head: &Parts,
        body: &mut RequestBody,
        client: ClientAddresses,
    ) -> Result<HttpResponse, HttpError> {
        let headers = &head.headers;
        let query = head.uri.query().unwrap_or_default();
        match route {
            Route::ClientFeatures => {
                let reader = self.authorize(headers, &[TokenKind::Client]).await?;
                let body =
                    client_api::features(headers, query, &reader.snapshot, &reader.grant.scope)?;
                Ok(self.add_fetch_mode(
                    response::negotiate_body(headers, &body, CachePolicy::Unspecified).await,
                ))
            }
            Route::FrontendFlags(shown) => {
                let reader = self.authorize(headers, &[TokenKind::Frontend]).await?;
                let body = self.read_posted_context(head, body).await?;
                let evaluation = {
                    let sent = parse_context(head, body.as_ref())?;
                    self.evaluate(&reader, &sent, shown, headers, client)
                };
                Ok(frontend_api::flags_response(headers, evaluation).await)
            }
            Route::Health => Ok(self.health.liveness()),
            Route::Ready => Ok(self.health.ready()),
            Route::Prometheus => Ok(self.health.prometheus()),
            Route::ValidateTokens => {
                let limit = token_validation::MAX_REQUEST_BYTES.min(self.settings.max_body_bytes);
                let answer = async {
                    let body = body.read(headers, limit).await?;
                    token_validation::validate(&self.auth, &body).await
                };
                self.failed_attempts.limit(client.verified, answer).await
            }
            Route::ClientFeature(name) => {
                let AuthorizedRead { grant, snapshot, .. } =
                    self.authorize(headers, &[TokenKind::Client]).await?;
                client_api::feature(headers, name, &snapshot, &grant.scope).await
            }
            Route::ClientDelta => self.client_delta(headers, query).await,
            Route::ClientStreaming => self.client_stream(headers, query, client).await,
            Route::FrontendFeature(name) => {
                let AuthorizedRead { grant, snapshot, .. } =
                    self.authorize(headers, &[TokenKind::Frontend]).await?;
                let body = self.read_posted_context(head, body).await?;
                let sent = parse_context(head, body.as_ref())?;
                let request = self.evaluation_request(&sent, client, &snapshot, &grant.scope);
                frontend_api::flag_response(headers, name, request).await
            }
            Route::FrontendStreaming => self.frontend_stream(head, body, client).await,
            Route::OfrepEvents => Ok(ofrep::into_response(None, self.ofrep_events(head, client))),
            Route::OfrepFlags => {
                Ok(ofrep::into_response(None, self.ofrep_flags(head, body, client).await))
            }
            Route::OfrepFlag(key) => {
                let result = self.ofrep_flag(head, key, body, client).await;
                Ok(ofrep::into_response(Some(key), result))
            }
            Route::Register(kind) => {
                let report = self.read_report(kind, headers, body).await?;
                let register = || {
                    metrics_ingest::register(&self.usage, &report.reporter(), headers, &report.body)
                };
                cpu_bound::run(report.body.len(), register).await
            }
            Route::UsageMetrics(kind) => {
                let report = self.read_report(kind, headers, body).await?;
                let metrics = || {
                    metrics_ingest::client_metrics(
                        &self.usage,
                        &report.reporter(),
                        headers,
                        &report.body,
                    )
                };
                cpu_bound::run(report.body.len(), metrics).await
            }
            Route::BulkMetrics => {
                let report = self.read_report(TokenKind::Client, headers, body).await?;
                let bulk =
                    || metrics_ingest::bulk_metrics(&self.usage, &report.reporter(), &report.body);
                cpu_bound::run(report.body.len(), bulk).await
            }
            Route::EdgeInstance => {
                let report = self.read_report(TokenKind::Client, headers, body).await?;
                let instance =
                    || metrics_ingest::edge_instance(&self.usage, &report.reporter(), &report.body);
                cpu_bound::run(report.body.len(), instance).await
            }
        }
    }

    /// Authenticates and reads a usage report of an SDK or another edge.
    async fn read_report(
        &self,
        kind: TokenKind,
        headers: &HeaderMap,
        body: &mut RequestBody,
    ) -> Result<UsageReport, HttpError> {
        let authenticated = self.authenticate(headers, &[kind]).await?;
        let body = self.read_body(headers, body).await?;
        let snapshot = self.snapshots.load(&authenticated.grant.scope.environment);
        Ok(UsageReport { authenticated, snapshot, body })
    }

    /// Handles `/api/client/features`, if no waiting is necessary.
    fn client_features_now(
        &self,
        headers: &HeaderMap,
        query: &str,
    ) -> Option<Result<HttpResponse, HttpError>> {
        let body = self.authorize_now(headers, &[TokenKind::Client])?.and_then(|reader| {
            client_api::features(headers, query, &reader.snapshot, &reader.grant.scope)
        });
        match body {
            Ok(body) => {
                let reply =
                    response::negotiate_body_now(headers, &body, CachePolicy::Unspecified).ok()?;
                Some(Ok(self.add_fetch_mode(reply)))
            }
            Err(failure) => Some(Err(failure)),
        }
    }

    /// Adds the header that tells SDKs to switch to streaming, if so configured.
    fn add_fetch_mode(&self, mut reply: HttpResponse) -> HttpResponse {
        if self.streams.fetch_mode() == Some(FetchMode::Streaming) {
            response::suggest_streaming(&mut reply);
        }
        reply
    }

    /// Handles `/api/frontend` with the context in the query, if no waiting is necessary.
    fn frontend_flags_now(
        &self,
        shown: Include,
        headers: &HeaderMap,
        query: &str,
        client: ClientAddresses,
    ) -> Option<Result<HttpResponse, HttpError>> {
        let evaluation = self.authorize_now(headers, &[TokenKind::Frontend])?.and_then(|reader| {
            let sent = FrontendContext::from_query(query)?;
            Ok(self.evaluate(&reader, &sent, shown, headers, client))
        });
        match evaluation {
            Ok(evaluation) => frontend_api::flags_response_now(headers, &evaluation).map(Ok),
            Err(failure) => Some(Err(failure)),
        }
    }

    fn evaluate(
        &self,
        reader: &AuthorizedRead,
        sent: &FrontendContext<'_>,
        shown: Include,
        headers: &HeaderMap,
        client: ClientAddresses,
    ) -> EvaluationResponse {
        let scope = &reader.grant.scope;
        let request = self.evaluation_request(sent, client, &reader.snapshot, scope);
        frontend_api::evaluate(
            headers,
            shown,
            &reader.snapshot.frontend_view(&scope.projects),
            request,
        )
    }

    /// Evaluates all flags, for OpenFeature web providers.
    async fn ofrep_flags(
        &self,
        head: &Parts,
        body: &mut RequestBody,
        client: ClientAddresses,
    ) -> Result<HttpResponse, HttpError> {
        let headers = &head.headers;
        let AuthorizedRead { grant, digest, snapshot } =
            self.authorize(headers, &[TokenKind::Frontend]).await?;
        let body = self.read_context_body(headers, body).await?;
        let sent = protocol::ofrep::parse_context(&body)?;
        let request = self.evaluation_request(&sent, client, &snapshot, &grant.scope);
        let events = format!("{}/ofrep/v1/events", self.settings.base_path);
        Ok(ofrep::evaluate_flags(headers, request, &digest, &self.stream_tickets, &events).await)
    }

    /// Evaluates one flag, for OpenFeature server providers.
    async fn ofrep_flag(
        &self,
        head: &Parts,
        key: &str,
        body: &mut RequestBody,
        client: ClientAddresses,
    ) -> Result<HttpResponse, HttpError> {
        let headers = &head.headers;
        let accepted = [TokenKind::Frontend, TokenKind::Client];
        let AuthorizedRead { grant, snapshot, .. } = self.authorize(headers, &accepted).await?;
        let body = self.read_context_body(headers, body).await?;
        let sent = protocol::ofrep::parse_context(&body)?;
        let request = self.evaluation_request(&sent, client, &snapshot, &grant.scope);
        ofrep::evaluate_flag(headers, key, request).await
    }

    /// Opens the event stream of an OpenFeature provider, which presents a ticket instead of a token.
    fn ofrep_events(
        &self,
        head: &Parts,
        client: ClientAddresses,
    ) -> Result<HttpResponse, HttpError> {
        let query = head.uri.query().unwrap_or_default();
        let mut pairs = form_urlencoded::parse(query.as_bytes());
        let ticket =
            pairs.find(|(name, _)| name == "ticket").ok_or(HttpError::InvalidStreamTicket)?;
        let ticket = self
            .stream_tickets
            .verify(&ticket.1, Timestamp::now())
            .ok_or(HttpError::InvalidStreamTicket)?;
        let grant =
            self.auth.current_grant(&ticket.digest).ok_or(HttpError::InvalidStreamTicket)?;
        if grant.kind != TokenKind::Frontend {
            return Err(HttpError::WrongTokenKind);
        }
        let states = self.feed.subscribe(&grant.scope.environment).ok_or(FLAGS_NOT_FETCHED)?;
        let subscriber =
            self.subscriber(ticket.context, client, &grant.scope, ticket.random_seed)?;
        let current = frontend_api::parse_last_event_id(head.headers.get(LAST_EVENT_ID))
            .unwrap_or(ticket.outcome_hash);
        let events = ofrep::RefetchEvents::new(self.snapshots.clone(), subscriber, current);
        self.streams.open((ticket.digest, client.verified), grant, states, events)
    }

    /// Opens a stream of evaluated flags.
    async fn frontend_stream(
        &self,
        head: &Parts,
        body: &mut RequestBody,
        client: ClientAddresses,
    ) -> Result<HttpResponse, HttpError> {
        let headers = &head.headers;
        let AuthorizedRead { grant, digest, .. } =
            self.authorize(headers, &[TokenKind::Frontend]).await?;
        let body = self.read_posted_context(head, body).await?;
        let sent = parse_context(head, body.as_ref())?;
        let states = self.feed.subscribe(&grant.scope.environment).ok_or(FLAGS_NOT_FETCHED)?;
        let subscriber = self.subscriber(sent, client, &grant.scope, rand::random())?;
        let last = frontend_api::parse_last_event_id(headers.get(LAST_EVENT_ID));
        let events = frontend_api::FlagEvents::new(self.snapshots.clone(), subscriber, last);
        self.streams.open((digest, client.verified), grant, states, events)
    }

    fn subscriber(
        &self,
        sent: FrontendContext<'_>,
        client: ClientAddresses,
        scope: &Scope,
        draw: u64,
    ) -> Result<Subscriber, HttpError> {
        let hostname = Arc::clone(&self.settings.hostname);
        let snapshot = self.snapshots.load_for(scope).ok_or(FLAGS_NOT_FETCHED)?;
        Ok(Subscriber::new(sent, client.for_evaluation, hostname, scope.clone(), draw, &snapshot))
    }

    async fn client_delta(
        &self,
        headers: &HeaderMap,
        query: &str,
    ) -> Result<HttpResponse, HttpError> {
        let reader = self.authorize(headers, &[TokenKind::Client]).await?;
        let topic = subscription_key(&reader.grant, query)?;
        client_api::delta(headers, topic, &self.feed).await.ok_or(FLAGS_NOT_FETCHED)
    }

    async fn client_stream(
        &self,
        headers: &HeaderMap,
        query: &str,
        client: ClientAddresses,
    ) -> Result<HttpResponse, HttpError> {
        let AuthorizedRead { grant, digest, .. } =
            self.authorize(headers, &[TokenKind::Client]).await?;
        let topic = subscription_key(&grant, query)?;
        let states = self.feed.subscribe(topic.environment()).ok_or(FLAGS_NOT_FETCHED)?;
        let last = client_api::parse_state_id(headers.get(LAST_EVENT_ID));
        let mode = self.streams.fetch_mode();
        let events =
            client_api::DeltaEvents::new(self.feed.clone(), states.clone(), topic, last, mode);
        self.streams.open((digest, client.verified), grant, states, events)
    }

    fn is_disabled(&self, route: Route<'_>) -> bool {
        let endpoint = match route {
            Route::FrontendFlags(Include::All) => OptionalEndpoint::FrontendAll,
            Route::Prometheus => OptionalEndpoint::Metrics,
            _ => return false,
        };
        self.settings.disabled_endpoints.contains(&endpoint)
    }

    /// The text of the request's token, unparsed.
    fn presented_token<'a>(&self, headers: &'a HeaderMap) -> Result<&'a str, HttpError> {
        let header = headers.get(&self.settings.token_header).or_else(|| headers.get(API_KEY));
        match header.map(HeaderValue::to_str) {
            None | Some(Ok("")) => Err(HttpError::MissingToken),
            Some(Ok(token)) => Ok(token),
            Some(Err(_)) => Err(HttpError::InvalidToken),
        }
    }

    /// Authenticates the request's token and checks that the route accepts its kind and that this
    /// instance serves its environment.
    async fn authenticate(
        &self,
        headers: &HeaderMap,
        accepted: &[TokenKind],
    ) -> Result<AuthenticatedToken, HttpError> {
        let admission = self.auth.authenticate(self.presented_token(headers)?).await?;
        self.check_grant(admission, accepted)
    }

    fn check_grant(
        &self,
        admission: AuthenticatedToken,
        accepted: &[TokenKind],
    ) -> Result<AuthenticatedToken, HttpError> {
        if !accepted.contains(&admission.grant.kind) {
            return Err(HttpError::WrongTokenKind);
        }
        if !self.snapshots.is_environment_allowed(&admission.grant.scope.environment) {
            return Err(HttpError::EnvironmentNotServed);
        }
        Ok(admission)
    }

    /// Authenticates the request and loads a snapshot that covers the token's scope.
    ///
    /// A first-seen token may trigger the first fetch of its scope, and waits for it. Flags that were
    /// never fetched are an error (503), not an empty list.
    async fn authorize(
        &self,
        headers: &HeaderMap,
        accepted: &[TokenKind],
    ) -> Result<AuthorizedRead, HttpError> {
        let AuthenticatedToken { grant, digest, first_seen } =
            self.authenticate(headers, accepted).await?;
        let snapshot = match self.snapshots.load_for(&grant.scope) {
            Some(snapshot) => Some(snapshot),
            None if first_seen => {
                let fetched = self.snapshots.wait_for_scope(&grant.scope);
                tokio::time::timeout(self.settings.first_fetch_timeout, fetched)
                    .await
                    .ok()
                    .flatten()
            }
            None => None,
        };
        snapshot.map(|snapshot| AuthorizedRead { grant, digest, snapshot }).ok_or(FLAGS_NOT_FETCHED)
    }

    /// Like [`authorize`](Self::authorize), if no waiting is necessary.
    fn authorize_now(
        &self,
        headers: &HeaderMap,
        accepted: &[TokenKind],
    ) -> Option<Result<AuthorizedRead, HttpError>> {
        let authenticated = match self.presented_token(headers) {
            Ok(header) => self.auth.authenticate_cached(header)?.map_err(HttpError::from),
            Err(failure) => Err(failure),
        };
        let admission =
            match authenticated.and_then(|admission| self.check_grant(admission, accepted)) {
                Ok(admission) => admission,
                Err(failure) => return Some(Err(failure)),
            };
        let AuthenticatedToken { grant, digest, .. } = admission;
        let snapshot = self.snapshots.load_for(&grant.scope).ok_or(FLAGS_NOT_FETCHED);
        Some(snapshot.map(|snapshot| AuthorizedRead { grant, digest, snapshot }))
    }

    /// Reads the body with the context of a `POST`; `None` if the context is in the query.
    async fn read_posted_context(
        &self,
        head: &Parts,
        body: &mut RequestBody,
    ) -> Result<Option<Bytes>, HttpError> {
        if head.method == Method::POST {
            return self.read_context_body(&head.headers, body).await.map(Some);
        }
        Ok(None)
    }

    fn evaluation_request<'a>(
        &'a self,
        sent: &'a FrontendContext<'a>,
        client: ClientAddresses,
        snapshot: &'a Snapshot,
        scope: &'a Scope,
    ) -> EvaluationRequest<'a> {
        let hostname = &*self.settings.hostname;
        EvaluationRequest {
            context: sent,
            client_address: client.for_evaluation,
            hostname,
            snapshot,
            scope,
            random_seed: None,
        }
    }

    fn read_body<'a>(
        &'a self,
        headers: &'a HeaderMap,
        body: &'a mut RequestBody,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, HttpError>> + Send + 'a>> {
        Box::pin(body.read(headers, self.settings.max_body_bytes))
    }

    /// Reads a body with a context.
    fn read_context_body<'a>(
        &'a self,
        headers: &'a HeaderMap,
        body: &'a mut RequestBody,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, HttpError>> + Send + 'a>> {
        Box::pin(body.read(headers, self.settings.max_body_bytes.min(MAX_CONTEXT_BODY_BYTES)))
    }
}

/// A request without a route.
enum Unrouted {
    /// A CORS preflight.
    Preflight,
    /// A rejected request.
    Error(HttpError),
}

/// An authenticated request for flags: the token's grant and the snapshot to serve it from.
struct AuthorizedRead {
    grant: Arc<Grant>,
    digest: TokenDigest,
    snapshot: Arc<Snapshot>,
}

/// A usage report and the token that it came with.
struct UsageReport {
    authenticated: AuthenticatedToken,
    snapshot: Option<Arc<Snapshot>>,
    body: Bytes,
}

impl UsageReport {
    fn reporter(&self) -> ReportingClient<'_> {
        let AuthenticatedToken { grant, digest, .. } = &self.authenticated;
        let sdk_kind = match grant.kind {
            TokenKind::Frontend => SdkKind::Frontend,
            TokenKind::Admin | TokenKind::Client => SdkKind::Backend,
        };
        ReportingClient {
            token: digest,
            sdk_kind,
            scope: &grant.scope,
            snapshot: self.snapshot.as_deref(),
        }
    }
}

/// The subscription key of a grant and a query.
fn subscription_key(grant: &Grant, query: &str) -> Result<SubscriptionKey, HttpError> {
    let Scope { environment, projects } = grant.scope.clone();
    Ok(SubscriptionKey::new(environment, projects, client_api::parse_filter(query)?))
}

/// Parses the context of a request; it borrows from the body or the query.
fn parse_context<'a>(
    head: &'a Parts,
    body: Option<&'a Bytes>,
) -> Result<FrontendContext<'a>, HttpError> {
    Ok(match body {
        Some(body) => FrontendContext::from_json(body)?,
        None => FrontendContext::from_query(head.uri.query().unwrap_or_default())?,
    })
}

impl From<AuthError> for HttpError {
    fn from(denied: AuthError) -> Self {
        match denied {
            AuthError::Unknown => Self::InvalidToken,
            AuthError::Forbidden => Self::ForbiddenUpstream,
            AuthError::Unavailable => Self::Unavailable {
                what: "the token cannot be judged at the moment",
                retry_after: RETRY_AFTER,
            },
        }
    }
}
