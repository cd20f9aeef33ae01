//! Invalid and denied requests of operators, and the responses to them.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{
    DatabaseKind, Installation, NEW_PASSWORD, OWNER, PASSWORD, Session, identifier,
    run_on_database, sign_in,
};
use crate::rig::{http, secret_leak_check, wait_until};

const TOKENS_PATH: &str = "/api/admin/api-tokens";
const ACCOUNTS_PATH: &str = "/api/admin/user-admin";

/// The fields that a response reports as invalid.
fn invalid_fields(response: &Value) -> Vec<&str> {
    let details = response["details"].as_array().map(Vec::as_slice).unwrap_or_default();
    details.iter().filter_map(|detail| detail["path"].as_str()).collect()
}

/// The events of a kind, newest first.
async fn events(session: &Session, kind: &str) -> Vec<Value> {
    let mut reported = session.get(&format!("/api/admin/events?limit=1000&type={kind}")).await;
    let Value::Array(events) = reported["events"].take() else { panic!("{reported}") };
    events
}

#[tokio::test]
async fn invalid_fields_are_named_in_the_response() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    owner.create_account("ann", 3).await;
    let check = async |method: Method, path: &str, body: Value, expect: &[&str]| {
        let (status, response) = owner.call(method.clone(), path, &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{method} {path} {body}: {response}");
        assert_eq!(response["name"], "BadDataError");
        assert_eq!(invalid_fields(&response), expect, "{method} {path} {body}: {response}");
    };
    let token =
        async |body: Value, expect: &[&str]| check(Method::POST, TOKENS_PATH, body, expect).await;
    let all = ["tokenName", "type", "expiresAt", "environment", "projects"];
    token(json!({}), &all[..2]).await;
    token(
        json!({ "tokenName": 1, "type": 2, "environment": 3, "projects": [4], "expiresAt": 5 }),
        &all,
    )
    .await;
    token(
        json!({ "type": "gateway", "environment": "nowhere", "projects": ["none"], "expiresAt": "2020-01-01T00:00:00Z" }),
        &all,
    )
    .await;
    let client = |name: &str, value: Value| {
        let mut body = json!({ "tokenName": "x", "type": "client" });
        body[name] = value;
        body
    };
    token(client("tokenName", "x".repeat(256).into()), &["tokenName"]).await;
    token(client("tokenName", "a\nb".into()), &["tokenName"]).await;
    token(client("environment", "*".into()), &["environment"]).await;
    token(client("projects", json!([])), &["projects"]).await;
    token(client("projects", json!(vec!["default"; 101])), &["projects"]).await;
    token(client("project", "none".into()), &["project"]).await;
    let of_project = "/api/admin/projects/web/api-tokens";
    let admin = json!({ "tokenName": "x", "type": "admin" });
    check(Method::POST, of_project, admin, &["type"]).await;
    check(Method::PUT, &format!("{TOKENS_PATH}/x"), json!({}), &["expiresAt"]).await;
    check(Method::PUT, &format!("{TOKENS_PATH}/x"), json!({ "expiresAt": "soon" }), &["expiresAt"])
        .await;

    let account =
        json!({ "username": "a b", "email": "nowhere", "rootRole": 9, "password": "short" });
    let all = ["username", "email", "rootRole", "password"];
    check(Method::POST, ACCOUNTS_PATH, account, &all).await;
    check(Method::POST, ACCOUNTS_PATH, json!({}), &["rootRole", "password", "username"]).await;
    let taken = json!({ "username": "ANN", "rootRole": 3, "password": PASSWORD });
    check(Method::POST, ACCOUNTS_PATH, taken, &["username"]).await;
    let change = json!({ "name": 7, "email": "x@", "rootRole": "King", "password": "short" });
    let all = ["name", "email", "rootRole", "password"];
    check(Method::PUT, &format!("{ACCOUNTS_PATH}/2"), change, &all).await;
    let grants = json!({ "permissions": ["ADMIN"] });
    check(Method::PUT, &format!("{ACCOUNTS_PATH}/2/permissions"), grants, &["permissions"]).await;
    let reset = format!("{ACCOUNTS_PATH}/2/change-password");
    check(Method::POST, &reset, json!({ "password": "short" }), &["password"]).await;
    check(Method::POST, "/auth/simple/login", json!({}), &["username", "password"]).await;
    let query = "/api/admin/events?type=nothing&createdBy=%00&from=soon&to=later&limit=0&offset=x";
    let all = ["type", "createdBy", "from", "to", "limit", "offset"];
    check(Method::GET, query, Value::Null, &all).await;
    check(Method::GET, "/api/admin/flags", Value::Null, &["environment"]).await;

    // A message about a field begins with its name and is a sentence.
    let short = json!({ "password": "short" });
    let (_, response) = owner.call(Method::POST, &reset, &short).await;
    let reported = &response["details"][0]["message"];
    assert_eq!(reported, "password must have at least 10 characters");
    // The longest allowed name, token types in any case, and older field names are accepted.
    for (name, value) in [
        ("tokenName", json!("x".repeat(255))),
        ("type", json!("BACKEND")),
        ("project", json!("web")),
    ] {
        let (status, made) = owner.call(Method::POST, TOKENS_PATH, &client(name, value)).await;
        assert_eq!((status, &made["type"]), (StatusCode::CREATED, &json!("backend")), "{made}");
        secret_leak_check::register(made["secret"].as_str().unwrap());
    }
    let old = json!({ "username": "of old", "type": "frontend" });
    let (status, made) = owner.call(Method::POST, TOKENS_PATH, &old).await;
    assert_eq!((status, &made["tokenName"]), (StatusCode::CREATED, &json!("of old")), "{made}");
    secret_leak_check::register(made["secret"].as_str().unwrap());
}

#[tokio::test]
async fn body_must_be_a_json_object() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let before = owner.token_names().await;
    let send = async |body: &str, content_type: &str| {
        let request = http().post(parapet.admin_url() + TOKENS_PATH).body(body.to_owned());
        let request = request.header("cookie", &owner.cookies).header("origin", &owner.url);
        let response = request.header("content-type", content_type).send().await.unwrap();
        let (status, body) = (response.status().as_u16(), response.bytes().await.unwrap());
        let reported: Value = serde_json::from_slice(&body).unwrap();
        (status, reported["message"].as_str().unwrap().to_owned())
    };
    let check = async |body: &str, status: u16, message: &str| {
        let response = send(body, "application/json").await;
        assert_eq!(response, (status, message.to_owned()), "{body}");
    };
    let no_object = "the body must be a JSON object";
    // A JSON array with the fields in declaration order is no valid body either.
    check(r#"["by place", "by place", "client"]"#, 400, no_object).await;
    check("null", 400, no_object).await;
    check("", 400, "the body is not JSON: line 1, column 0").await;
    check(r#"{"tokenName":"#, 400, "the body is not JSON: line 1, column 13").await;
    check(&" ".repeat(3 << 20), 413, "the body is larger than 2097152 bytes").await;
    let good = r#"{"tokenName":"x","type":"client"}"#;
    let (status, _) = send(good, "text/plain").await;
    assert_eq!(status, 415);
    assert_eq!(owner.token_names().await, before);
}

/// A request never creates more than it names.
#[tokio::test]
async fn admin_token_request_with_environment_or_project_is_rejected() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let before = owner.token_names().await;
    for (member, value) in [
        ("environment", json!("development")),
        ("projects", json!(["web"])),
        ("project", json!("web")),
    ] {
        let mut body = json!({ "tokenName": "robot", "type": "admin" });
        body[member] = value;
        let (status, response) = owner.call(Method::POST, TOKENS_PATH, &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{response}");
        assert_eq!(invalid_fields(&response), [member]);
    }
    for (option, value) in [("--environment", "development"), ("--project", "web")] {
        let create = ["token", "create", "--name", "robot", "--type", "admin", option, value];
        let reported = run_on_database(&parapet, &create, "").unwrap_err();
        assert!(reported.starts_with(&format!("{option}: does not apply")), "{reported}");
    }
    assert_eq!(owner.token_names().await, before);
    assert_eq!(owner.create_token("admin", "robot").await.0, StatusCode::CREATED);
}

#[tokio::test]
async fn unauthorized_request_is_denied_before_validation_and_recorded() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    owner.create_account("vera", 3).await;
    let vera = sign_in(&parapet, "vera", PASSWORD).await.unwrap();
    let nonsense = json!({ "rootRole": "King" });
    let account = format!("{ACCOUNTS_PATH}/1");
    let refused = [
        (Method::GET, ACCOUNTS_PATH, Value::Null),
        (Method::POST, ACCOUNTS_PATH, nonsense.clone()),
        (Method::GET, &account, Value::Null),
        (Method::PUT, &account, nonsense.clone()),
        (Method::DELETE, &account, Value::Null),
        (Method::PUT, &format!("{account}/permissions"), nonsense.clone()),
        (Method::POST, &format!("{account}/change-password"), nonsense.clone()),
        (Method::GET, "/api/admin/events?limit=nothing", Value::Null),
    ];
    for (method, path, body) in &refused {
        let (status, response) = vera.call(method.clone(), path, body).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{method} {path}: {response}");
        assert_eq!(response["permissions"], json!(["ADMIN"]), "{method} {path}");
        assert_eq!(response["name"], "PermissionError");
    }
    for (body, missing) in [
        (nonsense, "CREATE_CLIENT_API_TOKEN"),
        (json!({ "type": "frontend" }), "CREATE_FRONTEND_API_TOKEN"),
        (json!({ "type": "admin", "environment": 7 }), "ADMIN"),
    ] {
        let (status, response) = vera.call(Method::POST, TOKENS_PATH, &body).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{response}");
        assert_eq!(response["permissions"], json!([missing]));
    }
    let reported = events(&owner, "permission-denied").await;
    assert_eq!(reported.len(), refused.len() + 3, "{reported:?}");
    assert!(
        reported.iter().all(|event| event["createdBy"] == "vera" && event["ip"] == "127.0.0.1")
    );
    let of = |what: &str| reported.iter().filter(|it| it["data"]["operation"] == what).count();
    assert_eq!(of("GET /api/admin/events"), 1, "{reported:?}");
    assert_eq!(of("create an API token"), 3);
    // A viewer may see her own account.
    assert_eq!(vera.get(&format!("{ACCOUNTS_PATH}/2")).await["username"], "vera");
}

#[tokio::test]
async fn account_is_updated_with_or_without_password() {
    secret_leak_check::register(NEW_PASSWORD);
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let id = owner.create_account("ann", 3).await;
    let path = format!("{ACCOUNTS_PATH}/{id}");
    let put = async |body: Value| {
        let (status, response) = owner.call(Method::PUT, &path, &body).await;
        assert_eq!(status, StatusCode::OK, "{body}: {response}");
        response
    };
    let ann = sign_in(&parapet, "ann", PASSWORD).await.unwrap();
    let named = put(json!({ "name": " Ann ", "email": "ann@example.org", "rootRole": 2 })).await;
    assert_eq!((&named["name"], &named["rootRole"]), (&json!("Ann"), &json!(2)));
    let unnamed = put(json!({ "name": "", "email": null })).await;
    assert_eq!((&unnamed["name"], &unnamed["email"]), (&Value::Null, &Value::Null));
    assert_eq!(put(json!({})).await, unnamed);
    assert_eq!(put(json!({ "rootRole": "Editor" })).await, unnamed);
    let changes = events(&owner, "user-updated").await;
    assert_eq!(changes.len(), 2, "what did not change anything is no event: {changes:?}");
    assert_eq!(changes[0]["preData"]["email"], "ann@example.org");
    assert_eq!(ann.get("/api/admin/user").await["user"]["rootRole"], 2);

    put(json!({ "password": NEW_PASSWORD })).await;
    let status = ann.call(Method::GET, "/api/admin/user", &Value::Null).await.0;
    assert_eq!(status, StatusCode::UNAUTHORIZED, "a new password ends sessions");
    assert!(sign_in(&parapet, "ann", PASSWORD).await.is_err());
    assert!(sign_in(&parapet, "ann", NEW_PASSWORD).await.is_ok());
    let changed = events(&owner, "user-password-changed").await;
    assert_eq!((changed.len(), &changed[0]["createdBy"]), (1, &json!(OWNER)));
    assert_eq!(changed[0]["data"]["username"], "ann");
    let both = events(&owner, "user-password-changed&type=user-created").await;
    assert_eq!(both.len(), 3, "of either kind: {both:?}");
}

/// Pages and JSON for operators, including errors, are not cached and not sniffed. The console's files
/// are the same for all users and are revalidated.
#[tokio::test]
async fn responses_to_operators_are_neither_cached_nor_sniffed() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let (get, post, put) = (Method::GET, Method::POST, Method::PUT);
    for (method, path, body, status, caching) in [
        (&get, "/", "", 200, "no-cache"),
        (&get, "/console/app.js", "", 200, "no-cache"),
        (&get, "/api/admin/user", "", 200, "no-store"),
        (&get, "/api/admin/api-tokens", "", 200, "no-store"),
        (&get, "/api/admin/user-admin", "", 200, "no-store"),
        (&get, "/api/admin/events", "", 200, "no-store"),
        (&get, "/api/admin/projects", "", 200, "no-store"),
        (&get, "/status", "", 200, "no-store"),
        (&get, "/internal-backstage/tokens", "", 200, "no-store"),
        (&get, "/internal-backstage/features", "", 200, "no-store"),
        (&get, "/docs/openapi.json", "", 200, "no-store"),
        (&get, "/nowhere", "", 404, "no-store"),
        (&post, "/api/admin/user-admin", "{}", 400, "no-store"),
        (&put, "/api/admin/api-tokens/x", r#"{"expiresAt":null}"#, 200, "no-store"),
        (&post, "/auth/simple/login", r#"{"username":"x","password":"y"}"#, 401, "no-store"),
        (&post, "/logout", "", 204, "no-store"),
        (&get, "/api/admin/user", "", 401, "no-store"),
    ] {
        let request = http().request(method.clone(), format!("{}{path}", owner.url));
        let request = request.header("cookie", &owner.cookies).header("origin", &owner.url);
        let request = request.header("content-type", "application/json").body(body);
        let response = request.send().await.unwrap();
        let what = format!("{method} {path}: {response:?}");
        assert_eq!(response.status().as_u16(), status, "{what}");
        assert_eq!(response.headers()["cache-control"], caching, "{what}");
        assert_eq!(response.headers()["x-content-type-options"], "nosniff", "{what}");
    }
}

/// Over an encrypted connection the session cookie has the `__Host-` prefix, so that browsers accept it
/// from this host only. A cookie without the prefix, which a neighbouring domain could set, is not
/// accepted.
#[tokio::test]
async fn session_cookie_over_tls_is_bound_to_its_host() {
    const ENCRYPTED: (&str, &str) = ("x-forwarded-proto", "https");
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let url = parapet.admin_url();
    let body = json!({ "username": OWNER, "password": PASSWORD }).to_string();
    let login = http().post(format!("{url}/auth/simple/login")).body(body);
    let login = login.header("content-type", "application/json").header(ENCRYPTED.0, ENCRYPTED.1);
    let response = login.send().await.unwrap();
    let cookies = response.headers().get_all("set-cookie").iter();
    let cookies: Vec<_> = cookies.map(|cookie| cookie.to_str().unwrap()).collect();
    let is_prefixed = |cookie: &&&str| cookie.starts_with("__Host-parapet-session=");
    let cookie = cookies.iter().find(is_prefixed).unwrap();
    for attribute in ["; Secure", "; Path=/;", "; HttpOnly", "; SameSite=Strict"] {
        assert!(cookie.contains(attribute), "{cookie}");
    }
    assert!(!cookie.contains("Domain"), "{cookie}");
    let value = cookie.split_once('=').unwrap().1.split(';').next().unwrap();
    secret_leak_check::register(value);
    let (bound, planted) =
        (format!("__Host-parapet-session={value}"), format!("parapet-session={value}"));
    let me = async |cookie: &str, headers: &[(&str, &str)]| {
        let me = http().get(format!("{url}/api/admin/user")).header("cookie", cookie);
        let me = headers.iter().fold(me, |me, (name, value)| me.header(*name, *value));
        me.send().await.unwrap().status()
    };
    assert_eq!(me(&bound, &[ENCRYPTED]).await, StatusCode::OK);
    assert_eq!(me(&bound, &[]).await, StatusCode::OK, "not every proxy reports HTTPS");
    assert_eq!(me(&planted, &[ENCRYPTED]).await, StatusCode::UNAUTHORIZED);

    let logout = http().post(format!("{url}/logout")).header("cookie", &bound);
    let logout = logout.header(ENCRYPTED.0, ENCRYPTED.1).header("sec-fetch-site", "same-origin");
    let response = logout.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::NO_CONTENT);
    let cookies = response.headers().get_all("set-cookie").iter();
    let mut cookies = cookies.map(|cookie| cookie.to_str().unwrap());
    let gone = cookies.find(|cookie| cookie.starts_with("__Host-parapet-session=;")).unwrap();
    assert!(gone.contains("; Max-Age=0;") && gone.contains("; Secure"), "{gone}");
    assert_eq!(me(&bound, &[ENCRYPTED]).await, StatusCode::UNAUTHORIZED);
}

/// The instance itself uses no TLS; a proxy in front of it reports the browser's scheme.
#[tokio::test]
async fn cookies_are_secure_when_the_browser_uses_https() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let is_secure = async |headers: &[(&str, &str)]| {
        let body = json!({ "username": OWNER, "password": PASSWORD }).to_string();
        let login = http().post(parapet.admin_url() + "/auth/simple/login").body(body);
        let login = login.header("content-type", "application/json");
        let login = headers.iter().fold(login, |it, (name, value)| it.header(*name, *value));
        let response = login.send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{headers:?}");
        let cookies = response.headers().get_all("set-cookie").iter();
        let cookies: Vec<_> = cookies.map(|cookie| cookie.to_str().unwrap().to_owned()).collect();
        assert_eq!(cookies.len(), 2);
        let secure = cookies.iter().filter(|cookie| cookie.ends_with("; Secure")).count();
        assert!(secure == 0 || secure == cookies.len(), "{cookies:?}");
        secure > 0
    };
    assert!(!is_secure(&[]).await);
    assert!(!is_secure(&[("x-forwarded-proto", "http")]).await);
    assert!(is_secure(&[("x-forwarded-proto", "https")]).await);
    assert!(is_secure(&[("forwarded", "for=192.0.2.7;proto=https")]).await);
    assert!(is_secure(&[("forwarded", "Proto=\"HTTPS\";for=\"[2001:db8::7]\"")]).await);
    assert!(!is_secure(&[("forwarded", "for=192.0.2.7;proto=http")]).await);
    let browser = [("origin", "https://flags.example"), ("sec-fetch-site", "same-origin")];
    assert!(is_secure(&browser).await, "a browser sends the origin of its page");
}

#[tokio::test]
async fn events_record_the_address_from_trusted_proxies() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    for (arguments, expect) in [
        (&[][..], "127.0.0.1"),
        (&["--trust-proxy"], "127.0.0.1"),
        (&["--trust-proxy", "--proxy-trusted-servers=127.0.0.0/8"], "192.0.2.7"),
        (&["--trust-proxy", "--proxy-trusted-servers=198.51.100.0/24"], "127.0.0.1"),
    ] {
        let parapet = place.start_with(arguments).await;
        let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
        let behind = [
            ("cookie", owner.cookies.as_str()),
            ("origin", &owner.url),
            ("x-forwarded-for", "192.0.2.7"),
        ];
        let token = json!({ "tokenName": "x", "type": "client" });
        let (status, made) = owner.call_as(Method::POST, TOKENS_PATH, &token, &behind).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        secret_leak_check::register(made["secret"].as_str().unwrap());
        let created = events(&owner, "api-token-created").await;
        assert_eq!(created[0]["ip"], expect, "{arguments:?}");
    }
}

/// A client that claims another address with each guess is throttled like any other.
#[tokio::test]
async fn forged_addresses_do_not_evade_sign_in_throttling() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    for (arguments, behind) in [
        (&[][..], ""),
        (&["--trust-proxy"], ""),
        (&["--trust-proxy", "--proxy-trusted-servers=127.0.0.0/8"], ", 198.51.100.7"),
        (&["--trust-proxy", "--proxy-trusted-servers=198.51.100.0/24"], ""),
    ] {
        let parapet = place.start_with(arguments).await;
        let guess = async |address: &str| {
            let body = json!({ "username": OWNER, "password": "a wrong guess" }).to_string();
            let login = http().post(parapet.admin_url() + "/auth/simple/login").body(body);
            let login = login.header("content-type", "application/json");
            login.header("x-forwarded-for", address).send().await.unwrap().status()
        };
        let mut judged = 0;
        for number in 0..30 {
            match guess(&format!("203.0.113.{number}{behind}")).await {
                StatusCode::UNAUTHORIZED => judged += 1,
                status => assert_eq!(status, StatusCode::TOO_MANY_REQUESTS),
            }
        }
        // Five attempts at once, and one more every 15 s.
        assert!((5..10).contains(&judged), "{arguments:?}: {judged}");
    }
}

/// Names that nothing can have do not reach the database: PostgreSQL refuses to compare them.
async fn unusable_names(database_kind: DatabaseKind) {
    let place = Installation::new(database_kind).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let check = async |method: Method, path: &str, expect: u16| {
        let (status, response) = owner.call(method.clone(), path, &Value::Null).await;
        assert_eq!(status.as_u16(), expect, "{method} {path}: {response}");
    };
    check(Method::DELETE, "/api/admin/api-tokens/%00", 404).await;
    check(Method::GET, "/api/admin/client-metrics/features/a%00/raw", 404).await;
    check(Method::GET, "/api/admin/events?environment=%00", 400).await;
    check(Method::GET, "/api/admin/events?project=%F0%9F%A6%80&offset=4294967295", 200).await;
    check(Method::GET, "/api/admin/events?from=0001-01-01T00:00:00Z&to=9999-12-30T00:00:00Z", 200)
        .await;
    check(Method::DELETE, "/api/admin/user-admin/9223372036854775807", 404).await;
    check(Method::DELETE, "/api/admin/user-admin/9223372036854775808", 404).await;
    check(Method::DELETE, "/api/admin/api-tokens/%F0%9F%A6%80", 200).await;
    check(Method::DELETE, &format!("/api/admin/api-tokens/{}", "x".repeat(5000)), 200).await;
    check(Method::DELETE, "/api/admin/api-tokens/%FF", 404).await;
    let (status, _) = owner.create_token("client", "a'); DROP TABLE tokens; --").await;
    assert_eq!(status, StatusCode::CREATED);
    let name = "a'%29%3B%20DROP%20TABLE%20tokens%3B%20--";
    let found = identifier(&owner, name).await;
    check(Method::DELETE, &format!("/api/admin/api-tokens/{found}"), 200).await;
}

#[tokio::test]
async fn unusable_names_cause_no_server_error_on_sqlite() {
    unusable_names(DatabaseKind::Sqlite).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL"]
async fn unusable_names_cause_no_server_error_on_postgresql() {
    unusable_names(DatabaseKind::Postgres).await;
}

/// A request that a client sends in two parts: the beginning of its body, and the rest.
struct SlowRequest {
    connection: tokio::net::TcpStream,
    rest: Vec<u8>,
}

impl SlowRequest {
    async fn send_first_part(session: &Session, path: &str, body: &Value) -> Self {
        let host = session.url.strip_prefix("http://").unwrap();
        let (cookies, body) = (&session.cookies, body.to_string());
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: {host}\r\norigin: {}\r\ncookie: {cookies}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            session.url,
            body.len()
        );
        let (first, rest) = request.as_bytes().split_at(request.len() - body.len() + 1);
        let mut connection = tokio::net::TcpStream::connect(host).await.unwrap();
        connection.write_all(first).await.unwrap();
        Self { connection, rest: rest.to_vec() }
    }

    /// Sends the rest and returns the status of the response.
    async fn finish(mut self) -> String {
        self.connection.write_all(&self.rest).await.unwrap();
        let mut response = String::new();
        self.connection.read_to_string(&mut response).await.unwrap();
        response["HTTP/1.1 ".len()..][..3].to_owned()
    }
}

#[tokio::test]
async fn request_of_account_deleted_before_its_body_arrives_is_rejected() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let id = owner.create_account("leaver", 1).await;
    let leaver = sign_in(&parapet, "leaver", PASSWORD).await.unwrap();
    let account = json!({ "username": "mallory", "rootRole": 1, "password": PASSWORD });
    let others = json!({ "username": "successor", "rootRole": 1, "password": PASSWORD });
    let slow = SlowRequest::send_first_part(&leaver, ACCOUNTS_PATH, &account).await;
    let in_time = SlowRequest::send_first_part(&leaver, ACCOUNTS_PATH, &others).await;
    assert_eq!(in_time.finish().await, "201");
    let (status, _) =
        owner.call(Method::DELETE, &format!("{ACCOUNTS_PATH}/{id}"), &Value::Null).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(slow.finish().await, "401");
    let reported = owner.get(ACCOUNTS_PATH).await.to_string();
    assert!(reported.contains("successor") && !reported.contains("mallory"), "{reported}");
}

#[tokio::test]
async fn session_cookie_is_accepted_beside_basic_credentials_of_a_proxy() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let fetch = async |origin: Option<&str>| {
        let request =
            http().post(parapet.admin_url() + TOKENS_PATH).header("cookie", &owner.cookies);
        let request = request.header("authorization", "Basic cHJveHk6cHJveHk=");
        let request = request.header("content-type", "application/json").body("{}");
        let request = origin.into_iter().fold(request, |it, origin| it.header("origin", origin));
        request.send().await.unwrap().status()
    };
    // The body is parsed only if the caller is authorized.
    assert_eq!(fetch(Some(&owner.url)).await, StatusCode::BAD_REQUEST);
    // Browsers attach such credentials to requests of any page, so they do not prove the page's origin.
    assert_eq!(fetch(Some("http://elsewhere.example")).await, StatusCode::FORBIDDEN);
    assert_eq!(fetch(None).await, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn denied_operations_are_recorded_with_reason_and_object() {
    secret_leak_check::register(NEW_PASSWORD);
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    owner.create_account("vera", 3).await;
    let vera = sign_in(&parapet, "vera", PASSWORD).await.unwrap();
    let client = json!({ "tokenName": "ours", "type": "client" });
    let (_, made) = owner.call(Method::POST, TOKENS_PATH, &client).await;
    let secret = made["secret"].as_str().unwrap();
    secret_leak_check::register(secret);
    let id = identifier(&owner, "ours").await;

    let own = "/api/admin/user/change-password";
    let guess = json!({ "oldPassword": "a wrong guess", "password": NEW_PASSWORD });
    let denied = [
        (&owner, Method::DELETE, format!("{ACCOUNTS_PATH}/1"), Value::Null),
        (&owner, Method::PUT, format!("{ACCOUNTS_PATH}/1"), json!({ "rootRole": 3 })),
        (&vera, Method::POST, own.to_owned(), guess),
        (&vera, Method::DELETE, format!("{TOKENS_PATH}/{secret}"), Value::Null),
        (&vera, Method::DELETE, format!("{ACCOUNTS_PATH}/1"), Value::Null),
    ];
    for (session, method, path, body) in denied {
        let (status, response) = session.call(method, &path, &body).await;
        assert!(status.is_client_error(), "{path}: {status} {response}");
    }
    let reported = events(&owner, "permission-denied").await.into_iter().rev();
    let reported = reported.map(|event| {
        let data = &event["data"];
        let why = ["reason", "permission"].into_iter().find_map(|name| data[name].as_str());
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (text(&event["createdBy"]), text(&data["operation"]), why.unwrap_or_default().to_owned())
    });
    let reported: Vec<_> = reported.collect();
    let expect = [
        (OWNER, "delete the account 1".to_owned(), "it is the last admin"),
        (OWNER, "change the account 1".to_owned(), "it is the last admin"),
        ("vera", "change the own password".to_owned(), "wrong password"),
        ("vera", format!("delete the API token {id}"), "DELETE_CLIENT_API_TOKEN"),
        ("vera", "DELETE /api/admin/user-admin/1".to_owned(), "ADMIN"),
    ];
    let expect = expect.map(|(who, what, why)| (who.to_owned(), what, why.to_owned()));
    assert_eq!(reported, expect);
}

#[tokio::test]
async fn background_requests_do_not_extend_a_session() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start_with(&["--session-idle-seconds", "2"]).await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let by_itself = [("cookie", owner.cookies.as_str()), ("parapet-background", "1")];
    let fetch = async || owner.call_as(Method::GET, "/status", &Value::Null, &by_itself).await.0;
    assert_eq!(fetch().await, StatusCode::OK);
    wait_until("the session has ended", Duration::from_mins(1), async || {
        (fetch().await == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
}
