//! The client certificate that upstream may ask for: from PEM files, or from a PKCS #12 file.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use p12_keystore::{Certificate, Pkcs12Archive, error::Error as Pkcs12Error};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use crate::tls::pem;

/// A client certificate for upstream with its key, and where they are.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Identity {
    /// Two PEM files.
    Pair {
        /// The certificate chain, leaf first.
        certificate_file: PathBuf,
        /// The private key.
        key_file: PathBuf,
    },
    /// One PEM file with both.
    Pem(PathBuf),
    /// A PKCS #12 file (`.p12`, `.pfx`).
    Pkcs12 {
        /// The file.
        file: PathBuf,
        /// What it is encrypted with.
        passphrase: Passphrase,
    },
}

/// A passphrase, which is wiped when dropped and never shown.
#[derive(Clone, Default, Eq, PartialEq)]
pub struct Passphrase(Zeroizing<String>);

impl Passphrase {
    /// Keeps a passphrase.
    pub fn new(text: &str) -> Self {
        Self(Zeroizing::new(text.to_owned()))
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(…)")
    }
}

/// Why a client certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The certificate's file cannot be used.
    #[error(transparent)]
    Certificate(pem::Error),
    /// The key's file cannot be used.
    #[error(transparent)]
    Key(pem::Error),
    /// The passphrase is another one.
    #[error("the passphrase does not open {}", file.display())]
    Passphrase {
        /// The file.
        file: PathBuf,
    },
    /// The file is no PKCS #12, or encrypted in a way that is not supported.
    #[error("{} is not a PKCS #12 file that can be read", file.display())]
    Pkcs12 {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: Pkcs12Error,
    },
    /// A PKCS #12 file without a key.
    #[error("{} contains no private key", file.display())]
    NoKey {
        /// The file.
        file: PathBuf,
    },
    /// A PKCS #12 file without the key's certificate.
    #[error("{} contains no certificate of its private key", file.display())]
    NoCertificate {
        /// The file.
        file: PathBuf,
    },
    /// The HTTP client refuses it.
    #[error("the client certificate cannot be used")]
    Refused(#[source] reqwest::Error),
}

/// A certificate chain, leaf first, and the key of the leaf.
type Pair = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl Identity {
    /// Reads and checks it; blocks for as long as the file system does.
    pub fn load(&self) -> Result<reqwest::Identity, Error> {
        let (chain, key) = match self {
            Self::Pair { certificate_file, key_file } => of_pem(certificate_file, key_file)?,
            Self::Pem(file) => of_pem(file, file)?,
            Self::Pkcs12 { file, passphrase } => of_pkcs12(file, passphrase)?,
        };
        let pem = Zeroizing::new(to_pem(&chain, &key));
        reqwest::Identity::from_pem(pem.as_bytes())
            .map_err(|error| Error::Refused(error.without_url()))
    }
}

fn of_pem(certificate_file: &Path, key_file: &Path) -> Result<Pair, Error> {
    let pem = pem::read(certificate_file).map_err(Error::Certificate)?;
    let chain = pem::certificates(certificate_file, &pem).map_err(Error::Certificate)?;
    let pem = pem::read(key_file).map_err(Error::Key)?;
    let key = pem::private_key(key_file, &pem).map_err(Error::Key)?;
    pem::pair((certificate_file, chain.clone()), (key_file, key.clone_key()))
        .map_err(Error::Key)?;
    Ok((chain, key))
}

fn of_pkcs12(file: &Path, passphrase: &Passphrase) -> Result<Pair, Error> {
    let bytes = pem::read(file).map_err(Error::Certificate)?;
    let archive = Pkcs12Archive::from_pkcs12(&bytes, &passphrase.0).map_err(|source| {
        let file = file.to_owned();
        match source {
            // What a wrong passphrase decrypts does not end as it has to.
            Pkcs12Error::MacError(_) | Pkcs12Error::Pkcs5Error(_) | Pkcs12Error::UnpadError => {
                Error::Passphrase { file }
            }
            source => Error::Pkcs12 { file, source },
        }
    })?;
    let key = archive.keys.first().ok_or_else(|| Error::NoKey { file: file.to_owned() })?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.key.as_der().to_vec()));
    let certificates: Vec<_> = archive.certs.into_iter().map(|bag| bag.cert).collect();
    let is_leaf = |certificate: &&Certificate| {
        pem::pair((file, vec![der(certificate)]), (file, key.clone_key())).is_ok()
    };
    let leaf = certificates.iter().find(is_leaf);
    let leaf = leaf.ok_or_else(|| Error::NoCertificate { file: file.to_owned() })?;
    Ok((chain(leaf, &certificates).into_iter().map(der).collect(), key))
}

/// `leaf`, its issuer, that one's issuer and so on, as far as they are among `certificates`; without the
/// root, which upstream has.
fn chain<'a>(leaf: &'a Certificate, certificates: &'a [Certificate]) -> Vec<&'a Certificate> {
    let mut chain = vec![leaf];
    let is_root = |it: &Certificate| it.issuer() == it.subject();
    while let Some(issuer) = certificates.iter().find(|it| {
        let last = chain.last().expect("it begins with the leaf");
        it.subject() == last.issuer() && !is_root(it) && !chain.contains(it)
    }) {
        chain.push(issuer);
    }
    chain
}

fn der(certificate: &Certificate) -> CertificateDer<'static> {
    certificate.as_der().to_vec().into()
}

/// The only form that the HTTP client takes.
fn to_pem(chain: &[CertificateDer<'_>], key: &PrivateKeyDer<'_>) -> String {
    let label = match key {
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        _ => "PRIVATE KEY",
    };
    let certificates = chain.iter().map(|it| ("CERTIFICATE", &it[..]));
    let mut pem = String::new();
    for (label, der) in certificates.chain([(label, key.secret_der())]) {
        let text = Zeroizing::new(STANDARD.encode(der));
        for part in ["-----BEGIN ", label, "-----\n", &text, "\n-----END ", label, "-----\n"] {
            pem.push_str(part);
        }
    }
    pem
}

#[cfg(test)]
mod tests {
    use std::fs;

    use p12_keystore::{EncryptionAlgorithm, KeyStore, KeyStoreEntry, PrivateKey, PrivateKeyChain};
    use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};

    use super::*;
    use crate::telemetry::report;

    /// A leaf with its key, and its issuer.
    fn chain_of_two() -> (rcgen::Certificate, KeyPair, CertifiedIssuer<'static, KeyPair>) {
        let mut params = CertificateParams::new([]).expect("params");
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "issuer");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key"));
        let issuer = issuer.expect("issuer");
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(["edge.test".to_owned()]).expect("params");
        params.distinguished_name.push(rcgen::DnType::CommonName, "edge");
        (params.signed_by(&key, &issuer).expect("leaf"), key, issuer)
    }

    fn pkcs12(algorithm: EncryptionAlgorithm) -> Vec<u8> {
        let (leaf, key, issuer) = chain_of_two();
        let certificate = |der: &[u8]| Certificate::from_der(der).expect("certificate");
        let chain = [certificate(leaf.der()), certificate(issuer.der())];
        let key = PrivateKey::from_der(key.serialized_der()).expect("key");
        let entry = KeyStoreEntry::PrivateKeyChain(PrivateKeyChain::new("1", key, chain));
        let mut store = KeyStore::new();
        store.add_entry("edge", entry);
        store.writer("open sesame").encryption_algorithm(algorithm).write().expect("PKCS #12")
    }

    fn load_pkcs12(bytes: &[u8], passphrase: &str) -> Result<reqwest::Identity, Error> {
        let file = tempfile::NamedTempFile::new().expect("file");
        fs::write(file.path(), bytes).expect("write");
        let passphrase = Passphrase::new(passphrase);
        Identity::Pkcs12 { file: file.path().to_owned(), passphrase }.load()
    }

    #[test]
    fn pkcs12_is_opened_by_its_passphrase_and_no_other() {
        for algorithm in [
            EncryptionAlgorithm::PbeWithHmacSha256AndAes256,
            EncryptionAlgorithm::PbeWithShaAnd3KeyTripleDesCbc,
        ] {
            let bytes = pkcs12(algorithm);
            load_pkcs12(&bytes, "open sesame").expect("identity");
            for wrong in ["", "open"] {
                let error = load_pkcs12(&bytes, wrong).expect_err("wrong passphrase");
                assert!(matches!(error, Error::Passphrase { .. }), "{error:?}");
            }
        }
        let error = load_pkcs12(b"no PKCS #12", "open sesame").expect_err("no PKCS #12");
        assert!(matches!(error, Error::Pkcs12 { .. }), "{error:?}");
    }

    #[test]
    fn pkcs12_without_key_is_an_error() {
        let (leaf, ..) = chain_of_two();
        let mut store = KeyStore::new();
        let certificate = Certificate::from_der(leaf.der()).expect("certificate");
        store.add_entry("edge", KeyStoreEntry::Certificate(certificate));
        let bytes = store.writer("open sesame").write().expect("PKCS #12");
        let error = load_pkcs12(&bytes, "open sesame").expect_err("no key");
        assert!(matches!(error, Error::NoKey { .. }), "{error:?}");
    }

    #[test]
    fn one_pem_file_may_hold_certificate_and_key() {
        let (leaf, key, _) = chain_of_two();
        let file = tempfile::NamedTempFile::new().expect("file");
        let identity = Identity::Pem(file.path().to_owned());
        fs::write(file.path(), key.serialize_pem() + &leaf.pem()).expect("write");
        identity.load().expect("identity");
        fs::write(file.path(), leaf.pem()).expect("write");
        let error = identity.load().expect_err("no key");
        assert!(
            report(&error).ends_with("contains no private key (PEM: PKCS #8, PKCS #1 or SEC 1)")
        );
        let (_, other, _) = chain_of_two();
        fs::write(file.path(), other.serialize_pem() + &leaf.pem()).expect("write");
        let error = identity.load().expect_err("another key");
        assert!(report(&error).contains("does not belong to the first certificate"), "{error}");
    }
}
