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

use crate::rig::{ChaosProxy, Parapet, secrets, until};

const TOKEN: &str = "*:development.followed-0123456789abcdef0123456789";
const ADMIN: &str = "*:*.admin-of-the-followed-0123456789abcdef0123456789";

const FEATURES: &str = "/api/client/features";
const STREAM: &str = "/api/client/streaming";

/// Longer than the delay of one minute after some refusals.
const SOON: Duration = Duration::from_mins(2);

const STREAMS: &str = "parapet_upstream_streams";

/// The number of polls for flags, with any response.
async fn polls(parapet: &Parapet) -> u64 {
    const POLLS: &str = "parapet_upstream_requests_total{purpose=\"features\"";
    let page = parapet.metrics().await;
    let samples = page.lines().filter(|line| line.starts_with(POLLS));
    samples.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

async fn ended(parapet: &Parapet, why: &str) -> Option<f64> {
    let sample = format!("parapet_upstream_streams_ended_total{{why=\"{why}\"}}");
    parapet.metric(&sample).await
}

async fn until_follows(parapet: &Parapet) {
    until("upstream's stream is followed", SOON, async || {
        (parapet.metric(STREAMS).await == Some(1.0)).then_some(())
    })
    .await;
}

/// The number of occurrences of this text in the log.
fn said(parapet: &Parapet, text: &str) -> usize {
    parapet.log().matches(text).count()
}

async fn until_said(parapet: &Parapet, text: &str, times: usize) {
    until(&format!("the log contains {times} times: {text}"), SOON, async || {
        (said(parapet, text) >= times).then_some(())
    })
    .await;
    assert_eq!(said(parapet, text), times, "{}", parapet.log());
}

/// The log message when streams cover all tokens.
const FOLLOWS: &str = "Upstream's event stream is open";

/// The names of the served flags.
async fn served(parapet: &Parapet) -> Vec<String> {
    let (status, body) = parapet.get(FEATURES, TOKEN).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    let flags = body["features"].as_array().unwrap().iter();
    flags.map(|flag| flag["name"].as_str().unwrap().to_owned()).collect()
}

async fn until_served(parapet: &Parapet, flag: &str) {
    until(&format!("{flag} is served"), SOON, async || {
        (served(parapet).await == [flag]).then_some(())
    })
    .await;
}

/// A request as received.
#[derive(Clone, Debug)]
struct Asked {
    path: String,
    last_event_id: Option<String>,
    if_none_match: Option<String>,
}

/// The response to a request for the stream.
#[derive(Clone, Copy, Debug)]
enum Offer {
    Refused(StatusCode),
    Stream,
}

struct State {
    /// The name of the only flag.
    flag: String,
    /// The number of the current state.
    id: u32,
    offer: Offer,
    /// Whether responses to polls refer to the stream.
    hints: bool,
    /// Whether all tokens are invalid by now.
    revoked: bool,
    /// Whether entity tags contain the number as revision, as Unleash's do.
    has_revisions: bool,
    asked: Vec<Asked>,
    open: Vec<mpsc::UnboundedSender<io::Result<String>>>,
}

/// A scripted upstream.
#[derive(Clone)]
struct Upstream(Arc<Mutex<State>>);

type Body = UnsyncBoxBody<Bytes, io::Error>;

impl Upstream {
    async fn start(offer: Offer) -> (Self, String) {
        secrets::remember(TOKEN);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = State {
            flag: "first".to_owned(),
            id: 7,
            offer,
            hints: false,
            revoked: false,
            has_revisions: false,
            asked: Vec::new(),
            open: Vec::new(),
        };
        let upstream = Self(Arc::new(Mutex::new(state)));
        let shared = upstream.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let upstream = shared.clone();
                let answer = service_fn(move |request| {
                    let upstream = upstream.clone();
                    async move { Ok::<_, Infallible>(upstream.answer(request).await) }
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
    fn change(&self, flag: &str) -> String {
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
    fn show(&self, flag: &str, id: u32) {
        let mut state = self.state();
        (state.flag, state.id) = (flag.to_owned(), id);
    }

    /// Sends this text on the open streams.
    fn tell(&self, text: &str) {
        let mut state = self.state();
        state.open.retain(|sender| sender.send(Ok(text.to_owned())).is_ok());
        assert!(!state.open.is_empty(), "there is a stream");
    }

    /// Ends the open streams in an orderly way.
    fn end(&self) {
        self.state().open.clear();
    }

    /// Resets the open streams.
    fn break_off(&self) {
        for sender in self.state().open.drain(..) {
            let _ = sender.send(Err(io::ErrorKind::ConnectionReset.into()));
        }
    }

    fn offer(&self, offer: Offer) {
        self.state().offer = offer;
    }

    /// The requests for this path so far.
    fn asked(&self, path: &str) -> Vec<Asked> {
        let state = self.state();
        state.asked.iter().filter(|it| it.path == path).cloned().collect()
    }

    /// The requests for this path, once there are at least `count`.
    async fn until_asked(&self, path: &str, count: usize) -> Vec<Asked> {
        until(&format!("{path} is requested {count} times"), SOON, async || {
            let asked = self.asked(path);
            (asked.len() >= count).then_some(asked)
        })
        .await
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let header = |name: &str| text(&head.headers, name);
        let mut state = self.state();
        state.asked.push(Asked {
            path: head.uri.path().to_owned(),
            last_event_id: header("last-event-id"),
            if_none_match: header("if-none-match"),
        });
        match (head.uri.path(), state.offer) {
            ("/edge/validate", _) => {
                let question: Value = serde_json::from_slice(&body).unwrap();
                let tokens = question["tokens"].as_array().unwrap().iter();
                let tokens = tokens.filter(|_| !state.revoked);
                let valid = tokens.map(|token| {
                    json!({ "token": token, "type": "client", "environment": "development", "projects": ["*"] })
                });
                whole(StatusCode::OK, &json!({ "tokens": valid.collect::<Vec<_>>() }).to_string())
            }
            (FEATURES, _) => {
                let etag = if state.has_revisions {
                    format!("\"query:{}:v1\"", state.id)
                } else {
                    format!("\"{}\"", state.flag)
                };
                let mut answer = if header("if-none-match").as_ref() == Some(&etag) {
                    whole(StatusCode::NOT_MODIFIED, "")
                } else {
                    let meta = json!({ "revisionId": state.id });
                    let flags =
                        json!({ "version": 2, "features": [feature(&state.flag)], "meta": meta });
                    whole(StatusCode::OK, &flags.to_string())
                };
                answer.headers_mut().insert("etag", etag.parse().unwrap());
                if state.hints {
                    answer.headers_mut().insert("fetch-mode", "streaming".parse().unwrap());
                }
                answer
            }
            (STREAM, Offer::Refused(status)) => {
                let mut answer = whole(status, "{}");
                answer.headers_mut().insert("retry-after", "1".parse().unwrap());
                answer
            }
            (STREAM, Offer::Stream) => {
                let (sender, receiver) = mpsc::unbounded_channel();
                let events = if header("last-event-id") == Some(state.id.to_string()) {
                    json!([])
                } else {
                    let features = [feature(&state.flag)];
                    json!([{ "type": "hydration", "eventId": state.id, "features": features, "segments": [] }])
                };
                let first = event("unleash-connected", state.id, &json!({ "events": events }));
                sender.send(Ok(first)).unwrap();
                state.open.push(sender);
                let pieces = stream::unfold(receiver, async |mut receiver| {
                    let piece: io::Result<String> = receiver.recv().await?;
                    Some((piece.map(|text| Frame::data(Bytes::from(text))), receiver))
                });
                let mut answer = Response::new(StreamBody::new(pieces).boxed_unsync());
                let kind = "text/event-stream; charset=utf-8".parse().unwrap();
                answer.headers_mut().insert("content-type", kind);
                answer
            }
            _ if state.revoked => whole(StatusCode::UNAUTHORIZED, "{}"),
            _ => whole(StatusCode::NOT_FOUND, ""),
        }
    }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).map(|value| value.to_str().unwrap().to_owned())
}

fn feature(name: &str) -> Value {
    json!({ "name": name, "project": "default", "enabled": true, "strategies": [] })
}

fn event(name: &str, id: u32, data: &Value) -> String {
    format!("event: {name}\nid: {id}\ndata: {data}\n\n")
}

fn whole(status: StatusCode, body: &str) -> Response<Body> {
    let body = Full::from(body.to_owned()).map_err(|never| match never {}).boxed_unsync();
    Response::builder().status(status).body(body).unwrap()
}

/// An edge that would poll once an hour.
async fn patient(url: &str) -> Parapet {
    let edge = Parapet::edge(url).env("TOKENS", TOKEN);
    edge.flag("--features-refresh-interval-seconds", "3600").start().await
}

/// An edge that polls continuously whenever it polls.
async fn impatient(url: &str) -> Parapet {
    Parapet::edge(url).env("TOKENS", TOKEN).impatient().start().await
}

#[tokio::test]
async fn stream_is_resumed_from_last_event_after_end_or_reset() {
    let (upstream, url) = Upstream::start(Offer::Stream).await;
    let parapet = patient(&url).await;
    until_said(&parapet, FOLLOWS, 1).await;
    upstream.tell(&upstream.change("second"));
    until_served(&parapet, "second").await;

    // Events that arrive together are published once.
    let swaps = r#"parapet_snapshot_swaps_total{environment="development"}"#;
    let before = parapet.metric(swaps).await.unwrap();
    let events = ["third", "fourth", "fifth"].map(|flag| upstream.change(flag));
    upstream.tell(&events.concat());
    until_served(&parapet, "fifth").await;
    assert_eq!(parapet.metric(swaps).await, Some(before + 1.0));

    upstream.end();
    let asked = upstream.until_asked(STREAM, 2).await;
    assert_eq!((&asked[0].last_event_id, asked[1].last_event_id.as_deref()), (&None, Some("11")));
    assert_eq!(said(&parapet, "Polling upstream again"), 0, "an end in good order is no news");
    until_follows(&parapet).await;
    upstream.tell(&upstream.change("sixth"));
    until_served(&parapet, "sixth").await;

    // Missed, because no stream was open.
    upstream.break_off();
    upstream.change("seventh");
    until_served(&parapet, "seventh").await;
    let asked = upstream.until_asked(STREAM, 3).await;
    assert_eq!(asked[2].last_event_id.as_deref(), Some("12"));
    assert_eq!(said(&parapet, "Polling upstream again: its stream was lost"), 1);
    until_said(&parapet, FOLLOWS, 2).await;
    assert_eq!(
        (ended(&parapet, "over").await, ended(&parapet, "broken").await),
        (Some(1.0), Some(1.0))
    );
    assert_eq!(upstream.asked(FEATURES).len(), 1, "it was polled once, at the start");
}

#[tokio::test]
async fn invalid_event_leads_to_a_new_snapshot() {
    let (upstream, url) = Upstream::start(Offer::Stream).await;
    let parapet = patient(&url).await;
    until_said(&parapet, FOLLOWS, 1).await;
    let odd = json!({ "events": [{ "type": "feature-vanished", "eventId": 8, "name": "first" }] });
    let odd = [
        event("unleash-updated", 8, &odd),
        event("unleash-updated", 8, &json!("hello")),
        event("unleash-updated", 8, &json!({ "events": [{ "type": "hydration", "eventId": 8 }] })),
    ];
    for (count, odd) in (2..).zip(odd) {
        upstream.change(&format!("flag-{count}"));
        upstream.tell(&odd);
        until_served(&parapet, &format!("flag-{count}")).await;
        let asked = upstream.until_asked(STREAM, count).await;
        assert_eq!(asked[count - 1].last_event_id, None, "{odd}");
    }
    assert_eq!(ended(&parapet, "unreadable").await, Some(3.0));
    upstream.tell(&upstream.change("last"));
    until_served(&parapet, "last").await;
    assert_eq!(upstream.asked(FEATURES).len(), 1);
}

#[tokio::test]
async fn edge_polls_without_stream_and_old_etags_do_not_confirm_streamed_state() {
    let (upstream, url) = Upstream::start(Offer::Stream).await;
    let parapet = impatient(&url).await;
    until_said(&parapet, FOLLOWS, 1).await;
    upstream.tell(&upstream.change("second"));
    until_served(&parapet, "second").await;
    let before = upstream.asked(FEATURES).len();
    upstream.offer(Offer::Refused(StatusCode::SERVICE_UNAVAILABLE));
    // Upstream returns to the state of the first poll's entity tag, without an event.
    upstream.break_off();
    upstream.change("first");
    until_served(&parapet, "first").await;
    let asked = upstream.until_asked(FEATURES, before + 2).await;
    let tags = [before, before + 1].map(|poll| asked[poll].if_none_match.as_deref());
    assert_eq!(tags, [None, Some("\"first\"")]);
    upstream.offer(Offer::Stream);
    until_follows(&parapet).await;
    upstream.tell(&upstream.change("third"));
    until_served(&parapet, "third").await;
    // A state from a poll has no event id.
    let asked = upstream.asked(STREAM);
    assert_eq!(asked.last().unwrap().last_event_id, None, "{asked:?}");
}

#[tokio::test]
async fn stale_replicas_do_not_bring_back_older_state() {
    let (upstream, url) = Upstream::start(Offer::Refused(StatusCode::SERVICE_UNAVAILABLE)).await;
    upstream.state().has_revisions = true;
    let parapet = impatient(&url).await;
    upstream.show("second", 8);
    until_served(&parapet, "second").await;
    // Through its stream.
    upstream.show("first", 7);
    upstream.offer(Offer::Stream);
    until("such a stream is closed", SOON, async || {
        (ended(&parapet, "outdated").await >= Some(2.0)).then_some(())
    })
    .await;
    assert_eq!(served(&parapet).await, ["second"]);
    upstream.show("second", 8);
    until_follows(&parapet).await;
    upstream.tell(&upstream.change("third"));
    until_served(&parapet, "third").await;
    // Through polling.
    upstream.offer(Offer::Refused(StatusCode::SERVICE_UNAVAILABLE));
    upstream.show("second", 8);
    upstream.end();
    let before = upstream.asked(FEATURES).len();
    upstream.until_asked(FEATURES, before + 3).await;
    assert_eq!(served(&parapet).await, ["third"]);
}

#[tokio::test]
async fn upstream_without_stream_is_polled_until_it_hints_at_one() {
    let (upstream, url) = Upstream::start(Offer::Refused(StatusCode::NOT_FOUND)).await;
    let parapet = impatient(&url).await;
    upstream.until_asked(FEATURES, 6).await;
    assert_eq!(upstream.asked(STREAM).len(), 1, "it is left in peace");
    assert_eq!(said(&parapet, "Polling upstream: it does not support streaming"), 1);
    upstream.change("second");
    until_served(&parapet, "second").await;
    let refused = "parapet_upstream_requests_total{purpose=\"stream\",outcome=\"not_offered\"}";
    assert_eq!(parapet.metric(refused).await, Some(1.0));
    assert!(!parapet.log().contains("WARN"), "{}", parapet.log());

    upstream.offer(Offer::Stream);
    upstream.state().hints = true;
    until_follows(&parapet).await;
    assert_eq!(upstream.asked(STREAM).len(), 2);
    upstream.tell(&upstream.change("third"));
    until_served(&parapet, "third").await;
}

#[tokio::test]
async fn edge_polls_when_upstream_requests_polling() {
    let (upstream, url) = Upstream::start(Offer::Stream).await;
    let parapet = impatient(&url).await;
    until_said(&parapet, FOLLOWS, 1).await;
    let before = upstream.asked(FEATURES).len();
    upstream.tell(&event("fetch-mode", 7, &json!("streaming")));
    upstream.tell("event: fetch-mode\ndata: polling\n\n");
    until_said(&parapet, "Polling upstream again: it requests polling", 1).await;
    upstream.change("second");
    until_served(&parapet, "second").await;
    upstream.until_asked(FEATURES, before + 6).await;
    assert_eq!(upstream.asked(STREAM).len(), 1, "it stays unavailable");
    assert_eq!(ended(&parapet, "dismissed").await, Some(1.0));
    upstream.state().hints = true;
    until_follows(&parapet).await;
}

#[tokio::test]
async fn upstream_at_stream_limit_is_polled_until_retry_after() {
    let (upstream, url) = Upstream::start(Offer::Refused(StatusCode::TOO_MANY_REQUESTS)).await;
    let parapet = impatient(&url).await;
    upstream.until_asked(STREAM, 3).await;
    upstream.change("second");
    until_served(&parapet, "second").await;
    assert_eq!(said(&parapet, "Polling upstream: it accepts no further stream"), 1);
    upstream.offer(Offer::Stream);
    until_follows(&parapet).await;
}

#[tokio::test]
async fn token_rejected_by_stream_only_is_polled() {
    // Unleash Edge responds so if it does not stream itself.
    let (upstream, url) = Upstream::start(Offer::Refused(StatusCode::FORBIDDEN)).await;
    let parapet = impatient(&url).await;
    upstream.until_asked(FEATURES, 6).await;
    upstream.change("second");
    until_served(&parapet, "second").await;
    assert_eq!(upstream.asked(STREAM).len(), 1);
    assert_eq!(said(&parapet, "Upstream refuses a token"), 0, "{}", parapet.log());
    let refused = "Polling upstream: it does not accept the token for its stream";
    assert_eq!(said(&parapet, refused), 1);
}

#[tokio::test]
async fn upstream_mode_forces_polling_or_streaming() {
    let (upstream, url) = Upstream::start(Offer::Stream).await;
    let edge = Parapet::edge(&url).env("TOKENS", TOKEN).env("UPSTREAM_MODE", "poll");
    let parapet = edge.impatient().start().await;
    upstream.until_asked(FEATURES, 4).await;
    assert_eq!((upstream.asked(STREAM).len(), polls(&parapet).await >= 3), (0, true));

    upstream.offer(Offer::Refused(StatusCode::NOT_IMPLEMENTED));
    let edge = Parapet::edge(&url).env("TOKENS", TOKEN).flag("--upstream-mode", "stream");
    let parapet = edge.impatient().start().await;
    let warning =
        "Polling upstream although --upstream-mode is stream: it does not support streaming";
    until_said(&parapet, warning, 1).await;
    upstream.offer(Offer::Stream);
    upstream.state().hints = true;
    until_follows(&parapet).await;
    assert_eq!(said(&parapet, warning), 1);
}

/// A real Parapet as upstream, offline, and its flag file.
async fn offline(flag: &str) -> (Parapet, TempDir, PathBuf) {
    secrets::remember(TOKEN);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    write(&file, flag);
    let offline = Parapet::mode("offline").flag("--bootstrap-file", &file);
    let parapet = offline.env("CLIENT_TOKENS", TOKEN).start().await;
    (parapet, folder, file)
}

fn write(file: &PathBuf, flag: &str) {
    std::fs::write(file, json!({ "features": [feature(flag)] }).to_string()).unwrap();
}

#[tokio::test]
async fn restarted_upstream_is_streamed_again_without_polling() {
    let (upstream, _folder, file) = offline("first").await;
    let parapet = patient(&upstream.url()).await;
    until_said(&parapet, FOLLOWS, 1).await;
    let before = polls(&parapet).await;
    write(&file, "second");
    until_served(&parapet, "second").await;

    upstream.kill();
    until_said(&parapet, "Polling upstream again: ", 1).await;
    assert_eq!(served(&parapet).await, ["second"]);
    write(&file, "third");
    upstream.restart();
    until_served(&parapet, "third").await;
    until_said(&parapet, FOLLOWS, 2).await;

    assert!(upstream.terminate().await.success());
    write(&file, "fourth");
    upstream.restart();
    until_served(&parapet, "fourth").await;
    assert_eq!(polls(&parapet).await, before, "none was due");
    let state = r#"parapet_snapshot_age_seconds{environment="development"}"#;
    assert!(parapet.metric(state).await.unwrap() < 60.0);
}

#[tokio::test]
async fn flags_stay_during_network_failure_and_stream_resumes() {
    let (upstream, _folder, file) = offline("first").await;
    let proxy = ChaosProxy::start(&upstream.url()).await;
    let parapet = impatient(&proxy.url()).await;
    until_said(&parapet, FOLLOWS, 1).await;
    for (flag, stalls) in [("second", false), ("third", true)] {
        let (streams, polls) = (proxy.count(STREAM), proxy.count(FEATURES));
        let seen = said(&parapet, "Fetching flags failed");
        proxy.cut().await;
        if stalls {
            proxy.stall().await;
            until("both are tried again", SOON, async || {
                (proxy.count(STREAM) > streams && proxy.count(FEATURES) > polls).then_some(())
            })
            .await;
        }
        until("upstream is missed", SOON, async || {
            (said(&parapet, "Fetching flags failed") > seen).then_some(())
        })
        .await;
        let before = served(&parapet).await;
        write(&file, flag);
        assert_eq!(served(&parapet).await, before);
        proxy.restore().await;
        until_served(&parapet, flag).await;
        until_follows(&parapet).await;
        let polls = proxy.count(FEATURES);
        write(&file, &format!("{flag}-followed"));
        until_served(&parapet, &format!("{flag}-followed")).await;
        assert_eq!(proxy.count(FEATURES), polls, "it gets an event, and does not poll");
    }
}

#[tokio::test]
async fn stream_of_revoked_token_closes_without_removing_flags() {
    let (upstream, url) = Upstream::start(Offer::Stream).await;
    let edge = Parapet::edge(&url).flag("--token-revalidation-interval-seconds", "0.5");
    let edge = edge.flag("--features-refresh-interval-seconds", "3600");
    let parapet = edge.start_listening().await;
    assert_eq!(served(&parapet).await, ["first"], "it waits for the flags of a first-seen token");
    until_said(&parapet, FOLLOWS, 1).await;
    upstream.state().revoked = true;
    until("the stream is closed", SOON, async || {
        upstream.state().open.iter().all(mpsc::UnboundedSender::is_closed).then_some(())
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
        secrets::remember(token);
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
        until("it has a stream", SOON, async || {
            let expect = f64::from(u8::try_from(at + 1).unwrap());
            (parapet.metric(STREAMS).await == Some(expect)).then_some(())
        })
        .await;
    }
    let before = polls(&parapet).await;
    assert_eq!(before, 2, "a token with a stream is not polled");
    for names in [["three", "two"], ["three", "four"], ["five", "six"]] {
        write(names);
        until("both get the event", SOON, async || {
            let both = (served(0).await, served(1).await);
            (both == (Some(names[0].to_owned()), Some(names[1].to_owned()))).then_some(())
        })
        .await;
    }
    assert_eq!(polls(&parapet).await, before);
}

#[tokio::test]
async fn edge_in_front_of_standalone_streams_with_admin_token_and_reports_streams() {
    secrets::remember(ADMIN);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    write(&file, "first");
    let standalone = Parapet::mode("standalone").flag("--flags", &file);
    let upstream = standalone.env("INIT_ADMIN_API_TOKENS", ADMIN).start().await;
    let edge = Parapet::edge(&upstream.admin_url()).admin_token(ADMIN);
    let parapet = edge.flag("--features-refresh-interval-seconds", "3600").start().await;
    until_said(&parapet, FOLLOWS, 1).await;
    let streams = async || parapet.admin_get("/status").await.1["upstream"]["streams"].clone();
    assert_eq!(streams().await, 1);
    write(&file, "second");
    until("the change arrives", SOON, async || {
        let (_, features) = parapet.admin_get("/internal-backstage/features").await;
        (features["development"]["features"][0]["name"] == "second").then_some(())
    })
    .await;
    upstream.kill();
    until("the stream has closed", SOON, async || (streams().await == 0).then_some(())).await;
}
