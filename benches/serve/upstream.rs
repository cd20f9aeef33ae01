//! An Unleash server whose flags change ten times a second while it is told so.
//!
//! It is what an edge needs and no more: every token is valid, usage is taken and forgotten. It runs
//! as a process of its own, which is this executable called as `serve upstream`; a line `swap` or
//! `calm` on its input says what to do. Who asks for flags waits for the next tenth of a second, so
//! that an edge that asks at once again gets every change.

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

/// How often flags change.
pub(crate) const CHANGE_EVERY: Duration = Duration::from_millis(100);

/// Where it tells how many sets of flags were fetched.
pub(crate) const COUNT: &str = "/count";

/// What changes: the description of one flag, so that no evaluation does.
const CHANGED: &str = "Some description of feature 0 ";

struct Upstream {
    before: Bytes,
    after: Bytes,
    swapping: AtomicBool,
    revision: AtomicU64,
    fetched: AtomicU64,
}

/// Serves so many flags until the process is ended.
pub(crate) fn serve(flags: usize, port: u16) -> Result<()> {
    let text = document(flags);
    let at = text.find(CHANGED).expect("the first flag is described") + CHANGED.len();
    let upstream = Arc::new(Upstream {
        before: Bytes::from(text.as_bytes()[..at].to_vec()),
        after: Bytes::from(text.as_bytes()[at..].to_vec()),
        swapping: AtomicBool::new(false),
        revision: AtomicU64::new(0),
        fetched: AtomicU64::new(0),
    });
    let told = Arc::clone(&upstream);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            told.swapping.store(line == "swap", Ordering::Relaxed);
        }
        // Whoever started this has gone.
        std::process::exit(0);
    });
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await?;
        let ticking = Arc::clone(&upstream);
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(CHANGE_EVERY);
            loop {
                tick.tick().await;
                if ticking.swapping.load(Ordering::Relaxed) {
                    ticking.revision.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        loop {
            let (stream, _) = listener.accept().await?;
            let upstream = Arc::clone(&upstream);
            tokio::spawn(async move {
                let service = service_fn(|request| upstream.answer(request));
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    })
}

impl Upstream {
    async fn answer(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        Ok(match (request.method(), request.uri().path()) {
            (&Method::GET, COUNT) => json_reply(&json!(self.fetched.load(Ordering::Relaxed))),
            (&Method::GET, "/api/client/features") => self.features(&request).await,
            (&Method::POST, "/edge/validate") => {
                let body = request.into_body().collect().await;
                let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
                json_reply(&valid(&body))
            }
            _ => reply(StatusCode::ACCEPTED, Bytes::new()),
        })
    }

    /// The flags, as soon as they are others than those that the asker has, else that they are not.
    async fn features(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let known = request.headers().get(header::IF_NONE_MATCH).cloned();
        let current = || format!("\"{}\"", self.revision.load(Ordering::Relaxed));
        let is_known = |tag: &str| known.as_ref().is_some_and(|it| it == tag);
        for _ in 0..10 {
            if !is_known(&current()) {
                break;
            }
            tokio::time::sleep(CHANGE_EVERY / 10).await;
        }
        let tag = current();
        let mut response = if is_known(&tag) {
            reply(StatusCode::NOT_MODIFIED, Bytes::new())
        } else {
            self.fetched.fetch_add(1, Ordering::Relaxed);
            // As long as the others, so that only what is said differs.
            let change = format!("(as of {:010}) ", self.revision.load(Ordering::Relaxed));
            let parts = [&self.before, change.as_bytes(), &self.after];
            reply(StatusCode::OK, Bytes::from(parts.concat()))
        };
        let tag = tag.try_into().expect("a number in quotes");
        response.headers_mut().insert(header::ETAG, tag);
        response
    }
}

/// What `/edge/validate` says of tokens, all of which are valid.
fn valid(body: &[u8]) -> Value {
    let asked: Value = serde_json::from_slice(body).unwrap_or_default();
    let tokens = asked["tokens"].as_array().cloned().unwrap_or_default();
    let verdict = |token: &Value| {
        let frontend = token.as_str().is_some_and(|it| it.contains("frontend"));
        json!({
            "token": token, "type": if frontend { "frontend" } else { "backend" },
            "environment": "development", "projects": ["*"],
        })
    };
    json!({ "tokens": tokens.iter().map(verdict).collect::<Vec<_>>() })
}

fn json_reply(value: &Value) -> Response<Full<Bytes>> {
    reply(StatusCode::OK, Bytes::from(value.to_string()))
}

fn reply(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
