//! TLS as operators configure it: certificates in files, on either listener and towards upstream.
//!
//! `connections` covers HTTP connections and how they end.

mod certificate_rotation;
mod client_certificates;
mod external_clients;

use std::ffi::OsString;
use std::fmt::Debug;
use std::net::SocketAddr;
use std::process::Output;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use reqwest::StatusCode;
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, ClientConnection};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::in_process_parapet::CLIENT;
use crate::rig::certificate_authority::{self, CertificateFiles, TestAuthority};
use crate::rig::{FEATURES, LogEvent, Parapet, Setup, http, parapet_command, wait_until};

const FLAGS: &str =
    r#"{"features":[{"name":"a","enabled":true,"strategies":[{"name":"default"}]}]}"#;

/// Far above the time of anything here.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Opens the admin listeners in these tests.
const ADMIN: &str = "*:*.admin-of-the-tls-tests-0123456789";

/// `parapet offline` with the flag `a`, with TLS for SDKs by Unleash Edge's environment variables.
fn offline(authority: &TestAuthority, files: &[CertificateFiles]) -> Setup {
    let setup = Parapet::mode("offline").flag("-b", authority.write("flags.json", FLAGS));
    let setup = setup.env("CLIENT_TOKENS", CLIENT).env("INIT_ADMIN_API_TOKENS", ADMIN);
    with_tls(setup, files)
}

fn with_tls(setup: Setup, files: &[CertificateFiles]) -> Setup {
    let list = |index: usize| {
        let mut list = OsString::new();
        for (n, files) in files.iter().enumerate() {
            list.push(if n > 0 { "," } else { "" });
            list.push(files.paths()[index]);
        }
        list
    };
    let setup = setup.env("TLS_ENABLE", "true").env("TLS_SERVER_PORT", "0");
    setup.env("TLS_SERVER_CERT", list(0)).env("TLS_SERVER_KEY", list(1))
}

/// An instance with TLS on its data listener.
struct TlsParapet {
    parapet: Parapet,
    address: SocketAddr,
}

impl TlsParapet {
    /// Starts it, and waits until it listens.
    async fn start(setup: Setup) -> Self {
        let parapet = setup.spawn();
        let address = wait_until("its address is in the log", Duration::from_mins(1), async || {
            assert!(parapet.exit_status().is_none(), "it ended:\n{}", parapet.log());
            let line = parapet.logged(LogEvent::LISTENING).pop()?;
            let address = line.split_whitespace().find_map(|word| word.strip_prefix("data="))?;
            Some(address.parse().unwrap())
        })
        .await;
        Self { parapet, address }
    }

    /// The URL of a path on the data listener.
    fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.address)
    }

    /// A sample from the metrics page, 0 if it is missing. Read from the admin listener, without TLS.
    async fn metric(&self, sample: &str) -> u64 {
        let page = http().get(self.parapet.admin_url() + "/metrics").send().await.unwrap();
        sample_value(&page.text().await.unwrap(), sample)
    }

    /// Waits until a sample has this value, which it must not exceed.
    async fn wait_for_metric(&self, sample: &str, expected: u64) {
        wait_until(&format!("{sample} is {expected}"), TIMEOUT, async || {
            let found = self.metric(sample).await;
            assert!(found <= expected, "{sample} is {found}");
            (found == expected).then_some(())
        })
        .await;
    }

    /// Connects with this server name.
    async fn connect(
        &self,
        config: ClientConfig,
        name: &'static str,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.address).await?;
        TlsConnector::from(Arc::new(config)).connect(name.try_into().unwrap(), stream).await
    }

    /// The certificate that a new client gets for this server name.
    async fn presented_certificate(
        &self,
        authority: &TestAuthority,
        name: &'static str,
    ) -> CertificateDer<'static> {
        let stream = self.connect(authority.client_config(), name).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
    }
}

fn sample_value<T: FromStr<Err: Debug> + Default>(page: &str, sample: &str) -> T {
    let found = page.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    found.map_or_else(T::default, |number| number.parse().unwrap())
}

/// The sample that counts handshakes of the data listener with this version and outcome.
fn handshake_sample(version: &str, outcome: &str) -> String {
    format!(
        "parapet_tls_handshakes_total{{listener=\"data\",version=\"{version}\",outcome=\"{outcome}\"}}"
    )
}

/// The status of the response to this client.
async fn features_status(client: &reqwest::Client, url: &str) -> reqwest::Result<StatusCode> {
    let response = client.get(url).header("authorization", CLIENT).send().await?;
    let status = response.status();
    response.bytes().await?;
    Ok(status)
}

/// Runs `parapet` until it exits, with only these environment variables.
fn run_parapet(args: &[&str], variables: &[(&str, OsString)]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let mut command = parapet_command(&folder);
    command.args(args).envs(variables.iter().map(|(name, value)| (*name, value))).output().unwrap()
}

#[tokio::test]
async fn unencrypted_requests_are_redirected_and_nothing_else_listens_there() {
    let authority = TestAuthority::new();
    let client = authority.http_client().build().unwrap();
    let files = || [authority.loopback_files("tls")];
    let setup = offline(&authority, &files()).env("REDIRECT_HTTP_TO_HTTPS", "true");
    let parapet = TlsParapet::start(setup).await;
    assert_eq!(features_status(&client, &parapet.url(FEATURES)).await.unwrap(), StatusCode::OK);
    let plain = http().post(parapet.parapet.url() + "/edge/validate?a=b").body("{}");
    let response = plain.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::PERMANENT_REDIRECT);
    assert_eq!(response.headers()["location"], parapet.url("/edge/validate?a=b").as_str());
    // Bytes that are not TLS close the connection, and are no request.
    let mut stream = TcpStream::connect(parapet.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut response = Vec::new();
    let _ = stream.read_to_end(&mut response).await;
    assert!(!response.starts_with(b"HTTP"), "{response:?}");
    parapet.wait_for_metric(&handshake_sample("none", "failed"), 1).await;

    let parapet = TlsParapet::start(offline(&authority, &files())).await;
    assert_eq!(features_status(&client, &parapet.url(FEATURES)).await.unwrap(), StatusCode::OK);
    assert!(http().get(parapet.parapet.url()).send().await.unwrap_err().is_connect());
}

#[tokio::test]
async fn server_name_selects_the_certificate() {
    let authority = TestAuthority::new();
    let issued = [&["localhost", "127.0.0.1", "other.test"][..], &["b.test"], &["*.c.test"]];
    let issued = issued.map(|names| authority.server(names));
    let files = ["a", "b", "c"].into_iter().zip(&issued);
    let files: Vec<_> = files.map(|(name, issued)| issued.write_files(&authority, name)).collect();
    let parapet = TlsParapet::start(offline(&authority, &files)).await;
    for (name, index) in [("b.test", 1), ("x.c.test", 2), ("other.test", 0), ("127.0.0.1", 0)] {
        assert_eq!(
            parapet.presented_certificate(&authority, name).await,
            *issued[index].der(),
            "{name}"
        );
    }
    // An unknown name gets the first certificate, which the client rejects.
    let refused = parapet.connect(authority.client_config(), "nobody.test").await.unwrap_err();
    assert!(refused.to_string().contains("not valid for name"), "{refused}");
}

#[tokio::test]
async fn probe_commands_work_over_tls() {
    let (authority, stranger) = (TestAuthority::new(), TestAuthority::new());
    let files = authority.loopback_files("tls");
    let settings = |port: u16| {
        [
            ("TLS_ENABLE", "true".into()),
            ("TLS_SERVER_CERT", files.certificate.clone().into()),
            ("TLS_SERVER_KEY", files.key.clone().into()),
            ("TLS_SERVER_PORT", port.to_string().into()),
            ("INTERFACE", "127.0.0.1".into()),
        ]
    };
    let parapet = TlsParapet::start(offline(&authority, std::slice::from_ref(&files))).await;
    let settings = settings(parapet.address.port());
    let check = |args: &[&str], code: i32| {
        let output = run_parapet(args, &settings);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {output:?}");
    };
    let [own, other] = [&authority, &stranger].map(|it| it.file().display().to_string());
    let url = parapet.url("");
    for probe in ["health", "ready"] {
        check(&[probe], 0);
        check(&[probe, "--ca-certificate-file", &own], 0);
        check(&[probe, "--edge-url", &url, "--ca-certificate-file", &own], 0);
        check(&[probe, "--ca-certificate-file", &other], 1);
        check(&[probe, "--edge-url", &url.replace("https", "http")], 1);
    }
    assert!(parapet.parapet.terminate().await.success());
    check(&["health"], 1);
}

/// The first message of a client.
fn client_hello(authority: &TestAuthority) -> Vec<u8> {
    let name = "localhost".try_into().unwrap();
    let mut client = ClientConnection::new(Arc::new(authority.client_config()), name).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    hello
}

/// Opens `each` connections that send half of their first message, and as many that send all of it, and
/// then nothing.
async fn stall_handshakes(
    authority: &TestAuthority,
    parapet: &TlsParapet,
    each: usize,
) -> Vec<TcpStream> {
    let hello = client_hello(authority);
    let mut stalled = Vec::new();
    for sent in [&hello[..hello.len() / 2], &hello] {
        for _ in 0..each {
            let mut stream = TcpStream::connect(parapet.address).await.unwrap();
            stream.write_all(sent).await.unwrap();
            stalled.push(stream);
        }
    }
    stalled
}

#[tokio::test]
async fn stalled_handshakes_do_not_delay_other_clients() {
    let authority = TestAuthority::new();
    let setup = offline(&authority, &[authority.loopback_files("tls")]);
    let setup = setup.flag("--tls-max-handshakes", "1");
    let parapet = TlsParapet::start(setup.flag("--tls-handshake-timeout-seconds", "3600")).await;
    let stalled = stall_handshakes(&authority, &parapet, 150).await;
    let mut others = JoinSet::new();
    for _ in 0..4 {
        let (client, url) = (authority.http_client().build().unwrap(), parapet.url(FEATURES));
        others.spawn(async move {
            for _ in 0..5 {
                assert_eq!(features_status(&client, &url).await.unwrap(), StatusCode::OK);
            }
        });
    }
    others.join_all().await;
    assert!(parapet.metric(&handshake_sample("none", "closed")).await == 0, "they are under way");
    drop(stalled);
    parapet.wait_for_metric(&handshake_sample("none", "closed"), 300).await;
}

#[tokio::test]
async fn stalled_handshake_ends_at_its_deadline() {
    let authority = TestAuthority::new();
    let setup = offline(&authority, &[authority.loopback_files("tls")]);
    let parapet = TlsParapet::start(setup.flag("--tls-handshake-timeout-seconds", "1")).await;
    for mut stream in stall_handshakes(&authority, &parapet, 3).await {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
    }
    parapet.wait_for_metric(&handshake_sample("none", "timed_out"), 6).await;
}

#[tokio::test]
async fn handshakes_and_expiry_appear_in_metrics_status_and_log() {
    let authority = TestAuthority::new();
    let names = &["localhost", "127.0.0.1"][..];
    let soon = authority.server_for_days(names, 10).write_files(&authority, "soon");
    let late = authority.server_for_days(names, 90).write_files(&authority, "late");
    let past = authority.server_for_days(names, -1).write_files(&authority, "past");
    let [soon_file, past_file] = [&soon, &past].map(|it| it.certificate.display().to_string());
    let setup = offline(&authority, &[soon, late]);
    let setup =
        setup.flag("--admin-tls-cert", &past.certificate).flag("--admin-tls-key", &past.key);
    let parapet = TlsParapet::start(setup).await;
    let warnings = parapet.parapet.logged(LogEvent::warn("main"));
    for file in [&soon_file, &past_file] {
        assert!(warnings.iter().any(|line| line.contains(file)), "{file}: {warnings:?}");
    }
    let log = parapet.parapet.log();
    assert!(!log.contains("late.crt"), "{log}");

    // Each connection is new; the second one resumes the first one's session.
    let client = authority.http_client().build().unwrap();
    for _ in 0..2 {
        features_status(&client, &parapet.url(FEATURES)).await.unwrap();
    }
    let expired = reqwest::Client::builder().tls_danger_accept_invalid_certs(true).no_proxy();
    let expired = expired.build().unwrap();
    let url = parapet.parapet.admin_url().replace("http:", "https:");
    let strict = client.get(format!("{url}/metrics")).send().await;
    assert!(strict.is_err(), "it has expired");
    let page = expired.get(format!("{url}/metrics")).send().await.unwrap().text().await.unwrap();
    for outcome in ["full", "resumed"] {
        assert_eq!(sample_value::<u64>(&page, &handshake_sample("1.3", outcome)), 1, "{page}");
    }
    let expiry = |listener: &str, file: &str| {
        let name = "parapet_tls_certificate_expiry_seconds";
        sample_value::<f64>(
            &page,
            &format!("{name}{{listener=\"{listener}\",certificate=\"{file}\"}}"),
        )
    };
    let day = 86_400.0;
    assert!((9.0 * day..=10.0 * day).contains(&expiry("data", &soon_file)), "{page}");
    assert!((-2.0 * day..=-day).contains(&expiry("admin", &past_file)), "{page}");

    let status = expired.get(format!("{url}/status")).header("authorization", ADMIN);
    let status: Value =
        serde_json::from_slice(&status.send().await.unwrap().bytes().await.unwrap()).unwrap();
    assert_eq!(status["dataTls"], true);
    let certificates = status["certificates"].as_array().unwrap();
    let listeners: Vec<_> = certificates.iter().map(|it| &it["listener"]).collect();
    assert_eq!(listeners, ["data", "data", "admin"]);
    let printed = |n: usize| certificates[n]["warning"].as_str().unwrap_or_default();
    assert!(printed(0).contains("expires at") && printed(2).contains("expired at"), "{status}");
    assert_eq!(certificates[1]["warning"], Value::Null);
    assert!(certificates[2]["expiresInSeconds"].as_i64().unwrap() < 0, "{status}");
}

/// The configuration errors of a start, one per line.
fn configuration_errors(args: &[&str], variables: &[(&str, OsString)]) -> Vec<String> {
    let output = run_parapet(args, variables);
    let printed = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), &*output.stdout), (Some(64), &b""[..]), "{printed}");
    printed.lines().map(str::to_owned).collect()
}

#[test]
fn every_unusable_file_is_a_separate_error() {
    let authority = TestAuthority::new();
    let [one, other] = ["one", "other"].map(|name| authority.loopback_files(name));
    let damaged = authority.write("damaged.crt", "-----BEGIN CERTIFICATE-----\n!\n");
    let folder = authority.path("");
    let list = |paths: &[&std::path::Path]| {
        let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
        OsString::from(paths.join(","))
    };
    let missing = authority.path("missing.key");
    let variables = [
        ("CLIENT_TOKENS", CLIENT.into()),
        ("BOOTSTRAP_FILE", authority.write("flags.json", FLAGS).into()),
        ("TLS_ENABLE", "true".into()),
        ("TLS_SERVER_CERT", list(&[&one.certificate, &damaged, &one.certificate])),
        ("TLS_SERVER_KEY", list(&[&missing, &one.key, &other.key])),
        ("ADMIN_TLS_CERT", folder.clone().into()),
    ];
    let expected = [
        "ADMIN_TLS_KEY): is required for TLS".to_owned(),
        format!("TLS_SERVER_KEY: cannot read {}: No such file", missing.display()),
        format!("TLS_SERVER_CERT: {} is damaged", damaged.display()),
        format!(
            "TLS_SERVER_KEY: the private key in {} does not belong to the first certificate in {}",
            other.key.display(),
            one.certificate.display()
        ),
    ];
    for args in [&["offline"][..], &["offline", "--check-config"]] {
        let printed = configuration_errors(args, &variables);
        for expected in &expected {
            assert!(printed.iter().any(|line| line.contains(expected)), "{expected}: {printed:#?}");
        }
        assert_eq!(printed.len(), expected.len(), "{printed:#?}");
    }
    let mut variables = variables.to_vec();
    variables[3].1 = list(&[&folder]);
    variables[4].1 = list(&[&one.key]);
    variables[5] = ("ADMIN_TLS_CERT", one.certificate.clone().into());
    variables.push(("ADMIN_TLS_KEY", one.key.into()));
    let printed = configuration_errors(&["offline"], &variables);
    let expected = format!("TLS_SERVER_CERT: cannot read {}: Is a directory", folder.display());
    assert!(printed.len() == 1 && printed[0].starts_with(&expected), "{printed:#?}");
}

#[tokio::test]
async fn every_port_in_use_is_a_separate_error() {
    let authority = TestAuthority::new();
    let files = authority.loopback_files("tls");
    let mut taken = Vec::new();
    for _ in 0..3 {
        taken.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
    }
    let ports = taken.iter().map(|listener| listener.local_addr().unwrap().port());
    let [encrypted, plain, admin] = ports.collect::<Vec<_>>().try_into().unwrap();
    let variables = [
        ("CLIENT_TOKENS", CLIENT.into()),
        ("BOOTSTRAP_FILE", authority.write("flags.json", FLAGS).into()),
        ("INTERFACE", "127.0.0.1".into()),
        ("TLS_ENABLE", "true".into()),
        ("TLS_SERVER_CERT", files.certificate.into()),
        ("TLS_SERVER_KEY", files.key.into()),
        ("TLS_SERVER_PORT", encrypted.to_string().into()),
        ("REDIRECT_HTTP_TO_HTTPS", "true".into()),
        ("PORT", plain.to_string().into()),
        ("ADMIN_PORT", admin.to_string().into()),
    ];
    let printed = configuration_errors(&["offline"], &variables);
    let expected = [
        ("--interface and --tls-server-port", encrypted),
        ("--interface and --port", plain),
        ("--admin-interface and --admin-port", admin),
    ];
    let expected = expected.map(|(flags, port)| {
        format!("{flags}: cannot listen on 127.0.0.1:{port}: Address already in use (os error 98)")
    });
    assert_eq!(printed, expected);
}
