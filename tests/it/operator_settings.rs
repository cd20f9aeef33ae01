//! Settings and pages for operators: addresses, paths, CORS, probes, metrics and the admin listener.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::in_process_parapet::{CLIENT, FRONTEND, InProcessParapet, send};
use crate::rig::{Parapet, http, wait_until};

const FLAGS: &str = r#"{"features":[{"name":"a","enabled":true,"strategies":[]}]}"#;

const ADMIN: &str = "*:*.admin-0123456789abcdef0123456789abcdef";
const CLIENT_TOKEN: &str = "*:development.reader-0123456789abcdef0123456789";
const FRONTEND_TOKEN: &str = "*:development.browser-0123456789abcdef012345678";

const TOKEN_VARIABLES: [(&str, &str); 3] = [
    ("INIT_ADMIN_API_TOKENS", ADMIN),
    ("INIT_BACKEND_API_TOKENS", CLIENT_TOKEN),
    ("INIT_FRONTEND_API_TOKENS", FRONTEND_TOKEN),
];

#[tokio::test]
async fn base_path_prefixes_every_path() {
    for base in ["/flags", "flags", "/flags/"] {
        let parapet = InProcessParapet::offline_with(FLAGS, &["--base-path", base]).await;
        let check = async |path: &str, expect: u16| {
            assert_eq!(parapet.get(path, CLIENT).await.status, expect, "{base} {path}");
        };
        check("/flags/api/client/features", 200).await;
        check("/flags/internal-backstage/health", 200).await;
        check("//flags//api/client/features/", 200).await;
        check("/api/client/features", 404).await;
        check("/internal-backstage/health", 404).await;
        check("/flagsapi/client/features", 404).await;
        check("/flags/flags/api/client/features", 404).await;
        check("/flags", 404).await;
    }
}

#[tokio::test]
async fn duplicate_and_trailing_slashes_are_ignored() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    for path in ["//api//client///features", "/api/client/features/", "/api/client/features/a/"] {
        assert_eq!(parapet.get(path, CLIENT).await.status, StatusCode::OK, "{path}");
    }
    assert_eq!(parapet.get("/api/frontend//", FRONTEND).await.status, StatusCode::OK);
    assert_eq!(parapet.get("/", CLIENT).await.status, StatusCode::NOT_FOUND);
    assert_eq!(parapet.get("//", CLIENT).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn cors_allows_every_origin_by_default() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    let preflight = parapet
        .request(Method::OPTIONS, "/api/frontend")
        .header("origin", "https://shop.example")
        .header("access-control-request-method", "GET")
        .header("access-control-request-headers", "authorization,unleash-sdk");
    let preflight = send(preflight).await;
    assert_eq!((preflight.status, preflight.text()), (StatusCode::OK, ""));
    assert_eq!(preflight.header("access-control-allow-origin"), "*");
    assert_eq!(preflight.header("access-control-allow-methods"), "*");
    assert_eq!(preflight.header("access-control-allow-headers"), "authorization,unleash-sdk");
    assert_eq!(preflight.header("access-control-max-age"), "172800");
    for token in [FRONTEND, "refused"] {
        let request = parapet.request(Method::GET, "/api/frontend").header("authorization", token);
        let received = send(request.header("origin", "https://shop.example")).await;
        assert_eq!(received.header("access-control-allow-origin"), "*", "also where it is refused");
        assert_eq!(received.header("access-control-expose-headers"), "*");
    }
    let same_origin = parapet.get("/api/frontend", FRONTEND).await;
    assert!(!same_origin.headers.contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn cors_allows_only_configured_origins() {
    let rules = [
        "--cors-origin=https://shop.example,https://www.example",
        "--cors-methods=GET,POST",
        "--cors-allowed-headers=authorization",
        "--cors-exposed-headers=etag",
        "--cors-credentials",
        "--cors-max-age=60",
    ];
    let parapet = InProcessParapet::offline_with(FLAGS, &rules).await;
    let fetch = async |method, origin| {
        let request = parapet.request(method, "/api/frontend").header("authorization", FRONTEND);
        send(request.header("origin", origin)).await
    };
    let preflight = fetch(Method::OPTIONS, "https://www.example").await;
    assert_eq!(preflight.header("access-control-allow-origin"), "https://www.example");
    assert_eq!(preflight.header("access-control-allow-methods").replace(' ', ""), "GET,POST");
    assert_eq!(preflight.header("access-control-allow-headers"), "authorization");
    assert_eq!(preflight.header("access-control-allow-credentials"), "true");
    assert_eq!(preflight.header("access-control-max-age"), "60");
    let shop = fetch(Method::GET, "https://shop.example").await;
    assert_eq!(shop.header("access-control-allow-origin"), "https://shop.example");
    assert_eq!(shop.header("access-control-expose-headers"), "etag");
    for method in [Method::OPTIONS, Method::GET] {
        let other = fetch(method, "https://evil.example").await;
        assert!(!other.headers.contains_key("access-control-allow-origin"));
        let vary: Vec<_> = other.headers.get_all("vary").iter().collect();
        assert!(vary.iter().any(|value| *value == "origin"), "caches must tell origins apart");
    }
}

#[tokio::test]
async fn allow_and_deny_lists_restrict_addresses() {
    let check = async |args: &[&str], from: Option<&str>, expect: StatusCode| {
        let parapet = InProcessParapet::offline_with(FLAGS, args).await;
        let request = parapet.request(Method::GET, "/api/frontend");
        let request = match from {
            Some(address) => request.header("x-forwarded-for", address),
            None => request,
        };
        let response = send(request.header("authorization", FRONTEND)).await;
        assert_eq!(response.status, expect, "{args:?} {from:?}");
    };
    check(&["--allow-list", "127.0.0.1"], None, StatusCode::OK).await;
    check(&["--allow-list", "10.0.0.0/8,127.0.0.0/8"], None, StatusCode::OK).await;
    check(&["--allow-list", "10.0.0.0/8"], None, StatusCode::FORBIDDEN).await;
    check(&["--allow-list", "10.0.0.0/8"], Some("10.1.1.1"), StatusCode::FORBIDDEN).await;
    let bare = ["--allow-list", "10.0.0.0/8", "--trust-proxy"];
    check(&bare, Some("10.1.1.1"), StatusCode::FORBIDDEN).await;
    let behind = [&bare[..], &["--proxy-trusted-servers", "127.0.0.1"]].concat();
    check(&behind, Some("10.1.1.1"), StatusCode::OK).await;
    check(&behind, Some("10.1.1.1, 192.0.2.7"), StatusCode::FORBIDDEN).await;
    check(&["--deny-list", "127.0.0.1"], None, StatusCode::FORBIDDEN).await;
    check(&["--deny-list", "::1,10.0.0.0/8"], None, StatusCode::OK).await;
    check(&["--deny-list", "127.0.0.1", "--allow-list", "0.0.0.0/0"], None, StatusCode::FORBIDDEN)
        .await;
}

/// With any headers, on each route of both listeners.
#[tokio::test]
async fn denied_address_gets_403_on_every_route_of_both_listeners() {
    let refused = async |args: &[&str]| {
        let parapet = InProcessParapet::standalone(FLAGS, args, &TOKEN_VARIABLES).await;
        let check = async |method: Method, path: &str, request: &dyn Fn() -> RequestBuilder| {
            for claimed in [None, Some("198.51.100.7")] {
                let request = request().header("authorization", ADMIN);
                let request = claimed
                    .into_iter()
                    .fold(request, |request, address| request.header("x-forwarded-for", address));
                let response = send(request).await;
                let what = format!("{args:?} {method} {path} {claimed:?}: {response:?}");
                assert_eq!(response.status, StatusCode::FORBIDDEN, "{what}");
                assert_eq!(response.json()["name"], "NoAccessError", "{what}");
                let message = response.json()["message"].to_string();
                assert!(message.contains("from this address"), "{what}");
            }
        };
        let (get, post) = (Method::GET, Method::POST);
        for (method, path) in [
            (&get, "/api/frontend"),
            (&Method::OPTIONS, "/api/frontend"),
            (&get, "/api/client/features"),
            (&get, "/api/client/streaming"),
            (&post, "/api/client/metrics"),
            (&post, "/ofrep/v1/evaluate/flags"),
            (&post, "/edge/validate"),
            (&get, "/internal-backstage/health"),
            (&get, "/internal-backstage/ready"),
            (&get, "/internal-backstage/prometheus"),
            (&get, "/nowhere"),
        ] {
            check(method.clone(), path, &|| parapet.request(method.clone(), path)).await;
        }
        for (method, path) in [
            (&get, "/api/client/features"),
            (&Method::OPTIONS, "/api/frontend"),
            (&post, "/edge/validate"),
            (&get, "/internal-backstage/health"),
            (&get, "/internal-backstage/tokens"),
            (&get, "/internal-backstage/prometheus"),
            (&get, "/status"),
            (&get, "/docs/openapi.json"),
            (&get, "/"),
            (&get, "/console/app.js"),
            (&post, "/auth/simple/login"),
            (&post, "/logout"),
            (&get, "/api/admin/user"),
            (&Method::DELETE, "/api/admin/api-tokens/x"),
            (&get, "/nowhere"),
        ] {
            check(method.clone(), path, &|| parapet.admin_request(method.clone(), path)).await;
        }
    };
    refused(&["--deny-list", "127.0.0.1"]).await;
    refused(&["--deny-list", "127.0.0.1", "--trust-proxy"]).await;
    refused(&["--allow-list", "198.51.100.0/24", "--trust-proxy"]).await;
}

/// With values from a flag file, which are logged like those from upstream: in each format, and JSON
/// stays valid.
#[tokio::test]
async fn long_flag_values_are_truncated_in_log_lines() {
    let long = "x".repeat(100_000);
    let constraint = |operator: &str, value: &str| {
        json!([{ "name": "default", "constraints": [
            { "contextName": "a", "operator": operator, "value": value }] }])
    };
    let rollout = json!({ "percentage": long, "groupId": "a" });
    let flags = [
        json!({ "name": "operand", "strategies": constraint("NUM_GT", &long) }),
        json!({ "name": "line-break", "strategies": constraint("NUM_GT", &format!("\n{long}")) }),
        json!({ "name": "operator", "strategies": constraint(&long, "1") }),
        json!({ "name": "strategy", "strategies": [{ "name": long }] }),
        json!({ "name": "rollout",
            "strategies": [{ "name": "gradualRolloutUserId", "parameters": rollout }] }),
        json!({ "name": "parent", "strategies": [], "dependencies": [{ "feature": "y".repeat(100_000) }] }),
        json!({ "name": long, "strategies": [{ "name": "unknown" }] }),
    ];
    let flags = flags.map(|mut flag| {
        flag["enabled"] = true.into();
        flag
    });
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    std::fs::write(&file, json!({ "version": 2, "features": flags }).to_string()).unwrap();
    for format in ["plain", "json", "pretty"] {
        let parapet = Parapet::mode("offline").flag("--bootstrap-file", &file);
        let parapet = parapet.flag("--client-tokens", CLIENT).flag("--log-format", format);
        let parapet = parapet.start().await;
        let log = wait_until("the start is logged", Duration::from_secs(10), async || {
            Some(parapet.log()).filter(|log| log.contains(env!("CARGO_PKG_VERSION")))
        });
        let log = log.await;
        for flag in ["operand", "line-break", "operator", "strategy", "rollout", "parent"] {
            assert!(log.contains(&format!("flag `{flag}`: ")), "{format}, {flag}: {log:.9999}");
        }
        assert_eq!(log.matches("… (100000 bytes)").count(), 6, "{format}: {log:.9999}");
        assert_eq!(log.matches("… (100001 bytes)").count(), 1, "{format}: {log:.9999}");
        for line in log.lines() {
            assert!(line.len() <= 4096, "{format}: {} bytes: {line:.999}", line.len());
            assert!(format != "json" || serde_json::from_str::<Value>(line).is_ok(), "{line}");
        }
    }
}

#[tokio::test]
async fn disabled_endpoints_get_404() {
    let check = async |flag: &str, paths: &[&str]| {
        let parapet = InProcessParapet::offline_with(FLAGS, &[flag]).await;
        for path in paths {
            let response = parapet.get(path, FRONTEND).await;
            assert_eq!(response.status, StatusCode::NOT_FOUND, "{flag} {path}");
        }
        assert_eq!(parapet.get("/api/frontend", FRONTEND).await.status, StatusCode::OK);
    };
    check("--disable-all-endpoint", &["/api/frontend/all", "/api/proxy/all"]).await;
    let metrics = ["/internal-backstage/metrics", "/internal-backstage/prometheus"];
    check("--disable-metrics-endpoint", &metrics).await;
    for (flag, path) in [
        ("--disable-metrics-batch-endpoint", "/internal-backstage/metricsbatch"),
        ("--disable-features-endpoint", "/internal-backstage/features"),
        ("--disable-tokens-endpoint", "/internal-backstage/tokens"),
        ("--disable-instance-data-endpoint", "/internal-backstage/instancedata"),
        ("--disable-metrics-endpoint", "/metrics"),
    ] {
        let parapet = InProcessParapet::standalone(FLAGS, &[flag], &TOKEN_VARIABLES).await;
        let request = parapet.admin_request(Method::GET, path).header("authorization", ADMIN);
        assert_eq!(send(request).await.status, StatusCode::NOT_FOUND, "{flag}");
        let request = parapet.admin_request(Method::GET, "/status").header("authorization", ADMIN);
        assert_eq!(send(request).await.status, StatusCode::OK, "{flag}");
    }
}

#[tokio::test]
async fn probes_and_metrics_need_no_token() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    let (health, ready) = (json!({"status": "OK"}), json!({"status": "READY"}));
    for (path, expect) in
        [("/internal-backstage/health", &health), ("/internal-backstage/ready", &ready)]
    {
        for request in
            [parapet.request(Method::GET, path), parapet.admin_request(Method::GET, path)]
        {
            let response = send(request).await;
            assert_eq!((response.status, &response.json()), (StatusCode::OK, expect), "{path}");
        }
        let head = send(parapet.request(Method::HEAD, path)).await;
        assert_eq!((head.status, head.text()), (StatusCode::OK, ""));
        let post = send(parapet.request(Method::POST, path)).await;
        assert_eq!(
            (post.status, post.header("allow")),
            (StatusCode::METHOD_NOT_ALLOWED, "GET, HEAD")
        );
    }
    for path in ["/live", "/ready", "/metrics"] {
        let response = send(parapet.admin_request(Method::GET, path)).await;
        assert_eq!(response.status, StatusCode::OK, "{path}");
    }
    let scrape = send(parapet.request(Method::GET, "/internal-backstage/prometheus")).await;
    assert!(scrape.header("content-type").starts_with("text/plain"));
    assert!(scrape.text().contains("build_info{"), "{}", scrape.text());
    assert!(scrape.text().contains("parapet_snapshot_flags{environment=\"development\"} "));
}

/// Paths of the admin listener that require an admin token.
const ADMIN_ONLY_PATHS: [&str; 5] = [
    "/status",
    "/internal-backstage/features",
    "/internal-backstage/tokens",
    "/internal-backstage/metricsbatch",
    "/internal-backstage/instancedata",
];

#[tokio::test]
async fn admin_paths_require_an_admin_token_and_are_absent_from_the_data_listener() {
    let parapet = InProcessParapet::standalone(FLAGS, &[], &TOKEN_VARIABLES).await;
    for path in ADMIN_ONLY_PATHS {
        let fetch = async |token: &str| {
            let request = parapet.admin_request(Method::GET, path).header("authorization", token);
            send(request).await
        };
        let none = send(parapet.admin_request(Method::GET, path)).await;
        assert_eq!(none.status, StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(fetch("*:*.guessed").await.status, StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(fetch(CLIENT_TOKEN).await.status, StatusCode::FORBIDDEN, "{path}");
        assert_eq!(fetch(FRONTEND_TOKEN).await.status, StatusCode::FORBIDDEN, "{path}");
        assert_eq!(fetch(&format!("Bearer {ADMIN}")).await.status, StatusCode::OK, "{path}");
        let public = parapet.request(Method::GET, path).header("authorization", ADMIN);
        assert_eq!(send(public).await.status, StatusCode::NOT_FOUND, "{path}");
    }
    let check = async |path: &str, token: &str, expect| {
        let request = parapet.admin_request(Method::GET, path).header("authorization", token);
        assert_eq!(send(request).await.status, expect, "{path}");
    };
    check("/nothing", ADMIN, StatusCode::NOT_FOUND).await;
    // This path serves edges that use this instance as their upstream.
    check("/api/client/features", ADMIN, StatusCode::FORBIDDEN).await;
    check("/api/client/features", CLIENT_TOKEN, StatusCode::OK).await;
    check("/api/frontend", FRONTEND_TOKEN, StatusCode::OK).await;
    let post = parapet.admin_request(Method::POST, "/status").header("authorization", ADMIN);
    assert_eq!(send(post).await.status, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn offline_admin_listener_accepts_configured_admin_tokens() {
    let check = async |args: &[&str], expect: StatusCode| {
        let parapet = InProcessParapet::offline_with(FLAGS, args).await;
        for path in ADMIN_ONLY_PATHS {
            let request = parapet.admin_request(Method::GET, path).header("authorization", ADMIN);
            assert_eq!(send(request).await.status, expect, "{args:?} {path}");
        }
    };
    check(&[], StatusCode::UNAUTHORIZED).await;
    check(&["--init-admin-api-tokens", ADMIN], StatusCode::OK).await;
}

#[tokio::test]
async fn admin_listener_shows_flags_and_usage_without_tokens() {
    let parapet = InProcessParapet::standalone(FLAGS, &[], &TOKEN_VARIABLES).await;
    let report = json!({"appName": "shop", "instanceId": "one", "bucket": {
        "start": "2026-01-01T00:00:00Z", "stop": "2026-01-01T00:01:00Z",
        "toggles": {"a": {"yes": 3, "no": 1}}}});
    let taken = parapet.post("/api/client/metrics", CLIENT_TOKEN, &report).await;
    assert_eq!(taken.status, StatusCode::ACCEPTED, "{}", taken.text());
    let mut pages = String::new();
    for path in ADMIN_ONLY_PATHS {
        let request = parapet.admin_request(Method::GET, path).header("authorization", ADMIN);
        let page = send(request).await;
        assert!(page.json().is_object(), "{path}");
        pages.push_str(page.text());
    }
    for secret in
        [ADMIN, CLIENT_TOKEN, FRONTEND_TOKEN].map(|token| token.split_once('.').unwrap().1)
    {
        assert!(!pages.contains(&secret[..8]), "more than four characters of a secret are shown");
    }
    let status = parapet.admin_request(Method::GET, "/status").header("authorization", ADMIN);
    let status = send(status).await.json();
    assert_eq!((&status["mode"], &status["ready"]), (&json!("standalone"), &json!(true)));
    assert_eq!(status["environments"][0]["name"], "development");
    assert_eq!(status["environments"][0]["flags"], 1);
    let features = parapet.admin_request(Method::GET, "/internal-backstage/features");
    let features = send(features.header("authorization", ADMIN)).await.json();
    assert_eq!(features["development"]["features"][0]["name"], "a");
}

#[tokio::test]
async fn malformed_flag_is_reported_in_status_and_does_not_affect_others() {
    let flags = r#"{"features":[
        {"name":"broken","enabled":true,"strategies":[{"name":"default","constraints":
            [{"contextName":"v","operator":"SEMVER_GT","value":"not a version"}]}]},
        {"name":null,"enabled":true,"strategies":[{"name":"default"}]},
        {"name":"whole","enabled":true,"strategies":[{"name":"default"}]}]}"#;
    let parapet = InProcessParapet::standalone(flags, &[], &TOKEN_VARIABLES).await;
    let toggles = parapet.get("/api/frontend", FRONTEND_TOKEN).await.json()["toggles"].clone();
    assert_eq!(toggles.as_array().unwrap().len(), 1);
    assert_eq!(toggles[0]["name"], "whole");
    let status = parapet.admin_request(Method::GET, "/status").header("authorization", ADMIN);
    let problems = send(status).await.json()["environments"][0]["problems"].clone();
    assert!(problems[0].as_str().unwrap().contains("#2"), "{problems}");
    assert!(problems[1].as_str().unwrap().contains("broken"), "{problems}");
}

/// Every series of the Prometheus page, without its value. Those of saves appear when a save is due, which
/// may be at any time on a slow machine.
async fn metric_series(parapet: &Parapet) -> BTreeSet<String> {
    let page = parapet.metrics().await;
    let is_skipped =
        |line: &str| line.is_empty() || line.starts_with('#') || line.starts_with("parapet_store_");
    let lines = page.lines().filter(|line| !is_skipped(line));
    lines.map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect()
}

#[tokio::test]
async fn client_input_is_never_a_metric_label() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    std::fs::write(&file, FLAGS).unwrap();
    let parapet = Parapet::mode("standalone").flag("--flags", &file);
    let parapet = TOKEN_VARIABLES.iter().fold(parapet, |it, (name, value)| it.env(*name, *value));
    let parapet = parapet.start().await;
    let hostile = async |round: usize| {
        for n in 0..20 {
            let made_up = format!("MadeUp{round}x{n}");
            let send = async |method: &str, path: String, token: &str, body: String| {
                let method = Method::from_bytes(method.as_bytes()).unwrap();
                let request = http().request(method, format!("{}{path}", parapet.url()));
                let request = request
                    .header("authorization", token)
                    .header("accept-encoding", &made_up)
                    .header("origin", format!("https://{made_up}"))
                    .header("unleash-sdk", &made_up)
                    .header("unleash-appname", &made_up)
                    .header("unleash-client-spec", &made_up)
                    .header("content-type", "application/json")
                    .body(body);
                request.send().await.unwrap();
            };
            let unknown = format!("*:development.{made_up}");
            let report = json!({"appName": made_up, "instanceId": made_up, "sdkVersion": made_up,
                "environment": made_up, "bucket": {
                    "start": "2026-01-01T00:00:00Z", "stop": "2026-01-01T00:01:00Z",
                    "toggles": {made_up.clone(): {"yes": 1, "no": 1, "variants": {made_up.clone(): 1}}}},
                "impactMetrics": [{"name": made_up, "help": made_up, "type": "counter",
                    "samples": [{"value": 1, "labels": {made_up.clone(): made_up}}]}]});
            let registration = json!({"appName": made_up, "interval": 1, "strategies": [made_up],
                "started": "2026-01-01T00:00:00Z", "sdkVersion": made_up});
            send("GET", format!("/{made_up}"), "", String::new()).await;
            send("OPTIONS", format!("/{made_up}"), "", String::new()).await;
            send(&made_up.to_uppercase(), format!("/{made_up}"), "", String::new()).await;
            send(&made_up.to_uppercase(), "/api/frontend".to_owned(), "", String::new()).await;
            send("GET", "/api/frontend".to_owned(), &unknown, String::new()).await;
            send("GET", format!("/api/frontend/features/{made_up}"), FRONTEND_TOKEN, String::new())
                .await;
            send("GET", format!("/api/client/features/{made_up}"), CLIENT_TOKEN, String::new())
                .await;
            send(
                "GET",
                format!("/api/client/features?project={made_up}"),
                CLIENT_TOKEN,
                String::new(),
            )
            .await;
            send("POST", "/api/client/metrics".to_owned(), CLIENT_TOKEN, report.to_string()).await;
            send(
                "POST",
                "/api/proxy/client/metrics".to_owned(),
                FRONTEND_TOKEN,
                report.to_string(),
            )
            .await;
            send("POST", "/api/client/register".to_owned(), CLIENT_TOKEN, registration.to_string())
                .await;
            send("POST", "/edge/validate".to_owned(), "", json!({"tokens": [unknown]}).to_string())
                .await;
        }
    };
    hostile(1).await;
    // A scrape is a request too, and appears in the next one.
    metric_series(&parapet).await;
    let before = metric_series(&parapet).await;
    hostile(2).await;
    let after = metric_series(&parapet).await;
    let grown: Vec<_> = after.difference(&before).collect();
    assert!(grown.is_empty(), "{grown:?}");
    assert!(!after.iter().any(|series| series.to_lowercase().contains("madeup")), "{after:?}");
    let unknown = "http_server_requests_total{http_route=\"unknown\",http_request_method=\"other\",http_response_status_code=\"404\"}";
    assert!(parapet.metric(unknown).await >= Some(40.0), "{after:#?}");
}

#[tokio::test]
async fn requests_are_logged_at_debug_with_their_id_and_without_their_path() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    std::fs::write(&file, FLAGS).unwrap();
    let setup = Parapet::mode("offline").flag("--bootstrap-file", &file);
    let parapet =
        setup.flag("--client-tokens", CLIENT_TOKEN).flag("--log", "parapet=debug").start().await;
    // A path of either listener can contain a token by mistake.
    let sent = [
        (parapet.url(), "/api/client/features/a", "/api/client/features/{name}", "200"),
        (parapet.url(), "/api/client/features?project=hidden", "/api/client/features", "200"),
        (parapet.url(), "/api/client/hidden", "unknown", "404"),
        (
            parapet.admin_url(),
            "/api/admin/api-tokens/hidden",
            "/api/admin/api-tokens/{token}",
            "403",
        ),
    ];
    for (number, (url, path, route, status)) in sent.into_iter().enumerate() {
        let request = http().get(format!("{url}{path}")).header("authorization", CLIENT_TOKEN);
        request.header("x-request-id", format!("request-{number}")).send().await.unwrap();
        let id = format!(r#"request_id="request-{number}""#);
        let line = wait_until("the request is logged", Duration::from_secs(10), async || {
            let log = parapet.log();
            log.lines().find(|line| line.contains(&id)).map(str::to_owned)
        })
        .await;
        for part in
            [" DEBUG ", &format!(r#"route="{route}""#), "method=GET", &format!("status={status}")]
        {
            assert!(line.contains(part), "{part} {line}");
        }
    }
    let log = parapet.log();
    assert!(!log.contains("hidden") && !log.contains(CLIENT_TOKEN), "{log}");
    assert_eq!(log.matches("Request served").count(), log.matches("request_id=").count(), "{log}");
}
