//! moto, a stand-in for S3 that checks conditions like the real one.

use std::process::Command;

use super::guarded_process::{GuardedProcess, OnParentExit, tests_dir};
use super::net::{free_port, http};

/// A running server, without any bucket; killed when dropped.
#[derive(Debug)]
pub(crate) struct S3Server {
    _process: GuardedProcess,
    url: String,
}

impl S3Server {
    /// Starts a server.
    pub(crate) async fn start() -> Self {
        let port = free_port();
        let mut command = Command::new(tests_dir().join(".venv/bin/moto_server"));
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
        let mut process = GuardedProcess::spawn("moto", &command, OnParentExit::Kill);
        let url = format!("http://127.0.0.1:{port}");
        process.wait_until(async || http().get(&url).send().await.is_ok()).await;
        Self { _process: process, url }
    }

    /// The settings of its clients, by the names of the environment variables in lower case.
    pub(crate) fn settings(&self) -> Vec<(&'static str, String)> {
        vec![
            ("aws_endpoint_url", self.url.clone()),
            ("aws_access_key_id", "key".to_owned()),
            ("aws_secret_access_key", "s3cr3t".to_owned()),
            ("aws_region", "us-east-1".to_owned()),
        ]
    }

    /// Creates a bucket.
    pub(crate) async fn create_bucket(&self, bucket: &str) {
        self.put(bucket, "", "").await;
    }

    /// Writes an object.
    pub(crate) async fn put(&self, bucket: &str, name: &str, text: &str) {
        let url = format!("{}/{bucket}/{name}", self.url);
        let url = if name.is_empty() { url.trim_end_matches('/').to_owned() } else { url };
        let response = http().put(url).body(text.to_owned()).send().await.unwrap();
        assert!(response.status().is_success(), "{response:?}");
    }

    /// The list of the objects, as XML.
    pub(crate) async fn list(&self, bucket: &str) -> String {
        let response = http().get(format!("{}/{bucket}", self.url)).send().await.unwrap();
        response.text().await.unwrap()
    }
}
