//! Client certificates: their verification, and the details that handlers see.

use std::sync::Arc;

use rustls::{
    RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, CertificateRevocationListDer},
    server::{VerifierBuilderError, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use sha2::{Digest as _, Sha256};
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

use super::config::ClientAuth;

/// A client certificate whose ownership the client has proven.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct VerifiedClientCertificate {
    subject: String,
    names: Vec<String>,
    fingerprint: [u8; 32],
}

impl VerifiedClientCertificate {
    /// Parses a verified certificate.
    pub(super) fn from_verified(certificate: &CertificateDer<'_>) -> Self {
        let (mut subject, mut names) = (String::new(), Vec::new());
        if let Ok((_, parsed)) = parse_x509_certificate(certificate) {
            subject = parsed.subject().to_string();
            let alternatives = parsed.subject_alternative_name().ok().flatten();
            let alternatives = alternatives.iter().flat_map(|it| &it.value.general_names);
            names.extend(alternatives.filter_map(|name| match name {
                GeneralName::DNSName(name)
                | GeneralName::RFC822Name(name)
                | GeneralName::URI(name) => Some((*name).to_owned()),
                _ => None,
            }));
        }
        Self { subject, names, fingerprint: Sha256::digest(certificate).into() }
    }

    /// The distinguished name of its subject; may be empty.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// Its subject alternative names: host names, email addresses and URIs (SPIFFE IDs for instance).
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The SHA-256 hash of the DER-encoded certificate.
    pub fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }
}

/// Builds a verifier that accepts certificates issued by `roots` and not revoked by `crls`.
///
/// With revocation lists, each authority between a client and its root needs one, as in nginx: a
/// certificate of unknown status is rejected. An outdated list stays in use, because rejecting all
/// clients for a late list would cause an outage.
pub(super) fn client_verifier(
    provider: &Arc<CryptoProvider>,
    roots: RootCertStore,
    crls: Vec<CertificateRevocationListDer<'static>>,
    auth: ClientAuth,
) -> Result<Arc<dyn ClientCertVerifier>, VerifierBuilderError> {
    let builder =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider));
    let builder = match auth {
        ClientAuth::Required => builder,
        ClientAuth::Optional => builder.allow_unauthenticated(),
    };
    builder.with_crls(crls).build()
}
