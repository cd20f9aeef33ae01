//! A standalone and its users, for the tests of the control plane.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _};

use crate::rig::{
    Parapet, Postgres, http, run_parapet, secret_leak_check, send_json, session_cookies,
};

pub(super) const FLAGS: &str = r#"{"features":[
    {"name":"first","project":"default","enabled":true,"strategies":[{"name":"default"}]},
    {"name":"other","project":"web","enabled":true,"strategies":[{"name":"default"}]}]}"#;

pub(super) const OWNER: &str = "admin";
pub(super) const PASSWORD: &str = "correct horse battery";

/// A password for a later change.
pub(super) const NEW_PASSWORD: &str = "another long password";

/// The database of accounts and tokens.
#[derive(Clone, Copy, Debug)]
pub(super) enum DatabaseKind {
    Sqlite,
    Postgres,
}

/// A directory and a database for instances.
pub(super) struct Installation {
    pub(super) folder: tempfile::TempDir,
    pub(super) database: Option<String>,
}

impl Installation {
    pub(super) async fn new(database_kind: DatabaseKind) -> Self {
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

    pub(super) async fn start(&self) -> Parapet {
        self.start_with(&[]).await
    }

    pub(super) async fn start_with(&self, arguments: &[&str]) -> Parapet {
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
    pub(super) async fn set_accounts_unavailable(&self, parapet: &Parapet, away: bool) {
        let sql = if away {
            "ALTER TABLE accounts RENAME TO accounts_away"
        } else {
            "ALTER TABLE accounts_away RENAME TO accounts"
        };
        self.execute(parapet, sql).await;
    }

    /// Makes the accounts read-only, as on a PostgreSQL standby or a full disk, or writable again.
    pub(super) async fn set_read_only(&self, parapet: &Parapet, read_only: bool) {
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

    pub(super) fn database_name(&self) -> Option<&str> {
        self.database.as_deref()?.rsplit('/').next()
    }

    /// Runs SQL in the database of `parapet`, without its knowledge.
    pub(super) async fn execute(&self, parapet: &Parapet, sql: &'static str) {
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
pub(super) struct Session {
    pub(super) url: String,
    pub(super) cookies: String,
}

pub(super) async fn sign_in(
    parapet: &Parapet,
    username: &str,
    password: &str,
) -> Result<Session, StatusCode> {
    sign_in_with(parapet, username, password, "").await
}

pub(super) async fn sign_in_with(
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

impl Session {
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: &Value,
    ) -> (StatusCode, Value) {
        let origin = ("origin", self.url.as_str());
        self.call_as(method, path, body, &[("cookie", &self.cookies), origin]).await
    }

    pub(super) async fn call_as(
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

    pub(super) async fn get(&self, path: &str) -> Value {
        let (status, body) = self.call(Method::GET, path, &Value::Null).await;
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
        body
    }

    pub(super) async fn create_token(&self, kind: &str, name: &str) -> (StatusCode, Value) {
        let environment = if kind == "admin" { "*" } else { "development" };
        let token = json!({ "tokenName": name, "type": kind, "environment": environment });
        let (status, made) = self.call(Method::POST, "/api/admin/api-tokens", &token).await;
        if status == StatusCode::CREATED {
            secret_leak_check::register(made["secret"].as_str().unwrap());
        }
        (status, made)
    }

    pub(super) async fn token_names(&self) -> Vec<String> {
        let listed = self.get("/api/admin/api-tokens").await;
        let tokens = listed["tokens"].as_array().unwrap().iter();
        tokens.map(|token| token["tokenName"].as_str().unwrap().to_owned()).collect()
    }

    pub(super) async fn create_account(&self, username: &str, role: i64) -> i64 {
        let account = json!({ "username": username, "rootRole": role, "password": PASSWORD });
        let (status, made) = self.call(Method::POST, "/api/admin/user-admin", &account).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        made["id"].as_i64().unwrap()
    }

    pub(super) async fn grant(&self, id: i64, permissions: &[&str]) {
        let path = format!("/api/admin/user-admin/{id}/permissions");
        let body = json!({ "permissions": permissions });
        let (status, response) = self.call(Method::PUT, &path, &body).await;
        assert_eq!(status, StatusCode::OK, "{response}");
    }
}

/// The identifier of the token of this name, as lists show it.
pub(super) async fn identifier(session: &Session, name: &str) -> String {
    let listed = session.get(&format!("/api/admin/api-tokens/{name}")).await;
    listed["tokens"][0]["secret"].as_str().unwrap().to_owned()
}

/// The output of `parapet` with these arguments, on the instance's database.
pub(super) fn run_on_database(
    parapet: &Parapet,
    arguments: &[&str],
    input: &str,
) -> Result<String, String> {
    let data_dir = parapet.data_dir();
    run_parapet(&[arguments, &["--data-dir", data_dir.to_str().unwrap()]].concat(), input)
}
