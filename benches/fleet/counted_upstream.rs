//! An Unleash server that counts what it is asked.
//!
//! It has the endpoints that an edge uses: flags with entity tags, the event log, lists of tokens and
//! environments, creation and validation of tokens, and usage. It runs on threads of this process, so that
//! the benchmark reads its counters directly.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::Result;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{AUTHORIZATION, CONTENT_TYPE, ETAG, HeaderValue, IF_NONE_MATCH},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::flags::document;

/// The admin token.
pub(crate) const ADMIN: &str = "*:*.admin-of-the-benchmark-0123456789abcdef0123456789abcd";

/// The flag that changes.
pub(crate) const CHANGED_FLAG: &str = "changed-by-the-benchmark";

/// A running server.
#[derive(Clone)]
pub(crate) struct CountedUpstream {
    pub(crate) address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// The flags without the one that changes.
    document: Value,
    revision: u64,
    /// When a request first got this revision.
    first_seen: BTreeMap<u64, Instant>,
    tokens: Vec<(String, Value)>,
    /// The number of events, which is also the id of the newest.
    events: u64,
    newest_event: &'static str,
    requests: BTreeMap<&'static str, u64>,
    evaluations: u64,
}

impl CountedUpstream {
    /// Starts a server with this many flags.
    pub(crate) async fn start(flags: usize) -> Result<Self> {
        let document = serde_json::from_str(&document(flags))?;
        let state =
            State { document, events: 1, newest_event: "feature-created", ..State::default() };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let upstream = Self { address, state: Arc::new(Mutex::new(state)) };
        let served = upstream.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let upstream = served.clone();
                tokio::spawn(async move {
                    let service = service_fn(|request| upstream.respond(request));
                    let connection = http1::Builder::new();
                    let _ = connection.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Ok(upstream)
    }

    /// The requests so far, by purpose.
    pub(crate) fn requests(&self) -> BTreeMap<&'static str, u64> {
        self.state().requests.clone()
    }

    /// The number of evaluations that were reported.
    pub(crate) fn evaluations(&self) -> u64 {
        self.state().evaluations
    }

    /// Changes the flag, and returns the new revision.
    pub(crate) fn change_flag(&self) -> u64 {
        let mut state = self.state();
        state.revision += 1;
        state.log_event("feature-updated");
        state.revision
    }

    /// When some instance first got this revision.
    pub(crate) fn first_seen(&self, revision: u64) -> Option<Instant> {
        self.state().first_seen.get(&revision).copied()
    }

    /// Creates a backend token.
    pub(crate) fn create_token(&self, name: &str) -> String {
        let mut state = self.state();
        state.create_token(name)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn respond(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let (head, body) = request.into_parts();
        let body =
            body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let header = |name| head.headers.get(name).and_then(|it: &HeaderValue| it.to_str().ok());
        let path = head.uri.path();
        let mut state = self.state();
        let (purpose, (status, etag, body)) = match (&head.method, path) {
            (&Method::GET, "/api/client/features") => {
                ("flags", state.features(header(IF_NONE_MATCH)))
            }
            (&Method::GET, "/api/client/streaming" | "/api/client/delta") => {
                ("streams", (StatusCode::NOT_FOUND, None, Value::Null))
            }
            (&Method::GET, "/api/admin/search/events") => ("event log", ok(state.event_page())),
            (&Method::GET, "/api/admin/environments") => {
                let environment = json!({ "name": "development", "enabled": true });
                ("environments", ok(json!({ "environments": [environment] })))
            }
            (&Method::GET, "/api/admin/api-tokens") => ("tokens", ok(state.token_list(None))),
            (&Method::GET, _) if path.starts_with("/api/admin/api-tokens/") => {
                ("tokens", ok(state.token_list(path.rsplit('/').next())))
            }
            (&Method::POST, "/api/admin/api-tokens") => {
                let name = body["tokenName"].as_str().unwrap_or_default().to_owned();
                let secret = state.create_token(&name);
                let token = state.token(&secret).cloned().unwrap_or_default();
                ("new tokens", (StatusCode::CREATED, None, token))
            }
            (&Method::POST, "/edge/validate") => ("validation", ok(state.validate(&body))),
            (&Method::GET, _) if path.starts_with("/api/client/features/") => {
                let is_known = header(AUTHORIZATION).is_some_and(|it| state.token(it).is_some());
                let status =
                    if is_known { StatusCode::NOT_FOUND } else { StatusCode::UNAUTHORIZED };
                ("validation", (status, None, Value::Null))
            }
            (&Method::POST, "/api/client/metrics/bulk") => {
                state.count_usage(&body);
                ("usage", (StatusCode::ACCEPTED, None, Value::Null))
            }
            _ => ("others", (StatusCode::NOT_FOUND, None, Value::Null)),
        };
        *state.requests.entry(purpose).or_default() += 1;
        drop(state);
        let is_empty = body.is_null();
        let bytes = if is_empty { Bytes::new() } else { Bytes::from(body.to_string()) };
        let mut response = Response::new(Full::new(bytes));
        *response.status_mut() = status;
        let json = HeaderValue::from_static("application/json");
        response.headers_mut().insert(CONTENT_TYPE, json);
        if let Some(etag) = etag {
            let etag = HeaderValue::try_from(etag).expect("a number in quotes");
            response.headers_mut().insert(ETAG, etag);
        }
        Ok(response)
    }
}

type Reply = (StatusCode, Option<String>, Value);

fn ok(body: Value) -> Reply {
    (StatusCode::OK, None, body)
}

impl State {
    fn log_event(&mut self, event_type: &'static str) {
        self.events += 1;
        self.newest_event = event_type;
    }

    fn features(&mut self, known: Option<&str>) -> Reply {
        let etag = format!("\"76d8bb0e:{}:v1\"", self.revision);
        if known == Some(&etag) {
            return (StatusCode::NOT_MODIFIED, Some(etag), Value::Null);
        }
        self.first_seen.entry(self.revision).or_insert_with(Instant::now);
        let flag = json!({
            "name": CHANGED_FLAG, "type": "release", "enabled": true, "stale": false,
            "description": self.revision.to_string(), "impressionData": false,
            // Unleash Edge serves no flag without a project.
            "project": "default", "strategies": [], "variants": [],
        });
        let mut body = self.document.clone();
        body["features"].as_array_mut().expect("the document has flags").push(flag);
        body["meta"] =
            json!({ "revisionId": self.revision, "etag": etag, "queryHash": "76d8bb0e" });
        (StatusCode::OK, Some(etag), body)
    }

    fn event_page(&self) -> Value {
        let event = json!({
            "id": self.events, "type": self.newest_event, "createdAt": Timestamp::now().to_string(),
            "environment": null,
        });
        json!({ "events": [event], "total": self.events })
    }

    fn create_token(&mut self, name: &str) -> String {
        let n = self.tokens.len();
        let secret = format!("*:development.token-{n}-of-the-benchmark-0123456789abcdef");
        let token = json!({
            "secret": secret, "tokenName": name, "username": name, "type": "client",
            "environment": "development", "project": "*", "projects": ["*"],
            "createdAt": Timestamp::now().to_string(), "expiresAt": null,
        });
        self.tokens.push((secret.clone(), token));
        self.log_event("api-token-created");
        secret
    }

    fn token(&self, secret: &str) -> Option<&Value> {
        self.tokens.iter().find(|(it, _)| it == secret).map(|(_, token)| token)
    }

    fn token_list(&self, name: Option<&str>) -> Value {
        let is_listed = |token: &&Value| name.is_none_or(|name| token["tokenName"] == name);
        let tokens: Vec<_> = self.tokens.iter().map(|(_, token)| token).filter(is_listed).collect();
        json!({ "tokens": tokens })
    }

    fn validate(&self, body: &Value) -> Value {
        let presented = body["tokens"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let valid = presented.filter_map(|secret| self.token(secret)).map(|token| {
            json!({
                "token": token["secret"], "type": "client",
                "environment": "development", "projects": ["*"],
            })
        });
        json!({ "tokens": valid.collect::<Vec<_>>() })
    }

    fn count_usage(&mut self, body: &Value) {
        for metric in body["metrics"].as_array().into_iter().flatten() {
            self.evaluations += metric["yes"].as_u64().unwrap_or_default();
        }
    }
}
