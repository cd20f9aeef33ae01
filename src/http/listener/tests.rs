//! Whole connections in memory, by a clock that stands still while anything can go on.

use std::sync::{Mutex, Weak};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::BodyExt as _;
use hyper::{Request, body::Incoming};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::mpsc,
    time::Instant,
};

use super::*;
use crate::http::reply::{self, Failure, Reply};

const MINUTE: Duration = Duration::from_mins(1);

const LIMITS: Limits = Limits {
    connections: 100,
    connections_per_address: None,
    header_read_timeout: MINUTE,
    idle_timeout: MINUTE,
    max_age: None,
};

fn plain(limits: Limits) -> Config {
    Config { limits, balancers: Vec::new(), tls: None }
}

/// Tells of each request, holds something as long as it lasts, and never answers.
struct Silent(mpsc::UnboundedSender<Weak<()>>);

impl Service for Silent {
    fn call(self: &Arc<Self>, _: Request<Incoming>, _: &Arc<ConnectionInfo>) -> Answer {
        let held = Arc::new(());
        self.0.send(Arc::downgrade(&held)).unwrap();
        Answer::later(async move {
            std::future::pending::<()>().await;
            drop(held);
            Reply::from(Failure::Internal)
        })
    }
}

/// Answers after a while; at once where that is none.
struct Slow(Duration);

impl Service for Slow {
    fn call(self: &Arc<Self>, _: Request<Incoming>, _: &Arc<ConnectionInfo>) -> Answer {
        let wait = self.0;
        if wait.is_zero() {
            return Answer::Ready(Failure::NotFound.into());
        }
        Answer::later(async move {
            tokio::time::sleep(wait).await;
            Reply::from(Failure::NotFound)
        })
    }
}

/// Panics, before it answers or while it does.
struct Panicking {
    at_once: bool,
}

impl Service for Panicking {
    fn call(self: &Arc<Self>, _: Request<Incoming>, _: &Arc<ConnectionInfo>) -> Answer {
        assert!(!self.at_once, "as it is meant to");
        Answer::later(async { panic!("as it is meant to") })
    }
}

/// Tells what it is given, to the first who asks.
struct Teller(Mutex<Option<mpsc::UnboundedReceiver<&'static str>>>);

impl Service for Teller {
    fn call(self: &Arc<Self>, _: Request<Incoming>, _: &Arc<ConnectionInfo>) -> Answer {
        let pieces = self.0.lock().unwrap().take().unwrap();
        let live = stream::unfold(pieces, |mut pieces| async {
            let piece = pieces.recv().await?;
            Some((Bytes::from(piece), pieces))
        });
        Answer::Ready(reply::event_stream(Box::pin(live)))
    }
}

/// Answers when it has read the body.
struct Reads;

impl Service for Reads {
    fn call(self: &Arc<Self>, request: Request<Incoming>, _: &Arc<ConnectionInfo>) -> Answer {
        Answer::later(async {
            request.into_body().collect().await.unwrap();
            Reply::from(Failure::NotFound)
        })
    }
}

/// Answers with so many bytes.
struct Large(usize);

impl Service for Large {
    fn call(self: &Arc<Self>, _: Request<Incoming>, _: &Arc<ConnectionInfo>) -> Answer {
        Answer::Ready(reply::ok(vec![b'x'; self.0]))
    }
}

/// A client's end of a connection to `service` that brings so many bytes at once, and its task.
fn connected<S: Service>(
    service: S,
    limits: Limits,
    at_once: usize,
) -> (DuplexStream, Drain, tokio::task::JoinHandle<()>) {
    let (client, io) = tokio::io::duplex(at_once);
    let peer = SocketAddr::from(([127, 0, 0, 1], 1));
    let drain = Drain::default();
    let server = Server::new(Arc::new(service), plain(limits), drain.clone());
    (client, drain, tokio::spawn(server.serve(io, peer)))
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Reads until there is `end`.
async fn read_to(client: &mut DuplexStream, end: &str) -> String {
    let mut text = Vec::new();
    while !text.ends_with(end.as_bytes()) {
        let read = client.read_buf(&mut text).await.unwrap();
        assert_ne!(read, 0, "{}", String::from_utf8_lossy(&text));
    }
    String::from_utf8(text).unwrap()
}

/// Sends a request and reads the whole answer.
async fn ask(client: &mut DuplexStream) -> String {
    client.write_all(REQUEST).await.unwrap();
    read_to(client, "}").await
}

/// What is left to read when the connection ends, and after how long it does.
async fn end(client: &mut DuplexStream) -> (Vec<u8>, Duration) {
    let (begun, mut rest) = (Instant::now(), Vec::new());
    client.read_to_end(&mut rest).await.unwrap();
    (rest, begun.elapsed())
}

/// Lets everything else run that can.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_outlasts_its_time_by_what_a_request_may_be_on_its_way() {
    let limits = Limits { header_read_timeout: MINUTE / 10, ..LIMITS };
    for requests in [0, 1, 3] {
        let (mut client, ..) = connected(Slow(Duration::ZERO), limits.clone(), 1 << 16);
        for _ in 0..requests {
            tokio::time::sleep(MINUTE / 2).await;
            ask(&mut client).await;
        }
        let (rest, took) = end(&mut client).await;
        assert!(rest.is_empty());
        assert!(took > MINUTE * 11 / 10, "{took:?} after {requests}");
        assert!(took < MINUTE * 13 / 10, "{took:?} after {requests}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_has_its_time_from_its_first_byte_each_time_anew() {
    let patience = Duration::from_secs(2);
    let limits = Limits { header_read_timeout: patience, ..LIMITS };
    let (mut client, ..) = connected(Slow(patience * 2), limits.clone(), 1 << 16);
    ask(&mut client).await;
    for _ in 0..3 {
        tokio::time::sleep(patience * 3).await;
        client.write_all(&REQUEST[..5]).await.unwrap();
        tokio::time::sleep(patience / 2).await;
        client.write_all(&REQUEST[5..]).await.unwrap();
        read_to(&mut client, "}").await;
    }
    client.write_all(&REQUEST[..5]).await.unwrap();
    let (rest, took) = end(&mut client).await;
    assert!(rest.is_empty() && took >= patience && took < patience * 2, "{took:?}");

    for begun in [&REQUEST[..5], &PREFACE[..5]] {
        let (mut client, ..) = connected(Slow(Duration::ZERO), limits.clone(), 1 << 16);
        client.write_all(begun).await.unwrap();
        let (_, took) = end(&mut client).await;
        assert!(took >= patience && took < MINUTE, "{took:?} for {begun:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_comes_late_is_no_head() {
    let limits = Limits { header_read_timeout: Duration::from_secs(2), ..LIMITS };
    let (mut client, ..) = connected(Reads, limits, 1 << 16);
    client.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n").await.unwrap();
    settle().await;
    client.write_all(b"{}").await.unwrap();
    read_to(&mut client, "}").await;
    let (_, took) = end(&mut client).await;
    assert!(took >= MINUTE, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_nothing_loses_its_connection_and_one_that_is_slow_does_not() {
    let (mut client, ..) = connected(Large(1 << 20), LIMITS, 16);
    client.write_all(REQUEST).await.unwrap();
    let mut piece = [0; 16];
    for _ in 0..5 {
        tokio::time::sleep(limits::STALL_TIMEOUT * 9 / 10).await;
        client.read_exact(&mut piece).await.unwrap();
    }
    tokio::time::sleep(limits::STALL_TIMEOUT * 2).await;
    let (rest, _) = end(&mut client).await;
    assert!(rest.len() < 1 << 20, "the rest is not sent");
}

#[tokio::test(start_paused = true)]
async fn draining_tells_busy_and_idle_clients_with_their_next_answer() {
    let (mut client, drain, serving) = connected(Slow(Duration::ZERO), LIMITS, 1 << 16);
    assert!(!ask(&mut client).await.contains("connection: close"));
    drain.begin();
    settle().await;
    assert!(ask(&mut client).await.contains("\r\nconnection: close\r\n"));
    let (rest, took) = end(&mut client).await;
    assert!(rest.is_empty() && took.is_zero(), "{took:?}");
    serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn closing_ends_idle_connections_and_lets_busy_and_new_ones_finish() {
    let (mut idle, drain, serving) = connected(Slow(Duration::ZERO), LIMITS, 1 << 16);
    ask(&mut idle).await;
    drain.close();
    serving.await.unwrap();
    assert_eq!(end(&mut idle).await, (Vec::new(), Duration::ZERO));

    let (mut new, drain, serving) = connected(Slow(Duration::ZERO), LIMITS, 1 << 16);
    drain.close();
    settle().await;
    assert!(ask(&mut new).await.contains("\r\nconnection: close\r\n"));
    serving.await.unwrap();

    for begun in [&b""[..], PREFACE] {
        let (mut new, drain, serving) = connected(Slow(Duration::ZERO), LIMITS, 1 << 16);
        new.write_all(begun).await.unwrap();
        settle().await;
        drain.close();
        let closed = Instant::now();
        serving.await.unwrap();
        let took = closed.elapsed();
        assert!(
            took > limits::FIRST_REQUEST_TIMEOUT / 2 && took < 2 * limits::SHUTDOWN_TIMEOUT,
            "{took:?}"
        );
    }

    let (mut busy, drain, serving) = connected(Slow(MINUTE), LIMITS, 1 << 16);
    busy.write_all(REQUEST).await.unwrap();
    settle().await;
    drain.close();
    assert!(read_to(&mut busy, "}").await.contains("\r\nconnection: close\r\n"));
    serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_old_connection_says_so_with_its_next_answer() {
    let limits = Limits { max_age: Some(MINUTE), idle_timeout: 10 * MINUTE, ..LIMITS };
    let (mut client, ..) = connected(Slow(Duration::ZERO), limits, 1 << 16);
    tokio::time::sleep(MINUTE / 2).await;
    assert!(!ask(&mut client).await.contains("connection: close"));
    tokio::time::sleep(MINUTE).await;
    assert!(ask(&mut client).await.contains("\r\nconnection: close\r\n"));
}

#[tokio::test]
async fn what_panics_is_answered_and_costs_no_connection() {
    for at_once in [true, false] {
        let (mut client, ..) = connected(Panicking { at_once }, LIMITS, 1 << 16);
        for _ in 0..2 {
            let answer = ask(&mut client).await;
            assert!(answer.starts_with("HTTP/1.1 500"), "{answer}");
        }
    }
}

#[tokio::test]
async fn requests_that_outlast_the_grace_are_dropped_before_serving_ends() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (seen, mut requests) = mpsc::unbounded_channel();
    let drain = Drain::default();
    let service = Arc::new(Silent(seen));
    let serving =
        tokio::spawn(serve(listener, service, plain(LIMITS), drain.clone(), Duration::ZERO));
    let mut first = TcpStream::connect(address).await.unwrap();
    first.write_all(REQUEST).await.unwrap();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let second = reqwest::Client::builder().http2_prior_knowledge().no_proxy().build().unwrap();
    let second = tokio::spawn(second.get(format!("http://{address}")).send());
    let held = [requests.recv().await.unwrap(), requests.recv().await.unwrap()];
    assert!(held.iter().all(|request| request.upgrade().is_some()));
    drain.close();
    serving.await.unwrap();
    assert!(held.iter().all(|request| request.upgrade().is_none()));
    assert!(second.await.unwrap().is_err());
}

#[tokio::test]
async fn who_has_connected_before_the_end_is_answered() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let drain = Drain::default();
    drain.close();
    let mut clients = Vec::new();
    for _ in 0..20 {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(REQUEST).await.unwrap();
        clients.push(client);
    }
    serve(listener, Arc::new(Slow(Duration::ZERO)), plain(LIMITS), drain, MINUTE).await;
    for mut client in clients {
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    }
}

#[tokio::test]
async fn a_stream_is_told_in_the_framing_of_the_request_until_it_ends() {
    for (version, is_chunked) in [("1.0", false), ("1.1", true)] {
        let (pieces, told) = mpsc::unbounded_channel();
        let (mut client, drain, _) = connected(Teller(Mutex::new(Some(told))), LIMITS, 1 << 16);
        let request = format!("GET / HTTP/{version}\r\nhost: a\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let head = read_to(&mut client, "\r\n\r\n").await;
        assert_eq!(head.contains("\r\ntransfer-encoding: chunked\r\n"), is_chunked, "{head}");
        for piece in ["one", "another"] {
            pieces.send(piece).unwrap();
            let length = if is_chunked { format!("{:X}\r\n", piece.len()) } else { String::new() };
            let end = if is_chunked { "\r\n" } else { "" };
            let all = format!("{length}{piece}{end}");
            assert_eq!(read_to(&mut client, &all).await, all);
        }
        drain.close();
        settle().await;
        drop(pieces);
        let mut rest = String::new();
        client.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, if is_chunked { "0\r\n\r\n" } else { "" });
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_whose_stream_has_ended_is_kept_as_long_as_any_other() {
    for lasts in [MINUTE / 2, MINUTE, MINUTE * 7 / 5, MINUTE * 3 / 2, 2 * MINUTE] {
        let (pieces, told) = mpsc::unbounded_channel();
        let (mut client, ..) = connected(Teller(Mutex::new(Some(told))), LIMITS, 1 << 16);
        client.write_all(REQUEST).await.unwrap();
        read_to(&mut client, "\r\n\r\n").await;
        tokio::time::sleep(lasts).await;
        drop(pieces);
        let (rest, took) = end(&mut client).await;
        assert_eq!(rest, b"0\r\n\r\n");
        assert!(took >= MINUTE, "{took:?} after {lasts:?}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_stream() {
    let (pieces, told) = mpsc::unbounded_channel();
    let (mut client, ..) = connected(Teller(Mutex::new(Some(told))), LIMITS, 1 << 16);
    client.write_all(REQUEST).await.unwrap();
    read_to(&mut client, "\r\n\r\n").await;
    drop(client);
    pieces.closed().await;
}

#[tokio::test]
async fn the_first_bytes_tell_the_protocol_however_few_come_at_once() {
    const FRAME_OF_SETTINGS: u8 = 4;
    for at_once in [1, 30, 1 << 16] {
        let (mut client, ..) = connected(Slow(Duration::ZERO), LIMITS, at_once);
        let head = format!("POST /{} HTTP/1.1\r\nhost: a\r\n\r\n", "x".repeat(3000));
        client.write_all(head.as_bytes()).await.unwrap();
        let answer = read_to(&mut client, "}").await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");

        let (client, ..) = connected(Slow(Duration::ZERO), LIMITS, at_once);
        let (mut from, mut to) = tokio::io::split(client);
        let mut frame = [0; 9];
        // The server does not read on before its own settings are taken.
        tokio::spawn(async move { to.write_all(PREFACE).await });
        from.read_exact(&mut frame).await.unwrap();
        assert_eq!(frame[3], FRAME_OF_SETTINGS, "{frame:?}");

        let (mut client, ..) = connected(Slow(Duration::ZERO), LIMITS, at_once);
        client.write_all(b"PRI * HTTP/1.1\r\n\r\n").await.unwrap();
        let answer = read_to(&mut client, "}").await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    }
}

/// An HTTP/2 client, by hyper.
async fn http2(
    client: DuplexStream,
) -> hyper::client::conn::http2::SendRequest<http_body_util::Empty<Bytes>> {
    let executor = hyper_util::rt::TokioExecutor::new();
    let mut builder = hyper::client::conn::http2::Builder::new(executor);
    // One byte of each answer, and of all: the client takes what the server must not wait to be rid of.
    builder.initial_stream_window_size(1).initial_connection_window_size(1 << 16);
    let (sender, connection) = builder.handshake(TokioIo::new(client)).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn get() -> Request<http_body_util::Empty<Bytes>> {
    Request::get("http://a/").body(http_body_util::Empty::new()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn an_http2_answer_that_nobody_takes_is_reset_and_no_other() {
    let (client, ..) = connected(Large(1 << 20), LIMITS, 1 << 16);
    let mut sender = http2(client).await;
    let stalled = sender.send_request(get()).await.unwrap();
    tokio::time::sleep(limits::STALL_TIMEOUT * 2).await;
    let error = stalled.into_body().collect().await.unwrap_err();
    assert!(format!("{error:?}").contains("CANCEL"), "{error:?}");
    assert_eq!(sender.send_request(get()).await.unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn requests_of_an_http2_client_that_takes_nothing_wait_for_their_turn() {
    let (client, ..) = connected(Large(2 * limits::WAITING_BYTES), LIMITS, 1 << 16);
    let mut sender = http2(client).await;
    let first = sender.send_request(get()).await.unwrap();
    let mut second = std::pin::pin!(sender.send_request(get()));
    let early = timeout(limits::STALL_TIMEOUT / 2, second.as_mut()).await;
    assert!(early.is_err(), "its answer would be one too many to keep");
    drop(first);
    let then = timeout(limits::STALL_TIMEOUT / 2, second).await;
    assert_eq!(then.unwrap().unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn idle_and_old_http2_connections_end_and_draining_ones_after_their_requests() {
    let limits = Limits { max_age: Some(3 * MINUTE), ..LIMITS };
    let (client, _, serving) = connected(Slow(Duration::ZERO), limits, 1 << 16);
    let mut sender = http2(client).await;
    let begun = Instant::now();
    assert_eq!(sender.send_request(get()).await.unwrap().status(), 404);
    serving.await.unwrap();
    let took = begun.elapsed();
    assert!(took >= MINUTE && took < 2 * MINUTE, "{took:?}");

    let limits = Limits { max_age: Some(3 * MINUTE), ..LIMITS };
    let (client, _, serving) = connected(Slow(Duration::ZERO), limits, 1 << 16);
    let mut sender = http2(client).await;
    let begun = Instant::now();
    while sender.send_request(get()).await.is_ok() {
        tokio::time::sleep(MINUTE / 4).await;
    }
    serving.await.unwrap();
    let took = begun.elapsed();
    assert!(took >= 3 * MINUTE * 9 / 10 && took < 4 * MINUTE, "{took:?}");

    let (client, drain, serving) = connected(Slow(MINUTE / 2), LIMITS, 1 << 16);
    let mut sender = http2(client).await;
    let busy = tokio::spawn(sender.send_request(get()));
    settle().await;
    drain.begin();
    assert_eq!(busy.await.unwrap().unwrap().status(), 404);
    serving.await.unwrap();
}
