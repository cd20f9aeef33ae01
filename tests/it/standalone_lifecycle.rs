//! `parapet standalone` as its owner experiences it: the first start, later starts, and errors.

use std::process::Command;
use std::time::Duration;

use reqwest::StatusCode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::rig::{LogEvent, Parapet, free_port, http, parapet_command, send_json, wait_until};

/// An initial setting that has changed since the first start.
const IGNORED_SETTING: LogEvent = LogEvent::warn("app::standalone").without("environment");

const FLAGS: &str =
    r#"{"features":[{"name":"first","enabled":true,"strategies":[{"name":"default"}]}]}"#;

/// A directory with a flag file that the test can edit.
struct FlagsDirectory {
    folder: tempfile::TempDir,
}

impl FlagsDirectory {
    fn new() -> Self {
        let home = Self { folder: tempfile::tempdir().unwrap() };
        home.write_flags(FLAGS);
        home
    }

    fn flags(&self) -> std::path::PathBuf {
        self.folder.path().join("flags.json")
    }

    fn write_flags(&self, flags: &str) {
        std::fs::write(self.flags(), flags).unwrap();
    }

    async fn start(&self, variables: &[(&str, &str)]) -> Parapet {
        let setup = Parapet::mode("standalone").flag("--flags", self.flags());
        variables.iter().fold(setup, |setup, (name, value)| setup.env(*name, *value)).start().await
    }
}

/// The file that the first start wrote for its owner.
fn first_start_file(parapet: &Parapet) -> std::path::PathBuf {
    parapet.data_dir().join("first-start.txt")
}

/// The log once it contains `starts` starts; output from before an instance is ready may be read later.
async fn log_after_starts(parapet: &Parapet, starts: usize) -> String {
    let lines = parapet.wait_until_logged_times(LogEvent::LISTENING, starts).await;
    assert_eq!(lines.len(), starts);
    parapet.log()
}

/// The `curl` commands of the first start.
fn curl_lines(log: &str) -> Vec<String> {
    let lines = log.lines().map(str::trim).filter(|line| line.starts_with("curl "));
    lines.map(str::to_owned).collect()
}

/// The tokens of the first start: client, frontend, admin.
fn first_tokens(log: &str) -> [String; 3] {
    ["client", "frontend", "admin"].map(|kind| {
        let line = log.lines().find(|line| line.trim_start().starts_with(kind));
        line.expect("each kind is printed").split_whitespace().nth(1).unwrap().to_owned()
    })
}

#[tokio::test]
async fn first_start_writes_secrets_and_working_commands_to_a_file_and_logs_its_path() {
    let home = FlagsDirectory::new();
    let parapet = home.start(&[("LOG_FORMAT", "json")]).await;
    let file = first_start_file(&parapet);
    let text = std::fs::read_to_string(&file).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&file.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let commands = curl_lines(&text);
    assert_eq!(commands.len(), 3, "{text}");
    if Command::new("curl").arg("--version").output().is_ok() {
        for (command, expect) in
            commands.iter().zip(["\"features\"", "\"toggles\"", "\"standalone\""])
        {
            let line = format!("{command} --silent --fail");
            let output = Command::new("sh").args(["-c", &line]).output().unwrap();
            let response = String::from_utf8(output.stdout).unwrap();
            assert!(output.status.success() && response.contains(expect), "{command}: {response}");
        }
    }
    let [client, frontend, admin] = first_tokens(&text);
    let works = async || {
        assert_eq!(parapet.features_status(&client).await, StatusCode::OK);
        assert_eq!(parapet.get("/api/frontend", &frontend).await.0, StatusCode::OK);
        let status = http().get(parapet.admin_url() + "/status").header("authorization", &admin);
        assert_eq!(status.send().await.unwrap().status(), StatusCode::OK);
    };
    works().await;
    let password = text.lines().find_map(|line| line.trim().strip_prefix("password  ")).unwrap();
    let password = password.split_whitespace().next().unwrap();
    let body = serde_json::json!({ "username": "admin", "password": password });
    let sign_in = http().post(parapet.admin_url() + "/auth/simple/login");
    assert_eq!(send_json(sign_in, &body).await.0, StatusCode::OK);

    let log = log_after_starts(&parapet, 1).await;
    let lines: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let naming = lines.iter().filter(|line| line["file"] == file.to_str().unwrap());
    assert_eq!(naming.count(), 1, "{log}");
    assert!(!log.contains(password), "{log}");
    std::fs::remove_file(&file).unwrap();
    for token in [&client, &frontend, &admin] {
        let secret = token.split_once('.').unwrap().1;
        assert_eq!(text.matches(secret).count(), 2, "once, and once in its command");
        assert!(!log.contains(secret), "{log}");
        assert!(stored_bytes(&parapet).iter().all(|bytes| !contains(bytes, secret)));
    }
    assert!(parapet.terminate().await.success());
    parapet.restart();
    parapet.wait_until_ready().await;
    works().await;
    assert!(!file.exists() && !parapet.log().contains(client.split_once('.').unwrap().1));
}

#[tokio::test]
async fn password_set_after_the_first_start_is_reported_as_ignored() {
    let home = FlagsDirectory::new();
    let mut parapet = home.start(&[]).await;
    assert!(parapet.terminate().await.success());
    parapet.restart_with_env("UNLEASH_DEFAULT_ADMIN_PASSWORD", "a later password");
    parapet.wait_until_ready().await;
    let line = parapet.wait_until_logged(IGNORED_SETTING).await;
    assert!(line.contains("UNLEASH_DEFAULT_ADMIN_PASSWORD"), "{line}");
}

/// Killed when dropped.
struct ChildProcess(std::process::Child);

impl Drop for ChildProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn first_start_shows_secrets_on_a_terminal() {
    use std::io::Read as _;
    let terminal = rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR).unwrap();
    rustix::pty::grantpt(&terminal).unwrap();
    rustix::pty::unlockpt(&terminal).unwrap();
    let name = rustix::pty::ptsname(&terminal, Vec::new()).unwrap();
    let screen = std::fs::OpenOptions::new().write(true).open(name.to_str().unwrap()).unwrap();
    let home = FlagsDirectory::new();
    let mut command = parapet_command(&home.folder);
    command.args(["--flags=flags.json", "--port=0", "--admin-port=0", "--interface=127.0.0.1"]);
    command.stdout(screen);
    let parapet = ChildProcess(command.spawn().unwrap());
    drop(command);
    let (mut terminal, mut shown) = (std::fs::File::from(terminal), Vec::new());
    let mut chunk = [0; 4096];
    while curl_lines(&String::from_utf8_lossy(&shown)).len() < 3 {
        let read = terminal.read(&mut chunk).expect("it runs until its tokens are shown");
        shown.extend_from_slice(&chunk[..read]);
    }
    drop(parapet);
    assert!(String::from_utf8_lossy(&shown).contains("(shown only now)"));
    assert!(!home.folder.path().join("data/first-start.txt").exists());
}

#[tokio::test]
async fn first_start_without_flags_writes_an_example_and_later_starts_require_flags() {
    let token = "*:development.reader-of-the-example-0123456789";
    let parapet = Parapet::mode("standalone").env("INIT_BACKEND_API_TOKENS", token).start().await;
    let file = parapet.data_dir().parent().unwrap().join("config/flags.json");
    assert_eq!(std::fs::read("config/flags.json").unwrap(), std::fs::read(&file).unwrap());
    let line = parapet.wait_until_logged(LogEvent::info("app::standalone").with("file")).await;
    assert!(line.contains("config/flags.json"), "{line}");
    let (_, flags) = parapet.get("/api/client/features", token).await;
    assert!(flags.to_string().contains("demo.on-for-all"), "{flags}");

    assert!(parapet.terminate().await.success());
    std::fs::remove_file(&file).unwrap();
    parapet.restart();
    let ended =
        wait_until("it ends", Duration::from_secs(30), async || parapet.exit_status()).await;
    assert_eq!(ended.code(), Some(64), "{}", parapet.log());
    parapet.wait_until_printed("config/flags.json does not exist").await;
    assert!(!file.exists());
}

#[tokio::test]
async fn changed_first_start_settings_are_reported_as_ignored() {
    const ADMIN: &str = "*:*.the-first-admin-0123456789abcdef";
    const FIRST: &str = "*:development.the-first-reader-0123456789abcdef";
    const SECOND: &str = "*:development.the-second-reader-0123456789abcdef";
    let home = FlagsDirectory::new();
    let variables = [
        ("INIT_ADMIN_API_TOKENS", ADMIN),
        ("INIT_BACKEND_API_TOKENS", FIRST),
        ("UNLEASH_DEFAULT_ADMIN_PASSWORD", "the first password"),
    ];
    let mut parapet = home.start(&variables).await;
    // Their results may be changed without that report: the settings are the same.
    let url = format!("{}/api/admin/api-tokens/{FIRST}", parapet.admin_url());
    let deleted = http().delete(url).header("authorization", ADMIN).send().await.unwrap();
    assert_eq!(deleted.status(), StatusCode::OK);
    assert!(parapet.terminate().await.success());
    parapet.restart();
    parapet.wait_until_ready().await;
    log_after_starts(&parapet, 2).await;
    assert!(parapet.logged(IGNORED_SETTING).is_empty(), "{}", parapet.log());
    assert_eq!(parapet.features_status(FIRST).await, StatusCode::UNAUTHORIZED);

    assert!(parapet.terminate().await.success());
    parapet.restart_with_env("INIT_BACKEND_API_TOKENS", format!("{FIRST},{SECOND}"));
    parapet.wait_until_ready().await;
    log_after_starts(&parapet, 3).await;
    let lines = parapet.logged(IGNORED_SETTING);
    assert!(lines.len() == 1 && lines[0].contains("INIT_*_API_TOKENS"), "{lines:?}");
    assert_eq!(parapet.features_status(SECOND).await, StatusCode::UNAUTHORIZED);

    assert!(parapet.terminate().await.success());
    parapet.restart_with_env("INIT_BACKEND_API_TOKENS", FIRST);
    parapet.wait_until_ready().await;
    assert!(parapet.terminate().await.success());
    parapet.restart_with_env("UNLEASH_DEFAULT_ADMIN_PASSWORD", "another password");
    parapet.wait_until_ready().await;
    let log = log_after_starts(&parapet, 5).await;
    let lines = parapet.logged(IGNORED_SETTING);
    assert!(lines.len() == 2 && lines[1].contains("UNLEASH_DEFAULT_ADMIN_PASSWORD"), "{lines:?}");
    assert!(!log.contains("another password") && !log.contains("first password"), "{log}");
}

#[tokio::test]
async fn token_of_environment_without_flags_is_reported() {
    let home = FlagsDirectory::new();
    let folder = home.folder.path().join("flags");
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy(home.flags(), folder.join("production.json")).unwrap();
    let parapet = Parapet::mode("standalone").flag("--flags", &folder).start().await;
    let event = LogEvent::warn("app::standalone").with("environment");
    parapet.wait_until_logged(event).await;
    let [client, frontend, _] =
        first_tokens(&std::fs::read_to_string(first_start_file(&parapet)).unwrap());
    for (path, token) in [("/api/client/features", &client), ("/api/frontend", &frontend)] {
        let (status, response) = parapet.get(path, token).await;
        assert_eq!(status, StatusCode::FORBIDDEN);
        assert!(response["message"].as_str().unwrap().contains("does not serve the environment"));
    }
    std::fs::copy(home.flags(), folder.join("development.json")).unwrap();
    wait_until("the new file is served", Duration::from_secs(10), async || {
        let (status, _) = parapet.get("/api/client/features", &client).await;
        (status == StatusCode::OK).then_some(())
    })
    .await;
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// The contents of all files in the data directory.
fn stored_bytes(parapet: &Parapet) -> Vec<Vec<u8>> {
    let mut files = Vec::new();
    let mut folders = vec![parapet.data_dir()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(std::fs::read(path).unwrap());
            }
        }
    }
    assert!(!files.is_empty(), "nothing is stored");
    files
}

#[tokio::test]
async fn configured_initial_tokens_are_created_and_never_printed() {
    const ADMIN: &str = "*:*.seeded-admin-0123456789abcdef";
    const BACKEND: &str = "*:production.seeded-backend-0123456789abcdef";
    const OLD_NAME: &str = "*:development.seeded-client-0123456789abcdef";
    const FRONTEND: &str = "*:production.seeded-frontend-0123456789abcdef";
    let home = FlagsDirectory::new();
    let parapet = home
        .start(&[
            ("INIT_ADMIN_API_TOKENS", ADMIN),
            ("INIT_BACKEND_API_TOKENS", BACKEND),
            ("INIT_CLIENT_API_TOKENS", OLD_NAME),
            ("INIT_FRONTEND_API_TOKENS", FRONTEND),
        ])
        .await;
    for token in [BACKEND, OLD_NAME] {
        let (status, flags) = parapet.get("/api/client/features", token).await;
        assert_eq!((status, &flags["features"][0]["name"]), (StatusCode::OK, &"first".into()));
    }
    assert_eq!(parapet.get("/api/frontend", FRONTEND).await.0, StatusCode::OK);
    let status = http().get(parapet.admin_url() + "/status").header("authorization", ADMIN);
    assert_eq!(status.send().await.unwrap().status(), StatusCode::OK);
    let log = parapet.log();
    assert!(!log.contains("seeded") && curl_lines(&log).is_empty(), "{log}");
    assert!(stored_bytes(&parapet).iter().all(|bytes| !contains(bytes, "seeded-")));
}

#[tokio::test]
async fn edited_flag_file_is_served_and_invalid_edit_is_ignored() {
    let token = "*:development.reader-of-an-edited-file-0123456789";
    let home = FlagsDirectory::new();
    let parapet = home.start(&[("INIT_BACKEND_API_TOKENS", token)]).await;
    let served = async || parapet.get("/api/client/features", token).await.1.to_string();
    let limit = Duration::from_secs(20);
    home.write_flags(&FLAGS.replace("first", "second"));
    let shows = async |name: &'static str| {
        wait_until("the edit is served", limit, async || {
            served().await.contains(name).then_some(())
        })
        .await;
    };
    shows("second").await;
    home.write_flags("{ this is no flag file");
    parapet.wait_until_logged(LogEvent::FLAG_FILE_FAILED).await;
    assert!(served().await.contains("second"));
    std::fs::remove_file(home.flags()).unwrap();
    parapet.wait_until_logged_times(LogEvent::FLAG_FILE_FAILED, 2).await;
    assert!(served().await.contains("second"));
    home.write_flags(&FLAGS.replace("first", "third"));
    shows("third").await;
}

#[tokio::test]
async fn probe_commands_query_a_running_instance() {
    let home = FlagsDirectory::new();
    let parapet = home.start(&[]).await;
    for probe in ["health", "ready"] {
        for place in [["--edge-url".to_owned(), parapet.url()], port_args(&parapet)] {
            let output = run_with_flags(
                &[&[probe], &place.each_ref().map(String::as_str)[..]].concat(),
                &[],
            );
            assert_eq!(output.status.code(), Some(0), "{probe} {place:?}: {output:?}");
        }
    }
    let url = parapet.url();
    parapet.kill();
    assert_eq!(run_with_flags(&["health", "--edge-url", &url], &[]).status.code(), Some(1));
}

fn port_args(parapet: &Parapet) -> [String; 2] {
    let url = parapet.url();
    ["--port".to_owned(), url.rsplit_once(':').unwrap().1.to_owned()]
}

#[tokio::test]
async fn terminated_instance_is_not_ready_first_and_serves_until_it_ends() {
    let token = "*:development.reader-of-an-ending-one-0123456789";
    let home = FlagsDirectory::new();
    let setup = Parapet::mode("standalone").flag("--flags", home.flags());
    let setup = setup.flag("--drain-delay-seconds", "3").env("INIT_BACKEND_API_TOKENS", token);
    let parapet = setup.start().await;
    let while_draining = async {
        wait_until("it is not ready", Duration::from_secs(20), async || {
            let (status, printed) = parapet.get("/internal-backstage/ready", "").await;
            assert!(printed["status"] == "READY" || status == StatusCode::SERVICE_UNAVAILABLE);
            (printed["status"] == "DRAINING").then_some(())
        })
        .await;
        assert_eq!(parapet.features_status(token).await, StatusCode::OK);
        assert_eq!(parapet.get("/internal-backstage/health", "").await.0, StatusCode::OK);
    };
    let (status, ()) = tokio::join!(parapet.terminate(), while_draining);
    assert_eq!(status.code(), Some(0));
}

#[test]
fn unusable_data_directory_exits_1() {
    let output = run_with_flags(
        &["--flags=flags.json", "--port=0", "--admin-port=0", "--data-dir=flags.json"],
        &[],
    );
    let printed = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), printed.lines().count()), (Some(1), 1), "{printed}");
    assert!(printed.contains("flags.json"), "{printed}");
}

#[test]
fn unreachable_database_is_reported_with_the_reason() {
    let url = format!("postgres://u:a-password@127.0.0.1:{}/db", free_port());
    let output = run_with_flags(&["--flags=flags.json", "--database-url", &url], &[]);
    let printed = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert!(printed.contains("cannot be reached") && printed.contains("refused"), "{printed}");
    assert!(!printed.contains("a-password"), "{printed}");
}

/// The result of `parapet` in a directory with a flag file.
fn run_with_flags(args: &[&str], variables: &[(&str, &str)]) -> std::process::Output {
    let home = FlagsDirectory::new();
    let mut command = parapet_command(&home.folder);
    command.args(args).envs(variables.iter().copied()).output().unwrap()
}

#[test]
fn port_in_use_is_reported_and_exits_64() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (ours, other) in [("--port", "--admin-port"), ("--admin-port", "--port")] {
        let args = ["--flags=flags.json", "--interface=127.0.0.1", other, "0", ours, &port];
        let output = run_with_flags(&args, &[]);
        let printed = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{printed}");
        assert_eq!(printed.lines().count(), 1, "{printed}");
        assert!(
            printed.contains(&format!("127.0.0.1:{port}")) && printed.contains("in use"),
            "{printed}"
        );
        assert!(printed.contains(&format!(" {ours}: ")), "{printed}");
        assert!(curl_lines(&String::from_utf8(output.stdout).unwrap()).is_empty());
    }
}

#[test]
fn unreadable_flags_exit_1() {
    let home = FlagsDirectory::new();
    home.write_flags("{ this is no flag file");
    let mut command = parapet_command(&home.folder);
    command.arg("--flags").arg(home.flags()).args(["--port=0", "--admin-port=0"]);
    let output = command.output().unwrap();
    let printed = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert!(printed.contains("flags.json holds no flags that can be read"), "{printed}");
}

#[test]
fn all_configuration_errors_are_reported_at_once_without_secrets_and_exit_64() {
    let check = |args: &[&str], variables: &[(&str, &str)], mistakes: &[&str]| {
        let output = run_with_flags(args, variables);
        let printed = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{args:?}: {printed}");
        assert!(!printed.contains("s3cret"), "{printed}");
        for mistake in mistakes {
            assert!(printed.contains(mistake), "{args:?}: {mistake} is missing in: {printed}");
        }
    };
    check(&["edge"], &[], &["upstream-url"]);
    check(
        &["edge", "-u", "nonsense", "--port", "70000", "--tokens", "s3cret"],
        &[("METRICS_INTERVAL_SECONDS", "often")],
        &["upstream-url", "port", "METRICS_INTERVAL_SECONDS", "tokens"],
    );
    check(&["offline"], &[("FRONTEND_TOKENS", "s3cret")], &["bootstrap-file", "FRONTEND_TOKENS"]);
    check(&["offline", "-b", "nowhere.json"], &[], &["bootstrap-file"]);
    check(&["--flags=nowhere.json", "--log-format=xml"], &[], &["flags", "log-format"]);
    check(&["--flags=flags.json", "--port=3063", "--admin-port=3063"], &[], &["admin-port"]);
    check(&["--flags=flags.json"], &[("INIT_ADMIN_API_TOKENS", "s3cret")], &["INIT_ADMIN"]);
    check(&["--flags=flags.json", "--allow-list=here"], &[], &["allow-list"]);
    check(&["--flags=flags.json", "--config=nowhere.toml"], &[], &["nowhere.toml"]);
}

/// A connection that sends identical bytes each time.
struct RepeatedRequest {
    stream: TcpStream,
    request: String,
}

impl RepeatedRequest {
    async fn connect(parapet: &Parapet, path: &str, token: &str, more: &str) -> Self {
        let address = parapet.url().replace("http://", "");
        let stream = TcpStream::connect(&address).await.unwrap();
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: {address}\r\nauthorization: {token}\r\n{more}\r\n"
        );
        Self { stream, request }
    }

    /// Sends the request and returns the response as received.
    async fn send(&mut self) -> String {
        self.stream.write_all(self.request.as_bytes()).await.unwrap();
        let mut response = Vec::new();
        loop {
            assert_ne!(self.stream.read_buf(&mut response).await.unwrap(), 0, "{response:?}");
            let text = String::from_utf8_lossy(&response);
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if body.len() >= length.map_or(0, |length| length.parse().unwrap()) {
                return text.into_owned();
            }
        }
    }
}

/// The response without its date header, which must exist.
fn without_date(response: &str) -> String {
    let (before, rest) = response.split_once("\r\ndate: ").unwrap_or_else(|| panic!("{response}"));
    let (date, after) = rest.split_once("\r\n").unwrap();
    assert!(date.len() == 29 && date.ends_with(" GMT"), "{response}");
    format!("{before}\r\n{after}")
}

fn etag(response: &str) -> &str {
    response.lines().find_map(|line| line.strip_prefix("etag: ")).unwrap()
}

#[tokio::test]
async fn identical_polls_follow_every_change_and_are_all_counted() {
    const POLLS: u32 = 20;
    let home = FlagsDirectory::new();
    let parapet = home.start(&[]).await;
    let [client, frontend, admin] =
        first_tokens(&std::fs::read_to_string(first_start_file(&parapet)).unwrap());
    let paths = [("/api/client/features", &client), ("/api/frontend", &frontend)];
    let known = "parapet_token_verdicts_total{verdict=\"known\"}";
    let sample = async |sample: &str| format!("{}", parapet.metric(sample).await.unwrap_or(0.0));
    let counted = async |path: &str, status: u16| {
        let labels = format!(
            r#"{{http_route="{path}",http_request_method="GET",http_response_status_code="{status}"}}"#
        );
        sample(&format!("http_server_requests_total{labels}")).await
    };
    let mut polls = Vec::new();
    assert_eq!(sample(known).await, "0");
    for (path, token) in paths {
        let mut whole = RepeatedRequest::connect(&parapet, path, token, "").await;
        let first = without_date(&whole.send().await);
        assert!(first.starts_with("HTTP/1.1 200 OK\r\n") && first.contains("\"first\""), "{first}");
        let condition = format!("if-none-match: {}\r\n", etag(&first));
        let mut condition = RepeatedRequest::connect(&parapet, path, token, &condition).await;
        let unchanged = without_date(&condition.send().await);
        assert!(unchanged.starts_with("HTTP/1.1 304 Not Modified\r\n"), "{unchanged}");
        for _ in 1..POLLS {
            assert_eq!(without_date(&whole.send().await), first);
            assert_eq!(without_date(&condition.send().await), unchanged);
        }
        assert_eq!(counted(path, 200).await, POLLS.to_string());
        assert_eq!(counted(path, 304).await, POLLS.to_string());
        polls.extend([whole, condition]);
    }
    assert_eq!(sample(known).await, (4 * POLLS).to_string());

    home.write_flags(&FLAGS.replace("first", "second"));
    for poll in &mut polls {
        wait_until("the new flags are served", Duration::from_secs(10), async || {
            poll.send().await.contains("\"second\"").then_some(())
        })
        .await;
    }
    for (path, token) in paths {
        let url = format!("{}/api/admin/api-tokens/{token}", parapet.admin_url());
        let deleted = http().delete(url).header("authorization", &admin).send().await.unwrap();
        assert_eq!(deleted.status(), StatusCode::OK);
        let (refused, served): (Vec<_>, Vec<_>) =
            polls.iter_mut().partition(|poll| poll.request.contains(token.as_str()));
        for poll in refused {
            let response = poll.send().await;
            assert!(response.starts_with("HTTP/1.1 401 "), "{path}: {response}");
        }
        for poll in served.into_iter().filter(|poll| poll.request.contains(frontend.as_str())) {
            assert!(poll.send().await.starts_with("HTTP/1.1 200 "));
        }
    }
}
