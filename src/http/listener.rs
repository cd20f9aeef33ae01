//! Accepts connections and speaks HTTP/1.1 and HTTP/2 on them until it is told to stop.
//!
//! The listener and the signal to stop are arguments, so that a test starts the real thing on port
//! 0. What a request means, and how long answering it may take, is the [`Service`]'s business.

mod attended;
mod connection;
mod gather;
mod handover;
mod repeats;
mod response_cache;
mod service;
mod spoken;
mod stream;
mod tasks;
mod telling;
mod turn;

use std::{
    convert::Infallible, future::Future, net::SocketAddr, panic::AssertUnwindSafe, sync::Arc,
    time::Duration,
};

use futures_util::FutureExt as _;
use hyper::{
    Request,
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::TokioTimer;
use metrics::{counter, describe_counter};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

pub use self::service::{Answered, Service};
use self::{
    attended::{Attended, Watch},
    connection::Connection,
    handover::Handover,
    repeats::{Known, Recall, Repeats},
    response_cache::ResponseCache,
    spoken::{Protocols, Spoken},
    tasks::Tasks,
    turn::Turn,
};
use super::{
    reply::{Failure, Reply},
    stop::Stop,
};
use crate::telemetry::{Sparing, report};

/// What one client, and all of them together, may take.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Limits {
    /// The largest request body, in bytes, after decompression.
    pub body_bytes: usize,
    /// How many connections may be open at once.
    pub connections: usize,
    /// The longest that a client may take to send a request's head.
    pub header_read_timeout: Duration,
    /// The longest that one request may take, from its head until its body is there; services wait
    /// for nothing else as long.
    pub request_timeout: Duration,
}

const ACCEPT_FAILURES: &str = "parapet_accept_failures_total";

/// How long accepting pauses after it failed, for want of file descriptors mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How often HTTP/2 connections are probed, so that dead ones do not stay.
const PING_EVERY: Duration = Duration::from_secs(20);

/// How long a client may leave what it was sent untaken, by not reading or by being gone.
#[cfg(target_os = "linux")]
const STALLED_AFTER: Duration = Duration::from_mins(1);

/// Serves until `stop`, then lets requests under way finish, at most for `grace`; those that do not
/// are dropped before this returns.
pub async fn serve<S: Service>(
    listener: TcpListener,
    service: Arc<S>,
    limits: &Limits,
    stop: CancellationToken,
    grace: Duration,
) {
    let room = Arc::new(Semaphore::new(limits.connections));
    let protocol = Protocol::new(service, limits);
    describe_counter!(ACCEPT_FAILURES, "Connections that could not be accepted");
    let failures = counter!(ACCEPT_FAILURES);
    let mut sparing = Sparing::default();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &room) => accepted,
        };
        match accepted {
            Ok((stream, peer, permit)) => {
                let connection = protocol.serve(stream, peer);
                protocol.tasks.spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            Err(error) => {
                failures.increment(1);
                if let Some(left_out) = sparing.admit() {
                    let more = (left_out > 0).then_some(left_out);
                    warn!(
                        error = report(&error),
                        more_since_last_line = more,
                        "Cannot accept a connection"
                    );
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    protocol.stop.give();
    if tokio::time::timeout(grace, protocol.tasks.finish()).await.is_err() {
        warn!(?grace, "Requests under way did not finish in time");
    }
    protocol.tasks.abort().await;
}

/// Speaks HTTP/1.1 and HTTP/2 on connections, for one service.
#[derive(Debug)]
pub struct Protocol<S: Service> {
    service: Arc<S>,
    cache: Arc<ResponseCache<S::Terms>>,
    protocols: Arc<Protocols>,
    /// How long a head may take.
    patience: Duration,
    stop: Stop,
    tasks: Tasks,
}

impl<S: Service> Protocol<S> {
    /// Speaks for `service`.
    pub fn new(service: Arc<S>, limits: &Limits) -> Self {
        let tasks = Tasks::default();
        let patience = limits.header_read_timeout;
        let mut http1 = http1::Builder::new();
        http1.header_read_timeout(patience);
        let mut http2 = http2::Builder::new(tasks.clone());
        http2.timer(TokioTimer::new()).keep_alive_interval(PING_EVERY);
        let protocols = Arc::new(Protocols { http1, http2 });
        let cache = Arc::new(ResponseCache::new());
        Self { service, cache, protocols, patience, stop: Stop::default(), tasks }
    }

    /// Serves one connection to its end. Dropping the future closes it.
    pub fn serve<I>(
        &self,
        stream: I,
        peer: SocketAddr,
    ) -> impl Future<Output = ()> + Send + use<S, I>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        // A count of this connection's own: that of all of them would go from core to core with every
        // request.
        let known = Arc::new(Known {
            service: Arc::clone(&self.service),
            cache: Arc::clone(&self.cache),
            peer,
        });
        let (watch, handover) = (Watch::new(self.patience), Arc::<Handover>::default());
        let turn = Arc::<Turn>::default();
        let recall: Arc<dyn Recall> = Arc::<Known<S>>::clone(&known);
        let repeats = Repeats { known: recall, turn: Arc::clone(&turn), watch: Arc::clone(&watch) };
        let (heads, streams) = (Arc::clone(&watch), Arc::clone(&handover));
        let answer = service_fn(move |request: Request<Incoming>| {
            // Where the protocol is HTTP/2, nobody else says so.
            heads.rest();
            let key = turn.asked(&request);
            let (known, streams, turn) =
                (Arc::clone(&known), Arc::clone(&streams), Arc::clone(&turn));
            let version = request.version();
            async move {
                let answered = guarded(&*known.service, request, peer).await;
                let reply = known.note(key, answered);
                turn.answered(&reply);
                Ok::<_, Infallible>(streams.keep(version, reply))
            }
        });
        let protocols = Arc::clone(&self.protocols);
        let spoken = Spoken::new(stream, answer, protocols, repeats, handover);
        let attended = Attended::new(spoken, watch, self.stop.clone());
        Connection::Answering(Box::pin(attended))
    }
}

async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let permit = Arc::clone(room).acquire_owned().await.expect("the semaphore is never closed");
    let (stream, peer) = listener.accept().await?;
    stream.set_nodelay(true)?;
    // Elsewhere a client that reads nothing keeps its connection until the system gives it up.
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(STALLED_AFTER))?;
    Ok((stream, peer, permit))
}

/// Answers, with a 500 where answering panics: one request's fault must not take its connection's
/// other requests along.
async fn guarded<S: Service>(
    service: &S,
    request: Request<Incoming>,
    peer: SocketAddr,
) -> Answered<S::Terms> {
    AssertUnwindSafe(service.call(request, peer)).catch_unwind().await.unwrap_or_else(|_| {
        error!("Answering a request panicked");
        Reply::from(Failure::Internal).into()
    })
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Mutex, Weak},
        time::Instant,
    };

    use bytes::Bytes;
    use futures_util::{StreamExt as _, stream};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
        sync::mpsc,
    };

    use super::*;
    use crate::http::reply;

    /// Tells of each request, holds something as long as it lasts, and never answers.
    struct Silent(mpsc::UnboundedSender<Weak<()>>);

    impl Service for Silent {
        type Terms = ();

        async fn call(&self, _: Request<Incoming>, _: SocketAddr) -> Answered<()> {
            let held = Arc::new(());
            self.0.send(Arc::downgrade(&held)).unwrap();
            std::future::pending::<()>().await;
            drop(held);
            Reply::from(Failure::Internal).into()
        }

        fn revalidate(&self, (): &(), _: Instant) -> bool {
            false
        }
    }

    /// Answers after a while.
    struct Slow(Duration);

    impl Service for Slow {
        type Terms = ();

        async fn call(&self, _: Request<Incoming>, _: SocketAddr) -> Answered<()> {
            tokio::time::sleep(self.0).await;
            Reply::from(Failure::NotFound).into()
        }

        fn revalidate(&self, (): &(), _: Instant) -> bool {
            false
        }
    }

    /// A client's connection to `service`, whose heads may take `patience`, and the sign to stop.
    async fn connected<S: Service>(service: S, patience: Duration) -> (TcpStream, Serving) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let limits = Limits {
            body_bytes: 0,
            connections: 10,
            header_read_timeout: patience,
            request_timeout: Duration::from_mins(1),
        };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            serve(listener, Arc::new(service), &limits, stopped, Duration::from_mins(1)).await;
        });
        (TcpStream::connect(address).await.unwrap(), Serving { stop, task })
    }

    struct Serving {
        stop: CancellationToken,
        task: tokio::task::JoinHandle<()>,
    }

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

    /// Sends a request and reads the whole answer.
    async fn ask(stream: &mut TcpStream) {
        stream.write_all(REQUEST).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0, "{answer:?}");
        }
    }

    #[tokio::test]
    async fn only_waiting_for_a_head_is_limited_and_each_time_anew() {
        let patience = Duration::from_millis(300);
        let (mut stream, _serving) = connected(Slow(patience * 2), patience).await;
        ask(&mut stream).await;
        tokio::time::sleep(patience / 2).await;
        ask(&mut stream).await;
        stream.write_all(&REQUEST[..5]).await.unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "half a head ends the connection");
    }

    #[tokio::test]
    async fn silent_clients_are_dropped_and_idle_ones_do_not_delay_the_end() {
        let (mut silent, _serving) = connected(Slow(Duration::ZERO), Duration::ZERO).await;
        assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
        let patience = Duration::from_mins(1);
        let (mut idle, serving) = connected(Slow(Duration::ZERO), patience).await;
        ask(&mut idle).await;
        serving.stop.cancel();
        serving.task.await.unwrap();
        assert_eq!(idle.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn requests_that_outlast_the_grace_are_dropped_before_serving_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let limits = Limits {
            body_bytes: 0,
            connections: 10,
            header_read_timeout: Duration::from_mins(1),
            request_timeout: Duration::from_mins(1),
        };
        let (seen, mut requests) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let (service, stopped) = (Arc::new(Silent(seen)), stop.clone());
        let serving = tokio::spawn(async move {
            serve(listener, service, &limits, stopped, Duration::ZERO).await;
        });
        let mut first = TcpStream::connect(address).await.unwrap();
        first.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let second = reqwest::Client::builder().http2_prior_knowledge().no_proxy().build().unwrap();
        let second = tokio::spawn(second.get(format!("http://{address}")).send());
        let held = [requests.recv().await.unwrap(), requests.recv().await.unwrap()];
        assert!(held.iter().all(|request| request.upgrade().is_some()));
        stop.cancel();
        serving.await.unwrap();
        assert!(held.iter().all(|request| request.upgrade().is_none()));
        assert!(second.await.unwrap().is_err());
    }

    /// Tells what it is given, to the first who asks.
    struct Teller(Mutex<Option<mpsc::UnboundedReceiver<&'static str>>>);

    impl Service for Teller {
        type Terms = ();

        async fn call(&self, _: Request<Incoming>, _: SocketAddr) -> Answered<()> {
            let pieces = self.0.lock().unwrap().take().unwrap();
            let live = stream::unfold(pieces, |mut pieces| async {
                let piece = pieces.recv().await?;
                Some((Bytes::from(piece), pieces))
            });
            reply::event_stream(Box::pin(live.fuse())).into()
        }

        fn revalidate(&self, (): &(), _: Instant) -> bool {
            false
        }
    }

    /// A client's end of a connection to `service` that brings so many bytes at once.
    fn speaking<S: Service>(service: S, at_once: usize) -> DuplexStream {
        let limits = Limits {
            body_bytes: 0,
            connections: 10,
            header_read_timeout: Duration::from_mins(1),
            request_timeout: Duration::from_mins(1),
        };
        let (client, io) = tokio::io::duplex(at_once);
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        tokio::spawn(Protocol::new(Arc::new(service), &limits).serve(io, peer));
        client
    }

    /// Reads until there is `end`.
    async fn read_to(client: &mut DuplexStream, end: &str) -> String {
        let mut text = Vec::new();
        while !text.ends_with(end.as_bytes()) {
            let read = client.read_buf(&mut text).await.unwrap();
            assert_ne!(read, 0, "{}", String::from_utf8_lossy(&text));
        }
        String::from_utf8(text).unwrap()
    }

    #[tokio::test]
    async fn a_stream_is_told_in_the_framing_of_the_request_until_it_ends() {
        for (version, is_chunked) in [("1.0", false), ("1.1", true)] {
            let (pieces, told) = mpsc::unbounded_channel();
            let mut client = speaking(Teller(Mutex::new(Some(told))), 1 << 16);
            let request = format!("GET / HTTP/{version}\r\nhost: a\r\n\r\nGET /more");
            client.write_all(request.as_bytes()).await.unwrap();
            let head = read_to(&mut client, "\r\n\r\n").await;
            assert!(head.contains("\r\nconnection: close\r\n"), "{head}");
            assert_eq!(head.contains("\r\ntransfer-encoding: chunked\r\n"), is_chunked, "{head}");
            for piece in ["one", "another"] {
                pieces.send(piece).unwrap();
                let length =
                    if is_chunked { format!("{:x}\r\n", piece.len()) } else { String::new() };
                let end = if is_chunked { "\r\n" } else { "" };
                let all = format!("{length}{piece}{end}");
                assert_eq!(read_to(&mut client, &all).await, all);
            }
            drop(pieces);
            let mut rest = String::new();
            client.read_to_string(&mut rest).await.unwrap();
            assert_eq!(rest, if is_chunked { "0\r\n\r\n" } else { "" });
        }
    }

    #[tokio::test]
    async fn a_client_that_leaves_ends_its_stream() {
        let (pieces, told) = mpsc::unbounded_channel();
        let mut client = speaking(Teller(Mutex::new(Some(told))), 1 << 16);
        client.write_all(REQUEST).await.unwrap();
        read_to(&mut client, "\r\n\r\n").await;
        drop(client);
        pieces.closed().await;
    }

    #[tokio::test]
    async fn the_first_bytes_tell_the_protocol_however_few_come_at_once() {
        const FRAME_OF_SETTINGS: u8 = 4;
        for at_once in [1, 30, 1 << 16] {
            let mut client = speaking(Slow(Duration::ZERO), at_once);
            let head = format!("POST /{} HTTP/1.1\r\nhost: a\r\n\r\n", "x".repeat(3000));
            client.write_all(head.as_bytes()).await.unwrap();
            let answer = read_to(&mut client, "}").await;
            assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");

            let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
            let client = speaking(Slow(Duration::ZERO), at_once);
            let (mut from, mut to) = tokio::io::split(client);
            let mut frame = [0; 9];
            // The server does not read on before its own settings are taken.
            tokio::spawn(async move { to.write_all(preface).await });
            from.read_exact(&mut frame).await.unwrap();
            assert_eq!(frame[3], FRAME_OF_SETTINGS, "{frame:?}");

            let mut client = speaking(Slow(Duration::ZERO), at_once);
            client.write_all(b"PRI * HTTP/1.1\r\n\r\n").await.unwrap();
            let answer = read_to(&mut client, "}").await;
            assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
        }
    }
}
