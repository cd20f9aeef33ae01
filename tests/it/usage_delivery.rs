//! Usage and registrations from SDKs, on their way to an upstream that accepts or rejects them.
//!
//! `upstream_outage` covers an unavailable upstream.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::rig::{
    ChaosProxy, Fault, LogEvent, Parapet, Postgres, STORE_TIMEOUT, TokenKind, Unleash,
    UnleashVersion, http, secret_leak_check, send_json, start_standalone_for_usage, wait_until,
};

const ENVIRONMENT: &str = "development";
const METRICS: &str = "/api/client/metrics";
const BULK: &str = "/api/client/metrics/bulk";

/// Longer than the retry delays after a few failures in a row.
const TIMEOUT: Duration = Duration::from_mins(1);

/// Creates an enabled flag, and waits until Unleash counts its usage.
async fn create_counted_flag(unleash: &Unleash, flag: &str) {
    unleash.create_enabled_flag(flag, ENVIRONMENT, &[]).await;
    unleash.wait_until_counted(flag, ENVIRONMENT).await;
}

async fn edge(unleash: &Unleash, url: &str, fleet: &str) -> Parapet {
    let edge = Parapet::edge(url).admin_token(unleash.admin_token()).with_short_intervals();
    edge.flag("--fleet-name", fleet).start().await
}

async fn post(server: &str, path: &str, token: &str, body: &Value) -> StatusCode {
    let request = http().post(format!("{server}{path}")).header("Authorization", token);
    send_json(request, body).await.0
}

/// Posts until the response is a success: a first-seen token may have to be validated first.
async fn post_until_accepted(server: &str, path: &str, token: &str, body: &Value) {
    wait_until(&format!("{path} takes {body}"), TIMEOUT, async || {
        let status = post(server, path, token, body).await;
        assert!(status.is_success() || status == StatusCode::SERVICE_UNAVAILABLE, "{status}");
        status.is_success().then_some(())
    })
    .await;
}

/// A report by one application, which has evaluated a flag as on `yes` times.
fn metrics_report(
    app_name: &str,
    flag: &str,
    yes: u64,
    start: Timestamp,
    stop: Timestamp,
) -> Value {
    let bucket =
        json!({ "start": start, "stop": stop, "toggles": { flag: { "yes": yes, "no": 0 } } });
    json!({ "appName": app_name, "instanceId": format!("{app_name}-1"), "bucket": bucket })
}

fn metrics_report_now(app_name: &str, flag: &str, yes: u64) -> Value {
    let now = Timestamp::now();
    metrics_report(app_name, flag, yes, now - SignedDuration::from_secs(60), now)
}

/// The number of usage batches that were posted.
fn batch_count(proxy: &ChaosProxy) -> usize {
    proxy.request_count(BULK)
}

/// The secrets of the tokens of this name, in order.
async fn token_secrets_named(unleash: &Unleash, name: &str) -> Vec<String> {
    let tokens = unleash.tokens_named(name).await;
    let mut secrets: Vec<_> =
        tokens.iter().map(|token| token["secret"].as_str().unwrap().to_owned()).collect();
    secrets.sort();
    secrets
}

/// Reports at the boundary of an hour: their name, start and stop, and the right hour.
fn hour_boundary_buckets(now: Timestamp) -> [(&'static str, Timestamp, Timestamp, Timestamp); 4] {
    let hours = SignedDuration::from_hours;
    let half_minute = SignedDuration::from_secs(30);
    let hour = Timestamp::from_second(now.as_second().div_euclid(3600) * 3600).unwrap();
    [
        ("across", hour - half_minute, hour + half_minute, hour),
        ("long", now - hours(30), now, hour),
        ("late", hour - hours(5) - half_minute, hour - hours(5) + half_minute, hour - hours(5)),
        ("backwards", now, now - hours(3), hour - hours(3)),
    ]
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn usage_through_edge_is_stored_under_the_same_hour_as_direct_usage() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let flag = "counts.hours";
    create_counted_flag(&unleash, flag).await;
    let parapet = edge(&unleash, &unleash.url(), "counts-hours").await;
    let backend =
        unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "counts-hours-b").await;
    let frontend =
        unleash.create_token(TokenKind::Frontend, ENVIRONMENT, &["*"], "counts-hours-f").await;
    let now = Timestamp::now();
    let mut expected = Vec::new();
    for (way, server) in [("direct", unleash.url()), ("edge", parapet.url())] {
        for (kind, path, token) in [
            ("backend", METRICS, &backend),
            ("frontend", "/api/frontend/client/metrics", &frontend),
        ] {
            for (case, start, stop, hour) in hour_boundary_buckets(now) {
                let app_name = format!("counts-{way}-{kind}-{case}");
                post_until_accepted(
                    &server,
                    path,
                    token,
                    &metrics_report(&app_name, flag, 1, start, stop),
                )
                .await;
                expected.push((app_name, hour));
            }
        }
        let app_name = format!("counts-{way}-bulk");
        let (_, _, stop, hour) = hour_boundary_buckets(now)[2];
        let metric = json!({ "featureName": flag, "appName": app_name, "environment": ENVIRONMENT,
                             "timestamp": stop, "yes": 1, "no": 0, "variants": {} });
        let bulk = json!({ "applications": [], "metrics": [metric] });
        post_until_accepted(&server, BULK, &backend, &bulk).await;
        expected.push((app_name, hour));
    }
    for (app_name, _) in &expected {
        unleash.wait_for_usage(flag, app_name, ENVIRONMENT, (1, 0)).await;
    }
    let stored = unleash.flag_usage(flag).await;
    for (app_name, hour) in &expected {
        let of_app = stored.iter().filter(|stored| stored.app_name == *app_name);
        let hours: Vec<Timestamp> = of_app.map(|it| it.timestamp.parse().unwrap()).collect();
        assert_eq!(hours, [*hour], "{app_name}");
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn usage_of_flag_newer_than_the_snapshot_is_counted() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let edge = Parapet::edge(&unleash.url()).admin_token(unleash.admin_token());
    let edge = edge
        .flag("--fleet-name", "counts-newer")
        .flag("--upstream-mode", "poll")
        .flag("--features-refresh-interval-seconds", "3600")
        .flag("--metrics-interval-seconds", "0.5");
    let parapet = edge.start().await;
    let (flag, app_name) = ("counts.newer", "counts-newer");
    create_counted_flag(&unleash, flag).await;
    let token = unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], app_name).await;
    post_until_accepted(&parapet.url(), METRICS, &token, &metrics_report_now(app_name, flag, 3))
        .await;
    unleash.wait_for_usage(flag, app_name, ENVIRONMENT, (3, 0)).await;
    let (status, _) = parapet.get(&format!("/api/client/features/{flag}"), &token).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn standalone_stores_usage_under_the_hour_of_its_bucket_end() {
    let (admin, client) = ("*:*.counts-standalone-admin", "*:development.counts-standalone-client");
    let (parapet, _flags) = start_standalone_for_usage("f", admin, client).await;
    let now = Timestamp::now();
    for (case, start, stop, _) in hour_boundary_buckets(now) {
        let body = metrics_report(&format!("counts-{case}"), "f", 1, start, stop);
        post_until_accepted(&parapet.url(), METRICS, client, &body).await;
    }
    let path = "/api/admin/client-metrics/features/f/raw";
    let stored = wait_until("all counts are stored", TIMEOUT, async || {
        let (status, body) = parapet.admin_get(path).await;
        assert!(status == StatusCode::OK || status == StatusCode::NOT_FOUND, "{status}");
        let stored = body["data"].as_array()?.clone();
        (stored.len() == 4).then_some(stored)
    })
    .await;
    for (case, .., hour) in hour_boundary_buckets(now) {
        let app_name = format!("counts-{case}");
        let stored = stored.iter().find(|it| it["appName"] == *app_name).unwrap();
        let stored: Timestamp = stored["timestamp"].as_str().unwrap().parse().unwrap();
        assert_eq!(stored, hour, "{case}");
    }
}

/// A proxy in front of PostgreSQL that drops the server's replies to some commits of usage and breaks
/// the connection.
struct ReplyDroppingProxy {
    port: u16,
    lost: Arc<AtomicUsize>,
}

impl ReplyDroppingProxy {
    async fn start(server: u16, losses: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (port, lost) = (listener.local_addr().unwrap().port(), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&lost);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(("127.0.0.1", server)).await.unwrap();
                let count = Arc::clone(&count);
                tokio::spawn(async move {
                    forward_dropping_replies(client, server, &count, losses).await;
                });
            }
        });
        Self { port, lost }
    }
}

/// Forwards both directions until one of them ends or a reply is dropped.
async fn forward_dropping_replies(
    mut client: TcpStream,
    mut server: TcpStream,
    lost: &AtomicUsize,
    losses: usize,
) {
    let has = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|it| it == text.as_bytes());
    let (mut from_client, mut from_server) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let (mut stores_usage, mut commits) = (false, false);
    loop {
        tokio::select! {
            read = client.read(&mut from_client) => {
                let Ok(read @ 1..) = read else { return };
                stores_usage |= has(&from_client[..read], "INSERT INTO flag_usage");
                commits = stores_usage && has(&from_client[..read], "COMMIT");
                server.write_all(&from_client[..read]).await.unwrap();
            }
            read = server.read(&mut from_server) => {
                let Ok(read @ 1..) = read else { return };
                if commits && lost.load(Ordering::Relaxed) < losses {
                    lost.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                if client.write_all(&from_server[..read]).await.is_err() {
                    return;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn batch_without_commit_reply_is_counted_once() {
    const LOSSES: usize = 3;
    let (admin, client) = ("*:*.counts-commit-admin", "*:development.counts-commit-client");
    for token in [admin, client] {
        secret_leak_check::register(token);
    }
    let flags = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(flags.path(), r#"{"features":[{"name":"f","enabled":true}]}"#).unwrap();
    let server = Postgres::shared().await;
    let database = server.create_database().await;
    let relay = ReplyDroppingProxy::start(server.port(), LOSSES).await;
    let url = format!("postgres://postgres@127.0.0.1:{}/{database}", relay.port);
    let parapet = Parapet::mode("standalone")
        .flag("--flags", flags.path())
        .flag("--metrics-interval-seconds", "0.5")
        .env("DATABASE_URL", url)
        .env("INIT_ADMIN_API_TOKENS", admin)
        .env("INIT_CLIENT_API_TOKENS", client)
        .start()
        .await;
    post_until_accepted(
        &parapet.url(),
        METRICS,
        client,
        &metrics_report_now("counts-commit", "f", 100),
    )
    .await;
    wait_until("the batch is sent again and accepted", TIMEOUT, async || {
        let sent = parapet.metric("parapet_usage_counts_sent_total").await;
        sent.filter(|sent| *sent >= 100.0)
    })
    .await;
    assert!((1..=LOSSES).contains(&relay.lost.load(Ordering::Relaxed)));
    let path = "/api/admin/client-metrics/features/f/raw";
    let (_, body) = parapet.admin_get(path).await;
    let stored: Vec<_> = body["data"].as_array().unwrap().iter().map(|it| &it["yes"]).collect();
    assert_eq!(stored, [100]);
}

/// An edge with a backend token, whose requests to `upstream` pass through a proxy.
async fn edge_behind_proxy(upstream: &Parapet, token: &str) -> (ChaosProxy, Parapet) {
    let proxy = ChaosProxy::start(&upstream.url()).await;
    let edge = Parapet::edge(&proxy.url()).env("TOKENS", token).with_short_intervals();
    (proxy, edge.start().await)
}

#[tokio::test]
async fn batch_without_response_is_counted_once_by_edges_and_a_standalone() {
    let (admin, client) = ("*:*.counts-repeat-admin", "*:development.counts-repeat-client");
    let (standalone, _flags) = start_standalone_for_usage("f", admin, client).await;
    let (to_standalone, first) = edge_behind_proxy(&standalone, client).await;
    let (to_first, second) = edge_behind_proxy(&first, client).await;
    for proxy in [&to_standalone, &to_first] {
        proxy.set_fault(Fault::DropResponses).await;
    }
    let report = metrics_report_now("counts-repeat", "f", 100);
    post_until_accepted(&second.url(), METRICS, client, &report).await;
    for (proxy, sender, receiver) in
        [(&to_first, &second, &first), (&to_standalone, &first, &standalone)]
    {
        let sent = async || sender.metric("parapet_usage_counts_sent_total").await;
        let repeated = async || receiver.metric("parapet_usage_batches_repeated_total").await;
        wait_until("a batch is sent again", TIMEOUT, async || repeated().await).await;
        assert!(sent().await.is_none_or(|sent| sent < 1.0));
        proxy.restore().await;
        wait_until("the batch is accepted", TIMEOUT, async || {
            sent().await.filter(|sent| *sent >= 100.0)
        })
        .await;
    }
    let stored = wait_until("the counts are stored", TIMEOUT, async || {
        let (_, body) = standalone.admin_get("/api/admin/client-metrics/features/f/raw").await;
        let stored: Vec<_> = body["data"].as_array()?.iter().map(|it| it["yes"].as_u64()).collect();
        (!stored.is_empty()).then_some(stored)
    })
    .await;
    assert_eq!(stored, [Some(100)]);
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn usage_rejected_by_firewall_arrives_later_with_the_same_token() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let (flag, changing) = ("counts.firewall", "counts.firewall-changing");
    unleash.create_enabled_flag(changing, ENVIRONMENT, &[]).await;
    create_counted_flag(&unleash, flag).await;
    let proxy = ChaosProxy::start(&unleash.url()).await;
    let parapet = edge(&unleash, &proxy.url(), "counts-firewall").await;
    let token =
        unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "counts-firewall").await;
    let app_name = "counts-firewall";
    let is_on = async || {
        let (_, body) = parapet.get("/api/client/features", &token).await;
        let flags = body["features"].as_array()?.iter();
        flags.filter(|it| it["name"] == changing).find_map(|it| it["enabled"].as_bool())
    };
    wait_until("the flag is served", TIMEOUT, async || is_on().await.filter(|on| *on)).await;
    // After a restart the edge may create a token at once.
    assert!(parapet.terminate().await.success());
    parapet.restart();
    parapet.wait_until_ready().await;
    let name = "parapet-counts-firewall";
    let tokens = token_secrets_named(&unleash, name).await;
    assert_eq!(unleash.register_tokens_named(name).await, ["development", "production"]);

    proxy.set_fault(Fault::RejectPosts { prefix: METRICS, status: StatusCode::FORBIDDEN }).await;
    let before = batch_count(&proxy);
    let registration = json!({ "appName": app_name, "instanceId": "1", "interval": 15,
                               "started": Timestamp::now(), "strategies": ["default"] });
    post_until_accepted(&parapet.url(), "/api/client/register", &token, &registration).await;
    post_until_accepted(&parapet.url(), METRICS, &token, &metrics_report_now(app_name, flag, 3))
        .await;
    wait_until("usage is refused a few times", TIMEOUT, async || {
        (batch_count(&proxy) >= before + 4).then_some(())
    })
    .await;
    unleash.disable(changing, ENVIRONMENT).await;
    wait_until("a change of flags arrives", TIMEOUT, async || is_on().await.filter(|on| !*on))
        .await;
    assert_eq!(token_secrets_named(&unleash, name).await, tokens);
    // It says that the same token is good for flags.
    parapet.wait_until_logged(LogEvent::warn("upstream::usage_sink").without("error")).await;

    post_until_accepted(&parapet.url(), METRICS, &token, &metrics_report_now(app_name, flag, 2))
        .await;
    proxy.restore().await;
    unleash.wait_for_usage(flag, app_name, ENVIRONMENT, (5, 0)).await;
    wait_until("the application has registered", STORE_TIMEOUT, async || {
        unleash.applications().await.iter().any(|name| name == app_name).then_some(())
    })
    .await;
    assert_eq!(token_secrets_named(&unleash, name).await, tokens);
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn usage_rejected_as_too_large_arrives_completely_later() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let flag = "counts.too-large";
    create_counted_flag(&unleash, flag).await;
    let proxy = ChaosProxy::start(&unleash.url()).await;
    let parapet = edge(&unleash, &proxy.url(), "counts-too-large").await;
    let token =
        unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "counts-too-large").await;
    proxy
        .set_fault(Fault::RejectPosts { prefix: METRICS, status: StatusCode::PAYLOAD_TOO_LARGE })
        .await;
    let apps: Vec<_> = (0..12).map(|app| format!("counts-too-large-{app}")).collect();
    for app_name in &apps {
        post_until_accepted(
            &parapet.url(),
            METRICS,
            &token,
            &metrics_report_now(app_name, flag, 1),
        )
        .await;
    }
    wait_until("everything is called too large", TIMEOUT, async || {
        (batch_count(&proxy) >= 5).then_some(())
    })
    .await;
    proxy.restore().await;
    for app_name in &apps {
        unleash.wait_for_usage(flag, app_name, ENVIRONMENT, (1, 0)).await;
    }
    assert_eq!(parapet.metric("parapet_usage_dropped_total{reason=\"size\"}").await, None);
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn registration_after_restart_preserves_strategies_at_upstream() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let flag = "counts.strategies";
    create_counted_flag(&unleash, flag).await;
    let proxy = ChaosProxy::start(&unleash.url()).await;
    let parapet = edge(&unleash, &proxy.url(), "counts-strategies").await;
    let token =
        unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "counts-strategies").await;
    let registration = |app_name: &str| {
        json!({ "appName": app_name, "instanceId": format!("{app_name}-1"), "interval": 15,
                "started": Timestamp::now(), "strategies": ["default", "counts"] })
    };
    let sent = async |app_name: &str, part: &str| {
        wait_until(&format!("{part} of {app_name} are sent"), TIMEOUT, async || {
            let bodies = proxy.requests().into_iter().filter(|seen| seen.path == BULK);
            let mut bodies =
                bodies.map(|seen| serde_json::from_slice::<Value>(&seen.body).unwrap());
            let is_of_app = |body: Value| {
                body[part].as_array().unwrap().iter().any(|it| it["appName"] == app_name)
            };
            bodies.any(is_of_app).then_some(())
        })
        .await;
    };
    // Unleash stores registrations every 20 s. Until then it merges registrations of a new application;
    // afterwards an empty list replaces the stored one.
    post_until_accepted(
        &unleash.url(),
        "/api/client/register",
        &token,
        &registration("counts-marker"),
    )
    .await;
    wait_until("Unleash has just written applications", STORE_TIMEOUT, async || {
        unleash.applications().await.iter().any(|name| name == "counts-marker").then_some(())
    })
    .await;
    let app_name = "counts-strategies";
    post_until_accepted(&parapet.url(), "/api/client/register", &token, &registration(app_name))
        .await;
    sent(app_name, "applications").await;
    parapet.terminate().await;
    parapet.restart();
    parapet.wait_until_ready().await;
    post_until_accepted(&parapet.url(), METRICS, &token, &metrics_report_now(app_name, flag, 1))
        .await;
    sent(app_name, "metrics").await;

    let path = format!("/api/admin/metrics/applications/{app_name}");
    let stored = wait_until("the application is stored", STORE_TIMEOUT, async || {
        let (status, stored) =
            unleash.admin_request(reqwest::Method::GET, &path, &Value::Null).await;
        let instances = stored["instances"].as_array().is_some_and(|it| !it.is_empty());
        (status == StatusCode::OK && instances).then_some(stored)
    })
    .await;
    let names: Vec<_> =
        stored["strategies"].as_array().unwrap().iter().map(|it| &it["name"]).collect();
    assert_eq!(names, ["default", "counts"]);
    assert_eq!(stored["instances"][0]["instanceId"], "counts-strategies-1");
}
