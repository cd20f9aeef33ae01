//! The data listener: what SDKs, other edges, probes and scrapes ask.
//!
//! Nothing secret is served here, and the only thing that a request may wait for, besides its own
//! body, is the verdict on a first-seen token.

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
    listener::{Answer, ConnectionInfo, Service},
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
    feed::{Feed, Topic},
    snapshot::{Shown, Snapshot, Snapshots},
    token::{Grant, Scope, TokenDigest, TokenKind},
    usage::{Reporter, SdkKind, Usage},
    wire::{
        self,
        context::{FrontendContext, MAX_CONTEXT},
    },
};

/// How the data listener behaves.
#[derive(Debug)]
pub struct Settings {
    /// What precedes every path: empty, or `/…` without a final slash.
    pub base_path: String,
    /// The header in which SDKs present their token.
    pub token_header: HeaderName,
    /// What browsers on other origins may do.
    pub cors: Cors,
    /// Which addresses are served.
    pub access: access::Config,
    /// Routes that answer as if they did not exist.
    pub disabled: BTreeSet<Endpoint>,
    /// The largest request body, in bytes.
    pub body_bytes: usize,
    /// The longest that one request may take, from its head until its body is there.
    pub request_timeout: Duration,
    /// The longest that a request with a first-seen token waits for its environment's flags.
    pub patience: Duration,
    /// This machine's name.
    pub hostname: Arc<str>,
}

/// The data listener's service.
#[derive(Debug)]
pub struct Data {
    /// How it behaves.
    pub settings: Settings,
    /// Who judges tokens.
    pub auth: Authenticator,
    /// What is served.
    pub snapshots: Snapshots,
    /// What changes of it.
    pub feed: Feed,
    /// Who follows that.
    pub streams: Streams,
    /// What OpenFeature's providers follow with.
    pub tickets: Tickets,
    /// Where reports go.
    pub usage: Usage,
    /// What probes and scrapes are told.
    pub ops: Ops,
    /// What measures requests.
    pub meter: Arc<Meter>,
    /// How much addresses ask without a token that is of no use.
    pub guesses: Guesses,
}

impl Service for Data {
    fn call(
        self: &Arc<Self>,
        request: Request<Incoming>,
        connection: &Arc<ConnectionInfo>,
    ) -> Answer {
        let started = Instant::now();
        let client = self.settings.access.proxies.client(connection.peer, request.headers());
        if let Some(reply) = self.at_once(&request, client, started) {
            return Answer::Ready(reply);
        }
        let data = Arc::clone(self);
        Answer::later(async move { data.answer(request, client, started).await })
    }
}

/// When a client is told to try again, where nothing better is known.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// The longest body that holds a context, in bytes: the largest context that is read, each character of it
/// written as an escape of six.
const LONGEST_CONTEXT: usize = 6 * MAX_CONTEXT + (16 << 10);

/// Where OpenFeature's providers may present their token; it does no harm elsewhere.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

const NO_FLAGS: Failure = Failure::Unavailable {
    what: "the flags that this token sees have not been fetched",
    retry_after: TRY_AGAIN,
};

impl Data {
    /// Whether a path is one that SDKs and other edges ask for, of whatever method.
    pub fn serves(&self, path: &str) -> bool {
        let path = normalise(path, &self.settings.base_path);
        path.is_some_and(|path| Route::is_of_sdks(&path))
    }

    /// The answer, if it need not be waited for: most are of this kind.
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

    /// The answer, however long it takes.
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

    /// What is asked for.
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
            Err(NoRoute::Method(known)) => Err(Unrouted::Failure(Failure::Method(known.into()))),
        }
    }

    /// The answer to a request without a route, and what it is counted as.
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

    /// Completes an answer, and counts it.
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

    /// Answers what was asked.
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
                let found = {
                    let told = context(head, body.as_ref())?;
                    self.evaluated(&reader, &told, shown, headers, client)
                };
                Ok(frontend::flags(headers, found).await)
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
                let told = context(head, body.as_ref())?;
                let asked = self.question(&told, client, &snapshot, &grant.scope);
                frontend::flag(headers, name, asked).await
            }
            Route::FrontendStreaming => self.follow_flags(head, body, client).await,
            Route::OfrepEvents => Ok(ofrep::told(None, self.ofrep_events(head, client))),
            Route::OfrepFlags => Ok(ofrep::told(None, self.ofrep_flags(head, body, client).await)),
            Route::OfrepFlag(key) => {
                let answer = self.ofrep_flag(head, key, body, client).await;
                Ok(ofrep::told(Some(key), answer))
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

    /// What an SDK or another edge reports with a token of a kind.
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

    /// Answers server SDKs, if that need not be waited for.
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

    /// Tells SDKs that can follow a stream to do so, where they are to.
    fn advise(&self, mut reply: Reply) -> Reply {
        if self.streams.fetch_mode() == Some(FetchMode::Streaming) {
            reply::prefer_streaming(&mut reply);
        }
        reply
    }

    /// Answers frontends that tell their context in the query, if that need not be waited for.
    fn flags(
        &self,
        shown: Shown,
        headers: &HeaderMap,
        query: &str,
        client: Client,
    ) -> Option<Result<Reply, Failure>> {
        let found = self.reader_at_once(headers, &[TokenKind::Frontend])?.and_then(|reader| {
            let told = FrontendContext::from_query(query)?;
            Ok(self.evaluated(&reader, &told, shown, headers, client))
        });
        match found {
            Ok(found) => frontend::flags_at_once(headers, &found).map(Ok),
            Err(failure) => Some(Err(failure)),
        }
    }

    fn evaluated(
        &self,
        reader: &Reader,
        told: &FrontendContext<'_>,
        shown: Shown,
        headers: &HeaderMap,
        client: Client,
    ) -> Found {
        let scope = &reader.grant.scope;
        let question = self.question(told, client, &reader.snapshot, scope);
        frontend::evaluated(headers, shown, &reader.snapshot.view(&scope.projects), question)
    }

    /// Answers OpenFeature's web providers.
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
        let told = wire::ofrep::context(&body)?;
        let asked = self.question(&told, client, &snapshot, &grant.scope);
        let events = format!("{}/ofrep/v1/events", self.settings.base_path);
        Ok(ofrep::flags(headers, asked, &digest, &self.tickets, &events).await)
    }

    /// Answers OpenFeature's server providers.
    async fn ofrep_flag(
        &self,
        head: &Parts,
        key: &str,
        body: &mut Arriving,
        client: Client,
    ) -> Result<Reply, Failure> {
        let headers = &head.headers;
        let wanted = [TokenKind::Frontend, TokenKind::Client];
        let Reader { grant, snapshot, .. } = self.reader(headers, &wanted).await?;
        let body = self.read_context(headers, body).await?;
        let told = wire::ofrep::context(&body)?;
        let asked = self.question(&told, client, &snapshot, &grant.scope);
        ofrep::flag(headers, key, asked).await
    }

    /// Opens the stream that a provider was told of.
    fn ofrep_events(&self, head: &Parts, client: Client) -> Result<Reply, Failure> {
        let query = head.uri.query().unwrap_or_default();
        let mut pairs = form_urlencoded::parse(query.as_bytes());
        let ticket = pairs.find(|(name, _)| name == "ticket").ok_or(Failure::Ticket)?;
        let ticket = self.tickets.take(&ticket.1, Timestamp::now()).ok_or(Failure::Ticket)?;
        let grant = self.auth.standing(&ticket.digest).ok_or(Failure::Ticket)?;
        if grant.kind != TokenKind::Frontend {
            return Err(Failure::WrongKind);
        }
        let states = self.feed.follow(&grant.scope.environment).ok_or(NO_FLAGS)?;
        let asker = self.asker(ticket.context, client, &grant.scope, ticket.draw)?;
        let known = frontend::answer_of(head.headers.get(LAST_EVENT_ID)).unwrap_or(ticket.outcome);
        let notices = ofrep::Notices::new(self.snapshots.clone(), asker, known);
        self.streams.open((ticket.digest, client.verified), grant, states, notices)
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
        let told = context(head, body.as_ref())?;
        let states = self.feed.follow(&grant.scope.environment).ok_or(NO_FLAGS)?;
        let asker = self.asker(told, client, &grant.scope, rand::random())?;
        let last = frontend::answer_of(headers.get(LAST_EVENT_ID));
        let changes = frontend::Changes::new(self.snapshots.clone(), asker, last);
        self.streams.open((digest, client.verified), grant, states, changes)
    }

    fn asker(
        &self,
        told: FrontendContext<'_>,
        client: Client,
        scope: &Scope,
        draw: u64,
    ) -> Result<Asker, Failure> {
        let hostname = Arc::clone(&self.settings.hostname);
        let snapshot = self.snapshots.load_for(scope).ok_or(NO_FLAGS)?;
        Ok(Asker::new(told, client.evaluated, hostname, scope.clone(), draw, &snapshot))
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
        let states = self.feed.follow(topic.environment()).ok_or(NO_FLAGS)?;
        let last = client::state_of(headers.get(LAST_EVENT_ID));
        let mode = self.streams.fetch_mode();
        let changes = client::Changes::new(self.feed.clone(), states.clone(), topic, last, mode);
        self.streams.open((digest, client.verified), grant, states, changes)
    }

    fn is_disabled(&self, route: Route<'_>) -> bool {
        let what = match route {
            Route::Frontend(Shown::All) => Endpoint::FrontendAll,
            Route::Prometheus => Endpoint::Metrics,
            _ => return false,
        };
        self.settings.disabled.contains(&what)
    }

    /// The text in which the request presents its token.
    fn presented<'a>(&self, headers: &'a HeaderMap) -> Result<&'a str, Failure> {
        let header = headers.get(&self.settings.token_header);
        let header = header.or_else(|| headers.get(API_KEY)).and_then(|it| it.to_str().ok());
        header.ok_or(Failure::Unauthorized)
    }

    /// The grant of the request's token, if it is of a kind that the route wants and of an
    /// environment that is served here.
    async fn admit(&self, headers: &HeaderMap, wanted: &[TokenKind]) -> Result<Admission, Failure> {
        let admission = self.auth.authenticate(self.presented(headers)?).await?;
        self.admitted(admission, wanted)
    }

    fn admitted(&self, admission: Admission, wanted: &[TokenKind]) -> Result<Admission, Failure> {
        if !wanted.contains(&admission.grant.kind) {
            return Err(Failure::WrongKind);
        }
        if !self.snapshots.serves(&admission.grant.scope.environment) {
            return Err(Failure::NotServed);
        }
        Ok(admission)
    }

    /// What a token of a wanted kind allows, and flags that include all that it sees.
    ///
    /// A first-seen token may be the one to have them fetched, and waits for that. Flags that were
    /// never fetched are not there, which is something else than that there are none.
    async fn reader(&self, headers: &HeaderMap, wanted: &[TokenKind]) -> Result<Reader, Failure> {
        let Admission { grant, digest, first_seen } = self.admit(headers, wanted).await?;
        let snapshot = match self.snapshots.load_for(&grant.scope) {
            Some(snapshot) => Some(snapshot),
            None if first_seen => {
                let arrival = self.snapshots.wait_for_scope(&grant.scope);
                tokio::time::timeout(self.settings.patience, arrival).await.ok().flatten()
            }
            None => None,
        };
        snapshot.map(|snapshot| Reader { grant, digest, snapshot }).ok_or(NO_FLAGS)
    }

    /// The same, if it need not be waited for.
    fn reader_at_once(
        &self,
        headers: &HeaderMap,
        wanted: &[TokenKind],
    ) -> Option<Result<Reader, Failure>> {
        let known = match self.presented(headers) {
            Ok(header) => self.auth.authenticate_known(header)?.map_err(Failure::from),
            Err(failure) => Err(failure),
        };
        let admission = match known.and_then(|admission| self.admitted(admission, wanted)) {
            Ok(admission) => admission,
            Err(failure) => return Some(Err(failure)),
        };
        let Admission { grant, digest, .. } = admission;
        let snapshot = self.snapshots.load_for(&grant.scope).ok_or(NO_FLAGS);
        Some(snapshot.map(|snapshot| Reader { grant, digest, snapshot }))
    }

    /// The body that holds the context, where it is not in the query.
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
        told: &'a FrontendContext<'a>,
        client: Client,
        snapshot: &'a Snapshot,
        scope: &'a Scope,
    ) -> Question<'a> {
        let hostname = &*self.settings.hostname;
        Question { told, client: client.evaluated, hostname, snapshot, scope, draw: None }
    }

    fn read<'a>(
        &'a self,
        headers: &'a HeaderMap,
        body: &'a mut Arriving,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, Failure>> + Send + 'a>> {
        Box::pin(body.read(headers, self.settings.body_bytes))
    }

    /// Reads a body that holds a context.
    fn read_context<'a>(
        &'a self,
        headers: &'a HeaderMap,
        body: &'a mut Arriving,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, Failure>> + Send + 'a>> {
        Box::pin(body.read(headers, self.settings.body_bytes.min(LONGEST_CONTEXT)))
    }
}

/// A request that asks for nothing here.
enum Unrouted {
    /// It is a browser's, before another.
    Preflight,
    /// It is refused.
    Failure(Failure),
}

/// Who reads flags, and which.
struct Reader {
    grant: Arc<Grant>,
    digest: TokenDigest,
    snapshot: Arc<Snapshot>,
}

/// What is reported, and by whom.
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

/// What a request with this grant follows.
fn topic(grant: &Grant, query: &str) -> Result<Topic, Failure> {
    let Scope { environment, projects } = grant.scope.clone();
    Ok(Topic::new(environment, projects, client::filter(query)?))
}

/// The context of a request, which borrows from its body or query.
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
