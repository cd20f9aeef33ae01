//! A proxy in front of an upstream that injects the faults of networks and servers, and records
//! requests.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use reqwest::{Method, StatusCode};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::net::{free_port, http};

/// A fault to inject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// No fault: requests and responses pass.
    None,
    /// Open connections break, and new ones are refused.
    Disconnect,
    /// Requests are accepted but never answered, and streams send nothing.
    Stall,
    /// Requests reach the upstream, but the connection breaks before the response returns.
    DropResponses,
    /// The proxy responds itself, with this status, these headers and this body.
    Respond { status: StatusCode, headers: Vec<(&'static str, &'static str)>, body: &'static str },
    /// The proxy responds to POST requests with this path prefix with this status, as a firewall does;
    /// all other requests pass.
    RejectPosts { prefix: &'static str, status: StatusCode },
    /// The proxy responds to GET requests for this path itself; all other requests pass.
    RespondToGet { path: &'static str, status: StatusCode, body: &'static str },
    /// The proxy redirects requests to `to` followed by their path. It forwards requests whose path is
    /// below `to`, without that prefix.
    Redirect { to: String },
    /// All requests pass, but responses to GET requests for this path wait until the fault changes.
    BlockResponsesTo { path: &'static str },
}

/// A request that reached the proxy, with or without a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RecordedRequest {
    pub(crate) method: Method,
    /// Path and query.
    pub(crate) path: String,
    /// As received, not decompressed.
    pub(crate) body: Bytes,
}

/// A running proxy. It ends with the runtime of the test.
#[derive(Debug)]
pub(crate) struct ChaosProxy {
    address: SocketAddr,
    fault: watch::Sender<Fault>,
    /// Whether the proxy listens at the moment; lags behind `fault`.
    listening: watch::Receiver<bool>,
    recorded: Arc<Mutex<Vec<RecordedRequest>>>,
    /// The number of responses that are waiting.
    blocked: watch::Receiver<usize>,
}

impl ChaosProxy {
    /// Starts a proxy for `upstream` (`http://host:port`) without a fault.
    pub(crate) async fn start(upstream: &str) -> Self {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let (fault, faults) = watch::channel(Fault::None);
        let (listens, mut listening) = watch::channel(false);
        let recorded = Arc::<Mutex<Vec<RecordedRequest>>>::default();
        let (block_counter, blocked) = watch::channel(0);
        let worker = ProxyWorker {
            upstream: upstream.to_owned(),
            faults,
            recorded: Arc::clone(&recorded),
            blocked: block_counter,
        };
        tokio::spawn(worker.run(address, listens));
        listening.wait_for(|&listening| listening).await.expect("the proxy runs");
        Self { address, fault, listening, recorded, blocked }
    }

    /// The URL that clients use instead of the upstream's.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Injects this fault from now on. [`Fault::Disconnect`] also breaks requests in progress.
    pub(crate) async fn set_fault(&self, fault: Fault) {
        let listening = fault != Fault::Disconnect;
        self.fault.send_replace(fault);
        let mut trailing = self.listening.clone();
        trailing.wait_for(|&now| now == listening).await.expect("the proxy runs");
    }

    pub(crate) async fn disconnect(&self) {
        self.set_fault(Fault::Disconnect).await;
    }

    pub(crate) async fn stall(&self) {
        self.set_fault(Fault::Stall).await;
    }

    /// Responds to every request with this status and these headers, without the upstream.
    pub(crate) async fn respond_with(
        &self,
        status: StatusCode,
        headers: &[(&'static str, &'static str)],
    ) {
        self.set_fault(Fault::Respond { status, headers: headers.to_vec(), body: "" }).await;
    }

    pub(crate) async fn restore(&self) {
        self.set_fault(Fault::None).await;
    }

    /// Blocks the upstream's responses to GET requests for `path`, and returns when the first one waits.
    pub(crate) async fn block_response_to(&self, path: &'static str) {
        self.set_fault(Fault::BlockResponsesTo { path }).await;
        let mut blocked = self.blocked.clone();
        blocked.wait_for(|&blocked| blocked > 0).await.expect("the proxy runs");
    }

    /// All requests so far, in order of arrival.
    pub(crate) fn requests(&self) -> Vec<RecordedRequest> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The number of requests so far with this path prefix.
    pub(crate) fn request_count(&self, path_prefix: &str) -> usize {
        let recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        recorded.iter().filter(|request| request.path.starts_with(path_prefix)).count()
    }
}

/// The task that accepts and forwards connections.
#[derive(Clone)]
struct ProxyWorker {
    upstream: String,
    faults: watch::Receiver<Fault>,
    recorded: Arc<Mutex<Vec<RecordedRequest>>>,
    blocked: watch::Sender<usize>,
}

impl ProxyWorker {
    async fn run(mut self, address: SocketAddr, listens: watch::Sender<bool>) {
        loop {
            if self.faults.wait_for(|fault| *fault != Fault::Disconnect).await.is_err() {
                return;
            }
            let listener = listen(address);
            listens.send_replace(true);
            // On a disconnect, dropping these two closes the port and every connection.
            let mut connections = JoinSet::new();
            let mut faults = self.faults.clone();
            let cut = faults.wait_for(|fault| *fault == Fault::Disconnect);
            let accept = async {
                loop {
                    if let Ok((stream, _)) = listener.accept().await {
                        connections.spawn(self.clone().serve(stream));
                    }
                }
            };
            let gone = tokio::select! {
                cut = cut => cut.is_err(),
                () = accept => false,
            };
            connections.shutdown().await;
            drop(listener);
            listens.send_replace(false);
            if gone {
                return;
            }
        }
    }

    async fn serve(self, stream: TcpStream) {
        let service = service_fn(|request| self.clone().respond(request));
        // Ends with an error when the response is dropped on purpose, or when the client disconnects.
        let _ = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }

    async fn respond(self, request: Request<Incoming>) -> Result<Response<Body>, ResponseDropped> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.map_err(|_| ResponseDropped)?.to_bytes();
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let recorded =
            RecordedRequest { method: head.method.clone(), path: path.clone(), body: body.clone() };
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner).push(recorded);

        let fault = self.faults.borrow().clone();
        let redirected = match &fault {
            Fault::Redirect { to } => path.strip_prefix(to.as_str()),
            _ => None,
        };
        let forward = async || {
            let mut headers = head.headers.clone();
            headers.remove("host");
            headers.remove("connection");
            let url = self.upstream.clone() + redirected.unwrap_or(&path);
            let request = http().request(head.method.clone(), url).headers(headers);
            let mut request = request.body(body.clone());
            if path.ends_with("/streaming") {
                request = request.timeout(STREAM_TIMEOUT);
            }
            request.send().await.map_err(|_| ResponseDropped)
        };
        let is_post_to =
            |prefix: &str| head.method == Method::POST && head.uri.path().starts_with(prefix);
        let is_get_of = |path: &str| head.method == Method::GET && head.uri.path() == path;
        match fault {
            Fault::RejectPosts { prefix, status } if is_post_to(prefix) => {
                let response = Response::builder().status(status).body(full_body(Bytes::new()));
                Ok(response.expect("a status alone is a response"))
            }
            Fault::RespondToGet { path, status, body } if is_get_of(path) => {
                let response = Response::builder().status(status).body(full_body(body.into()));
                Ok(response.expect("tests make well-formed responses"))
            }
            Fault::Redirect { to } if redirected.is_none() => {
                let response = Response::builder().status(StatusCode::PERMANENT_REDIRECT);
                let response = response.header("location", to + &path);
                Ok(response.body(full_body(Bytes::new())).expect("tests redirect to a URL"))
            }
            Fault::None
            | Fault::Redirect { .. }
            | Fault::RejectPosts { .. }
            | Fault::RespondToGet { .. }
            | Fault::BlockResponsesTo { .. } => {
                let received = forward().await?;
                let mut response = Response::builder().status(received.status());
                for (name, value) in received.headers() {
                    if !["connection", "transfer-encoding", "content-length"]
                        .contains(&name.as_str())
                    {
                        response = response.header(name, value);
                    }
                }
                let is_stream = received
                    .headers()
                    .get("content-type")
                    .is_some_and(|it| it == "text/event-stream");
                let body = if is_stream {
                    self.clone().forward_stream(received)
                } else {
                    full_body(received.bytes().await.map_err(|_| ResponseDropped)?)
                };
                if let Fault::BlockResponsesTo { path } = &fault
                    && is_get_of(path)
                {
                    self.wait_while_fault_lasts(&fault).await?;
                }
                Ok(response.body(body).expect("the upstream's response is well-formed"))
            }
            Fault::Stall => match std::future::pending::<Infallible>().await {},
            Fault::DropResponses => {
                forward().await?.bytes().await.map_err(|_| ResponseDropped)?;
                Err(ResponseDropped)
            }
            Fault::Disconnect => Err(ResponseDropped),
            Fault::Respond { status, headers, body } => {
                let response = headers
                    .into_iter()
                    .fold(Response::builder().status(status), |response, (name, value)| {
                        response.header(name, value)
                    });
                Ok(response.body(full_body(body.into())).expect("tests make well-formed responses"))
            }
        }
    }

    /// Returns when the fault is no longer `fault`.
    async fn wait_while_fault_lasts(&self, fault: &Fault) -> Result<(), ResponseDropped> {
        self.blocked.send_modify(|blocked| *blocked += 1);
        let over = self.faults.clone().wait_for(|now| now != fault).await.map(drop);
        self.blocked.send_modify(|blocked| *blocked -= 1);
        over.map_err(|_| ResponseDropped)
    }

    /// The body of a stream, chunk by chunk.
    fn forward_stream(self, response: reqwest::Response) -> Body {
        let chunks = stream::unfold((response, self.faults), async |(mut response, mut faults)| {
            let chunk = response.chunk().await;
            faults.wait_for(|fault| *fault != Fault::Stall).await.ok()?;
            let chunk =
                chunk.map(|it| it.map(Frame::data)).map_err(|_| ResponseDropped).transpose()?;
            Some((chunk, (response, faults)))
        });
        StreamBody::new(chunks).boxed_unsync()
    }
}

type Body = UnsyncBoxBody<Bytes, ResponseDropped>;

fn full_body(body: Bytes) -> Body {
    Full::from(body).map_err(|never| match never {}).boxed_unsync()
}

/// The longest that a stream lasts.
const STREAM_TIMEOUT: Duration = Duration::from_hours(1);

/// The connection closes without a response.
#[derive(Debug, thiserror::Error)]
#[error("the response was dropped on purpose")]
struct ResponseDropped;

/// Listens, even while connections of an earlier listener linger.
fn listen(address: SocketAddr) -> TcpListener {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    socket.listen(1024).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A proxy in front of another one, which acts as the upstream and responds `hello`.
    async fn proxy_and_upstream() -> (ChaosProxy, ChaosProxy) {
        let upstream = ChaosProxy::start("http://127.0.0.1:9").await;
        let hello = Fault::Respond {
            status: StatusCode::ACCEPTED,
            headers: vec![("etag", "\"1\"")],
            body: "hello",
        };
        upstream.set_fault(hello).await;
        (ChaosProxy::start(&upstream.url()).await, upstream)
    }

    async fn post(proxy: &ChaosProxy) -> reqwest::Result<reqwest::Response> {
        http().post(proxy.url() + "/a/b?c=d").body("a body").send().await
    }

    #[tokio::test]
    async fn requests_and_responses_pass_unchanged_without_fault() {
        let (proxy, upstream) = proxy_and_upstream().await;
        let response = post(&proxy).await.unwrap();
        assert_eq!(response.status(), StatusCode::ACCEPTED);
        assert_eq!(response.headers()["etag"], "\"1\"");
        assert_eq!(response.text().await.unwrap(), "hello");
        let recorded = RecordedRequest {
            method: Method::POST,
            path: "/a/b?c=d".to_owned(),
            body: "a body".into(),
        };
        assert_eq!(proxy.requests(), std::slice::from_ref(&recorded));
        assert_eq!(upstream.requests(), [recorded]);
    }

    #[tokio::test]
    async fn disconnect_refuses_connections_until_restored() {
        let (proxy, upstream) = proxy_and_upstream().await;
        proxy.disconnect().await;
        assert!(post(&proxy).await.unwrap_err().is_connect());
        proxy.restore().await;
        assert!(post(&proxy).await.is_ok());
        assert_eq!(upstream.request_count("/a"), 1);
    }

    #[tokio::test]
    async fn disconnect_breaks_requests_in_progress() {
        let (proxy, upstream) = proxy_and_upstream().await;
        proxy.stall().await;
        let stalled = post(&proxy);
        let cut = async {
            super::super::net::wait_until(
                "the request has arrived",
                Duration::from_secs(10),
                async || (proxy.request_count("/a") == 1).then_some(()),
            )
            .await;
            proxy.disconnect().await;
        };
        let (response, ()) = tokio::join!(stalled, cut);
        assert!(response.is_err());
        assert_eq!(upstream.request_count("/"), 0);
    }

    #[tokio::test]
    async fn request_with_dropped_response_reaches_upstream() {
        let (proxy, upstream) = proxy_and_upstream().await;
        proxy.set_fault(Fault::DropResponses).await;
        assert!(post(&proxy).await.is_err());
        assert_eq!(upstream.request_count("/a"), 1);
    }

    #[tokio::test]
    async fn responses_to_one_path_are_blocked_until_fault_changes() {
        let (proxy, upstream) = proxy_and_upstream().await;
        let get = async |path: &str| http().get(proxy.url() + path).send().await.unwrap().status();
        let blocked = get("/held");
        let meanwhile = async {
            proxy.block_response_to("/held").await;
            assert_eq!(upstream.request_count("/held"), 1, "upstream has responded");
            assert_eq!(get("/other").await, StatusCode::ACCEPTED);
            let (status, body) = (StatusCode::BAD_GATEWAY, "");
            proxy.set_fault(Fault::RespondToGet { path: "/held", status, body }).await;
            assert_eq!(get("/held").await, status);
            assert_eq!(get("/other").await, StatusCode::ACCEPTED);
        };
        // The request is sent while the proxy blocks responses already.
        proxy.set_fault(Fault::BlockResponsesTo { path: "/held" }).await;
        let (blocked, ()) = tokio::join!(blocked, meanwhile);
        assert_eq!(blocked, StatusCode::ACCEPTED);
    }

    #[tokio::test]
    async fn proxy_responds_itself_with_configured_status() {
        let (proxy, upstream) = proxy_and_upstream().await;
        proxy.respond_with(StatusCode::SERVICE_UNAVAILABLE, &[("retry-after", "7")]).await;
        let response = post(&proxy).await.unwrap();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()["retry-after"], "7");
        assert_eq!(upstream.request_count("/"), 0);
    }
}
