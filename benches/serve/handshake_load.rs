//! Load for a server's TLS handshakes: clients that make a connection for each request.
//!
//! They use little processor time, which the server needs on the same machine, so they do not verify
//! certificates. They run in their own process: this executable with the subcommand `connect`.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, HandshakeKind, SignatureScheme,
    StreamOwned,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};
use tokio_rustls::TlsConnector;

use super::{
    exchange::{RESPONSE_TIMEOUT, with_number},
    load::{SAMPLE_PREFIX, Sample},
    numbers::to_f64,
};

/// The parameters of a run.
#[derive(Debug)]
pub(crate) struct LoadPlan {
    pub(crate) host: SocketAddr,
    /// A request that gets 304, with placeholders for numbers.
    pub(crate) request: String,
    /// The numbers of requests start after this one.
    pub(crate) first: u64,
    pub(crate) connections: usize,
    pub(crate) duration: Duration,
    /// Whether each client resumes its last session; otherwise each handshake is full.
    pub(crate) resumes: bool,
}

/// The results of one client.
#[derive(Debug, Default)]
struct ClientResult {
    micros: Vec<u32>,
    bytes: usize,
}

/// Runs the clients and prints a [`Sample`].
pub(crate) fn run(plan: LoadPlan) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (began, connections) = (Instant::now(), plan.connections);
    let (plan, numbers) = (Arc::new(plan), Arc::new(AtomicU64::new(0)));
    let done = runtime.block_on(async {
        let mut clients = JoinSet::new();
        for _ in 0..connections {
            clients.spawn(client(Arc::clone(&plan), Arc::clone(&numbers)));
        }
        clients.join_all().await
    });
    let took = began.elapsed();
    let mut all = ClientResult::default();
    for done in done {
        let ClientResult { micros, bytes } = done?;
        all.micros.extend(micros);
        all.bytes += bytes;
    }
    all.micros.sort_unstable();
    let of_hundred = |share: usize| {
        let at = all.micros.len().saturating_sub(1) * share / 100;
        all.micros.get(at).copied().map_or(0.0, f64::from)
    };
    let sample = Sample {
        requests: to_f64(all.micros.len() as u64),
        bytes: to_f64(all.bytes as u64),
        micros: took.as_secs_f64() * 1e6,
        p50_micros: of_hundred(50),
        p99_micros: of_hundred(99),
        socket_errors: 0,
        status_errors: 0,
    };
    println!("{SAMPLE_PREFIX}{}", serde_json::to_string(&sample)?);
    Ok(())
}

async fn client(plan: Arc<LoadPlan>, numbers: Arc<AtomicU64>) -> Result<ClientResult> {
    let connector = TlsConnector::from(Arc::new(tls_config(plan.resumes)));
    let ask = async |expected| {
        let number = plan.first + numbers.fetch_add(1, Ordering::Relaxed);
        let length =
            send_request(&connector, plan.host, &with_number(&plan.request, number), expected)
                .await?;
        anyhow::Ok(length)
    };
    let expected = if plan.resumes {
        ask(HandshakeKind::Full).await?;
        HandshakeKind::Resumed
    } else {
        HandshakeKind::Full
    };
    let (mut done, began) = (ClientResult::default(), Instant::now());
    while began.elapsed() < plan.duration {
        let began = Instant::now();
        done.bytes += ask(expected).await?;
        done.micros.push(u32::try_from(began.elapsed().as_micros())?);
    }
    Ok(done)
}

/// Sends a request on a new connection. Returns the length of the response.
async fn send_request(
    connector: &TlsConnector,
    host: SocketAddr,
    request: &str,
    expected: HandshakeKind,
) -> Result<usize> {
    let stream = TcpStream::connect(host).await?;
    stream.set_nodelay(true)?;
    let mut stream = connector.connect(server_name(), stream).await?;
    let kind = stream.get_ref().1.handshake_kind();
    ensure!(kind == Some(expected), "the handshake was {kind:?} instead of {expected:?}");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::with_capacity(1024);
    while !answer.ends_with(b"\r\n\r\n") {
        ensure!(stream.read_buf(&mut answer).await? > 0, "the connection ended inside a response");
    }
    let answered = String::from_utf8_lossy(&answer);
    ensure!(answered.starts_with("HTTP/1.1 304 "), "the response is {answered:?}");
    stream.shutdown().await?;
    Ok(answer.len())
}

/// Opens a connection that is reused.
pub(crate) fn connect_tls(
    host: SocketAddr,
) -> Result<StreamOwned<ClientConnection, std::net::TcpStream>> {
    let stream = std::net::TcpStream::connect(host)?;
    stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
    Ok(StreamOwned::new(ClientConnection::new(Arc::new(tls_config(false)), server_name())?, stream))
}

/// The server name in the certificate.
fn server_name() -> ServerName<'static> {
    ServerName::try_from("localhost").expect("it is a name")
}

/// The TLS configuration of a client, with session resumption or without.
fn tls_config(resumes: bool) -> ClientConfig {
    let provider = Arc::new(ring::default_provider());
    let anybody = Arc::new(AcceptAnyCertificate(Arc::clone(&provider)));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider supports them")
        .dangerous()
        .with_custom_certificate_verifier(anybody)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    if !resumes {
        config.resumption = Resumption::disabled();
    }
    config
}

/// Accepts every certificate.
#[derive(Debug)]
struct AcceptAnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
