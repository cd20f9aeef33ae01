//! The HTTP server: accepts connections and serves HTTP/1.1 and HTTP/2 on them until shutdown.
//!
//! Each connection acquires a permit (`connection_limiter`). `http_server` then reads the PROXY protocol
//! header, performs the TLS handshake and detects the HTTP version, and hyper serves the requests
//! through its public interfaces. One policy (`close_policy`) decides when a connection closes. It
//! reads counters (`connection_activity`) that are updated where bytes and requests pass (`tracked_io`). The
//! listening socket and the shutdown signals ([`Drain`]) are arguments, so that a test starts the real
//! server on port 0.
//!
//! The server knows no routes, no flags and no format of errors: the [`HttpService`] handles requests and
//! limits their duration.

mod close_policy;
mod config;
mod connection;
mod connection_activity;
mod connection_info;
mod connection_limiter;
mod connection_limits;
mod drain;
mod http_server;
mod http_version;
mod proxy_protocol;
mod request_handler;
mod response_body;
mod service;
mod tasks;
#[cfg(test)]
mod tests;
mod tracked_body;
mod tracked_io;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use metrics::{counter, describe_counter};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tracing::warn;

use self::tasks::AbortOnDrop;
pub use self::{
    config::Config,
    connection_info::ConnectionInfo,
    connection_limits::ConnectionLimits,
    drain::Drain,
    http_server::HttpServer,
    response_body::{ByteStream, HttpResponse, ResponseBody},
    service::{HttpService, ServiceResponse},
};
use crate::telemetry::{LogLimiter, error_chain};

const ACCEPT_FAILURES: &str = "parapet_accept_failures_total";

/// The delay before accepting again after a failure. The usual cause is a lack of file descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Serves until `drain` is closing, then waits up to `grace` for requests in flight. Requests that do
/// not finish in time are dropped before this returns.
pub async fn serve<S: HttpService>(
    listener: TcpListener,
    service: Arc<S>,
    config: Config,
    drain: Drain,
    grace: Duration,
) {
    let server = HttpServer::new(service, config, drain.clone());
    let _rest = AbortOnDrop(server.tasks.clone());
    describe_counter!(ACCEPT_FAILURES, "Connections that could not be accepted");
    let failures = counter!(ACCEPT_FAILURES);
    let mut log_limiter = LogLimiter::default();
    let mut closing = std::pin::pin!(drain.closing.subscribe());
    loop {
        let accepted = tokio::select! {
            () = &mut closing => break,
            accepted = accept(&listener) => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                failures.increment(1);
                if let Some(left_out) = log_limiter.admit() {
                    let more = (left_out > 0).then_some(left_out);
                    warn!(
                        error = error_chain(&error),
                        more_since_last_line = more,
                        "Cannot accept a connection"
                    );
                }
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                continue;
            }
        };
        // An accepted connection is served if there is room, also when the listener closes meanwhile.
        let permit = tokio::select! {
            biased;
            permit = server.limiter.acquire(server.client_address(peer)) => permit,
            () = &mut closing => break,
        };
        match permit {
            Ok(permit) => {
                server.tasks.spawn(Arc::clone(&server).handle_connection(permit, stream, peer));
            }
            Err(_) => server.refused_connections.increment(1),
        }
    }
    for (stream, peer) in drain_backlog(listener) {
        if let Some(Ok(permit)) = server.limiter.acquire(server.client_address(peer)).now_or_never()
        {
            server.tasks.spawn(Arc::clone(&server).handle_connection(permit, stream, peer));
        }
    }
    if timeout(grace, server.tasks.join_all()).await.is_err() {
        warn!(?grace, "Requests in flight did not finish in time and were dropped");
    }
    server.tasks.abort_all().await;
}

async fn accept(listener: &TcpListener) -> std::io::Result<(TcpStream, SocketAddr)> {
    let (stream, peer) = listener.accept().await?;
    configure_socket(&stream)?;
    Ok((stream, peer))
}

/// The connections in the backlog of a listener that closes. The kernel would reset them, but their
/// clients may have sent requests already.
fn drain_backlog(listener: TcpListener) -> impl Iterator<Item = (TcpStream, SocketAddr)> {
    let listener = listener.into_std();
    std::iter::from_fn(move || {
        let (stream, peer) = listener.as_ref().ok()?.accept().ok()?;
        stream.set_nonblocking(true).ok()?;
        let stream = TcpStream::from_std(stream).ok()?;
        configure_socket(&stream).ok()?;
        Some((stream, peer))
    })
}

fn configure_socket(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    // On other systems a client that reads nothing keeps its connection until the kernel times it out.
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(connection_limits::STALL_TIMEOUT))?;
    Ok(())
}
