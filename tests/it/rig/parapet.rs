//! The real `parapet` binary, as an operator runs it: by flags and environment, with a data directory, on two ports.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::Value;
use tempfile::TempDir;

use super::certificate::Certificate;
use super::net::{free_port, http, until};
use super::process::{LastRites, Output, Process};
use super::secrets;

/// How to start an instance; kept by [`Parapet`] so that it can be started again as it was.
#[derive(Debug)]
pub(crate) struct Setup {
    mode: &'static str,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    /// What trusts its certificate, where it speaks TLS.
    tls_client: Option<reqwest::Client>,
    /// The soft and the hard limit on file descriptors.
    descriptors: Option<(u32, u32)>,
}

const DRAIN_DELAY: &str = "--drain-delay-seconds";

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

    /// Has SDKs served over TLS.
    pub(crate) fn tls(mut self, certificate: &Certificate) -> Self {
        self.tls_client = Some(certificate.http());
        let setup = self.arg("--tls-enable").flag("--tls-server-cert", certificate.file());
        setup.flag("--tls-server-key", certificate.key_file())
    }

    /// Limits its file descriptors.
    pub(crate) fn descriptors(mut self, soft: u32, hard: u32) -> Self {
        self.descriptors = Some((soft, hard));
        self
    }

    /// Sets the upstream admin token, in the environment, where no process list shows it.
    pub(crate) fn admin_token(self, token: &str) -> Self {
        secrets::remember(token);
        self.env("UPSTREAM_ADMIN_TOKEN", token)
    }

    /// Makes everything that happens at intervals happen often, and upstream's silence end soon.
    pub(crate) fn impatient(self) -> Self {
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

    /// Starts it and waits until it listens: an edge without tokens has nothing to serve yet, and is not ready.
    pub(crate) async fn start_listening(self) -> Parapet {
        let parapet = self.spawn();
        parapet.wait_until_listening().await;
        parapet
    }

    /// Starts it and waits for nothing.
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
/// Whenever it ends, whatever it shows and keeps is searched for the tokens that the tests have made.
#[derive(Debug)]
pub(crate) struct Parapet {
    setup: Setup,
    directory: TempDir,
    port: u16,
    admin_port: u16,
    process: Mutex<Option<Process>>,
    /// One per start.
    output: Mutex<Vec<Arc<Output>>>,
}

impl Parapet {
    /// `parapet edge --upstream-url <url>`.
    pub(crate) fn edge(upstream_url: &str) -> Setup {
        Self::mode("edge").arg("--upstream-url").arg(upstream_url)
    }

    /// `parapet <mode>`, for instance `offline`.
    pub(crate) fn mode(mode: &'static str) -> Setup {
        let (arguments, environment) = (Vec::new(), Vec::new());
        Setup { mode, arguments, environment, tls_client: None, descriptors: None }
    }

    /// Where SDKs go: `http://127.0.0.1:<port>`.
    pub(crate) fn url(&self) -> String {
        let scheme = if self.setup.tls_client.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address())
    }

    /// Where the data listener is: `127.0.0.1:<port>`.
    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// What reaches the data listener.
    fn client(&self) -> &reqwest::Client {
        self.setup.tls_client.as_ref().unwrap_or_else(|| http())
    }

    /// Whether a probe of the admin listener succeeds.
    pub(crate) async fn is_well(&self) -> bool {
        let answer = http().get(self.admin_url() + "/internal-backstage/health").send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// Where the operator goes.
    pub(crate) fn admin_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.admin_port)
    }

    /// What outlives a restart.
    pub(crate) fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// The answer to a GET on the data listener with this token.
    pub(crate) async fn get(&self, path: &str, token: &str) -> (StatusCode, Value) {
        let answer = self
            .client()
            .get(self.url() + path)
            .header("Authorization", token)
            .send()
            .await
            .unwrap();
        let (status, body) = (answer.status(), answer.bytes().await.unwrap());
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    /// The answer to a GET of the operator on the admin listener.
    pub(crate) async fn admin_get(&self, path: &str) -> (StatusCode, Value) {
        let request = http().get(self.admin_url() + path);
        let answer = request.header("Authorization", self.operator_token()).send().await.unwrap();
        let (status, body) = (answer.status(), answer.bytes().await.unwrap());
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    /// Waits until it keeps something under its data directory that says `text`.
    pub(crate) async fn wait_until_kept(&self, text: &str) {
        until(&format!("{text} is kept on disk"), Duration::from_secs(30), async || {
            let files = secrets::files(&self.data_dir());
            files
                .iter()
                .any(|(_, bytes)| String::from_utf8_lossy(bytes).contains(text))
                .then_some(())
        })
        .await;
    }

    /// The Prometheus page.
    pub(crate) async fn metrics(&self) -> String {
        let answer =
            self.client().get(self.url() + "/internal-backstage/metrics").send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        answer.text().await.unwrap()
    }

    /// The value of one sample of the Prometheus page, `name{label="…"}` as written there; `None` if it is not there.
    pub(crate) async fn metric(&self, sample: &str) -> Option<f64> {
        let page = self.metrics().await;
        page.lines()
            .find_map(|line| line.strip_prefix(sample)?.strip_prefix(' ')?.trim().parse().ok())
    }

    /// Everything printed so far, over all starts.
    pub(crate) fn log(&self) -> String {
        self.output
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .map(|output| output.text())
            .collect()
    }

    /// Waits until `/internal-backstage/ready` says 200; panics with the log if the process ends or three minutes pass:
    /// what it needs from upstream it may have to ask for twice, a minute apart.
    pub(crate) async fn wait_until_ready(&self) {
        self.wait_until_probe_succeeds("ready").await;
    }

    /// Waits until `/internal-backstage/health` says 200: requests are answered, with flags or without.
    pub(crate) async fn wait_until_listening(&self) {
        self.wait_until_probe_succeeds("health").await;
    }

    async fn wait_until_probe_succeeds(&self, probe: &str) {
        let url = format!("{}/internal-backstage/{probe}", self.url());
        until(&format!("Parapet answers {probe}"), Duration::from_mins(3), async || {
            if let Some(status) = self.ended() {
                panic!("parapet ended with {status}; it printed:\n{}", self.log());
            }
            let answer = self.client().get(&url).send().await;
            answer.is_ok_and(|answer| answer.status().is_success()).then_some(())
        })
        .await;
    }

    /// A number of `/proc/<pid>/status`, for instance `VmHWM`: the most memory it has had, in KiB.
    pub(crate) fn proc_status(&self, field: &str) -> u64 {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let id = process.as_ref().expect("it is running").id();
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let number = line.expect("the system tells it").split_whitespace().next();
        number.expect("there is a number").parse().unwrap()
    }

    /// The soft limit on its file descriptors.
    pub(crate) fn descriptor_limit(&self) -> u64 {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let id = process.as_ref().expect("it is running").id();
        let limits = std::fs::read_to_string(format!("/proc/{id}/limits")).unwrap();
        let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
        limit.unwrap().split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Leaves it room for so many descriptors more.
    pub(crate) fn leave_descriptors(&self, more: u64) {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let id = process.as_ref().expect("it is running").id();
        let open = std::fs::read_dir(format!("/proc/{id}/fd")).unwrap().count() as u64;
        let limit = Some(open + more);
        let limit = rustix::process::Rlimit { current: limit, maximum: limit };
        let id = rustix::process::Pid::from_raw(id.try_into().unwrap());
        rustix::process::prlimit(id, rustix::process::Resource::Nofile, limit).unwrap();
    }

    /// The processor time that all its threads have taken.
    pub(crate) fn processor_time(&self) -> Duration {
        /// How many make a second, on Linux.
        const TICKS: u64 = 100;
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let id = process.as_ref().expect("it is running").id();
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
        // Behind the name, which may have spaces, from the third field on.
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let fields = fields.split_whitespace().skip(11).take(2);
        let ticks: u64 = fields.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 1000 / TICKS)
    }

    /// Its exit status, if it has ended by itself.
    pub(crate) fn ended(&self) -> Option<ExitStatus> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).as_mut()?.ended()
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&self) {
        self.take_process().kill();
    }

    /// Sends SIGTERM and waits for the end.
    pub(crate) async fn terminate(&self) -> ExitStatus {
        let process = self.take_process();
        process.terminate().await
    }

    /// Whether it says that it is ready for requests, as whoever sends it some would ask.
    pub(crate) async fn is_ready(&self) -> bool {
        let answer = self.client().get(self.url() + "/internal-backstage/ready").send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// Sends SIGHUP and waits for nothing.
    pub(crate) fn hang_up(&self) {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        process.as_ref().expect("it is running").hang_up();
    }

    /// The answer to a GET on the admin listener with this token.
    pub(crate) async fn admin_get_as(&self, path: &str, token: &str) -> (StatusCode, Value) {
        let request = http().get(self.admin_url() + path).header("Authorization", token);
        let answer = request.send().await.unwrap();
        let (status, body) = (answer.status(), answer.bytes().await.unwrap());
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    /// Starts it again after [`kill`](Self::kill) or [`terminate`](Self::terminate): same ports, same data directory.
    /// Does not wait.
    pub(crate) fn restart(&self) {
        self.launch();
    }

    /// The same with another value of an environment variable.
    pub(crate) fn restart_with(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) {
        self.setup.environment.push((name.into(), value.into()));
        self.launch();
    }

    fn launch(&self) {
        let program = env!("CARGO_BIN_EXE_parapet");
        let mut command = match self.setup.descriptors {
            None => Command::new(program),
            Some((soft, hard)) => {
                let limit = format!("ulimit -S -n {soft}; ulimit -H -n {hard}; exec \"$0\" \"$@\"");
                let mut command = Command::new("/bin/sh");
                command.arg("-c").arg(limit).arg(program);
                command
            }
        };
        command.arg(self.setup.mode).args(&self.setup.arguments);
        if !self.setup.arguments.iter().any(|it| it == DRAIN_DELAY) {
            // No test's client needs time to leave, but for those that say so.
            command.arg(DRAIN_DELAY).arg("0");
        }
        let port = if self.setup.tls_client.is_some() { "--tls-server-port" } else { "--port" };
        command.arg(port).arg(self.port.to_string()).arg("--interface").arg("127.0.0.1");
        command
            .arg("--admin-port")
            .arg(self.admin_port.to_string())
            .arg("--data-dir")
            .arg(self.data_dir());
        command.current_dir(self.directory.path());
        // One by one: unlike `env_clear`, this is something that `Process` can see and pass on.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name != "PATH") {
            command.env_remove(name);
        }
        command.envs(self.setup.environment.iter().map(|(name, value)| (name, value)));

        let process = Process::spawn("parapet", &command, LastRites::Kill);
        secrets::watch(
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

    /// Panics if a token shows in what it printed, keeps, or tells its operator, or if it printed a line that is
    /// longer than any of its log may be.
    fn assert_secretive(&self) {
        let name = format!("parapet {} on port {}", self.setup.mode, self.port);
        let log = self.log();
        let long = log.lines().find(|line| line.len() > LONGEST_LINE);
        assert!(long.is_none(), "{name} printed a long line: {:.999}", long.unwrap_or_default());
        let mut shown = vec![("the log".to_owned(), log.into_bytes())];
        shown.extend(secrets::files(self.directory.path()));
        let (data, admin) = (["/internal-backstage/metrics"].as_slice(), ADMIN_PAGES);
        for (port, pages) in [(self.port, data), (self.admin_port, admin)] {
            let token = self.operator_token();
            shown
                .extend(pages.iter().map(|page| ((*page).to_owned(), page_of(port, page, &token))));
        }
        secrets::assert_none_in(&name, &shown);
    }

    /// What opens the admin listener, where the setup has given such a token; empty otherwise.
    fn operator_token(&self) -> String {
        let given = ["UPSTREAM_ADMIN_TOKEN", "INIT_ADMIN_API_TOKENS"];
        let found =
            self.setup.environment.iter().find(|(name, _)| given.iter().any(|it| name == it));
        found.map(|(_, token)| token.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn take_process(&self) -> Process {
        self.assert_secretive();
        self.process.lock().unwrap_or_else(PoisonError::into_inner).take().expect("it is running")
    }
}

impl Drop for Parapet {
    fn drop(&mut self) {
        // A failing test has said what is wrong already.
        if !std::thread::panicking() {
            self.assert_secretive();
        }
    }
}

/// The longest line of a log, in bytes.
const LONGEST_LINE: usize = 4096;

/// What an operator can read on the admin listener.
const ADMIN_PAGES: &[&str] = &[
    "/status",
    "/internal-backstage/features",
    "/internal-backstage/tokens",
    "/internal-backstage/metricsbatch",
    "/internal-backstage/instancedata",
];

/// A page, head and body, without a runtime; empty if nobody answers.
fn page_of(port: u16, path: &str, token: &str) -> Vec<u8> {
    let mut answer = Vec::new();
    let mut ask = || -> std::io::Result<usize> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nhost: parapet\r\nauthorization: {token}\r\nconnection: close\r\n\r\n"
        )?;
        stream.read_to_end(&mut answer)
    };
    let _ = ask();
    answer
}
