//! Reads certificates, private keys and revocation lists from PEM files.
//!
//! Errors name the file and never contain its contents.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use rustls::{
    Error as TlsError,
    crypto::ring,
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
        pem::{Error as PemError, PemObject},
    },
    sign::CertifiedKey,
};
use x509_parser::{parse_x509_certificate, x509::X509Version};
use zeroize::Zeroizing;

use crate::protocol::byte_order_mark::without_byte_order_mark;

/// The maximum size of a file, in bytes. A revocation list of 100,000 certificates fits.
const MAX_FILE_BYTES: u64 = 8 << 20;

/// The reason why a file is invalid.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading failed.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It exceeds the maximum size.
    #[error("{} is larger than {MAX_FILE_BYTES} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Its PEM encoding is damaged.
    #[error("{} is damaged: its PEM sections cannot be decoded", path.display())]
    InvalidPem {
        /// The file.
        path: PathBuf,
    },
    /// It contains no certificate.
    #[error("{} contains no certificate (PEM, BEGIN CERTIFICATE)", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// One of its certificates is not valid X.509.
    #[error("{} contains a certificate that cannot be parsed", path.display())]
    InvalidCertificate {
        /// The file.
        path: PathBuf,
    },
    /// Its certificate is of X.509 version 1, which current TLS libraries do not support.
    #[error("the certificate in {} is of X.509 version 1; have it issued as version 3", path.display())]
    X509Version1 {
        /// The file.
        path: PathBuf,
    },
    /// It contains no private key.
    #[error("{} contains no private key (PEM: PKCS #8, PKCS #1 or SEC 1)", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// Its private key needs a passphrase.
    #[error("the private key in {} is encrypted; decrypt it first with `openssl pkey`", path.display())]
    EncryptedKey {
        /// The file.
        path: PathBuf,
    },
    /// The type of its private key is not supported.
    #[error(
        "the private key in {} is not supported; use ECDSA P-256 or P-384, Ed25519, or RSA with 2048 bits or more",
        path.display()
    )]
    UnsupportedKey {
        /// The file.
        path: PathBuf,
    },
    /// The private key does not match the certificate.
    #[error(
        "the private key in {} does not belong to the first certificate in {}",
        key.display(), certificate.display()
    )]
    KeyMismatch {
        /// The file of the key.
        key: PathBuf,
        /// The file of the certificate.
        certificate: PathBuf,
    },
    /// It contains no revocation list.
    #[error("{} contains no revocation list (PEM, BEGIN X509 CRL)", path.display())]
    NoCrl {
        /// The file.
        path: PathBuf,
    },
}

/// Reads a file. Blocks on the file system.
pub fn read_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, Error> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let mut bytes = Zeroizing::new(Vec::new());
    File::open(path)
        .map_err(failed)?
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(Error::TooLarge { path: path.to_owned() });
    }
    Ok(bytes)
}

/// The certificates in `pem`, the contents of `path`; at least one.
pub fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let certificates: Vec<_> = sections(path, pem)?;
    if certificates.is_empty() {
        return Err(Error::NoCertificate { path: path.to_owned() });
    }
    Ok(certificates)
}

/// The revocation lists in `pem`, the contents of `path`; at least one.
pub(super) fn crls(
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateRevocationListDer<'static>>, Error> {
    let crls: Vec<_> = sections(path, pem)?;
    if crls.is_empty() {
        return Err(Error::NoCrl { path: path.to_owned() });
    }
    Ok(crls)
}

/// The first private key in `pem`, the contents of `path`.
pub fn private_key(path: &Path, pem: &[u8]) -> Result<PrivateKeyDer<'static>, Error> {
    const ENCRYPTED: [&[u8]; 2] = [b"BEGIN ENCRYPTED PRIVATE KEY", b"Proc-Type: 4,ENCRYPTED"];
    if ENCRYPTED.iter().any(|mark| memchr::memmem::find(pem, mark).is_some()) {
        return Err(Error::EncryptedKey { path: path.to_owned() });
    }
    PrivateKeyDer::from_pem_slice(without_byte_order_mark(pem)).map_err(|error| match error {
        PemError::NoItemsFound => Error::NoKey { path: path.to_owned() },
        // Its text may quote the contents.
        _ => Error::InvalidPem { path: path.to_owned() },
    })
}

/// Combines a certificate chain, leaf first, with the private key of its leaf. Each comes with its file.
pub fn certified_key(
    (certificate_file, chain): (&Path, Vec<CertificateDer<'static>>),
    (key_file, key): (&Path, PrivateKeyDer<'static>),
) -> Result<CertifiedKey, Error> {
    let provider = ring::default_provider();
    let parsed = chain.first().and_then(|leaf| parse_x509_certificate(leaf).ok());
    if parsed.is_some_and(|(_, leaf)| leaf.version() != X509Version::V3) {
        return Err(Error::X509Version1 { path: certificate_file.to_owned() });
    }
    CertifiedKey::from_der(chain, key, &provider).map_err(|error| match error {
        TlsError::InconsistentKeys(_) => Error::KeyMismatch {
            key: key_file.to_owned(),
            certificate: certificate_file.to_owned(),
        },
        TlsError::InvalidCertificate(_) => {
            Error::InvalidCertificate { path: certificate_file.to_owned() }
        }
        _ => Error::UnsupportedKey { path: key_file.to_owned() },
    })
}

fn sections<T: PemObject>(path: &Path, pem: &[u8]) -> Result<Vec<T>, Error> {
    let sections = T::pem_slice_iter(without_byte_order_mark(pem)).collect::<Result<_, _>>();
    sections.map_err(|_| Error::InvalidPem { path: path.to_owned() })
}
