//! Builds the HTTP client for upstream: TLS trust, client certificate, timeouts and default headers.
//!
//! Tokens are not default headers: each request carries its own.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use reqwest::{
    Certificate, Client, Url,
    header::{HeaderMap, HeaderName, HeaderValue},
    redirect,
};
use rustls::crypto::ring;
use ulid::Ulid;
use zeroize::Zeroizing;

use super::{client_certificate::ClientCertificateFiles, error::Error, no_proxy};
use crate::protocol::byte_order_mark::without_byte_order_mark;

/// How to reach upstream.
#[derive(Clone, Debug)]
pub struct Config {
    /// The server's base URL, without `/api`.
    pub url: Url,
    /// The header that carries a token upstream; `authorization` by default.
    pub token_header: HeaderName,
    /// Headers that the operator adds to every request; values are marked sensitive.
    pub extra_headers: Vec<(HeaderName, HeaderValue)>,
    /// The timeout of a request, including its body; of a stream, only its head.
    pub request_timeout: Duration,
    /// The timeout for connecting.
    pub connect_timeout: Duration,
    /// How long idle connections stay open.
    pub keepalive: Duration,
    /// Certificates (PEM) to trust in addition to the platform's.
    pub certificate_file: Option<PathBuf>,
    /// The client certificate and its key.
    pub client_certificate: Option<ClientCertificateFiles>,
    /// Accept any server certificate; only for an operator's tests.
    pub skip_certificate_verification: bool,
    /// Hosts to reach without a proxy, in the syntax of `NO_PROXY`.
    pub no_proxy: String,
    /// The application name that upstream sees (`UNLEASH-APPNAME`).
    pub app_name: String,
    /// The instance id that upstream sees (`UNLEASH-INSTANCEID`).
    pub instance_id: String,
}

/// The version of the Unleash client specification that we implement. From 4.2.0 on, Unleash sends
/// segments separately from the flags that refer to them.
const CLIENT_SPEC_VERSION: &str = "6.1.0";

/// Builds the HTTP client of `config`, with its connection pool.
///
/// The request timeout is set on each request, because streams have none.
pub(super) fn build(config: &Config) -> Result<Client, Error> {
    // Another part of the process may have installed a provider already; any is fine.
    let _ = ring::default_provider().install_default();
    let mut builder = Client::builder()
        .user_agent(concat!("parapet/", env!("CARGO_PKG_VERSION")))
        .default_headers(default_headers(config)?)
        .connect_timeout(config.connect_timeout)
        .pool_idle_timeout(config.keepalive)
        // Automatic redirects could send the token to another host, and turn a POST into a GET.
        .redirect(redirect::Policy::none())
        .referer(false)
        .tls_danger_accept_invalid_certs(config.skip_certificate_verification);
    let roots = match &config.certificate_file {
        Some(file) => load_certificates(file)?,
        None => Vec::new(),
    };
    builder = if config.url.scheme() == "https" {
        builder.tls_certs_merge(roots)
    } else {
        // Without TLS the platform's certificates are not needed, and a bare image has none.
        builder.tls_certs_only(roots)
    };
    // reqwest reads `NO_PROXY` too, but applies `*` only to host names.
    if no_proxy::includes(&config.no_proxy, &config.url) {
        builder = builder.no_proxy();
    }
    if let Some(identity) = &config.client_certificate {
        builder = builder.identity(identity.load()?);
    }
    builder.build().map_err(|error| Error::Setup(error.without_url()))
}

fn default_headers(config: &Config) -> Result<HeaderMap, Error> {
    let text = |setting, text: &str| {
        HeaderValue::from_str(text).map_err(|_| Error::InvalidHeader(setting))
    };
    let mut headers = HeaderMap::new();
    for (name, value) in &config.extra_headers {
        headers.append(name, value.clone());
    }
    let ours = [
        ("unleash-appname", text("application name", &config.app_name)?),
        ("unleash-instanceid", text("instance id", &config.instance_id)?),
        ("unleash-connection-id", text("connection id", &Ulid::generate().to_string())?),
        ("unleash-client-spec", HeaderValue::from_static(CLIENT_SPEC_VERSION)),
    ];
    for (name, value) in ours {
        // Configured headers win.
        headers.entry(name).or_insert(value);
    }
    Ok(headers)
}

fn load_certificates(file: &Path) -> Result<Vec<Certificate>, Error> {
    let pem = read_file(file)?;
    let certificates = Certificate::from_pem_bundle(without_byte_order_mark(&pem))
        .map_err(|source| Error::Pem { file: file.to_owned(), source: source.without_url() })?;
    if certificates.is_empty() {
        let source = io::Error::new(io::ErrorKind::InvalidData, "no certificate in it");
        return Err(Error::File { file: file.to_owned(), source });
    }
    Ok(certificates)
}

fn read_file(file: &Path) -> Result<Zeroizing<Vec<u8>>, Error> {
    fs::read(file)
        .map(Zeroizing::new)
        .map_err(|source| Error::File { file: file.to_owned(), source })
}
