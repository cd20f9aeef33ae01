//! A standalone as a control plane: accounts, tokens, permissions and the audit log over HTTP, on both
//! databases.

mod backup;
mod database_outage;
mod invalid_and_denied_requests;
mod secret_leaks;

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _};

use crate::rig::{Parapet, Postgres, http, secret_leak_check, send_json, wait_until};

const FLAGS: &str = r#"{"features":[
    {"name":"first","project":"default","enabled":true,"strategies":[{"name":"default"}]},
    {"name":"other","project":"web","enabled":true,"strategies":[{"name":"default"}]}]}"#;

const OWNER: &str = "admin";
const PASSWORD: &str = "correct horse battery";

/// A password for a later change.
const NEW_PASSWORD: &str = "another long password";

/// The database of accounts and tokens.
#[derive(Clone, Copy, Debug)]
enum DatabaseKind {
    Sqlite,
    Postgres,
}

/// A directory and a database for instances.
struct Installation {
    folder: tempfile::TempDir,
    database: Option<String>,
}

impl Installation {
    async fn new(database_kind: DatabaseKind) -> Self {
        secret_leak_check::register(PASSWORD);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("flags.json"), FLAGS).unwrap();
        let database = match database_kind {
            DatabaseKind::Sqlite => None,
            DatabaseKind::Postgres => {
                let postgres = Postgres::shared().await;
                let (port, name) = (postgres.port(), postgres.create_database().await);
                Some(format!("postgres://postgres@127.0.0.1:{port}/{name}"))
            }
        };
        Self { folder, database }
    }

    async fn start(&self) -> Parapet {
        self.start_with(&[]).await
    }

    async fn start_with(&self, arguments: &[&str]) -> Parapet {
        let setup = Parapet::mode("standalone")
            .flag("--flags", self.folder.path().join("flags.json"))
            .flag("--metrics-interval-seconds", "1")
            .env("UNLEASH_DEFAULT_ADMIN_PASSWORD", PASSWORD);
        let setup = match &self.database {
            Some(url) => setup.env("DATABASE_URL", url),
            None => setup,
        };
        arguments.iter().fold(setup, |setup, argument| setup.arg(*argument)).start().await
    }
}

impl Installation {
    /// Makes the accounts unreadable, as if the database were unavailable, or readable again.
    async fn set_accounts_unavailable(&self, parapet: &Parapet, away: bool) {
        let sql = if away {
            "ALTER TABLE accounts RENAME TO accounts_away"
        } else {
            "ALTER TABLE accounts_away RENAME TO accounts"
        };
        self.execute(parapet, sql).await;
    }

    /// Makes the accounts read-only, as on a PostgreSQL standby or a full disk, or writable again.
    async fn set_read_only(&self, parapet: &Parapet, read_only: bool) {
        if let Some(name) = self.database_name() {
            // It applies to new connections.
            let sql = format!(
                "ALTER DATABASE {name} SET default_transaction_read_only = {read_only}; \
                 SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
            );
            return Postgres::shared().await.execute("postgres", &sql).await;
        }
        let sql = if read_only {
            "CREATE TRIGGER read_only BEFORE UPDATE ON accounts \
             BEGIN SELECT RAISE(ABORT, 'it is read-only'); END"
        } else {
            "DROP TRIGGER read_only"
        };
        self.execute(parapet, sql).await;
    }

    fn database_name(&self) -> Option<&str> {
        self.database.as_deref()?.rsplit('/').next()
    }

    /// Runs SQL in the database of `parapet`, without its knowledge.
    async fn execute(&self, parapet: &Parapet, sql: &'static str) {
        if let Some(name) = self.database_name() {
            return Postgres::shared().await.execute(name, sql).await;
        }
        let path = parapet.data_dir().join("parapet.db");
        let url = format!("sqlite:{}", path.display());
        let mut connection = sqlx::SqliteConnection::connect(&url).await.unwrap();
        connection.execute(sql).await.unwrap();
    }
}

/// A signed-in user.
struct Session {
    url: String,
    cookies: String,
}

async fn sign_in(parapet: &Parapet, username: &str, password: &str) -> Result<Session, StatusCode> {
    sign_in_with(parapet, username, password, "").await
}

async fn sign_in_with(
    parapet: &Parapet,
    username: &str,
    password: &str,
    cookies: &str,
) -> Result<Session, StatusCode> {
    let url = parapet.admin_url();
    let body = json!({ "username": username, "password": password }).to_string();
    let request = http().post(format!("{url}/auth/simple/login"));
    let request = if cookies.is_empty() { request } else { request.header("cookie", cookies) };
    let response =
        request.header("content-type", "application/json").body(body).send().await.unwrap();
    if !response.status().is_success() {
        return Err(response.status());
    }
    for cookie in response.headers().get_all("set-cookie") {
        let cookie = cookie.to_str().unwrap();
        assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"), "{cookie}");
    }
    Ok(Session { url, cookies: session_cookies(&response) })
}

/// The cookies that a response sets, as a client sends them back. Their values become secrets.
pub(crate) fn session_cookies(response: &reqwest::Response) -> String {
    let cookies = response.headers().get_all("set-cookie").iter();
    let cookies = cookies.map(|cookie| {
        let (pair, _) = cookie.to_str().unwrap().split_once(';').unwrap();
        secret_leak_check::register(pair.split_once('=').unwrap().1);
        pair
    });
    cookies.collect::<Vec<_>>().join("; ")
}

impl Session {
    async fn call(&self, method: Method, path: &str, body: &Value) -> (StatusCode, Value) {
        let origin = ("origin", self.url.as_str());
        self.call_as(method, path, body, &[("cookie", &self.cookies), origin]).await
    }

    async fn call_as(
        &self,
        method: Method,
        path: &str,
        body: &Value,
        headers: &[(&str, &str)],
    ) -> (StatusCode, Value) {
        let mut request = http().request(method, format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        send_json(request, body).await
    }

    async fn get(&self, path: &str) -> Value {
        let (status, body) = self.call(Method::GET, path, &Value::Null).await;
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
        body
    }

    async fn create_token(&self, kind: &str, name: &str) -> (StatusCode, Value) {
        let environment = if kind == "admin" { "*" } else { "development" };
        let token = json!({ "tokenName": name, "type": kind, "environment": environment });
        let (status, made) = self.call(Method::POST, "/api/admin/api-tokens", &token).await;
        if status == StatusCode::CREATED {
            secret_leak_check::register(made["secret"].as_str().unwrap());
        }
        (status, made)
    }

    async fn token_names(&self) -> Vec<String> {
        let listed = self.get("/api/admin/api-tokens").await;
        let tokens = listed["tokens"].as_array().unwrap().iter();
        tokens.map(|token| token["tokenName"].as_str().unwrap().to_owned()).collect()
    }

    async fn create_account(&self, username: &str, role: i64) -> i64 {
        let account = json!({ "username": username, "rootRole": role, "password": PASSWORD });
        let (status, made) = self.call(Method::POST, "/api/admin/user-admin", &account).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        made["id"].as_i64().unwrap()
    }

    async fn grant(&self, id: i64, permissions: &[&str]) {
        let path = format!("/api/admin/user-admin/{id}/permissions");
        let body = json!({ "permissions": permissions });
        let (status, response) = self.call(Method::PUT, &path, &body).await;
        assert_eq!(status, StatusCode::OK, "{response}");
    }
}

/// The identifier of the token of this name, as lists show it.
async fn identifier(session: &Session, name: &str) -> String {
    let listed = session.get(&format!("/api/admin/api-tokens/{name}")).await;
    listed["tokens"][0]["secret"].as_str().unwrap().to_owned()
}

async fn token_lifecycle(database_kind: DatabaseKind) {
    let place = Installation::new(database_kind).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let me = owner.get("/api/admin/user").await;
    assert_eq!(me["permissions"], json!([{ "permission": "ADMIN" }]));

    let (status, made) = owner.create_token("client", "checkout").await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let secret = made["secret"].as_str().unwrap().to_owned();
    assert_eq!(parapet.features_status(&secret).await, StatusCode::OK, "it works at once");
    let listed = owner.get("/api/admin/api-tokens/checkout").await;
    assert!(!listed.to_string().contains(&secret), "lists show no secret");
    assert_eq!(listed["tokens"][0]["type"], "backend");

    // Reported usage is stored and listed.
    let toggles = json!({ "first": { "yes": 3, "no": 1, "variants": { "a": 2 } } });
    for _ in 0..2 {
        parapet.report_usage(&secret, "shop", &toggles).await;
    }
    wait_until("the usage is shown", Duration::from_secs(30), async || {
        let usage = owner.get("/api/admin/client-metrics/features/first/raw").await;
        let hours = usage["data"].as_array().unwrap();
        let sum = |name: &str| hours.iter().map(|hour| hour[name].as_u64().unwrap()).sum::<u64>();
        let a = hours.iter().map(|hour| hour["variants"]["a"].as_u64().unwrap_or(0)).sum::<u64>();
        ((sum("yes"), sum("no"), a) == (6, 2, 4)).then_some(())
    })
    .await;
    let applications = owner.get("/api/admin/metrics/applications").await;
    assert_eq!(applications["applications"][0]["appName"], "shop");

    // A token expires without any action.
    let end = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(5);
    let path = format!("/api/admin/api-tokens/{}", identifier(&owner, "checkout").await);
    let (status, _) =
        owner.call(Method::PUT, &path, &json!({ "expiresAt": end.to_string() })).await;
    assert_eq!(status, StatusCode::OK);
    wait_until("the token has expired", Duration::from_secs(10), async || {
        (parapet.features_status(&secret).await == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
    owner.call(Method::PUT, &path, &json!({ "expiresAt": null })).await;
    assert_eq!(parapet.features_status(&secret).await, StatusCode::OK, "and comes back");

    // Deleted by its secret, it is rejected at once, on this instance and after a restart.
    let path = format!("/api/admin/api-tokens/{secret}");
    assert_eq!(owner.call(Method::DELETE, &path, &Value::Null).await.0, StatusCode::OK);
    assert_eq!(parapet.features_status(&secret).await, StatusCode::UNAUTHORIZED);
    let (_, kept_token) = owner.create_token("frontend", "kept").await;
    assert!(parapet.terminate().await.success());
    parapet.restart();
    parapet.wait_until_ready().await;
    assert_eq!(parapet.features_status(&secret).await, StatusCode::UNAUTHORIZED);
    let frontend = kept_token["secret"].as_str().unwrap();
    assert_eq!(parapet.get("/api/frontend", frontend).await.0, StatusCode::OK);

    // The session survives the restart, and the audit log contains every step.
    let events = owner.get("/api/admin/events?limit=1000").await;
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for event in events["events"].as_array().unwrap() {
        *kinds.entry(event["type"].as_str().unwrap()).or_default() += 1;
    }
    assert_eq!(kinds["api-token-updated"], 2);
    assert_eq!(kinds["api-token-deleted"], 1);
    assert!(kinds["api-token-created"] >= 2 && kinds["user-signed-in"] == 1, "{kinds:?}");
    assert!(!events.to_string().contains(&secret));
    let deleted = owner.get("/api/admin/events?type=api-token-deleted").await;
    assert_eq!(deleted["events"][0]["createdBy"], OWNER);
    assert_eq!(deleted["events"][0]["preData"]["tokenName"], "checkout");
    if let Some(name) = place.database_name() {
        let dump = Postgres::shared().await.dump(name).await;
        assert!(dump.contains("checkout"), "the dump is of this database");
        secret_leak_check::assert_none_in(
            "the database",
            &[("its dump".to_owned(), dump.into_bytes())],
        );
    }
}

#[tokio::test]
async fn token_lifecycle_on_sqlite() {
    token_lifecycle(DatabaseKind::Sqlite).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL"]
async fn token_lifecycle_on_postgresql() {
    token_lifecycle(DatabaseKind::Postgres).await;
}

/// Each role and each permission, for each operation on each kind of token.
async fn permission_matrix(database_kind: DatabaseKind) {
    let place = Installation::new(database_kind).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    for kind in ["client", "frontend", "admin"] {
        owner.create_token(kind, &format!("a-{kind}")).await;
    }
    let grants = [
        "",
        "CREATE_CLIENT_API_TOKEN",
        "READ_CLIENT_API_TOKEN",
        "UPDATE_CLIENT_API_TOKEN",
        "DELETE_CLIENT_API_TOKEN",
        "CREATE_FRONTEND_API_TOKEN",
        "READ_FRONTEND_API_TOKEN",
        "UPDATE_FRONTEND_API_TOKEN",
        "DELETE_FRONTEND_API_TOKEN",
        "CREATE_API_TOKEN",
    ];
    let ids = [1, 2, 3].map(|role| (role, format!("user-{role}")));
    for (role, username) in ids {
        let id = owner.create_account(&username, role).await;
        let user = sign_in(&parapet, &username, PASSWORD).await.unwrap();
        for grant in grants {
            let granted: &[&str] = if grant.is_empty() { &[] } else { &[grant] };
            owner.grant(id, granted).await;
            let seen = user.token_names().await;
            for kind in ["client", "frontend", "admin"] {
                let what = format!("role {role}, granted {grant:?}, {kind}");
                let upper = kind.to_uppercase();
                let holds = |action: &str| {
                    role == 1
                        || (kind != "admin"
                            && (grant == format!("{action}_{upper}_API_TOKEN")
                                || (grant == "CREATE_API_TOKEN" && action == "CREATE")))
                };
                let sees = match kind {
                    "client" => true,
                    "frontend" => {
                        role < 3 || grant.contains("FRONTEND") || grant == "CREATE_API_TOKEN"
                    }
                    _ => role == 1,
                };
                assert_eq!(seen.contains(&format!("a-{kind}")), sees, "{what}");
                let expect =
                    |action, good| if holds(action) { good } else { StatusCode::FORBIDDEN };
                let (status, response) = user.create_token(kind, &format!("b-{kind}")).await;
                assert_eq!(status, expect("CREATE", StatusCode::CREATED), "{what}: {response}");
                if status == StatusCode::FORBIDDEN {
                    let missing = if kind == "admin" {
                        "ADMIN".to_owned()
                    } else {
                        format!("CREATE_{upper}_API_TOKEN")
                    };
                    assert_eq!(response["permissions"], json!([missing]), "{what}");
                    owner.create_token(kind, &format!("b-{kind}")).await;
                }
                let path = format!(
                    "/api/admin/api-tokens/{}",
                    identifier(&owner, &format!("b-{kind}")).await
                );
                let body = json!({ "expiresAt": "2099-01-01T00:00:00Z" });
                let status = user.call(Method::PUT, &path, &body).await.0;
                assert_eq!(status, expect("UPDATE", StatusCode::OK), "{what}");
                let status = user.call(Method::DELETE, &path, &Value::Null).await.0;
                assert_eq!(status, expect("DELETE", StatusCode::OK), "{what}");
                owner.call(Method::DELETE, &path, &Value::Null).await;
            }
            for path in ["/api/admin/user-admin", "/api/admin/events"] {
                let (status, response) = user.call(Method::GET, path, &Value::Null).await;
                let expect = if role == 1 { StatusCode::OK } else { StatusCode::FORBIDDEN };
                assert_eq!(status, expect, "role {role}, {path}: {response}");
            }
        }
    }
    let refused = owner.get("/api/admin/events?type=permission-denied&limit=1").await;
    assert!(refused["totalEvents"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn each_permission_requires_its_role_or_grant_on_sqlite() {
    permission_matrix(DatabaseKind::Sqlite).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL"]
async fn each_permission_requires_its_role_or_grant_on_postgresql() {
    permission_matrix(DatabaseKind::Postgres).await;
}

/// An expiry in the past counts as a deletion, and a later expiry for an expired token as a creation;
/// the update permission is not enough for either.
async fn update_permission_neither_ends_nor_revives_tokens(database_kind: DatabaseKind) {
    let place = Installation::new(database_kind).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let id = owner.create_account("ann", 3).await;
    let ann = sign_in(&parapet, "ann", PASSWORD).await.unwrap();
    for (kind, path) in [("client", "/api/client/features"), ("frontend", "/api/frontend")] {
        let (_, made) = owner.create_token(kind, &format!("of-{kind}")).await;
        let secret = made["secret"].as_str().unwrap();
        let works = async || parapet.get(path, secret).await.0 == StatusCode::OK;
        let token = identifier(&owner, &format!("of-{kind}")).await;
        let token = format!("/api/admin/api-tokens/{token}");
        let expire = async |session: &Session, at| {
            session.call(Method::PUT, &token, &json!({ "expiresAt": at })).await
        };
        let permission = |action: &str| format!("{action}_{}_API_TOKEN", kind.to_uppercase());
        let (create, update, delete) =
            (permission("CREATE"), permission("UPDATE"), permission("DELETE"));
        let (past, later) = (Some("2020-01-01T00:00:00Z"), Some("2099-01-01T00:00:00Z"));

        owner.grant(id, &[&create, &update]).await;
        assert_eq!(expire(&ann, later).await.0, StatusCode::OK);
        for end in [past, Some("1970-01-01T00:00:00Z")] {
            let (status, response) = expire(&ann, end).await;
            assert_eq!(status, StatusCode::FORBIDDEN, "{response}");
            assert_eq!(response["permissions"], json!([delete]));
            let expect =
                format!("you need the {delete} permission to end a token by an expiry in the past");
            assert_eq!(response["message"], expect);
        }
        assert!(works().await);

        owner.grant(id, &[&update, &delete]).await;
        assert_eq!(expire(&ann, past).await.0, StatusCode::OK);
        assert!(!works().await);
        assert_eq!(expire(&ann, past).await.0, StatusCode::OK, "it has ended already");
        for end in [later, None] {
            let (status, response) = expire(&ann, end).await;
            assert_eq!(status, StatusCode::FORBIDDEN, "{response}");
            assert_eq!(response["permissions"], json!([create]));
            let expect = format!("you need the {create} permission to revive an expired token");
            assert_eq!(response["message"], expect);
        }
        assert!(!works().await);

        owner.grant(id, &[&create, &update]).await;
        assert_eq!(expire(&ann, None).await.0, StatusCode::OK);
        assert!(works().await);
    }
}

#[tokio::test]
async fn update_permission_neither_ends_nor_revives_tokens_on_sqlite() {
    update_permission_neither_ends_nor_revives_tokens(DatabaseKind::Sqlite).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL"]
async fn update_permission_neither_ends_nor_revives_tokens_on_postgresql() {
    update_permission_neither_ends_nor_revives_tokens(DatabaseKind::Postgres).await;
}

/// Attempts that fail because of the database do not count, neither to sign in nor to change the own
/// password. With the right password both work as soon as the database does.
async fn database_failure_costs_no_attempts(database_kind: DatabaseKind) {
    let place = Installation::new(database_kind).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let attempt = async |password| sign_in(&parapet, OWNER, password).await.map(drop);
    let change = json!({ "oldPassword": PASSWORD, "password": PASSWORD });
    let change =
        async || owner.call(Method::POST, "/api/admin/user/change-password", &change).await;

    place.set_accounts_unavailable(&parapet, true).await;
    for _ in 0..10 {
        assert_eq!(attempt(PASSWORD).await, Err(StatusCode::SERVICE_UNAVAILABLE));
        assert_eq!(attempt(NEW_PASSWORD).await, Err(StatusCode::SERVICE_UNAVAILABLE));
    }
    place.set_accounts_unavailable(&parapet, false).await;
    assert_eq!(attempt(PASSWORD).await, Ok(()));

    place.set_read_only(&parapet, true).await;
    for _ in 0..10 {
        assert_eq!(attempt(PASSWORD).await, Err(StatusCode::SERVICE_UNAVAILABLE));
        let (status, response) = change().await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{response}");
    }
    place.set_read_only(&parapet, false).await;
    assert_eq!(attempt(PASSWORD).await, Ok(()));
    assert_eq!(change().await.0, StatusCode::OK);

    // Attempts that were checked do count.
    let mut judged = 0;
    while attempt(NEW_PASSWORD).await == Err(StatusCode::UNAUTHORIZED) {
        judged += 1;
    }
    assert!((1..10).contains(&judged), "{judged}");
    assert_eq!(attempt(NEW_PASSWORD).await, Err(StatusCode::TOO_MANY_REQUESTS));
}

#[tokio::test]
async fn database_failure_costs_no_attempts_on_sqlite() {
    database_failure_costs_no_attempts(DatabaseKind::Sqlite).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL"]
async fn database_failure_costs_no_attempts_on_postgresql() {
    database_failure_costs_no_attempts(DatabaseKind::Postgres).await;
}

#[tokio::test]
async fn password_change_ends_sessions_and_cross_origin_changes_are_denied() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let id = owner.create_account("ann", 3).await;
    let ann = sign_in(&parapet, "Ann", PASSWORD).await.unwrap();
    assert_eq!(sign_in(&parapet, "ann", "wrong").await.err(), Some(StatusCode::UNAUTHORIZED));
    assert_eq!(sign_in(&parapet, "nobody", "wrong").await.err(), Some(StatusCode::UNAUTHORIZED));

    // A page of another origin cannot change anything with a user's cookies.
    let token = json!({ "tokenName": "x", "type": "client" });
    for headers in [
        vec![("cookie", owner.cookies.as_str())],
        vec![("cookie", owner.cookies.as_str()), ("origin", "http://evil.example")],
        vec![("cookie", owner.cookies.as_str()), ("sec-fetch-site", "cross-site")],
    ] {
        let response = owner.call_as(Method::POST, "/api/admin/api-tokens", &token, &headers).await;
        assert_eq!(response.0, StatusCode::FORBIDDEN, "{headers:?}");
    }

    secret_leak_check::register(NEW_PASSWORD);
    let path = format!("/api/admin/user-admin/{id}/change-password");
    let (status, response) =
        owner.call(Method::POST, &path, &json!({ "password": NEW_PASSWORD })).await;
    assert_eq!(status, StatusCode::OK, "{response}");
    let status = ann.call(Method::GET, "/api/admin/user", &Value::Null).await.0;
    assert_eq!(status, StatusCode::UNAUTHORIZED, "a new password ends sessions");
    assert_eq!(sign_in(&parapet, "ann", PASSWORD).await.err(), Some(StatusCode::UNAUTHORIZED));
    let ann = sign_in(&parapet, "ann", NEW_PASSWORD).await.unwrap();
    assert_eq!(ann.call(Method::POST, "/logout", &Value::Null).await.0, StatusCode::NO_CONTENT);
    let status = ann.call(Method::GET, "/api/admin/user", &Value::Null).await.0;
    assert_eq!(status, StatusCode::UNAUTHORIZED);

    // The last owner cannot be deleted.
    let (status, _) = owner.call(Method::DELETE, "/api/admin/user-admin/1", &Value::Null).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
}

#[tokio::test]
#[ignore = "needs PostgreSQL"]
async fn token_deleted_on_one_instance_is_rejected_by_the_other() {
    let place = Installation::new(DatabaseKind::Postgres).await;
    let (one, other) = tokio::join!(place.start(), place.start());
    let owner = sign_in(&one, OWNER, PASSWORD).await.unwrap();
    let accounts = owner.get("/api/admin/user-admin").await;
    assert_eq!(accounts["users"].as_array().unwrap().len(), 1, "one of two starts makes it");
    let (_, made) = owner.create_token("client", "shared").await;
    let secret = made["secret"].as_str().unwrap();
    let at_other = async |expect| {
        wait_until("the other instance has noticed", Duration::from_secs(10), async || {
            (other.features_status(secret).await == expect).then_some(())
        })
        .await;
    };
    at_other(StatusCode::OK).await;
    let path = format!("/api/admin/api-tokens/{}", identifier(&owner, "shared").await);
    assert_eq!(owner.call(Method::DELETE, &path, &Value::Null).await.0, StatusCode::OK);
    at_other(StatusCode::UNAUTHORIZED).await;
    // A session of one instance is valid on the other.
    let there = Session { url: other.admin_url(), cookies: owner.cookies.clone() };
    assert_eq!(there.get("/api/admin/user").await["user"]["username"], OWNER);
}

#[tokio::test]
async fn edge_uses_standalone_as_upstream_like_unleash() {
    const ADMIN: &str = "*:*.seeded-admin-for-an-edge-0123456789";
    secret_leak_check::register(ADMIN);
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let flags = place.folder.path().join("flags.json");
    let standalone = Parapet::mode("standalone")
        .flag("--flags", flags)
        .flag("--metrics-interval-seconds", "1")
        .env("INIT_ADMIN_API_TOKENS", ADMIN)
        .env("UNLEASH_DEFAULT_ADMIN_PASSWORD", PASSWORD)
        .start()
        .await;
    let owner = sign_in(&standalone, OWNER, PASSWORD).await.unwrap();
    let edge = Parapet::edge(&standalone.admin_url())
        .admin_token(ADMIN)
        .with_short_intervals()
        .start()
        .await;
    let (_, made) = owner.create_token("client", "behind the edge").await;
    let secret = made["secret"].as_str().unwrap();
    assert_eq!(edge.features_status(secret).await, StatusCode::OK);
    edge.report_usage(secret, "far", &json!({ "first": { "yes": 5, "no": 0 } })).await;
    wait_until("the usage has come through", Duration::from_mins(1), async || {
        let usage = owner.get("/api/admin/client-metrics/features/first/raw").await;
        let hours = usage["data"].as_array().unwrap().iter();
        (hours.map(|hour| hour["yes"].as_u64().unwrap()).sum::<u64>() == 5).then_some(())
    })
    .await;
    let path = format!("/api/admin/api-tokens/{}", identifier(&owner, "behind%20the%20edge").await);
    assert_eq!(owner.call(Method::DELETE, &path, &Value::Null).await.0, StatusCode::OK);
    wait_until("the edge refuses it", Duration::from_mins(1), async || {
        (edge.features_status(secret).await == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
}

/// Through an edge in front of the standalone, with the session that was started there.
#[tokio::test]
async fn token_is_created_used_and_deleted_through_edge_that_relays_to_standalone() {
    const ADMIN: &str = "*:*.seeded-admin-for-a-relay-0123456789";
    secret_leak_check::register(ADMIN);
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let flags = place.folder.path().join("flags.json");
    let standalone = Parapet::mode("standalone")
        .flag("--flags", flags)
        .flag("--proxy-trusted-servers", "127.0.0.1")
        .arg("--trust-proxy")
        .env("INIT_ADMIN_API_TOKENS", ADMIN)
        .env("UNLEASH_DEFAULT_ADMIN_PASSWORD", PASSWORD)
        .start()
        .await;
    let edge = Parapet::edge(&standalone.admin_url()).admin_token(ADMIN).arg("--admin-relay");
    // Intervals are too long to explain what this test sees.
    let edge = edge.flag("--token-list-interval-seconds", "3600").start().await;

    let owner = sign_in(&edge, OWNER, PASSWORD).await.unwrap();
    let foreign = [("cookie", owner.cookies.as_str()), ("origin", "http://evil.example")];
    let token = json!({ "tokenName": "x", "type": "client" });
    let refused = owner.call_as(Method::POST, "/api/admin/api-tokens", &token, &foreign).await;
    assert_eq!(refused.0, StatusCode::FORBIDDEN, "{}", refused.1);
    let (status, made) = owner.create_token("client", "through the edge").await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let secret = made["secret"].as_str().unwrap();
    assert_eq!(edge.features_status(secret).await, StatusCode::OK);
    let path =
        format!("/api/admin/api-tokens/{}", identifier(&owner, "through%20the%20edge").await);
    assert_eq!(owner.call(Method::DELETE, &path, &Value::Null).await.0, StatusCode::OK);
    assert_eq!(edge.features_status(secret).await, StatusCode::UNAUTHORIZED);
    assert_eq!(standalone.features_status(secret).await, StatusCode::UNAUTHORIZED);
    let deleted = owner.get("/api/admin/events?type=api-token-deleted").await;
    assert_eq!(deleted["events"][0]["createdBy"], OWNER);
    assert_eq!(owner.call(Method::POST, "/logout", &Value::Null).await.0, StatusCode::NO_CONTENT);
    let status = owner.call(Method::GET, "/api/admin/user", &Value::Null).await.0;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn floods_of_passwords_and_cookies_do_not_lock_out_the_owner() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let mut seen: BTreeMap<u16, usize> = BTreeMap::new();
    for number in 0..10_000 {
        let status = sign_in(&parapet, OWNER, &format!("guess-{number}-guess")).await.err();
        *seen.entry(status.expect("no attempt succeeds").as_u16()).or_default() += 1;
    }
    assert!(seen[&429] > 9_000 && seen.keys().all(|it| [401, 429].contains(it)), "{seen:?}");
    // The owner's browser is a known device.
    let again = sign_in_with(&parapet, OWNER, PASSWORD, &owner.cookies).await;
    assert!(again.is_ok(), "{:?}", again.err());
    let mut seen: BTreeMap<u16, usize> = BTreeMap::new();
    for number in 0..10_000_u64 {
        let cookie = format!("parapet-session={number:022}.{number:043}");
        let response = owner
            .call_as(Method::GET, "/api/admin/user", &Value::Null, &[("cookie", &cookie)])
            .await;
        *seen.entry(response.0.as_u16()).or_default() += 1;
    }
    assert!(seen[&429] > 5_000 && seen.keys().all(|it| [401, 429].contains(it)), "{seen:?}");
    assert_eq!(owner.get("/api/admin/user").await["user"]["username"], OWNER);
}

#[tokio::test]
async fn openapi_document_and_flag_explanation_are_served() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let document = owner.get("/docs/openapi.json").await;
    assert!(document["paths"]["/api/admin/api-tokens"]["post"].is_object());
    // Every operation in the document is routed.
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let path = path.replace("{id}", "999").replace("{project}", "default");
            let path = path.replace(['{', '}'], "");
            if path.contains("logout") || path == "/api/admin/api-tokens/token" {
                continue;
            }
            let (status, response) = owner.call(method.clone(), &path, &json!({})).await;
            assert!(
                status.as_u16() < 500 && status != StatusCode::METHOD_NOT_ALLOWED,
                "{method} {path}: {status} {response}"
            );
        }
    }
    let request =
        json!({ "environment": "development", "flag": "first", "context": { "userId": "7" } });
    let (status, why) = owner.call(Method::POST, "/api/admin/explain", &request).await;
    assert_eq!((status, &why["enabled"]), (StatusCode::OK, &json!(true)), "{why}");
    let flags = owner.get("/api/admin/flags?environment=development").await;
    assert_eq!(flags["flags"][1]["project"], "web");
}

/// The output of `parapet` with these arguments, on the instance's database.
fn run_on_database(parapet: &Parapet, arguments: &[&str], input: &str) -> Result<String, String> {
    let data_dir = parapet.data_dir();
    run_parapet(&[arguments, &["--data-dir", data_dir.to_str().unwrap()]].concat(), input)
}

/// The output of `parapet` with these arguments.
pub(crate) fn run_parapet(arguments: &[&str], input: &str) -> Result<String, String> {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut command = Command::new(env!("CARGO_BIN_EXE_parapet"));
    command.args(arguments).env_clear();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    process.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = process.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

#[tokio::test]
async fn command_line_changes_are_enforced_by_running_instance() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let made =
        run_on_database(&parapet, &["token", "create", "--name", "from the shell"], "").unwrap();
    let secret = made.trim();
    secret_leak_check::register(secret);
    wait_until("the new token works", Duration::from_secs(10), async || {
        (parapet.features_status(secret).await == StatusCode::OK).then_some(())
    })
    .await;
    let listed = run_on_database(&parapet, &["token", "list"], "").unwrap();
    assert!(listed.contains("from the shell") && !listed.contains(secret), "{listed}");
    run_on_database(&parapet, &["token", "revoke", "-"], secret).unwrap();
    wait_until("it is refused", Duration::from_secs(10), async || {
        (parapet.features_status(secret).await == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
    assert!(
        run_on_database(&parapet, &["token", "revoke", "-"], secret)
            .unwrap_err()
            .contains("no such token")
    );

    // A lost password can be replaced from the command line.
    let old = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    run_on_database(
        &parapet,
        &["account", "password", OWNER, "--password-file", "-"],
        NEW_PASSWORD,
    )
    .unwrap();
    secret_leak_check::register(NEW_PASSWORD);
    let status = old.call(Method::GET, "/api/admin/user", &Value::Null).await.0;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    let owner = sign_in(&parapet, OWNER, NEW_PASSWORD).await.unwrap();
    let made =
        run_on_database(&parapet, &["account", "add", "ann", "--role", "Viewer"], "").unwrap();
    let password = made.split_whitespace().skip_while(|word| *word != "password").nth(1).unwrap();
    secret_leak_check::register(password);
    run_on_database(&parapet, &["account", "grant", "ann", "CREATE_API_TOKEN"], "").unwrap();
    let ann = sign_in(&parapet, "ann", password).await.unwrap();
    assert_eq!(ann.create_token("frontend", "ann's").await.0, StatusCode::CREATED);
    let accounts = run_on_database(&parapet, &["account", "list"], "").unwrap();
    assert!(accounts.contains("CREATE_CLIENT_API_TOKEN"), "{accounts}");
    let events = owner.get("/api/admin/events?createdBy=command%20line").await;
    assert!(events["totalEvents"].as_u64().unwrap() >= 5, "{events}");
    let wrong =
        run_on_database(&parapet, &["account", "grant", "ann", "EVERYTHING"], "").unwrap_err();
    assert!(wrong.contains("expected CREATE_CLIENT_API_TOKEN"), "{wrong}");
    assert!(
        run_on_database(&parapet, &["token", "list", "--port", "1"], "")
            .unwrap_err()
            .contains("does not apply")
    );
    let nowhere = run_parapet(&["token", "list", "--data-dir", "/nowhere"], "").unwrap_err();
    assert!(nowhere.contains("/nowhere/parapet.db cannot be opened"), "{nowhere}");
}

/// A file with this text in its first line.
pub(crate) fn temp_file_with(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{text}\n")).unwrap();
    file
}

#[tokio::test]
async fn command_line_works_with_url_as_with_database() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let admin = run_parapet(
        &[
            &["token", "create", "--name", "shell", "--type", "admin"][..],
            &["--data-dir", parapet.data_dir().to_str().unwrap()],
        ]
        .concat(),
        "",
    );
    let admin = admin.unwrap().trim().to_owned();
    secret_leak_check::register(&admin);
    let (url, file) = (parapet.admin_url(), temp_file_with(&admin));
    let place = ["--url", &url, "--token-file", file.path().to_str().unwrap()];
    let run = |arguments: &[&str], input: &str| run_parapet(&[arguments, &place].concat(), input);
    let json = |arguments: &[&str]| -> Value {
        let printed = run(&[arguments, &["--json"]].concat(), "").unwrap();
        serde_json::from_str(&printed).unwrap_or_else(|_| panic!("{printed}"))
    };
    wait_until("the new admin token works", Duration::from_secs(10), async || {
        run(&["token", "list"], "").is_ok().then_some(())
    })
    .await;

    let made = json(&["token", "create", "--name", "far", "--project", "web"]);
    let secret = made["secret"].as_str().unwrap();
    secret_leak_check::register(secret);
    assert_eq!(parapet.features_status(secret).await, StatusCode::OK);
    let listed = json(&["token", "list", "--name", "far"]);
    assert_eq!(listed[0]["projects"], json!(["web"]));
    // Both ways show the same token.
    let near =
        run_on_database(&parapet, &["token", "list", "--name", "far", "--json"], "").unwrap();
    let near: Value = serde_json::from_str(&near).unwrap();
    assert_eq!(near[0]["identifier"], listed[0]["identifier"]);
    assert_eq!(near[0]["type"], listed[0]["type"]);
    let gone = run(&["token", "revoke", "-"], secret).unwrap();
    assert!(gone.starts_with("revoked far (") && !gone.contains(secret), "{gone}");
    assert_eq!(parapet.features_status(secret).await, StatusCode::UNAUTHORIZED);
    let again = run(&["token", "revoke", "-"], secret).unwrap_err();
    assert!(again.contains("there is no such token"), "{again}");

    let made = json(&["account", "add", "ann", "--role", "Editor"]);
    let first = made["password"].as_str().unwrap();
    secret_leak_check::register(first);
    assert_eq!((&made["username"], &made["role"]), (&json!("ann"), &json!("Editor")));
    let granted = json(&["account", "grant", "ann", "CREATE_API_TOKEN"]);
    let both = json!(["CREATE_CLIENT_API_TOKEN", "CREATE_FRONTEND_API_TOKEN"]);
    assert_eq!(granted["permissions"], both);
    let taken = json(&["account", "grant", "ann", "CREATE_FRONTEND_API_TOKEN", "--revoke"]);
    assert_eq!(taken["permissions"], json!(["CREATE_CLIENT_API_TOKEN"]));
    let accounts = json(&["account", "list"]);
    let ann = accounts.as_array().unwrap().iter().find(|it| it["username"] == "ann").unwrap();
    assert_eq!(ann, &taken);
    run(&["account", "password", "ann", "--password-file", "-"], NEW_PASSWORD).unwrap();
    secret_leak_check::register(NEW_PASSWORD);
    assert!(sign_in(&parapet, "ann", first).await.is_err());
    let ann = sign_in(&parapet, "ann", NEW_PASSWORD).await.unwrap();
    assert_eq!(ann.create_token("client", "ann's").await.0, StatusCode::CREATED);

    // Errors show the server's message, and never the token that was sent.
    let wrong = temp_file_with("*:*.nobody-0123456789abcdef0123456789abcdef");
    let stranger = ["--url", &url, "--token-file", wrong.path().to_str().unwrap()];
    let refused = run_parapet(&[&["token", "list"][..], &stranger].concat(), "").unwrap_err();
    assert!(refused.contains("answered 401"), "{refused}");
    assert!(!refused.contains("nobody-0123456789"), "{refused}");
    let taken = run(&["account", "add", "ann"], "").unwrap_err();
    assert!(taken.contains("answered 400: username is taken"), "{taken}");
    let absent = run(&["account", "grant", "bob", "CREATE_API_TOKEN"], "").unwrap_err();
    assert!(absent.contains("there is no account `bob`"), "{absent}");
    let silent = ["--url", "http://127.0.0.1:1", "--token-file", file.path().to_str().unwrap()];
    let silent = run_parapet(&[&["token", "list"][..], &silent].concat(), "").unwrap_err();
    assert!(silent.contains("no answer from http://127.0.0.1:1"), "{silent}");
    for (arguments, reason) in [
        (&["token", "list", "--url", &url][..], "--token-file"),
        (&["token", "list", "--url", "ftp://a", "--token-file", "-"], "expected a URL"),
        (&["token", "list", "--check-config"], "--check-config: does not apply to `token`"),
        (
            &["explain", "--flags", "a", "--flag", "b", "--print-config"],
            "does not apply to `explain`",
        ),
        (&["token", "revoke", "-", "--url", &url, "--token-file", "-"], "cannot be read twice"),
        (&["token", "list", "--url", &url, "--token-file", "-", "--data-dir", "x"], "with --url"),
    ] {
        let printed = run_parapet(arguments, "").unwrap_err();
        assert!(printed.contains(reason), "{arguments:?}: {printed}");
    }
}
