//! `parapet health` and `parapet ready`: check a running instance with one HTTP request.
//!
//! Meant for container health checks: an exit status, and one line of output on failure.

use std::{io, path::Path, time::Duration};

use reqwest::{Certificate, Client, StatusCode};

use crate::{
    config::{ProbeOptions, ProbeTrust},
    protocol::byte_order_mark::without_byte_order_mark,
};

/// Timeout of the request.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Why an instance is not healthy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file of the certificate authority cannot be read.
    #[error("cannot read the certificate authority")]
    CertificateAuthority(#[source] io::Error),
    /// The file contains no PEM certificates, or TLS cannot be set up.
    #[error("cannot set up the client")]
    Client(#[source] reqwest::Error),
    /// The request failed or timed out.
    #[error("no answer from {0}")]
    NoResponse(String, #[source] reqwest::Error),
    /// The status was not 200.
    #[error("{0} answered {1}")]
    UnexpectedStatus(String, StatusCode),
}

/// Sends the request; `Ok` means 200.
pub async fn check(probe: &ProbeOptions) -> Result<(), Error> {
    // Fails if a provider is installed already, which is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::builder().timeout(TIMEOUT).no_proxy();
    let client = match &probe.trust {
        ProbeTrust::Platform(None) => client,
        ProbeTrust::Platform(Some(file)) => client.tls_certs_merge(read_certificates(file)?),
        ProbeTrust::Authority(file) => client
            .tls_certs_only(read_certificates(file)?)
            .tls_danger_accept_invalid_hostnames(true),
        ProbeTrust::Any => client.tls_danger_accept_invalid_certs(true),
    };
    let request = client.build().map_err(Error::Client)?.get(probe.url.clone());
    let url = || probe.url.to_string();
    match request
        .send()
        .await
        .map_err(|error| Error::NoResponse(url(), error.without_url()))?
        .status()
    {
        StatusCode::OK => Ok(()),
        status => Err(Error::UnexpectedStatus(url(), status)),
    }
}

fn read_certificates(file: &Path) -> Result<Vec<Certificate>, Error> {
    let pem = std::fs::read(file).map_err(Error::CertificateAuthority)?;
    Certificate::from_pem_bundle(without_byte_order_mark(&pem)).map_err(Error::Client)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    /// The result for an instance that answers `status`.
    async fn result_of(status: &str) -> Result<(), Error> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/internal-backstage/ready", listener.local_addr().unwrap());
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
        let instance = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 1024];
            let _ = stream.read(&mut head).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        };
        let probe = ProbeOptions { url: url.parse().unwrap(), trust: ProbeTrust::Any };
        tokio::join!(check(&probe), instance).0
    }

    #[tokio::test]
    async fn instance_is_healthy_only_if_it_answers_200() {
        assert!(result_of("200 OK").await.is_ok());
        assert!(matches!(
            result_of("503 Service Unavailable").await,
            Err(Error::UnexpectedStatus(..))
        ));
        assert!(matches!(result_of("204 No Content").await, Err(Error::UnexpectedStatus(..))));
    }

    /// Serves one request over TLS with a certificate for another host name.
    async fn answer_over_tls(listener: TcpListener, config: rustls::ServerConfig) {
        let (stream, _) = listener.accept().await.unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
        // A client that does not trust the certificate closes the connection.
        let Ok(mut stream) = acceptor.accept(stream).await else { return };
        let mut head = [0; 1024];
        let _ = stream.read(&mut head).await;
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        let _ = stream.write_all(answer).await;
        let _ = stream.shutdown().await;
    }

    #[tokio::test]
    async fn certificate_is_verified_according_to_the_trust_option() {
        let made = rcgen::generate_simple_self_signed(["flags.example".to_owned()]).unwrap();
        let other = rcgen::generate_simple_self_signed(["flags.example".to_owned()]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, pem: String| {
            let path = folder.path().join(name);
            std::fs::write(&path, pem).unwrap();
            path
        };
        let own = write("own.crt", made.cert.pem());
        let foreign = write("foreign.crt", other.cert.pem());
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key.into())
            .unwrap();
        for (trust, is_trusted) in [
            (ProbeTrust::Any, true),
            (ProbeTrust::Authority(own.clone()), true),
            (ProbeTrust::Authority(foreign), false),
            (ProbeTrust::Platform(Some(own)), false),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("https://{}/ready", listener.local_addr().unwrap());
            let probe = ProbeOptions { url: url.parse().unwrap(), trust };
            let (result, ()) =
                tokio::join!(check(&probe), answer_over_tls(listener, config.clone()));
            assert_eq!(result.is_ok(), is_trusted, "{:?}: {result:?}", probe.trust);
        }
    }

    #[tokio::test]
    async fn refused_connection_is_no_response() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        drop(listener);
        let probe = ProbeOptions { url, trust: ProbeTrust::Any };
        assert!(matches!(check(&probe).await, Err(Error::NoResponse(..))));
    }
}
