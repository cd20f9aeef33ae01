//! A certificate authority that only the tests trust, and its certificates, in files as operators have
//! them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, PublicKeyData as _,
    RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

/// Signs certificates. Its directory is for any files of the tests.
pub(crate) struct TestAuthority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

/// A certificate and its key, both PEM.
pub(crate) struct IssuedCertificate {
    pub(crate) certificate: String,
    pub(crate) key: String,
    der: CertificateDer<'static>,
    /// The SHA-256 of its public key, in base64.
    pub(crate) public_key_hash: String,
}

/// The paths of a certificate and its key.
pub(crate) struct CertificateFiles {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl TestAuthority {
    pub(crate) fn new() -> Self {
        // Fails if a provider is installed already, which is the same one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority of the tests");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::Builder::new().prefix("authority-").tempdir().unwrap();
        let authority = Self { issuer, folder };
        authority.write("ca.crt", authority.issuer.pem());
        authority
    }

    /// The path of the authority's certificate, in PEM.
    pub(crate) fn file(&self) -> PathBuf {
        self.path("ca.crt")
    }

    /// A path in its directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file into its directory, in place.
    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, contents).unwrap();
        path
    }

    fn issue(
        &self,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> IssuedCertificate {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let public_key_hash =
            STANDARD.encode(Sha256::digest(key.subject_public_key_info()).as_slice());
        let (pem, key) = (certificate.pem(), key.serialize_pem());
        IssuedCertificate { certificate: pem, key, der: certificate.into(), public_key_hash }
    }

    /// A server's certificate.
    pub(crate) fn server(&self, names: &[&str]) -> IssuedCertificate {
        self.issue(names, |_| {})
    }

    /// A server's certificate that expires in this number of days, which may be negative.
    pub(crate) fn server_for_days(&self, names: &[&str], days: i64) -> IssuedCertificate {
        let until = Timestamp::now() + SignedDuration::from_hours(24 * days);
        let seconds = until.as_second().try_into().unwrap();
        self.issue(names, |params| {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds);
        })
    }

    /// A client's certificate with this serial number.
    pub(crate) fn client(&self, serial: u64) -> IssuedCertificate {
        self.issue(&[], |params| {
            params.serial_number = Some(SerialNumber::from(serial));
            params.distinguished_name.push(DnType::CommonName, "checkout");
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            let uri = "spiffe://flags.test/checkout".try_into().unwrap();
            params.subject_alt_names = vec![SanType::URI(uri)];
        })
    }

    /// Its certificate revocation list with these serial numbers.
    pub(crate) fn crl(&self, revoked: &[u64]) -> String {
        let revoked = revoked.iter().map(|&serial| RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(4000, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    /// A certificate for this machine, in the files `<name>.crt` and `<name>.key`.
    pub(crate) fn loopback_files(&self, name: &str) -> CertificateFiles {
        self.server(&["localhost", "127.0.0.1"]).write_files(self, name)
    }

    /// A client that trusts only this authority. Like the rig's client, it keeps no idle connections.
    pub(crate) fn http_client(&self) -> reqwest::ClientBuilder {
        let root = reqwest::Certificate::from_der(self.issuer.der()).unwrap();
        let client = reqwest::Client::builder().tls_certs_only([root]).no_proxy();
        client.pool_max_idle_per_host(0).timeout(Duration::from_secs(30))
    }

    /// A client with a client certificate.
    pub(crate) fn http_client_with(&self, client: &IssuedCertificate) -> reqwest::ClientBuilder {
        let identity = client.certificate.clone() + &client.key;
        self.http_client().identity(reqwest::Identity::from_pem(identity.as_bytes()).unwrap())
    }

    /// A TLS client configuration that trusts only this authority.
    pub(crate) fn client_config(&self) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()
    }
}

impl IssuedCertificate {
    /// Writes it to `<name>.crt` and `<name>.key` in the authority's directory.
    pub(crate) fn write_files(&self, authority: &TestAuthority, name: &str) -> CertificateFiles {
        CertificateFiles {
            certificate: authority.write(&format!("{name}.crt"), &self.certificate),
            key: authority.write(&format!("{name}.key"), &self.key),
        }
    }

    /// The certificate as it is sent.
    pub(crate) fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }
}

impl CertificateFiles {
    /// The paths of certificate and key.
    pub(crate) fn paths(&self) -> [&Path; 2] {
        [&self.certificate, &self.key]
    }
}
