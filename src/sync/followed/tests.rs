//! Several tokens, and flags that move from the projects of one to those of another, in front of a
//! made-up upstream that tells each token when it is told to.

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
    store::Store,
    token::{Grant, Projects, Token, TokenKind},
    upstream::scripted::config,
};

const PATIENCE: Duration = Duration::from_mins(2);

/// Longer than any test.
const LONG: Duration = Duration::from_hours(1);

const ONE: &str = "[]:dev.one-0123456789abcdef0123456789abcdef";
const TWO: &str = "[]:dev.two-0123456789abcdef0123456789abcdef";

/// What each token's stream begins with besides.
const STREAMED: [(&str, &str); 2] = [(ONE, "p1/streamed-1"), (TWO, "p2/streamed-2")];

struct State {
    /// What each token is shown who asks or opens a stream, as `project/name`.
    shown: BTreeMap<&'static str, Vec<&'static str>>,
    /// The tokens that get no stream.
    crowded: BTreeSet<&'static str>,
    open: BTreeMap<String, mpsc::UnboundedSender<String>>,
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// An edge in front of the made-up upstream; both end when this is dropped.
struct Bed {
    state: Arc<Mutex<State>>,
    snapshots: Snapshots,
    kick: watch::Sender<()>,
    tasks: [AbortHandle; 2],
}

impl Bed {
    /// The first token sees p1 and flags `moving` and `kept`, the second p2, and both see a project that
    /// they share; and not all get streams.
    async fn start(crowded: &[&'static str], held_for: Duration) -> Self {
        let shown = [(ONE, vec!["p1/moving", "p1/kept"]), (TWO, vec!["p2/other"])];
        let state = State {
            shown: shown.into(),
            crowded: crowded.iter().copied().collect(),
            open: BTreeMap::new(),
        };
        let state = Arc::new(Mutex::new(state));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::clone(&state);
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let state = Arc::clone(&shared);
                let service = service_fn(move |request| {
                    let answer = answer(&mut state.lock().unwrap(), &request);
                    async { Ok::<_, Infallible>(answer) }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        let (environment, credentials) = (Environment::new("dev"), Credentials::without_admin());
        for (token, project) in [(ONE, "p1"), (TWO, "p2")] {
            let scope = Scope {
                environment: environment.clone(),
                projects: Projects::from_list([project, "shared"]),
            };
            let grant = Grant { kind: TokenKind::Client, scope };
            assert!(credentials.offer(&Token::parse(token).unwrap(), &grant));
        }
        let snapshots = Snapshots::default();
        let means = Means {
            config: Config { interval: LONG, mode: Mode::Auto },
            upstream: Upstream::new(config(&url)).unwrap(),
            credentials,
            snapshots: snapshots.clone(),
            saver: Saver::new(Store::memory()),
        };
        let mut followed = Followed::new(environment, means);
        followed.held_for = held_for;
        let (kick, kicked) = watch::channel(());
        let edge = tokio::spawn(followed.run(kicked));
        let tasks = [server.abort_handle(), edge.abort_handle()];
        let bed = Self { state, snapshots, kick, tasks };
        bed.until(&["p1/kept", "p1/moving", "p2/other"], &[]).await;
        // Streams begin with a flag that no poll has shown: once it is served, they are followed.
        for (token, streamed) in STREAMED {
            if !crowded.contains(&token) {
                bed.until(&[streamed], &[]).await;
            }
        }
        bed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Shows a token something else from now on, and tells nobody.
    fn show(&self, token: &'static str, flags: &[&'static str]) {
        self.state().shown.insert(token, flags.to_vec());
    }

    /// Tells on the stream of a token what it is shown now instead.
    fn tell(&self, token: &'static str, flags: &[&'static str]) {
        self.show(token, flags);
        self.state().open[token].send(whole("unleash-updated", flags)).unwrap();
    }

    /// Waits until these flags are served, and sees to it that `never` none of those is missing.
    async fn until(&self, flags: &[&str], never: &[&str]) {
        let mut swaps = self.snapshots.swaps();
        let mut arrived = async || {
            loop {
                swaps.borrow_and_update();
                let served = self.served();
                let names: Vec<_> = served.iter().filter_map(|it| it.split('/').nth(1)).collect();
                if !served.is_empty() {
                    assert!(never.iter().all(|name| names.contains(name)), "{served:?}");
                }
                if flags.iter().all(|flag| served.iter().any(|it| it == flag)) {
                    return served;
                }
                swaps.changed().await.unwrap();
            }
        };
        timeout(PATIENCE, arrived()).await.unwrap_or_else(|_| panic!("{:?}", self.served()));
    }

    fn served(&self) -> Vec<String> {
        let snapshot = self.snapshots.load(&Environment::new("dev"));
        let flags = snapshot.iter().flat_map(|it| it.document().features());
        flags.map(|it| format!("{}/{}", it.project(), it.name())).collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

fn answer(state: &mut State, request: &Request<Incoming>) -> Response<Body> {
    let token = request.headers()[AUTHORIZATION].to_str().unwrap();
    let shown = state.shown[token].clone();
    let reply = |status, kind, body: Body| {
        let reply = Response::builder().status(status).header("content-type", kind);
        reply.header("retry-after", "3600").body(body).unwrap()
    };
    let text = |text: String| Full::from(text).boxed_unsync();
    match request.uri().path() {
        "/api/client/features" => {
            let flags = json!({ "version": 2, "features": features(&shown) });
            reply(StatusCode::OK, "application/json", text(flags.to_string()))
        }
        "/api/client/streaming" if state.crowded.contains(token) => {
            reply(StatusCode::TOO_MANY_REQUESTS, "text/plain", text(String::new()))
        }
        "/api/client/streaming" => {
            let (teller, told) = mpsc::unbounded_channel();
            let streamed = STREAMED.iter().filter(|it| it.0 == token).map(|it| it.1);
            let told_first: Vec<_> = shown.into_iter().chain(streamed).collect();
            teller.send(whole("unleash-connected", &told_first)).unwrap();
            state.open.insert(token.to_owned(), teller);
            let pieces = stream::unfold(told, async |mut told| {
                let piece: String = told.recv().await?;
                Some((Ok(Frame::data(Bytes::from(piece))), told))
            });
            reply(StatusCode::OK, "text/event-stream", StreamBody::new(pieces).boxed_unsync())
        }
        other => panic!("nobody asks for {other}"),
    }
}

fn features(flags: &[&str]) -> Vec<Value> {
    let feature = |flag: &&str| {
        let (project, name) = flag.split_once('/').unwrap();
        json!({ "name": name, "project": project, "enabled": true, "strategies": [] })
    };
    flags.iter().map(feature).collect()
}

/// An event that tells everything.
fn whole(name: &str, flags: &[&str]) -> String {
    let features = features(flags);
    let hydration = json!({ "type": "hydration", "eventId": 7, "features": features });
    format!("event: {name}\nid: 7\ndata: {}\n\n", json!({ "events": [hydration] }))
}

#[tokio::test]
async fn a_flag_that_moves_between_tokens_that_stream_is_never_missing() {
    let bed = Bed::start(&[], LONG).await;
    // The sign tells that what came with it is published.
    bed.tell(ONE, &["p1/kept", "p1/sign"]);
    bed.until(&["p1/sign"], &["moving"]).await;
    bed.tell(TWO, &["p2/other", "p2/moving"]);
    bed.until(&["p2/moving"], &["moving"]).await;
    // And back.
    bed.tell(TWO, &["p2/other", "p2/sign-2"]);
    bed.until(&["p2/sign-2"], &["moving"]).await;
    bed.tell(ONE, &["p1/kept", "p1/moving"]);
    bed.until(&["p1/moving"], &["moving"]).await;
}

#[tokio::test]
async fn a_token_without_a_stream_is_asked_with_at_once_where_a_flag_may_have_moved_to_it() {
    let bed = Bed::start(&[TWO], LONG).await;
    bed.show(TWO, &["p2/other", "p2/moving"]);
    bed.tell(ONE, &["p1/kept"]);
    bed.until(&["p2/moving"], &["moving"]).await;
}

#[tokio::test]
async fn what_a_poll_shows_no_more_waits_for_those_that_stream() {
    let bed = Bed::start(&[ONE], LONG).await;
    bed.show(ONE, &["p1/kept", "p1/sign"]);
    bed.kick.send_replace(());
    bed.until(&["p1/sign"], &["moving"]).await;
    bed.tell(TWO, &["p2/other", "p2/moving"]);
    bed.until(&["p2/moving"], &["moving"]).await;
}

#[tokio::test]
async fn a_flag_that_nobody_tells_of_any_more_goes_after_a_while() {
    let bed = Bed::start(&[], Duration::from_millis(20)).await;
    bed.tell(ONE, &["p1/kept"]);
    let mut swaps = bed.snapshots.swaps();
    let mut gone = async || {
        while bed.served() != ["p1/kept", "p2/other", "p2/streamed-2"] {
            swaps.changed().await.unwrap();
        }
    };
    timeout(PATIENCE, gone()).await.unwrap_or_else(|_| panic!("{:?}", bed.served()));
}

#[tokio::test]
async fn older_state_of_a_shared_project_is_not_served_again_while_a_stream_lags() {
    let bed = Bed::start(&[], Duration::from_millis(20)).await;
    bed.tell(ONE, &["p1/kept", "shared/old"]);
    bed.until(&["shared/old"], &[]).await;
    bed.tell(TWO, &["p2/sign", "shared/old"]);
    bed.until(&["p2/sign"], &[]).await;
    bed.tell(ONE, &["p1/kept", "shared/new"]);
    bed.until(&["shared/new"], &[]).await;
    // The other stream has not come to that change yet.
    for sign in ["p2/sign-2", "p2/sign-3"] {
        bed.tell(TWO, &[sign, "shared/old"]);
        bed.until(&[sign], &["new"]).await;
    }
    bed.tell(TWO, &["p2/sign-4", "shared/new"]);
    bed.until(&["p2/sign-4"], &["new"]).await;
    bed.tell(TWO, &["p2/sign-4", "shared/newest"]);
    bed.until(&["shared/newest"], &[]).await;
}
