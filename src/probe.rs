//! `parapet health` and `parapet ready`: one question to a running instance.
//!
//! Made for a container's health check: one line where something is wrong, and an exit status.

use std::{io, time::Duration};

use reqwest::{Certificate, Client, StatusCode};

use crate::config::Probe;

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
        let authority = Certificate::from_pem_bundle(&pem).map_err(Error::Client)?;
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
