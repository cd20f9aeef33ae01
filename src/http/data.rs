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
use hyper::{HeaderMap, Method, Request, body::Incoming, header::HeaderName, http::request::Parts};
use jiff::Timestamp;

use super::{
    access::{self, Client},
    client,
    cors::Cors,
    edge,
    frontend::{self, Asker, Found, Question},
    guesses::Guesses,
    listener::{ConnectionInfo, HttpService, ServiceResponse},
    long,
    meter::{Meter, Subject},
    ofrep::{self, Tickets},
    ops::Ops,
    payload::Arriving,
    reply::{self, Failure, Freshness, Reply},
    report,
    route::{Endpoint, NoRoute, Route, normalise},
    streaming::{FetchMode, Streams},
};
use crate::{
    auth::{Admission, Authenticator, Denied},
    feed::{ChangeFeed, SubscriptionKey},
    snapshot::{Include, Snapshot, Snapshots},
    token::{Grant, Scope, TokenDigest, TokenKind},
    usage::{Reporter, SdkKind, Usage},
    wire::{
        self,
        context::{FrontendContext, MAX_CONTEXT},
    },
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
    pub access: access::Config,
    /// Disabled endpoints; they answer 404.
    pub disabled: BTreeSet<Endpoint>,
    /// The largest request body, in bytes.
    pub body_bytes: usize,
    /// Timeout from the request's head to the end of its body.
    pub request_timeout: Duration,
    /// How long a request with a first-seen token waits for the first flags of its scope.
    pub patience: Duration,
    /// This machine's host name, for the `applicationHostname` strategy.
    pub hostname: Arc<str>,
}

/// The service of the SDK port.
#[derive(Debug)]
pub struct Data {
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
    pub tickets: Tickets,
    /// Receives usage reports.
    pub usage: Usage,
    /// Health, readiness and metrics.
    pub ops: Ops,
    /// Counts and times requests.
    pub meter: Arc<Meter>,
    /// Limits failed unauthenticated requests per address.
    pub guesses: Guesses,
}

impl HttpService for Data {
    fn call(
        self: &Arc<Self>,
        request: Request<Incoming>,
        connection: &Arc<ConnectionInfo>,
    ) -> ServiceResponse {
        let started = Instant::now();
        let client = self.settings.access.proxies.client(connection.peer, request.headers());
        if let Some(reply) = self.at_once(&request, client, started) {
            return ServiceResponse::Ready(reply);
        }
        let data = Arc::clone(self);
        ServiceResponse::deferred(async move { data.answer(request, client, started).await })
    }
}

/// Default `Retry-After`.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// The largest body with a context, in bytes: the largest accepted context with every character written
/// as a six-byte escape.
const LONGEST_CONTEXT: usize = 6 * MAX_CONTEXT + (16 << 10);

/// Alternative token header of OpenFeature providers, accepted on every route.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

const NO_FLAGS: Failure = Failure::Unavailable {
    what: "the flags that this token sees have not been fetched",
    retry_after: TRY_AGAIN,
};

impl Data {
    /// Whether a path belongs to the APIs of SDKs and other edges, for any method.
    pub fn serves(&self, path: &str) -> bool {
        let path = normalise(path, &self.settings.base_path);
        path.is_some_and(|path| Route::is_of_sdks(&path))
    }

    /// The response, if it is available without waiting, as most are.
    fn at_once(
        &self,
        request: &Request<Incoming>,
        client: Client,
        started: Instant,
    ) -> Option<Reply> {
        let (method, headers) = (request.method(), request.headers());
        let path = normalise(request.uri().path(), &self.settings.base_path);
        let (subject, reply) = match self.route(method, path.as_deref(), client) {
            Ok(route) => {
                let query = request.uri().query().unwrap_or_default();
                let reply = match route {
                    Route::ClientFeatures => self.features(headers, query)?,
                    Route::Frontend(shown) if method != Method::POST => {
                        self.flags(shown, headers, query, client)?
                    }
                    Route::Health => Ok(self.ops.health()),
                    Route::Ready => Ok(self.ops.ready()),
                    Route::Prometheus => Ok(self.ops.metrics()),
                    _ => return None,
                };
                (Subject::Route(route), reply.unwrap_or_else(Reply::from))
            }
            Err(unrouted) => self.unrouted(unrouted, headers),
        };
        Some(self.finish(subject, method, headers, reply, started))
    }

    /// The response, waiting as long as necessary.
    async fn answer(&self, request: Request<Incoming>, client: Client, started: Instant) -> Reply {
        let (head, body) = request.into_parts();
        let path = normalise(head.uri.path(), &self.settings.base_path);
        let mut body = Arriving::new(body, started, self.settings.request_timeout);
        let (subject, reply) = match self.route(&head.method, path.as_deref(), client) {
            Ok(route) => {
                let reply = self.dispatch(route, &head, &mut body, client).await;
                (Subject::Route(route), reply.unwrap_or_else(Reply::from))
            }
            Err(unrouted) => self.unrouted(unrouted, &head.headers),
        };
        body.discard().await;
        self.finish(subject, &head.method, &head.headers, reply, started)
    }

    /// Checks the client address and matches method and path to an enabled route.
    fn route<'a>(
        &self,
        method: &Method,
        path: Option<&'a str>,
        client: Client,
    ) -> Result<Route<'a>, Unrouted> {
        if !self.settings.access.serves(client.verified) {
            return Err(Unrouted::Failure(Failure::Blocked));
        }
        if method == Method::OPTIONS {
            return Err(Unrouted::Preflight);
        }
        match path.map_or(Err(NoRoute::Path), |path| Route::parse(method, path)) {
            Ok(route) if !self.is_disabled(route) => Ok(route),
            Ok(_) | Err(NoRoute::Path) => Err(Unrouted::Failure(Failure::NotFound)),
            Err(NoRoute::Method(allow)) => Err(Unrouted::Failure(Failure::Method(allow.into()))),
        }
    }

    /// The response to a request without a route, and its label in the metrics.
    fn unrouted(&self, unrouted: Unrouted, headers: &HeaderMap) -> (Subject<'static>, Reply) {
        match unrouted {
            Unrouted::Preflight => {
                let mut reply = reply::preflight();
                self.settings.cors.decorate_preflight(headers, reply.headers_mut());
                (Subject::Preflight, reply)
            }
            Unrouted::Failure(failure) => (Subject::Unknown, failure.into()),
        }
    }

    /// Adds the CORS headers, drops the body for `HEAD`, and records the request.
    fn finish(
        &self,
        subject: Subject<'_>,
        method: &Method,
        headers: &HeaderMap,
        mut reply: Reply,
        started: Instant,
    ) -> Reply {
        if subject != Subject::Preflight {
            self.settings.cors.decorate(headers, reply.headers_mut());
        }
        let reply = reply::without_body(method, reply);
        self.meter.record(subject, method, &reply, started.elapsed());
        reply
    }

    /// Calls the handler of a route.
    async fn dispatch(
        &self,
        route: Route<'_>,
        head: &Parts,
        body: &mut Arriving,
        client: Client,
    ) -> Result<Reply, Failure> {
        let headers = &head.headers;
        let query = head.uri.query().unwrap_or_default();
        match route {
            Route::ClientFeatures => {
                let reader = self.reader(headers, &[TokenKind::Client]).await?;
                let body = client::features(headers, query, &reader.snapshot, &reader.grant.scope)?;
                Ok(self.advise(reply::body(headers, &body, Freshness::Unsaid).await))
            }
            Route::Frontend(shown) => {
                let reader = self.reader(headers, &[TokenKind::Frontend]).await?;
                let body = self.context_body(head, body).await?;
                let evaluation = {
                    let sent = context(head, body.as_ref())?;
                    self.evaluated(&reader, &sent, shown, headers, client)
                };
                Ok(frontend::flags(headers, evaluation).await)
            }
            Route::Health => Ok(self.ops.health()),
            Route::Ready => Ok(self.ops.ready()),
            Route::Prometheus => Ok(self.ops.metrics()),
            Route::Validate => {
                let limit = edge::LONGEST_QUESTION.min(self.settings.body_bytes);
                let answer = async {
                    let body = body.read(headers, limit).await?;
                    edge::validate(&self.auth, &body).await
                };
                self.guesses.answer(client.verified, answer).await
            }
            Route::ClientFeature(name) => {
                let Reader { grant, snapshot, .. } =
                    self.reader(headers, &[TokenKind::Client]).await?;
                client::feature(headers, name, &snapshot, &grant.scope).await
            }
            Route::ClientDelta => self.delta(headers, query).await,
            Route::ClientStreaming => self.stream(headers, query, client).await,
            Route::FrontendFeature(name) => {
                let Reader { grant, snapshot, .. } =
                    self.reader(headers, &[TokenKind::Frontend]).await?;
                let body = self.context_body(head, body).await?;
                let sent = context(head, body.as_ref())?;
                let request = self.question(&sent, client, &snapshot, &grant.scope);
                frontend::flag(headers, name, request).await
            }
            Route::FrontendStreaming => self.follow_flags(head, body, client).await,
            Route::OfrepEvents => Ok(ofrep::told(None, self.ofrep_events(head, client))),
            Route::OfrepFlags => Ok(ofrep::told(None, self.ofrep_flags(head, body, client).await)),
            Route::OfrepFlag(key) => {
                let result = self.ofrep_flag(head, key, body, client).await;
                Ok(ofrep::told(Some(key), result))
            }
            Route::Register(kind) => {
                let report = self.report(kind, headers, body).await?;
                let register =
                    || report::register(&self.usage, &report.reporter(), headers, &report.body);
                long::work(report.body.len(), register).await
            }
            Route::Metrics(kind) => {
                let report = self.report(kind, headers, body).await?;
                let metrics =
                    || report::metrics(&self.usage, &report.reporter(), headers, &report.body);
                long::work(report.body.len(), metrics).await
            }
            Route::Bulk => {
                let report = self.report(TokenKind::Client, headers, body).await?;
                let bulk = || report::bulk(&self.usage, &report.reporter(), &report.body);
                long::work(report.body.len(), bulk).await
            }
            Route::Instance => {
                let report = self.report(TokenKind::Client, headers, body).await?;
                let instance = || report::instance(&self.usage, &report.reporter(), &report.body);
                long::work(report.body.len(), instance).await
            }
        }
    }

    /// Authenticates and reads a usage report of an SDK or another edge.
    async fn report(
        &self,
        kind: TokenKind,
        headers: &HeaderMap,
        body: &mut Arriving,
    ) -> Result<Report, Failure> {
        let admission = self.admit(headers, &[kind]).await?;
        let body = self.read(headers, body).await?;
        let snapshot = self.snapshots.load(&admission.grant.scope.environment);
        Ok(Report { admission, snapshot, body })
    }

    /// Handles `/api/client/features`, if no waiting is necessary.
    fn features(&self, headers: &HeaderMap, query: &str) -> Option<Result<Reply, Failure>> {
        let body = self.reader_at_once(headers, &[TokenKind::Client])?.and_then(|reader| {
            client::features(headers, query, &reader.snapshot, &reader.grant.scope)
        });
        match body {
            Ok(body) => {
                let reply = reply::body_at_once(headers, &body, Freshness::Unsaid).ok()?;
                Some(Ok(self.advise(reply)))
            }
            Err(failure) => Some(Err(failure)),
        }
    }

    /// Adds the header that tells SDKs to switch to streaming, if so configured.
    fn advise(&self, mut reply: Reply) -> Reply {
        if self.streams.fetch_mode() == Some(FetchMode::Streaming) {
            reply::prefer_streaming(&mut reply);
        }
        reply
    }

    /// Handles `/api/frontend` with the context in the query, if no waiting is necessary.
    fn flags(
        &self,
        shown: Include,
        headers: &HeaderMap,
        query: &str,
        client: Client,
    ) -> Option<Result<Reply, Failure>> {
        let evaluation = self.reader_at_once(headers, &[TokenKind::Frontend])?.and_then(|reader| {
            let sent = FrontendContext::from_query(query)?;
            Ok(self.evaluated(&reader, &sent, shown, headers, client))
        });
        match evaluation {
            Ok(evaluation) => frontend::flags_at_once(headers, &evaluation).map(Ok),
            Err(failure) => Some(Err(failure)),
        }
    }

    fn evaluated(
        &self,
        reader: &Reader,
        sent: &FrontendContext<'_>,
        shown: Include,
        headers: &HeaderMap,
        client: Client,
    ) -> Found {
        let scope = &reader.grant.scope;
        let request = self.question(sent, client, &reader.snapshot, scope);
        frontend::evaluated(headers, shown, &reader.snapshot.frontend_view(&scope.projects), request)
    }

    /// Evaluates all flags, for OpenFeature web providers.
    async fn ofrep_flags(
        &self,
        head: &Parts,
        body: &mut Arriving,
        client: Client,
    ) -> Result<Reply, Failure> {
        let headers = &head.headers;
        let Reader { grant, digest, snapshot } =
            self.reader(headers, &[TokenKind::Frontend]).await?;
        let body = self.read_context(headers, body).await?;
        let sent = wire::ofrep::context(&body)?;
        let request = self.question(&sent, client, &snapshot, &grant.scope);
        let events = format!("{}/ofrep/v1/events", self.settings.base_path);
        Ok(ofrep::flags(headers, request, &digest, &self.tickets, &events).await)
    }

    /// Evaluates one flag, for OpenFeature server providers.
    async fn ofrep_flag(
        &self,
        head: &Parts,
        key: &str,
        body: &mut Arriving,
        client: Client,
    ) -> Result<Reply, Failure> {
        let headers = &head.headers;
        let accepted = [TokenKind::Frontend, TokenKind::Client];
        let Reader { grant, snapshot, .. } = self.reader(headers, &accepted).await?;
        let body = self.read_context(headers, body).await?;
        let sent = wire::ofrep::context(&body)?;
        let request = self.question(&sent, client, &snapshot, &grant.scope);
        ofrep::flag(headers, key, request).await
    }

    /// Opens the event stream of an OpenFeature provider, which presents a ticket instead of a token.
    fn ofrep_events(&self, head: &Parts, client: Client) -> Result<Reply, Failure> {
        let query = head.uri.query().unwrap_or_default();
        let mut pairs = form_urlencoded::parse(query.as_bytes());
        let ticket = pairs.find(|(name, _)| name == "ticket").ok_or(Failure::Ticket)?;
        let ticket = self.tickets.take(&ticket.1, Timestamp::now()).ok_or(Failure::Ticket)?;
        let grant = self.auth.standing(&ticket.digest).ok_or(Failure::Ticket)?;
        if grant.kind != TokenKind::Frontend {
            return Err(Failure::WrongKind);
        }
        let states = self.feed.subscribe(&grant.scope.environment).ok_or(NO_FLAGS)?;
        let subscriber = self.asker(ticket.context, client, &grant.scope, ticket.draw)?;
        let current =
            frontend::answer_of(head.headers.get(LAST_EVENT_ID)).unwrap_or(ticket.outcome);
        let events = ofrep::Notices::new(self.snapshots.clone(), subscriber, current);
        self.streams.open((ticket.digest, client.verified), grant, states, events)
    }

    /// Opens a stream of evaluated flags.
    async fn follow_flags(
        &self,
        head: &Parts,
        body: &mut Arriving,
        client: Client,
    ) -> Result<Reply, Failure> {
        let headers = &head.headers;
        let Reader { grant, digest, .. } = self.reader(headers, &[TokenKind::Frontend]).await?;
        let body = self.context_body(head, body).await?;
        let sent = context(head, body.as_ref())?;
        let states = self.feed.subscribe(&grant.scope.environment).ok_or(NO_FLAGS)?;
        let subscriber = self.asker(sent, client, &grant.scope, rand::random())?;
        let last = frontend::answer_of(headers.get(LAST_EVENT_ID));
        let events = frontend::Changes::new(self.snapshots.clone(), subscriber, last);
        self.streams.open((digest, client.verified), grant, states, events)
    }

    fn asker(
        &self,
        sent: FrontendContext<'_>,
        client: Client,
        scope: &Scope,
        draw: u64,
    ) -> Result<Asker, Failure> {
        let hostname = Arc::clone(&self.settings.hostname);
        let snapshot = self.snapshots.load_for(scope).ok_or(NO_FLAGS)?;
        Ok(Asker::new(sent, client.evaluated, hostname, scope.clone(), draw, &snapshot))
    }

    async fn delta(&self, headers: &HeaderMap, query: &str) -> Result<Reply, Failure> {
        let reader = self.reader(headers, &[TokenKind::Client]).await?;
        let topic = topic(&reader.grant, query)?;
        client::delta(headers, topic, &self.feed).await.ok_or(NO_FLAGS)
    }

    async fn stream(
        &self,
        headers: &HeaderMap,
        query: &str,
        client: Client,
    ) -> Result<Reply, Failure> {
        let Reader { grant, digest, .. } = self.reader(headers, &[TokenKind::Client]).await?;
        let topic = topic(&grant, query)?;
        let states = self.feed.subscribe(topic.environment()).ok_or(NO_FLAGS)?;
        let last = client::state_of(headers.get(LAST_EVENT_ID));
        let mode = self.streams.fetch_mode();
        let events = client::Changes::new(self.feed.clone(), states.clone(), topic, last, mode);
        self.streams.open((digest, client.verified), grant, states, events)
    }

    fn is_disabled(&self, route: Route<'_>) -> bool {
        let endpoint = match route {
            Route::Frontend(Include::All) => Endpoint::FrontendAll,
            Route::Prometheus => Endpoint::Metrics,
            _ => return false,
        };
        self.settings.disabled.contains(&endpoint)
    }

    /// The text of the request's token, unparsed.
    fn presented<'a>(&self, headers: &'a HeaderMap) -> Result<&'a str, Failure> {
        let header = headers.get(&self.settings.token_header);
        let header = header.or_else(|| headers.get(API_KEY)).and_then(|value| value.to_str().ok());
        header.ok_or(Failure::Unauthorized)
    }

    /// Authenticates the request's token and checks that the route accepts its kind and that this
    /// instance serves its environment.
    async fn admit(
        &self,
        headers: &HeaderMap,
        accepted: &[TokenKind],
    ) -> Result<Admission, Failure> {
        let admission = self.auth.authenticate(self.presented(headers)?).await?;
        self.admitted(admission, accepted)
    }

    fn admitted(&self, admission: Admission, accepted: &[TokenKind]) -> Result<Admission, Failure> {
        if !accepted.contains(&admission.grant.kind) {
            return Err(Failure::WrongKind);
        }
        if !self.snapshots.is_served(&admission.grant.scope.environment) {
            return Err(Failure::NotServed);
        }
        Ok(admission)
    }

    /// Authenticates the request and loads a snapshot that covers the token's scope.
    ///
    /// A first-seen token may trigger the first fetch of its scope, and waits for it. Flags that were
    /// never fetched are an error (503), not an empty list.
    async fn reader(&self, headers: &HeaderMap, accepted: &[TokenKind]) -> Result<Reader, Failure> {
        let Admission { grant, digest, first_seen } = self.admit(headers, accepted).await?;
        let snapshot = match self.snapshots.load_for(&grant.scope) {
            Some(snapshot) => Some(snapshot),
            None if first_seen => {
                let fetched = self.snapshots.wait_for_scope(&grant.scope);
                tokio::time::timeout(self.settings.patience, fetched).await.ok().flatten()
            }
            None => None,
        };
        snapshot.map(|snapshot| Reader { grant, digest, snapshot }).ok_or(NO_FLAGS)
    }

    /// Like [`authorize`](Self::authorize), if no waiting is necessary.
    fn reader_at_once(
        &self,
        headers: &HeaderMap,
        accepted: &[TokenKind],
    ) -> Option<Result<Reader, Failure>> {
        let authenticated = match self.presented(headers) {
            Ok(header) => self.auth.authenticate_known(header)?.map_err(Failure::from),
            Err(failure) => Err(failure),
        };
        let admission = match authenticated.and_then(|admission| self.admitted(admission, accepted))
        {
            Ok(admission) => admission,
            Err(failure) => return Some(Err(failure)),
        };
        let Admission { grant, digest, .. } = admission;
        let snapshot = self.snapshots.load_for(&grant.scope).ok_or(NO_FLAGS);
        Some(snapshot.map(|snapshot| Reader { grant, digest, snapshot }))
    }

    /// Reads the body with the context of a `POST`; `None` if the context is in the query.
    async fn context_body(
        &self,
        head: &Parts,
        body: &mut Arriving,
    ) -> Result<Option<Bytes>, Failure> {
        if head.method == Method::POST {
            return self.read_context(&head.headers, body).await.map(Some);
        }
        Ok(None)
    }

    fn question<'a>(
        &'a self,
        sent: &'a FrontendContext<'a>,
        client: Client,
        snapshot: &'a Snapshot,
        scope: &'a Scope,
    ) -> Question<'a> {
        let hostname = &*self.settings.hostname;
        Question { told: sent, client: client.evaluated, hostname, snapshot, scope, draw: None }
    }

    fn read<'a>(
        &'a self,
        headers: &'a HeaderMap,
        body: &'a mut Arriving,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, Failure>> + Send + 'a>> {
        Box::pin(body.read(headers, self.settings.body_bytes))
    }

    /// Reads a body with a context.
    fn read_context<'a>(
        &'a self,
        headers: &'a HeaderMap,
        body: &'a mut Arriving,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, Failure>> + Send + 'a>> {
        Box::pin(body.read(headers, self.settings.body_bytes.min(LONGEST_CONTEXT)))
    }
}

/// A request without a route.
enum Unrouted {
    /// A CORS preflight.
    Preflight,
    /// A rejected request.
    Failure(Failure),
}

/// An authenticated request for flags: the token's grant and the snapshot to serve it from.
struct Reader {
    grant: Arc<Grant>,
    digest: TokenDigest,
    snapshot: Arc<Snapshot>,
}

/// A usage report and the token that it came with.
struct Report {
    admission: Admission,
    snapshot: Option<Arc<Snapshot>>,
    body: Bytes,
}

impl Report {
    fn reporter(&self) -> Reporter<'_> {
        let Admission { grant, digest, .. } = &self.admission;
        let kind = match grant.kind {
            TokenKind::Frontend => SdkKind::Frontend,
            TokenKind::Admin | TokenKind::Client => SdkKind::Backend,
        };
        Reporter { token: digest, kind, scope: &grant.scope, snapshot: self.snapshot.as_deref() }
    }
}

/// The subscription key of a grant and a query.
fn topic(grant: &Grant, query: &str) -> Result<SubscriptionKey, Failure> {
    let Scope { environment, projects } = grant.scope.clone();
    Ok(SubscriptionKey::new(environment, projects, client::filter(query)?))
}

/// Parses the context of a request; it borrows from the body or the query.
fn context<'a>(head: &'a Parts, body: Option<&'a Bytes>) -> Result<FrontendContext<'a>, Failure> {
    Ok(match body {
        Some(body) => FrontendContext::from_json(body)?,
        None => FrontendContext::from_query(head.uri.query().unwrap_or_default())?,
    })
}

impl From<Denied> for Failure {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::Unknown => Self::Unauthorized,
            Denied::Forbidden => Self::ForbiddenUpstream,
            Denied::Unavailable => Self::Unavailable {
                what: "the token cannot be judged at the moment",
                retry_after: TRY_AGAIN,
            },
        }
    }
}
