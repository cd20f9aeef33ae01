//! Several tokens and flags that move between their projects, against a fake upstream whose streams send
//! on command.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Frame, Incoming},
    header::AUTHORIZATION,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, task::AbortHandle, time::timeout};

use super::*;
use crate::{
    store::MemoryStore,
    sync::reconnect::UpstreamMode,
    token::{Grant, Projects, Token, TokenKind},
    upstream::scripted_server::config,
};

const TIMEOUT: Duration = Duration::from_mins(2);

/// Longer than any test.
const LONG: Duration = Duration::from_hours(1);

const ONE: &str = "[]:dev.one-0123456789abcdef0123456789abcdef";
const TWO: &str = "[]:dev.two-0123456789abcdef0123456789abcdef";

/// A flag that only the first event of each token's stream contains.
const STREAM_ONLY_FLAGS: [(&str, &str); 2] = [(ONE, "p1/streamed-1"), (TWO, "p2/streamed-2")];

struct UpstreamState {
    /// The flags that each token sees, as `project/name`.
    visible_flags: BTreeMap<&'static str, Vec<&'static str>>,
    /// The tokens that get no stream.
    throttled: BTreeSet<&'static str>,
    open_streams: BTreeMap<String, mpsc::UnboundedSender<String>>,
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// An [`EnvironmentSync`] against the fake upstream. Both stop on drop.
struct Fixture {
    state: Arc<Mutex<UpstreamState>>,
    snapshots: Snapshots,
    poll_request: watch::Sender<()>,
    tasks: [AbortHandle; 2],
}

impl Fixture {
    /// The first token sees project p1 with flags `moving` and `kept`, the second p2; both see `shared`.
    /// `crowded` tokens get no stream.
    async fn start(crowded: &[&'static str], removal_grace: Duration) -> Self {
        let shown = [(ONE, vec!["p1/moving", "p1/kept"]), (TWO, vec!["p2/other"])];
        let state = UpstreamState {
            visible_flags: shown.into(),
            throttled: crowded.iter().copied().collect(),
            open_streams: BTreeMap::new(),
        };
        let state = Arc::new(Mutex::new(state));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::clone(&state);
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let state = Arc::clone(&shared);
                let service = service_fn(move |request| {
                    let answer = respond(&mut state.lock().unwrap(), &request);
                    async { Ok::<_, Infallible>(answer) }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        let (environment, credentials) =
            (Environment::new("dev"), EnvironmentTokens::without_admin());
        for (token, project) in [(ONE, "p1"), (TWO, "p2")] {
            let scope = Scope {
                environment: environment.clone(),
                projects: Projects::from_list([project, "shared"]),
            };
            let grant = Grant { kind: TokenKind::Client, scope };
            assert!(credentials.offer(&Token::parse(token).unwrap(), &grant));
        }
        let snapshots = Snapshots::default();
        let dependencies = Dependencies {
            config: Config { interval: LONG, mode: UpstreamMode::Auto },
            upstream: Upstream::new(config(&url)).unwrap(),
            credentials,
            snapshots: snapshots.clone(),
            writer: BackgroundWriter::new(Arc::new(MemoryStore::default())),
            event_log: EventLog::unavailable(),
            fleet: None,
        };
        let mut environment_sync = EnvironmentSync::new(environment, dependencies);
        environment_sync.state.removal_grace = removal_grace;
        let (poll_request, poll_requested) = watch::channel(());
        let edge = tokio::spawn(environment_sync.run(poll_requested));
        let tasks = [server.abort_handle(), edge.abort_handle()];
        let fixture = Self { state, snapshots, poll_request, tasks };
        fixture.wait_for_flags(&["p1/kept", "p1/moving", "p2/other"], &[]).await;
        // Only the stream contains this flag: once it is served, the stream is synced.
        for (token, streamed) in STREAM_ONLY_FLAGS {
            if !crowded.contains(&token) {
                fixture.wait_for_flags(&[streamed], &[]).await;
            }
        }
        fixture
    }

    fn state(&self) -> MutexGuard<'_, UpstreamState> {
        self.state.lock().unwrap()
    }

    /// Changes the flags that a token sees without sending an event.
    fn set_flags(&self, token: &'static str, flags: &[&'static str]) {
        self.state().visible_flags.insert(token, flags.to_vec());
    }

    /// Changes the flags that a token sees and sends them on its stream.
    fn push(&self, token: &'static str, flags: &[&'static str]) {
        self.set_flags(token, flags);
        self.state().open_streams[token].send(hydration_event("unleash-updated", flags)).unwrap();
    }

    /// Waits until `flags` are served; panics if a flag of `always` is missing meanwhile.
    async fn wait_for_flags(&self, flags: &[&str], always: &[&str]) {
        let mut swaps = self.snapshots.subscribe();
        let mut arrived = async || {
            loop {
                swaps.borrow_and_update();
                let served = self.served_flags();
                let names: Vec<_> = served.iter().filter_map(|it| it.split('/').nth(1)).collect();
                if !served.is_empty() {
                    assert!(always.iter().all(|name| names.contains(name)), "{served:?}");
                }
                if flags.iter().all(|flag| served.iter().any(|it| it == flag)) {
                    return served;
                }
                swaps.changed().await.unwrap();
            }
        };
        timeout(TIMEOUT, arrived()).await.unwrap_or_else(|_| panic!("{:?}", self.served_flags()));
    }

    fn served_flags(&self) -> Vec<String> {
        let snapshot = self.snapshots.load(&Environment::new("dev"));
        let flags = snapshot.iter().flat_map(|it| it.document().features());
        flags.map(|it| format!("{}/{}", it.project(), it.name())).collect()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

fn respond(state: &mut UpstreamState, request: &Request<Incoming>) -> Response<Body> {
    let token = request.headers()[AUTHORIZATION].to_str().unwrap();
    let shown = state.visible_flags[token].clone();
    let reply = |status, kind, body: Body| {
        let reply = Response::builder().status(status).header("content-type", kind);
        reply.header("retry-after", "3600").body(body).unwrap()
    };
    let text = |text: String| Full::from(text).boxed_unsync();
    match request.uri().path() {
        "/api/client/features" => {
            let flags = json!({ "version": 2, "features": features_json(&shown) });
            reply(StatusCode::OK, "application/json", text(flags.to_string()))
        }
        "/api/client/streaming" if state.throttled.contains(token) => {
            reply(StatusCode::TOO_MANY_REQUESTS, "text/plain", text(String::new()))
        }
        "/api/client/streaming" => {
            let (sender, receiver) = mpsc::unbounded_channel();
            let streamed = STREAM_ONLY_FLAGS.iter().filter(|it| it.0 == token).map(|it| it.1);
            let first: Vec<_> = shown.into_iter().chain(streamed).collect();
            sender.send(hydration_event("unleash-connected", &first)).unwrap();
            state.open_streams.insert(token.to_owned(), sender);
            let chunks = stream::unfold(receiver, async |mut receiver| {
                let chunk: String = receiver.recv().await?;
                Some((Ok(Frame::data(Bytes::from(chunk))), receiver))
            });
            reply(StatusCode::OK, "text/event-stream", StreamBody::new(chunks).boxed_unsync())
        }
        other => panic!("unexpected request for {other}"),
    }
}

fn features_json(flags: &[&str]) -> Vec<Value> {
    let feature = |flag: &&str| {
        let (project, name) = flag.split_once('/').unwrap();
        json!({ "name": name, "project": project, "enabled": true, "strategies": [] })
    };
    flags.iter().map(feature).collect()
}

/// An event with all flags.
fn hydration_event(name: &str, flags: &[&str]) -> String {
    let features = features_json(flags);
    let hydration = json!({ "type": "hydration", "eventId": 7, "features": features });
    format!("event: {name}\nid: 7\ndata: {}\n\n", json!({ "events": [hydration] }))
}

#[tokio::test]
async fn flag_that_moves_between_streaming_tokens_is_never_missing() {
    let fixture = Fixture::start(&[], LONG).await;
    // The marker flag `sign` shows that its event has been published.
    fixture.push(ONE, &["p1/kept", "p1/sign"]);
    fixture.wait_for_flags(&["p1/sign"], &["moving"]).await;
    fixture.push(TWO, &["p2/other", "p2/moving"]);
    fixture.wait_for_flags(&["p2/moving"], &["moving"]).await;
    // And back.
    fixture.push(TWO, &["p2/other", "p2/sign-2"]);
    fixture.wait_for_flags(&["p2/sign-2"], &["moving"]).await;
    fixture.push(ONE, &["p1/kept", "p1/moving"]);
    fixture.wait_for_flags(&["p1/moving"], &["moving"]).await;
}

#[tokio::test]
async fn token_without_stream_is_polled_at_once_when_a_flag_may_have_moved_to_it() {
    let fixture = Fixture::start(&[TWO], LONG).await;
    fixture.set_flags(TWO, &["p2/other", "p2/moving"]);
    fixture.push(ONE, &["p1/kept"]);
    fixture.wait_for_flags(&["p2/moving"], &["moving"]).await;
}

#[tokio::test]
async fn removal_seen_by_poll_waits_for_streaming_tokens() {
    let fixture = Fixture::start(&[ONE], LONG).await;
    fixture.set_flags(ONE, &["p1/kept", "p1/sign"]);
    fixture.poll_request.send_replace(());
    fixture.wait_for_flags(&["p1/sign"], &["moving"]).await;
    fixture.push(TWO, &["p2/other", "p2/moving"]);
    fixture.wait_for_flags(&["p2/moving"], &["moving"]).await;
}

#[tokio::test]
async fn flag_that_no_token_reports_is_removed_after_grace_period() {
    let fixture = Fixture::start(&[], Duration::from_millis(20)).await;
    fixture.push(ONE, &["p1/kept"]);
    let mut swaps = fixture.snapshots.subscribe();
    let mut gone = async || {
        while fixture.served_flags() != ["p1/kept", "p2/other", "p2/streamed-2"] {
            swaps.changed().await.unwrap();
        }
    };
    timeout(TIMEOUT, gone()).await.unwrap_or_else(|_| panic!("{:?}", fixture.served_flags()));
}

#[tokio::test]
async fn older_state_of_a_shared_project_is_not_served_again_while_a_stream_lags() {
    let fixture = Fixture::start(&[], Duration::from_millis(20)).await;
    fixture.push(ONE, &["p1/kept", "shared/old"]);
    fixture.wait_for_flags(&["shared/old"], &[]).await;
    fixture.push(TWO, &["p2/sign", "shared/old"]);
    fixture.wait_for_flags(&["p2/sign"], &[]).await;
    fixture.push(ONE, &["p1/kept", "shared/new"]);
    fixture.wait_for_flags(&["shared/new"], &[]).await;
    // The other stream lags behind this change.
    for sign in ["p2/sign-2", "p2/sign-3"] {
        fixture.push(TWO, &[sign, "shared/old"]);
        fixture.wait_for_flags(&[sign], &["new"]).await;
    }
    fixture.push(TWO, &["p2/sign-4", "shared/new"]);
    fixture.wait_for_flags(&["p2/sign-4"], &["new"]).await;
    fixture.push(TWO, &["p2/sign-4", "shared/newest"]);
    fixture.wait_for_flags(&["shared/newest"], &[]).await;
}
