//! An Unleash server whose flags change ten times a second on request.
//!
//! It supports only what an edge needs: every token is valid, and usage is accepted and dropped. It runs
//! in its own process: this executable with the subcommand `upstream`; the lines `swap` and `calm` on
//! its input start and stop the changes. A request for flags waits up to a tenth of a second for a
//! change, so that an edge that polls continuously gets every change.

use std::{
    convert::Infallible,
    io::BufRead,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, header, server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::flags::document;

/// The interval of changes.
pub(crate) const CHANGE_INTERVAL: Duration = Duration::from_millis(100);

/// The path with the number of flag sets that were fetched.
pub(crate) const COUNT_PATH: &str = "/count";

/// The text that changes: the description of one flag, so that no evaluation changes.
const CHANGED_TEXT: &str = "Some description of feature 0 ";

struct Upstream {
    before: Bytes,
    after: Bytes,
    is_changing: AtomicBool,
    revision: AtomicU64,
    fetch_count: AtomicU64,
}

/// Serves this many flags until the process is killed.
pub(crate) fn serve(flags: usize, port: u16) -> Result<()> {
    let text = document(flags);
    let at = text.find(CHANGED_TEXT).expect("the first flag is described") + CHANGED_TEXT.len();
    let upstream = Arc::new(Upstream {
        before: Bytes::from(text.as_bytes()[..at].to_vec()),
        after: Bytes::from(text.as_bytes()[at..].to_vec()),
        is_changing: AtomicBool::new(false),
        revision: AtomicU64::new(0),
        fetch_count: AtomicU64::new(0),
    });
    let input = Arc::clone(&upstream);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            input.is_changing.store(line == "swap", Ordering::Relaxed);
        }
        // The process that started this one has exited.
        std::process::exit(0);
    });
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await?;
        let ticking = Arc::clone(&upstream);
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(CHANGE_INTERVAL);
            loop {
                tick.tick().await;
                if ticking.is_changing.load(Ordering::Relaxed) {
                    ticking.revision.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        loop {
            let (stream, _) = listener.accept().await?;
            let upstream = Arc::clone(&upstream);
            tokio::spawn(async move {
                let service = service_fn(|request| upstream.respond(request));
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    })
}

impl Upstream {
    async fn respond(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        Ok(match (request.method(), request.uri().path()) {
            (&Method::GET, COUNT_PATH) => {
                json_response(&json!(self.fetch_count.load(Ordering::Relaxed)))
            }
            (&Method::GET, "/api/client/features") => self.features(&request).await,
            (&Method::POST, "/edge/validate") => {
                let body = request.into_body().collect().await;
                let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
                json_response(&validation_response(&body))
            }
            _ => response(StatusCode::ACCEPTED, Bytes::new()),
        })
    }

    /// The flags once they differ from the client's entity tag, or else 304.
    async fn features(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let known = request.headers().get(header::IF_NONE_MATCH).cloned();
        let current = || format!("\"{}\"", self.revision.load(Ordering::Relaxed));
        let is_known = |tag: &str| known.as_ref().is_some_and(|it| it == tag);
        for _ in 0..10 {
            if !is_known(&current()) {
                break;
            }
            tokio::time::sleep(CHANGE_INTERVAL / 10).await;
        }
        let tag = current();
        let mut response = if is_known(&tag) {
            response(StatusCode::NOT_MODIFIED, Bytes::new())
        } else {
            self.fetch_count.fetch_add(1, Ordering::Relaxed);
            // Each change has the same length.
            let change = format!("(as of {:010}) ", self.revision.load(Ordering::Relaxed));
            let parts = [&self.before, change.as_bytes(), &self.after];
            response(StatusCode::OK, Bytes::from(parts.concat()))
        };
        let tag = tag.try_into().expect("a number in quotes");
        response.headers_mut().insert(header::ETAG, tag);
        response
    }
}

/// The response of `/edge/validate`: all tokens are valid.
fn validation_response(body: &[u8]) -> Value {
    let request: Value = serde_json::from_slice(body).unwrap_or_default();
    let tokens = request["tokens"].as_array().cloned().unwrap_or_default();
    let verdict = |token: &Value| {
        let frontend = token.as_str().is_some_and(|it| it.contains("frontend"));
        json!({
            "token": token, "type": if frontend { "frontend" } else { "backend" },
            "environment": "development", "projects": ["*"],
        })
    };
    json!({ "tokens": tokens.iter().map(verdict).collect::<Vec<_>>() })
}

fn json_response(value: &Value) -> Response<Full<Bytes>> {
    response(StatusCode::OK, Bytes::from(value.to_string()))
}

fn response(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
