//! Accepts connections and speaks HTTP/1.1 and HTTP/2 on them until it is told to stop.
//!
//! A connection takes a place (`slots`); who is at the other end and what is spoken is found out (`server`);
//! then hyper serves it, through its public interfaces alone. Around that stands one policy (`lifetime`) that says
//! when a connection has lasted long enough; it judges by what is counted where bytes and requests pass (`watched`,
//! `activity`). The listener and the signs to leave are arguments, so that a test starts the real thing on
//! port 0. What a request means, and how long answering it may take, is the [`Service`]'s business.

mod activity;
mod answer_body;
mod config;
mod connection;
mod drain;
mod info;
mod lifetime;
mod limits;
mod protocol;
mod proxy_protocol;
mod requests;
mod server;
mod service;
mod slots;
mod tasks;
#[cfg(test)]
mod tests;
mod watched;

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
    drain::Drain,
    info::ConnectionInfo,
    limits::Limits,
    server::Server,
    service::{Answer, Service},
};
use crate::telemetry::{Sparing, report};

const ACCEPT_FAILURES: &str = "parapet_accept_failures_total";

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
    let _rest = AbortOnDrop(server.tasks.clone());
    describe_counter!(ACCEPT_FAILURES, "Connections that could not be accepted");
    let failures = counter!(ACCEPT_FAILURES);
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
            slot = server.slots.take(server.address_of(peer)) => slot,
        };
        match slot {
            Ok(slot) => server.tasks.spawn(Arc::clone(&server).identify(slot, stream, peer)),
            Err(_) => server.refused.increment(1),
        }
    }
    for (stream, peer) in waiting(listener) {
        if let Some(Ok(slot)) = server.slots.take(server.address_of(peer)).now_or_never() {
            server.tasks.spawn(Arc::clone(&server).identify(slot, stream, peer));
        }
    }
    if timeout(grace, server.tasks.finish()).await.is_err() {
        warn!(?grace, "Requests under way did not finish in time");
    }
    server.tasks.abort().await;
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
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(limits::STALL_TIMEOUT))?;
    Ok(())
}
