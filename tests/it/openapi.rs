//! The OpenAPI document against the real responses: schemathesis generates requests from it and checks
//! the responses.
//!
//! Each run has its own instance, because the requests change and delete what they find.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use crate::rig::{Parapet, Postgres, http, secret_leak_check, tests_dir, wait_until};

const FLAGS: &str = r#"{"features":[
    {"name":"cart","type":"release","project":"default","enabled":true,
     "strategies":[{"name":"flexibleRollout","segments":[1],
                    "parameters":{"rollout":"50","stickiness":"default","groupId":"cart"},
                    "constraints":[{"contextName":"plan","operator":"IN","values":["gold"]}]}],
     "variants":[{"name":"a","weight":1000,"payload":{"type":"string","value":"x"}}]},
    {"name":"shop","project":"web","enabled":true,"strategies":[{"name":"default"}]}],
    "segments":[{"id":1,"constraints":[{"contextName":"userId","operator":"IN","values":["7"]}]}]}"#;

const ADMIN: &str = "*:*.admin-of-the-document-0123456789abcdef";
const CLIENT: &str = "*:development.reader-of-the-document-0123456789abcdef";
const FRONTEND: &str = "*:development.browser-of-the-document-0123456789abcdef";
const PASSWORD: &str = "correct horse battery";

/// The timeout for a run.
const RUN_TIMEOUT: Duration = Duration::from_mins(4);

/// An instance, and a directory for the run.
struct SchemathesisRun {
    folder: TempDir,
    parapet: Parapet,
}

impl SchemathesisRun {
    async fn new() -> Self {
        Self::with_database(None).await
    }

    async fn with_postgres() -> Self {
        let postgres = Postgres::shared().await;
        let (port, name) = (postgres.port(), postgres.create_database().await);
        Self::with_database(Some(format!("postgres://postgres@127.0.0.1:{port}/{name}"))).await
    }

    /// On a PostgreSQL database, or on SQLite.
    async fn with_database(database: Option<String>) -> Self {
        [ADMIN, CLIENT, FRONTEND, PASSWORD].into_iter().for_each(secret_leak_check::register);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("flags.json"), FLAGS).unwrap();
        let setup = Parapet::mode("standalone")
            .flag("--flags", folder.path().join("flags.json"))
            .env("INIT_ADMIN_API_TOKENS", ADMIN)
            .env("INIT_BACKEND_API_TOKENS", CLIENT)
            .env("INIT_FRONTEND_API_TOKENS", FRONTEND)
            .env("UNLEASH_DEFAULT_ADMIN_PASSWORD", PASSWORD)
            // So that requests for a stream end.
            .flag("--stream-max-age-seconds", "0.1");
        let setup = match database {
            Some(url) => setup.env("DATABASE_URL", url),
            None => setup,
        };
        Self { folder, parapet: setup.start().await }
    }

    /// Sends generated requests, `examples` for each operation, and panics with the errors in the
    /// responses. `settings` is the configuration of schemathesis.
    async fn check_conformance(&self, examples: u32, settings: &str) {
        let url = self.parapet.admin_url();
        let general = "[generation]\ndeterministic = true\ndatabase = \"none\"\n";
        let file = self.folder.path().join("schemathesis.toml");
        std::fs::write(file, format!("{settings}\n{general}")).unwrap();
        let mut command = Command::new(tests_dir().join(".venv/bin/schemathesis"));
        command
            .args(["--no-color", "run", &format!("{url}/docs/openapi.json"), "--url", &url])
            .args(["--seed", "1", "--max-examples", &examples.to_string()])
            .args(["--phases", "examples,coverage,fuzzing", "--continue-on-failure"])
            .args(["--checks", CHECKS])
            .env_clear()
            .env("HOME", self.folder.path())
            .current_dir(self.folder.path())
            .kill_on_drop(true);
        let output = tokio::time::timeout(RUN_TIMEOUT, command.output()).await;
        let output = output.expect("it ends in time").expect("schemathesis runs");
        let report = String::from_utf8_lossy(&output.stdout);
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{report}\n{complaint}\n{}", self.parapet.log());
        // All operations but the document itself, which schemathesis has read already.
        let count = self.operations().await.len() - 1;
        assert!(report.contains(&format!("Tested: {count}\n")), "{count} operations:\n{report}");
    }

    /// All operations of the document, as method and path.
    async fn operations(&self) -> BTreeSet<(String, String)> {
        let document = http().get(self.parapet.admin_url() + "/docs/openapi.json");
        let document = document.send().await.unwrap().bytes().await.unwrap();
        let document: Value = serde_json::from_slice(&document).unwrap();
        let paths = document["paths"].as_object().unwrap().iter();
        let operations = paths.flat_map(|(path, item)| {
            let methods = item.as_object().unwrap().keys();
            methods.map(|method| (method.to_uppercase(), path.clone()))
        });
        operations.collect()
    }

    /// The statuses of this operation's responses so far, according to the metrics.
    async fn statuses(&self, method: &str, path: &str) -> BTreeSet<String> {
        let series = format!(
            r#"http_server_requests_total{{http_route="{path}",http_request_method="{method}",http_response_status_code=""#
        );
        let page = http().get(self.parapet.admin_url() + "/metrics").send().await.unwrap();
        let page = page.text().await.unwrap();
        let statuses =
            page.lines().filter_map(|line| line.strip_prefix(&series)?.split('"').next());
        statuses.map(str::to_owned).collect()
    }
}

const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,\
                      response_headers_conformance,response_schema_conformance,ignored_auth";

async fn check_admin_responses(bench: SchemathesisRun) {
    let settings = format!(
        r#"
headers = {{ Authorization = "{ADMIN}" }}
[[operations]]
include-path-regex = "^/api/client/"
headers = {{ Authorization = "{CLIENT}" }}
[[operations]]
include-path-regex = "^/(api/(frontend|proxy)|ofrep)"
headers = {{ Authorization = "{FRONTEND}" }}
"#
    );
    bench.check_conformance(8, &settings).await;

    // The run has reached successful responses, not only errors.
    for (method, path) in bench.operations().await {
        // Needs values that generated requests cannot have: the name of a flag, a password, or a stream
        // token.
        let needs_luck = path.contains("{name}")
            || path.contains("{id}")
            || path.contains("{token}")
            || [
                "/api/admin/explain",
                "/auth/simple/login",
                "/api/admin/user/change-password",
                "/ofrep/v1/events",
            ]
            .contains(&&*path);
        if needs_luck {
            continue;
        }
        let statuses = bench.statuses(&method, &route_template(&path)).await;
        let is_answered = statuses.iter().any(|status| status.starts_with('2'));
        assert!(is_answered, "{method} {path}: {statuses:?}");
    }
}

#[tokio::test]
async fn responses_to_an_admin_conform_to_the_document() {
    check_admin_responses(SchemathesisRun::new().await).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL"]
async fn responses_to_an_admin_conform_to_the_document_on_postgresql() {
    check_admin_responses(SchemathesisRun::with_postgres().await).await;
}

/// The route template under which aliases are counted.
fn route_template(path: &str) -> String {
    let path = path.replace("/api/proxy", "/api/frontend");
    path.replace("/api/frontend/all/client", "/api/frontend/client")
}

#[tokio::test]
async fn denials_to_a_viewer_conform_to_the_document() {
    let bench = SchemathesisRun::new().await;
    let url = bench.parapet.admin_url();
    let post = async |path: &str, body: Value| {
        let request = http().post(format!("{url}{path}")).header("authorization", ADMIN);
        let request = request.header("content-type", "application/json").body(body.to_string());
        request.send().await.unwrap()
    };
    let account = json!({ "username": "vera", "rootRole": 3, "password": PASSWORD });
    assert_eq!(post("/api/admin/user-admin", account).await.status(), StatusCode::CREATED);
    let signed_in =
        post("/auth/simple/login", json!({ "username": "vera", "password": PASSWORD })).await;
    let cookies = signed_in.headers().get_all("set-cookie").iter();
    let mut cookies = cookies.map(|cookie| cookie.to_str().unwrap().split(';').next().unwrap());
    let cookie = cookies.find(|cookie| cookie.starts_with("parapet-session=")).unwrap();
    secret_leak_check::register(cookie.split_once('=').unwrap().1);

    // Signing out would end the run's own session, so that operation gets another one.
    let settings = format!(
        r#"
headers = {{ Cookie = "{cookie}", Origin = "{url}" }}
[[operations]]
include-path-regex = "logout$"
headers = {{ Cookie = "parapet-session=nobody", Origin = "{url}" }}
"#
    );
    bench.check_conformance(2, &settings).await;
    let me = async || {
        let me = http().get(format!("{url}/api/admin/user")).header("cookie", cookie);
        (me.send().await.unwrap().status() == StatusCode::OK).then_some(())
    };
    wait_until("the session is as it was", Duration::from_secs(30), me).await;
    let mut forbidden = vec![];
    for (method, path) in bench.operations().await {
        if bench.statuses(&method, &path).await.contains("403") {
            forbidden.push(path);
        }
    }
    assert!(forbidden.len() > 2, "{forbidden:?}");
}

#[tokio::test]
async fn denials_without_credentials_conform_to_the_document() {
    let bench = SchemathesisRun::new().await;
    bench.check_conformance(2, "").await;
    for (method, path) in bench.operations().await {
        if path.starts_with("/api/admin") {
            let statuses = bench.statuses(&method, &path).await;
            // A cookie without its page's origin is rejected with 403 first.
            let is_refusal = |status: &String| ["401", "403"].contains(&&**status);
            assert!(
                !statuses.is_empty() && statuses.iter().all(is_refusal),
                "{method} {path}: {statuses:?}"
            );
        }
    }
}
