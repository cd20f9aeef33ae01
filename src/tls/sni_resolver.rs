//! Selects the certificate for a handshake.

use std::sync::Arc;

use rustls::{
    client::verify_server_name,
    pki_types::ServerName,
    server::{ClientHello, ParsedCertificate, ResolvesServerCert},
    sign::CertifiedKey,
};

/// Selects a certificate by server name (SNI).
#[derive(Debug)]
pub(super) struct SniResolver(Vec<Arc<CertifiedKey>>);

impl SniResolver {
    /// Selects from `pairs`, which must not be empty. The first is the default.
    pub(super) fn new(pairs: Vec<CertifiedKey>) -> Self {
        Self(pairs.into_iter().map(Arc::new).collect())
    }
}

impl ResolvesServerCert for SniResolver {
    /// Selects the first certificate that is valid for the requested name and has a key that the client
    /// can verify, so that an ECDSA and an RSA certificate can share a name. Falls back to the first
    /// certificate that the client can verify.
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if let [only] = &self.0[..] {
            return Some(Arc::clone(only));
        }
        let name = hello.server_name().and_then(|name| ServerName::try_from(name).ok());
        let schemes = hello.signature_schemes();
        let mut usable = self.0.iter().filter(|pair| pair.key.choose_scheme(schemes).is_some());
        let default = usable.clone().next();
        let named = usable.find(|pair| name.as_ref().is_some_and(|name| is_valid_for(pair, name)));
        named.or(default).map(Arc::clone)
    }
}

fn is_valid_for(pair: &CertifiedKey, name: &ServerName<'_>) -> bool {
    let parsed = pair.end_entity_cert().and_then(ParsedCertificate::try_from);
    parsed.is_ok_and(|parsed| verify_server_name(&parsed, name).is_ok())
}
