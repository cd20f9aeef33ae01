//! The official SDKs as applications use them: a process each, driven by JSON lines.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::process::{node, tests_dir};

/// How long an SDK may take for one answer.
const PATIENCE: Duration = Duration::from_mins(1);

/// What an SDK makes of a flag.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Evaluation {
    pub(crate) enabled: bool,
    /// As the SDK shows it: `name`, `enabled`, `payload`, and more that differs between SDKs.
    pub(crate) variant: Value,
}

/// A running SDK that has its flags; killed when dropped.
#[derive(Debug)]
pub(crate) struct Sdk {
    name: String,
    child: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    complaints: Arc<Mutex<String>>,
}

impl Sdk {
    /// The Node SDK, polling every 200 ms. `server` is the part of the URL before `/api`.
    pub(crate) async fn node(server: &str, token: &str, app_name: &str) -> Self {
        let options =
            json!({ "url": format!("{server}/api"), "token": token, "appName": app_name });
        Self::start("Node SDK", node("node-sdk.mjs").into(), &options).await
    }

    /// The Python SDK, polling every second.
    pub(crate) async fn python(server: &str, token: &str, app_name: &str) -> Self {
        let options =
            json!({ "url": format!("{server}/api"), "token": token, "appName": app_name });
        let mut command = Command::new(tests_dir().join(".venv/bin/python"));
        command.arg(tests_dir().join("sdk/python-sdk.py"));
        Self::start("Python SDK", command, &options).await
    }

    /// The frontend SDK, asking by GET, and only when told to evaluate.
    pub(crate) async fn frontend(server: &str, token: &str, app_name: &str) -> Self {
        let options =
            json!({ "url": format!("{server}/api/frontend"), "token": token, "appName": app_name });
        Self::start("frontend SDK", node("frontend-sdk.mjs").into(), &options).await
    }

    /// The frontend SDK, asking by POST.
    pub(crate) async fn frontend_posting(server: &str, token: &str, app_name: &str) -> Self {
        let url = format!("{server}/api/frontend");
        let options = json!({ "url": url, "token": token, "appName": app_name, "post": true });
        Self::start("frontend SDK", node("frontend-sdk.mjs").into(), &options).await
    }

    async fn start(name: &str, mut command: Command, options: &Value) -> Self {
        // The driver ends when its input does, so it needs no guard.
        command.arg(OsString::from(options.to_string()));
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child =
            command.spawn().unwrap_or_else(|error| panic!("cannot start the {name}: {error}"));
        let complaints = Arc::<Mutex<String>>::default();
        let (mut stderr, heard) =
            (child.stderr.take().expect("it is piped"), Arc::clone(&complaints));
        tokio::spawn(async move {
            let mut chunk = [0; 1024];
            while let Ok(read @ 1..) = stderr.read(&mut chunk).await {
                heard
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push_str(&String::from_utf8_lossy(&chunk[..read]));
            }
        });
        let commands = child.stdin.take().expect("it is piped");
        let answers = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let mut sdk = Self { name: name.to_owned(), child, commands, answers, complaints };
        assert_eq!(sdk.answer().await, json!({ "ready": true }));
        sdk
    }

    /// Evaluates every flag the SDK knows, without counting. The frontend SDK knows only those enabled in this context.
    pub(crate) async fn evaluate(&mut self, context: Value) -> BTreeMap<String, Evaluation> {
        let mut answer = self.ask("evaluate", json!({ "context": context })).await;
        let Value::Object(flags) = answer["flags"].take() else { panic!("no flags: {answer}") };
        let evaluation = |mut flag: Value| Evaluation {
            enabled: flag["enabled"].as_bool().unwrap(),
            variant: flag["variant"].take(),
        };
        flags.into_iter().map(|(name, flag)| (name, evaluation(flag))).collect()
    }

    /// Uses a flag this many times, as applications do: each use counts.
    pub(crate) async fn count(&mut self, flag: &str, times: u32) {
        self.ask("count", json!({ "flag": flag, "times": times })).await;
    }

    /// Asks for a flag's variant this many times: each counts, for the flag and the variant.
    pub(crate) async fn count_variant(&mut self, flag: &str, times: u32) {
        self.ask("count_variant", json!({ "flag": flag, "times": times })).await;
    }

    /// Sends the usage counted so far.
    pub(crate) async fn flush(&mut self) {
        self.ask("flush", Value::Null).await;
    }

    /// Ends the SDK in good order; the backend ones unsent usage first, Python only.
    pub(crate) async fn close(mut self) {
        self.ask("close", Value::Null).await;
        drop(self.commands);
        tokio::time::timeout(PATIENCE, self.child.wait())
            .await
            .expect("it ends with its input")
            .unwrap();
    }

    /// What the SDK has complained about on its standard error.
    pub(crate) fn complaints(&self) -> String {
        self.complaints.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn ask(&mut self, command: &str, argument: Value) -> Value {
        self.commands
            .write_all(format!("{}\n", json!({ command: argument })).as_bytes())
            .await
            .unwrap();
        let answer = self.answer().await;
        assert!(answer["error"].is_null(), "{}: {}", self.name, answer["error"]);
        answer
    }

    async fn answer(&mut self) -> Value {
        let line = tokio::time::timeout(PATIENCE, self.answers.next_line()).await;
        match line {
            Ok(Ok(Some(line))) => serde_json::from_str(&line).unwrap(),
            other => panic!(
                "the {} gave no answer ({other:?}); it complained:\n{}",
                self.name,
                self.complaints()
            ),
        }
    }
}
