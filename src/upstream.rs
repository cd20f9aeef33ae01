//! The client of the Unleash server that Parapet stands in front of.

use std::{path::PathBuf, time::Duration};

use reqwest::{
    Url,
    header::{HeaderName, HeaderValue},
};

/// How to reach upstream.
#[derive(Clone, Debug)]
pub struct Config {
    /// The server's base URL, without `/api`.
    pub url: Url,
    /// The header that carries a token upstream; `authorization` by default.
    pub token_header: HeaderName,
    /// Headers that the operator adds to every request; values are marked sensitive.
    pub extra_headers: Vec<(HeaderName, HeaderValue)>,
    /// The longest that one request may take, the body included.
    pub request_timeout: Duration,
    /// The longest that connecting may take.
    pub connect_timeout: Duration,
    /// How long an idle connection is kept.
    pub keepalive: Duration,
    /// Certificates (PEM) to trust besides the platform's.
    pub certificate_file: Option<PathBuf>,
    /// The client's own certificate and key (PEM, PKCS #8).
    pub identity: Option<Identity>,
    /// Accept any server certificate; only for tests of an operator.
    pub skip_certificate_verification: bool,
    /// The application name that upstream sees (`UNLEASH-APPNAME`).
    pub app_name: String,
    /// The instance id that upstream sees (`UNLEASH-INSTANCEID`).
    pub instance_id: String,
}

/// A client certificate for upstream, as two PEM files.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate chain.
    pub certificate_file: PathBuf,
    /// The PKCS #8 private key.
    pub key_file: PathBuf,
}
