//! Obstacles between an edge and its upstream, and what the edge reports about them: redirects,
//! certificates, tokens in the wrong place, damaged records.

use std::process::Command;
use std::time::Duration;

use reqwest::StatusCode;
use tempfile::TempDir;
use tokio::net::TcpListener;

use crate::in_process_parapet::CLIENT;
use crate::rig::{ChaosProxy, FEATURES, Fault, LogEvent, Parapet, free_port, wait_until};

const ADMIN: &str = "*:*.reach-0123456789abcdef0123456789abcdef0123456789ab";
const FLAGS: &str =
    r#"{"features":[{"name":"here","enabled":true,"strategies":[{"name":"default"}]}]}"#;

const TIMEOUT: Duration = Duration::from_mins(1);

/// A real server as upstream, with a client token and this admin token.
pub(crate) async fn start_upstream(folder: &TempDir, admin: &str) -> Parapet {
    let file = folder.path().join("flags.json");
    std::fs::write(&file, FLAGS).unwrap();
    let standalone = Parapet::mode("standalone").flag("--flags", file);
    standalone
        .env("INIT_ADMIN_API_TOKENS", admin)
        .env("INIT_CLIENT_API_TOKENS", CLIENT)
        .start()
        .await
}

/// Waits until a log line contains `text`, and returns that line.
async fn wait_for_log_line(parapet: &Parapet, text: &str) -> String {
    wait_until(&format!("the log contains {text}"), TIMEOUT, async || {
        parapet.log().lines().find(|line| line.contains(text)).map(str::to_owned)
    })
    .await
}

#[tokio::test]
async fn redirect_within_the_origin_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = start_upstream(&folder, ADMIN).await;
    let redirector = ChaosProxy::start(&upstream.admin_url()).await;
    redirector.set_fault(Fault::Redirect { to: "/moved".to_owned() }).await;
    let url = redirector.url();
    let edge = Parapet::edge(&url).env("TOKENS", CLIENT).with_short_intervals().start().await;
    let (status, flags) = edge.get(FEATURES, CLIENT).await;
    assert_eq!((status, &flags["features"][0]["name"]), (StatusCode::OK, &"here".into()));
    let line = edge.wait_until_logged(LogEvent::LISTENING).await;
    assert!(line.contains(&url), "it names upstream: {line}");
}

#[tokio::test]
async fn redirect_to_another_origin_is_reported_and_gets_no_token() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = start_upstream(&folder, ADMIN).await;
    let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = format!("http://{}/unleash", elsewhere.local_addr().unwrap());
    let redirector = ChaosProxy::start(&upstream.admin_url()).await;
    redirector.set_fault(Fault::Redirect { to: to.clone() }).await;
    let edge = Parapet::edge(&redirector.url()).env("UPSTREAM_ADMIN_TOKEN", ADMIN);
    let edge = edge.with_short_intervals().start_listening().await;
    let logged = wait_for_log_line(&edge, "308 Permanent Redirect").await;
    assert!(logged.contains(&to) && logged.contains("--upstream-url"), "{logged}");
    let redirected =
        "parapet_upstream_requests_total{purpose=\"environments\",outcome=\"redirected\"}";
    wait_until("it was redirected again and again", TIMEOUT, async || {
        edge.metric(redirected).await.filter(|it| *it > 2.0)
    })
    .await;
    let visitor = tokio::time::timeout(Duration::ZERO, elsewhere.accept()).await;
    assert!(visitor.is_err(), "{visitor:?}");
}

#[tokio::test]
async fn untrusted_certificate_is_logged_once_even_after_another_failure() {
    let folder = tempfile::tempdir().unwrap();
    let (key, certificate) = (folder.path().join("key.pem"), folder.path().join("cert.pem"));
    let mut make = Command::new("openssl");
    make.args(["req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=localhost"]);
    make.arg("-keyout").arg(&key).arg("-out").arg(&certificate);
    assert!(make.output().unwrap().status.success(), "openssl makes a certificate");
    let port = free_port();
    let edge = Parapet::edge(&format!("https://localhost:{port}")).env("TOKENS", CLIENT);
    let edge = edge.with_short_intervals().start_listening().await;
    wait_for_log_line(&edge, "Connection refused").await;

    let mut serve = Command::new("openssl");
    serve.args(["s_server", "-quiet", "-www", "-accept", &format!("127.0.0.1:{port}")]);
    serve.arg("-key").arg(&key).arg("-cert").arg(&certificate);
    serve.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
    let _server = ChildProcess(serve.stderr(std::process::Stdio::null()).spawn().unwrap());
    let logged = edge.wait_until_logged(LogEvent::warn("upstream::health")).await;
    assert!(logged.contains("certificate"), "{logged}");
    let failed = "parapet_upstream_requests_total{purpose=\"validate\",outcome=\"unreachable\"}";
    let before = edge.metric(failed).await.unwrap();
    wait_until("many handshakes have failed", TIMEOUT, async || {
        edge.metric(failed).await.filter(|it| *it > before + 10.0)
    })
    .await;
    let log = edge.log();
    let logged = log.lines().filter(|line| line.contains("certificate")).count();
    assert_eq!(logged, 1, "{log}");
}

/// Killed when dropped.
struct ChildProcess(std::process::Child);

impl Drop for ChildProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn admin_token_in_tokens_setting_is_reported_with_the_right_setting() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = start_upstream(&folder, ADMIN).await;
    let edge = Parapet::edge(&upstream.admin_url()).env("TOKENS", ADMIN);
    let edge = edge.with_short_intervals().start_listening().await;
    let logged = edge.wait_until_logged(LogEvent::warn("app::edge_sync").with("token")).await;
    assert!(logged.contains("--upstream-admin-token"), "{logged}");
}

#[tokio::test]
async fn damaged_token_cache_record_is_set_aside_and_logged() {
    let edge = Parapet::edge("http://127.0.0.1:1").env("UPSTREAM_ADMIN_TOKEN", ADMIN);
    let edge = edge.start_listening().await;
    assert!(edge.terminate().await.success());
    std::fs::write(edge.data_dir().join("backup/verdicts.parapet"), "no verdicts").unwrap();
    edge.restart();
    edge.wait_until_listening().await;
    let logged = edge.wait_until_logged(LogEvent::warn("app::persistence").with("error")).await;
    assert!(logged.contains("verdicts.damaged"), "{logged}");
}
