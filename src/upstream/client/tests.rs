//! Requests to scripted servers: what is sent, and how responses and failures are classified.

use std::{
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use super::*;
use crate::{
    telemetry::error_chain,
    upstream::{
        error::{Fault, Retry},
        scripted_server::{ScriptedReply, ScriptedServer, config},
    },
};

const SECRET: &str = "*:development.964a287e1b728cb5f4f3e0120df92cb5f4f3e0120df92cb5964a287e";

fn token() -> Token {
    Token::parse(SECRET).expect("token")
}

/// Fetches flags from a server that always sends this reply.
async fn fetch(reply: ScriptedReply, etag: Option<&str>) -> (Result<FetchResult, Error>, Upstream) {
    let server = ScriptedServer::start(move |_| reply.clone()).await;
    let mut transport = Transport::new(server.config()).expect("client");
    transport.max_body = 64;
    let upstream = Upstream(Arc::new(transport));
    (upstream.fetch_features(&token(), etag).await.map(|it| it.flags), upstream)
}

#[tokio::test]
async fn requests_carry_token_app_names_and_configured_headers() {
    let server = ScriptedServer::start(|_| (202, &[], String::new())).await;
    let mut config = server.config();
    config.token_header = HeaderName::from_static("x-token");
    let name = |text| HeaderName::from_static(text);
    config.extra_headers = vec![
        (name("x-extra"), HeaderValue::from_static("a")),
        (name("unleash-instanceid"), HeaderValue::from_static("mine")),
    ];
    let upstream = Upstream::new(config).expect("client");
    upstream
        .send_usage(&token(), BatchId::default(), Bytes::from_static(b"{}"))
        .await
        .expect("202");
    let seen = server.received_requests();
    let [request] = seen.as_slice() else { panic!("{seen:?}") };
    assert_eq!(request.line, "POST /base/api/client/metrics/bulk");
    assert_eq!(request.body, "{}");
    for (name, value) in [
        ("x-token", SECRET),
        ("x-extra", "a"),
        ("unleash-instanceid", "mine"),
        ("unleash-appname", "parapet"),
        ("unleash-client-spec", "6.1.0"),
        ("content-type", "application/json"),
        ("idempotency-key", "00000000000000000000000000000000"),
        ("user-agent", concat!("parapet/", env!("CARGO_PKG_VERSION"))),
    ] {
        assert_eq!(request.headers[name], value, "{name}");
    }
    assert_eq!(request.headers["unleash-connection-id"].len(), 26);
    assert!(request.headers.get("authorization").is_none());
}

#[tokio::test]
async fn etag_is_sent_in_strong_form_and_yields_304() {
    let server = ScriptedServer::start(|request| match request.headers.get(IF_NONE_MATCH) {
        Some(known) if known == "\"a:1:v1\"" => (304, &[], String::new()),
        _ => (200, &[("etag", "W/\"a:1:v1\"")], "{}".to_owned()),
    })
    .await;
    let upstream = Upstream::new(server.config()).expect("client");
    let first = upstream.fetch_features(&token(), None).await.expect("200").flags;
    let FetchResult::Changed { body, etag } = first else { panic!("{first:?}") };
    assert_eq!((&body[..], etag.as_deref()), (&b"{}"[..], Some("W/\"a:1:v1\"")));
    let second = upstream.fetch_features(&token(), etag.as_deref()).await.expect("304");
    assert_eq!(
        second,
        FeaturesResponse { flags: FetchResult::NotModified, prefers_streaming: false }
    );
}

#[tokio::test]
async fn invalid_etags_never_panic() {
    let (fetched, _) = fetch((200, &[("etag", "\"~\"")], "{}".to_owned()), Some("\n")).await;
    assert_eq!(
        fetched.expect("200"),
        FetchResult::Changed { body: Bytes::from_static(b"{}"), etag: None }
    );
    let (unasked, _) = fetch((304, &[], String::new()), None).await;
    assert!(matches!(unasked, Err(Error::UnexpectedNotModified)), "{unasked:?}");
}

#[tokio::test]
async fn fetch_mode_header_can_request_streaming() {
    for (mode, prefers_streaming) in [("streaming", true), ("polling", false)] {
        let headers: &'static [_] = vec![("fetch-mode", mode)].leak();
        let server = ScriptedServer::start(move |_| (200, headers, "{}".to_owned())).await;
        let upstream = Upstream::new(server.config()).expect("client");
        let polled = upstream.fetch_features(&token(), None).await.expect("200");
        assert_eq!(polled.prefers_streaming, prefers_streaming, "{mode}");
    }
}

const STREAM: &[(&str, &str)] = &[("content-type", "Text/Event-Stream; charset=utf-8")];

#[tokio::test]
async fn stream_request_sends_last_event_id_and_yields_events() {
    let events = "event: e\nid: 7\ndata: x\n\n";
    let server = ScriptedServer::start(move |_| (200, STREAM, events.to_owned())).await;
    let upstream = Upstream::new(server.config()).expect("client");
    for last in [None, Some(7)] {
        let stream = upstream.open_stream(&token(), last).await.expect("200");
        let mut stream = stream.expect("a stream");
        let events = stream.next_events().await.expect("no failure").expect("events");
        assert_eq!((events.len(), &*events[0].id), (1, "7"));
        assert_eq!(stream.next_events().await.expect("no failure"), None);
    }
    let [first, second] = &server.received_requests()[..] else {
        panic!("{:?}", server.received_requests())
    };
    assert_eq!(first.line, "GET /base/api/client/streaming");
    let header = |name: &str| second.headers[name].to_str().expect("text");
    assert_eq!(header("accept"), "text/event-stream");
    assert_eq!(header("accept-encoding"), "identity");
    assert_eq!(header("authorization"), SECRET);
    assert_eq!(header("unleash-appname"), "parapet");
    assert_eq!((first.headers.get("last-event-id"), header("last-event-id")), (None, "7"));
}

#[tokio::test]
async fn missing_stream_support_is_not_an_error_but_failure_is() {
    let follow = async |status: u16, headers: &'static [_]| {
        let server = ScriptedServer::start(move |_| (status, headers, "<html>".to_owned())).await;
        let upstream = Upstream::new(server.config()).expect("client");
        (upstream.open_stream(&token(), None).await, upstream.health())
    };
    for (status, headers) in [(404, STREAM), (405, &[]), (501, &[]), (200, &[]), (204, STREAM)] {
        let (answer, health) = follow(status, headers).await;
        assert!(answer.expect("an answer").is_none(), "{status}");
        assert_eq!((health.consecutive_failures, health.last_error), (0, None));
    }
    for status in [401, 429, 500] {
        let (answer, health) = follow(status, &[("retry-after", "7")]).await;
        let error = answer.expect_err("a failure");
        assert_eq!(error.status().map(|it| it.as_u16()), Some(status));
        assert_eq!(health.last_error.map(|(_, text)| text), Some(error_chain(&error)));
    }
}

#[tokio::test]
async fn stream_head_and_other_responses_time_out() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let mut config = config(&format!("http://{}", listener.local_addr().expect("an address")));
    config.request_timeout = Duration::from_millis(50);
    let upstream = Upstream::new(config).expect("client");
    let error = upstream.open_stream(&token(), None).await.expect_err("no head");
    assert!(matches!(error, Error::StreamTimeout(_)), "{error:?}");
    let error = upstream.fetch_features(&token(), None).await.expect_err("no answer");
    assert!(matches!(error, Error::Timeout(_)), "{error:?}");
    let relayed = upstream.relay(hyper::Request::new(Bytes::new())).await;
    let error = relayed.expect_err("no answer");
    assert!(matches!(error, Error::Timeout(_)), "{error:?}");
}

#[tokio::test]
async fn body_larger_than_limit_is_rejected() {
    let (fits, _) = fetch((200, &[], "x".repeat(64)), None).await;
    assert!(fits.is_ok(), "{fits:?}");
    let (large, _) = fetch((200, &[], "x".repeat(65)), None).await;
    assert!(matches!(large, Err(Error::TooLarge { limit: 64 })), "{large:?}");
}

#[tokio::test]
async fn failures_are_classified_and_recorded_in_health() {
    let (throttled, upstream) = fetch((429, &[("retry-after", "7")], String::new()), None).await;
    let error = throttled.expect_err("429");
    assert_eq!(error.retry(), Retry::Later(Some(Duration::from_secs(7))));
    assert_eq!(error.status(), Some(StatusCode::TOO_MANY_REQUESTS));
    let health = upstream.health();
    assert_eq!((health.consecutive_failures, health.last_success), (1, None));
    let (_, text) = health.last_error.expect("an error");
    assert_eq!(text, "upstream answered 429 Too Many Requests");

    let (refused, upstream) = fetch((403, &[], String::new()), None).await;
    assert!(refused.expect_err("403").is_token_refused());
    assert_eq!(upstream.health().consecutive_failures, 0);
}

#[tokio::test]
async fn redirect_to_another_origin_is_an_error_and_does_not_leak_the_token() {
    let away = ScriptedServer::start(|_| (200, &[], "{}".to_owned())).await;
    let place = away.config().url;
    let location = place.join("api/client/features?key=s3cret").expect("url").to_string().leak();
    let location: &'static [_] = vec![("location", &*location)].leak();
    let (fetched, _) = fetch((302, location, String::new()), None).await;
    let error = fetched.expect_err("302");
    assert!(matches!(error, Error::Redirect { status: StatusCode::FOUND, .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains(place.as_str().trim_end_matches('/')), "{message}");
    assert!(!message.contains("s3cret") && !message.contains("features"), "{message}");
    assert_eq!(error.fault(), Fault::Local);
    assert!(away.received_requests().is_empty());
}

#[tokio::test]
async fn redirect_within_origin_is_followed_with_token_and_body() {
    const FEATURES: &[(&str, &str)] = &[("location", "/moved/api/client/features")];
    const BULK: &[(&str, &str)] = &[("location", "/moved/api/client/metrics/bulk")];
    const VALIDATE: &[(&str, &str)] = &[("location", "/moved/edge/validate")];
    let server = ScriptedServer::start(|request| match request.line.as_str() {
        "GET /moved/api/client/features" => (200, &[], "{}".to_owned()),
        "POST /moved/api/client/metrics/bulk" => (202, &[], String::new()),
        line if line.starts_with("GET /base/") => (301, FEATURES, String::new()),
        line if line.contains("/bulk") => (308, BULK, String::new()),
        _ => (302, VALIDATE, String::new()),
    })
    .await;
    let upstream = Upstream::new(server.config()).expect("client");
    upstream.fetch_features(&token(), None).await.expect("301 is followed");
    upstream
        .send_usage(&token(), BatchId::default(), Bytes::from_static(b"[7]"))
        .await
        .expect("308 is followed");
    let seen = server.received_requests();
    assert_eq!(seen[1].headers["authorization"], SECRET);
    let moved = "POST /moved/api/client/metrics/bulk";
    assert_eq!((seen[3].line.as_str(), seen[3].body.as_str()), (moved, "[7]"));
    // A browser would turn this POST into a GET.
    let error = upstream.validate_tokens(&[token()]).await.expect_err("302");
    assert!(error.to_string().contains("/moved"), "{error}");
    assert_eq!(server.received_requests().len(), 5);
}

#[tokio::test]
async fn redirect_to_login_page_grants_no_access() {
    const LOGIN: &[(&str, &str)] = &[("location", "/base/login")];
    for status in [200, 404] {
        let server = ScriptedServer::start(move |request| match request.line.as_str() {
            "GET /base/login" => (status, &[], "{}".to_owned()),
            _ => (302, LOGIN, String::new()),
        })
        .await;
        let upstream = Upstream::new(server.config()).expect("client");
        for kind in [TokenKind::Client, TokenKind::Frontend, TokenKind::Admin] {
            let admitted = upstream.probe_access(&token(), kind).await;
            assert!(matches!(admitted, Err(Error::Redirect { .. })), "{admitted:?}");
        }
    }
}

#[tokio::test]
async fn circular_redirect_is_an_error() {
    const CIRCLE: &[(&str, &str)] = &[("location", "/base/api/client/features")];
    let server = ScriptedServer::start(|_| (307, CIRCLE, String::new())).await;
    let upstream = Upstream::new(server.config()).expect("client");
    let error = upstream.fetch_features(&token(), None).await.expect_err("a circle");
    assert!(matches!(error, Error::Redirect { .. }), "{error:?}");
    assert_eq!(server.received_requests().len(), 6);
}

#[tokio::test]
async fn decode_error_does_not_contain_the_body() {
    let server = ScriptedServer::start(|_| (200, &[], format!(r#"{{"tokens":"{SECRET}"}}"#))).await;
    let upstream = Upstream::new(server.config()).expect("client");
    let error = upstream.validate_tokens(&[token()]).await.expect_err("no list");
    assert!(matches!(error, Error::Decode { line: 1, .. }), "{error:?}");
    assert!(!format!("{error:?} {}", error_chain(&error)).contains("964a"));
    assert!(server.received_requests()[0].headers.get("authorization").is_none());
    assert_eq!(server.received_requests()[0].body, format!(r#"{{"tokens":["{SECRET}"]}}"#));
}

#[tokio::test]
async fn admin_token_is_marked_refused_only_by_401_on_token_list() {
    let status = Arc::new(AtomicU16::new(200));
    let answer = Arc::clone(&status);
    let server = ScriptedServer::start(move |request| match answer.load(Ordering::Relaxed) {
        200 if request.line.ends_with("environments") => {
            (200, &[], r#"{"environments":[]}"#.to_owned())
        }
        200 => (200, &[], r#"{"tokens":[]}"#.to_owned()),
        other => (other, &[], String::new()),
    })
    .await;
    let upstream = Upstream::new(server.config()).expect("client");
    let admin = AdminToken::new(Token::parse("*:*.secret").expect("token"), None);
    for other in [200, 403, 404, 429, 500, 503, 302] {
        status.store(other, Ordering::Relaxed);
        assert_eq!(upstream.list_api_tokens(&admin).await.is_ok(), other == 200);
        assert_eq!(admin.refused_since(), None, "{other}");
    }
    status.store(401, Ordering::Relaxed);
    upstream.list_environments(&admin).await.expect_err("401");
    assert_eq!(admin.refused_since(), None, "a proxy may block one endpoint");
    // But a reload of the file is requested.
    admin.reload_requested().await;
    upstream.list_api_tokens(&admin).await.expect_err("401");
    assert!(admin.refused_since().is_some());
    status.store(500, Ordering::Relaxed);
    upstream.list_api_tokens(&admin).await.expect_err("500");
    assert!(admin.refused_since().is_some(), "a 500 is not an acceptance");
    status.store(200, Ordering::Relaxed);
    upstream.list_environments(&admin).await.expect("200");
    assert!(admin.refused_since().is_some(), "another endpoint does not decide");
    upstream.list_api_tokens(&admin).await.expect("200");
    assert_eq!(admin.refused_since(), None);
}

#[tokio::test]
async fn many_tokens_are_validated_in_requests_below_size_limit() {
    let server = ScriptedServer::start(|_| (200, &[], r#"{"tokens":[]}"#.to_owned())).await;
    let upstream = Upstream::new(server.config()).expect("client");
    let tokens = vec![token(); 3000];
    assert_eq!(upstream.validate_tokens(&tokens).await.expect("a reply"), []);
    let sizes: Vec<_> = server.received_requests().iter().map(|it| it.body.len()).collect();
    assert!(sizes.iter().all(|&size| size <= 100_000), "{sizes:?}");
    let sent =
        server.received_requests().iter().map(|it| it.body.matches(SECRET).count()).sum::<usize>();
    assert_eq!(sent, tokens.len());
}

#[tokio::test]
async fn unreachable_error_does_not_contain_the_url() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    drop(listener);
    let config = config(&format!("http://user:hunter2@{address}/"));
    let upstream = Upstream::new(config).expect("client");
    let error = upstream.fetch_features(&token(), None).await.expect_err("nobody listens");
    assert!(matches!(error, Error::Unreachable(_)), "{error:?}");
    assert!(!error.is_ambiguous());
    let shown = format!("{error:?} {} {upstream:?}", error_chain(&error));
    assert!(!shown.contains("hunter2") && !shown.contains("964a"), "{shown}");
}

#[tokio::test]
async fn connection_that_breaks_midway_is_ambiguous() {
    use tokio::io::AsyncWriteExt as _;

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let head = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{";
        stream.write_all(head).await.expect("a peer");
    });
    let upstream = Upstream::new(config(&format!("http://{address}"))).expect("client");
    let error = upstream.fetch_features(&token(), None).await.expect_err("half a body");
    assert!(matches!(error, Error::Interrupted(_)), "{error:?}");
    assert!(error.is_ambiguous());
}

#[test]
fn url_without_http_scheme_is_rejected() {
    // This parses as a URL with the scheme `unleash`.
    let error = Upstream::new(config("unleash:4242")).expect_err("no scheme");
    assert!(matches!(error, Error::InvalidScheme), "{error:?}");
}

#[test]
fn error_names_invalid_certificate_file() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let mut config = config("https://unleash.example");
    config.certificate_file = Some(file.path().to_owned());
    let error = Upstream::new(config).expect_err("no certificate");
    assert!(error.to_string().contains(&*file.path().to_string_lossy()), "{error}");
}
