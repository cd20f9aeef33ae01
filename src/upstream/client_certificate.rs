//! The client certificate for upstream, from PEM files or from a PKCS #12 file.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use p12_keystore::{Certificate, Pkcs12Archive, error::Error as Pkcs12Error};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use crate::tls::pem;

/// The files with a client certificate for upstream and its key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ClientCertificateFiles {
    /// Two PEM files.
    PemPair {
        /// The certificate chain, leaf first.
        certificate_file: PathBuf,
        /// The private key.
        key_file: PathBuf,
    },
    /// One PEM file with both.
    PemFile(PathBuf),
    /// A PKCS #12 file (`.p12`, `.pfx`).
    Pkcs12 {
        /// The file.
        file: PathBuf,
        /// The passphrase that it is encrypted with.
        passphrase: Passphrase,
    },
}

/// A passphrase. It is zeroized on drop and never printed.
#[derive(Clone, Default, Eq, PartialEq)]
pub struct Passphrase(Zeroizing<String>);

impl Passphrase {
    /// Wraps a passphrase.
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
    /// The passphrase is wrong.
    #[error("the passphrase does not open {}", file.display())]
    Passphrase {
        /// The file.
        file: PathBuf,
    },
    /// The file is not PKCS #12, or its encryption is not supported.
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
    /// The HTTP client rejects it.
    #[error("the client certificate cannot be used")]
    Rejected(#[source] reqwest::Error),
}

/// A certificate chain, leaf first, and the key of the leaf.
type ChainAndKey = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl ClientCertificateFiles {
    /// Reads and checks the certificate and its key. Blocks on the file system.
    pub fn load(&self) -> Result<reqwest::Identity, Error> {
        let (chain, key) = match self {
            Self::PemPair { certificate_file, key_file } => read_pem(certificate_file, key_file)?,
            Self::PemFile(file) => read_pem(file, file)?,
            Self::Pkcs12 { file, passphrase } => read_pkcs12(file, passphrase)?,
        };
        let pem = Zeroizing::new(to_pem(&chain, &key));
        reqwest::Identity::from_pem(pem.as_bytes())
            .map_err(|error| Error::Rejected(error.without_url()))
    }
}

fn read_pem(certificate_file: &Path, key_file: &Path) -> Result<ChainAndKey, Error> {
    let pem = pem::read_file(certificate_file).map_err(Error::Certificate)?;
    let chain = pem::certificates(certificate_file, &pem).map_err(Error::Certificate)?;
    let pem = pem::read_file(key_file).map_err(Error::Key)?;
    let key = pem::private_key(key_file, &pem).map_err(Error::Key)?;
    pem::certified_key((certificate_file, chain.clone()), (key_file, key.clone_key()))
        .map_err(Error::Key)?;
    Ok((chain, key))
}

fn read_pkcs12(file: &Path, passphrase: &Passphrase) -> Result<ChainAndKey, Error> {
    let bytes = pem::read_file(file).map_err(Error::Certificate)?;
    let archive = Pkcs12Archive::from_pkcs12(&bytes, &passphrase.0).map_err(|source| {
        let file = file.to_owned();
        match source {
            // Data decrypted with a wrong passphrase has invalid padding.
            Pkcs12Error::MacError(_) | Pkcs12Error::Pkcs5Error(_) | Pkcs12Error::UnpadError => {
                Error::Passphrase { file }
            }
            source => Error::Pkcs12 { file, source },
        }
    })?;
    let key = archive.keys.first().ok_or_else(|| Error::NoKey { file: file.to_owned() })?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.key.as_der().to_vec()));
    let certificates: Vec<_> = archive.certs.into_iter().map(|bag| bag.cert).collect();
    let leaf = find_leaf(file, &key, &certificates)?;
    Ok((build_chain(leaf, &certificates).into_iter().map(to_der).collect(), key))
}

/// The certificate of `key` among all that are in `file`.
fn find_leaf<'a>(
    file: &Path,
    key: &PrivateKeyDer<'static>,
    certificates: &'a [Certificate],
) -> Result<&'a Certificate, Error> {
    for certificate in certificates {
        match pem::certified_key((file, vec![to_der(certificate)]), (file, key.clone_key())) {
            Ok(_) => return Ok(certificate),
            // The certificate of another key, for instance the issuer's.
            Err(pem::Error::KeyMismatch { .. } | pem::Error::InvalidCertificate { .. }) => {}
            Err(error @ pem::Error::X509Version1 { .. }) => {
                return Err(Error::Certificate(error));
            }
            Err(error) => return Err(Error::Key(error)),
        }
    }
    Err(Error::NoCertificate { file: file.to_owned() })
}

/// The chain from `leaf` upwards, as far as its issuers are among `certificates`. Excludes the root,
/// which upstream has.
fn build_chain<'a>(leaf: &'a Certificate, certificates: &'a [Certificate]) -> Vec<&'a Certificate> {
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

fn to_der(certificate: &Certificate) -> CertificateDer<'static> {
    certificate.as_der().to_vec().into()
}

/// Encodes as PEM, the only format that the HTTP client accepts.
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
    use std::{fs, time::Duration};

    use p12_keystore::{EncryptionAlgorithm, KeyStore, KeyStoreEntry, PrivateKey, PrivateKeyChain};
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa,
        KeyPair,
    };
    use tokio::net::TcpListener;

    use super::*;
    use crate::{telemetry::error_chain, tls};

    /// A root, an intermediate authority, and a leaf with its key.
    struct Chain {
        root: CertifiedIssuer<'static, KeyPair>,
        intermediate: CertifiedIssuer<'static, KeyPair>,
        leaf: rcgen::Certificate,
        key: KeyPair,
    }

    impl Chain {
        fn new() -> Self {
            let params = |name: &str, is_ca| {
                let mut params = CertificateParams::default();
                params.distinguished_name = DistinguishedName::new();
                params.distinguished_name.push(DnType::CommonName, name);
                params.is_ca = is_ca;
                params
            };
            let is_ca = || IsCa::Ca(BasicConstraints::Unconstrained);
            let key = || KeyPair::generate().expect("key");
            let root = CertifiedIssuer::self_signed(params("root", is_ca()), key()).expect("root");
            let intermediate = params("intermediate", is_ca());
            let intermediate = CertifiedIssuer::signed_by(intermediate, key(), &root);
            let (intermediate, key) = (intermediate.expect("intermediate"), key());
            let leaf = params("edge", IsCa::NoCa).signed_by(&key, &intermediate).expect("leaf");
            Self { root, intermediate, leaf, key }
        }

        /// A PKCS #12 file with the certificates in an unusual order.
        fn pkcs12(&self, algorithm: EncryptionAlgorithm) -> Vec<u8> {
            let certificate = |der: &[u8]| Certificate::from_der(der).expect("certificate");
            let chain = [
                certificate(self.leaf.der()),
                certificate(self.root.der()),
                certificate(self.intermediate.der()),
            ];
            let key = PrivateKey::from_der(self.key.serialized_der()).expect("key");
            let entry = KeyStoreEntry::PrivateKeyChain(PrivateKeyChain::new("1", key, chain));
            let mut store = KeyStore::new();
            store.add_entry("edge", entry);
            let writer = store.writer("open sesame").encryption_algorithm(algorithm);
            writer.write().expect("PKCS #12")
        }

        /// Certificates and key in one text.
        fn pem(&self) -> String {
            self.key.serialize_pem() + &self.leaf.pem() + &self.intermediate.pem()
        }
    }

    fn load_pkcs12(bytes: &[u8], passphrase: &str) -> Result<reqwest::Identity, Error> {
        let file = tempfile::NamedTempFile::new().expect("file");
        fs::write(file.path(), bytes).expect("write");
        let passphrase = Passphrase::new(passphrase);
        ClientCertificateFiles::Pkcs12 { file: file.path().to_owned(), passphrase }.load()
    }

    #[test]
    fn pkcs12_is_decrypted_only_with_its_passphrase() {
        for algorithm in [
            EncryptionAlgorithm::PbeWithHmacSha256AndAes256,
            EncryptionAlgorithm::PbeWithShaAnd3KeyTripleDesCbc,
        ] {
            let bytes = Chain::new().pkcs12(algorithm);
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
        let Chain { leaf, .. } = Chain::new();
        let mut store = KeyStore::new();
        let certificate = Certificate::from_der(leaf.der()).expect("certificate");
        store.add_entry("edge", KeyStoreEntry::Certificate(certificate));
        let bytes = store.writer("open sesame").write().expect("PKCS #12");
        let error = load_pkcs12(&bytes, "open sesame").expect_err("no key");
        assert!(matches!(error, Error::NoKey { .. }), "{error:?}");
    }

    #[test]
    fn single_pem_file_contains_certificate_and_key() {
        let chain = Chain::new();
        let file = tempfile::NamedTempFile::new().expect("file");
        let identity = ClientCertificateFiles::PemFile(file.path().to_owned());
        fs::write(file.path(), chain.pem()).expect("write");
        identity.load().expect("identity");
        fs::write(file.path(), chain.leaf.pem()).expect("write");
        let error = identity.load().expect_err("no key");
        assert!(
            error_chain(&error)
                .ends_with("contains no private key (PEM: PKCS #8, PKCS #1 or SEC 1)")
        );
        let another = Chain::new().key.serialize_pem();
        fs::write(file.path(), another + &chain.leaf.pem()).expect("write");
        let error = identity.load().expect_err("another key");
        assert!(
            error_chain(&error).contains("does not belong to the first certificate"),
            "{error}"
        );
    }

    /// For each format, upstream trusts only the root and verifies the chain.
    #[tokio::test]
    async fn upstream_accepts_the_certificate_with_its_chain() {
        let chain = Chain::new();
        let folder = tempfile::tempdir().expect("folder");
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            fs::write(&path, bytes).expect("write");
            path
        };
        let server = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("server");
        let upstream = tls::TlsAcceptor::new(tls::Config {
            listener: "data",
            key_pairs: vec![tls::KeyPairFiles {
                certificate_file: write("tls.crt", server.cert.pem().as_bytes()),
                key_file: write("tls.key", server.signing_key.serialize_pem().as_bytes()),
            }],
            min_version: tls::Version::Tls12,
            client_verification: Some(tls::ClientVerification {
                ca_file: write("ca.crt", chain.root.pem().as_bytes()),
                auth: tls::ClientAuth::Required,
                crl_file: None,
            }),
            handshake_timeout: Duration::from_secs(10),
            max_handshakes: 16,
        });
        let upstream = upstream.expect("sound");
        let passphrase = Passphrase::new("open sesame");
        let pkcs12 = chain.pkcs12(EncryptionAlgorithm::PbeWithHmacSha256AndAes256);
        let chain_pem = chain.leaf.pem() + &chain.intermediate.pem();
        let _ = rustls::crypto::ring::default_provider().install_default();
        for identity in [
            ClientCertificateFiles::PemPair {
                certificate_file: write("edge.crt", chain_pem.as_bytes()),
                key_file: write("edge.key", chain.key.serialize_pem().as_bytes()),
            },
            ClientCertificateFiles::PemFile(write("edge.pem", chain.pem().as_bytes())),
            ClientCertificateFiles::Pkcs12 { file: write("edge.p12", &pkcs12), passphrase },
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
            let client = reqwest::Client::builder()
                .identity(identity.load().expect("identity"))
                .tls_danger_accept_invalid_certs(true)
                .no_proxy()
                .build()
                .expect("client");
            let url = format!("https://{}/", listener.local_addr().expect("bound"));
            let accepted = async {
                let (stream, _) = listener.accept().await.expect("accepted");
                upstream.handshake(stream).await.expect("handshake").1.client_certificate
            };
            let (seen, _) = tokio::join!(accepted, client.get(url).send());
            assert_eq!(seen.expect("a certificate").subject(), "CN=edge", "{identity:?}");
        }
    }
}
