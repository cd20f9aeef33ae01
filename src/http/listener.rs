//! Accepts connections and speaks HTTP/1.1 and HTTP/2 on them until it is told to stop.
//!
//! A connection takes a place ([`Slots`]), says what it speaks (`protocol`), and is served by hyper, which
//! is left alone in that: around it stands one policy (`lifetime`) that says when a connection has lasted
//! long enough, and what it judges by is counted where bytes and requests pass (`watched`, `activity`). The
//! listener and the signs to leave are arguments, so that a test starts the real thing on port 0. What a
//! request means, and how long answering it may take, is the [`Service`]'s business.

mod activity;
mod answer_body;
mod connection;
mod drain;
mod info;
mod lifetime;
mod limits;
mod protocol;
mod proxy_protocol;
mod service;
mod slots;
mod tasks;
#[cfg(test)]
mod tests;
mod watched;

use std::{
    convert::Infallible,
    future::{Future, ready},
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt as _, future::Either};
use hyper::{
    Request,
    body::Incoming,
    header::{CONNECTION, HeaderValue},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use ipnet::IpNet;
use metrics::{counter, describe_counter};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};
use tracing::{debug, error, warn};

use self::{
    activity::Activity,
    answer_body::AnswerBody,
    connection::{Farewell, attend},
    lifetime::Lifetime,
    protocol::Protocol,
    slots::{Slot, Slots},
    tasks::Tasks,
    watched::Watched,
};
pub use self::{
    drain::Drain,
    info::ConnectionInfo,
    limits::Limits,
    service::{Answer, Service},
};
use super::reply::{Failure, Outgoing, Reply};
use crate::{
    telemetry::{Sparing, report},
    tls::{self, Alpn},
};

/// How a listener takes connections.
#[derive(Clone, Debug)]
pub struct Config {
    /// What connections may take.
    pub limits: Limits,
    /// The load balancers that begin connections with the PROXY protocol.
    pub balancers: Vec<IpNet>,
    /// What encrypts connections.
    pub tls: Option<tls::Server>,
}

const ACCEPT_FAILURES: &str = "parapet_accept_failures_total";
const REFUSED: &str = "parapet_connections_refused_total";

/// How long accepting pauses after it failed, for want of file descriptors mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `drain` says to close, then lets requests under way finish, at most for `grace`; those that
/// do not are dropped before this returns.
pub async fn serve<S: Service>(
    listener: TcpListener,
    service: Arc<S>,
    config: Config,
    drain: Drain,
    grace: Duration,
) {
    let server = Server::new(service, config, drain.clone());
    describe_counter!(ACCEPT_FAILURES, "Connections that could not be accepted");
    describe_counter!(REFUSED, "Connections that were closed because their address has too many");
    let (failures, refused) = (counter!(ACCEPT_FAILURES), counter!(REFUSED));
    let mut sparing = Sparing::default();
    let mut closing = std::pin::pin!(drain.closing.wake());
    loop {
        let accepted = tokio::select! {
            () = &mut closing => break,
            accepted = accept(&listener) => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
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
                continue;
            }
        };
        let slot = tokio::select! {
            () = &mut closing => break,
            slot = server.slots.take(peer.ip().to_canonical()) => slot,
        };
        match slot {
            Ok(slot) => server.tasks.spawn(Arc::clone(&server).enter(slot, stream, peer)),
            Err(_) => refused.increment(1),
        }
    }
    for (stream, peer) in waiting(listener) {
        if let Some(Ok(slot)) = server.slots.take(peer.ip().to_canonical()).now_or_never() {
            server.tasks.spawn(Arc::clone(&server).enter(slot, stream, peer));
        }
    }
    if timeout(grace, server.tasks.finish()).await.is_err() {
        warn!(?grace, "Requests under way did not finish in time");
    }
    server.tasks.abort().await;
}

/// Speaks HTTP/1.1 and HTTP/2 on connections, for one service.
#[derive(Debug)]
pub struct Server<S> {
    service: Arc<S>,
    config: Config,
    drain: Drain,
    slots: Arc<Slots>,
    http1: http1::Builder,
    http2: http2::Builder<Tasks>,
    tasks: Tasks,
}

impl<S: Service> Server<S> {
    /// Speaks for `service`.
    pub fn new(service: Arc<S>, config: Config, drain: Drain) -> Arc<Self> {
        let limits = &config.limits;
        let tasks = Tasks::default();
        let mut http2 = http2::Builder::new(tasks.clone());
        http2
            .timer(TokioTimer::new())
            .keep_alive_interval(limits::PING_EVERY)
            .keep_alive_timeout(limits::PING_EVERY)
            .max_concurrent_streams(limits::STREAMS)
            .max_send_buf_size(limits::SEND_BUFFER);
        let slots = Slots::new(limits.connections, limits.connections_per_address);
        let http1 = http1::Builder::new();
        Arc::new(Self { service, config, drain, slots, http1, http2, tasks })
    }

    /// Serves one connection to its end, once there is a place for it. Dropping the future closes it.
    pub async fn serve<I>(self: Arc<Self>, io: I, peer: SocketAddr)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        if let Ok(slot) = self.slots.take(peer.ip().to_canonical()).await {
            self.enter(slot, io, peer).await;
        }
    }

    /// Finds out who and what is at the other end, as far as that precedes HTTP.
    async fn enter<I>(self: Arc<Self>, slot: Slot, mut io: I, mut peer: SocketAddr)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let address = peer.ip().to_canonical();
        if self.config.balancers.iter().any(|network| network.contains(&address)) {
            let header = Box::pin(timeout(
                self.config.limits.header_read_timeout,
                proxy_protocol::read(&mut io),
            ));
            match connection::unless_ended(header, slot.activity(), &self.drain).await {
                Some(Ok(Ok(client))) => peer = client.unwrap_or(peer),
                Some(Ok(Err(error))) => {
                    debug!(error = report(&error), "A load balancer's connection is refused");
                    return;
                }
                Some(Err(_)) | None => return,
            }
        }
        let Some(tls) = self.config.tls.clone() else {
            return self.speak(slot, io, ConnectionInfo { peer, tls: None }, None).await;
        };
        // In boxes, so that connections without TLS take no room for it, nor those with it for the handshake.
        let handshake = Box::pin(tls.handshake(io));
        match connection::unless_ended(handshake, slot.activity(), &self.drain).await {
            Some(Ok((io, agreed))) => {
                let protocol = agreed.alpn.map(|alpn| match alpn {
                    Alpn::H2 => Protocol::Http2,
                    Alpn::Http1 => Protocol::Http1,
                });
                let info = ConnectionInfo { peer, tls: Some(agreed) };
                Box::pin(self.speak(slot, io, info, protocol)).await;
            }
            Some(Err(error)) => debug!(error = report(&error), "A TLS handshake failed"),
            None => {}
        }
    }

    /// Speaks what was agreed on, or what the client begins with.
    async fn speak<I>(
        self: Arc<Self>,
        slot: Slot,
        mut io: I,
        info: ConnectionInfo,
        agreed: Option<Protocol>,
    ) where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let activity = Arc::clone(slot.activity());
        let limits = &self.config.limits;
        let lifetime = Lifetime::new(limits, rand::random(), Instant::now());
        let mut begun = Vec::new();
        let protocol = if let Some(protocol) = agreed {
            protocol
        } else {
            let opened = connection::open(&mut io, &mut begun, &activity, limits, &self.drain);
            let Some(protocol) = opened.await else { return };
            protocol
        };
        let io = TokioIo::new(Watched::new(io, begun.into(), Arc::clone(&activity), protocol));
        let drain = self.drain.clone();
        let asked = Asked {
            service: Arc::clone(&self.service),
            info: Arc::new(info),
            activity: Arc::clone(&activity),
            drain: drain.clone(),
        };
        match protocol {
            Protocol::Http1 => {
                let answer = service_fn(move |request| asked.by_http1(request));
                let connection = self.http1.serve_connection(io, answer);
                drop(self);
                attend(connection, activity, lifetime, drain, Farewell::WithAnswer).await;
            }
            Protocol::Http2 => {
                let asked = Arc::new(asked);
                let answer = service_fn(move |request| Arc::clone(&asked).by_http2(request));
                let connection = self.http2.serve_connection(io, answer);
                let attended = attend(connection, activity, lifetime, drain, Farewell::AtOnce);
                // Connections are of the other kind, nearly all, and are to take no room for this one.
                Box::pin(attended).await;
            }
        }
        drop(slot);
    }
}

/// Has the requests of one connection answered.
struct Asked<S> {
    service: Arc<S>,
    info: Arc<ConnectionInfo>,
    activity: Arc<Activity>,
    drain: Drain,
}

/// What hyper sends.
type Sent = Result<hyper::Response<AnswerBody>, Infallible>;

impl<S: Service> Asked<S> {
    fn by_http1(&self, request: Request<Incoming>) -> impl Future<Output = Sent> + Send + use<S> {
        self.activity.note_request();
        match self.answer(request) {
            Answer::Ready(reply) => {
                let is_last = self.drain.has_begun() || self.activity.is_last();
                let open = matches!(reply.body(), Outgoing::Live(_)).then(|| self.activity.open());
                Either::Left(ready(Ok(AnswerBody::whole(with_farewell(reply, is_last), open))))
            }
            Answer::Later(reply) => {
                let open = self.activity.open();
                let (activity, drain) = (Arc::clone(&self.activity), self.drain.clone());
                let reply = AssertUnwindSafe(reply).catch_unwind();
                Either::Right(Box::pin(async move {
                    let reply = reply.await.unwrap_or_else(|_| panicked());
                    let is_last = drain.has_begun() || activity.is_last();
                    let open = matches!(reply.body(), Outgoing::Live(_)).then_some(open);
                    Ok(AnswerBody::whole(with_farewell(reply, is_last), open))
                }))
            }
        }
    }

    /// Runs as a task of its own.
    async fn by_http2(self: Arc<Self>, request: Request<Incoming>) -> Sent {
        let open = self.activity.open();
        self.activity.note_request();
        self.activity.room(limits::WAITING_BYTES).await;
        let reply = match self.answer(request) {
            Answer::Ready(reply) => reply,
            Answer::Later(reply) => {
                AssertUnwindSafe(reply).catch_unwind().await.unwrap_or_else(|_| panicked())
            }
        };
        Ok(AnswerBody::in_pieces(reply, open))
    }

    /// Answers, with a 500 where answering panics: one request's fault must not take its connection's
    /// other requests along.
    fn answer(&self, request: Request<Incoming>) -> Answer {
        catch_unwind(AssertUnwindSafe(|| self.service.call(request, &self.info)))
            .unwrap_or_else(|_| Answer::Ready(panicked()))
    }
}

fn panicked() -> Reply {
    error!("Answering a request panicked");
    Reply::from(Failure::Internal)
}

/// The answer, which tells its client where it is the last on its connection (RFC 9112, section 9.6).
fn with_farewell(mut reply: Reply, is_last: bool) -> Reply {
    if is_last {
        reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    reply
}

async fn accept(listener: &TcpListener) -> std::io::Result<(TcpStream, SocketAddr)> {
    let (stream, peer) = listener.accept().await?;
    prepare(&stream)?;
    Ok((stream, peer))
}

/// The connections that the system has made for a listener that ends, and that it would reset: their clients
/// may have sent requests on them.
fn waiting(listener: TcpListener) -> impl Iterator<Item = (TcpStream, SocketAddr)> {
    let listener = listener.into_std();
    std::iter::from_fn(move || {
        let (stream, peer) = listener.as_ref().ok()?.accept().ok()?;
        stream.set_nonblocking(true).ok()?;
        let stream = TcpStream::from_std(stream).ok()?;
        prepare(&stream).ok()?;
        Some((stream, peer))
    })
}

fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    // Elsewhere a client that reads nothing keeps its connection until the system gives it up.
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(limits::STALLED_AFTER))?;
    Ok(())
}
