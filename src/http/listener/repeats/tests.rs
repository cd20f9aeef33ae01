//! A connection says what it would if hyper answered everything, however its bytes come.

use std::{
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use http_body_util::BodyExt as _;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body as _, Incoming},
    header::{ETAG, HeaderValue},
};
use proptest::{collection::vec, prelude::*, sample::select};
use regex::Regex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::*;
use crate::http::listener::{Limits, Protocol};

/// Answers some requests on terms, if it ever does, and counts how many it was spared.
#[derive(Default)]
struct Library {
    has_terms: bool,
    /// How often what it answered holds.
    holds: AtomicUsize,
    given_again: AtomicUsize,
}

impl Library {
    /// Whose answers hold as long as anybody asks, or that has none which do.
    fn of(has_terms: bool) -> Arc<Self> {
        let holds = AtomicUsize::new(usize::MAX);
        Arc::new(Self { has_terms, holds, ..Self::default() })
    }
}

/// More than is copied, and than the smaller connections take at once.
const LONG: usize = 20_000;

impl Service for Library {
    type Terms = &'static str;

    async fn call(&self, request: Request<Incoming>, peer: SocketAddr) -> Answered<Self::Terms> {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        if path == "/slow" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if path != "/read" && !request.body().is_end_stream() {
            // It is not read, and has come by then, or never will: where some of it is still to come,
            // hyper closes the connection.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let text = match &*path {
            "/long" => "x".repeat(LONG),
            "/unchanged" => String::new(),
            "/read" => match request.into_body().collect().await {
                Ok(body) => format!("read {}", body.to_bytes().len()),
                Err(_) => "not all came".to_owned(),
            },
            path => format!("{method} {path} of {}", peer.ip()),
        };
        let is_unchanged = text.is_empty();
        let mut reply = Response::new(bytes::Bytes::from(text).into());
        if is_unchanged {
            *reply.status_mut() = StatusCode::NOT_MODIFIED;
        }
        reply.headers_mut().insert(ETAG, HeaderValue::from_static("\"1\""));
        let rests = self.has_terms && method == Method::GET && !path.starts_with("/once");
        Answered { reply, terms: rests.then_some("now") }
    }

    fn revalidate(&self, _: &Self::Terms, _: Instant) -> bool {
        let left = self.holds.load(Relaxed);
        self.holds.store(left.saturating_sub(1), Relaxed);
        self.given_again.fetch_add(usize::from(left > 0), Relaxed);
        left > 0
    }
}

const LIMITS: Limits = Limits {
    body_bytes: 0,
    connections: 10,
    header_read_timeout: Duration::from_mins(10),
    request_timeout: Duration::from_mins(10),
};

fn protocol(library: &Arc<Library>) -> Protocol<Library> {
    Protocol::new(Arc::clone(library), &LIMITS)
}

/// What a client reads that sends these pieces, with a pause after each, and takes so many bytes at
/// once; dates are left out.
async fn told(protocol: &Protocol<Library>, pieces: &[Vec<u8>], at_once: usize) -> String {
    static DATES: LazyLock<Regex> = LazyLock::new(|| Regex::new("date: [^\r]*\r\n").unwrap());
    let (client, io) = tokio::io::duplex(at_once);
    let peer = SocketAddr::from(([10, 0, 0, 1], 1));
    let serving = tokio::spawn(protocol.serve(io, peer));
    let (mut from, mut to) = tokio::io::split(client);
    let send = async {
        for piece in pieces {
            // The server may have left.
            let _ = to.write_all(piece).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        std::future::pending::<()>().await;
    };
    let mut received = Vec::new();
    let receive = async {
        loop {
            // The clock moves when nobody has anything to do.
            let read = from.read_buf(&mut received);
            match tokio::time::timeout(Duration::from_secs(1), read).await {
                Ok(Ok(1..)) => {}
                _ => break,
            }
        }
    };
    tokio::select! {
        () = send => {}
        () = receive => {}
    }
    serving.abort();
    DATES.replace_all(&String::from_utf8_lossy(&received), "").into_owned()
}

fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: a\r\nauthorization: secret\r\n\r\n").into_bytes()
}

fn post(path: &str, length: usize, told: usize) -> Vec<u8> {
    let head = format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {told}\r\n\r\n");
    [head.into_bytes(), vec![b'b'; length]].concat()
}

/// Heads that are not what they seem, or that leave the connection another than it was.
const ODD: [&str; 19] = [
    "GET /a HTTP/1.1\n\n",
    "GET /a HTTP/1.1\nhost: a\n\nGET /b HTTP/1.1\r\nhost: a\r\n\r\n",
    "\r\nGET /a HTTP/1.1\r\nhost: a\r\n\r\n",
    "\r\n\r\n",
    "\n",
    "GET /a HTTP/1.0\r\nhost: a\r\n\r\n",
    "GET /a HTTP/1.0\r\nhost: a\r\nconnection: keep-alive\r\n\r\n",
    "GET /a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
    "GET /a HTTP/1.1\r\nhost: a\r\nconnection: Keep-Alive\r\n\r\n",
    "GET /a HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\n\r\n",
    "GET /a HTTP/1.1\r\nhost: a\r\ncontent-length: 47\r\n\r\n",
    "GET /a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n",
    "5\r\nGET /\r\n0\r\n\r\n",
    "GET /a HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
    "HEAD /a HTTP/1.1\r\nhost: a\r\n\r\n",
    "POST /read HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "GET /a HTTP/1.1\r\nhost: a\r\n",
    "GET /a HTTP/1.1\r\nhost: a\r\nx: ",
    "no HTTP at all\r\n\r\n",
];

/// A request, or something like it.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let bodies = (select(vec!["/read", "/left"]), 0..3000_usize);
    prop_oneof![
        select(vec!["/a", "/b", "/long", "/unchanged", "/slow", "/once"]).prop_map(get),
        bodies.clone().prop_map(|(path, length)| post(path, length, length)),
        (bodies, 0..50_usize).prop_map(|((path, length), more)| post(path, length, length + more)),
        select(&ODD).prop_map(|text| text.as_bytes().to_vec()),
    ]
}

/// One of a few messages, where it is cut, and whether the next is sent together with it.
type Part = (prop::sample::Index, Option<prop::sample::Index>, bool);

/// What some clients send, one after the other: the same few messages, one request among them, now
/// and then cut, or together with the next.
fn scripts() -> impl Strategy<Value = Vec<Vec<Vec<u8>>>> {
    let cut = prop::option::weighted(0.1, any::<prop::sample::Index>());
    let part = (any::<prop::sample::Index>(), cut, prop::bool::weighted(0.1));
    (vec(message(), 1..4), vec(vec(part, 1..8), 3..8)).prop_map(|(mut messages, scripts)| {
        messages.push(get("/a"));
        scripts.iter().map(|script| pieces(&messages, script)).collect()
    })
}

fn pieces(messages: &[Vec<u8>], script: &[Part]) -> Vec<Vec<u8>> {
    let mut pieces = vec![Vec::new()];
    for (message, cut, joins) in script {
        let message = message.get(messages);
        let (first, second) = message.split_at(cut.map_or(0, |cut| cut.index(message.len())));
        pieces.last_mut().unwrap().extend_from_slice(first);
        pieces.push(second.to_vec());
        if !joins {
            pieces.push(Vec::new());
        }
    }
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn a_connection_says_what_hyper_would(
        scripts in scripts(),
        at_once in select(vec![64, 1000, 1 << 20]),
    ) {
        paused().block_on(async {
            let library = Library::of(true);
            let (with, without) = (protocol(&library), protocol(&Library::of(false)));
            for pieces in &scripts {
                let expect = told(&without, pieces, at_once).await;
                prop_assert_eq!(told(&with, pieces, at_once).await, expect);
            }
            Ok(())
        })?;
    }
}

/// How many of these pieces the service was spared, sent three times over on a new connection.
fn spared(pieces: &[Vec<u8>]) -> usize {
    let library = Library::of(true);
    paused().block_on(told(&protocol(&library), &[pieces; 3].concat(), 1 << 20));
    library.given_again.load(Relaxed)
}

#[test]
fn what_comes_a_third_time_is_answered_without_the_service() {
    assert_eq!(spared(&[get("/a")]), 1);
    assert_eq!(spared(&[get("/long"), get("/unchanged"), get("/a")]), 3);
    assert_eq!(spared(&[get("/once")]), 0, "there are no terms");
    // Reports on the same connection do not matter, whether they come at once or not.
    assert_eq!(spared(&[get("/a"), post("/read", 3000, 3000)]), 1);
    let report = post("/read", 3000, 3000);
    let (head, body) = report.split_at(70);
    assert_eq!(spared(&[get("/a"), head.to_vec(), body.to_vec()]), 1);
    // What hyper has more of than one request is its business from then on.
    assert_eq!(spared(&[[get("/a"), get("/a")].concat()]), 0);
    let whole = get("/a");
    let (first, second) = whole.split_at(20);
    assert_eq!(spared(&[first.to_vec(), second.to_vec()]), 0);
}

/// A body whose end has the words of another client's request, sent so that from the end of the first
/// head to there it is as long as it says: as if one request had come with all of its body.
#[test]
fn the_body_of_a_second_request_in_one_piece_is_no_request() {
    let victim = get(&format!("/{}", "a".repeat(99)));
    let begun = b"so far";
    let length = begun.len() + victim.len();
    let head = |x: &str| {
        format!("POST /read HTTP/1.1\r\nhost: a\r\nx: {x}\r\ncontent-length: {length}\r\n\r\n")
    };
    let head = head(&"x".repeat(victim.len() - head("").len()));
    let script = [[&get("/b"), head.as_bytes(), begun].concat(), victim.clone(), get("/b")];
    // Whether it was asked often enough to be remembered by then, or is remembered already.
    for asked_before in [1, 2] {
        let (with, without) = (protocol(&Library::of(true)), protocol(&Library::of(false)));
        let told = |protocol, pieces: &[_]| paused().block_on(told(protocol, pieces, 1 << 20));
        let honest = told(&without, std::slice::from_ref(&victim));
        for _ in 0..asked_before {
            assert_eq!(told(&with, std::slice::from_ref(&victim)), honest);
        }
        assert_eq!(told(&with, &script), told(&without, &script));
        assert_eq!(told(&with, std::slice::from_ref(&victim)), honest);
    }
}

#[test]
fn other_words_from_elsewhere_and_what_no_longer_holds_are_asked_anew() {
    let library = Library::of(true);
    let protocol = protocol(&library);
    let ask = |pieces: &[Vec<u8>]| {
        let before = library.given_again.load(Relaxed);
        paused().block_on(told(&protocol, pieces, 1 << 20));
        library.given_again.load(Relaxed) - before
    };
    let again = [get("/a"), get("/a")];
    assert_eq!([ask(&again), ask(&again), ask(&[get("/b")])], [0, 2, 0]);
    library.holds.store(1, Relaxed);
    assert_eq!(ask(&again), 1, "it held once, and then was forgotten");
    assert_eq!(ask(&again), 0, "nothing holds");
}

/// A client's end of a connection to a service that has its answers to `/long` and `/a` by heart.
async fn connected(protocol: &Protocol<Library>, at_once: usize) -> DuplexStream {
    let questions = [get("/long"), get("/a")];
    told(protocol, &questions, 1 << 20).await;
    told(protocol, &questions, 1 << 20).await;
    let (client, io) = tokio::io::duplex(at_once);
    tokio::spawn(protocol.serve(io, SocketAddr::from(([10, 0, 0, 1], 1))));
    client
}

#[tokio::test(start_paused = true)]
async fn waiting_is_limited_from_the_last_answer_on_whoever_gave_it() {
    let patience = Duration::from_secs(1);
    let library = Library::of(true);
    let limits = Limits { header_read_timeout: patience, ..LIMITS };
    let protocol = Protocol::new(Arc::clone(&library), &limits);
    let mut client = connected(&protocol, 1 << 20).await;
    for _ in 0..3 {
        client.write_all(&get("/a")).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"10.0.0.1") {
            assert_ne!(client.read_buf(&mut answer).await.unwrap(), 0);
        }
        tokio::time::sleep(patience * 6 / 10).await;
    }
    assert_eq!(library.given_again.load(Relaxed), 3);
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "a silent client is left");
}

#[tokio::test]
async fn an_answer_that_is_being_sent_is_sent_whole_at_the_end() {
    for before in ["", "connection: upgrade\r\nupgrade: h2c\r\n"] {
        let library = Library::of(true);
        let protocol = protocol(&library);
        let mut client = connected(&protocol, 100).await;
        let first = format!("GET /a HTTP/1.1\r\nhost: a\r\n{before}\r\n");
        client.write_all(first.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"10.0.0.1") {
            assert_ne!(client.read_buf(&mut answer).await.unwrap(), 0);
        }
        client.write_all(&get("/long")).await.unwrap();
        client.read_exact(&mut [0; 10]).await.unwrap();
        protocol.stop.give();
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.unwrap();
        assert!(rest.ends_with(&vec![b'x'; LONG]), "{} bytes came", rest.len());
    }
}
