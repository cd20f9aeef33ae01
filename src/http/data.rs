//! The data listener: what SDKs, other edges, probes and scrapes ask.
//!
//! Nothing secret is served here, and the only thing that a request may wait for, besides its own
//! body, is the verdict on a first-seen token.

mod terms;

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::{HeaderMap, Method, Request, body::Incoming, header::HeaderName, http::request::Parts};
use jiff::Timestamp;

use self::terms::Basis;
pub use self::terms::Terms;
use super::{
    access::{self, Client},
    client,
    cors::Cors,
    edge,
    frontend::{self, Asker, Question},
    guesses::Guesses,
    listener::{Answered, Service},
    long,
    meter::{Meter, Subject},
    ofrep::{self, Tickets},
    ops::Ops,
    payload::Arriving,
    reply::{self, Failure, Reply},
    report,
    route::{Endpoint, NoRoute, Route, normalise},
    streaming::{FetchMode, Streams},
};
use crate::{
    answers::Holds,
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
    type Terms = Terms;

    async fn call(&self, request: Request<Incoming>, peer: SocketAddr) -> Answered<Terms> {
        let started = Instant::now();
        let (head, body) = request.into_parts();
        let path = normalise(head.uri.path(), &self.settings.base_path);
        let body = Arriving::new(body, started, self.settings.request_timeout);
        let (subject, mut reply, basis) = self.answer(&head, path.as_deref(), body, peer).await;
        if subject != Subject::Preflight {
            self.settings.cors.decorate(&head.headers, reply.headers_mut());
        }
        let reply = reply::without_body(&head.method, reply);
        let (series, size) =
            (self.meter.series(subject, &head.method, &reply), reply::length(&reply));
        self.meter.count(series, size, started.elapsed());
        Answered { reply, terms: basis.map(|basis| Terms { basis, series, size }) }
    }

    fn revalidate(&self, terms: &Terms, started: Instant) -> bool {
        terms.hold(&self.auth, &self.snapshots, &self.meter, started)
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

    async fn answer<'a>(
        &self,
        head: &Parts,
        path: Option<&'a str>,
        body: Arriving,
        peer: SocketAddr,
    ) -> (Subject<'a>, Reply, Option<Basis>) {
        let client = self.settings.access.proxies.client(peer, &head.headers);
        if !self.settings.access.serves(client.verified) {
            return (Subject::Unknown, Failure::Blocked.into(), None);
        }
        if head.method == Method::OPTIONS {
            let mut reply = reply::preflight();
            self.settings.cors.decorate_preflight(&head.headers, reply.headers_mut());
            return (Subject::Preflight, reply, None);
        }
        let route = match path.map_or(Err(NoRoute::Path), |path| Route::parse(&head.method, path)) {
            Ok(route) if !self.is_disabled(route) => route,
            Ok(_) | Err(NoRoute::Path) => {
                return (Subject::Unknown, Failure::NotFound.into(), None);
            }
            Err(NoRoute::Method(known)) => {
                return (Subject::Unknown, Failure::Method(known.into()).into(), None);
            }
        };
        let answer = self.dispatch(route, head, body, client).await;
        let (reply, basis) = answer.unwrap_or_else(|failure| (failure.into(), None));
        (Subject::Route(route), reply, basis)
    }

    /// Answers what was asked; tells what that rests on where it is asked again and again.
    ///
    /// A request is moved about before it runs, so that everything it seldom waits for is boxed:
    /// what is left is no larger than reading flags needs, which waits for nothing.
    async fn dispatch(
        &self,
        route: Route<'_>,
        head: &Parts,
        body: Arriving,
        client: Client,
    ) -> Result<(Reply, Option<Basis>), Failure> {
        let headers = &head.headers;
        let query = head.uri.query().unwrap_or_default();
        let reply = match route {
            Route::ClientFeatures => return self.features(headers, query).await,
            Route::Frontend(shown) => return self.flags(shown, head, body, client).await,
            Route::Health => Ok(self.ops.health()),
            Route::Ready => Ok(self.ops.ready()),
            Route::Prometheus => Ok(self.ops.metrics()),
            Route::Validate => {
                let limit = edge::LONGEST_QUESTION.min(self.settings.body_bytes);
                let answer = async {
                    let body = body.read(headers, limit).await?;
                    edge::validate(&self.auth, &body).await
                };
                Box::pin(self.guesses.answer(client.verified, answer)).await
            }
            Route::ClientFeature(name) => {
                let Reader { grant, snapshot, .. } =
                    self.reader(headers, &[TokenKind::Client]).await?;
                client::feature(headers, name, &snapshot, &grant.scope).await
            }
            Route::ClientDelta => Box::pin(self.delta(headers, query)).await,
            Route::ClientStreaming => Box::pin(self.stream(headers, query, client)).await,
            Route::FrontendFeature(name) => {
                let Reader { grant, snapshot, .. } =
                    self.reader(headers, &[TokenKind::Frontend]).await?;
                let body = self.context_body(head, body).await?;
                let told = context(head, body.as_ref())?;
                let asked = self.question(&told, client, &snapshot, &grant.scope);
                frontend::flag(headers, name, asked).await
            }
            Route::FrontendStreaming => Box::pin(self.follow_flags(head, body, client)).await,
            Route::OfrepEvents => Ok(ofrep::told(None, self.ofrep_events(head, client))),
            Route::OfrepFlags => {
                Ok(ofrep::told(None, Box::pin(self.ofrep_flags(head, body, client)).await))
            }
            Route::OfrepFlag(key) => {
                let answer = Box::pin(self.ofrep_flag(head, key, body, client)).await;
                Ok(ofrep::told(Some(key), answer))
            }
            Route::Register(kind) => {
                let report = Box::pin(self.report(kind, headers, body)).await?;
                let register =
                    || report::register(&self.usage, &report.reporter(), headers, &report.body);
                long::work(report.body.len(), register).await
            }
            Route::Metrics(kind) => {
                let report = Box::pin(self.report(kind, headers, body)).await?;
                let metrics =
                    || report::metrics(&self.usage, &report.reporter(), headers, &report.body);
                long::work(report.body.len(), metrics).await
            }
            Route::Bulk => {
                let report = Box::pin(self.report(TokenKind::Client, headers, body)).await?;
                let bulk = || report::bulk(&self.usage, &report.reporter(), &report.body);
                long::work(report.body.len(), bulk).await
            }
            Route::Instance => {
                let report = Box::pin(self.report(TokenKind::Client, headers, body)).await?;
                let instance = || report::instance(&self.usage, &report.reporter(), &report.body);
                long::work(report.body.len(), instance).await
            }
        };
        reply.map(|reply| (reply, None))
    }

    /// What an SDK or another edge reports with a token of a kind.
    async fn report(
        &self,
        kind: TokenKind,
        headers: &HeaderMap,
        body: Arriving,
    ) -> Result<Report, Failure> {
        let admission = self.admit(headers, &[kind]).await?;
        let body = self.read(headers, body).await?;
        let snapshot = self.snapshots.load(&admission.grant.scope.environment);
        Ok(Report { admission, snapshot, body })
    }

    /// Answers server SDKs.
    async fn features(
        &self,
        headers: &HeaderMap,
        query: &str,
    ) -> Result<(Reply, Option<Basis>), Failure> {
        let reader = self.reader(headers, &[TokenKind::Client]).await?;
        let scope = &reader.grant.scope;
        let mut reply = client::features(headers, query, &reader.snapshot, scope).await?;
        if self.streams.fetch_mode() == Some(FetchMode::Streaming) {
            reply::prefer_streaming(&mut reply);
        }
        Ok((reply, Some(reader.basis(Holds::Always))))
    }

    /// Answers frontends.
    async fn flags(
        &self,
        shown: Shown,
        head: &Parts,
        body: Arriving,
        client: Client,
    ) -> Result<(Reply, Option<Basis>), Failure> {
        let headers = &head.headers;
        let reader = self.reader(headers, &[TokenKind::Frontend]).await?;
        let body = self.context_body(head, body).await?;
        let found = {
            let told = context(head, body.as_ref())?;
            let scope = &reader.grant.scope;
            let question = self.question(&told, client, &reader.snapshot, scope);
            frontend::evaluated(headers, shown, &reader.snapshot.view(&scope.projects), question)
        };
        let basis = found.holds.map(|holds| reader.basis(holds));
        Ok((frontend::flags(headers, found).await, basis))
    }

    /// Answers OpenFeature's web providers.
    async fn ofrep_flags(
        &self,
        head: &Parts,
        body: Arriving,
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
        body: Arriving,
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
        body: Arriving,
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
                let arrival = tokio::time::timeout(self.settings.patience, arrival);
                Box::pin(arrival).await.ok().flatten()
            }
            None => None,
        };
        snapshot.map(|snapshot| Reader { grant, digest, snapshot }).ok_or(NO_FLAGS)
    }

    /// The body that holds the context, where it is not in the query.
    async fn context_body(&self, head: &Parts, body: Arriving) -> Result<Option<Bytes>, Failure> {
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
        body: Arriving,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, Failure>> + Send + 'a>> {
        Box::pin(body.read(headers, self.settings.body_bytes))
    }

    /// Reads a body that holds a context.
    fn read_context<'a>(
        &'a self,
        headers: &'a HeaderMap,
        body: Arriving,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, Failure>> + Send + 'a>> {
        Box::pin(body.read(headers, self.settings.body_bytes.min(LONGEST_CONTEXT)))
    }
}

/// Who reads flags, and which.
struct Reader {
    grant: Arc<Grant>,
    digest: TokenDigest,
    snapshot: Arc<Snapshot>,
}

impl Reader {
    /// What an answer to them rests on.
    fn basis(&self, holds: Holds) -> Basis {
        let snapshot = Arc::downgrade(&self.snapshot);
        Basis { digest: self.digest, grant: Arc::clone(&self.grant), snapshot, holds }
    }
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
