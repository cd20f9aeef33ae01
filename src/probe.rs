//! `parapet health` and `parapet ready`: one question to a running instance.
//!
//! Made for a container's health check: one line where something is wrong, and an exit status.

use std::{io, time::Duration};

use reqwest::{Certificate, Client, StatusCode};

use crate::{config::Probe, wire::text::without_byte_order_mark};

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
    let mut client = Client::builder().timeout(TIMEOUT).no_proxy();
    if let Some(path) = &probe.ca_certificate_file {
        let pem = std::fs::read(path).map_err(Error::Authority)?;
        let authority =
            Certificate::from_pem_bundle(without_byte_order_mark(&pem)).map_err(Error::Client)?;
        client = client.tls_certs_merge(authority);
    }
    let request = client.build().map_err(Error::Client)?.get(probe.url.clone());
    let url = || probe.url.to_string();
    match request.send().await.map_err(|error| Error::Silent(url(), error.without_url()))?.status()
    {
        StatusCode::OK => Ok(()),
        status => Err(Error::Unwell(url(), status)),
    }
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
        let probe = Probe { url: url.parse().unwrap(), ca_certificate_file: None };
        tokio::join!(ask(&probe), instance).0
    }

    #[tokio::test]
    async fn an_instance_is_well_when_it_answers_200_and_only_then() {
        assert!(check("200 OK").await.is_ok());
        assert!(matches!(check("503 Service Unavailable").await, Err(Error::Unwell(..))));
        assert!(matches!(check("204 No Content").await, Err(Error::Unwell(..))));
    }

    #[tokio::test]
    async fn an_instance_that_is_not_there_is_silent() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        drop(listener);
        let probe = Probe { url, ca_certificate_file: None };
        assert!(matches!(ask(&probe).await, Err(Error::Silent(..))));
    }
}
