//! Handshakes with real clients over in-memory streams, and reloads of changed files.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use metrics_exporter_prometheus::PrometheusBuilder;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SanType, SerialNumber, date_time_ymd,
};
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, RootCertStore, SupportedProtocolVersion,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    version::{TLS12, TLS13},
};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    time::Instant,
};
use tokio_rustls::{TlsConnector, client};

use super::{watch::WatchState, *};

type HandshakeOutcome =
    Result<(tokio_rustls::server::TlsStream<DuplexStream>, NegotiatedTls), HandshakeError>;

/// A certificate authority, and a folder for files.
struct TestAuthority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

/// A certificate and its key in PEM.
struct IssuedCertificate {
    certificate: String,
    key: String,
}

impl TestAuthority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self { issuer, folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn issue(
        &self,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> IssuedCertificate {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, "leaf");
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        IssuedCertificate { certificate, key: key.serialize_pem() }
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// Issues a certificate for `names` and writes it and its key to files.
    fn write_key_pair(&self, file: &str, names: &[&str]) -> KeyPairFiles {
        let IssuedCertificate { certificate, key } = self.issue(names, |_| {});
        KeyPairFiles {
            certificate_file: self.write(&format!("{file}.crt"), &certificate),
            key_file: self.write(&format!("{file}.key"), &key),
        }
    }

    fn config(key_pairs: Vec<KeyPairFiles>) -> Config {
        Config {
            listener: "data",
            key_pairs,
            min_version: Version::Tls12,
            client_verification: None,
            handshake_timeout: Duration::from_secs(10),
            max_handshakes: 256,
        }
    }

    /// An acceptor with a certificate for `localhost`.
    fn acceptor(&self, change: impl FnOnce(&mut Config)) -> TlsAcceptor {
        let mut config = Self::config(vec![self.write_key_pair("tls", &["localhost"])]);
        change(&mut config);
        TlsAcceptor::new(config).unwrap()
    }

    /// An acceptor with a certificate for `localhost` that accepts client certificates of the authority.
    fn acceptor_with_client_auth(
        &self,
        auth: ClientAuth,
        crl_file: Option<PathBuf>,
    ) -> TlsAcceptor {
        let ca_file = self.write("ca.crt", &self.issuer.pem());
        self.acceptor(|config| {
            config.client_verification = Some(ClientVerification { ca_file, auth, crl_file });
        })
    }

    fn client_config(&self, identity: Option<&IssuedCertificate>) -> ClientConfig {
        self.client_config_for(&[&TLS13, &TLS12], identity)
    }

    fn client_config_for(
        &self,
        versions: &[&'static SupportedProtocolVersion],
        identity: Option<&IssuedCertificate>,
    ) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots);
        match identity {
            None => builder.with_no_client_auth(),
            Some(made) => {
                let key = PrivateKeyDer::from_pem_slice(made.key.as_bytes()).unwrap();
                builder.with_client_auth_cert(vec![made.der()], key).unwrap()
            }
        }
    }

    /// Issues a client certificate with a serial number.
    fn issue_client_certificate(&self, serial: u64) -> IssuedCertificate {
        self.issue(&[], |params| {
            params.serial_number = Some(SerialNumber::from(serial));
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            let uri = "spiffe://flags.test/sdk".try_into().unwrap();
            params.subject_alt_names = vec![SanType::URI(uri)];
        })
    }

    fn crl(&self, revoked: &[u64], next_update: i32) -> String {
        let revoked = revoked.iter().map(|&serial| RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2023, 1, 1),
            next_update: date_time_ymd(next_update, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

impl IssuedCertificate {
    fn der(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap()
    }
}

/// Performs a handshake and returns its outcome on both sides. A client that the server accepts reads
/// one byte from it, which the server sends after the session tickets.
async fn connect(
    server: &TlsAcceptor,
    config: ClientConfig,
    name: &'static str,
) -> (HandshakeOutcome, std::io::Result<client::TlsStream<DuplexStream>>) {
    let (ours, theirs) = duplex(64 << 10);
    let served = async {
        let mut outcome = server.handshake(ours).await;
        if let Ok((stream, _)) = &mut outcome {
            stream.write_all(b"!").await.unwrap();
            stream.flush().await.unwrap();
        }
        outcome
    };
    let connected = async {
        let name = ServerName::try_from(name).unwrap();
        let mut stream = TlsConnector::from(Arc::new(config)).connect(name, theirs).await?;
        stream.read_u8().await?;
        Ok(stream)
    };
    tokio::join!(served, connected)
}

/// The certificate that the acceptor presents for `name`.
async fn presented_certificate(
    authority: &TestAuthority,
    server: &TlsAcceptor,
    name: &'static str,
) -> CertificateDer<'static> {
    let (outcome, client) = connect(server, authority.client_config(None), name).await;
    outcome.unwrap();
    client.unwrap().get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

fn certificate_in(file: &Path) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(file).unwrap()
}

#[tokio::test]
async fn server_name_selects_the_certificate_and_the_first_is_the_default() {
    let authority = TestAuthority::new();
    let pairs = vec![
        authority.write_key_pair("a", &["a.test", "unknown.test"]),
        authority.write_key_pair("b", &["b.test"]),
        authority.write_key_pair("wildcard", &["*.c.test"]),
    ];
    let files: Vec<_> = pairs.iter().map(|pair| certificate_in(&pair.certificate_file)).collect();
    let server = TlsAcceptor::new(TestAuthority::config(pairs)).unwrap();
    for (name, expected) in [("a.test", 0), ("b.test", 1), ("x.c.test", 2), ("unknown.test", 0)] {
        assert_eq!(
            presented_certificate(&authority, &server, name).await,
            files[expected],
            "{name}"
        );
    }
}

#[tokio::test]
async fn key_type_selects_among_certificates_of_one_name() {
    let authority = TestAuthority::new();
    let KeyPairFiles { certificate_file, key_file } =
        authority.write_key_pair("ecdsa", &["localhost"]);
    let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let params = CertificateParams::new(["localhost".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &authority.issuer).unwrap().pem();
    let ed25519 = KeyPairFiles {
        certificate_file: authority.write("ed25519.crt", &certificate),
        key_file: authority.write("ed25519.key", &key.serialize_pem()),
    };
    let ecdsa = certificate_in(&certificate_file);
    let pairs = vec![ed25519.clone(), KeyPairFiles { certificate_file, key_file }];
    let server = TlsAcceptor::new(TestAuthority::config(pairs)).unwrap();
    assert_eq!(
        presented_certificate(&authority, &server, "localhost").await,
        certificate_in(&ed25519.certificate_file)
    );
    // Like a browser, the client verifies ECDSA only.
    let mut provider = ring::default_provider();
    let all = provider.signature_verification_algorithms;
    let is_ecdsa = |scheme: &rustls::SignatureScheme| {
        *scheme == rustls::SignatureScheme::ECDSA_NISTP256_SHA256
    };
    let mapping: Vec<_> =
        all.mapping.iter().filter(|(scheme, _)| is_ecdsa(scheme)).copied().collect();
    provider.signature_verification_algorithms.mapping = Vec::leak(mapping);
    let mut roots = RootCertStore::empty();
    roots.add(authority.issuer.der().clone()).unwrap();
    let client = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (_, client) = connect(&server, client, "localhost").await;
    assert_eq!(client.unwrap().get_ref().1.peer_certificates().unwrap()[0], ecdsa);
}

#[tokio::test]
async fn handshake_returns_tls_version_and_alpn_protocol() {
    let authority = TestAuthority::new();
    let server = authority.acceptor(|_| {});
    for (versions, version) in [(&TLS12, Version::Tls12), (&TLS13, Version::Tls13)] {
        for (offered, alpn) in [
            (&["http/1.1", "h2"][..], Some(Alpn::H2)),
            (&["http/1.1"], Some(Alpn::Http1)),
            (&[], None),
        ] {
            let mut client = authority.client_config_for(&[versions], None);
            client.alpn_protocols = offered.iter().map(|it| it.as_bytes().to_vec()).collect();
            let (outcome, client) = connect(&server, client, "localhost").await;
            assert_eq!(
                outcome.unwrap().1,
                NegotiatedTls { version, alpn, client_certificate: None }
            );
            let agreed = client.unwrap().get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
            assert_eq!(agreed, alpn.map(|it| it.as_bytes().to_vec()));
        }
    }
    let mut client = authority.client_config(None);
    client.alpn_protocols = vec![b"spdy/1".to_vec()];
    assert!(connect(&server, client, "localhost").await.1.is_err());
}

#[tokio::test]
async fn version_below_the_minimum_is_rejected() {
    let authority = TestAuthority::new();
    let server = authority.acceptor(|config| config.min_version = Version::Tls13);
    let (outcome, client) =
        connect(&server, authority.client_config_for(&[&TLS12], None), "localhost").await;
    assert!(matches!(outcome, Err(HandshakeError::Failed(_))), "{outcome:?}");
    assert!(client.is_err());
    let (outcome, _) = connect(&server, authority.client_config(None), "localhost").await;
    assert_eq!(outcome.unwrap().1.version, Version::Tls13);
}

#[test]
fn errors_in_all_files_are_reported_at_once() {
    let authority = TestAuthority::new();
    let good = authority.write_key_pair("good", &["a.test"]);
    let other = authority.write_key_pair("other", &["b.test"]);
    let encrypted =
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let pairs = vec![
        KeyPairFiles { key_file: other.key_file, ..good.clone() },
        KeyPairFiles {
            certificate_file: authority.path("missing.crt"),
            key_file: good.certificate_file.clone(),
        },
        KeyPairFiles {
            certificate_file: good.key_file.clone(),
            key_file: authority.write("encrypted.key", encrypted),
        },
    ];
    let clients = ClientVerification {
        ca_file: authority.write("damaged.crt", "-----BEGIN CERTIFICATE-----\n!\n"),
        auth: ClientAuth::Required,
        crl_file: Some(good.certificate_file),
    };
    let config = Config { client_verification: Some(clients), ..TestAuthority::config(pairs) };
    let problems = TlsAcceptor::new(config).expect_err("no file is valid");
    let folder = format!("{}/", authority.folder.path().display());
    let found: Vec<_> =
        problems.iter().map(|it| (it.setting, it.reason.replace(&folder, ""))).collect();
    let expected = [
        (
            FileSetting::Key,
            "the private key in other.key does not belong to the first certificate in good.crt",
        ),
        (
            FileSetting::Certificate,
            "cannot read missing.crt: No such file or directory (os error 2)",
        ),
        (FileSetting::Key, "good.crt contains no private key (PEM: PKCS #8, PKCS #1 or SEC 1)"),
        (FileSetting::Certificate, "good.key contains no certificate (PEM, BEGIN CERTIFICATE)"),
        (
            FileSetting::Key,
            "the private key in encrypted.key is encrypted; decrypt it first with `openssl pkey`",
        ),
        (FileSetting::ClientCa, "damaged.crt is damaged: its PEM sections cannot be decoded"),
        (FileSetting::Crl, "good.crt contains no revocation list (PEM, BEGIN X509 CRL)"),
    ];
    assert_eq!(found, expected.map(|(setting, reason)| (setting, reason.to_owned())));
}

/// Output of `openssl x509 -req` without extensions.
const VERSION_1: &str = "\
-----BEGIN CERTIFICATE-----
MIIBFjCBvQIUIu9Pt1RkBA3yd9UBFCmBD08QuBAwCgYIKoZIzj0EAwIwDTELMAkG
A1UEAwwCdjEwIBcNMjYxMTI5MTg0ODA4WhgPMjEyNjExMDUxODQ4MDhaMA0xCzAJ
BgNVBAMMAnYxMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE+h6sTr+OUfg5Cfp3
rRlWMvPbvH7ZttTezNcIRgu0uUcEibcdx8SSzwpJ0IYpAUU/XB0cE8v2+5c9cv/O
O3iGrjAKBggqhkjOPQQDAgNIADBFAiAimULd2OWmljVmwatBmMKnOJqQ7Jidybht
9EjvXkwj3QIhAJArAjMjYQSEglR1Esca61ValnanKHXlD7/0XrANYHHk
-----END CERTIFICATE-----
";

#[test]
fn x509_version_1_certificate_has_its_own_error() {
    let authority = TestAuthority::new();
    let IssuedCertificate { key, .. } = authority.issue(&[], |_| {});
    let pair = KeyPairFiles {
        certificate_file: authority.write("old.crt", VERSION_1),
        key_file: authority.write("old.key", &key),
    };
    let problems = TlsAcceptor::new(TestAuthority::config(vec![pair])).expect_err("too old");
    let problem = problems.iter().next().unwrap();
    assert_eq!(problem.setting, FileSetting::Certificate);
    assert!(problem.reason.contains("old.crt is of X.509 version 1"), "{problem:?}");
}

#[test]
fn expired_certificate_causes_a_warning_and_no_error() {
    let authority = TestAuthority::new();
    let day = SignedDuration::from_hours(24);
    let now = Timestamp::now();
    let check = |from: SignedDuration, until: SignedDuration, expected: Option<&str>| {
        let at = |since: SignedDuration| {
            let seconds = (now + since).as_second().try_into().unwrap();
            date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds)
        };
        let made = authority.issue(&["localhost"], |params| {
            (params.not_before, params.not_after) = (at(from), at(until));
        });
        let pair = KeyPairFiles {
            certificate_file: authority.write("tls.crt", &made.certificate),
            key_file: authority.write("tls.key", &made.key),
        };
        let server = TlsAcceptor::new(TestAuthority::config(vec![pair])).unwrap();
        let warnings = server.warnings(now);
        match expected {
            Some(text) => {
                assert!(warnings.len() == 1 && warnings[0].contains(text), "{warnings:?}");
            }
            None => assert_eq!(warnings, [""; 0]),
        }
        let expires_in = server.certificates()[0].expires_in(now);
        assert!((expires_in - until).abs() < SignedDuration::from_secs(1), "{expires_in:?}");
    };
    check(-day * 30, -day, Some("tls.crt expired at "));
    check(-day, day * 13, Some("tls.crt expires at "));
    check(-day, day * 15, None);
    check(day, day * 90, Some("tls.crt is not valid before "));
}

#[tokio::test]
async fn revoked_or_foreign_client_certificate_is_rejected() {
    let authority = TestAuthority::new();
    let good = authority.issue_client_certificate(7);
    let revoked = authority.issue_client_certificate(8);
    let foreign = TestAuthority::new().issue_client_certificate(7);
    let crl = authority.write("clients.crl", &authority.crl(&[8], 2124));
    for auth in [ClientAuth::Required, ClientAuth::Optional] {
        let server = authority.acceptor_with_client_auth(auth, Some(crl.clone()));
        let (outcome, client) =
            connect(&server, authority.client_config(Some(&good)), "localhost").await;
        client.unwrap();
        let certificate = outcome.unwrap().1.client_certificate.unwrap();
        assert_eq!(certificate.subject(), "CN=leaf");
        assert_eq!(certificate.names(), ["spiffe://flags.test/sdk"]);
        assert_eq!(certificate.fingerprint()[..], Sha256::digest(good.der())[..]);
        for wrong in [&revoked, &foreign] {
            let (outcome, client) =
                connect(&server, authority.client_config(Some(wrong)), "localhost").await;
            assert!(matches!(outcome, Err(HandshakeError::ClientCertificate(_))), "{outcome:?}");
            assert!(client.is_err(), "an alert is sent");
        }
        let (outcome, client) = connect(&server, authority.client_config(None), "localhost").await;
        match auth {
            ClientAuth::Required => {
                let is_refused = matches!(outcome, Err(HandshakeError::ClientCertificate(_)));
                assert!(is_refused && client.is_err(), "{outcome:?}");
            }
            ClientAuth::Optional => {
                client.unwrap();
                assert_eq!(outcome.unwrap().1.client_certificate, None);
            }
        }
    }
}

#[tokio::test]
async fn revocation_takes_effect_when_the_list_changes() {
    let authority = TestAuthority::new();
    let crl = authority.write("clients.crl", &authority.crl(&[], 2024));
    let server = authority.acceptor_with_client_auth(ClientAuth::Required, Some(crl));
    let warnings = server.warnings(Timestamp::now());
    assert!(
        warnings[0].contains("clients.crl has been out of date since 2024-01-01"),
        "{warnings:?}"
    );
    let identity = authority.issue_client_certificate(7);
    // One configuration for all connections, so that the client would resume its session if it had a
    // ticket.
    let client = authority.client_config(Some(&identity));
    for _ in 0..2 {
        let (outcome, client) = connect(&server, client.clone(), "localhost").await;
        outcome.unwrap();
        assert_eq!(client.unwrap().get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
    }
    authority.write("clients.crl", &authority.crl(&[7], 2124));
    let mut watch = WatchState::default();
    assert!(!server.check_files(&mut watch).await, "the list may not be complete yet");
    assert!(server.check_files(&mut watch).await);
    let (outcome, client) = connect(&server, client, "localhost").await;
    assert!(matches!(outcome, Err(HandshakeError::ClientCertificate(_))), "{outcome:?}");
    assert!(client.is_err());
    assert_eq!(server.warnings(Timestamp::now()), [""; 0]);
}

#[tokio::test]
async fn session_can_be_resumed_after_a_certificate_reload() {
    let authority = TestAuthority::new();
    for versions in [&TLS12, &TLS13] {
        let server = authority.acceptor(|_| {});
        let client = authority.client_config_for(&[versions], None);
        let kind = async || {
            let (outcome, client) = connect(&server, client.clone(), "localhost").await;
            let of_server = outcome.unwrap().0.get_ref().1.handshake_kind();
            let of_client = client.unwrap().get_ref().1.handshake_kind();
            assert_eq!(of_server, of_client);
            of_client
        };
        assert_eq!(kind().await, Some(HandshakeKind::Full));
        assert_eq!(kind().await, Some(HandshakeKind::Resumed));
        authority.write_key_pair("tls", &["localhost"]);
        let mut watch = WatchState::default();
        server.check_files(&mut watch).await;
        assert!(server.check_files(&mut watch).await);
        assert_eq!(kind().await, Some(HandshakeKind::Resumed));
        // Early data is disabled, because an attacker could replay it.
        let tls = server.server_config();
        assert_eq!((tls.max_early_data_size, tls.send_half_rtt_data), (0, false));
    }
}

/// Kubernetes mounts a secret as symbolic links to a symbolic link, which it replaces.
#[tokio::test]
async fn certificate_is_replaced_when_a_mounted_secret_is_swapped() {
    let authority = TestAuthority::new();
    let mount = |version: &str| {
        let folder = authority.path(version);
        fs::create_dir(&folder).unwrap();
        let IssuedCertificate { certificate, key } = authority.issue(&["localhost"], |_| {});
        fs::write(folder.join("tls.crt"), certificate).unwrap();
        fs::write(folder.join("tls.key"), key).unwrap();
        std::os::unix::fs::symlink(version, authority.path("..data_tmp")).unwrap();
        fs::rename(authority.path("..data_tmp"), authority.path("..data")).unwrap();
    };
    mount("..1");
    for name in ["tls.crt", "tls.key"] {
        std::os::unix::fs::symlink(Path::new("..data").join(name), authority.path(name)).unwrap();
    }
    let pair = KeyPairFiles {
        certificate_file: authority.path("tls.crt"),
        key_file: authority.path("tls.key"),
    };
    let server = TlsAcceptor::new(TestAuthority::config(vec![pair])).unwrap();
    let mut watch = WatchState::default();
    let first = presented_certificate(&authority, &server, "localhost").await;
    for _ in 0..3 {
        assert!(!server.check_files(&mut watch).await, "nothing has changed");
    }
    mount("..2");
    server.check_files(&mut watch).await;
    assert!(server.check_files(&mut watch).await);
    let second = presented_certificate(&authority, &server, "localhost").await;
    assert_eq!(second, certificate_in(&authority.path("tls.crt")));
    assert_ne!(first, second);
}

#[tokio::test]
async fn invalid_pair_leaves_the_last_valid_one_in_use() {
    let authority = TestAuthority::new();
    let server = authority.acceptor(|_| {});
    let first = certificate_in(&authority.path("tls.crt"));
    let mut watch = WatchState::default();
    let next = authority.issue(&["localhost"], |_| {});
    authority.write("tls.crt", &next.certificate);
    for _ in 0..3 {
        assert!(!server.check_files(&mut watch).await, "the key is another certificate's");
    }
    assert_eq!(presented_certificate(&authority, &server, "localhost").await, first);
    fs::remove_file(authority.path("tls.key")).unwrap();
    for _ in 0..3 {
        assert!(!server.check_files(&mut watch).await, "the key is gone");
    }
    assert_eq!(presented_certificate(&authority, &server, "localhost").await, first);
    authority.write("tls.key", &next.key);
    server.check_files(&mut watch).await;
    assert!(server.check_files(&mut watch).await);
    assert_eq!(presented_certificate(&authority, &server, "localhost").await, next.der());
}

/// The first message of a client.
fn client_hello(authority: &TestAuthority) -> Vec<u8> {
    let name = ServerName::try_from("localhost").unwrap();
    let mut client = ClientConnection::new(Arc::new(authority.client_config(None)), name).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    hello
}

#[tokio::test(start_paused = true)]
async fn stalled_handshake_times_out_and_does_not_delay_others() {
    let authority = TestAuthority::new();
    let server = authority.acceptor(|config| config.max_handshakes = 1);
    let hello = client_hello(&authority);
    let mut stalled = tokio::task::JoinSet::new();
    let mut clients = Vec::new();
    // Each client sends nothing, a part of its first message, or the whole message and nothing
    // afterwards.
    for sent in [&[][..], &hello[..hello.len() / 2], &hello].repeat(50) {
        let (ours, mut theirs) = duplex(64 << 10);
        theirs.write_all(sent).await.unwrap();
        let (server, started) = (server.clone(), Instant::now());
        stalled.spawn(async move { (server.handshake(ours).await.err(), started.elapsed()) });
        clients.push(theirs);
    }
    tokio::task::yield_now().await;
    let started = Instant::now();
    let (outcome, client) = connect(&server, authority.client_config(None), "localhost").await;
    outcome.unwrap();
    client.unwrap();
    assert_eq!(started.elapsed(), Duration::ZERO);
    let deadline = Duration::from_secs(10);
    while let Some(ended) = stalled.join_next().await {
        let (error, took) = ended.unwrap();
        assert!(matches!(error, Some(HandshakeError::TimedOut(after)) if after == deadline));
        assert!(took >= deadline && took < deadline + Duration::from_millis(10), "{took:?}");
    }
}

#[tokio::test]
async fn handshakes_are_counted_by_version_and_outcome() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let registry = recorder.handle();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let authority = TestAuthority::new();
    let server = authority.acceptor(|_| {});
    let client = authority.client_config(None);
    connect(&server, client.clone(), "localhost").await.1.unwrap();
    connect(&server, client, "localhost").await.1.unwrap();
    connect(&server, authority.client_config_for(&[&TLS12], None), "localhost").await.1.unwrap();
    let (ours, theirs) = duplex(1);
    drop(theirs);
    assert!(matches!(server.handshake(ours).await, Err(HandshakeError::Closed)));
    let (ours, mut theirs) = duplex(1024);
    theirs.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(matches!(server.handshake(ours).await, Err(HandshakeError::Failed(_))));
    let text = registry.render();
    for (version, outcome) in [
        ("1.3", "full"),
        ("1.3", "resumed"),
        ("1.2", "full"),
        ("none", "closed"),
        ("none", "failed"),
    ] {
        let line = format!(
            "parapet_tls_handshakes_total{{listener=\"data\",version=\"{version}\",outcome=\"{outcome}\"}} 1"
        );
        assert!(text.lines().any(|it| it == line), "{line}\n{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn watcher_reloads_certificates_and_exports_their_expiry() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let registry = recorder.handle();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let authority = TestAuthority::new();
    let server = authority.acceptor(|_| {});
    authority.write_key_pair("tls", &["localhost"]);
    let replaced = certificate_in(&authority.path("tls.crt"));
    let shows = |text: &str| registry.render().contains(text);
    let watched = async {
        while !shows("parapet_tls_reloads_total{listener=\"data\",outcome=\"applied\"} 1") {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = server.watch_files() => unreachable!("it runs until it is dropped"),
        () = watched => {}
    }
    assert_eq!(presented_certificate(&authority, &server, "localhost").await, replaced);
    let file = authority.path("tls.crt").display().to_string();
    let label = format!("{{listener=\"data\",certificate=\"{file}\"}}");
    assert!(shows(&format!("parapet_tls_certificate_expiry_seconds{label}")));
}
