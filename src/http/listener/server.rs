//! Serves connections: finds out who is at the other end and what is spoken, and lets hyper speak it.
//!
//! What a request means is the business of the [`Service`], and when a connection ends that of `lifetime`.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hyper::{
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics::{Counter, counter, describe_counter};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout},
};
use tracing::debug;

use super::{
    config::Config,
    connection::{self, Farewell, drive},
    drain::Drain,
    info::ConnectionInfo,
    lifetime::Lifetime,
    limits,
    protocol::Protocol,
    proxy_protocol,
    requests::RequestHandler,
    service::Service,
    slots::{Slot, Slots},
    tasks::Tasks,
    watched::Watched,
};
use crate::{telemetry::report, tls::Alpn};

const REFUSED: &str = "parapet_connections_refused_total";

/// Speaks HTTP/1.1 and HTTP/2 on connections, for one service.
#[derive(Debug)]
pub struct Server<S> {
    service: Arc<S>,
    config: Config,
    drain: Drain,
    pub(super) slots: Arc<Slots>,
    http1: http1::Builder,
    http2: http2::Builder<Tasks>,
    pub(super) tasks: Tasks,
    pub(super) refused: Counter,
}

impl<S: Service> Server<S> {
    /// Speaks for `service`.
    pub fn new(service: Arc<S>, config: Config, drain: Drain) -> Arc<Self> {
        let limits = &config.limits;
        let tasks = Tasks::default();
        let mut http2 = http2::Builder::new(tasks.clone());
        http2
            .timer(TokioTimer::new())
            .keep_alive_interval(limits::PING_INTERVAL)
            .keep_alive_timeout(limits::PING_INTERVAL)
            .max_concurrent_streams(limits::MAX_CONCURRENT_STREAMS)
            .max_send_buf_size(limits::SEND_BUFFER);
        let slots = Slots::new(limits.connections, limits.connections_per_address);
        let mut http1 = http1::Builder::new();
        http1.max_header_size(limits::HEAD_BYTES);
        describe_counter!(
            REFUSED,
            "Connections that were closed because their address has too many"
        );
        let refused = counter!(REFUSED);
        Arc::new(Self { service, config, drain, slots, http1, http2, tasks, refused })
    }

    /// Serves one connection to its end, once there is a place for it. Dropping the future closes it.
    pub async fn serve<I>(self: Arc<Self>, io: I, peer: SocketAddr)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        if let Ok(slot) = self.slots.take(self.address_of(peer)).await {
            self.identify(slot, io, peer).await;
        }
    }

    /// The address of the client whose connection this is, unless a load balancer is about to say it.
    pub(super) fn address_of(&self, peer: SocketAddr) -> Option<IpAddr> {
        let address = peer.ip().to_canonical();
        let is_balancer = self.config.balancers.iter().any(|network| network.contains(&address));
        (!is_balancer).then_some(address)
    }

    /// Finds out who and what is at the other end, as far as that precedes HTTP.
    pub(super) async fn identify<I>(self: Arc<Self>, slot: Slot, mut io: I, mut peer: SocketAddr)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        if self.address_of(peer).is_none() {
            let header = Box::pin(timeout(
                self.config.limits.header_read_timeout,
                proxy_protocol::read(&mut io),
            ));
            match connection::until_shutdown(header, slot.activity(), &self.drain).await {
                Some(Ok(Ok(Some(client)))) => {
                    peer = client;
                    if slot.name(peer.ip().to_canonical()).is_err() {
                        self.refused.increment(1);
                        return;
                    }
                }
                Some(Ok(Ok(None))) => {}
                Some(Ok(Err(error))) => {
                    debug!(error = report(&error), "A load balancer's connection is refused");
                    return;
                }
                Some(Err(_)) | None => return,
            }
        }
        let Some(tls) = self.config.tls.clone() else {
            return self.serve_http(slot, io, ConnectionInfo { peer, tls: None }, None).await;
        };
        // In boxes, so that connections without TLS take no room for it, nor those with it for the handshake.
        let handshake = Box::pin(tls.handshake(io));
        match connection::until_shutdown(handshake, slot.activity(), &self.drain).await {
            Some(Ok((io, agreed))) => {
                let protocol = agreed.alpn.map(|alpn| match alpn {
                    Alpn::H2 => Protocol::Http2,
                    Alpn::Http1 => Protocol::Http1,
                });
                let info = ConnectionInfo { peer, tls: Some(agreed) };
                Box::pin(self.serve_http(slot, io, info, protocol)).await;
            }
            Some(Err(error)) => debug!(error = report(&error), "A TLS handshake failed"),
            None => {}
        }
    }

    /// Speaks what was agreed on, or what the client begins with.
    async fn serve_http<I>(
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
            let opened =
                connection::detect_protocol(&mut io, &mut begun, &activity, limits, &self.drain);
            let Some(protocol) = opened.await else { return };
            protocol
        };
        let io = TokioIo::new(Watched::new(io, begun.into(), Arc::clone(&activity), protocol));
        let drain = self.drain.clone();
        let handler = RequestHandler {
            service: Arc::clone(&self.service),
            info: Arc::new(info),
            activity: Arc::clone(&activity),
            drain: drain.clone(),
        };
        match protocol {
            Protocol::Http1 => {
                let answer = service_fn(move |request| handler.handle_http1(request));
                let connection = self.http1.serve_connection(io, answer);
                drop(self);
                drive(connection, activity, lifetime, drain, Farewell::NextAnswer).await;
            }
            Protocol::Http2 => {
                let handler = Arc::new(handler);
                let answer = service_fn(move |request| Arc::clone(&handler).handle_http2(request));
                let connection = self.http2.serve_connection(io, answer);
                let driven = drive(connection, activity, lifetime, drain, Farewell::AtOnce);
                // Connections are of the other kind, nearly all, and are to take no room for this one.
                Box::pin(driven).await;
            }
        }
        drop(slot);
    }
}
