//! An upstream that serves what a test puts into its state: other flags for each token, a stale replica,
//! a stream that is rejected.
//!
//! It evaluates nothing and stores nothing. Faults of the connection are those of
//! [`ChaosProxy`](super::ChaosProxy).

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::http::request::Parts;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::net::wait_until;
use super::parapet::FEATURES;
use super::secret_leak_check;

/// The path of the event stream.
pub(crate) const STREAM: &str = "/api/client/streaming";

const TIMEOUT: Duration = Duration::from_mins(2);

/// The entity tags of the responses with flags.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum EntityTags {
    Absent,
    /// The names of the flags.
    Names,
    /// With the revision, as Unleash's.
    Revision,
}

/// A request as received.
#[derive(Clone, Debug)]
pub(crate) struct UpstreamRequest {
    pub(crate) path: String,
    token: Option<String>,
    pub(crate) last_event_id: Option<String>,
    pub(crate) if_none_match: Option<String>,
    /// The name of the edge that sent it.
    pub(crate) instance_id: Option<String>,
}

/// The responses of the upstream, which tests change at any time.
#[derive(Debug)]
pub(crate) struct UpstreamState {
    /// The flags of each token, as `project/name`. Those of `*` are for tokens that are not listed.
    flags: BTreeMap<String, Vec<String>>,
    pub(crate) entity_tags: EntityTags,
    /// The revision of the flags. Without one, each response has another in its `meta` object, although
    /// its flags are the same.
    pub(crate) revision: Option<u32>,
    /// The projects of a token, if not those in its prefix.
    pub(crate) projects: BTreeMap<&'static str, &'static [&'static str]>,
    /// The tokens that are for frontends.
    pub(crate) frontend_tokens: BTreeSet<&'static str>,
    /// Only tokens with this text are valid.
    pub(crate) valid_tokens_contain: &'static str,
    /// The tokens that the admin API lists, unless they are revoked.
    pub(crate) listed_tokens: BTreeSet<&'static str>,
    /// Tokens that have been revoked.
    pub(crate) revoked: BTreeSet<&'static str>,
    /// The status of requests with this path prefix and this token, or any token if it is empty.
    failures: BTreeMap<(&'static str, String), StatusCode>,
    /// The status of requests for the stream. 200 opens it.
    pub(crate) stream_status: StatusCode,
    /// Whether responses with flags refer to the stream.
    pub(crate) has_stream_hint: bool,
    /// The environments, and whether they are enabled.
    pub(crate) environments: Vec<(&'static str, bool)>,
    pub(crate) requests: Vec<UpstreamRequest>,
    open_streams: Vec<mpsc::UnboundedSender<io::Result<String>>>,
}

/// A running upstream. It ends with the runtime of the test.
#[derive(Clone, Debug)]
pub(crate) struct ScriptedUpstream {
    address: SocketAddr,
    state: Arc<Mutex<UpstreamState>>,
}

impl ScriptedUpstream {
    /// Starts an upstream without flags or a stream, to which every token is valid.
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let state = UpstreamState {
            flags: BTreeMap::new(),
            entity_tags: EntityTags::Names,
            revision: None,
            projects: BTreeMap::new(),
            frontend_tokens: BTreeSet::new(),
            valid_tokens_contain: "",
            listed_tokens: BTreeSet::new(),
            revoked: BTreeSet::new(),
            failures: BTreeMap::new(),
            stream_status: StatusCode::NOT_FOUND,
            has_stream_hint: false,
            environments: Vec::new(),
            requests: Vec::new(),
            open_streams: Vec::new(),
        };
        let address = listener.local_addr().unwrap();
        let upstream = Self { address, state: Arc::new(Mutex::new(state)) };
        let served = upstream.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let upstream = served.clone();
                let service = service_fn(move |request| {
                    let upstream = upstream.clone();
                    async move { Ok::<_, Infallible>(upstream.respond(request).await) }
                });
                let http = hyper::server::conn::http1::Builder::new();
                tokio::spawn(http.serve_connection(TokioIo::new(stream), service));
            }
        });
        upstream
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, UpstreamState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the flags of a token, or of all that have none with `*`.
    pub(crate) fn set_flags(&self, token: &str, flags: &[&str]) {
        let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        self.state().flags.insert(token.to_owned(), flags);
    }

    /// Responds with this status to requests with this path prefix and this token, or any token if it is
    /// empty.
    pub(crate) fn fail(&self, path_prefix: &'static str, token: &str, status: StatusCode) {
        self.state().failures.insert((path_prefix, token.to_owned()), status);
    }

    pub(crate) fn clear_failures(&self) {
        self.state().failures.clear();
    }

    /// The requests so far for this path.
    pub(crate) fn requests(&self, path: &str) -> Vec<UpstreamRequest> {
        self.state().requests.iter().filter(|it| it.path == path).cloned().collect()
    }

    /// The requests for this path, once there are at least `count`.
    pub(crate) async fn wait_for_requests(&self, path: &str, count: usize) -> Vec<UpstreamRequest> {
        wait_until(&format!("{path} is requested {count} times"), TIMEOUT, async || {
            let requests = self.requests(path);
            (requests.len() >= count).then_some(requests)
        })
        .await
    }

    /// The number of requests for flags with this token.
    pub(crate) fn poll_count(&self, token: &str) -> usize {
        let polls = self.requests(FEATURES);
        polls.iter().filter(|it| it.token.as_deref() == Some(token)).count()
    }

    /// The names of the edges that have sent requests.
    pub(crate) fn instance_ids(&self) -> BTreeSet<String> {
        self.state().requests.iter().filter_map(|it| it.instance_id.clone()).collect()
    }

    /// Waits for two more requests for flags with each token: then the first response has been applied.
    pub(crate) async fn wait_until_polled(&self, tokens: &[&str]) {
        let enough: Vec<_> = tokens.iter().map(|token| self.poll_count(token) + 2).collect();
        wait_until("flags are requested", TIMEOUT, async || {
            let mut counts = tokens.iter().zip(&enough);
            counts.all(|(token, count)| self.poll_count(token) >= *count).then_some(())
        })
        .await;
    }

    /// Sends this text on the open streams.
    pub(crate) fn send_event(&self, text: &str) {
        let mut state = self.state();
        state.open_streams.retain(|sender| sender.send(Ok(text.to_owned())).is_ok());
        assert!(!state.open_streams.is_empty(), "there is a stream");
    }

    /// Ends the open streams in an orderly way.
    pub(crate) fn end_streams(&self) {
        self.state().open_streams.clear();
    }

    /// Resets the open streams.
    pub(crate) fn reset_streams(&self) {
        for sender in self.state().open_streams.drain(..) {
            let _ = sender.send(Err(io::ErrorKind::ConnectionReset.into()));
        }
    }

    /// Whether the client has closed every stream.
    pub(crate) fn are_streams_closed(&self) -> bool {
        self.state().open_streams.iter().all(mpsc::UnboundedSender::is_closed)
    }

    async fn respond(&self, request: Request<Incoming>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        self.state().respond(&head, &body)
    }
}

impl UpstreamState {
    fn respond(&mut self, head: &Parts, body: &[u8]) -> Response<Body> {
        let header = |name| head.headers.get(name).map(|it| it.to_str().unwrap().to_owned());
        let path = head.uri.path();
        let request = UpstreamRequest {
            path: path.to_owned(),
            token: header("authorization"),
            last_event_id: header("last-event-id"),
            if_none_match: header("if-none-match"),
            instance_id: header("unleash-instanceid"),
        };
        self.requests.push(request.clone());
        let token = request.token.as_deref().unwrap_or_default();
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        let listed = body["tokens"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let listed: Vec<_> = listed.collect();
        let mut failures = self.failures.iter().filter(|((prefix, failing), _)| {
            path.starts_with(prefix)
                && ["", token].iter().chain(&listed).any(|token| token == failing)
        });
        if let Some((_, &status)) = failures.next() {
            return respond(status, &Value::Null);
        }
        match path {
            "/edge/validate" => respond(StatusCode::OK, &self.validate(&listed)),
            _ if self.revoked.contains(token) => respond(StatusCode::UNAUTHORIZED, &Value::Null),
            FEATURES => self.respond_with_flags(token, request.if_none_match.as_deref()),
            STREAM if self.stream_status == StatusCode::OK => {
                self.open_stream(token, request.last_event_id.as_deref())
            }
            STREAM => {
                let mut response = respond(self.stream_status, &json!({}));
                response.headers_mut().insert("retry-after", "1".parse().unwrap());
                response
            }
            "/api/admin/environments" => {
                let environments = self.environments.iter();
                let environments =
                    environments.map(|(name, enabled)| json!({"name": name, "enabled": enabled}));
                let environments = environments.collect::<Vec<_>>();
                respond(StatusCode::OK, &json!({"version": 1, "environments": environments}))
            }
            "/api/admin/api-tokens" if head.method == Method::POST => {
                let environment = body["environment"].as_str().unwrap();
                let secret = format!("*:{environment}.minted-0123456789abcdef0123456789");
                respond(StatusCode::CREATED, &json!({ "secret": secret }))
            }
            _ if path.starts_with("/api/admin/api-tokens") => {
                let listed = self.listed_tokens.difference(&self.revoked);
                let listed = listed.map(|token| {
                    let environment = token.split([':', '.']).nth(1);
                    json!({
                        "tokenName": "listed",
                        "type": if environment == Some("*") { "admin" } else { "client" },
                        "environment": environment,
                        "projects": ["*"],
                        "secret": token,
                    })
                });
                respond(StatusCode::OK, &json!({"tokens": listed.collect::<Vec<_>>()}))
            }
            _ => respond(StatusCode::NOT_FOUND, &Value::Null),
        }
    }

    /// The valid ones of these tokens. They become secrets, which must not be shown.
    fn validate(&self, tokens: &[&str]) -> Value {
        let is_valid = |token: &&&str| {
            token.contains(self.valid_tokens_contain) && !self.revoked.contains(**token)
        };
        let valid = tokens.iter().filter(is_valid).map(|&token| {
            secret_leak_check::register(token);
            let (project, rest) = token.split_once(':').unwrap();
            let (environment, _) = rest.split_once('.').unwrap();
            let projects = self.projects.get(token).map_or(vec![project], |it| it.to_vec());
            let kind = if self.frontend_tokens.contains(token) { "frontend" } else { "client" };
            json!({"token": token, "type": kind, "environment": environment, "projects": projects})
        });
        json!({ "tokens": valid.collect::<Vec<_>>() })
    }

    /// The flags of this token, as `project/name`.
    pub(crate) fn flags_of(&self, token: &str) -> &[String] {
        self.flags.get(token).or_else(|| self.flags.get("*")).map_or(&[], Vec::as_slice)
    }

    fn features_of(&self, token: &str) -> Vec<Value> {
        self.flags_of(token).iter().map(|flag| feature(flag)).collect()
    }

    fn respond_with_flags(&self, token: &str, if_none_match: Option<&str>) -> Response<Body> {
        let revision = self.revision.unwrap_or_default();
        let etag = match self.entity_tags {
            EntityTags::Absent => None,
            EntityTags::Names => Some(format!("\"{}\"", self.flags_of(token).join(" "))),
            EntityTags::Revision => Some(format!("\"76d8bb0e:{revision}:v1\"")),
        };
        let mut response = if etag.is_some() && if_none_match == etag.as_deref() {
            respond(StatusCode::NOT_MODIFIED, &Value::Null)
        } else {
            let revision = self.revision.map_or(self.requests.len(), |it| it as usize);
            let meta = json!({ "revisionId": revision });
            let features = self.features_of(token);
            respond(StatusCode::OK, &json!({"version": 2, "features": features, "meta": meta}))
        };
        if let Some(etag) = etag {
            response.headers_mut().insert("etag", etag.parse().unwrap());
        }
        if self.has_stream_hint {
            response.headers_mut().insert("fetch-mode", "streaming".parse().unwrap());
        }
        response
    }

    /// Opens a stream, with the whole state unless the client has it.
    fn open_stream(&mut self, token: &str, last_event_id: Option<&str>) -> Response<Body> {
        let id = self.revision.unwrap_or_default();
        let events = if last_event_id == Some(&*id.to_string()) {
            json!([])
        } else {
            let features = self.features_of(token);
            json!([{"type": "hydration", "eventId": id, "features": features, "segments": []}])
        };
        let (sender, receiver) = mpsc::unbounded_channel();
        sender.send(Ok(event("unleash-connected", id, &json!({ "events": events })))).unwrap();
        self.open_streams.push(sender);
        let chunks = stream::unfold(receiver, async |mut receiver| {
            let chunk: io::Result<String> = receiver.recv().await?;
            Some((chunk.map(|text| Frame::data(Bytes::from(text))), receiver))
        });
        let mut response = Response::new(StreamBody::new(chunks).boxed_unsync());
        let media_type = "text/event-stream; charset=utf-8".parse().unwrap();
        response.headers_mut().insert("content-type", media_type);
        response
    }
}

/// An enabled flag, from `project/name`.
pub(crate) fn feature(flag: &str) -> Value {
    let (project, name) = flag.split_once('/').unwrap();
    json!({"name": name, "project": project, "enabled": true, "strategies": [{"name": "default"}]})
}

/// The text of a server-sent event.
pub(crate) fn event(name: &str, id: u32, data: &Value) -> String {
    format!("event: {name}\nid: {id}\ndata: {data}\n\n")
}

type Body = UnsyncBoxBody<Bytes, io::Error>;

fn respond(status: StatusCode, body: &Value) -> Response<Body> {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let body = Full::from(body).map_err(|never| match never {}).boxed_unsync();
    Response::builder().status(status).body(body).unwrap()
}
