//! A flood of made-up tokens has a bounded cost in upstream requests and memory, and does not affect
//! clients with a valid token.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::rig::{Parapet, http, wait_until};

/// Made-up tokens, each well-formed and unique: this many in request headers, and in requests to
/// `/edge/validate`, which need no token, this many in each.
const TOKENS_IN_HEADERS: usize = 20_000;
const VALIDATE_REQUESTS: usize = 80;
const TOKENS_PER_VALIDATE_REQUEST: usize = 1000;
const TOTAL_TOKENS: usize = TOKENS_IN_HEADERS + VALIDATE_REQUESTS * TOKENS_PER_VALIDATE_REQUEST;

/// The attacker's connections, the concurrent requests on each, and the concurrent validation requests.
/// The latter need more tokens validated at a time than the 5,000 that may wait for such requests.
const CONNECTIONS: usize = 20;
const REQUESTS_PER_CONNECTION: usize = 100;
const CONCURRENT_VALIDATE_REQUESTS: usize = 12;

/// The limit for upstream requests about first-seen tokens: this many at once, and this many more per
/// second.
const BURST: usize = 20;
const PER_SECOND: f64 = 10.0;

/// The limit for the memory of the flood, in KiB, including requests in progress.
const MAX_MEMORY_KIB: u64 = 128 * 1024;

const VALID_TOKEN: &str = "*:development.valid-and-known-0123456789abcdef";

/// An upstream that accepts tokens which contain `valid`, and counts requests.
#[derive(Clone, Default)]
struct Upstream {
    counts: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Upstream {
    async fn start(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let upstream = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let upstream = upstream.clone();
                let answer = service_fn(move |request| {
                    let upstream = upstream.clone();
                    async move { Ok::<_, Infallible>(upstream.respond(request).await) }
                });
                let http = hyper::server::conn::http1::Builder::new();
                tokio::spawn(http.serve_connection(TokioIo::new(stream), answer));
            }
        });
        address
    }

    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path().to_owned();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        *self.lock().entry(path.clone()).or_default() += 1;
        let answer = match path.as_str() {
            "/edge/validate" => validation_response(&serde_json::from_slice(&body).unwrap()),
            _ => {
                json!({"version": 2, "features": [{"name": "a", "enabled": true, "strategies": []}]})
            }
        };
        Response::new(Full::from(answer.to_string()))
    }

    fn request_count(&self, path: &str) -> usize {
        self.lock().get(path).copied().unwrap_or_default()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn validation_response(question: &Value) -> Value {
    let tokens = question["tokens"].as_array().unwrap().iter();
    let valid = tokens.filter(|token| token.as_str().unwrap().contains(".valid-")).map(|token| {
        json!({"token": token, "type": "client", "environment": "development", "projects": ["*"]})
    });
    json!({ "tokens": valid.collect::<Vec<_>>() })
}

/// The responses to the attacker: the number of rejected tokens, and of those that were turned away
/// without validation.
type StatusCounts = BTreeMap<StatusCode, usize>;

fn made_up_token() -> String {
    format!("*:development.{:032x}{:024x}", rand::random::<u128>(), rand::random::<u64>())
}

/// Takes one and returns true, unless nothing is left.
fn take_one(left: &AtomicUsize) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |it| it.checked_sub(1)).is_ok()
}

/// Sends tokens in headers, on one connection.
fn send_token_requests(
    parapet: &Parapet,
    left: &Arc<AtomicUsize>,
    attackers: &mut JoinSet<StatusCounts>,
) {
    let client = reqwest::Client::builder().http2_prior_knowledge().no_proxy().build().unwrap();
    let url: reqwest::Url = (parapet.url() + "/api/client/features").parse().unwrap();
    for _ in 0..REQUESTS_PER_CONNECTION {
        let (client, url, left) = (client.clone(), url.clone(), Arc::clone(left));
        attackers.spawn(async move {
            let mut statuses = StatusCounts::new();
            while take_one(&left) {
                let request = client.get(url.clone()).header("authorization", made_up_token());
                *statuses.entry(request.send().await.unwrap().status()).or_default() += 1;
            }
            statuses
        });
    }
}

/// Sends validation requests with many tokens each.
fn send_validate_requests(
    parapet: &Parapet,
    left: &Arc<AtomicUsize>,
    attackers: &mut JoinSet<StatusCounts>,
) {
    let (url, left) = (parapet.url() + "/edge/validate", Arc::clone(left));
    attackers.spawn(async move {
        let mut statuses = StatusCounts::new();
        while take_one(&left) {
            let tokens: Vec<_> =
                (0..TOKENS_PER_VALIDATE_REQUEST).map(|_| made_up_token()).collect();
            let question = http().post(&url).body(json!({ "tokens": tokens }).to_string());
            let answer = question.send().await.unwrap();
            let status = answer.status();
            if status == StatusCode::OK {
                assert_eq!(answer.text().await.unwrap(), r#"{"tokens":[]}"#);
            }
            *statuses.entry(status).or_default() += TOKENS_PER_VALIDATE_REQUEST;
        }
        statuses
    });
}

async fn sum_status_counts(mut parts: JoinSet<StatusCounts>) -> StatusCounts {
    let mut sum = StatusCounts::new();
    while let Some(part) = parts.join_next().await {
        for (status, count) in part.unwrap() {
            *sum.entry(status).or_default() += count;
        }
    }
    sum
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flood_of_made_up_tokens_is_bounded_and_does_not_affect_valid_clients() {
    let upstream = Upstream::default();
    let address = upstream.start().await;
    let parapet =
        Parapet::edge(&format!("http://{address}")).env("TOKENS", VALID_TOKEN).start().await;
    assert_eq!(parapet.get("/api/client/features", VALID_TOKEN).await.0, StatusCode::OK);

    let asked_before = upstream.request_count("/edge/validate");
    let memory_before = parapet.proc_status("VmRSS");
    let begin = Instant::now();
    let (headers, questions) = (
        Arc::new(AtomicUsize::new(TOKENS_IN_HEADERS)),
        Arc::new(AtomicUsize::new(VALIDATE_REQUESTS)),
    );
    let mut attackers = JoinSet::new();
    for _ in 0..CONNECTIONS {
        send_token_requests(&parapet, &headers, &mut attackers);
    }
    for _ in 0..CONCURRENT_VALIDATE_REQUESTS {
        send_validate_requests(&parapet, &questions, &mut attackers);
    }

    let over = AtomicBool::new(false);
    let known = async {
        let mut served = 0_usize;
        while !over.load(Ordering::Relaxed) {
            assert_eq!(parapet.get("/api/client/features", VALID_TOKEN).await.0, StatusCode::OK);
            served += 1;
        }
        served
    };
    let fresh = async {
        let mut accepted = 0;
        let url = parapet.url() + "/api/client/features";
        while headers.load(Ordering::Relaxed) > 0 {
            let token = format!("*:development.valid-and-fresh-{accepted}");
            wait_until("a fresh token is accepted", Duration::from_mins(1), async || {
                let answer = http().get(&url).header("authorization", &token).send().await.unwrap();
                // At the limit a new token gets 503 with a retry hint, never 401.
                let busy = answer.status() == StatusCode::SERVICE_UNAVAILABLE;
                assert!(busy || answer.status() == StatusCode::OK, "{}", answer.status());
                assert_eq!(answer.headers().contains_key("retry-after"), busy);
                (!busy).then_some(())
            })
            .await;
            accepted += 1;
        }
        accepted
    };
    let statuses = async {
        let statuses = sum_status_counts(attackers).await;
        over.store(true, Ordering::Relaxed);
        statuses
    };
    let (statuses, served, accepted) = tokio::join!(statuses, known, fresh);
    let took = begin.elapsed();
    let asked = upstream.request_count("/edge/validate") - asked_before;
    let peak = parapet.proc_status("VmHWM").saturating_sub(memory_before);
    println!(
        "{TOTAL_TOKENS} tokens in {took:?}: {statuses:?}; {asked} questions; {peak} KiB; {served} known, {accepted} fresh served"
    );

    assert_eq!(statuses.values().sum::<usize>(), TOTAL_TOKENS);
    // Rejected in a header, missing from a validation response, or turned away without validation.
    let known = [StatusCode::UNAUTHORIZED, StatusCode::OK, StatusCode::SERVICE_UNAVAILABLE];
    assert!(statuses.keys().all(|status| known.contains(status)), "{statuses:?}");
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a flood of seconds"
    )]
    let bound = BURST + (PER_SECOND * took.as_secs_f64()).ceil() as usize;
    assert!(asked <= bound, "{asked} questions in {took:?}, more than {bound}");
    assert!(peak <= MAX_MEMORY_KIB, "{peak} KiB more than before, allowed are {MAX_MEMORY_KIB}");
    assert!(served > 0 && accepted > 0, "{served} known, {accepted} fresh");
    assert_eq!(upstream.lock().keys().filter(|path| path.contains("admin")).count(), 0);
}
