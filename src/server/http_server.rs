//! Sets up each connection (PROXY protocol, TLS, HTTP version) and serves HTTP on it through hyper.
//!
//! The [`HttpService`] handles the requests, and `close_policy` decides when a connection closes.

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
    close_policy::ConnectionPolicy,
    config::Config,
    connection::{self, CloseAnnouncement, serve_until_closed},
    connection_info::ConnectionInfo,
    connection_limiter::{ConnectionLimiter, ConnectionPermit},
    connection_limits,
    drain::Drain,
    http_version::HttpVersion,
    proxy_protocol,
    request_handler::RequestHandler,
    service::HttpService,
    tasks::ServerTasks,
    tracked_io::TrackedIo,
};
use crate::{telemetry::error_chain, tls::Alpn};

const REFUSED_CONNECTIONS: &str = "parapet_connections_refused_total";

/// Serves one service over HTTP/1.1 and HTTP/2.
#[derive(Debug)]
pub struct HttpServer<S> {
    service: Arc<S>,
    config: Config,
    drain: Drain,
    pub(super) limiter: Arc<ConnectionLimiter>,
    http1: http1::Builder,
    http2: http2::Builder<ServerTasks>,
    pub(super) tasks: ServerTasks,
    pub(super) refused_connections: Counter,
}

impl<S: HttpService> HttpServer<S> {
    /// Creates a server for `service`.
    pub fn new(service: Arc<S>, config: Config, drain: Drain) -> Arc<Self> {
        let limits = &config.limits;
        let tasks = ServerTasks::default();
        let mut http2 = http2::Builder::new(tasks.clone());
        http2
            .timer(TokioTimer::new())
            .keep_alive_interval(connection_limits::PING_INTERVAL)
            .keep_alive_timeout(connection_limits::PING_INTERVAL)
            .max_concurrent_streams(connection_limits::MAX_CONCURRENT_STREAMS)
            .max_send_buf_size(connection_limits::SEND_BUFFER_BYTES);
        let limiter =
            ConnectionLimiter::new(limits.max_connections, limits.max_connections_per_address);
        let mut http1 = http1::Builder::new();
        http1.max_header_size(connection_limits::MAX_HEAD_BYTES);
        describe_counter!(
            REFUSED_CONNECTIONS,
            "Connections that were closed because their address has too many"
        );
        let refused_connections = counter!(REFUSED_CONNECTIONS);
        Arc::new(Self { service, config, drain, limiter, http1, http2, tasks, refused_connections })
    }

    /// Acquires a permit and serves one connection until it closes. Dropping the future closes it.
    pub async fn serve<I>(self: Arc<Self>, io: I, peer: SocketAddr)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        if let Ok(permit) = self.limiter.acquire(self.client_address(peer)).await {
            self.handle_connection(permit, io, peer).await;
        }
    }

    /// The address of the client; `None` for a load balancer, which sends it in a PROXY protocol header.
    pub(super) fn client_address(&self, peer: SocketAddr) -> Option<IpAddr> {
        let address = peer.ip().to_canonical();
        let is_balancer =
            self.config.load_balancers.iter().any(|network| network.contains(&address));
        (!is_balancer).then_some(address)
    }

    /// Reads the PROXY protocol header, performs the TLS handshake and serves HTTP.
    pub(super) async fn handle_connection<I>(
        self: Arc<Self>,
        permit: ConnectionPermit,
        mut io: I,
        mut peer: SocketAddr,
    ) where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        if self.client_address(peer).is_none() {
            let header = Box::pin(timeout(
                self.config.limits.header_read_timeout,
                proxy_protocol::read_header(&mut io),
            ));
            match connection::until_shutdown(header, permit.activity(), &self.drain).await {
                Some(Ok(Ok(Some(client)))) => {
                    peer = client;
                    if permit.set_address(peer.ip().to_canonical()).is_err() {
                        self.refused_connections.increment(1);
                        return;
                    }
                }
                Some(Ok(Ok(None))) => {}
                Some(Ok(Err(error))) => {
                    debug!(error = error_chain(&error), "Closed a load balancer's connection");
                    return;
                }
                Some(Err(_)) | None => return,
            }
        }
        let Some(tls) = self.config.tls.clone() else {
            return self.serve_http(permit, io, ConnectionInfo { peer, tls: None }, None).await;
        };
        // Boxed, so that a plain connection reserves no memory for TLS, and a TLS connection none for
        // its handshake once that is done.
        let handshake = Box::pin(tls.handshake(io));
        match connection::until_shutdown(handshake, permit.activity(), &self.drain).await {
            Some(Ok((io, agreed))) => {
                let protocol = agreed.alpn.map(|alpn| match alpn {
                    Alpn::H2 => HttpVersion::Http2,
                    Alpn::Http1 => HttpVersion::Http1,
                });
                let info = ConnectionInfo { peer, tls: Some(agreed) };
                Box::pin(self.serve_http(permit, io, info, protocol)).await;
            }
            Some(Err(error)) => debug!(error = error_chain(&error), "A TLS handshake failed"),
            None => {}
        }
    }

    /// Serves HTTP in the version that ALPN selected, or that the client's first bytes indicate.
    async fn serve_http<I>(
        self: Arc<Self>,
        permit: ConnectionPermit,
        mut io: I,
        info: ConnectionInfo,
        agreed: Option<HttpVersion>,
    ) where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let activity = Arc::clone(permit.activity());
        let limits = &self.config.limits;
        let lifetime = ConnectionPolicy::new(limits, rand::random(), Instant::now());
        let mut prefix = Vec::new();
        let protocol = if let Some(protocol) = agreed {
            protocol
        } else {
            let opened = connection::detect_http_version(
                &mut io,
                &mut prefix,
                &activity,
                limits,
                &self.drain,
            );
            let Some(protocol) = opened.await else { return };
            protocol
        };
        let io = TokioIo::new(TrackedIo::new(io, prefix.into(), Arc::clone(&activity), protocol));
        let drain = self.drain.clone();
        let handler = RequestHandler {
            service: Arc::clone(&self.service),
            info: Arc::new(info),
            activity: Arc::clone(&activity),
            drain: drain.clone(),
        };
        match protocol {
            HttpVersion::Http1 => {
                let service = service_fn(move |request| handler.handle_http1(request));
                let connection = self.http1.serve_connection(io, service);
                drop(self);
                serve_until_closed(
                    connection,
                    activity,
                    lifetime,
                    drain,
                    CloseAnnouncement::ConnectionCloseHeader,
                )
                .await;
            }
            HttpVersion::Http2 => {
                let handler = Arc::new(handler);
                let service = service_fn(move |request| Arc::clone(&handler).handle_http2(request));
                let connection = self.http2.serve_connection(io, service);
                let driven = serve_until_closed(
                    connection,
                    activity,
                    lifetime,
                    drain,
                    CloseAnnouncement::GoAway,
                );
                // Boxed, so that HTTP/1 connections, which are most, reserve no memory for this kind.
                Box::pin(driven).await;
            }
        }
        drop(permit);
    }
}
