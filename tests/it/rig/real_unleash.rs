//! A real Unleash server as upstream, and the parts of its admin API that the tests use.
//!
//! The open-source server has one project, `default`, and two environments, `development` and
//! `production`.

use std::collections::BTreeMap;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use super::guarded_process::{GuardedProcess, OnParentExit, node};
use super::net::{free_port, http, send_json, wait_until};
use super::postgres::Postgres;
use super::secret_leak_check;

/// The admin token of every server of the rig. Unleash accepts one only into a database without tokens,
/// so it is in the template that all databases are copied from.
const ADMIN_TOKEN: &str = "*:*.parapet-rig-admin-2f7d0c55e6b94f0e8f3a1f0b7c1d9e64";

/// The application that checks whether usage is counted.
const PROBE_APP: &str = "parapet-rig-probe";

/// The longest that Unleash takes to store what it has accepted: it stores usage every 5 s, applications
/// every 20 s.
pub(crate) const STORE_TIMEOUT: Duration = Duration::from_secs(45);

/// The releases that Parapet is tested with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UnleashVersion {
    /// 7.5.1, the last release line under Apache-2.0.
    V7,
    /// 8.2.0.
    V8,
    /// 8.2.0 with v2 tokens (`UNLEASH_EXPERIMENTAL_SECURE_TOKEN`).
    V8SecureTokens,
}

impl UnleashVersion {
    pub(crate) const ALL: [Self; 3] = [Self::V7, Self::V8, Self::V8SecureTokens];

    fn package(self) -> &'static str {
        match self {
            Self::V7 => "unleash-server-7",
            Self::V8 | Self::V8SecureTokens => "unleash-server-8",
        }
    }

    /// The name of a migrated database with the admin token, created once per test process.
    async fn template(self) -> &'static str {
        static V7: OnceCell<String> = OnceCell::const_new();
        static V8: OnceCell<String> = OnceCell::const_new();
        let template = match self {
            Self::V7 => &V7,
            Self::V8 | Self::V8SecureTokens => &V8,
        };
        let migrated = async || {
            let postgres = Postgres::shared().await;
            let database = postgres.create_database().await;
            launch(self, free_port(), &database).await.terminate().await;
            database
        };
        template.get_or_init(migrated).await
    }
}

/// The kinds of token that the admin API can create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenKind {
    Backend,
    Frontend,
}

/// One hour of one application's use of a flag, as Unleash stored it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HourlyUsage {
    pub(crate) app_name: String,
    pub(crate) environment: String,
    /// The start of the hour, in Unleash's format.
    pub(crate) timestamp: String,
    pub(crate) yes: u64,
    pub(crate) no: u64,
    pub(crate) variants: BTreeMap<String, u64>,
}

/// A running Unleash server with its own database.
#[derive(Debug)]
pub(crate) struct Unleash {
    version: UnleashVersion,
    port: u16,
    database: String,
    /// The token that [`admin_request`](Self::admin_request) sends.
    admin_token: Mutex<&'static str>,
    server: Mutex<Option<GuardedProcess>>,
}

impl Unleash {
    /// Starts a server with a fresh database.
    pub(crate) async fn start(version: UnleashVersion) -> Self {
        secret_leak_check::register(ADMIN_TOKEN);
        let database = Postgres::shared().await.copy_database(version.template().await).await;
        let port = free_port();
        let server = launch(version, port, &database).await;
        let admin_token = Mutex::new(ADMIN_TOKEN);
        Self { version, port, database, admin_token, server: Mutex::new(Some(server)) }
    }

    /// The shared server of this version, for tests that do not stop it and tolerate other flags.
    pub(crate) async fn shared(version: UnleashVersion) -> Arc<Self> {
        static V7: OnceCell<Arc<Unleash>> = OnceCell::const_new();
        static V8: OnceCell<Arc<Unleash>> = OnceCell::const_new();
        static V8_SECURE_TOKENS: OnceCell<Arc<Unleash>> = OnceCell::const_new();
        let shared = match version {
            UnleashVersion::V7 => &V7,
            UnleashVersion::V8 => &V8,
            UnleashVersion::V8SecureTokens => &V8_SECURE_TOKENS,
        };
        Arc::clone(shared.get_or_init(async || Arc::new(Self::start(version).await)).await)
    }

    /// Runs a test against the shared server of every version, concurrently.
    pub(crate) async fn on_every_version(test: impl AsyncFn(Arc<Self>)) {
        let test = &test;
        let each = UnleashVersion::ALL
            .map(|version| async move { test(Self::shared(version).await).await });
        join_all(each).await;
    }

    pub(crate) fn version(&self) -> UnleashVersion {
        self.version
    }

    /// Its URL: `http://127.0.0.1:<port>`.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Its admin token, the only credential that Parapet gets.
    pub(crate) fn admin_token(&self) -> &'static str {
        *self.admin_token.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates an admin token in the database, because the open-source server's API cannot.
    pub(crate) async fn insert_admin_token(&self, token: &'static str) {
        secret_leak_check::register(token);
        let sql = format!(
            "insert into api_tokens (secret, username, token_name, type, environment)
             values ('{token}', 'planted', 'planted', 'admin', '*')"
        );
        Postgres::shared().await.execute(&self.database, &sql).await;
    }

    /// Deletes the admin token in the database; [`admin_request`](Self::admin_request) sends `other`
    /// from now on. Unleash accepts the deleted one for up to a minute.
    pub(crate) async fn delete_admin_token(&self, other: &'static str) {
        let deleted = {
            let mut token = self.admin_token.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *token, other)
        };
        let sql = format!("delete from api_tokens where secret = '{deleted}'");
        Postgres::shared().await.execute(&self.database, &sql).await;
    }

    /// Kills it, as a crash would. What it has not stored yet is lost.
    pub(crate) fn kill(&self) {
        self.take_server().kill();
    }

    /// Stops it with SIGTERM.
    pub(crate) async fn stop(&self) -> ExitStatus {
        let server = self.take_server();
        server.terminate().await
    }

    /// Starts it again after [`kill`](Self::kill) or [`stop`](Self::stop), on the same port and
    /// database.
    pub(crate) async fn restart(&self) {
        let server = launch(self.version, self.port, &self.database).await;
        let before = self.server.lock().unwrap_or_else(PoisonError::into_inner).replace(server);
        assert!(before.is_none(), "the server was running");
    }

    fn take_server(&self) -> GuardedProcess {
        self.server
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .expect("the server is running")
    }

    /// Calls the admin API with any method; `path` begins with `/api/admin`, and `Null` means no body.
    pub(crate) async fn admin_request(
        &self,
        method: Method,
        path: &str,
        body: &Value,
    ) -> (StatusCode, Value) {
        let request = http().request(method, self.url() + path);
        send_json(request.header("Authorization", self.admin_token()), body).await
    }

    /// Calls the admin API and panics if that fails.
    pub(crate) async fn admin_ok(&self, method: Method, path: &str, body: &Value) -> Value {
        let (status, response) = self.admin_request(method.clone(), path, body).await;
        assert!(status.is_success(), "{method} {path}: {status} {response}");
        response
    }

    pub(crate) async fn admin_get(&self, path: &str) -> Value {
        self.admin_ok(Method::GET, path, &Value::Null).await
    }

    pub(crate) async fn admin_post(&self, path: &str, body: &Value) -> Value {
        self.admin_ok(Method::POST, path, body).await
    }

    pub(crate) async fn admin_put(&self, path: &str, body: &Value) -> Value {
        self.admin_ok(Method::PUT, path, body).await
    }

    pub(crate) async fn admin_delete(&self, path: &str) -> Value {
        self.admin_ok(Method::DELETE, path, &Value::Null).await
    }

    /// Creates a flag of type `release`, disabled everywhere, without strategies. Its name must be new.
    pub(crate) async fn create_flag(&self, name: &str) {
        let flag = json!({ "name": name, "type": "release" });
        self.admin_post("/api/admin/projects/default/features", &flag).await;
    }

    /// Creates a flag with these strategies in `environment`, and enables it there.
    pub(crate) async fn create_enabled_flag(
        &self,
        name: &str,
        environment: &str,
        strategies: &[Value],
    ) {
        self.create_flag(name).await;
        for strategy in strategies {
            self.add_strategy(name, environment, strategy).await;
        }
        self.enable(name, environment).await;
    }

    /// Adds a strategy (`{"name", "parameters", "constraints"?, "segments"?, "variants"?}`) and returns
    /// its id.
    pub(crate) async fn add_strategy(
        &self,
        flag: &str,
        environment: &str,
        strategy: &Value,
    ) -> String {
        let path = format!("{}/strategies", flag_environment_path(flag, environment));
        let made = self.admin_post(&path, strategy).await;
        made["id"].as_str().unwrap().to_owned()
    }

    /// Enables a flag. Without strategies it gets the default one, which is on for all users.
    pub(crate) async fn enable(&self, flag: &str, environment: &str) {
        self.admin_post(&format!("{}/on", flag_environment_path(flag, environment)), &json!({}))
            .await;
    }

    pub(crate) async fn disable(&self, flag: &str, environment: &str) {
        self.admin_post(&format!("{}/off", flag_environment_path(flag, environment)), &json!({}))
            .await;
    }

    /// Creates a segment with these constraints and returns its id.
    pub(crate) async fn create_segment(&self, name: &str, constraints: &Value) -> u64 {
        let segment = json!({ "name": name, "constraints": constraints });
        let made = self.admin_post("/api/admin/segments", &segment).await;
        made["id"].as_u64().unwrap()
    }

    /// Creates a token and returns it in full. `projects` is `["*"]` for all projects.
    pub(crate) async fn create_token(
        &self,
        kind: TokenKind,
        environment: &str,
        projects: &[&str],
        name: &str,
    ) -> String {
        let kind = match kind {
            TokenKind::Backend => "backend",
            TokenKind::Frontend => "frontend",
        };
        let token = json!({ "tokenName": name, "type": kind, "environment": environment, "projects": projects });
        let made = self.admin_post("/api/admin/api-tokens", &token).await;
        let token = made["secret"].as_str().unwrap().to_owned();
        secret_leak_check::register(&token);
        token
    }

    /// Creates a v1 token for all projects with a chosen secret, in the database, because the admin API
    /// cannot.
    ///
    /// For tests that use a token before it exists. Unleash notices it within a minute.
    pub(crate) async fn insert_token(&self, kind: TokenKind, token: &str, name: &str) {
        secret_leak_check::register(token);
        let kind = match kind {
            TokenKind::Backend => "client",
            TokenKind::Frontend => "frontend",
        };
        let (scope, _) = token.split_once('.').expect("a v1 token");
        let (_, environment) = scope.split_once(':').expect("a v1 token");
        let sql = format!(
            "insert into api_tokens (secret, username, token_name, type, environment)
             values ('{token}', '{name}', '{name}', '{kind}', '{environment}')"
        );
        Postgres::shared().await.execute(&self.database, &sql).await;
    }

    /// The tokens of this name, from the admin API.
    pub(crate) async fn tokens_named(&self, name: &str) -> Vec<Value> {
        let mut listed = self.admin_get(&format!("/api/admin/api-tokens/{name}")).await;
        let Value::Array(tokens) = listed["tokens"].take() else {
            panic!("no list of tokens: {listed}")
        };
        tokens
    }

    /// Registers the tokens of this name as secrets, and returns their environments.
    ///
    /// Only the creator of a v2 token knows its secret. The part in front of it identifies the token as
    /// well.
    pub(crate) async fn register_tokens_named(&self, name: &str) -> Vec<String> {
        let tokens = self.tokens_named(name).await;
        let mut environments: Vec<_> = tokens
            .iter()
            .map(|token| {
                let environment = token["environment"].as_str().unwrap();
                let secret = token["secret"].as_str().unwrap();
                if secret.contains('.') {
                    secret_leak_check::register(secret);
                } else {
                    secret_leak_check::register(&format!("*:{environment}.v2_{secret}_"));
                }
                environment.to_owned()
            })
            .collect();
        environments.sort();
        environments
    }

    /// Revokes a token, by its listed form: the full token (v1) or its selector (v2).
    pub(crate) async fn delete_token(&self, token: &str) {
        let listed_as = token.split_once(".v2_").map_or(token, |(_, rest)| &rest[..22]);
        self.admin_delete(&format!("/api/admin/api-tokens/{listed_as}")).await;
    }

    /// Waits until Unleash counts the usage of a flag.
    ///
    /// Unleash reloads its list of flags at most every 10 s, and until then accepts (202) and drops the
    /// usage of a new flag. Tests of counting wait here first. The probe's own usage is left out
    /// elsewhere.
    pub(crate) async fn wait_until_counted(&self, flag: &str, environment: &str) {
        let token = self.create_token(TokenKind::Backend, environment, &["*"], PROBE_APP).await;
        let what = format!("{flag} is counted in {environment} at {:?}", self.version);
        wait_until(&what, STORE_TIMEOUT, async || {
            let body = json!({ "applications": [], "metrics": [{
                "featureName": flag, "appName": PROBE_APP, "environment": environment,
                "timestamp": jiff::Timestamp::now().to_string(), "yes": 1, "no": 0, "variants": {},
            }]});
            let post = http()
                .post(self.url() + "/api/client/metrics/bulk")
                .header("Authorization", &token);
            let posted = post
                .header("Content-Type", "application/json")
                .body(body.to_string())
                .send()
                .await
                .unwrap();
            assert_eq!(posted.status(), StatusCode::ACCEPTED);
            self.all_flag_usage(flag)
                .await
                .iter()
                .any(|hour| hour.app_name == PROBE_APP)
                .then_some(())
        })
        .await;
        self.delete_token(&token).await;
    }

    /// The usage of a flag that Unleash has stored for the last 24 hours, without empty hours (Unleash
    /// fills them in).
    pub(crate) async fn flag_usage(&self, flag: &str) -> Vec<HourlyUsage> {
        let mut usage = self.all_flag_usage(flag).await;
        usage.retain(|hour| hour.app_name != PROBE_APP);
        usage
    }

    async fn all_flag_usage(&self, flag: &str) -> Vec<HourlyUsage> {
        let stored =
            self.admin_get(&format!("/api/admin/client-metrics/features/{flag}/raw")).await;
        let mut usage: Vec<HourlyUsage> =
            stored["data"].as_array().unwrap().iter().map(parse_usage).collect();
        usage.retain(|hour| hour.yes > 0 || hour.no > 0);
        usage.sort();
        usage
    }

    /// Waits until the stored usage of a flag by an application adds up to `(yes, no)` over all hours.
    ///
    /// Returns at the first match; add other checks if more usage could arrive later.
    pub(crate) async fn wait_for_usage(
        &self,
        flag: &str,
        app_name: &str,
        environment: &str,
        expect: (u64, u64),
    ) {
        let what = format!(
            "{expect:?} uses of {flag} by {app_name} in {environment} at {:?}",
            self.version
        );
        wait_until(&what, STORE_TIMEOUT, async || {
            let usage = self.flag_usage(flag).await;
            let of_app = usage
                .iter()
                .filter(|hour| hour.app_name == app_name && hour.environment == environment);
            let sum = of_app.fold((0, 0), |(yes, no), hour| (yes + hour.yes, no + hour.no));
            assert!(
                sum.0 <= expect.0 && sum.1 <= expect.1,
                "counted too much: {sum:?}, not {expect:?}, of {flag}"
            );
            (sum == expect).then_some(())
        })
        .await;
    }

    /// The impact metrics whose names contain `name`, from Unleash's Prometheus page: the sum of each
    /// series, without the prefix and labels that differ between versions.
    pub(crate) async fn impact_metrics(&self, name: &str) -> BTreeMap<String, f64> {
        let page = http().get(self.url() + "/internal-backstage/impact/metrics");
        let page = page.send().await.unwrap().text().await.unwrap();
        let samples = page.lines().filter(|line| !line.starts_with('#') && line.contains(name));
        let mut sums = BTreeMap::new();
        for sample in samples {
            let (series, value) = sample.rsplit_once(' ').unwrap();
            let (metric, labels) = series.split_once('{').unwrap_or((series, ""));
            let (_, metric) = metric.split_at(metric.find(name).unwrap());
            let bound = labels.split(',').find_map(|label| label.strip_prefix("le="));
            let bound = bound.map(|it| format!(" {}", it.trim_matches(['"', '}'])));
            let series = metric.to_owned() + &bound.unwrap_or_default();
            *sums.entry(series).or_default() += value.parse::<f64>().unwrap();
        }
        sums
    }

    /// The names of the registered applications. Unleash stores them every 20 s.
    pub(crate) async fn applications(&self) -> Vec<String> {
        let stored = self.admin_get("/api/admin/metrics/applications?limit=1000").await;
        let applications = stored["applications"].as_array().unwrap().iter();
        applications
            .map(|application| application["appName"].as_str().unwrap().to_owned())
            .collect()
    }
}

fn flag_environment_path(flag: &str, environment: &str) -> String {
    format!("/api/admin/projects/default/features/{flag}/environments/{environment}")
}

fn parse_usage(hour: &Value) -> HourlyUsage {
    let text = |field: &str| hour[field].as_str().unwrap().to_owned();
    let variants = hour["variants"].as_object().into_iter().flatten();
    HourlyUsage {
        app_name: text("appName"),
        environment: text("environment"),
        timestamp: text("timestamp"),
        yes: hour["yes"].as_u64().unwrap(),
        no: hour["no"].as_u64().unwrap(),
        variants: variants.map(|(name, count)| (name.clone(), count.as_u64().unwrap())).collect(),
    }
}

/// Starts a server and waits until it is healthy, including migrations.
async fn launch(version: UnleashVersion, port: u16, database: &str) -> GuardedProcess {
    let options = json!({
        "db": {
            "host": "127.0.0.1", "port": Postgres::shared().await.port(), "database": database,
            "user": "postgres", "password": "not asked for", "ssl": false,
        },
        "server": { "host": "127.0.0.1", "port": port },
    });
    let mut command = node("unleash.mjs");
    command
        .arg(version.package())
        .arg(options.to_string())
        .env("INIT_ADMIN_API_TOKENS", ADMIN_TOKEN);
    match version {
        // Later releases have this enabled.
        UnleashVersion::V7 => command.env("UNLEASH_EXPERIMENTAL_IMPACT_METRICS", "true"),
        UnleashVersion::V8 => &mut command,
        UnleashVersion::V8SecureTokens => command.env("UNLEASH_EXPERIMENTAL_SECURE_TOKEN", "true"),
    };
    let mut server =
        GuardedProcess::spawn(&format!("Unleash {version:?}"), &command, OnParentExit::Kill);
    let health = format!("http://127.0.0.1:{port}/health");
    server
        .wait_until(async || {
            http().get(&health).send().await.is_ok_and(|response| response.status().is_success())
        })
        .await;
    server
}
