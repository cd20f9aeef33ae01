//! The service of the SDK port: requests of SDKs, other edges, health probes and metrics scrapes.
//!
//! A request takes the same steps everywhere: find its [route](super::routes), [authorize](super::authorizer)
//! it, call the handler of its API. Most responses are ready without waiting. Besides its own body, a
//! request waits only for the validation of a first-seen token.
//!
//! It serves no secrets and no admin API.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::{HeaderMap, Method, Request, body::Incoming, header::HeaderName};
use jiff::Timestamp;
use tokio::sync::watch;
use tracing::Instrument as _;

use super::{
    authorizer::{AuthorizedRead, Authorizer, RoutedRequest},
    client_address::{self, ClientAddresses},
    client_api,
    cors::Cors,
    cpu_bound,
    failed_request_limiter::FailedRequestLimiter,
    frontend_api::{self, EvaluationRequest, Subscriber},
    health::HealthEndpoints,
    metrics_ingest,
    ofrep::{self, StreamTickets},
    request_body::RequestBody,
    request_log,
    request_metrics::{EndpointLabel, RequestMetrics},
    response::{self, CachePolicy, HttpError, HttpResponse},
    routes::{
        self, ClientEndpoint, Endpoint, FrontendEndpoint, OfrepEndpoint, OptionalEndpoint,
        RouteError, RouteMatch, UsageEndpoint, normalise,
    },
    streaming::{FetchMode, Streams},
    token_validation,
};
use crate::{
    auth::AuthenticatedToken,
    changes::ChangeFeed,
    protocol::{
        self,
        context::{FrontendContext, MAX_CONTEXT_BYTES},
    },
    served::StateId,
    server::{ConnectionInfo, HttpService, ServiceResponse},
    snapshot::Include,
    token::{Environment, Scope, TokenKind},
    usage::{ReportingClient, SdkKind, Usage},
};

/// Configuration of the SDK port.
#[derive(Debug)]
pub struct Settings {
    /// Prefix of every path: empty, or `/…` without a trailing slash.
    pub base_path: String,
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
    /// This machine's host name, for the `applicationHostname` strategy.
    pub hostname: Arc<str>,
}

/// The service of the SDK port.
#[derive(Debug)]
pub struct SdkService {
    /// Configuration.
    pub settings: Settings,
    /// Authorizes requests by their tokens.
    pub authorizer: Authorizer,
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
        let span = request_log::request_span(request.headers());
        if let Some(response) = span.in_scope(|| self.respond_now(&request, client, started)) {
            return ServiceResponse::Ready(response);
        }
        let service = Arc::clone(self);
        let response = async move { service.respond(request, client, started).await };
        ServiceResponse::deferred(response.instrument(span))
    }

    fn panic_response() -> HttpResponse {
        HttpError::Internal.into()
    }
}

/// The largest body with a context, in bytes: the largest accepted context with every character written
/// as a six-byte escape.
const MAX_CONTEXT_BODY_BYTES: usize = 6 * MAX_CONTEXT_BYTES + (16 << 10);

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

impl SdkService {
    /// Whether a path belongs to the APIs of SDKs and other edges, for any method.
    pub fn is_sdk_path(&self, path: &str) -> bool {
        let path = normalise(path, &self.settings.base_path);
        path.is_some_and(|path| routes::is_sdk_path(&path))
    }

    /// The response, if it is available without waiting, as most are.
    fn respond_now(
        &self,
        request: &Request<Incoming>,
        client: ClientAddresses,
        started: Instant,
    ) -> Option<HttpResponse> {
        let path = normalise(request.uri().path(), &self.settings.base_path);
        let (label, response) = match self.route(request, path.as_deref(), client) {
            Ok(routed) => (EndpointLabel::Route(routed.route), self.handle_now(&routed)?),
            Err(unrouted) => self.respond_unrouted(unrouted, request.headers()),
        };
        Some(self.finish_response(label, request, response, started))
    }

    /// The response, waiting as long as necessary.
    async fn respond(
        &self,
        request: Request<Incoming>,
        client: ClientAddresses,
        started: Instant,
    ) -> HttpResponse {
        let (head, body) = request.into_parts();
        let request = Request::from_parts(head, ());
        let mut body = RequestBody::new(body, started, self.settings.request_timeout);
        let path = normalise(request.uri().path(), &self.settings.base_path);
        let (label, response) = match self.route(&request, path.as_deref(), client) {
            Ok(routed) => {
                let result = self.handle(&routed, &mut body).await;
                (EndpointLabel::Route(routed.route), into_response(&routed, result))
            }
            Err(unrouted) => self.respond_unrouted(unrouted, request.headers()),
        };
        body.discard().await;
        self.finish_response(label, &request, response, started)
    }

    /// Checks the client address and finds the route, if it is enabled.
    fn route<'a, B>(
        &self,
        request: &'a Request<B>,
        path: Option<&'a str>,
        client: ClientAddresses,
    ) -> Result<RoutedRequest<'a>, Unrouted> {
        if !self.settings.access.is_allowed(client.verified) {
            return Err(Unrouted::Error(HttpError::AddressBlocked));
        }
        let method = request.method();
        if method == Method::OPTIONS {
            return Err(Unrouted::Preflight);
        }
        let found = path.map_or(Err(RouteError::NotFound), |path| routes::find(method, path));
        let RouteMatch { route, parameter } = found.map_err(|error| match error {
            RouteError::NotFound => Unrouted::Error(HttpError::NotFound),
            RouteError::MethodNotAllowed(allow) => {
                Unrouted::Error(HttpError::MethodNotAllowed(allow.into()))
            }
        })?;
        if route.optional.is_some_and(|it| self.settings.disabled_endpoints.contains(&it)) {
            return Err(Unrouted::Error(HttpError::NotFound));
        }
        let query = request.uri().query().unwrap_or_default();
        Ok(RoutedRequest { route, parameter, method, headers: request.headers(), query, client })
    }

    /// The response to a request without a route, and its label in the metrics.
    fn respond_unrouted(
        &self,
        unrouted: Unrouted,
        headers: &HeaderMap,
    ) -> (EndpointLabel, HttpResponse) {
        match unrouted {
            Unrouted::Preflight => {
                let mut response = response::empty_preflight();
                self.settings.cors.add_preflight_headers(headers, response.headers_mut());
                (EndpointLabel::Preflight, response)
            }
            Unrouted::Error(error) => (EndpointLabel::Unknown, error.into()),
        }
    }

    /// Adds the CORS headers, drops the body for `HEAD`, and records and logs the request.
    fn finish_response<B>(
        &self,
        label: EndpointLabel,
        request: &Request<B>,
        mut response: HttpResponse,
        started: Instant,
    ) -> HttpResponse {
        if !matches!(label, EndpointLabel::Preflight) {
            self.settings.cors.add_headers(request.headers(), response.headers_mut());
        }
        let response = response::drop_body_for_head(request.method(), response);
        let took = started.elapsed();
        self.request_metrics.record(label, request.method(), &response, took);
        request_log::log_response(label, request.method(), &response, took);
        response
    }

    /// Calls the handler of a route, if the response is available without waiting.
    fn handle_now(&self, request: &RoutedRequest<'_>) -> Option<HttpResponse> {
        let result = match request.route.endpoint {
            Endpoint::Client(ClientEndpoint::Features) => self.client_features_now(request)?,
            Endpoint::Frontend(FrontendEndpoint::Flags(include))
                if request.method != Method::POST =>
            {
                self.frontend_flags_now(request, include)?
            }
            Endpoint::Probe(probe) => Ok(self.health.respond(probe)),
            _ => return None,
        };
        Some(result.unwrap_or_else(HttpResponse::from))
    }

    /// Calls the handler of a route.
    async fn handle(
        &self,
        request: &RoutedRequest<'_>,
        body: &mut RequestBody,
    ) -> Result<HttpResponse, HttpError> {
        match request.route.endpoint {
            Endpoint::Probe(probe) => Ok(self.health.respond(probe)),
            Endpoint::ValidateTokens => self.validate_tokens(request, body).await,
            Endpoint::Usage(endpoint) => self.record_usage(endpoint, request, body).await,
            Endpoint::Client(endpoint) => {
                let read = self.authorizer.authorize(request).await?;
                self.handle_client_api(endpoint, request, read).await
            }
            Endpoint::Frontend(endpoint) => {
                let read = self.authorizer.authorize(request).await?;
                let body = self.read_context_body(request, body).await?;
                let context = match &body {
                    Some(body) => FrontendContext::from_json(body)?,
                    None => FrontendContext::from_query(request.query)?,
                };
                self.handle_frontend_api(endpoint, request, read, context).await
            }
            Endpoint::OfrepEvents => self.ofrep_events(request),
            Endpoint::Ofrep(endpoint) => {
                let read = self.authorizer.authorize(request).await?;
                let body = self.read_context_body(request, body).await?.unwrap_or_default();
                let context = protocol::ofrep::parse_context(&body)?;
                self.handle_ofrep(endpoint, request, &read, &context).await
            }
        }
    }

    /// `/edge/validate`.
    async fn validate_tokens(
        &self,
        request: &RoutedRequest<'_>,
        body: &mut RequestBody,
    ) -> Result<HttpResponse, HttpError> {
        let limit = token_validation::MAX_REQUEST_BYTES.min(self.settings.max_body_bytes);
        let attempt = async {
            let body = body.read(request.headers, limit).await?;
            token_validation::validate(&self.authorizer.auth, &body).await
        };
        self.failed_attempts.run_limited(request.client.verified, attempt).await
    }

    /// Records the report of an SDK or another edge.
    async fn record_usage(
        &self,
        endpoint: UsageEndpoint,
        request: &RoutedRequest<'_>,
        body: &mut RequestBody,
    ) -> Result<HttpResponse, HttpError> {
        let AuthenticatedToken { grant, digest, .. } =
            self.authorizer.authenticate(request).await?;
        let body = Box::pin(body.read(request.headers, self.settings.max_body_bytes)).await?;
        let snapshot = self.authorizer.snapshots.load(&grant.scope.environment);
        let client = ReportingClient {
            token: &digest,
            sdk_kind: match grant.kind {
                TokenKind::Frontend => SdkKind::Frontend,
                TokenKind::Admin | TokenKind::Client => SdkKind::Backend,
            },
            scope: &grant.scope,
            snapshot: snapshot.as_deref().map(|served| &**served),
        };
        let record =
            || metrics_ingest::record(endpoint, &self.usage, &client, request.headers, &body);
        cpu_bound::run(body.len(), record).await?;
        Ok(response::accepted())
    }

    /// Handles `/api/client/features`, if no waiting is necessary.
    fn client_features_now(
        &self,
        request: &RoutedRequest<'_>,
    ) -> Option<Result<HttpResponse, HttpError>> {
        let read = self.authorizer.authorize_now(request)?;
        match read.and_then(|read| client_api::features(request, &read)) {
            Ok(body) => {
                let policy = CachePolicy::Unspecified;
                let response = response::negotiate_body_now(request.headers, &body, policy).ok()?;
                Some(Ok(self.add_fetch_mode(response)))
            }
            Err(error) => Some(Err(error)),
        }
    }

    async fn handle_client_api(
        &self,
        endpoint: ClientEndpoint,
        request: &RoutedRequest<'_>,
        read: AuthorizedRead,
    ) -> Result<HttpResponse, HttpError> {
        let headers = request.headers;
        match endpoint {
            ClientEndpoint::Features => {
                let body = client_api::features(request, &read)?;
                let policy = CachePolicy::Unspecified;
                Ok(self.add_fetch_mode(response::negotiate_body(headers, &body, policy).await))
            }
            ClientEndpoint::Feature => client_api::feature(request, &read).await,
            ClientEndpoint::Delta => {
                let key = client_api::subscription_key(request, &read)?;
                client_api::delta(headers, key, &self.feed).await
            }
            ClientEndpoint::Streaming => {
                let key = client_api::subscription_key(request, &read)?;
                let states = self.subscribe_to_states(key.environment())?;
                let last_state_id = client_api::parse_state_id(headers.get(LAST_EVENT_ID));
                let events = client_api::DeltaEvents::new(
                    self.feed.clone(),
                    states.clone(),
                    key,
                    last_state_id,
                    self.streams.fetch_mode(),
                );
                let bearer = (read.digest, request.client.verified);
                self.streams.open(bearer, read.grant, states, events)
            }
        }
    }

    /// Adds the header that tells SDKs to switch to streaming, if so configured.
    fn add_fetch_mode(&self, mut response: HttpResponse) -> HttpResponse {
        if self.streams.fetch_mode() == Some(FetchMode::Streaming) {
            response::suggest_streaming(&mut response);
        }
        response
    }

    /// The state ids of an environment, for a stream of its changes.
    fn subscribe_to_states(
        &self,
        environment: &Environment,
    ) -> Result<watch::Receiver<StateId>, HttpError> {
        self.feed.subscribe(environment).ok_or(HttpError::FLAGS_NOT_FETCHED)
    }

    /// Handles `/api/frontend` with the context in the query, if no waiting is necessary.
    fn frontend_flags_now(
        &self,
        request: &RoutedRequest<'_>,
        include: Include,
    ) -> Option<Result<HttpResponse, HttpError>> {
        let evaluated = self.authorizer.authorize_now(request)?.and_then(|read| {
            let context = FrontendContext::from_query(request.query)?;
            let evaluation = self.evaluation_request(request, &read, &context);
            Ok(frontend_api::evaluate(request.headers, include, evaluation))
        });
        match evaluated {
            Ok(flags) => frontend_api::flags_response_now(request.headers, &flags).map(Ok),
            Err(error) => Some(Err(error)),
        }
    }

    async fn handle_frontend_api(
        &self,
        endpoint: FrontendEndpoint,
        request: &RoutedRequest<'_>,
        read: AuthorizedRead,
        context: FrontendContext<'_>,
    ) -> Result<HttpResponse, HttpError> {
        let headers = request.headers;
        match endpoint {
            FrontendEndpoint::Flags(include) => {
                let evaluation = self.evaluation_request(request, &read, &context);
                let flags = frontend_api::evaluate(headers, include, evaluation);
                Ok(frontend_api::flags_response(headers, flags).await)
            }
            FrontendEndpoint::Flag => {
                let evaluation = self.evaluation_request(request, &read, &context);
                frontend_api::flag_response(headers, request.parameter, evaluation).await
            }
            FrontendEndpoint::Streaming => {
                let scope = &read.grant.scope;
                let states = self.subscribe_to_states(&scope.environment)?;
                let subscriber = self.subscriber(context, request, scope, rand::random())?;
                let last = frontend_api::parse_last_event_id(headers.get(LAST_EVENT_ID));
                let snapshots = self.authorizer.snapshots.clone();
                let events = frontend_api::FlagEvents::new(snapshots, subscriber, last);
                let bearer = (read.digest, request.client.verified);
                self.streams.open(bearer, read.grant, states, events)
            }
        }
    }

    async fn handle_ofrep(
        &self,
        endpoint: OfrepEndpoint,
        request: &RoutedRequest<'_>,
        read: &AuthorizedRead,
        context: &FrontendContext<'_>,
    ) -> Result<HttpResponse, HttpError> {
        let evaluation = self.evaluation_request(request, read, context);
        match endpoint {
            OfrepEndpoint::Flag => {
                ofrep::evaluate_flag(request.headers, request.parameter, evaluation).await
            }
            OfrepEndpoint::Flags => {
                let events = format!("{}/ofrep/v1/events", self.settings.base_path);
                let tickets = &self.stream_tickets;
                let (headers, token) = (request.headers, &read.digest);
                Ok(ofrep::evaluate_flags(headers, evaluation, token, tickets, &events).await)
            }
        }
    }

    /// Opens the event stream of an OpenFeature provider, which presents a ticket instead of a token.
    fn ofrep_events(&self, request: &RoutedRequest<'_>) -> Result<HttpResponse, HttpError> {
        let mut query = form_urlencoded::parse(request.query.as_bytes());
        let ticket =
            query.find(|(name, _)| name == "ticket").ok_or(HttpError::InvalidStreamTicket)?;
        let ticket = self
            .stream_tickets
            .verify(&ticket.1, Timestamp::now())
            .ok_or(HttpError::InvalidStreamTicket)?;
        let grant = self
            .authorizer
            .auth
            .current_grant(&ticket.digest)
            .ok_or(HttpError::InvalidStreamTicket)?;
        if grant.kind != TokenKind::Frontend {
            return Err(HttpError::WrongTokenKind);
        }
        let states = self.subscribe_to_states(&grant.scope.environment)?;
        let subscriber =
            self.subscriber(ticket.context, request, &grant.scope, ticket.random_seed)?;
        let current = frontend_api::parse_last_event_id(request.headers.get(LAST_EVENT_ID))
            .unwrap_or(ticket.outcome_hash);
        let snapshots = self.authorizer.snapshots.clone();
        let events = ofrep::RefetchEvents::new(snapshots, subscriber, current);
        self.streams.open((ticket.digest, request.client.verified), grant, states, events)
    }

    fn evaluation_request<'a>(
        &'a self,
        request: &RoutedRequest<'_>,
        read: &'a AuthorizedRead,
        context: &'a FrontendContext<'a>,
    ) -> EvaluationRequest<'a> {
        EvaluationRequest {
            context,
            client_address: request.client.for_evaluation,
            hostname: &self.settings.hostname,
            snapshot: &read.snapshot,
            scope: &read.grant.scope,
            random_seed: None,
        }
    }

    /// The client of a stream, which keeps its context.
    fn subscriber(
        &self,
        context: FrontendContext<'_>,
        request: &RoutedRequest<'_>,
        scope: &Scope,
        random_seed: u64,
    ) -> Result<Subscriber, HttpError> {
        let snapshot = self.authorizer.snapshots.load_for_scope(scope);
        let snapshot = snapshot.ok_or(HttpError::FLAGS_NOT_FETCHED)?;
        let (address, hostname) =
            (request.client.for_evaluation, Arc::clone(&self.settings.hostname));
        Ok(Subscriber::new(context, address, hostname, scope.clone(), random_seed, &snapshot))
    }

    /// Reads the body with the context of a `POST`; `None` if the context is in the query.
    async fn read_context_body(
        &self,
        request: &RoutedRequest<'_>,
        body: &mut RequestBody,
    ) -> Result<Option<Bytes>, HttpError> {
        if request.method != Method::POST {
            return Ok(None);
        }
        let limit = self.settings.max_body_bytes.min(MAX_CONTEXT_BODY_BYTES);
        Box::pin(body.read(request.headers, limit)).await.map(Some)
    }
}

/// The response to a routed request. OpenFeature providers expect errors in OFREP's format.
fn into_response(
    request: &RoutedRequest<'_>,
    result: Result<HttpResponse, HttpError>,
) -> HttpResponse {
    match (result, request.route.endpoint) {
        (Ok(response), _) => response,
        (Err(error), Endpoint::Ofrep(OfrepEndpoint::Flag)) => {
            ofrep::error_response(Some(request.parameter), &error)
        }
        (Err(error), Endpoint::Ofrep(OfrepEndpoint::Flags) | Endpoint::OfrepEvents) => {
            ofrep::error_response(None, &error)
        }
        (Err(error), _) => error.into(),
    }
}

/// A request without a route.
enum Unrouted {
    /// A CORS preflight.
    Preflight,
    /// A rejected request.
    Error(HttpError),
}
