//! The official SDKs, used as applications use them.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use tokio::process::Command;

use super::guarded_process::{node, tests_dir};
use super::json_lines_driver::Driver;

/// An SDK's evaluation of a flag.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Evaluation {
    pub(crate) enabled: bool,
    /// As the SDK returns it: `name`, `enabled`, `payload`, and more that differs between SDKs.
    pub(crate) variant: Value,
}

/// A running SDK that has its flags; killed when dropped.
#[derive(Debug)]
pub(crate) struct Sdk(Driver);

impl Sdk {
    /// The Node SDK, polling every 200 ms. `server` is the part of the URL before `/api`.
    pub(crate) async fn node(server: &str, token: &str, app_name: &str) -> Self {
        let options =
            json!({ "url": format!("{server}/api"), "token": token, "appName": app_name });
        Self::start("Node SDK", node("node-sdk.mjs").into(), &options).await
    }

    /// The Node SDK with streaming. It also logs each change of mode to standard error.
    pub(crate) async fn node_streaming(server: &str, token: &str, app_name: &str) -> Self {
        let url = format!("{server}/api");
        let options = json!({ "url": url, "token": token, "appName": app_name, "streaming": true });
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

    /// The Node SDK over TLS. It trusts this authority (PEM) in addition to the platform's.
    pub(crate) async fn node_trusting(
        authority: &Path,
        server: &str,
        token: &str,
        app_name: &str,
    ) -> Self {
        let url = format!("{server}/api");
        let options = json!({ "url": url, "token": token, "appName": app_name });
        let mut command: Command = node("node-sdk.mjs").into();
        command.env("NODE_EXTRA_CA_CERTS", authority);
        Self::start("Node SDK", command, &options).await
    }

    /// The Python SDK over TLS. It trusts only this authority (PEM).
    pub(crate) async fn python_trusting(
        authority: &Path,
        server: &str,
        token: &str,
        app_name: &str,
    ) -> Self {
        let url = format!("{server}/api");
        let options = json!({ "url": url, "token": token, "appName": app_name });
        let mut command = Command::new(tests_dir().join(".venv/bin/python"));
        command.arg(tests_dir().join("sdk/python-sdk.py")).env("REQUESTS_CA_BUNDLE", authority);
        Self::start("Python SDK", command, &options).await
    }

    /// The frontend SDK with GET requests, sent only on `evaluate`.
    pub(crate) async fn frontend(server: &str, token: &str, app_name: &str) -> Self {
        let options =
            json!({ "url": format!("{server}/api/frontend"), "token": token, "appName": app_name });
        Self::start("frontend SDK", node("frontend-sdk.mjs").into(), &options).await
    }

    /// The frontend SDK with POST requests.
    pub(crate) async fn frontend_post(server: &str, token: &str, app_name: &str) -> Self {
        let url = format!("{server}/api/frontend");
        let options = json!({ "url": url, "token": token, "appName": app_name, "post": true });
        Self::start("frontend SDK", node("frontend-sdk.mjs").into(), &options).await
    }

    async fn start(name: &str, command: Command, options: &Value) -> Self {
        Self(Driver::start(name, command, options).await)
    }

    /// Evaluates every flag that the SDK knows, without counting usage. The frontend SDK knows only
    /// flags that are enabled in this context.
    pub(crate) async fn evaluate(&mut self, context: Value) -> BTreeMap<String, Evaluation> {
        let mut response = self.0.call("evaluate", json!({ "context": context })).await;
        let Value::Object(flags) = response["flags"].take() else { panic!("no flags: {response}") };
        let evaluation = |mut flag: Value| Evaluation {
            enabled: flag["enabled"].as_bool().unwrap(),
            variant: flag["variant"].take(),
        };
        flags.into_iter().map(|(name, flag)| (name, evaluation(flag))).collect()
    }

    /// Uses a flag this many times, as applications do; each use is counted.
    pub(crate) async fn use_flag(&mut self, flag: &str, times: u32) {
        self.0.call("count", json!({ "flag": flag, "times": times })).await;
    }

    /// Gets the variant of a flag this many times; each time is counted, for the flag and for the
    /// variant.
    pub(crate) async fn use_variant(&mut self, flag: &str, times: u32) {
        self.0.call("count_variant", json!({ "flag": flag, "times": times })).await;
    }

    /// Records impact metrics with this name and the suffixes `_counter`, `_gauge` and `_histogram`
    /// (buckets 10, 100). Node only.
    pub(crate) async fn record_impact_metrics(
        &mut self,
        name: &str,
        add: u32,
        set: u32,
        observe: u32,
    ) {
        let impact = json!({ "name": name, "add": add, "set": set, "observe": observe });
        self.0.call("impact", impact).await;
    }

    /// Sends the usage counted so far.
    pub(crate) async fn flush(&mut self) {
        self.0.call("flush", Value::Null).await;
    }

    /// Closes the SDK. Among the backend SDKs, only the Python one sends its remaining usage first.
    pub(crate) async fn close(self) {
        self.0.close().await;
    }

    /// The standard error of the SDK so far.
    pub(crate) fn stderr(&self) -> String {
        self.0.stderr()
    }
}
