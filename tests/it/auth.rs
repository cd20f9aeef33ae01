//! Authentication: which tokens are accepted on which routes, and the errors for the others.

use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::in_process_parapet::{
    CLIENT, FRONTEND, FullResponse, InProcessParapet, WEB_CLIENT, WEB_FRONTEND, send,
};

const FLAGS: &str = r#"{"features":[
    {"name":"frontend","enabled":true,"strategies":[]},
    {"name":"client","enabled":true,"strategies":[]}]}"#;

/// Measured on Unleash 7.5.1 and 8.2.0.
const NO_TOKEN: &str = "This endpoint requires an API token. Please add an authorization header to your request with a valid token";
const INVALID_TOKEN: &str = "this API token is unknown or has been revoked";
const WRONG_KIND: &str = "invalid token: expected a different token type for this endpoint";

/// Routes that require a client token. The last ones contain parts of the other API in their path.
const CLIENT_ROUTES: [(Method, &str); 10] = [
    (Method::GET, "/api/client/features"),
    (Method::HEAD, "/api/client/features"),
    (Method::POST, "/api/client/features"),
    (Method::POST, "/api/client/register"),
    (Method::POST, "/api/client/metrics"),
    (Method::POST, "/api/client/metrics/bulk"),
    (Method::POST, "/api/client/metrics/edge"),
    (Method::GET, "/api/client/features/frontend"),
    (Method::GET, "/api/client/features/proxy"),
    (Method::GET, "/api/client/features/%2Ffrontend"),
];

/// Routes that require a frontend token.
const FRONTEND_ROUTES: [(Method, &str); 10] = [
    (Method::GET, "/api/frontend"),
    (Method::POST, "/api/frontend"),
    (Method::GET, "/api/frontend/all"),
    (Method::GET, "/api/proxy"),
    (Method::POST, "/api/proxy/all"),
    (Method::POST, "/api/frontend/client/metrics"),
    (Method::POST, "/api/frontend/client/register"),
    (Method::POST, "/api/proxy/client/metrics"),
    (Method::GET, "/api/frontend/features/client"),
    (Method::GET, "/api/frontend/features/client%2F"),
];

async fn request_with_token(
    parapet: &InProcessParapet,
    method: &Method,
    path: &str,
    token: &str,
) -> FullResponse {
    let request = parapet.request(method.clone(), path).header("authorization", token);
    send(request.header("content-type", "application/json")).await
}

#[track_caller]
fn assert_error(response: &FullResponse, method: &Method, status: StatusCode, message: &str) {
    assert_eq!(response.status, status, "{}", response.text());
    if method != Method::HEAD {
        assert_eq!(response.json()["message"], message);
        assert_eq!(response.header("content-type"), "application/json");
    }
}

#[tokio::test]
async fn every_route_without_valid_token_requires_one() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    let nearly = format!("{CLIENT}x");
    let other_case = CLIENT.to_uppercase();
    let long = format!("*:development.{}", "x".repeat(5000));
    let unknown = [
        "*:development.unknown",
        &nearly,
        &other_case,
        &long,
        "Basic dXNlcjpwYXNz",
        "Bearer",
        "Bearer Bearer x",
        "nonsense",
        "",
        "*:*.secret",
        "user:0123456789abcdef",
        "[]:development.unknown",
        "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "*:development.ünknown",
    ];
    for (method, path) in CLIENT_ROUTES.iter().chain(&FRONTEND_ROUTES) {
        let none = send(parapet.request(method.clone(), path)).await;
        assert_error(&none, method, StatusCode::UNAUTHORIZED, NO_TOKEN);
        for token in unknown {
            let response = request_with_token(&parapet, method, path, token).await;
            let expected = if token.is_empty() { NO_TOKEN } else { INVALID_TOKEN };
            assert_error(&response, method, StatusCode::UNAUTHORIZED, expected);
        }
    }
}

#[tokio::test]
async fn token_of_wrong_kind_gets_403_on_every_path() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    for (method, path) in &CLIENT_ROUTES {
        for token in [FRONTEND, WEB_FRONTEND] {
            let response = request_with_token(&parapet, method, path, token).await;
            assert_error(&response, method, StatusCode::FORBIDDEN, WRONG_KIND);
        }
        let right = request_with_token(&parapet, method, path, CLIENT).await.status;
        assert!(![StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN].contains(&right), "{path}");
    }
    for (method, path) in &FRONTEND_ROUTES {
        for token in [CLIENT, WEB_CLIENT] {
            let response = request_with_token(&parapet, method, path, token).await;
            assert_error(&response, method, StatusCode::FORBIDDEN, WRONG_KIND);
        }
        let right = request_with_token(&parapet, method, path, FRONTEND).await.status;
        assert!(![StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN].contains(&right), "{path}");
    }
}

#[tokio::test]
async fn token_is_accepted_raw_or_as_bearer() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    for scheme in ["", "Bearer ", "bearer ", "BEARER   "] {
        let response = parapet.get("/api/client/features", &format!("{scheme}{CLIENT}")).await;
        assert_eq!(response.status, StatusCode::OK, "{scheme}");
        let response = parapet.get("/api/frontend", &format!("{scheme}{FRONTEND}")).await;
        assert_eq!(response.status, StatusCode::OK, "{scheme}");
    }
}

#[tokio::test]
async fn token_header_is_configurable() {
    for flag in ["--edge-auth-header", "--token-header"] {
        let parapet = InProcessParapet::offline_with(FLAGS, &[flag, "X-Flags-Token"]).await;
        let request = parapet.request(Method::GET, "/api/client/features");
        let response = send(request.header("x-flags-token", CLIENT)).await;
        assert_eq!(response.status, StatusCode::OK);
        let usual = parapet.get("/api/client/features", CLIENT).await;
        assert_eq!(usual.status, StatusCode::UNAUTHORIZED);
    }
}

#[tokio::test]
async fn admin_token_reads_no_flags() {
    const ADMIN: &str = "*:*.admin-0123456789abcdef0123456789abcdef";
    let variables = [("INIT_ADMIN_API_TOKENS", ADMIN)];
    let parapet = InProcessParapet::standalone(FLAGS, &[], &variables).await;
    for (method, path) in CLIENT_ROUTES.iter().chain(&FRONTEND_ROUTES) {
        let response = request_with_token(&parapet, method, path, ADMIN).await;
        assert_error(&response, method, StatusCode::FORBIDDEN, WRONG_KIND);
    }
}

#[tokio::test]
async fn validation_without_token_lists_valid_tokens() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    let body = json!({"tokens": [
        CLIENT, "malformed", "*:development.unknown", WEB_FRONTEND, "", "user:abc",
    ]});
    let response = send(parapet.json_request("/edge/validate", &body)).await;
    assert_eq!(response.status, StatusCode::OK, "{}", response.text());
    let tokens = response.json()["tokens"].clone();
    let listed: Vec<_> = tokens
        .as_array()
        .unwrap()
        .iter()
        .map(|it| (it["token"].as_str(), &it["projects"], it["environment"].as_str()))
        .collect();
    let environment = Some("development");
    let (all, web) = (json!(["*"]), json!(["web"]));
    assert_eq!(
        listed,
        [(Some(CLIENT), &all, environment), (Some(WEB_FRONTEND), &web, environment)]
    );
    let kinds: Vec<_> = (0..2).map(|n| tokens[n]["type"].as_str().unwrap()).collect();
    assert!(["client", "backend"].contains(&kinds[0]) && kinds[1] == "frontend", "{kinds:?}");
}

#[tokio::test]
async fn malformed_validation_request_is_rejected_without_echoing_tokens() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    let too_many = json!({"tokens": vec!["*:development.secret-of-many"; 1001]}).to_string();
    for body in [
        "",
        "[]",
        "{}",
        r#"{"tokens":"*:development.secret-of-many"}"#,
        r#"{"tokens":["*:development.secret-of-many"#,
        &too_many,
    ] {
        let request = parapet.request(Method::POST, "/edge/validate");
        let response = send(request.body(body.to_owned())).await;
        assert_eq!(response.status, StatusCode::BAD_REQUEST, "{body}");
        assert!(!response.text().contains("secret-of"), "{}", response.text());
    }
}
