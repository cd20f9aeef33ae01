//! External TLS clients: curl, openssl, the SDKs and a browser.

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::certificate_authority::{CertificateFiles, TestAuthority};
use super::{
    ADMIN, CLIENT, FEATURES, FLAGS, TIMEOUT, TlsParapet, handshake_sample, offline, with_tls,
};
use crate::rig::{Driver, Parapet, Sdk, Setup, node, secret_leak_check, wait_until};

/// Runs a program until it exits, with this standard input.
async fn run_program(program: &str, args: &[&str], input: &str) -> Output {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.kill_on_drop(true).spawn().unwrap();
    let mut stdin = process.stdin.take().unwrap();
    // It may exit before it has read anything.
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    tokio::time::timeout(TIMEOUT, process.wait_with_output()).await.expect("it ends").unwrap()
}

fn lossy_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test]
async fn curl_gets_flags_with_each_http_and_tls_version() {
    let authority = TestAuthority::new();
    let setup = offline(&authority, &[authority.loopback_files("tls")]);
    let parapet = TlsParapet::start(setup.env("REDIRECT_HTTP_TO_HTTPS", "true")).await;
    let ca = authority.file().display().to_string();
    let curl = async |args: &[&str], url: &str| {
        let printed = "\n%{http_code} %{http_version} %{num_redirects}";
        let fixed = ["--silent", "--show-error", "--noproxy", "*", "--write-out", printed];
        run_program("curl", &[&fixed[..], args, &[url]].concat(), "").await
    };
    let (trust, token) = (["--cacert", &*ca], format!("authorization: {CLIENT}"));
    for (args, version) in [
        (&["--http1.1", "--tlsv1.3"][..], "1.1"),
        (&["--http2", "--tlsv1.3"], "2"),
        (&["--http1.1", "--tls-max", "1.2"], "1.1"),
        (&["--http2", "--tls-max", "1.2"], "2"),
    ] {
        let args = [&trust[..], args, &["--header", &token]].concat();
        let output = curl(&args, &parapet.url(FEATURES)).await;
        let response = lossy_text(&output.stdout);
        assert!(
            response.contains("\"features\""),
            "{args:?}: {response} {}",
            lossy_text(&output.stderr)
        );
        assert!(response.ends_with(&format!("\n200 {version} 0")), "{args:?}: {response}");
    }
    for version in ["1.2", "1.3"] {
        assert_eq!(parapet.metric(&handshake_sample(version, "full")).await, 2, "{version}");
    }
    // A redirect to the TLS port keeps method and body.
    let body = json!({ "tokens": [CLIENT] }).to_string();
    let json = "content-type: application/json";
    let args = [&trust[..], &["--location", "--header", json, "--data", &body]].concat();
    let plain = parapet.parapet.url() + "/edge/validate";
    let response = lossy_text(&curl(&args, &plain).await.stdout);
    assert!(response.contains(CLIENT) && response.ends_with("\n200 2 1"), "{response}");
    // Without the authority the certificate is not trusted.
    assert_eq!(curl(&[], &parapet.url(FEATURES)).await.status.code(), Some(60));
}

#[tokio::test]
async fn openssl_agrees_on_versions_and_resumes_sessions() {
    const REQUEST: &str = "GET /internal-backstage/health HTTP/1.0\r\n\r\n";
    let authority = TestAuthority::new();
    let files = || [authority.loopback_files("tls")];
    let ca = authority.file().display().to_string();
    let openssl = async |parapet: &TlsParapet, args: &[&str]| {
        let address = parapet.address.to_string();
        let fixed = ["s_client", "-connect", &address, "-CAfile", &ca, "-verify_return_error"];
        let fixed = [&fixed[..], &["-servername", "localhost", "-ign_eof"]].concat();
        let output = run_program("openssl", &[&fixed[..], args].concat(), REQUEST).await;
        (output.status.success(), lossy_text(&output.stdout) + &lossy_text(&output.stderr))
    };
    let parapet = TlsParapet::start(offline(&authority, &files())).await;
    let session = authority.path("session.pem").display().to_string();
    for (option, version) in [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")] {
        let (_, printed) = openssl(&parapet, &[option, "-sess_out", &session]).await;
        assert!(printed.contains(&format!("New, {version}")), "{printed}");
        assert!(
            printed.contains("HTTP/1.0 200") && printed.contains("Verification: OK"),
            "{printed}"
        );
        let (_, printed) = openssl(&parapet, &[option, "-sess_in", &session]).await;
        assert!(printed.contains(&format!("Reused, {version}")), "{printed}");
        assert!(printed.contains("HTTP/1.0 200"), "{printed}");
        let version = version.strip_prefix("TLSv").unwrap();
        for outcome in ["full", "resumed"] {
            parapet.wait_for_metric(&handshake_sample(version, outcome), 1).await;
        }
    }
    let old = ["-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"];
    let (succeeded, printed) = openssl(&parapet, &old).await;
    assert!(!succeeded && printed.contains("SSL alert number"), "{printed}");

    let parapet =
        TlsParapet::start(offline(&authority, &files()).flag("--tls-min-version", "1.3")).await;
    let (succeeded, printed) = openssl(&parapet, &["-tls1_2"]).await;
    assert!(!succeeded && printed.contains("alert protocol version"), "{printed}");
    let (_, printed) = openssl(&parapet, &["-tls1_3"]).await;
    assert!(printed.contains("HTTP/1.0 200"), "{printed}");
}

/// `parapet standalone` with TLS on both listeners, with the same certificate.
fn standalone(authority: &TestAuthority, files: CertificateFiles) -> Setup {
    let setup = Parapet::mode("standalone").flag("--flags", authority.write("flags.json", FLAGS));
    let setup = setup.flag("--admin-tls-cert", &files.certificate);
    let setup = setup.flag("--admin-tls-key", &files.key).flag("--metrics-interval-seconds", "1");
    let setup = setup.env("INIT_CLIENT_API_TOKENS", CLIENT).env("INIT_ADMIN_API_TOKENS", ADMIN);
    with_tls(setup, &[files])
}

#[tokio::test]
async fn sdks_evaluate_and_report_over_tls() {
    let authority = TestAuthority::new();
    let parapet = TlsParapet::start(standalone(&authority, authority.loopback_files("tls"))).await;
    let (url, ca) = (parapet.url(""), authority.file());
    let node = Sdk::node_trusting(&ca, &url, CLIENT, "node over TLS").await;
    let python = Sdk::python_trusting(&ca, &url, CLIENT, "python over TLS").await;
    for (mut sdk, times) in [(node, 3), (python, 4)] {
        assert!(sdk.evaluate(json!({})).await["a"].enabled);
        sdk.use_flag("a", times).await;
        sdk.flush().await;
        sdk.close().await;
    }
    let client = authority.http_client().build().unwrap();
    let usage = parapet.parapet.admin_url().replace("http:", "https:");
    let usage = usage + "/api/admin/client-metrics/features/a/raw";
    wait_until("the usage of both is stored", Duration::from_mins(1), async || {
        let response = client.get(&usage).header("authorization", ADMIN).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let usage: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
        let of = |app: &str| {
            let hours = usage["data"].as_array().unwrap().iter().filter(|it| it["appName"] == app);
            hours.map(|hour| hour["yes"].as_u64().unwrap()).sum::<u64>()
        };
        ((of("node over TLS"), of("python over TLS")) == (3, 4)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn console_works_over_tls_and_its_cookie_is_secure() {
    const PASSWORD: &str = "a password over TLS";
    secret_leak_check::register(PASSWORD);
    let authority = TestAuthority::new();
    let issued = authority.server(&["localhost", "127.0.0.1"]);
    let setup = standalone(&authority, issued.write_files(&authority, "tls"));
    let parapet = TlsParapet::start(setup.env("UNLEASH_DEFAULT_ADMIN_PASSWORD", PASSWORD)).await;
    let chromium = Path::new("/usr/bin/chromium");
    assert!(chromium.exists(), "no Chromium: tests/run installs it");
    let options = json!({
        "url": parapet.parapet.admin_url().replace("http:", "https:"),
        "chromium": chromium,
        "publicKeyHash": issued.public_key_hash,
    });
    let mut console = Driver::start("console", node("console.mjs").into(), &options).await;
    let who = json!({ "username": "admin", "password": PASSWORD });
    let response = console.call("sign_in", who).await;
    assert_eq!(response["signedIn"], true, "{response}");
    let cookies = console.call("cookies", Value::Null).await;
    let cookies = cookies["cookies"].as_array().unwrap();
    assert_eq!(cookies.len(), 2, "the session and the browser: {cookies:?}");
    let session = cookies.iter().find(|it| it["name"] == "__Host-parapet-session");
    let session = session.unwrap_or_else(|| panic!("no session: {cookies:?}"));
    secret_leak_check::register(session["value"].as_str().unwrap());
    assert!(cookies.iter().all(|it| it["secure"] == true && it["httpOnly"] == true), "{cookies:?}");
    assert_eq!((&session["path"], &session["sameSite"]), (&json!("/"), &json!("Strict")));
    // Changes require that cookie and the page's own origin.
    console.call("go", json!({ "section": "API access" })).await;
    let form = json!({ "name": "made over TLS", "kind": "Backend", "environment": "development" });
    let made = console.call("create_token", form).await;
    let secret = made["secret"].as_str().unwrap();
    secret_leak_check::register(secret);
    let flags = authority.http_client().build().unwrap().get(parapet.url(FEATURES));
    let flags = flags.header("authorization", secret).send().await.unwrap();
    assert_eq!(flags.status(), StatusCode::OK);
    console.call("close_dialog", Value::Null).await;
    console.call("sign_out", Value::Null).await;
    let left = console.call("cookies", Value::Null).await;
    let left = left["cookies"].as_array().unwrap().iter();
    assert!(left.clone().all(|it| it["name"] != "__Host-parapet-session"), "it is gone");
    assert_eq!(console.call("troubles", Value::Null).await["troubles"], json!([]));
    console.close().await;
}
