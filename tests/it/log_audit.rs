//! The log of a standalone on PostgreSQL and of an edge in front of it, during many faults. Every line
//! must be expected, must not appear more often than useful, and must show no secret.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::{Map, Value, json};
use sqlx::{Connection as _, Executor as _, PgConnection};

use crate::rig::{
    ChaosProxy, FEATURES, Fault, LogEvent, Parapet, Postgres, PostgresProxy, http, is_within,
    secret_leak_check, wait_until,
};

/// Longer than the retry delays, which grow during an outage.
const TIMEOUT: Duration = Duration::from_mins(1);

/// The number of each kind of request during each fault: one log line for each would be too many.
const REQUESTS_PER_FAULT: usize = 20;

fn flags(enabled: bool) -> String {
    let strategy = json!([{ "name": "default" }]);
    let flag = json!({ "name": "shop", "enabled": enabled, "strategies": strategy });
    json!({ "version": 2, "features": [flag] }).to_string()
}

/// The instances, and the proxies between them.
struct Scenario {
    standalone: Parapet,
    edge: Parapet,
    /// Between the standalone and its database.
    database: PostgresProxy,
    /// The name of the database.
    name: String,
    /// Between the edge and the standalone.
    upstream: ChaosProxy,
    admin: String,
    client: String,
    frontend: String,
    folder: tempfile::TempDir,
}

impl Scenario {
    async fn start() -> Self {
        let postgres = Postgres::shared().await;
        let name = postgres.create_database().await;
        let database = PostgresProxy::start(postgres.port()).await;
        let url =
            format!("postgres://postgres@127.0.0.1:{}/{name}?sslmode=disable", database.port());
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("flags.json"), flags(true)).unwrap();
        let standalone = Parapet::mode("standalone")
            .flag("--flags", folder.path().join("flags.json"))
            .flag("--metrics-interval-seconds", "1")
            .flag("--max-streams", "8")
            .flag("--log-format", "json")
            .env("DATABASE_URL", url)
            .start()
            .await;
        let file = standalone.data_dir().join("first-start.txt");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        let word_after = |name: &str| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(name)).unwrap();
            let word = line.split_whitespace().next().unwrap().to_owned();
            secret_leak_check::register(&word);
            word
        };
        word_after("password ");
        let [admin, client, frontend] = ["admin ", "client ", "frontend "].map(word_after);
        let upstream = ChaosProxy::start(&standalone.admin_url()).await;
        let edge = Parapet::edge(&upstream.url()).admin_token(&admin).with_short_intervals();
        let edge = edge.flag("--log-format", "json").flag("--max-streams", "8").start().await;
        Self { standalone, edge, database, name, upstream, admin, client, frontend, folder }
    }

    fn instances(&self) -> [&Parapet; 2] {
        [&self.standalone, &self.edge]
    }

    /// Ordinary requests of clients, valid and invalid ones.
    async fn send_client_requests(&self) {
        for parapet in self.instances() {
            for _ in 0..REQUESTS_PER_FAULT {
                let made_up = format!("*:development.{:032x}", rand::random::<u128>());
                secret_leak_check::register(&made_up);
                for token in [&*self.client, &made_up, "no token", ""] {
                    parapet.get(FEATURES, token).await;
                    parapet.admin_get_as("/status", token).await;
                }
                parapet.get("/api/frontend?userId=7", &self.frontend).await;
                parapet.get("/nowhere/../%00", &self.client).await;
                self.report(parapet).await;
            }
            let large = "x".repeat(2 << 20);
            let attempt =
                json!({ "username": "admin", "password": "a wrong password" }).to_string();
            let validation = json!({ "tokens": ["*:development.of-nobody"] }).to_string();
            for body in [&*large, "{", "[]", &attempt, &validation] {
                for path in ["/api/client/metrics", "/api/client/register", "/edge/validate"] {
                    self.post(&(parapet.url() + path), body).await;
                }
                for path in ["/auth/simple/login", "/api/admin/api-tokens"] {
                    self.post(&(parapet.admin_url() + path), body).await;
                }
            }
            let streams = (0..REQUESTS_PER_FAULT).map(|_| {
                let open = http().get(parapet.url() + "/api/client/streaming");
                open.header("authorization", &self.client).send()
            });
            let streams = join_all(streams).await;
            drop(streams);
        }
    }

    async fn report(&self, parapet: &Parapet) {
        let now = jiff::Timestamp::now().to_string();
        let toggles = json!({ "shop": { "yes": 1, "no": 0 }, "unknown": { "yes": 1, "no": 0 } });
        let bucket = json!({ "start": now, "stop": now, "toggles": toggles });
        let report = json!({ "appName": "till", "instanceId": "i", "bucket": bucket }).to_string();
        self.post(&(parapet.url() + "/api/client/metrics"), &report).await;
    }

    /// The status, if there is a response: the server may not read a body that is too long to its end.
    async fn post(&self, url: &str, body: &str) -> Option<StatusCode> {
        let post = http().post(url).header("authorization", &self.client);
        let post = post.header("content-type", "application/json").body(body.to_owned());
        post.send().await.ok().map(|response| response.status())
    }

    /// Tries to create a token at the standalone.
    async fn create_token(&self) -> StatusCode {
        let token = json!({ "tokenName": "it", "type": "client", "environment": "development" });
        let path = "/api/admin/api-tokens";
        let (status, made) =
            self.standalone.admin_request(Method::POST, path, &self.admin, &token).await;
        if status == StatusCode::CREATED {
            secret_leak_check::register(made["secret"].as_str().unwrap());
        }
        status
    }

    /// Many concurrent attempts to create tokens.
    async fn send_operator_requests(&self) {
        join_all((0..REQUESTS_PER_FAULT).map(|_| self.create_token())).await;
    }

    async fn wait_until_token_created(&self) {
        wait_until("a token is made", TIMEOUT, async || {
            (self.create_token().await == StatusCode::CREATED).then_some(())
        })
        .await;
    }

    async fn wait_until_storing(&self, is_storing: bool) {
        let expected = if is_storing { 1.0 } else { 0.0 };
        wait_until("usage is stored, or is not", TIMEOUT, async || {
            self.report(&self.standalone).await;
            let storing = self.standalone.metric("parapet_usage_storing").await?;
            (storing.total_cmp(&expected).is_eq()).then_some(())
        })
        .await;
    }

    async fn fail_upstream(&self, fault: Fault) {
        let is_seen = fault != Fault::Disconnect;
        self.upstream.set_fault(fault).await;
        self.send_client_requests().await;
        self.edge.wait_until_upstream_fails().await;
        self.send_client_requests().await;
        if is_seen {
            // Some operations retry for longer than a failure takes to be noticed.
            let before = self.upstream.request_count("/");
            wait_until("it was tried again", TIMEOUT, async || {
                (self.upstream.request_count("/") >= before + 5).then_some(())
            })
            .await;
        }
        self.upstream.restore().await;
        self.edge.wait_until_upstream_recovers(1).await;
    }

    async fn fail_database(&self) {
        let postgres = Postgres::shared().await;
        let set_read_only = async |is_read_only: bool| {
            let sql = format!(
                "ALTER DATABASE {name} SET default_transaction_read_only = {is_read_only}; \
                 SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
                name = self.name,
            );
            postgres.execute("postgres", &sql).await;
        };
        set_read_only(true).await;
        self.send_operator_requests().await;
        self.wait_until_storing(false).await;
        self.send_operator_requests().await;
        set_read_only(false).await;
        self.wait_until_storing(true).await;
        self.wait_until_token_created().await;

        let url = format!("postgres://postgres@127.0.0.1:{}/{}", postgres.port(), self.name);
        let mut holder = PgConnection::connect(&url).await.unwrap();
        holder.execute("BEGIN; LOCK TABLE tokens, events").await.unwrap();
        self.send_operator_requests().await;
        self.send_client_requests().await;
        holder.execute("ROLLBACK").await.unwrap();
        self.wait_until_token_created().await;

        self.database.refuse().await;
        self.send_operator_requests().await;
        self.send_client_requests().await;
        self.wait_until_storing(false).await;
        self.database.restore().await;
        self.wait_until_token_created().await;
        self.wait_until_storing(true).await;

        self.database.silence_connections("");
        self.send_operator_requests().await;
        self.send_client_requests().await;
        self.wait_until_token_created().await;
        self.wait_until_storing(true).await;
    }

    /// Replaces the data directory by a file for a while, as if a volume were full or missing.
    async fn fail_disk(&self) {
        let folders = self.instances().map(|parapet| {
            let there = parapet.data_dir();
            let away = there.with_file_name("away");
            std::fs::rename(&there, &away).unwrap();
            std::fs::write(&there, "It is no folder.").unwrap();
            (there, away)
        });
        // Usage waits for upstream, and would be stored.
        self.upstream.disconnect().await;
        for parapet in self.instances() {
            let before = save_failures(parapet).await;
            wait_until("several saves have failed", TIMEOUT, async || {
                self.wait_until_token_created().await;
                self.report(parapet).await;
                let failures = save_failures(parapet).await - before;
                (failures >= 3 && says_that_saves_fail(parapet)).then_some(())
            })
            .await;
        }
        for (there, away) in folders {
            std::fs::remove_file(&there).unwrap();
            std::fs::rename(away, there).unwrap();
        }
        for parapet in self.instances() {
            wait_until("the log reports that saves succeed again", TIMEOUT, async || {
                self.report(parapet).await;
                (!says_that_saves_fail(parapet)).then_some(())
            })
            .await;
        }
        self.upstream.restore().await;
        self.edge.wait_until_upstream_recovers(1).await;
    }

    async fn fail_flag_file(&self) {
        let path = self.folder.path().join("flags.json");
        let change = |text: &str| std::fs::write(&path, text).unwrap();
        change("{");
        self.standalone.wait_until_logged(LogEvent::FLAG_FILE_FAILED).await;
        for _ in 0..3 {
            self.standalone.send_sighup();
            self.send_client_requests().await;
        }
        change(&flags(false));
        let is_readable = LogEvent::info("sync::").without("environment");
        self.standalone.wait_until_logged(is_readable).await;
        wait_until("the change has arrived", TIMEOUT, async || {
            let (_, body) = self.edge.get(FEATURES, &self.client).await;
            (body["features"][0]["enabled"] == false).then_some(())
        })
        .await;
    }
}

/// The number of saves that have failed since the start.
async fn save_failures(parapet: &Parapet) -> u64 {
    let page = parapet.metrics().await;
    let samples = page.lines().filter(|it| it.starts_with("parapet_store_save_failures_total{"));
    let values = samples.map(|it| it.rsplit(' ').next().unwrap());
    values.map(|it| it.parse::<u64>().unwrap()).sum()
}

/// Whether the log has reported a failure to save tokens or usage that has not ended.
fn says_that_saves_fail(parapet: &Parapet) -> bool {
    let failures = parapet.logged(LogEvent::warn("app::persistence").with("error"));
    let ends = parapet.logged(LogEvent::info("app::persistence").without("count"));
    failures.len() > ends.len()
}

/// A kind of log line. Those of one module that have the same level and fields count together.
struct ExpectedLine {
    level: &'static str,
    /// The module below `parapet`; with `::` at the end, and every module below it.
    module: &'static str,
    /// The names of the fields, besides the message. Those with a question mark are optional.
    fields: &'static [&'static str],
    /// The limit for the whole test.
    at_most: usize,
}

const fn expected_line(
    level: &'static str,
    module: &'static str,
    fields: &'static [&'static str],
    at_most: usize,
) -> ExpectedLine {
    ExpectedLine { level, module, fields, at_most }
}

/// Lines of both.
const COMMON: &[ExpectedLine] = &[
    // The start, the begin of a shutdown and its end.
    expected_line("INFO", "app", &["mode", "data", "admin", "upstream?", "version"], 2),
    expected_line("INFO", "app", &["drain_delay"], 2),
    expected_line("INFO", "app", &[], 2),
    expected_line("WARN", "server", &["grace"], 2),
    // Flags are published.
    expected_line("INFO", "sync::", &["environment", "flags", "revision?", "problems"], 4),
    // The disk fails, and works again.
    expected_line("WARN", "app::persistence", &["error"], 3),
    expected_line("INFO", "app::persistence", &[], 3),
    expected_line("WARN", "background_writer", &["error"], 1),
    expected_line("INFO", "background_writer", &[], 1),
    expected_line("WARN", "app::usage_files", &["error"], 2),
];

/// Lines of a standalone.
const STANDALONE: &[ExpectedLine] = &[
    // The first start creates an account, and a file with secrets.
    expected_line("INFO", "app::first_start_announcement", &["username", "console"], 1),
    expected_line("WARN", "app::first_start_announcement", &["file"], 1),
    // The database: one fault has several effects, each with a line.
    expected_line("WARN", "control_plane::maintenance", &["error"], DATABASE_FAULTS * 2),
    expected_line("INFO", "control_plane::maintenance", &["away_for"], DATABASE_FAULTS),
    expected_line("INFO", "control_plane::maintenance", &["error"], DATABASE_FAULTS),
    // Usage cannot be stored, and is stored again.
    expected_line("WARN", "control_plane::usage_store", &["error"], DATABASE_FAULTS),
    expected_line("INFO", "control_plane::usage_store", &[], DATABASE_FAULTS),
    // Requests of operators fail, and denials are not written to the audit log.
    expected_line("ERROR", "http::admin::", &["error", "more_since_last_line?"], DATABASE_FAULTS),
    expected_line("WARN", "control_plane::denial_log", &["error"], DATABASE_FAULTS),
    // The flag file, once and with each SIGHUP.
    expected_line("WARN", "sync::", &["error"], 4),
    expected_line("INFO", "sync::", &[], 1),
    expected_line("INFO", "app::reload", &[], 3),
];

/// Lines of an edge. Each fault of upstream has one line for each operation, with its end.
const EDGE: &[ExpectedLine] = &[
    // The admin token is exchanged for tokens of environments.
    expected_line("INFO", "app::edge", &["fleet", "list_interval"], 2),
    expected_line("INFO", "upstream::token_provisioning", &[], 3),
    // State of an earlier run is restored.
    expected_line("INFO", "app::persistence", &["count"], 1),
    expected_line("INFO", "app::usage_files", &[], 1),
    // Fetching flags fails, and works again.
    expected_line("WARN", "sync::", &["environment", "error"], ALL_FAULTS),
    expected_line("INFO", "sync::", &["environment"], ALL_FAULTS),
    // The stream opens, and ends. It may be opened again while upstream still fails.
    expected_line("INFO", "sync::", &["environment", "transport", "error?"], ALL_FAULTS * 3),
    // The event log is followed, missing or failing.
    expected_line("INFO", "event_log", &["interval?", "error?"], ALL_FAULTS * 2),
    // Listing the environments fails.
    expected_line("WARN", "sync::", &["error"], ALL_FAULTS),
    // The token list and the validation of tokens fail, and work again.
    expected_line("WARN", "auth::", &["error"], ALL_FAULTS * 2),
    expected_line("INFO", "auth::", &[], ALL_FAULTS * 2),
    // Tokens were created or deleted at upstream.
    expected_line("INFO", "auth::", &["changes.learned", "changes.revoked"], ALL_FAULTS),
    expected_line("WARN", "upstream::health", &["error"], ALL_FAULTS),
    // Sending usage fails, and works again.
    expected_line("WARN", "upstream::usage_sink", &["environment", "error"], ALL_FAULTS * 2),
    expected_line("INFO", "upstream::usage_sink", &["environment"], ALL_FAULTS),
    expected_line("WARN", "usage::", &["grace"], 1),
    // Upstream rejects every token, including the admin token, and accepts that again.
    expected_line("WARN", "upstream::environment_tokens", &[], 8),
    expected_line("WARN", "upstream::admin_token", &["token"], 2),
    expected_line("INFO", "upstream::admin_token", &["token"], 4),
];

/// The number of faults of the database.
const DATABASE_FAULTS: usize = 4;
/// The number of faults of upstream: its own, those of its database, and restarts.
const ALL_FAULTS: usize = 16;

/// A report of every unexpected line.
fn check_log(name: &str, log: &str, expected: &[&ExpectedLine]) -> String {
    let (mut complaints, mut counts) = (String::new(), BTreeMap::<usize, Vec<&str>>::new());
    for line in log.lines() {
        let wrong = match parse_log_line(line) {
            Err(wrong) => wrong,
            Ok((level, target, fields)) => {
                let fits = |it: &&ExpectedLine| {
                    it.level == level
                        && is_within(&target, it.module)
                        && has_fields(it.fields, &fields)
                };
                match expected.iter().position(fits) {
                    Some(at) => {
                        counts.entry(at).or_default().push(line);
                        continue;
                    }
                    None => "it is unexpected".to_owned(),
                }
            }
        };
        writeln!(complaints, "{name}: {wrong}: {line}").unwrap();
    }
    for (at, lines) in counts {
        let ExpectedLine { level, module, at_most, .. } = expected[at];
        if lines.len() > *at_most {
            let lines = lines.join("\n  ");
            writeln!(complaints, "{name}: more than {at_most} of {level} in {module}:\n  {lines}")
                .unwrap();
        }
    }
    complaints
}

/// Whether a line has exactly these fields. A field with a question mark is optional.
fn has_fields(names: &[&str], fields: &Map<String, Value>) -> bool {
    let is_there = |name: &&str| name.ends_with('?') || fields.contains_key(*name);
    let is_known = |field: &String| names.iter().any(|name| name.trim_end_matches('?') == field);
    names.iter().all(is_there) && fields.keys().all(is_known)
}

/// The level, the target and the fields of a line, besides its message.
fn parse_log_line(line: &str) -> Result<(String, String, Map<String, Value>), String> {
    if line.len() > 4096 {
        return Err(format!("it is {} bytes long", line.len()));
    }
    let mut fields: Map<String, Value> =
        serde_json::from_str(line).map_err(|error| format!("it is no JSON: {error}"))?;
    let mut text = |name: &str| match fields.remove(name) {
        Some(Value::String(text)) if !text.is_empty() => Ok(text),
        other => Err(format!("its {name} is {other:?}")),
    };
    let (time, level, target) = (text("timestamp")?, text("level")?, text("target")?);
    text("message")?;
    time.parse::<jiff::Timestamp>().map_err(|error| format!("its time cannot be read: {error}"))?;
    if !target.starts_with("parapet") {
        return Err("it is of another's making".to_owned());
    }
    Ok((level, target, fields))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn every_log_line_during_faults_is_expected_and_limited() {
    let day = Scenario::start().await;
    day.send_client_requests().await;
    let response = |status, headers: &[(&'static str, &'static str)], body| Fault::Respond {
        status,
        headers: headers.to_vec(),
        body,
    };
    for fault in [
        Fault::Disconnect,
        Fault::Stall,
        Fault::DropResponses,
        response(StatusCode::INTERNAL_SERVER_ERROR, &[], "it failed"),
        response(
            StatusCode::OK,
            &[("content-type", "text/html")],
            "<html>Log in to this network</html>",
        ),
        response(StatusCode::FOUND, &[("location", "http://portal.example/sign-in")], ""),
        response(StatusCode::TOO_MANY_REQUESTS, &[("retry-after", "1")], ""),
        response(StatusCode::UNAUTHORIZED, &[], ""),
    ] {
        println!("{fault:?}");
        day.fail_upstream(fault).await;
    }
    println!("database");
    day.fail_database().await;
    println!("files");
    day.fail_flag_file().await;
    println!("disk");
    day.fail_disk().await;

    // A crash and a start while upstream is unavailable, and an orderly end of both.
    day.upstream.disconnect().await;
    day.edge.kill();
    day.edge.restart();
    day.edge.wait_until_ready().await;
    day.send_client_requests().await;
    day.upstream.restore().await;
    day.edge.wait_until_upstream_recovers(1).await;
    assert!(day.standalone.terminate().await.success());
    day.standalone.restart();
    day.standalone.wait_until_ready().await;
    day.edge.wait_until_upstream_recovers(1).await;
    day.send_client_requests().await;
    assert!(day.edge.terminate().await.success());
    assert!(day.standalone.terminate().await.success());

    let logs = [("standalone", day.standalone.log(), STANDALONE), ("edge", day.edge.log(), EDGE)];
    let mut complaints = String::new();
    for (name, log, own) in &logs {
        let shown = [("its log".to_owned(), log.clone().into_bytes())];
        secret_leak_check::assert_none_in(name, &shown);
        let expected: Vec<_> = COMMON.iter().chain(*own).collect();
        complaints += &check_log(name, log, &expected);
    }
    assert!(complaints.is_empty(), "{complaints}");
}
