//! The real `parapet` binary, run as an operator runs it: with flags and environment variables, a data
//! directory, and two ports.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::guarded_process::{GuardedProcess, OnParentExit, ProcessOutput};
use super::log_event::LogEvent;
use super::net::{free_port, http, send_json, wait_until};
use super::secret_leak_check;
use super::self_signed_certificate::SelfSignedCertificate;

/// The path of the flags for server SDKs.
pub(crate) const FEATURES: &str = "/api/client/features";

/// How to start an instance. [`Parapet`] stores it to start the instance again in the same way.
#[derive(Debug)]
pub(crate) struct Setup {
    mode: &'static str,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    /// The client that trusts its certificate, if it uses TLS.
    tls_client: Option<reqwest::Client>,
    /// The soft and the hard limit on file descriptors.
    fd_limits: Option<(u32, u32)>,
}

const DRAIN_DELAY_FLAG: &str = "--drain-delay-seconds";

impl Setup {
    /// Adds a flag and its value.
    pub(crate) fn flag(self, name: &str, value: impl Into<OsString>) -> Self {
        self.arg(name).arg(value)
    }

    /// Adds one argument.
    pub(crate) fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Sets an environment variable; nothing but `PATH` is inherited.
    pub(crate) fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Serves SDKs over TLS.
    pub(crate) fn tls(mut self, certificate: &SelfSignedCertificate) -> Self {
        self.tls_client = Some(certificate.http());
        let setup = self.arg("--tls-enable").flag("--tls-server-cert", certificate.file());
        setup.flag("--tls-server-key", certificate.key_file())
    }

    /// Limits its file descriptors.
    pub(crate) fn limit_fds(mut self, soft: u32, hard: u32) -> Self {
        self.fd_limits = Some((soft, hard));
        self
    }

    /// Sets the upstream admin token in the environment, where process lists do not show it.
    pub(crate) fn admin_token(self, token: &str) -> Self {
        secret_leak_check::register(token);
        self.env("UPSTREAM_ADMIN_TOKEN", token)
    }

    /// Shortens all intervals to half a second, and the upstream and shutdown timeouts to 2 s.
    pub(crate) fn with_short_intervals(self) -> Self {
        [
            ("--features-refresh-interval-seconds", "0.5"),
            ("--metrics-interval-seconds", "0.5"),
            ("--token-list-interval-seconds", "0.5"),
            ("--invalid-token-ttl-seconds", "0.5"),
            ("--upstream-request-timeout", "2"),
            ("--shutdown-timeout-seconds", "2"),
        ]
        .into_iter()
        .fold(self, |setup, (name, value)| setup.flag(name, value))
    }

    /// Starts it and waits until it is ready.
    pub(crate) async fn start(self) -> Parapet {
        let parapet = self.spawn();
        parapet.wait_until_ready().await;
        parapet
    }

    /// Starts it and waits until it listens. An edge without tokens has no flags yet and is not ready.
    pub(crate) async fn start_listening(self) -> Parapet {
        let parapet = self.spawn();
        parapet.wait_until_listening().await;
        parapet
    }

    /// Starts it and returns at once.
    pub(crate) fn spawn(self) -> Parapet {
        let directory = tempfile::Builder::new().prefix("parapet-data-").tempdir().unwrap();
        let (port, admin_port) = (free_port(), free_port());
        let parapet = Parapet {
            setup: self,
            directory,
            port,
            admin_port,
            process: Mutex::default(),
            output: Mutex::default(),
        };
        parapet.launch();
        parapet
    }
}

/// An instance of Parapet with its own data directory and ports; killed when dropped.
///
/// Whenever it ends, its log, its files and its admin pages are searched for the tokens that the tests
/// have created.
#[derive(Debug)]
pub(crate) struct Parapet {
    setup: Setup,
    directory: TempDir,
    port: u16,
    admin_port: u16,
    process: Mutex<Option<GuardedProcess>>,
    /// One for each start.
    output: Mutex<Vec<Arc<ProcessOutput>>>,
}

impl Parapet {
    /// `parapet edge --upstream-url <url>`.
    pub(crate) fn edge(upstream_url: &str) -> Setup {
        Self::mode("edge").arg("--upstream-url").arg(upstream_url)
    }

    /// `parapet <mode>`, for instance `offline`.
    pub(crate) fn mode(mode: &'static str) -> Setup {
        let (arguments, environment) = (Vec::new(), Vec::new());
        Setup { mode, arguments, environment, tls_client: None, fd_limits: None }
    }

    /// The URL for SDKs: `http://127.0.0.1:<port>`.
    pub(crate) fn url(&self) -> String {
        let scheme = if self.setup.tls_client.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address())
    }

    /// The address of the data listener: `127.0.0.1:<port>`.
    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The client for the data listener.
    fn http_client(&self) -> &reqwest::Client {
        self.setup.tls_client.as_ref().unwrap_or_else(|| http())
    }

    /// Whether the health probe of the admin listener succeeds.
    pub(crate) async fn is_healthy(&self) -> bool {
        let response = http().get(self.admin_url() + "/internal-backstage/health").send().await;
        response.is_ok_and(|response| response.status().is_success())
    }

    /// The URL for operators.
    pub(crate) fn admin_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.admin_port)
    }

    /// The directory that outlives a restart.
    pub(crate) fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// The response to a GET on the data listener with this token.
    pub(crate) async fn get(&self, path: &str, token: &str) -> (StatusCode, Value) {
        let request = self.http_client().get(self.url() + path).header("Authorization", token);
        send_json(request, &Value::Null).await
    }

    /// The status of the response to a POST on the data listener with this token.
    pub(crate) async fn post(&self, path: &str, token: &str, body: &Value) -> StatusCode {
        let request = self.http_client().post(self.url() + path).header("Authorization", token);
        send_json(request, body).await.0
    }

    /// Reports usage, as an SDK whose application has this name. `toggles` are the counts of each flag.
    pub(crate) async fn report_usage(&self, token: &str, app_name: &str, toggles: &Value) {
        let now = Timestamp::now();
        let bucket = json!({ "start": now, "stop": now, "toggles": toggles });
        let report = json!({ "appName": app_name, "instanceId": "i", "bucket": bucket });
        let status = self.post("/api/client/metrics", token, &report).await;
        assert_eq!(status, StatusCode::ACCEPTED);
    }

    /// The response to an operator's GET on the admin listener.
    pub(crate) async fn admin_get(&self, path: &str) -> (StatusCode, Value) {
        self.admin_get_as(path, &self.operator_token()).await
    }

    /// The response to a GET on the admin listener with this token.
    pub(crate) async fn admin_get_as(&self, path: &str, token: &str) -> (StatusCode, Value) {
        self.admin_request(Method::GET, path, token, &Value::Null).await
    }

    /// The response to a request on the admin listener with this token. `Null` means no body.
    pub(crate) async fn admin_request(
        &self,
        method: Method,
        path: &str,
        token: &str,
        body: &Value,
    ) -> (StatusCode, Value) {
        let request = http().request(method, self.admin_url() + path);
        send_json(request.header("Authorization", token), body).await
    }

    /// The status of a server SDK's request for flags.
    pub(crate) async fn features_status(&self, token: &str) -> StatusCode {
        self.get(FEATURES, token).await.0
    }

    /// The names of the flags that a server SDK gets, or the status if it gets none.
    pub(crate) async fn served_flags(&self, token: &str) -> Result<Vec<String>, StatusCode> {
        let (status, body) = self.get(FEATURES, token).await;
        if status != StatusCode::OK {
            return Err(status);
        }
        let flags = body["features"].as_array().unwrap().iter();
        Ok(flags.map(|flag| flag["name"].as_str().unwrap().to_owned()).collect())
    }

    /// Waits until a server SDK gets exactly these flags.
    pub(crate) async fn wait_until_served(&self, token: &str, names: &[&str]) {
        let expected = Ok(names.iter().map(|&name| name.to_owned()).collect());
        wait_until(&format!("{names:?} are served"), Duration::from_mins(2), async || {
            (self.served_flags(token).await == expected).then_some(())
        })
        .await;
    }

    /// Waits until a file in its data directory contains `text`.
    pub(crate) async fn wait_until_stored(&self, text: &str) {
        wait_until(&format!("{text} is stored on disk"), Duration::from_secs(30), async || {
            let files = secret_leak_check::read_files(&self.data_dir());
            files
                .iter()
                .any(|(_, bytes)| String::from_utf8_lossy(bytes).contains(text))
                .then_some(())
        })
        .await;
    }

    /// The Prometheus page.
    pub(crate) async fn metrics(&self) -> String {
        let response = self
            .http_client()
            .get(self.url() + "/internal-backstage/metrics")
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        response.text().await.unwrap()
    }

    /// The value of one sample of the Prometheus page, named as written there (`name{label="…"}`);
    /// `None` if it is missing.
    pub(crate) async fn metric(&self, sample: &str) -> Option<f64> {
        let page = self.metrics().await;
        page.lines()
            .find_map(|line| line.strip_prefix(sample)?.strip_prefix(' ')?.trim().parse().ok())
    }

    /// The number of its polls for flags at upstream, with any response.
    pub(crate) async fn upstream_poll_count(&self) -> u64 {
        const POLLS: &str = "parapet_upstream_requests_total{purpose=\"features\"";
        let page = self.metrics().await;
        let samples = page.lines().filter(|line| line.starts_with(POLLS));
        samples.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    /// Waits until the output contains `text`: a line may be written after its effect is visible.
    pub(crate) async fn wait_until_printed(&self, text: &str) {
        wait_until(&format!("{text:?} is printed"), Duration::from_mins(1), async || {
            self.log().contains(text).then_some(())
        })
        .await;
    }

    /// The log lines of this kind so far.
    pub(crate) fn logged(&self, event: LogEvent) -> Vec<String> {
        self.log().lines().filter(|line| event.matches(line)).map(str::to_owned).collect()
    }

    /// The first log line of this kind, once there is one.
    pub(crate) async fn wait_until_logged(&self, event: LogEvent) -> String {
        self.wait_until_logged_times(event, 1).await.swap_remove(0)
    }

    /// The log lines of this kind, once there are at least `times`.
    pub(crate) async fn wait_until_logged_times(
        &self,
        event: LogEvent,
        times: usize,
    ) -> Vec<String> {
        wait_until(&format!("{event:?} is logged"), Duration::from_mins(2), async || {
            let lines = self.logged(event);
            (lines.len() >= times).then_some(lines)
        })
        .await
    }

    /// Waits until a request to upstream has failed.
    pub(crate) async fn wait_until_upstream_fails(&self) {
        let begin = Timestamp::now();
        wait_until("a request to upstream fails", Duration::from_mins(1), async || {
            let (code, status) = self.admin_get("/status").await;
            if code == StatusCode::UNAUTHORIZED {
                // Upstream has rejected the admin token, which therefore opens nothing.
                return Some(());
            }
            let failed = status["upstream"]["lastError"]["at"].as_str()?;
            (failed.parse::<Timestamp>().unwrap() > begin).then_some(())
        })
        .await;
    }

    /// Waits until upstream has confirmed the flags of all environments, which are this many.
    pub(crate) async fn wait_until_upstream_recovers(&self, environment_count: usize) {
        let begin = Timestamp::now();
        wait_until("upstream confirms the flags", Duration::from_mins(1), async || {
            let (_, status) = self.admin_get("/status").await;
            let environments = status["environments"].as_array()?;
            let confirmed = |it: &Value| it["confirmed"].as_str()?.parse::<Timestamp>().ok();
            let all = environments.iter().all(|it| confirmed(it).is_some_and(|at| at > begin));
            (environments.len() == environment_count && all).then_some(())
        })
        .await;
    }

    /// The whole output so far, of all starts.
    pub(crate) fn log(&self) -> String {
        self.output
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .map(|output| output.text())
            .collect()
    }

    /// Waits until `/internal-backstage/ready` responds 200. Panics with the log if the process ends or
    /// after three minutes: it may have to send a request to upstream twice, a minute apart.
    pub(crate) async fn wait_until_ready(&self) {
        self.wait_until_probe_succeeds("ready").await;
    }

    /// Waits until `/internal-backstage/health` responds 200, with flags or without.
    pub(crate) async fn wait_until_listening(&self) {
        self.wait_until_probe_succeeds("health").await;
    }

    async fn wait_until_probe_succeeds(&self, probe: &str) {
        let url = format!("{}/internal-backstage/{probe}", self.url());
        wait_until(&format!("{probe} succeeds"), Duration::from_mins(3), async || {
            if let Some(status) = self.exit_status() {
                panic!("parapet ended with {status}; it printed:\n{}", self.log());
            }
            let response = self.http_client().get(&url).send().await;
            response.is_ok_and(|response| response.status().is_success()).then_some(())
        })
        .await;
    }

    /// A number from `/proc/<pid>/status`, for instance `VmHWM`: its peak memory in KiB.
    pub(crate) fn proc_status(&self, field: &str) -> u64 {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let id = process.as_ref().expect("it is running").id();
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let number = line.expect("the field exists").split_whitespace().next();
        number.expect("there is a number").parse().unwrap()
    }

    /// Its soft limit on file descriptors.
    pub(crate) fn fd_limit(&self) -> u64 {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let id = process.as_ref().expect("it is running").id();
        let limits = std::fs::read_to_string(format!("/proc/{id}/limits")).unwrap();
        let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
        limit.unwrap().split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Lowers its limit so that it can open this many more file descriptors.
    pub(crate) fn leave_free_fds(&self, more: u64) {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let id = process.as_ref().expect("it is running").id();
        let open = std::fs::read_dir(format!("/proc/{id}/fd")).unwrap().count() as u64;
        let limit = Some(open + more);
        let limit = rustix::process::Rlimit { current: limit, maximum: limit };
        let id = rustix::process::Pid::from_raw(id.try_into().unwrap());
        rustix::process::prlimit(id, rustix::process::Resource::Nofile, limit).unwrap();
    }

    /// The CPU time of all its threads.
    pub(crate) fn cpu_time(&self) -> Duration {
        /// Clock ticks per second on Linux.
        const TICKS: u64 = 100;
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let id = process.as_ref().expect("it is running").id();
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
        // The fields from the third on; the name before them may contain spaces.
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let fields = fields.split_whitespace().skip(11).take(2);
        let ticks: u64 = fields.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 1000 / TICKS)
    }

    /// Its exit status, if it has exited.
    pub(crate) fn exit_status(&self) -> Option<ExitStatus> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).as_mut()?.exit_status()
    }

    /// Kills it, as a crash would.
    pub(crate) fn kill(&self) {
        self.take_process().kill();
    }

    /// Sends SIGTERM and waits until it exits.
    pub(crate) async fn terminate(&self) -> ExitStatus {
        let process = self.take_process();
        process.terminate().await
    }

    /// Whether it reports ready, as a load balancer would check.
    pub(crate) async fn is_ready(&self) -> bool {
        let response =
            self.http_client().get(self.url() + "/internal-backstage/ready").send().await;
        response.is_ok_and(|response| response.status().is_success())
    }

    /// Sends SIGHUP and returns at once.
    pub(crate) fn send_sighup(&self) {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        process.as_ref().expect("it is running").send_sighup();
    }

    /// Sends it the signal of this name, for instance `STOP`.
    pub(crate) fn send_signal(&self, name: &str) {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        process.as_ref().expect("it is running").send_signal(name);
    }

    /// Starts it again after [`kill`](Self::kill) or [`terminate`](Self::terminate), with the same ports
    /// and data directory. Does not wait.
    pub(crate) fn restart(&self) {
        self.launch();
    }

    /// Starts it again with another value of an environment variable.
    pub(crate) fn restart_with_env(
        &mut self,
        name: impl Into<OsString>,
        value: impl Into<OsString>,
    ) {
        self.setup.environment.push((name.into(), value.into()));
        self.launch();
    }

    fn launch(&self) {
        let program = env!("CARGO_BIN_EXE_parapet");
        let mut command = match self.setup.fd_limits {
            None => Command::new(program),
            Some((soft, hard)) => {
                let limit = format!("ulimit -S -n {soft}; ulimit -H -n {hard}; exec \"$0\" \"$@\"");
                let mut command = Command::new("/bin/sh");
                command.arg("-c").arg(limit).arg(program);
                command
            }
        };
        command.arg(self.setup.mode).args(&self.setup.arguments);
        if !self.setup.arguments.iter().any(|it| it == DRAIN_DELAY_FLAG) {
            // Tests do not need the drain delay, except those that set it.
            command.arg(DRAIN_DELAY_FLAG).arg("0");
        }
        let port = if self.setup.tls_client.is_some() { "--tls-server-port" } else { "--port" };
        command.arg(port).arg(self.port.to_string()).arg("--interface").arg("127.0.0.1");
        command
            .arg("--admin-port")
            .arg(self.admin_port.to_string())
            .arg("--data-dir")
            .arg(self.data_dir());
        command.current_dir(self.directory.path());
        // One by one: unlike `env_clear`, `Process` can read these from the command and pass them on.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name != "PATH") {
            command.env_remove(name);
        }
        command.envs(self.setup.environment.iter().map(|(name, value)| (name, value)));

        let process = GuardedProcess::spawn("parapet", &command, OnParentExit::Kill);
        secret_leak_check::register_output(
            &format!("parapet {} on port {}", self.setup.mode, self.port),
            process.output(),
        );
        self.output
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::clone(process.output()));
        let before = self.process.lock().unwrap_or_else(PoisonError::into_inner).replace(process);
        assert!(before.is_none(), "it was running");
    }

    /// Panics if its output, files or admin pages contain a token, or if a line of its output is longer
    /// than the limit for a log line.
    fn assert_no_secret_leaked(&self) {
        let name = format!("parapet {} on port {}", self.setup.mode, self.port);
        let log = self.log();
        let long = log.lines().find(|line| line.len() > MAX_LOG_LINE_BYTES);
        assert!(long.is_none(), "{name} printed a long line: {:.999}", long.unwrap_or_default());
        let mut shown = vec![("the log".to_owned(), log.into_bytes())];
        shown.extend(secret_leak_check::read_files(self.directory.path()));
        let (data, admin) = (["/internal-backstage/metrics"].as_slice(), ADMIN_PATHS);
        for (port, pages) in [(self.port, data), (self.admin_port, admin)] {
            let token = self.operator_token();
            shown.extend(
                pages.iter().map(|page| ((*page).to_owned(), fetch_raw(port, page, &token))),
            );
        }
        secret_leak_check::assert_none_in(&name, &shown);
    }

    /// The token that opens the admin listener, if the setup contains one; empty otherwise.
    fn operator_token(&self) -> String {
        let variables = ["UPSTREAM_ADMIN_TOKEN", "INIT_ADMIN_API_TOKENS"];
        let found =
            self.setup.environment.iter().find(|(name, _)| variables.iter().any(|it| name == it));
        found.map(|(_, token)| token.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn take_process(&self) -> GuardedProcess {
        self.assert_no_secret_leaked();
        self.process.lock().unwrap_or_else(PoisonError::into_inner).take().expect("it is running")
    }
}

impl Drop for Parapet {
    fn drop(&mut self) {
        // A failing test has reported its own error already.
        if !std::thread::panicking() {
            self.assert_no_secret_leaked();
        }
    }
}

/// The limit for a line of its output, in bytes.
const MAX_LOG_LINE_BYTES: usize = 4096;

/// The pages of the admin listener.
const ADMIN_PATHS: &[&str] = &[
    "/status",
    "/internal-backstage/features",
    "/internal-backstage/tokens",
    "/internal-backstage/metricsbatch",
    "/internal-backstage/instancedata",
];

/// A response, head and body, fetched without a runtime; empty if nothing listens.
fn fetch_raw(port: u16, path: &str, token: &str) -> Vec<u8> {
    let mut response = Vec::new();
    let mut exchange = || -> std::io::Result<usize> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nhost: parapet\r\nauthorization: {token}\r\nconnection: close\r\n\r\n"
        )?;
        stream.read_to_end(&mut response)
    };
    let _ = exchange();
    response
}

/// The position of the only instance with the value 1 for this metric, if there is exactly one.
pub(crate) async fn find_only(instances: &[Parapet], metric: &str) -> Option<usize> {
    let mut found = Vec::new();
    for (n, instance) in instances.iter().enumerate() {
        if instance.metric(metric).await == Some(1.0) {
            found.push(n);
        }
    }
    <[usize; 1]>::try_from(found).ok().map(|[position]| position)
}

/// A standalone with one flag and these tokens, which stores usage at short intervals, and the file of the
/// flag.
pub(crate) async fn start_standalone_for_usage(
    flag: &str,
    admin: &str,
    client: &str,
) -> (Parapet, tempfile::NamedTempFile) {
    for token in [admin, client] {
        secret_leak_check::register(token);
    }
    let flags = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(flags.path(), format!(r#"{{"features":[{{"name":"{flag}","enabled":true}}]}}"#))
        .unwrap();
    let standalone = Parapet::mode("standalone")
        .flag("--flags", flags.path())
        .flag("--metrics-interval-seconds", "0.5")
        .env("INIT_ADMIN_API_TOKENS", admin)
        .env("INIT_CLIENT_API_TOKENS", client);
    (standalone.start().await, flags)
}
