//! A self-signed server certificate for loopback, and clients that trust only that certificate.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;

/// A self-signed certificate for `localhost` and `127.0.0.1`, and its key.
#[derive(Debug)]
pub(crate) struct SelfSignedCertificate {
    directory: TempDir,
    der: CertificateDer<'static>,
}

impl SelfSignedCertificate {
    pub(crate) fn new() -> Self {
        // Fails if a provider is installed already, which is the same one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let names = ["localhost", "127.0.0.1"].map(str::to_owned);
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        let directory = tempfile::Builder::new().prefix("certificate-").tempdir().unwrap();
        std::fs::write(directory.path().join("tls.crt"), made.cert.pem()).unwrap();
        std::fs::write(directory.path().join("tls.key"), made.signing_key.serialize_pem()).unwrap();
        Self { directory, der: made.cert.into() }
    }

    /// The path of the certificate, in PEM.
    pub(crate) fn file(&self) -> PathBuf {
        self.directory.path().join("tls.crt")
    }

    /// The path of its key.
    pub(crate) fn key_file(&self) -> PathBuf {
        self.directory.path().join("tls.key")
    }

    /// A TLS client configuration that trusts this certificate and offers one protocol, `h2` or
    /// `http/1.1`.
    pub(crate) fn client_config(&self, protocol: &str) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        let config = ClientConfig::builder().with_root_certificates(roots);
        let mut config = config.with_no_client_auth();
        config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        Arc::new(config)
    }

    /// An HTTP client that trusts this certificate. Like the rig's client, it keeps no idle connections.
    pub(crate) fn http(&self) -> reqwest::Client {
        let root = reqwest::Certificate::from_der(&self.der).unwrap();
        let client = reqwest::Client::builder().tls_certs_only([root]).pool_max_idle_per_host(0);
        client.no_proxy().build().unwrap()
    }
}
