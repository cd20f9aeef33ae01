//! An edge that streams from its upstream: what it does when the stream is refused, ends, breaks or
//! sends nonsense.
//!
//! Upstreams that misbehave are scripted; those that only crash are real.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::TokioIo;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::rig::{ChaosProxy, Parapet, secret_leak_check, wait_until};

const TOKEN: &str = "*:development.followed-0123456789abcdef0123456789";
const ADMIN: &str = "*:*.admin-of-the-followed-0123456789abcdef0123456789";

const FEATURES: &str = "/api/client/features";
const STREAM: &str = "/api/client/streaming";

/// Longer than the delay of one minute after some refusals.
const TIMEOUT: Duration = Duration::from_mins(2);

const OPEN_STREAMS: &str = "parapet_upstream_streams";

/// The number of polls for flags, with any response.
async fn poll_count(parapet: &Parapet) -> u64 {
    const POLLS: &str = "parapet_upstream_requests_total{purpose=\"features\"";
    let page = parapet.metrics().await;
    let samples = page.lines().filter(|line| line.starts_with(POLLS));
    samples.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

async fn ended_streams(parapet: &Parapet, why: &str) -> Option<f64> {
    let sample = format!("parapet_upstream_streams_ended_total{{why=\"{why}\"}}");
    parapet.metric(&sample).await
}

async fn wait_until_streaming(parapet: &Parapet) {
    wait_until("upstream's stream is followed", TIMEOUT, async || {
        (parapet.metric(OPEN_STREAMS).await == Some(1.0)).then_some(())
    })
    .await;
}

/// The number of occurrences of this text in the log.
fn log_count(parapet: &Parapet, text: &str) -> usize {
    parapet.log().matches(text).count()
}

async fn wait_until_logged(parapet: &Parapet, text: &str, times: usize) {
    wait_until(&format!("the log contains {times} times: {text}"), TIMEOUT, async || {
        (log_count(parapet, text) >= times).then_some(())
    })
    .await;
    assert_eq!(log_count(parapet, text), times, "{}", parapet.log());
}

/// The log message when streams cover all tokens.
const STREAMING_LOG_TEXT: &str = "Upstream's event stream is open";

/// The names of the served flags.
async fn served_flags(parapet: &Parapet) -> Vec<String> {
    let (status, body) = parapet.get(FEATURES, TOKEN).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    let flags = body["features"].as_array().unwrap().iter();
    flags.map(|flag| flag["name"].as_str().unwrap().to_owned()).collect()
}

async fn wait_until_served(parapet: &Parapet, flag: &str) {
    wait_until(&format!("{flag} is served"), TIMEOUT, async || {
        (served_flags(parapet).await == [flag]).then_some(())
    })
    .await;
}

/// A request as received.
#[derive(Clone, Debug)]
struct RecordedRequest {
    path: String,
    last_event_id: Option<String>,
    if_none_match: Option<String>,
}

/// The response to a request for the stream.
#[derive(Clone, Copy, Debug)]
enum StreamReply {
    Rejected(StatusCode),
    Stream,
}

struct State {
    /// The name of the only flag.
    flag: String,
    /// The number of the current state.
    id: u32,
    stream_reply: StreamReply,
    /// Whether responses to polls refer to the stream.
    has_stream_hint: bool,
    /// Whether all tokens are invalid by now.
    revoked: bool,
    /// Whether entity tags contain the number as revision, as Unleash's do.
    has_revisions: bool,
    requests: Vec<RecordedRequest>,
    open_streams: Vec<mpsc::UnboundedSender<io::Result<String>>>,
}

/// A scripted upstream.
#[derive(Clone)]
struct Upstream(Arc<Mutex<State>>);

type Body = UnsyncBoxBody<Bytes, io::Error>;

impl Upstream {
    async fn start(stream_reply: StreamReply) -> (Self, String) {
        secret_leak_check::register(TOKEN);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = State {
            flag: "first".to_owned(),
            id: 7,
            stream_reply,
            has_stream_hint: false,
            revoked: false,
            has_revisions: false,
            requests: Vec::new(),
            open_streams: Vec::new(),
        };
        let upstream = Self(Arc::new(Mutex::new(state)));
        let shared = upstream.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let upstream = shared.clone();
                let answer = service_fn(move |request| {
                    let upstream = upstream.clone();
                    async move { Ok::<_, Infallible>(upstream.respond(request).await) }
                });
                let http = hyper::server::conn::http1::Builder::new();
                tokio::spawn(http.serve_connection(TokioIo::new(stream), answer));
            }
        });
        (upstream, format!("http://{address}"))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the flag without sending an event, and returns the event for it.
    fn set_flag(&self, flag: &str) -> String {
        let mut state = self.state();
        state.id += 1;
        let before = std::mem::replace(&mut state.flag, flag.to_owned());
        let events = json!([
            { "type": "feature-updated", "eventId": state.id, "feature": feature(flag) },
            { "type": "feature-removed", "eventId": state.id, "featureName": before, "project": "default" },
        ]);
        event("unleash-updated", state.id, &json!({ "events": events }))
    }

    /// Serves this state, as a replica might.
    fn set_state(&self, flag: &str, id: u32) {
        let mut state = self.state();
        (state.flag, state.id) = (flag.to_owned(), id);
    }

    /// Sends this text on the open streams.
    fn send_event(&self, text: &str) {
        let mut state = self.state();
        state.open_streams.retain(|sender| sender.send(Ok(text.to_owned())).is_ok());
        assert!(!state.open_streams.is_empty(), "there is a stream");
    }

    /// Ends the open streams in an orderly way.
    fn end_streams(&self) {
        self.state().open_streams.clear();
    }

    /// Resets the open streams.
    fn reset_streams(&self) {
        for sender in self.state().open_streams.drain(..) {
            let _ = sender.send(Err(io::ErrorKind::ConnectionReset.into()));
        }
    }

    fn set_stream_reply(&self, offer: StreamReply) {
        self.state().stream_reply = offer;
    }

    /// The requests for this path so far.
    fn requests(&self, path: &str) -> Vec<RecordedRequest> {
        let state = self.state();
        state.requests.iter().filter(|it| it.path == path).cloned().collect()
    }

    /// The requests for this path, once there are at least `count`.
    async fn wait_for_requests(&self, path: &str, count: usize) -> Vec<RecordedRequest> {
        wait_until(&format!("{path} is requested {count} times"), TIMEOUT, async || {
            let asked = self.requests(path);
            (asked.len() >= count).then_some(asked)
        })
        .await
    }

    async fn respond(&self, request: Request<Incoming>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let header = |name: &str| header_text(&head.headers, name);
        let mut state = self.state();
        state.requests.push(RecordedRequest {
            path: head.uri.path().to_owned(),
            last_event_id: header("last-event-id"),
            if_none_match: header("if-none-match"),
        });
        match (head.uri.path(), state.stream_reply) {
            ("/edge/validate", _) => {
                let question: Value = serde_json::from_slice(&body).unwrap();
                let tokens = question["tokens"].as_array().unwrap().iter();
                let tokens = tokens.filter(|_| !state.revoked);
                let valid = tokens.map(|token| {
                    json!({ "token": token, "type": "client", "environment": "development", "projects": ["*"] })
                });
                full_response(
                    StatusCode::OK,
                    &json!({ "tokens": valid.collect::<Vec<_>>() }).to_string(),
                )
            }
            (FEATURES, _) => {
                let etag = if state.has_revisions {
                    format!("\"query:{}:v1\"", state.id)
                } else {
                    format!("\"{}\"", state.flag)
                };
                let mut answer = if header("if-none-match").as_ref() == Some(&etag) {
                    full_response(StatusCode::NOT_MODIFIED, "")
                } else {
                    let meta = json!({ "revisionId": state.id });
                    let flags =
                        json!({ "version": 2, "features": [feature(&state.flag)], "meta": meta });
                    full_response(StatusCode::OK, &flags.to_string())
                };
                answer.headers_mut().insert("etag", etag.parse().unwrap());
                if state.has_stream_hint {
                    answer.headers_mut().insert("fetch-mode", "streaming".parse().unwrap());
                }
                answer
            }
            (STREAM, StreamReply::Rejected(status)) => {
                let mut answer = full_response(status, "{}");
                answer.headers_mut().insert("retry-after", "1".parse().unwrap());
                answer
            }
            (STREAM, StreamReply::Stream) => {
                let (sender, receiver) = mpsc::unbounded_channel();
                let events = if header("last-event-id") == Some(state.id.to_string()) {
                    json!([])
                } else {
                    let features = [feature(&state.flag)];
                    json!([{ "type": "hydration", "eventId": state.id, "features": features, "segments": [] }])
                };
                let first = event("unleash-connected", state.id, &json!({ "events": events }));
                sender.send(Ok(first)).unwrap();
                state.open_streams.push(sender);
                let pieces = stream::unfold(receiver, async |mut receiver| {
                    let piece: io::Result<String> = receiver.recv().await?;
                    Some((piece.map(|text| Frame::data(Bytes::from(text))), receiver))
                });
                let mut answer = Response::new(StreamBody::new(pieces).boxed_unsync());
                let kind = "text/event-stream; charset=utf-8".parse().unwrap();
                answer.headers_mut().insert("content-type", kind);
                answer
            }
            _ if state.revoked => full_response(StatusCode::UNAUTHORIZED, "{}"),
            _ => full_response(StatusCode::NOT_FOUND, ""),
        }
    }
}

fn header_text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).map(|value| value.to_str().unwrap().to_owned())
}

fn feature(name: &str) -> Value {
    json!({ "name": name, "project": "default", "enabled": true, "strategies": [] })
}

fn event(name: &str, id: u32, data: &Value) -> String {
    format!("event: {name}\nid: {id}\ndata: {data}\n\n")
}

fn full_response(status: StatusCode, body: &str) -> Response<Body> {
    let body = Full::from(body.to_owned()).map_err(|never| match never {}).boxed_unsync();
    Response::builder().status(status).body(body).unwrap()
}

/// An edge that would poll once an hour.
async fn rarely_polling_edge(url: &str) -> Parapet {
    let edge = Parapet::edge(url).env("TOKENS", TOKEN);
    edge.flag("--features-refresh-interval-seconds", "3600").start().await
}

/// An edge that polls continuously whenever it polls.
async fn frequently_polling_edge(url: &str) -> Parapet {
    Parapet::edge(url).env("TOKENS", TOKEN).with_short_intervals().start().await
}

#[tokio::test]
async fn stream_is_resumed_from_last_event_after_end_or_reset() {
    let (upstream, url) = Upstream::start(StreamReply::Stream).await;
    let parapet = rarely_polling_edge(&url).await;
    wait_until_logged(&parapet, STREAMING_LOG_TEXT, 1).await;
    upstream.send_event(&upstream.set_flag("second"));
    wait_until_served(&parapet, "second").await;

    // Events that arrive together are published once.
    let swaps = r#"parapet_snapshot_swaps_total{environment="development"}"#;
    let before = parapet.metric(swaps).await.unwrap();
    let events = ["third", "fourth", "fifth"].map(|flag| upstream.set_flag(flag));
    upstream.send_event(&events.concat());
    wait_until_served(&parapet, "fifth").await;
    assert_eq!(parapet.metric(swaps).await, Some(before + 1.0));

    upstream.end_streams();
    let asked = upstream.wait_for_requests(STREAM, 2).await;
    assert_eq!((&asked[0].last_event_id, asked[1].last_event_id.as_deref()), (&None, Some("11")));
    assert_eq!(log_count(&parapet, "Polling upstream again"), 0, "an end in good order is no news");
    wait_until_streaming(&parapet).await;
    upstream.send_event(&upstream.set_flag("sixth"));
    wait_until_served(&parapet, "sixth").await;

    // Missed, because no stream was open.
    upstream.reset_streams();
    upstream.set_flag("seventh");
    wait_until_served(&parapet, "seventh").await;
    let asked = upstream.wait_for_requests(STREAM, 3).await;
    assert_eq!(asked[2].last_event_id.as_deref(), Some("12"));
    assert_eq!(log_count(&parapet, "Polling upstream again: its stream was lost"), 1);
    wait_until_logged(&parapet, STREAMING_LOG_TEXT, 2).await;
    assert_eq!(
        (ended_streams(&parapet, "over").await, ended_streams(&parapet, "broken").await),
        (Some(1.0), Some(1.0))
    );
    assert_eq!(upstream.requests(FEATURES).len(), 1, "it was polled once, at the start");
}

#[tokio::test]
async fn invalid_event_leads_to_a_new_snapshot() {
    let (upstream, url) = Upstream::start(StreamReply::Stream).await;
    let parapet = rarely_polling_edge(&url).await;
    wait_until_logged(&parapet, STREAMING_LOG_TEXT, 1).await;
    let odd = json!({ "events": [{ "type": "feature-vanished", "eventId": 8, "name": "first" }] });
    let odd = [
        event("unleash-updated", 8, &odd),
        event("unleash-updated", 8, &json!("hello")),
        event("unleash-updated", 8, &json!({ "events": [{ "type": "hydration", "eventId": 8 }] })),
    ];
    for (count, odd) in (2..).zip(odd) {
        upstream.set_flag(&format!("flag-{count}"));
        upstream.send_event(&odd);
        wait_until_served(&parapet, &format!("flag-{count}")).await;
        let asked = upstream.wait_for_requests(STREAM, count).await;
        assert_eq!(asked[count - 1].last_event_id, None, "{odd}");
    }
    assert_eq!(ended_streams(&parapet, "unreadable").await, Some(3.0));
    upstream.send_event(&upstream.set_flag("last"));
    wait_until_served(&parapet, "last").await;
    assert_eq!(upstream.requests(FEATURES).len(), 1);
}

#[tokio::test]
async fn edge_polls_without_stream_and_old_etags_do_not_confirm_streamed_state() {
    let (upstream, url) = Upstream::start(StreamReply::Stream).await;
    let parapet = frequently_polling_edge(&url).await;
    wait_until_logged(&parapet, STREAMING_LOG_TEXT, 1).await;
    upstream.send_event(&upstream.set_flag("second"));
    wait_until_served(&parapet, "second").await;
    let before = upstream.requests(FEATURES).len();
    upstream.set_stream_reply(StreamReply::Rejected(StatusCode::SERVICE_UNAVAILABLE));
    // Upstream returns to the state of the first poll's entity tag, without an event.
    upstream.reset_streams();
    upstream.set_flag("first");
    wait_until_served(&parapet, "first").await;
    let asked = upstream.wait_for_requests(FEATURES, before + 2).await;
    let tags = [before, before + 1].map(|poll| asked[poll].if_none_match.as_deref());
    assert_eq!(tags, [None, Some("\"first\"")]);
    upstream.set_stream_reply(StreamReply::Stream);
    wait_until_streaming(&parapet).await;
    upstream.send_event(&upstream.set_flag("third"));
    wait_until_served(&parapet, "third").await;
    // A state from a poll has no event id.
    let asked = upstream.requests(STREAM);
    assert_eq!(asked.last().unwrap().last_event_id, None, "{asked:?}");
}

#[tokio::test]
async fn stale_replicas_do_not_bring_back_older_state() {
    let (upstream, url) =
        Upstream::start(StreamReply::Rejected(StatusCode::SERVICE_UNAVAILABLE)).await;
    upstream.state().has_revisions = true;
    let parapet = frequently_polling_edge(&url).await;
    upstream.set_state("second", 8);
    wait_until_served(&parapet, "second").await;
    // Through its stream.
    upstream.set_state("first", 7);
    upstream.set_stream_reply(StreamReply::Stream);
    wait_until("such a stream is closed", TIMEOUT, async || {
        (ended_streams(&parapet, "outdated").await >= Some(2.0)).then_some(())
    })
    .await;
    assert_eq!(served_flags(&parapet).await, ["second"]);
    upstream.set_state("second", 8);
    wait_until_streaming(&parapet).await;
    upstream.send_event(&upstream.set_flag("third"));
    wait_until_served(&parapet, "third").await;
    // Through polling.
    upstream.set_stream_reply(StreamReply::Rejected(StatusCode::SERVICE_UNAVAILABLE));
    upstream.set_state("second", 8);
    upstream.end_streams();
    let before = upstream.requests(FEATURES).len();
    upstream.wait_for_requests(FEATURES, before + 3).await;
    assert_eq!(served_flags(&parapet).await, ["third"]);
}

#[tokio::test]
async fn upstream_without_stream_is_polled_until_it_hints_at_one() {
    let (upstream, url) = Upstream::start(StreamReply::Rejected(StatusCode::NOT_FOUND)).await;
    let parapet = frequently_polling_edge(&url).await;
    upstream.wait_for_requests(FEATURES, 6).await;
    assert_eq!(upstream.requests(STREAM).len(), 1, "it is left in peace");
    assert_eq!(log_count(&parapet, "Polling upstream: it does not support streaming"), 1);
    upstream.set_flag("second");
    wait_until_served(&parapet, "second").await;
    let refused = "parapet_upstream_requests_total{purpose=\"stream\",outcome=\"not_offered\"}";
    assert_eq!(parapet.metric(refused).await, Some(1.0));
    assert!(!parapet.log().contains("WARN"), "{}", parapet.log());

    upstream.set_stream_reply(StreamReply::Stream);
    upstream.state().has_stream_hint = true;
    wait_until_streaming(&parapet).await;
    assert_eq!(upstream.requests(STREAM).len(), 2);
    upstream.send_event(&upstream.set_flag("third"));
    wait_until_served(&parapet, "third").await;
}

#[tokio::test]
async fn edge_polls_when_upstream_requests_polling() {
    let (upstream, url) = Upstream::start(StreamReply::Stream).await;
    let parapet = frequently_polling_edge(&url).await;
    wait_until_logged(&parapet, STREAMING_LOG_TEXT, 1).await;
    let before = upstream.requests(FEATURES).len();
    upstream.send_event(&event("fetch-mode", 7, &json!("streaming")));
    upstream.send_event("event: fetch-mode\ndata: polling\n\n");
    wait_until_logged(&parapet, "Polling upstream again: it requests polling", 1).await;
    upstream.set_flag("second");
    wait_until_served(&parapet, "second").await;
    upstream.wait_for_requests(FEATURES, before + 6).await;
    assert_eq!(upstream.requests(STREAM).len(), 1, "it stays unavailable");
    assert_eq!(ended_streams(&parapet, "dismissed").await, Some(1.0));
    upstream.state().has_stream_hint = true;
    wait_until_streaming(&parapet).await;
}

#[tokio::test]
async fn upstream_at_stream_limit_is_polled_until_retry_after() {
    let (upstream, url) =
        Upstream::start(StreamReply::Rejected(StatusCode::TOO_MANY_REQUESTS)).await;
    let parapet = frequently_polling_edge(&url).await;
    upstream.wait_for_requests(STREAM, 3).await;
    upstream.set_flag("second");
    wait_until_served(&parapet, "second").await;
    assert_eq!(log_count(&parapet, "Polling upstream: it accepts no further stream"), 1);
    upstream.set_stream_reply(StreamReply::Stream);
    wait_until_streaming(&parapet).await;
}

#[tokio::test]
async fn token_rejected_by_stream_only_is_polled() {
    // Unleash Edge responds so if it does not stream itself.
    let (upstream, url) = Upstream::start(StreamReply::Rejected(StatusCode::FORBIDDEN)).await;
    let parapet = frequently_polling_edge(&url).await;
    upstream.wait_for_requests(FEATURES, 6).await;
    upstream.set_flag("second");
    wait_until_served(&parapet, "second").await;
    assert_eq!(upstream.requests(STREAM).len(), 1);
    assert_eq!(log_count(&parapet, "Upstream refuses a token"), 0, "{}", parapet.log());
    let refused = "Polling upstream: it does not accept the token for its stream";
    assert_eq!(log_count(&parapet, refused), 1);
}

#[tokio::test]
async fn upstream_mode_forces_polling_or_streaming() {
    let (upstream, url) = Upstream::start(StreamReply::Stream).await;
    let edge = Parapet::edge(&url).env("TOKENS", TOKEN).env("UPSTREAM_MODE", "poll");
    let parapet = edge.with_short_intervals().start().await;
    upstream.wait_for_requests(FEATURES, 4).await;
    assert_eq!((upstream.requests(STREAM).len(), poll_count(&parapet).await >= 3), (0, true));

    upstream.set_stream_reply(StreamReply::Rejected(StatusCode::NOT_IMPLEMENTED));
    let edge = Parapet::edge(&url).env("TOKENS", TOKEN).flag("--upstream-mode", "stream");
    let parapet = edge.with_short_intervals().start().await;
    let warning =
        "Polling upstream although --upstream-mode is stream: it does not support streaming";
    wait_until_logged(&parapet, warning, 1).await;
    upstream.set_stream_reply(StreamReply::Stream);
    upstream.state().has_stream_hint = true;
    wait_until_streaming(&parapet).await;
    assert_eq!(log_count(&parapet, warning), 1);
}

/// A real Parapet as upstream, offline, and its flag file.
async fn offline(flag: &str) -> (Parapet, TempDir, PathBuf) {
    secret_leak_check::register(TOKEN);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    write_flags(&file, flag);
    let offline = Parapet::mode("offline").flag("--bootstrap-file", &file);
    let parapet = offline.env("CLIENT_TOKENS", TOKEN).start().await;
    (parapet, folder, file)
}

fn write_flags(file: &PathBuf, flag: &str) {
    std::fs::write(file, json!({ "features": [feature(flag)] }).to_string()).unwrap();
}

#[tokio::test]
async fn restarted_upstream_is_streamed_again_without_polling() {
    let (upstream, _folder, file) = offline("first").await;
    let parapet = rarely_polling_edge(&upstream.url()).await;
    wait_until_logged(&parapet, STREAMING_LOG_TEXT, 1).await;
    let before = poll_count(&parapet).await;
    write_flags(&file, "second");
    wait_until_served(&parapet, "second").await;

    upstream.kill();
    wait_until_logged(&parapet, "Polling upstream again: ", 1).await;
    assert_eq!(served_flags(&parapet).await, ["second"]);
    write_flags(&file, "third");
    upstream.restart();
    wait_until_served(&parapet, "third").await;
    wait_until_logged(&parapet, STREAMING_LOG_TEXT, 2).await;

    assert!(upstream.terminate().await.success());
    write_flags(&file, "fourth");
    upstream.restart();
    wait_until_served(&parapet, "fourth").await;
    assert_eq!(poll_count(&parapet).await, before, "none was due");
    let state = r#"parapet_snapshot_age_seconds{environment="development"}"#;
    assert!(parapet.metric(state).await.unwrap() < 60.0);
}

#[tokio::test]
async fn flags_stay_during_network_failure_and_stream_resumes() {
    let (upstream, _folder, file) = offline("first").await;
    let proxy = ChaosProxy::start(&upstream.url()).await;
    let parapet = frequently_polling_edge(&proxy.url()).await;
    wait_until_logged(&parapet, STREAMING_LOG_TEXT, 1).await;
    for (flag, stalls) in [("second", false), ("third", true)] {
        let (streams, polls) = (proxy.request_count(STREAM), proxy.request_count(FEATURES));
        let seen = log_count(&parapet, "Fetching flags failed");
        proxy.disconnect().await;
        if stalls {
            proxy.stall().await;
            wait_until("both are tried again", TIMEOUT, async || {
                (proxy.request_count(STREAM) > streams && proxy.request_count(FEATURES) > polls)
                    .then_some(())
            })
            .await;
        }
        wait_until("upstream is missed", TIMEOUT, async || {
            (log_count(&parapet, "Fetching flags failed") > seen).then_some(())
        })
        .await;
        let before = served_flags(&parapet).await;
        write_flags(&file, flag);
        assert_eq!(served_flags(&parapet).await, before);
        proxy.restore().await;
        wait_until_served(&parapet, flag).await;
        wait_until_streaming(&parapet).await;
        let polls = proxy.request_count(FEATURES);
        write_flags(&file, &format!("{flag}-followed"));
        wait_until_served(&parapet, &format!("{flag}-followed")).await;
        assert_eq!(proxy.request_count(FEATURES), polls, "it gets an event, and does not poll");
    }
}

#[tokio::test]
async fn stream_of_revoked_token_closes_without_removing_flags() {
    let (upstream, url) = Upstream::start(StreamReply::Stream).await;
    let edge = Parapet::edge(&url).flag("--token-revalidation-interval-seconds", "0.5");
    let edge = edge.flag("--features-refresh-interval-seconds", "3600");
    let parapet = edge.start_listening().await;
    assert_eq!(
        served_flags(&parapet).await,
        ["first"],
        "it waits for the flags of a first-seen token"
    );
    wait_until_logged(&parapet, STREAMING_LOG_TEXT, 1).await;
    upstream.state().revoked = true;
    wait_until("the stream is closed", TIMEOUT, async || {
        upstream.state().open_streams.iter().all(mpsc::UnboundedSender::is_closed).then_some(())
    })
    .await;
    assert_eq!(parapet.get(FEATURES, TOKEN).await.0, StatusCode::UNAUTHORIZED);
    let flags = r#"parapet_snapshot_flags{environment="development"}"#;
    assert_eq!(parapet.metric(flags).await, Some(1.0));
}

#[tokio::test]
async fn each_required_token_has_its_own_stream() {
    let tokens = ["a", "b"].map(|it| format!("{it}:development.followed-0123456789abcdef0123456"));
    for token in &tokens {
        secret_leak_check::register(token);
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    let write = |names: [&str; 2]| {
        let features = ["a", "b"].into_iter().zip(names).map(|(project, name)| {
            json!({ "name": name, "project": project, "enabled": true, "strategies": [] })
        });
        let flags = json!({ "features": features.collect::<Vec<_>>() }).to_string();
        std::fs::write(&file, flags).unwrap();
    };
    write(["one", "two"]);
    let offline = Parapet::mode("offline").flag("--bootstrap-file", &file);
    let upstream = offline.env("CLIENT_TOKENS", tokens.join(",")).start().await;
    let edge = Parapet::edge(&upstream.url()).flag("--features-refresh-interval-seconds", "3600");
    let parapet = edge.start_listening().await;
    let served = async |at: usize| {
        let (_, body) = parapet.get(FEATURES, &tokens[at]).await;
        body["features"][0]["name"].as_str().map(str::to_owned)
    };
    for (at, flag) in ["one", "two"].into_iter().enumerate() {
        assert_eq!(served(at).await.as_deref(), Some(flag));
        wait_until("it has a stream", TIMEOUT, async || {
            let expect = f64::from(u8::try_from(at + 1).unwrap());
            (parapet.metric(OPEN_STREAMS).await == Some(expect)).then_some(())
        })
        .await;
    }
    let before = poll_count(&parapet).await;
    assert_eq!(before, 2, "a token with a stream is not polled");
    for names in [["three", "two"], ["three", "four"], ["five", "six"]] {
        write(names);
        wait_until("both get the event", TIMEOUT, async || {
            let both = (served(0).await, served(1).await);
            (both == (Some(names[0].to_owned()), Some(names[1].to_owned()))).then_some(())
        })
        .await;
    }
    assert_eq!(poll_count(&parapet).await, before);
}

#[tokio::test]
async fn edge_in_front_of_standalone_streams_with_admin_token_and_reports_streams() {
    secret_leak_check::register(ADMIN);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    write_flags(&file, "first");
    let standalone = Parapet::mode("standalone").flag("--flags", &file);
    let upstream = standalone.env("INIT_ADMIN_API_TOKENS", ADMIN).start().await;
    let edge = Parapet::edge(&upstream.admin_url()).admin_token(ADMIN);
    let parapet = edge.flag("--features-refresh-interval-seconds", "3600").start().await;
    wait_until_logged(&parapet, STREAMING_LOG_TEXT, 1).await;
    let streams = async || parapet.admin_get("/status").await.1["upstream"]["streams"].clone();
    assert_eq!(streams().await, 1);
    write_flags(&file, "second");
    wait_until("the change arrives", TIMEOUT, async || {
        let (_, features) = parapet.admin_get("/internal-backstage/features").await;
        (features["development"]["features"][0]["name"] == "second").then_some(())
    })
    .await;
    upstream.kill();
    wait_until("the stream has closed", TIMEOUT, async || (streams().await == 0).then_some(()))
        .await;
}
