//! The baseline: hyper that always sends the same response.
//!
//! As minimal as hyper's own example: no routes, tokens, timers or limits; with TLS or without. It runs
//! in its own process: this executable with the subcommand `bare`.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Response, StatusCode,
    header::{HeaderName, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::NoServerSessionStorage,
    version::{TLS12, TLS13},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use super::exchange::RawResponse;

/// Headers that hyper adds itself.
const HYPER_HEADERS: [&str; 3] = ["date", "content-length", "transfer-encoding"];

/// Writes another server's response to a file, for the baseline to send.
pub(crate) fn write_response(answer: &RawResponse, file: &Path) -> Result<()> {
    let mut text = format!("{}\n", answer.status).into_bytes();
    for (name, value) in
        answer.headers.iter().filter(|(name, _)| !HYPER_HEADERS.contains(&name.as_str()))
    {
        text.extend_from_slice(format!("{name}: {value}\n").as_bytes());
    }
    text.push(b'\n');
    text.extend_from_slice(&answer.body);
    std::fs::write(file, text).context("cannot write the response of the baseline")
}

/// Reads what [`write_response`] wrote.
fn read_response(file: &Path) -> Result<(StatusCode, HeaderMap, Bytes)> {
    let text = std::fs::read(file)?;
    let end = text.windows(2).position(|two| two == b"\n\n").context("no end of the head")?;
    let head = std::str::from_utf8(&text[..end])?;
    let mut lines = head.lines();
    let status = lines.next().context("no status")?.parse()?;
    let mut headers = HeaderMap::new();
    for line in lines {
        let (name, value) = line.split_once(": ").context("no header")?;
        let name = HeaderName::from_bytes(name.as_bytes())?;
        headers.append(name, HeaderValue::from_str(value)?);
    }
    Ok((status, headers, Bytes::from(text).slice(end + 2..)))
}

/// The certificate of the baseline for TLS.
#[derive(Debug)]
pub(crate) struct TlsIdentity<'a> {
    pub(crate) certificate: &'a Path,
    pub(crate) key: &'a Path,
}

impl TlsIdentity<'_> {
    /// The defaults of the data listener: TLS 1.2 and 1.3, resumption by tickets, no session storage.
    fn acceptor(&self) -> Result<TlsAcceptor> {
        let chain = CertificateDer::pem_file_iter(self.certificate)?.collect::<Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_file(self.key)?;
        let mut tls = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS13, &TLS12])?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        tls.session_storage = Arc::new(NoServerSessionStorage {});
        tls.ticketer = ring::Ticketer::new()?;
        Ok(TlsAcceptor::from(Arc::new(tls)))
    }
}

/// The response to every request.
type FixedResponse = (StatusCode, HeaderMap, Full<Bytes>);

/// Serves the response until the process is killed, over TLS if there is an identity.
pub(crate) fn serve(file: &Path, port: u16, identity: Option<&TlsIdentity<'_>>) -> Result<()> {
    let (status, headers, body) = read_response(file)?;
    let said = (status, headers, Full::new(body));
    let acceptor = identity.map(TlsIdentity::acceptor).transpose()?;
    tokio::runtime::Builder::new_multi_thread().enable_io().build()?.block_on(async {
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let said = said.clone();
            match &acceptor {
                None => tokio::spawn(serve_connection(stream, said)),
                Some(acceptor) => {
                    let handshake = acceptor.accept(stream);
                    tokio::spawn(async move {
                        if let Ok(stream) = handshake.await {
                            serve_connection(stream, said).await;
                        }
                    })
                }
            };
        }
    })
}

async fn serve_connection<I: AsyncRead + AsyncWrite + Unpin>(stream: I, said: FixedResponse) {
    let service = service_fn(|_| {
        let (status, headers, body) = said.clone();
        let mut response = Response::new(body);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        async { Ok::<_, Infallible>(response) }
    });
    // Errors of clients that disconnect are ignored.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}
