//! Programs that are driven by JSON lines: one command in, one response out, in order
//! (`tests/sdk/jsonl.mjs`).

use std::ffi::OsString;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// The timeout for one response.
const RESPONSE_TIMEOUT: Duration = Duration::from_mins(5);

/// A running driver that is ready; killed when dropped.
#[derive(Debug)]
pub(crate) struct Driver {
    name: String,
    child: Child,
    commands: ChildStdin,
    responses: Lines<BufReader<ChildStdout>>,
    stderr_buffer: Arc<Mutex<String>>,
}

impl Driver {
    /// Starts `command` with `options` as its last argument, and waits until it is ready.
    pub(crate) async fn start(name: &str, mut command: Command, options: &Value) -> Self {
        // The driver exits when its input closes, so it needs no guard.
        command.arg(OsString::from(options.to_string()));
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child =
            command.spawn().unwrap_or_else(|error| panic!("cannot start the {name}: {error}"));
        let stderr_buffer = Arc::<Mutex<String>>::default();
        let (mut stderr, buffer) =
            (child.stderr.take().expect("it is piped"), Arc::clone(&stderr_buffer));
        tokio::spawn(async move {
            let mut chunk = [0; 1024];
            while let Ok(read @ 1..) = stderr.read(&mut chunk).await {
                buffer
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push_str(&String::from_utf8_lossy(&chunk[..read]));
            }
        });
        let commands = child.stdin.take().expect("it is piped");
        let responses = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let mut driver = Self { name: name.to_owned(), child, commands, responses, stderr_buffer };
        assert_eq!(driver.read_response().await, json!({ "ready": true }));
        driver
    }

    /// Sends a command and returns the response. Panics if the driver reports an error.
    pub(crate) async fn call(&mut self, command: &str, argument: Value) -> Value {
        self.commands
            .write_all(format!("{}\n", json!({ command: argument })).as_bytes())
            .await
            .unwrap();
        let response = self.read_response().await;
        assert!(response["error"].is_null(), "{}, {command}: {}", self.name, response["error"]);
        response
    }

    /// Closes the driver and waits until it has exited.
    pub(crate) async fn close(mut self) {
        self.call("close", Value::Null).await;
        drop(self.commands);
        tokio::time::timeout(RESPONSE_TIMEOUT, self.child.wait())
            .await
            .expect("it ends with its input")
            .unwrap();
    }

    /// Its standard error so far.
    pub(crate) fn stderr(&self) -> String {
        self.stderr_buffer.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn read_response(&mut self) -> Value {
        let line = tokio::time::timeout(RESPONSE_TIMEOUT, self.responses.next_line()).await;
        match line {
            Ok(Ok(Some(line))) => serde_json::from_str(&line).unwrap(),
            other => panic!(
                "no response from the {} ({other:?}); its standard error:\n{}",
                self.name,
                self.stderr()
            ),
        }
    }
}
