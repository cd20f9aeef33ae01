//! Accepts connections and speaks HTTP/1.1 and HTTP/2 on them until it is told to stop.
//!
//! The listener and the signal to stop are arguments, so that a test starts the real thing on port
//! 0. What a request means is the [`Service`]'s business.

use std::{
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use hyper::{Request, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto::Builder, graceful::GracefulShutdown},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::reply::{Failure, Reply};

/// What answers requests.
pub trait Service: Send + Sync + 'static {
    /// Answers one request of a peer.
    fn call(
        &self,
        request: Request<Incoming>,
        peer: SocketAddr,
    ) -> impl Future<Output = Reply> + Send;
}

/// What one client, and all of them together, may take.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Limits {
    /// The largest request body, in bytes, after decompression.
    pub body_bytes: usize,
    /// How many connections may be open at once.
    pub connections: usize,
    /// The longest that a client may take to send a request's head.
    pub header_read_timeout: Duration,
    /// The longest that answering one request may take, streams excepted.
    pub request_timeout: Duration,
}

/// How long accepting pauses after it failed, for want of file descriptors mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How often HTTP/2 connections are probed, so that dead ones do not stay.
const PING_EVERY: Duration = Duration::from_secs(20);

/// Serves until `stop`, then lets requests under way finish, at most for `grace`.
pub async fn serve<S: Service>(
    listener: TcpListener,
    service: Arc<S>,
    limits: &Limits,
    stop: CancellationToken,
    grace: Duration,
) {
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(limits.connections));
    let mut protocol = Builder::new(TokioExecutor::new());
    protocol.http1().timer(TokioTimer::new()).header_read_timeout(limits.header_read_timeout);
    protocol.http2().timer(TokioTimer::new()).keep_alive_interval(PING_EVERY);
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &room) => accepted,
        };
        let (stream, peer, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "Cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = Arc::clone(&service);
        let begun = Arc::new(AtomicBool::new(false));
        let has_begun = Arc::clone(&begun);
        let answer = service_fn(move |request| {
            begun.store(true, Ordering::Relaxed);
            let service = Arc::clone(&service);
            async move { Ok::<_, Infallible>(guarded(&*service, request, peer).await) }
        });
        let connection = protocol.serve_connection(TokioIo::new(stream), answer).into_owned();
        let connection = graceful.watch(connection);
        let first_head = limits.header_read_timeout;
        tokio::spawn(async move {
            let mut connection = std::pin::pin!(connection);
            // Hyper's own timer starts when the protocol is known, which a silent client prevents.
            let ended = match tokio::time::timeout(first_head, &mut connection).await {
                Ok(ended) => ended,
                Err(_) if has_begun.load(Ordering::Relaxed) => connection.await,
                Err(_) => Ok(()),
            };
            if let Err(error) = ended {
                debug!(error, "A connection ended early");
            }
            drop(permit);
        });
    }
    drop(listener);
    if tokio::time::timeout(grace, graceful.shutdown()).await.is_err() {
        warn!(?grace, "Requests under way did not finish in time");
    }
}

async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let permit = Arc::clone(room).acquire_owned().await.expect("the semaphore is never closed");
    let (stream, peer) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, peer, permit))
}

/// Answers, with a 500 where answering panics: one request's fault must not take its connection's
/// other requests along.
async fn guarded<S: Service>(service: &S, request: Request<Incoming>, peer: SocketAddr) -> Reply {
    AssertUnwindSafe(service.call(request, peer)).catch_unwind().await.unwrap_or_else(|_| {
        error!("Answering a request panicked");
        Failure::Internal.into()
    })
}
