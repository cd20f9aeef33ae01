//! Requests over an in-memory connection, to Parapet's own service or to bare hyper, which sends the
//! same bytes without any logic.
//!
//! Only the server's side of the connection is counted, from reading to writing, not the client and the
//! runtime.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::StatusCode;
use hyper::body::Incoming;
use hyper::header::{
    AUTHORIZATION, CONTENT_LENGTH, DATE, ETAG, HeaderMap, HeaderName, HeaderValue,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parapet::changes::ChangeFeed;
use parapet::http::authorizer::Authorizer;
use parapet::http::client_address;
use parapet::http::cors::{self, Cors};
use parapet::http::failed_request_limiter::FailedRequestLimiter;
use parapet::http::health::HealthEndpoints;
use parapet::http::ofrep::{StreamTicketKey, StreamTickets};
use parapet::http::request_metrics::RequestMetrics;
use parapet::http::response::HttpResponse;
use parapet::http::sdk::{SdkService, Settings};
use parapet::http::streaming::{self, Streams};
use parapet::protocol::usage::ConnectVia;
use parapet::served::Snapshots;
use parapet::server::{self, Config, ConnectionLimits, Drain};
use parapet::telemetry::{self, Readiness};
use parapet::token::{Token, TokenKind};
use parapet::usage::{self, Usage};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use crate::{counted, scenarios};

const CLIENT: &str = "*:development.client-0123456789abcdef0123456789abcdef";
const FRONTEND_TOKEN: &str = "*:development.frontend-0123456789abcdef0123456789ab";
const UNREGISTERED_CLIENT: &str = "*:development.nobody-0123456789abcdef0123456789abcdef";

/// The capacity of a connection in each direction, in bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// The number of uncounted requests before the counted ones.
const WARM_UP: u64 = 50;

/// The server that responds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Server {
    Parapet,
    Bare,
}

/// A request, and the expected status of its response.
#[derive(Debug)]
pub(crate) struct Request {
    target: Target,
    token: &'static str,
    accept: &'static str,
    /// Whether the client sends `If-None-Match` with the current entity tag.
    revalidates: bool,
    status: StatusCode,
}

#[derive(Debug)]
enum Target {
    Features,
    /// Evaluated flags of one user.
    Frontend,
    /// Evaluated flags of a new user each time.
    NewUser,
    Metrics,
}

pub(crate) const FEATURES: Request = Request {
    target: Target::Features,
    token: CLIENT,
    accept: "identity",
    revalidates: false,
    status: StatusCode::OK,
};
pub(crate) const FEATURES_GZIP: Request = Request { accept: "gzip", ..FEATURES };
pub(crate) const FEATURES_UNCHANGED: Request =
    Request { revalidates: true, status: StatusCode::NOT_MODIFIED, ..FEATURES };
pub(crate) const FRONTEND: Request =
    Request { target: Target::Frontend, token: FRONTEND_TOKEN, ..FEATURES };
pub(crate) const FRONTEND_UNCHANGED: Request =
    Request { revalidates: true, status: StatusCode::NOT_MODIFIED, ..FRONTEND };
pub(crate) const FRONTEND_NEW_USERS: Request = Request { target: Target::NewUser, ..FRONTEND };
pub(crate) const METRICS: Request =
    Request { target: Target::Metrics, status: StatusCode::ACCEPTED, ..FEATURES };
pub(crate) const UNKNOWN_TOKEN: Request =
    Request { token: UNREGISTERED_CLIENT, status: StatusCode::UNAUTHORIZED, ..FEATURES };

/// The query of a frontend SDK for a user.
pub(crate) fn query(user: &str) -> String {
    format!(
        "userId={user}&sessionId=5f2b6a&environment=v3&appName=v5&properties%5Bcountry%5D=v7\
         &properties%5Bplan%5D=v12&properties%5Bversion%5D=1.5.2"
    )
}

impl Request {
    /// Sends it repeatedly, and counts the last `times` requests.
    pub(crate) fn run(&self, server: Server, flags: usize, times: u64) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("the runtime builds").block_on(self.repeat(server, flags, times));
    }

    async fn repeat(&self, server: Server, flags: usize, times: u64) {
        let mut connection = Connection::to_parapet(flags);
        let mut etag = None;
        if self.revalidates {
            etag = connection.send(&self.to_http(0, None)).await.headers.remove(ETAG);
        }
        if server == Server::Bare {
            let answer = connection.send(&self.to_http(0, etag.as_ref())).await;
            connection = Connection::to_bare(answer);
        }
        for n in 0..WARM_UP + times {
            connection.is_counted.store(n >= WARM_UP, Ordering::Relaxed);
            let answer = connection.send(&self.to_http(n, etag.as_ref())).await;
            assert_eq!(answer.status, self.status);
        }
    }

    /// The `n`th request as it is sent.
    fn to_http(&self, n: u64, etag: Option<&HeaderValue>) -> String {
        let (method, path, body) = match self.target {
            Target::Features => ("GET", "/api/client/features".to_owned(), ""),
            Target::Frontend => ("GET", format!("/api/frontend?{}", query("user-4711")), ""),
            Target::NewUser => {
                ("GET", format!("/api/frontend?{}", query(&format!("user-{n:04}"))), "")
            }
            Target::Metrics => ("POST", "/api/client/metrics".to_owned(), METRICS_BODY),
        };
        let Self { token, accept, .. } = self;
        let mut text = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost:3063\r\nauthorization: {token}\r\n\
             unleash-client-spec: 5.2.0\r\nuser-agent: bench\r\naccept-encoding: {accept}\r\n"
        );
        write_ingress_headers(&mut text, n);
        if let Some(etag) = etag {
            write!(text, "if-none-match: {}\r\n", etag.to_str().expect("visible"))
                .expect(WRITE_SUCCEEDS);
        }
        if !body.is_empty() {
            let length = body.len();
            write!(text, "content-type: application/json\r\ncontent-length: {length}\r\n")
                .expect(WRITE_SUCCEEDS);
        }
        text.push_str("\r\n");
        text.push_str(body);
        text
    }
}

/// Adds the headers of an ingress, with different values each time.
fn write_ingress_headers(text: &mut String, n: u64) {
    let (id, trace, host) = (n * 2_654_435_761, n * 40_503, n % 250);
    write!(
        text,
        "x-request-id: {id:032x}\r\ntraceparent: 00-{trace:032x}-{n:016x}-01\r\n\
         x-forwarded-for: 10.1.0.{host}\r\n"
    )
    .expect(WRITE_SUCCEEDS);
}

const WRITE_SUCCEEDS: &str = "memory takes it";

/// An SDK's report of a minute with evaluations of three flags.
const METRICS_BODY: &str = r#"{"appName":"shop","instanceId":"shop-1","bucket":{"start":"2026-01-01T10:00:00.000Z","stop":"2026-01-01T10:01:00.000Z","toggles":{"team0.feature-0000":{"yes":120,"no":7,"variants":{"a":80,"b":40}},"team1.feature-0001":{"yes":3,"no":0,"variants":{}},"team2.feature-0002":{"yes":0,"no":912,"variants":{}}}}}"#;

/// A response.
struct Response {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

/// The client's end of a connection. The other end is served on the same thread.
struct Connection {
    stream: DuplexStream,
    is_counted: Arc<AtomicBool>,
}

impl Connection {
    /// Connects to the service of the data listener, served as by the listener.
    fn to_parapet(flags: usize) -> Self {
        let data = Arc::new(sdk_service(flags));
        let config = Config { limits: LIMITS, load_balancers: Vec::new(), tls: None };
        let server = server::HttpServer::new(data, config, Drain::default());
        Self::serve(|stream| server.serve(stream, PEER))
    }

    /// Connects to a server that reads a request and always sends this response.
    fn to_bare(answer: Response) -> Self {
        let Response { status, mut headers, body } = answer;
        // Hyper adds these itself.
        headers.remove(DATE);
        headers.remove(CONTENT_LENGTH);
        let answer = move || {
            let mut reply = HttpResponse::new(body.clone().into());
            *reply.status_mut() = status;
            reply.headers_mut().clone_from(&headers);
            reply
        };
        Self::serve(|stream| {
            let service = service_fn(move |request: hyper::Request<Incoming>| {
                let reply = answer();
                async move {
                    request.into_body().collect().await?;
                    Ok::<_, hyper::Error>(reply)
                }
            });
            let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            async { connection.await.expect("it ends with its client") }
        })
    }

    fn serve<F>(serving: impl FnOnce(DuplexStream) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (stream, other) = tokio::io::duplex(BUFFER_BYTES);
        let is_counted = Arc::new(AtomicBool::new(false));
        let inner = Box::pin(serving(other));
        tokio::spawn(CountedConnection { inner, is_counted: Arc::clone(&is_counted) });
        Self { stream, is_counted }
    }

    async fn send(&mut self, request: &str) -> Response {
        self.stream.write_all(request.as_bytes()).await.expect("the server reads");
        let mut received = Vec::new();
        let head = loop {
            self.receive(&mut received).await;
            if let Some(at) = received.windows(4).position(|it| it == b"\r\n\r\n") {
                break at + 4;
            }
        };
        let (status, headers) = read_head(&received[..head]);
        let length = headers.get(CONTENT_LENGTH).and_then(|it| it.to_str().ok()?.parse().ok());
        let length = if status == StatusCode::NOT_MODIFIED { 0 } else { length.unwrap_or(0) };
        while received.len() < head + length {
            self.receive(&mut received).await;
        }
        Response { status, headers, body: Bytes::from(received).slice(head..) }
    }

    async fn receive(&mut self, received: &mut Vec<u8>) {
        let read = self.stream.read_buf(received).await.expect("the server writes");
        assert!(read > 0, "the server hung up");
    }
}

fn read_head(head: &[u8]) -> (StatusCode, HeaderMap) {
    let head = std::str::from_utf8(head).expect("a head is ASCII");
    let (first, fields) = head.split_once("\r\n").expect("it has an end");
    let status = first.split(' ').nth(1).and_then(|it| it.parse().ok()).expect("it has a status");
    let field = |line: &str| -> Option<(HeaderName, HeaderValue)> {
        let (name, value) = line.split_once(": ")?;
        Some((name.parse().ok()?, value.parse().ok()?))
    };
    (status, fields.lines().filter_map(field).collect())
}

/// A connection that is being served, and counted while `is_counted` is set.
struct CountedConnection<F> {
    inner: Pin<Box<F>>,
    is_counted: Arc<AtomicBool>,
}

impl<F: Future<Output = ()>> Future for CountedConnection<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if !self.is_counted.load(Ordering::Relaxed) {
            return self.inner.as_mut().poll(context);
        }
        let mut polled = Poll::Pending;
        counted(&mut || polled = self.inner.as_mut().poll(context));
        polled
    }
}

const TIMEOUT: Duration = Duration::from_secs(30);

const LIMITS: ConnectionLimits = ConnectionLimits {
    max_connections: 1,
    max_connections_per_address: None,
    header_read_timeout: TIMEOUT,
    idle_timeout: TIMEOUT,
    max_age: None,
};
const PEER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 40_000);

/// The data listener's service of an edge, with default settings.
fn sdk_service(flags: usize) -> SdkService {
    let registry = telemetry::start_metrics();
    let (readiness, _) = Readiness::new();
    let snapshots = Snapshots::default();
    snapshots.swap(scenarios::snapshot(flags));
    let tokens = [(CLIENT, TokenKind::Client), (FRONTEND_TOKEN, TokenKind::Frontend)];
    let tokens = tokens.map(|(text, kind)| (Token::parse(text).expect("sound"), kind));
    let interval = Duration::from_mins(1);
    let hop = ConnectVia { app_name: "parapet".into(), instance_id: "bench".into() };
    let request_metrics = Arc::new(RequestMetrics::default());
    let (feed, auth) = (ChangeFeed::new(snapshots.clone()), scenarios::authenticator(tokens));
    let streams = streaming::Config {
        max_streams: 1,
        max_per_address: 1,
        max_per_token: 1,
        max_age: interval,
        fetch_mode: None,
    };
    let usage = Usage::new(&usage::Config { interval, max_counters: 100_000 }, hop);
    SdkService {
        settings: Settings {
            base_path: String::new(),
            cors: Cors::new(cors::Config::default()),
            access: client_address::Config::default(),
            disabled_endpoints: BTreeSet::new(),
            max_body_bytes: 1 << 20,
            request_timeout: TIMEOUT,
            hostname: "bench".into(),
        },
        authorizer: Authorizer {
            auth: auth.clone(),
            snapshots: snapshots.clone(),
            token_header: AUTHORIZATION,
            first_fetch_timeout: TIMEOUT,
        },
        streams: Streams::new(streams, auth),
        feed,
        stream_tickets: StreamTickets::new(StreamTicketKey::random()),
        health: HealthEndpoints::new(
            readiness,
            registry,
            snapshots,
            usage.clone(),
            Arc::clone(&request_metrics),
            None,
        ),
        usage,
        request_metrics,
        failed_attempts: FailedRequestLimiter::default(),
    }
}
