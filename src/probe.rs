//! `parapet health` and `parapet ready`: one question to a running instance.
//!
//! Made for a container's health check: one line where something is wrong, and an exit status.

use std::{io, path::Path, time::Duration};

use reqwest::{Certificate, Client, StatusCode};

use crate::{
    config::{Probe, Trust},
    wire::text::without_byte_order_mark,
};

/// The longest that the answer may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Why an instance does not count as well.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The certificate authority's file cannot be used.
    #[error("cannot read the certificate authority")]
    Authority(#[source] io::Error),
    /// The file holds no PEM certificates, or there is no TLS to use them.
    #[error("cannot set up the client")]
    Client(#[source] reqwest::Error),
    /// Nobody answered.
    #[error("no answer from {0}")]
    Silent(String, #[source] reqwest::Error),
    /// The answer was not 200.
    #[error("{0} answered {1}")]
    Unwell(String, StatusCode),
}

/// Asks; `Ok` is an answer of 200.
pub async fn ask(probe: &Probe) -> Result<(), Error> {
    // Fails where a provider has been chosen already, which serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::builder().timeout(TIMEOUT).no_proxy();
    let client = match &probe.trust {
        Trust::Platform(None) => client,
        Trust::Platform(Some(file)) => client.tls_certs_merge(authorities(file)?),
        Trust::Authority(file) => {
            client.tls_certs_only(authorities(file)?).tls_danger_accept_invalid_hostnames(true)
        }
        Trust::Any => client.tls_danger_accept_invalid_certs(true),
    };
    let request = client.build().map_err(Error::Client)?.get(probe.url.clone());
    let url = || probe.url.to_string();
    match request.send().await.map_err(|error| Error::Silent(url(), error.without_url()))?.status()
    {
        StatusCode::OK => Ok(()),
        status => Err(Error::Unwell(url(), status)),
    }
}

fn authorities(file: &Path) -> Result<Vec<Certificate>, Error> {
    let pem = std::fs::read(file).map_err(Error::Authority)?;
    Certificate::from_pem_bundle(without_byte_order_mark(&pem)).map_err(Error::Client)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    /// What is said of an instance that answers `status`.
    async fn check(status: &str) -> Result<(), Error> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/internal-backstage/ready", listener.local_addr().unwrap());
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
        let instance = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 1024];
            let _ = stream.read(&mut head).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        };
        let probe = Probe { url: url.parse().unwrap(), trust: Trust::Any };
        tokio::join!(ask(&probe), instance).0
    }

    #[tokio::test]
    async fn an_instance_is_well_when_it_answers_200_and_only_then() {
        assert!(check("200 OK").await.is_ok());
        assert!(matches!(check("503 Service Unavailable").await, Err(Error::Unwell(..))));
        assert!(matches!(check("204 No Content").await, Err(Error::Unwell(..))));
    }

    /// Answers one request over TLS as an instance of another name.
    async fn answer_over_tls(listener: TcpListener, config: rustls::ServerConfig) {
        let (stream, _) = listener.accept().await.unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
        // A client that does not trust it breaks off.
        let Ok(mut stream) = acceptor.accept(stream).await else { return };
        let mut head = [0; 1024];
        let _ = stream.read(&mut head).await;
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        let _ = stream.write_all(answer).await;
        let _ = stream.shutdown().await;
    }

    #[tokio::test]
    async fn certificate_is_verified_as_far_as_the_probe_trusts() {
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
            (Trust::Any, true),
            (Trust::Authority(own.clone()), true),
            (Trust::Authority(foreign), false),
            (Trust::Platform(Some(own)), false),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("https://{}/ready", listener.local_addr().unwrap());
            let probe = Probe { url: url.parse().unwrap(), trust };
            let (asked, ()) = tokio::join!(ask(&probe), answer_over_tls(listener, config.clone()));
            assert_eq!(asked.is_ok(), is_trusted, "{:?}: {asked:?}", probe.trust);
        }
    }

    #[tokio::test]
    async fn an_instance_that_is_not_there_is_silent() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        drop(listener);
        let probe = Probe { url, trust: Trust::Any };
        assert!(matches!(ask(&probe).await, Err(Error::Silent(..))));
    }
}
