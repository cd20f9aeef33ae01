//! Performs the TLS handshakes of one listener.

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
    file_error::FileErrors,
    handshake::{self, HandshakeError, NegotiatedTls},
    load::{LoadedConfig, TlsFiles},
};

/// The maximum number of bytes that a connection buffers for a client, before and after encryption each:
/// two records of the maximum size.
const BUFFER_LIMIT_BYTES: usize = 32 << 10;

/// Performs the TLS handshakes of one listener. A cheap handle.
#[derive(Clone)]
pub struct TlsAcceptor(Arc<Inner>);

struct Inner {
    config: Config,
    /// Encrypts session tickets. It survives a reload, so that sessions can be resumed afterwards.
    ticketer: Option<Arc<dyn ProducesTickets>>,
    loaded: ArcSwap<LoadedConfig>,
    handshake_permits: Semaphore,
}

impl fmt::Debug for TlsAcceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TlsAcceptor").field(&self.0.config).finish()
    }
}

impl TlsAcceptor {
    /// Loads and validates all files of `config`. Blocks on the file system.
    ///
    /// An expired certificate is not an error but a warning ([`TlsAcceptor::warnings`]).
    ///
    /// Clients resume sessions with tickets, whose keys rotate every six hours. With client
    /// certificates, resumption is disabled: a resumed session is not verified again and could outlive a
    /// revocation.
    pub fn new(config: Config) -> Result<Self, FileErrors> {
        let ticketer = match &config.client_verification {
            None => Some(Ticketer::new().expect("the system has random bytes")),
            Some(_) => None,
        };
        let loaded = TlsFiles::read(&config).build_config(&config, ticketer.as_ref())?;
        let handshake_permits = Semaphore::new(config.max_handshakes.min(Semaphore::MAX_PERMITS));
        let loaded = ArcSwap::from_pointee(loaded);
        Ok(Self(Arc::new(Inner { config, ticketer, loaded, handshake_permits })))
    }

    /// The name of the listener.
    pub fn listener(&self) -> &'static str {
        self.0.config.listener
    }

    /// The certificates in use, in the order of the configuration.
    pub fn certificates(&self) -> Vec<Certificate> {
        self.0.loaded.load().certificates.clone()
    }

    /// Warnings about the validity of the files in use, one sentence each.
    pub fn warnings(&self, now: Timestamp) -> Vec<String> {
        self.0.loaded.load().warnings(now)
    }

    /// Performs the handshake on an accepted connection. Dropping the future closes the connection.
    ///
    /// The handshake holds a permit while it processes the client's first message, which is most of the
    /// work, but not while it waits for the client. So stalled clients do not delay other handshakes.
    pub async fn handshake<I>(&self, io: I) -> Result<(TlsStream<I>, NegotiatedTls), HandshakeError>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let Inner { config, handshake_permits, .. } = &*self.0;
        let handshake = async {
            let hello = LazyConfigAcceptor::new(Acceptor::default(), io).await?;
            let permit = handshake_permits.acquire().await.expect("the semaphore is never closed");
            // Loaded after the wait, so that a queued handshake gets the latest certificate.
            let tls = self.server_config();
            let mut accept = pin!(
                hello.into_stream_with(tls, |it| it.set_buffer_limit(Some(BUFFER_LIMIT_BYTES)))
            );
            let processed = poll_fn(|cx| Poll::Ready(accept.as_mut().poll(cx))).await;
            drop(permit);
            match processed {
                Poll::Ready(accepted) => accepted,
                Poll::Pending => accept.await,
            }
        };
        let outcome = match timeout(config.handshake_timeout, handshake).await {
            Ok(Ok(stream)) => {
                let tls = NegotiatedTls::from_connection(stream.get_ref().1);
                Ok((stream, tls))
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(HandshakeError::TimedOut(config.handshake_timeout)),
        };
        let counted = outcome.as_ref().map(|(stream, tls)| (stream.get_ref().1, tls));
        handshake::record_handshake(config.listener, counted);
        outcome
    }

    /// The configuration of the next handshake.
    pub(super) fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.0.loaded.load().server_config)
    }

    pub(super) fn config(&self) -> &Config {
        &self.0.config
    }

    pub(super) fn digest(&self) -> u64 {
        self.0.loaded.load().digest
    }

    /// Uses `files` from the next handshake on, if they are valid.
    pub(super) fn reload(&self, files: &TlsFiles) -> Result<(), FileErrors> {
        let loaded = files.build_config(&self.0.config, self.0.ticketer.as_ref())?;
        self.0.loaded.store(Arc::new(loaded));
        Ok(())
    }
}
