//! Limits for one client: other clients are always served, and no response is a 5xx.

use std::time::Duration;

use proptest::prelude::*;
use reqwest::{Method, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::in_process_parapet::{CLIENT, FRONTEND, InProcessParapet, send};
use crate::rig::{LogEvent, Parapet, wait_until};

const FLAGS: &str =
    r#"{"features":[{"name":"a","enabled":true,"strategies":[{"name":"default"}]}]}"#;

/// The routes with a body, each with a token for it.
const BODY_ROUTES: [(&str, &str); 9] = [
    ("/api/client/register", CLIENT),
    ("/api/client/metrics", CLIENT),
    ("/api/client/metrics/bulk", CLIENT),
    ("/api/client/metrics/edge", CLIENT),
    ("/api/frontend", FRONTEND),
    ("/api/frontend/features/a", FRONTEND),
    ("/api/frontend/client/register", FRONTEND),
    ("/api/frontend/client/metrics", FRONTEND),
    ("/edge/validate", ""),
];

async fn post(
    parapet: &InProcessParapet,
    path: &str,
    token: &str,
    coding: &str,
    body: Vec<u8>,
) -> StatusCode {
    let request = parapet.request(Method::POST, path).header("authorization", token);
    let request =
        if coding.is_empty() { request } else { request.header("content-encoding", coding) };
    send(request.header("content-type", "application/json").body(body)).await.status
}

#[tokio::test]
async fn invalid_body_gets_a_4xx_on_every_route() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    let deep = "[".repeat(100_000);
    let deep_objects = "{\"a\":".repeat(50_000);
    let bodies = [
        "",
        " ",
        "{",
        "}",
        "[]",
        "7",
        "null",
        "true",
        "\"\"",
        "{}",
        "{\"appName\":",
        "\u{0}",
        "{\"appName\":null,\"bucket\":null,\"tokens\":null,\"applications\":null,\"metrics\":null}",
        "{\"appName\":7,\"bucket\":7,\"tokens\":7,\"applications\":7,\"metrics\":7}",
        "{\"appName\":\"\",\"bucket\":{\"start\":\"\",\"stop\":\"\",\"toggles\":{}}}",
        "{\"appName\":\"a\",\"bucket\":{\"start\":\"-999999-01-01T00:00:00Z\",\"stop\":1e400,\"toggles\":{\"a\":{\"yes\":-1,\"no\":1e300}}}}",
        "{\"appName\":\"a\",\"interval\":18446744073709551616,\"started\":-1e308,\"strategies\":[]}",
        "{\"context\":{\"properties\":[]}}",
        "{\"context\":7}",
        "{\"tokens\":[\"a:b.c\",null,{}]}",
        "{\"appName\":\"\\ud800\"}",
        &deep,
        &deep_objects,
    ];
    for (path, token) in BODY_ROUTES {
        for body in bodies {
            let status = post(&parapet, path, token, "", body.into()).await;
            assert!(status.as_u16() < 500, "{path} {body:.60}: {status}");
        }
        let unencoded = post(&parapet, path, token, "gzip", b"{}".to_vec()).await;
        assert_eq!(unencoded, StatusCode::BAD_REQUEST, "{path}");
        let not_utf8 = post(&parapet, path, token, "", b"{\"appName\":\"\xff\"}".to_vec()).await;
        assert_eq!(not_utf8, StatusCode::BAD_REQUEST, "{path}");
    }
}

#[tokio::test]
async fn body_beyond_limit_is_rejected_compressed_or_not() {
    use std::io::Write as _;
    let parapet = InProcessParapet::offline_with(FLAGS, &["--body-limit-bytes", "10000"]).await;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(&vec![b' '; 1_000_000]).unwrap();
    let bomb = gzip.finish().unwrap();
    assert!(bomb.len() < 10_000);
    for (path, token) in BODY_ROUTES {
        let plain = post(&parapet, path, token, "", vec![b' '; 10_001]).await;
        assert_eq!(plain, StatusCode::PAYLOAD_TOO_LARGE, "{path}");
        let packed = post(&parapet, path, token, "gzip", bomb.clone()).await;
        assert_eq!(packed, StatusCode::PAYLOAD_TOO_LARGE, "{path}");
    }
}

#[tokio::test]
async fn oversized_context_is_rejected() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    for path in ["/api/frontend", "/api/proxy/all", "/api/frontend/features/a"] {
        let check = async |context: serde_json::Value, expect: StatusCode| {
            let response = parapet.post(path, FRONTEND, &context).await;
            assert_eq!(response.status, expect, "{path}: {}", response.text());
        };
        let get = parapet.get(&format!("{path}?plan={}", "x".repeat(4097)), FRONTEND).await;
        assert_eq!(get.status, StatusCode::BAD_REQUEST, "{path}: {}", get.text());
        check(json!({"userId": "x".repeat(4096)}), StatusCode::OK).await;
        check(json!({"userId": "x".repeat(4097)}), StatusCode::BAD_REQUEST).await;
        let many = (0..20).map(|n| (format!("p{n}"), json!("x".repeat(4000))));
        let many: serde_json::Map<_, _> = many.collect();
        check(json!({"context": {"properties": many}}), StatusCode::BAD_REQUEST).await;
    }
}

#[test]
fn random_bytes_cause_no_5xx_on_any_endpoint() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let parapet = runtime.block_on(InProcessParapet::offline(FLAGS));
    let body = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..300),
        "[\\[\\]{}\":,a-z0-9. ]{0,100}".prop_map(String::into_bytes),
        json_like().prop_map(|json| json.to_string().into_bytes()),
    ];
    let coding = prop_oneof![4 => Just(""), 1 => Just("gzip"), 1 => Just("br"), 1 => Just("zstd"), 1 => Just("deflate")];
    let config =
        ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(body in body, coding in coding, path in "[a-z0-9%/?&=\\[\\].*~-]{0,40}", header in "[!-~]{0,80}")| {
        runtime.block_on(async {
            for (path, token) in BODY_ROUTES {
                let status = post(&parapet, path, token, coding, body.clone()).await;
                prop_assert!(status.as_u16() < 500, "{}: {}", path, status);
            }
            for (base, token) in [("/", ""), ("/api/client/features/", CLIENT), ("/api/client/features?", CLIENT),
                ("/api/frontend?", FRONTEND), ("/api/frontend/features/", FRONTEND)] {
                let request = parapet.request(Method::GET, &format!("{base}{path}"));
                let request = request.header("authorization", token).header("if-none-match", &header)
                    .header("accept-encoding", &header).header("unleash-client-spec", &header)
                    .header("x-forwarded-for", &header).header("forwarded", &header).header("origin", &header);
                let status = send(request).await.status;
                prop_assert!(status.as_u16() < 500, "{}{}: {}", base, path, status);
            }
            let request = parapet.request(Method::GET, "/api/client/features").header("authorization", &header);
            prop_assert_eq!(send(request).await.status, StatusCode::UNAUTHORIZED);
            Ok(())
        })?;
    });
    let health = runtime.block_on(parapet.get("/internal-backstage/health", ""));
    assert_eq!(health.status, StatusCode::OK);
}

/// JSON with the field names of bodies, and any values.
fn json_like() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::Value;
    let name = proptest::sample::select(vec![
        "appName",
        "instanceId",
        "bucket",
        "start",
        "stop",
        "toggles",
        "yes",
        "no",
        "variants",
        "impactMetrics",
        "samples",
        "value",
        "labels",
        "buckets",
        "le",
        "type",
        "count",
        "sum",
        "applications",
        "metrics",
        "started",
        "interval",
        "strategies",
        "tokens",
        "context",
        "properties",
        "userId",
        "featureName",
        "timestamp",
        "connectVia",
        "environment",
        "projects",
        "name",
        "help",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        Just(json!("2026-01-01T00:00:00Z")),
        Just(json!("+Inf")),
        "\\PC{0,10}".prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((name.clone(), inner), 0..6).prop_map(|entries| entries
                .into_iter()
                .map(|(name, it)| (name.to_owned(), it))
                .collect()),
        ]
    })
}

#[tokio::test]
async fn bytes_that_are_not_http_do_not_affect_other_clients() {
    let timeouts = ["--header-read-timeout-seconds", "1", "--edge-keepalive-timeout", "1"];
    let parapet = InProcessParapet::offline_with(FLAGS, &timeouts).await;
    let huge = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(1_000_000));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(10_000));
    for bytes in [
        &b"\x00\x01\x02\xff\xfe\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET http://other/api/frontend HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /api/frontend HTTP/1.0\r\n\r\n",
        b"GET /internal-backstage/health HTTP/1.1\r\nhost: a\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /api/frontend HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 7\r\n\r\n{}",
        b"POST /api/frontend HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        huge.as_bytes(),
        many.as_bytes(),
    ] {
        let back = parapet.send_raw(bytes).await;
        assert!(!back.starts_with(b"HTTP/1.1 5"), "{}", String::from_utf8_lossy(&back));
    }
    assert_eq!(parapet.get("/api/frontend", FRONTEND).await.status, StatusCode::OK);
}

#[tokio::test]
async fn connection_with_unfinished_head_is_closed() {
    let parapet = InProcessParapet::offline_with(
        FLAGS,
        &["--header-read-timeout-seconds", "1", "--edge-keepalive-timeout", "1"],
    )
    .await;
    let half_heads: [&[u8]; 7] = [
        b"",
        b"G",
        b"GET /api/frontend HTTP/1.1\r\nhost:",
        // The beginning of the HTTP/2 preface, and all of it.
        b"PRI * HT",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /internal-backstage/health HTTP/1.1\r\nhost: a\r\n\r\nGET /again",
        b"GET /internal-backstage/health HTTP/1.1\r\nhost: a\r\n\r\n",
    ];
    let ends = half_heads.map(|head| parapet.send_raw(head));
    // [`InProcessParapet::send_raw`] returns when the server closes the connection.
    let ended =
        tokio::time::timeout(Duration::from_secs(100), futures_util::future::join_all(ends));
    let ended = ended.await.expect("the server closes every connection");
    for whole in &ended[5..] {
        assert!(whole.starts_with(b"HTTP/1.1 200"), "what was whole is answered");
    }
}

#[tokio::test]
async fn idle_connection_is_closed_for_a_new_one_at_the_limit_but_not_a_busy_one() {
    let limits = ["--max-connections", "2", "--max-connections-per-address", "2"];
    let parapet = InProcessParapet::offline_with(FLAGS, &limits).await;
    let request = b"GET /internal-backstage/health HTTP/1.1\r\nhost: a\r\n\r\n";
    let fetch = async |stream: &mut TcpStream| {
        stream.write_all(request).await.unwrap();
        let mut response = vec![0; 4096];
        let length = stream.read(&mut response).await.unwrap();
        assert!(response[..length].starts_with(b"HTTP/1.1 200"));
    };
    let connect = || async { TcpStream::connect(parapet.address()).await.unwrap() };
    let (mut busy, mut idle) = (connect().await, connect().await);
    fetch(&mut busy).await;
    let post = format!(
        "POST /api/frontend HTTP/1.1\r\nhost: a\r\nauthorization: {FRONTEND}\r\ncontent-length: 2\r\n\r\n{{"
    );
    busy.write_all(post.as_bytes()).await.unwrap();
    fetch(&mut idle).await;
    for _ in 0..3 {
        let mut next = connect().await;
        fetch(&mut next).await;
        assert_eq!(idle.read(&mut [0]).await.unwrap(), 0, "it has made room");
        idle = next;
    }
    busy.write_all(b"}").await.unwrap();
    let mut response = [0; 12];
    busy.read_exact(&mut response).await.unwrap();
    assert_eq!(&response, b"HTTP/1.1 200");
}

#[tokio::test]
async fn connection_stays_usable_after_rejected_request_with_body() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    let health = "GET /internal-backstage/health HTTP/1.1\r\nhost: a\r\n\r\n";
    for (path, token, status) in [
        ("/api/client/metrics", "nobody", "401"),
        ("/api/client/metrics", FRONTEND, "403"),
        ("/api/frontend", "nobody", "401"),
    ] {
        let mut stream = TcpStream::connect(parapet.address()).await.unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: {token}\r\ncontent-length: 2\r\n\
             expect: 100-continue\r\n\r\n"
        );
        for (request, expect) in [(&*head, "100"), ("{}", status), (health, "200")] {
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut response = vec![0; 4096];
            let length = stream.read(&mut response).await.unwrap();
            let response = String::from_utf8_lossy(&response[..length]).into_owned();
            assert!(response.starts_with(&format!("HTTP/1.1 {expect}")), "{path}: {response}");
            assert!(!response.contains("connection: close"), "{path}: {response}");
        }
    }
}

#[tokio::test]
async fn pipelined_requests_get_responses_in_order() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    let get = |path: &str, token: &str, more: &str| {
        format!("GET {path} HTTP/1.1\r\nhost: a\r\nauthorization: {token}\r\n{more}\r\n")
    };
    let requests = [
        get("/internal-backstage/health", "", ""),
        get("/api/frontend", FRONTEND, ""),
        get("/nothing", "", ""),
        format!(
            "POST /api/frontend HTTP/1.1\r\nhost: a\r\nauthorization: {FRONTEND}\r\ncontent-length: 1\r\n\r\n{{"
        ),
        get("/api/client/features", FRONTEND, ""),
        get("/api/client/features", CLIENT, "connection: close\r\n"),
    ];
    let back = parapet.send_raw(requests.concat().as_bytes()).await;
    let back = String::from_utf8(back).unwrap();
    let statuses: Vec<_> = back.split("HTTP/1.1 ").skip(1).map(|response| &response[..3]).collect();
    assert_eq!(statuses, ["200", "200", "404", "400", "403", "200"], "{back}");
}

#[tokio::test]
async fn http2_with_prior_knowledge_is_supported() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    let client = reqwest::Client::builder().http2_prior_knowledge().no_proxy().build().unwrap();
    let url = format!("http://{}/api/frontend", parapet.address());
    let fetch = || client.get(&url).header("authorization", FRONTEND).send();
    let responses = futures_util::future::join_all((0..300).map(|_| fetch())).await;
    for response in responses {
        let response = response.unwrap();
        assert_eq!(
            (response.version(), response.status()),
            (reqwest::Version::HTTP_2, StatusCode::OK)
        );
        assert!(response.text().await.unwrap().contains("toggles"));
    }
}

#[tokio::test]
async fn slow_body_times_out() {
    let parapet = InProcessParapet::offline_with(FLAGS, &["--edge-request-timeout", "1"]).await;
    let request = format!(
        "POST /api/frontend HTTP/1.1\r\nhost: a\r\nauthorization: {FRONTEND}\r\ncontent-length: 9\r\n\r\n{{"
    );
    let back = parapet.send_raw(request.as_bytes()).await;
    assert!(back.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&back));
}

#[tokio::test]
async fn accept_errors_are_logged_once_a_minute_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    std::fs::write(&file, FLAGS).unwrap();
    let parapet = Parapet::mode("offline").flag("--bootstrap-file", &file);
    let parapet = parapet.flag("--client-tokens", CLIENT).start().await;
    let address = parapet.url().replace("http://", "");
    // It is open before the file descriptors run out.
    let mut scraper = TcpStream::connect(&address).await.unwrap();
    let mut failures = async || {
        let request = "GET /internal-backstage/metrics HTTP/1.1\r\nhost: parapet\r\n\r\n";
        scraper.write_all(request.as_bytes()).await.unwrap();
        let mut page = Vec::new();
        loop {
            assert_ne!(scraper.read_buf(&mut page).await.unwrap(), 0, "{page:?}");
            let text = String::from_utf8_lossy(&page);
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if body.len() >= length.unwrap().parse().unwrap() {
                let mut lines = body.lines();
                let sample = "parapet_accept_failures_total ";
                return lines.find_map(|line| line.strip_prefix(sample)?.parse::<u64>().ok());
            }
        }
    };
    assert_eq!(failures().await, Some(0));
    parapet.leave_free_fds(0);
    // More than the number of file descriptors that may be released meanwhile.
    let mut waiting = Vec::new();
    for _ in 0..20 {
        waiting.push(TcpStream::connect(&address).await.unwrap());
    }
    wait_until("accepting fails again and again", Duration::from_mins(1), async || {
        failures().await.filter(|it| *it > 10)
    })
    .await;
    let lines = parapet.logged(LogEvent::warn("server").with("error"));
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("Too many open files"), "{lines:?}");
}
