//! The server's side of TLS on one listener.

use std::{
    fmt,
    future::{Future as _, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use rustls::{
    ServerConfig,
    crypto::ring::Ticketer,
    server::{Acceptor, ProducesTickets},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};

use super::{
    certificate::Certificate,
    config::Config,
    handshake::{self, HandshakeError, Tls},
    load::{Files, Loaded},
    problem::Problems,
};

/// How much a connection holds back, in bytes, of what is written to it before the client takes it, and of the
/// same encrypted: two records of the largest size.
const BUFFER: usize = 32 << 10;

/// The server's side of TLS on one listener. A cheap handle.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

struct Inner {
    config: Config,
    /// What seals session tickets. It outlives a reload, so that sessions are resumed beyond it.
    tickets: Option<Arc<dyn ProducesTickets>>,
    loaded: ArcSwap<Loaded>,
    places: Semaphore,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Server").field(&self.0.config).finish()
    }
}

impl Server {
    /// Loads and checks all files of `config`; blocks for as long as the file system does.
    ///
    /// A certificate that has expired is no error; [`Server::warnings`] mentions it.
    ///
    /// Sessions are resumed by tickets, whose keys change every six hours. Where client certificates
    /// are verified nothing is resumed: a resumed session would not be verified again, and could outlive
    /// a revocation.
    pub fn new(config: Config) -> Result<Self, Problems> {
        let tickets = match &config.clients {
            None => Some(Ticketer::new().expect("the system has random bytes")),
            Some(_) => None,
        };
        let loaded = Files::read(&config).load(&config, tickets.as_ref())?;
        let places = Semaphore::new(config.max_handshakes.min(Semaphore::MAX_PERMITS));
        let loaded = ArcSwap::from_pointee(loaded);
        Ok(Self(Arc::new(Inner { config, tickets, loaded, places })))
    }

    /// The name of the listener.
    pub fn listener(&self) -> &'static str {
        self.0.config.listener
    }

    /// The certificates in use, in the order of the configuration.
    pub fn certificates(&self) -> Vec<Certificate> {
        self.0.loaded.load().certificates.clone()
    }

    /// What an operator has to know of the validity of what is in use: one sentence each.
    pub fn warnings(&self, now: Timestamp) -> Vec<String> {
        self.0.loaded.load().warnings(now)
    }

    /// Performs the handshake on a connection that was accepted.
    ///
    /// A place is taken for as long as the client's first message is processed, which is most of the work,
    /// and never while a client is waited for: however many stall, they delay nobody. When the future is
    /// dropped, the connection is closed.
    pub async fn handshake<I>(&self, io: I) -> Result<(TlsStream<I>, Tls), HandshakeError>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let Inner { config, places, .. } = &*self.0;
        let handshake = async {
            let hello = LazyConfigAcceptor::new(Acceptor::default(), io).await?;
            let place = places.acquire().await.expect("the semaphore is never closed");
            // Loaded this late, so that one that had to wait gets the latest certificate.
            let tls = self.handshake_config();
            let mut accept =
                pin!(hello.into_stream_with(tls, |it| it.set_buffer_limit(Some(BUFFER))));
            let processed = poll_fn(|cx| Poll::Ready(accept.as_mut().poll(cx))).await;
            drop(place);
            match processed {
                Poll::Ready(accepted) => accepted,
                Poll::Pending => accept.await,
            }
        };
        let outcome = match timeout(config.handshake_timeout, handshake).await {
            Ok(Ok(stream)) => {
                let tls = Tls::of(stream.get_ref().1);
                Ok((stream, tls))
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(HandshakeError::TimedOut(config.handshake_timeout)),
        };
        let counted = outcome.as_ref().map(|(stream, tls)| (stream.get_ref().1, tls));
        handshake::count(config.listener, counted);
        outcome
    }

    /// What the next handshake uses.
    pub(super) fn handshake_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.0.loaded.load().tls)
    }

    pub(super) fn config(&self) -> &Config {
        &self.0.config
    }

    pub(super) fn digest(&self) -> u64 {
        self.0.loaded.load().digest
    }

    /// Uses `files` from the next handshake on, if they are sound.
    pub(super) fn replace(&self, files: &Files) -> Result<(), Problems> {
        let loaded = files.load(&self.0.config, self.0.tickets.as_ref())?;
        self.0.loaded.store(Arc::new(loaded));
        Ok(())
    }
}
