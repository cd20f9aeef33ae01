//! Client certificates: of SDKs, which the listener requires or accepts, and of an edge, which its
//! upstream requires.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use parapet::http::response;
use parapet::server::{
    self, ConnectionInfo, ConnectionLimits, Drain, HttpService, ServiceResponse,
};
use parapet::tls::{self, ClientAuth, ClientVerification, KeyPairFiles, NegotiatedTls};
use reqwest::StatusCode;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;

use super::certificate_authority::{IssuedCertificate, TestAuthority};
use super::{
    ADMIN, CLIENT, FEATURES, FLAGS, TIMEOUT, TlsParapet, features_status, handshake_sample,
    offline, run_parapet,
};
use crate::rig::{Parapet, Setup, wait_until};

/// Serial numbers of a revoked certificate and of a valid one.
const REVOKED_SERIAL: u64 = 7;
const VALID_SERIAL: u64 = 8;

/// Clients with a valid certificate, a revoked one, one of another authority, and none.
struct ClientSet {
    valid: reqwest::Client,
    revoked: reqwest::Client,
    foreign: reqwest::Client,
    without_certificate: reqwest::Client,
}

impl ClientSet {
    fn new(authority: &TestAuthority) -> Self {
        let with = |issued: &IssuedCertificate| authority.http_client_with(issued).build().unwrap();
        Self {
            valid: with(&authority.client(VALID_SERIAL)),
            revoked: with(&authority.client(REVOKED_SERIAL)),
            foreign: with(&TestAuthority::new().client(VALID_SERIAL)),
            without_certificate: authority.http_client().build().unwrap(),
        }
    }
}

fn with_client_auth(authority: &TestAuthority, auth: &str) -> Setup {
    let setup = offline(authority, &[authority.loopback_files("tls")]);
    let setup =
        setup.flag("--tls-client-ca-file", authority.file()).flag("--tls-client-auth", auth);
    setup.flag("--tls-crl-file", authority.write("crl.pem", authority.crl(&[REVOKED_SERIAL])))
}

#[tokio::test]
async fn required_client_certificate_must_be_valid_and_not_revoked() {
    let authority = TestAuthority::new();
    let everybody = ClientSet::new(&authority);
    let parapet = TlsParapet::start(with_client_auth(&authority, "required")).await;
    let url = parapet.url(FEATURES);
    assert_eq!(features_status(&everybody.valid, &url).await.unwrap(), StatusCode::OK);
    for client in [&everybody.revoked, &everybody.foreign, &everybody.without_certificate] {
        assert!(features_status(client, &url).await.is_err());
    }
    parapet.wait_for_metric(&handshake_sample("none", "client_certificate"), 3).await;
    // A probe has no certificate, so it uses the admin listener.
    let (port, admin) = (parapet.address.port(), parapet.parapet.admin_url());
    let settings = [
        ("TLS_ENABLE", "true".into()),
        ("TLS_CLIENT_CA_FILE", authority.file().into()),
        ("TLS_SERVER_PORT", port.to_string().into()),
        ("ADMIN_PORT", admin.rsplit(':').next().unwrap().into()),
    ];
    for probe in ["health", "ready"] {
        let output = run_parapet(&[probe], &settings);
        assert!(output.status.success(), "{output:?}");
    }

    // A revoked certificate is rejected from the next connection on, even if it was accepted before.
    authority.write("crl.pem", authority.crl(&[REVOKED_SERIAL, VALID_SERIAL]));
    wait_until("the certificate is refused", TIMEOUT, async || {
        features_status(&everybody.valid, &url).await.is_err().then_some(())
    })
    .await;
    // No session is resumed, so a revoked certificate cannot use an earlier one.
    assert_eq!(parapet.metric(&handshake_sample("1.3", "resumed")).await, 0);
}

#[tokio::test]
async fn optional_client_certificate_may_be_missing_but_not_invalid() {
    let authority = TestAuthority::new();
    let everybody = ClientSet::new(&authority);
    let parapet = TlsParapet::start(with_client_auth(&authority, "optional")).await;
    let url = parapet.url(FEATURES);
    for client in [&everybody.valid, &everybody.without_certificate] {
        assert_eq!(features_status(client, &url).await.unwrap(), StatusCode::OK);
    }
    for client in [&everybody.revoked, &everybody.foreign] {
        assert!(features_status(client, &url).await.is_err());
    }
    parapet.wait_for_metric(&handshake_sample("none", "client_certificate"), 2).await;
}

/// Responds with what it knows about a request's connection.
struct ConnectionInfoService;

impl HttpService for ConnectionInfoService {
    fn call(
        self: &Arc<Self>,
        _: Request<Incoming>,
        connection: &Arc<ConnectionInfo>,
    ) -> ServiceResponse {
        let ConnectionInfo { peer, tls } = &**connection;
        let Some(NegotiatedTls { version, alpn, client_certificate }) = tls else {
            panic!("it is not encrypted")
        };
        let client =
            client_certificate.as_ref().map(|it| (it.subject(), it.names(), it.fingerprint()));
        let description = format!("{} {} {alpn:?} {client:?}", peer.ip(), version.as_str());
        ServiceResponse::Ready(response::json_text(description))
    }
}

#[tokio::test]
async fn handler_gets_tls_version_protocol_and_client_certificate() {
    let authority = TestAuthority::new();
    let files = authority.loopback_files("tls");
    let config = tls::Config {
        listener: "data",
        key_pairs: vec![KeyPairFiles { certificate_file: files.certificate, key_file: files.key }],
        min_version: tls::Version::Tls12,
        client_verification: Some(ClientVerification {
            ca_file: authority.file(),
            auth: ClientAuth::Optional,
            crl_file: None,
        }),
        handshake_timeout: Duration::from_secs(10),
        max_handshakes: 10,
    };
    let limits = ConnectionLimits {
        max_connections: 10,
        max_connections_per_address: None,
        header_read_timeout: TIMEOUT,
        idle_timeout: TIMEOUT,
        max_age: None,
    };
    let tls = Some(tls::TlsAcceptor::new(config).unwrap());
    let config = server::Config { limits, load_balancers: Vec::new(), tls };
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", socket.local_addr().unwrap());
    let served =
        server::serve(socket, Arc::new(ConnectionInfoService), config, Drain::default(), TIMEOUT);
    let requests = async {
        let fetch = async |client: reqwest::ClientBuilder| {
            client.build().unwrap().get(&url).send().await.unwrap().text().await.unwrap()
        };
        let issued = authority.client(VALID_SERIAL);
        let hash: [u8; 32] = Sha256::digest(issued.der()).into();
        let names = ["spiffe://flags.test/checkout"];
        let expected =
            format!("127.0.0.1 1.3 Some(H2) {:?}", Some(("CN=checkout", &names[..], &hash)));
        assert_eq!(fetch(authority.http_client_with(&issued)).await, expected);
        let description = fetch(authority.http_client().http1_only()).await;
        assert_eq!(description, "127.0.0.1 1.3 Some(Http1) None");
        let old = authority.http_client().tls_version_max(reqwest::tls::Version::TLS_1_2);
        assert_eq!(fetch(old).await, "127.0.0.1 1.2 Some(H2) None");
    };
    tokio::select! {
        () = served => panic!("it was not stopped"),
        () = requests => {}
    }
}

/// Writes a certificate and its key into a PKCS #12 file, as operators do.
fn export_pkcs12(issued: &Path, passphrase: &str) -> std::path::PathBuf {
    let file = issued.with_extension("p12");
    let mut command = Command::new("openssl");
    command
        .args(["pkcs12", "-export", "-name", "edge"])
        .arg("-in")
        .arg(issued)
        .arg("-out")
        .arg(&file);
    command.arg("-passout").arg(format!("pass:{passphrase}"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    file
}

#[tokio::test]
async fn edge_presents_its_client_certificate_from_every_file_format() {
    const PASSPHRASE: &str = "open, says the edge";
    let authority = TestAuthority::new();
    let files = authority.loopback_files("upstream");
    let upstream =
        Parapet::mode("standalone").flag("--flags", authority.write("flags.json", FLAGS));
    let upstream =
        upstream.env("INIT_CLIENT_API_TOKENS", CLIENT).env("INIT_ADMIN_API_TOKENS", ADMIN);
    let upstream = upstream
        .flag("--admin-tls-cert", &files.certificate)
        .flag("--admin-tls-key", &files.key)
        .flag("--admin-tls-client-ca-file", authority.file())
        .start()
        .await;
    let url = upstream.admin_url().replace("http:", "https:");
    let edge = || {
        let edge = Parapet::edge(&url).env("UPSTREAM_CERTIFICATE_FILE", authority.file());
        edge.admin_token(ADMIN).with_short_intervals()
    };
    let issued = authority.client(VALID_SERIAL);
    let pair = issued.write_files(&authority, "edge");
    let both = authority.write("edge.pem", issued.certificate.clone() + &issued.key);
    let forms = [
        vec![("PEM_CERT_FILE", both.clone().into_os_string())],
        vec![
            ("PKCS12_IDENTITY_FILE", export_pkcs12(&both, PASSPHRASE).into()),
            ("PKCS12_PASSPHRASE", PASSPHRASE.into()),
        ],
        vec![
            ("PKCS8_CLIENT_CERTIFICATE_FILE", pair.certificate.into()),
            ("PKCS8_CLIENT_KEY_FILE", pair.key.into()),
        ],
    ];
    for form in forms {
        let name = form[0].0;
        let edge = form.into_iter().fold(edge(), |edge, (name, value)| edge.env(name, value));
        let edge = edge.start().await;
        let (status, flags) = edge.get(FEATURES, CLIENT).await;
        assert_eq!(
            (status, &flags["features"][0]["name"]),
            (StatusCode::OK, &json!("a")),
            "{name}"
        );
    }
    let refused = "parapet_tls_handshakes_total{listener=\"admin\",version=\"none\",outcome=\"client_certificate\"}";
    assert_eq!(upstream.metric(refused).await, None);
    let stranger = edge().start_listening().await;
    wait_until("upstream refuses an edge without a certificate", TIMEOUT, async || {
        upstream.metric(refused).await.filter(|&count| count > 0.5)
    })
    .await;
    assert_eq!(stranger.features_status(CLIENT).await, StatusCode::SERVICE_UNAVAILABLE);
    // Usually the edge receives the alert with the reason, but not if its connection is closed before it
    // sends the request.
    stranger.wait_until_printed("the connection to upstream broke").await;
}
