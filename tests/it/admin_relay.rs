//! An edge that relays the admin API of its Unleash: tokens are created, used and deleted through the
//! edge.

use std::time::Duration;

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::rig::{
    Parapet, Sdk, Unleash, UnleashVersion, http, run_parapet, secret_leak_check, send_json,
    session_cookies, temp_file_with, wait_until,
};

/// The account of a fresh Unleash.
const OWNER: (&str, &str) = ("admin", "unleash4all");

async fn edge(unleash: &Unleash) -> Parapet {
    Parapet::edge(&unleash.url())
        .admin_token(unleash.admin_token())
        // The interval is too long to explain what this test sees.
        .flag("--token-list-interval-seconds", "3600")
        .flag("--features-refresh-interval-seconds", "0.5")
        .flag("--metrics-interval-seconds", "0.5")
        .arg("--admin-relay")
        .start()
        .await
}

async fn send(request: RequestBuilder) -> (StatusCode, Value) {
    send_json(request, &Value::Null).await
}

/// Signs in to Unleash through the edge, and returns the cookies.
async fn sign_in(parapet: &Parapet) -> String {
    let body = json!({ "username": OWNER.0, "password": OWNER.1 }).to_string();
    let login = http().post(parapet.admin_url() + "/auth/simple/login");
    let login = login.header("content-type", "application/json").body(body);
    let response = login.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    session_cookies(&response)
}

async fn token_lifecycle(version: UnleashVersion) {
    let unleash = Unleash::shared(version).await;
    let flag = format!("relayed-{version:?}").to_lowercase();
    unleash.create_enabled_flag(&flag, "development", &[]).await;
    let parapet = edge(&unleash).await;
    let url = parapet.admin_url();
    let cookies = sign_in(&parapet).await;
    let request = |method: Method, path: &str, body: Option<Value>| {
        let request = http().request(method, format!("{url}{path}")).header("cookie", &cookies);
        match body {
            Some(body) => request.header("content-type", "application/json").body(body.to_string()),
            None => request,
        }
    };
    let own = |request: RequestBuilder| request.header("origin", &url);

    let (status, me) = send(request(Method::GET, "/api/admin/user", None)).await;
    assert_eq!((status, &me["user"]["username"]), (StatusCode::OK, &OWNER.0.into()));

    // A created token works at once.
    let name = format!("by way of the edge, {version:?}");
    let new = json!({ "tokenName": name, "type": "client", "environment": "development",
        "projects": ["*"] });
    let create = || request(Method::POST, "/api/admin/api-tokens", Some(new.clone()));
    let (status, refused) = send(create().header("origin", "https://elsewhere.example")).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{refused}");
    assert!(unleash.tokens_named(&name).await.is_empty(), "nothing was passed on");
    let (status, made) = send(own(create())).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let secret = made["secret"].as_str().unwrap().to_owned();
    secret_leak_check::register(&secret);
    let listed = unleash.tokens_named(&name).await;
    let [listed] = &listed[..] else { panic!("{listed:?}") };

    // An SDK uses it.
    let mut sdk = Sdk::node(&parapet.url(), &secret, "relayed").await;
    wait_until("the SDK sees the new flag", Duration::from_secs(15), async || {
        let flags = sdk.evaluate(json!({})).await;
        flags.get(&flag).filter(|it| it.enabled).map(|_| ())
    })
    .await;
    sdk.close().await;

    // Deleted by its listed identifier, it is rejected on the next request.
    let identifier = listed["secret"].as_str().unwrap();
    let path = format!("/api/admin/api-tokens/{identifier}");
    let (status, gone) = send(own(request(Method::DELETE, &path, None))).await;
    assert!(status.is_success(), "{status} {gone}");
    assert_eq!(parapet.features_status(&secret).await, StatusCode::UNAUTHORIZED);
    assert!(unleash.tokens_named(&name).await.is_empty());
    assert_eq!(parapet.features_status(&secret).await, StatusCode::UNAUTHORIZED, "and stays so");
}

#[tokio::test]
async fn token_is_created_used_and_deleted_through_the_edge() {
    token_lifecycle(UnleashVersion::V8).await;
}

#[tokio::test]
async fn v2_token_is_created_used_and_deleted_through_the_edge() {
    token_lifecycle(UnleashVersion::V8SecureTokens).await;
}

#[tokio::test]
async fn relay_uses_only_the_callers_credentials() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let parapet = edge(&unleash).await;
    let url = parapet.admin_url();
    let get = |path: &str| http().get(format!("{url}{path}"));
    // The edge never uses its own admin token for a relayed request.
    for path in
        ["/api/admin/api-tokens", "/api/admin/user", "/api/admin/flags?environment=development"]
    {
        assert_eq!(send(get(path)).await.0, StatusCode::UNAUTHORIZED, "{path}");
        let made_up = get(path).header("cookie", "unleash-session=s%3Amade-up.made-up");
        assert_eq!(send(made_up).await.0, StatusCode::UNAUTHORIZED, "{path}");
    }
    let wrong = json!({ "username": OWNER.0, "password": "not the password" }).to_string();
    let login = http().post(format!("{url}/auth/simple/login"));
    let login = login.header("content-type", "application/json").body(wrong);
    assert_eq!(send(login).await.0, StatusCode::UNAUTHORIZED);

    // With the caller's own token, and with a session.
    let by_token = |path: &str| get(path).header("authorization", unleash.admin_token());
    let (status, tokens) = send(by_token("/api/admin/api-tokens")).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(
        tokens["tokens"].as_array().unwrap().is_empty(),
        unleash.admin_get("/api/admin/api-tokens").await["tokens"].as_array().unwrap().is_empty()
    );
    let cookies = sign_in(&parapet).await;
    // The edge responds itself about the flags that it serves.
    let flags = get("/api/admin/flags?environment=development").header("cookie", &cookies);
    let (status, flags) = send(flags).await;
    assert_eq!((status, &flags["environment"]), (StatusCode::OK, &"development".into()));
    let (status, state) = send(get("/status").header("cookie", &cookies)).await;
    assert_eq!((status, &state["consoleFor"]), (StatusCode::OK, &"unleash".into()));

    // No path leads out of the admin API.
    for path in ["/api/admin/a%2f..%2f..%2fclient%2ffeatures", "/auth/%2e%2e%2fapi/admin/user"] {
        assert_eq!(send(by_token(path)).await.0, StatusCode::NOT_FOUND, "{path}");
    }
    // The data listener relays nothing.
    let there = http().get(parapet.url() + "/api/admin/api-tokens");
    let there = there.header("authorization", unleash.admin_token());
    assert_eq!(send(there).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn relay_is_disabled_by_default() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let parapet = Parapet::edge(&unleash.url()).admin_token(unleash.admin_token()).start().await;
    for path in ["/api/admin/api-tokens", "/"] {
        let request = http().get(parapet.admin_url() + path);
        let request = request.header("authorization", unleash.admin_token());
        assert_eq!(send(request).await.0, StatusCode::NOT_FOUND, "{path}");
    }
    let login = http().post(parapet.admin_url() + "/auth/simple/login").body("{}");
    assert_eq!(send(login).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn relay_reports_unavailable_upstream() {
    let unleash = Unleash::start(UnleashVersion::V8).await;
    let parapet = edge(&unleash).await;
    unleash.kill();
    let request = http().get(parapet.admin_url() + "/api/admin/user").header("cookie", "a=b");
    let (status, received) = send(request).await;
    assert_eq!((status, &received["name"]), (StatusCode::BAD_GATEWAY, &"BadGatewayError".into()));
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn command_line_manages_unleash_tokens_through_edge_or_directly() {
    Unleash::on_every_version(async |unleash| {
        let edge =
            Parapet::edge(&unleash.url()).admin_token(unleash.admin_token()).with_short_intervals();
        let parapet = edge.arg("--admin-relay").flag("--fleet-name", "shell").start().await;
        let file = temp_file_with(unleash.admin_token());
        for url in [parapet.admin_url(), unleash.url()] {
            let place = ["--url", &url, "--token-file", file.path().to_str().unwrap()];
            let run = |arguments: &[&str], input: &str| {
                run_parapet(&[arguments, &place].concat(), input)
                    .unwrap_or_else(|error| panic!("{error}"))
            };
            let made = run(&["token", "create", "--name", "by-shell"], "");
            let secret = made.trim();
            secret_leak_check::register(secret);
            assert_eq!(unleash.tokens_named("by-shell").await.len(), 1);
            wait_until("the new token works", Duration::from_secs(10), async || {
                (parapet.features_status(secret).await == StatusCode::OK).then_some(())
            })
            .await;
            let listed = run(&["token", "list", "--name", "by-shell"], "");
            assert!(listed.contains("by-shell") && !listed.contains(secret), "{listed}");
            let gone = run(&["token", "revoke", "-"], secret);
            assert!(gone.starts_with("revoked by-shell") && !gone.contains(secret), "{gone}");
            assert!(unleash.tokens_named("by-shell").await.is_empty());
        }
    })
    .await;
}
