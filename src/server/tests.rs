//! Whole connections over in-memory streams, with a paused clock that advances only while all tasks
//! wait.

use std::sync::{Mutex, Weak};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::BodyExt as _;
use hyper::{Request, StatusCode, body::Incoming};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::mpsc,
    time::Instant,
};

use super::*;

const MINUTE: Duration = Duration::from_mins(1);

const LIMITS: ConnectionLimits = ConnectionLimits {
    max_connections: 100,
    max_connections_per_address: None,
    header_read_timeout: MINUTE,
    idle_timeout: MINUTE,
    max_age: None,
};

fn config_without_tls(limits: ConnectionLimits) -> Config {
    Config { limits, load_balancers: Vec::new(), tls: None }
}

/// A response whose body ends with a brace, by which clients find its end.
fn response(status: StatusCode) -> HttpResponse {
    let mut response = HttpResponse::new(Bytes::from_static(b"{}").into());
    *response.status_mut() = status;
    response
}

fn not_found() -> HttpResponse {
    response(StatusCode::NOT_FOUND)
}

/// Reports each request with a handle that lives as long as the request, and never responds.
struct NeverResponds(mpsc::UnboundedSender<Weak<()>>);

impl HttpService for NeverResponds {
    fn call(self: &Arc<Self>, _: Request<Incoming>, _: &Arc<ConnectionInfo>) -> ServiceResponse {
        let handle = Arc::new(());
        self.0.send(Arc::downgrade(&handle)).unwrap();
        ServiceResponse::deferred(async move {
            std::future::pending::<()>().await;
            drop(handle);
            not_found()
        })
    }
}

/// Responds after a delay; immediately if that is zero.
struct RespondsAfter(Duration);

impl HttpService for RespondsAfter {
    fn call(self: &Arc<Self>, _: Request<Incoming>, _: &Arc<ConnectionInfo>) -> ServiceResponse {
        let wait = self.0;
        if wait.is_zero() {
            return ServiceResponse::Ready(not_found());
        }
        ServiceResponse::deferred(async move {
            tokio::time::sleep(wait).await;
            not_found()
        })
    }
}

/// Panics, before it returns a response or while the response is awaited.
struct Panics {
    before_response: bool,
}

impl HttpService for Panics {
    fn call(self: &Arc<Self>, _: Request<Incoming>, _: &Arc<ConnectionInfo>) -> ServiceResponse {
        assert!(!self.before_response, "as it is meant to");
        ServiceResponse::deferred(async { panic!("as it is meant to") })
    }

    fn panic_response() -> HttpResponse {
        response(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

/// Streams the received events to the first request.
struct StreamsEvents(Mutex<Option<mpsc::UnboundedReceiver<&'static str>>>);

impl HttpService for StreamsEvents {
    fn call(self: &Arc<Self>, _: Request<Incoming>, _: &Arc<ConnectionInfo>) -> ServiceResponse {
        let pieces = self.0.lock().unwrap().take().unwrap();
        let live = stream::unfold(pieces, |mut pieces| async {
            let piece = pieces.recv().await?;
            Some((Bytes::from(piece), pieces))
        });
        ServiceResponse::Ready(HttpResponse::new(ResponseBody::Stream(Box::pin(live))))
    }
}

/// Responds once it has read the body.
struct ReadsBody;

impl HttpService for ReadsBody {
    fn call(
        self: &Arc<Self>,
        request: Request<Incoming>,
        _: &Arc<ConnectionInfo>,
    ) -> ServiceResponse {
        ServiceResponse::deferred(async {
            request.into_body().collect().await.unwrap();
            not_found()
        })
    }
}

/// Responds with this number of bytes.
struct RespondsWithBytes(usize);

impl HttpService for RespondsWithBytes {
    fn call(self: &Arc<Self>, _: Request<Incoming>, _: &Arc<ConnectionInfo>) -> ServiceResponse {
        ServiceResponse::Ready(HttpResponse::new(Bytes::from(vec![b'x'; self.0]).into()))
    }
}

/// Connects a client to `service` by a stream with a buffer of `buffer_bytes`. Returns the client's end,
/// the shutdown signals and the server's task.
fn connect<S: HttpService>(
    service: S,
    limits: ConnectionLimits,
    buffer_bytes: usize,
) -> (DuplexStream, Drain, tokio::task::JoinHandle<()>) {
    let (client, io) = tokio::io::duplex(buffer_bytes);
    let peer = SocketAddr::from(([127, 0, 0, 1], 1));
    let drain = Drain::default();
    let server = HttpServer::new(Arc::new(service), config_without_tls(limits), drain.clone());
    (client, drain, tokio::spawn(server.serve(io, peer)))
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Reads until the text ends with `end`.
async fn read_until(client: &mut DuplexStream, end: &str) -> String {
    let mut text = Vec::new();
    while !text.ends_with(end.as_bytes()) {
        let read = client.read_buf(&mut text).await.unwrap();
        assert_ne!(read, 0, "{}", String::from_utf8_lossy(&text));
    }
    String::from_utf8(text).unwrap()
}

/// Sends a request and reads the whole response.
async fn send_request(client: &mut DuplexStream) -> String {
    client.write_all(REQUEST).await.unwrap();
    read_until(client, "}").await
}

/// Reads until the connection closes. Returns the bytes and the time until then.
async fn read_to_close(client: &mut DuplexStream) -> (Vec<u8>, Duration) {
    let (begun, mut rest) = (Instant::now(), Vec::new());
    client.read_to_end(&mut rest).await.unwrap();
    (rest, begun.elapsed())
}

/// Runs all other tasks that are ready.
async fn run_pending_tasks() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn idle_connection_stays_open_longer_than_its_timeout() {
    let limits = ConnectionLimits { header_read_timeout: MINUTE / 10, ..LIMITS };
    for requests in [0, 1, 3] {
        let (mut client, ..) = connect(RespondsAfter(Duration::ZERO), limits.clone(), 1 << 16);
        for _ in 0..requests {
            tokio::time::sleep(MINUTE / 2).await;
            send_request(&mut client).await;
        }
        let (rest, took) = read_to_close(&mut client).await;
        assert!(rest.is_empty());
        assert!(took > MINUTE * 11 / 10, "{took:?} after {requests}");
        assert!(took < MINUTE * 13 / 10, "{took:?} after {requests}");
    }
}

#[tokio::test(start_paused = true)]
async fn head_timeout_starts_at_the_first_byte_of_each_head() {
    let patience = Duration::from_secs(2);
    let limits = ConnectionLimits { header_read_timeout: patience, ..LIMITS };
    let (mut client, ..) = connect(RespondsAfter(patience * 2), limits.clone(), 1 << 16);
    send_request(&mut client).await;
    for _ in 0..3 {
        tokio::time::sleep(patience * 3).await;
        client.write_all(&REQUEST[..5]).await.unwrap();
        tokio::time::sleep(patience / 2).await;
        client.write_all(&REQUEST[5..]).await.unwrap();
        read_until(&mut client, "}").await;
    }
    client.write_all(&REQUEST[..5]).await.unwrap();
    let (rest, took) = read_to_close(&mut client).await;
    assert!(rest.is_empty() && took >= patience && took < patience * 2, "{took:?}");

    for begun in [&REQUEST[..5], &PREFACE[..5]] {
        let (mut client, ..) = connect(RespondsAfter(Duration::ZERO), limits.clone(), 1 << 16);
        client.write_all(begun).await.unwrap();
        let (_, took) = read_to_close(&mut client).await;
        assert!(took >= patience && took < MINUTE, "{took:?} for {begun:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn late_body_does_not_start_the_head_timeout() {
    let limits = ConnectionLimits { header_read_timeout: Duration::from_secs(2), ..LIMITS };
    let (mut client, ..) = connect(ReadsBody, limits, 1 << 16);
    client.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n").await.unwrap();
    run_pending_tasks().await;
    client.write_all(b"{}").await.unwrap();
    read_until(&mut client, "}").await;
    let (_, took) = read_to_close(&mut client).await;
    assert!(took >= MINUTE, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn stalled_client_is_disconnected_and_a_slow_one_is_not() {
    let (mut client, ..) = connect(RespondsWithBytes(1 << 20), LIMITS, 16);
    client.write_all(REQUEST).await.unwrap();
    let mut piece = [0; 16];
    for _ in 0..5 {
        tokio::time::sleep(connection_limits::STALL_TIMEOUT * 9 / 10).await;
        client.read_exact(&mut piece).await.unwrap();
    }
    tokio::time::sleep(connection_limits::STALL_TIMEOUT * 2).await;
    let (rest, _) = read_to_close(&mut client).await;
    assert!(rest.len() < 1 << 20, "the rest is not sent");
}

#[tokio::test(start_paused = true)]
async fn draining_closes_a_connection_with_its_next_response() {
    let (mut client, drain, serving) = connect(RespondsAfter(Duration::ZERO), LIMITS, 1 << 16);
    assert!(!send_request(&mut client).await.contains("connection: close"));
    drain.begin_draining();
    run_pending_tasks().await;
    assert!(send_request(&mut client).await.contains("\r\nconnection: close\r\n"));
    let (rest, took) = read_to_close(&mut client).await;
    assert!(rest.is_empty() && took.is_zero(), "{took:?}");
    serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn closing_ends_idle_connections_and_finishes_busy_and_new_ones() {
    let (mut idle, drain, serving) = connect(RespondsAfter(Duration::ZERO), LIMITS, 1 << 16);
    send_request(&mut idle).await;
    drain.begin_closing();
    serving.await.unwrap();
    assert_eq!(read_to_close(&mut idle).await, (Vec::new(), Duration::ZERO));

    let (mut new, drain, serving) = connect(RespondsAfter(Duration::ZERO), LIMITS, 1 << 16);
    drain.begin_closing();
    run_pending_tasks().await;
    assert!(send_request(&mut new).await.contains("\r\nconnection: close\r\n"));
    serving.await.unwrap();

    for begun in [&b""[..], PREFACE] {
        let (mut new, drain, serving) = connect(RespondsAfter(Duration::ZERO), LIMITS, 1 << 16);
        new.write_all(begun).await.unwrap();
        run_pending_tasks().await;
        drain.begin_closing();
        let closed = Instant::now();
        serving.await.unwrap();
        let took = closed.elapsed();
        assert!(
            took > connection_limits::FIRST_REQUEST_TIMEOUT / 2
                && took < 2 * connection_limits::SHUTDOWN_TIMEOUT,
            "{took:?}"
        );
    }

    let (mut busy, drain, serving) = connect(RespondsAfter(MINUTE), LIMITS, 1 << 16);
    busy.write_all(REQUEST).await.unwrap();
    run_pending_tasks().await;
    drain.begin_closing();
    assert!(read_until(&mut busy, "}").await.contains("\r\nconnection: close\r\n"));
    serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn connection_above_its_maximum_age_closes_with_the_next_response() {
    let limits = ConnectionLimits { max_age: Some(MINUTE), idle_timeout: 10 * MINUTE, ..LIMITS };
    let (mut client, ..) = connect(RespondsAfter(Duration::ZERO), limits, 1 << 16);
    tokio::time::sleep(MINUTE / 2).await;
    assert!(!send_request(&mut client).await.contains("connection: close"));
    tokio::time::sleep(MINUTE).await;
    assert!(send_request(&mut client).await.contains("\r\nconnection: close\r\n"));
}

#[tokio::test]
async fn panicking_handler_returns_500_and_connection_stays_open() {
    for before_response in [true, false] {
        let (mut client, ..) = connect(Panics { before_response }, LIMITS, 1 << 16);
        for _ in 0..2 {
            let answer = send_request(&mut client).await;
            assert!(answer.starts_with("HTTP/1.1 500"), "{answer}");
        }
    }
}

#[tokio::test]
async fn requests_that_outlast_the_grace_period_are_dropped_before_serve_returns() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (seen, mut requests) = mpsc::unbounded_channel();
    let drain = Drain::default();
    let service = Arc::new(NeverResponds(seen));
    let serving = tokio::spawn(serve(
        listener,
        service,
        config_without_tls(LIMITS),
        drain.clone(),
        Duration::ZERO,
    ));
    let mut first = TcpStream::connect(address).await.unwrap();
    first.write_all(REQUEST).await.unwrap();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let second = reqwest::Client::builder().http2_prior_knowledge().no_proxy().build().unwrap();
    let second = tokio::spawn(second.get(format!("http://{address}")).send());
    let handles = [requests.recv().await.unwrap(), requests.recv().await.unwrap()];
    assert!(handles.iter().all(|request| request.upgrade().is_some()));
    drain.begin_closing();
    serving.await.unwrap();
    assert!(handles.iter().all(|request| request.upgrade().is_none()));
    assert!(second.await.unwrap().is_err());
}

#[tokio::test]
async fn connections_in_the_backlog_are_served_at_shutdown() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let drain = Drain::default();
    drain.begin_closing();
    let mut clients = Vec::new();
    for _ in 0..20 {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(REQUEST).await.unwrap();
        clients.push(client);
    }
    serve(
        listener,
        Arc::new(RespondsAfter(Duration::ZERO)),
        config_without_tls(LIMITS),
        drain,
        MINUTE,
    )
    .await;
    for mut client in clients {
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    }
}

#[tokio::test]
async fn event_stream_uses_the_framing_of_the_http_version_until_it_ends() {
    for (version, is_chunked) in [("1.0", false), ("1.1", true)] {
        let (pieces, events) = mpsc::unbounded_channel();
        let (mut client, drain, _) =
            connect(StreamsEvents(Mutex::new(Some(events))), LIMITS, 1 << 16);
        let request = format!("GET / HTTP/{version}\r\nhost: a\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let head = read_until(&mut client, "\r\n\r\n").await;
        assert_eq!(head.contains("\r\ntransfer-encoding: chunked\r\n"), is_chunked, "{head}");
        for piece in ["one", "another"] {
            pieces.send(piece).unwrap();
            let length = if is_chunked { format!("{:X}\r\n", piece.len()) } else { String::new() };
            let end = if is_chunked { "\r\n" } else { "" };
            let all = format!("{length}{piece}{end}");
            assert_eq!(read_until(&mut client, &all).await, all);
        }
        drain.begin_closing();
        run_pending_tasks().await;
        drop(pieces);
        let mut rest = String::new();
        client.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, if is_chunked { "0\r\n\r\n" } else { "" });
    }
}

#[tokio::test(start_paused = true)]
async fn connection_gets_the_full_idle_timeout_after_its_stream_ended() {
    for lasts in [MINUTE / 2, MINUTE, MINUTE * 7 / 5, MINUTE * 3 / 2, 2 * MINUTE] {
        let (pieces, events) = mpsc::unbounded_channel();
        let (mut client, ..) = connect(StreamsEvents(Mutex::new(Some(events))), LIMITS, 1 << 16);
        client.write_all(REQUEST).await.unwrap();
        read_until(&mut client, "\r\n\r\n").await;
        tokio::time::sleep(lasts).await;
        drop(pieces);
        let (rest, took) = read_to_close(&mut client).await;
        assert_eq!(rest, b"0\r\n\r\n");
        assert!(took >= MINUTE, "{took:?} after {lasts:?}");
    }
}

#[tokio::test]
async fn stream_ends_when_its_client_disconnects() {
    let (pieces, events) = mpsc::unbounded_channel();
    let (mut client, ..) = connect(StreamsEvents(Mutex::new(Some(events))), LIMITS, 1 << 16);
    client.write_all(REQUEST).await.unwrap();
    read_until(&mut client, "\r\n\r\n").await;
    drop(client);
    pieces.closed().await;
}

#[tokio::test]
async fn http_version_is_detected_from_first_bytes_of_any_chunk_size() {
    const FRAME_OF_SETTINGS: u8 = 4;
    for at_once in [1, 30, 1 << 16] {
        let (mut client, ..) = connect(RespondsAfter(Duration::ZERO), LIMITS, at_once);
        let head = format!("POST /{} HTTP/1.1\r\nhost: a\r\n\r\n", "x".repeat(3000));
        client.write_all(head.as_bytes()).await.unwrap();
        let answer = read_until(&mut client, "}").await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");

        let (client, ..) = connect(RespondsAfter(Duration::ZERO), LIMITS, at_once);
        let (mut from, mut to) = tokio::io::split(client);
        let mut frame = [0; 9];
        // The server does not read further before the client has read its settings.
        tokio::spawn(async move { to.write_all(PREFACE).await });
        from.read_exact(&mut frame).await.unwrap();
        assert_eq!(frame[3], FRAME_OF_SETTINGS, "{frame:?}");

        let (mut client, ..) = connect(RespondsAfter(Duration::ZERO), LIMITS, at_once);
        client.write_all(b"PRI * HTTP/1.1\r\n\r\n").await.unwrap();
        let answer = read_until(&mut client, "}").await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    }
}

/// Connects hyper's HTTP/2 client.
async fn connect_http2(
    client: DuplexStream,
) -> hyper::client::conn::http2::SendRequest<http_body_util::Empty<Bytes>> {
    let executor = hyper_util::rt::TokioExecutor::new();
    let mut builder = hyper::client::conn::http2::Builder::new(executor);
    // The client reads one byte of each response. The connection's window is larger, so that streams
    // stall alone.
    builder.initial_stream_window_size(1).initial_connection_window_size(1 << 16);
    let (sender, connection) = builder.handshake(TokioIo::new(client)).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn get_request() -> Request<http_body_util::Empty<Bytes>> {
    Request::get("http://a/").body(http_body_util::Empty::new()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn stalled_http2_response_is_reset_and_others_continue() {
    let (client, ..) = connect(RespondsWithBytes(1 << 20), LIMITS, 1 << 16);
    let mut sender = connect_http2(client).await;
    let stalled = sender.send_request(get_request()).await.unwrap();
    tokio::time::sleep(connection_limits::STALL_TIMEOUT * 2).await;
    let error = stalled.into_body().collect().await.unwrap_err();
    assert!(format!("{error:?}").contains("CANCEL"), "{error:?}");
    assert_eq!(sender.send_request(get_request()).await.unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn http2_requests_wait_while_too_many_response_bytes_are_pending() {
    let (client, ..) = connect(
        RespondsWithBytes(2 * connection_limits::MAX_PENDING_RESPONSE_BYTES),
        LIMITS,
        1 << 16,
    );
    let mut sender = connect_http2(client).await;
    let first = sender.send_request(get_request()).await.unwrap();
    let mut second = std::pin::pin!(sender.send_request(get_request()));
    let early = timeout(connection_limits::STALL_TIMEOUT / 2, second.as_mut()).await;
    assert!(early.is_err(), "too many response bytes are pending");
    drop(first);
    let then = timeout(connection_limits::STALL_TIMEOUT / 2, second).await;
    assert_eq!(then.unwrap().unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn http2_connection_closes_when_idle_or_old_and_drains_after_its_requests() {
    let limits = ConnectionLimits { max_age: Some(3 * MINUTE), ..LIMITS };
    let (client, _, serving) = connect(RespondsAfter(Duration::ZERO), limits, 1 << 16);
    let mut sender = connect_http2(client).await;
    let begun = Instant::now();
    assert_eq!(sender.send_request(get_request()).await.unwrap().status(), 404);
    serving.await.unwrap();
    let took = begun.elapsed();
    assert!(took >= MINUTE && took < 2 * MINUTE, "{took:?}");

    let limits = ConnectionLimits { max_age: Some(3 * MINUTE), ..LIMITS };
    let (client, _, serving) = connect(RespondsAfter(Duration::ZERO), limits, 1 << 16);
    let mut sender = connect_http2(client).await;
    let begun = Instant::now();
    while sender.send_request(get_request()).await.is_ok() {
        tokio::time::sleep(MINUTE / 4).await;
    }
    serving.await.unwrap();
    let took = begun.elapsed();
    assert!(took >= 3 * MINUTE * 9 / 10 && took < 4 * MINUTE, "{took:?}");

    let (client, drain, serving) = connect(RespondsAfter(MINUTE / 2), LIMITS, 1 << 16);
    let mut sender = connect_http2(client).await;
    let busy = tokio::spawn(sender.send_request(get_request()));
    run_pending_tasks().await;
    drain.begin_draining();
    assert_eq!(busy.await.unwrap().unwrap().status(), 404);
    serving.await.unwrap();
}
