//! Azurite, Microsoft's stand-in for Azure Blob Storage.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest as _, Sha256};

use super::guarded_process::{GuardedProcess, OnParentExit, node};
use super::net::{free_port, http};

/// The account that Azurite has, and its published key.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// A running server, without any container; killed when dropped.
#[derive(Debug)]
pub(crate) struct AzureServer {
    _process: GuardedProcess,
    url: String,
}

impl AzureServer {
    /// Starts a server that keeps its data in memory.
    pub(crate) async fn start() -> Self {
        let port = free_port();
        let mut command = node("../node_modules/azurite/dist/src/blob/main.js");
        command
            .args(["--blobPort", &port.to_string(), "--inMemoryPersistence"])
            .args(["--silent", "--disableTelemetry"]);
        let mut process = GuardedProcess::spawn("Azurite", &command, OnParentExit::Kill);
        let url = format!("http://127.0.0.1:{port}/{ACCOUNT}");
        process.wait_until(async || http().get(&url).send().await.is_ok()).await;
        Self { _process: process, url }
    }

    /// The settings of its clients, by the names of the environment variables in lower case.
    pub(crate) fn settings(&self) -> Vec<(&'static str, String)> {
        vec![
            ("azure_storage_endpoint", self.url.clone()),
            ("azure_storage_account_name", ACCOUNT.to_owned()),
            ("azure_storage_account_key", KEY.to_owned()),
        ]
    }

    /// Creates a container.
    pub(crate) async fn create_container(&self, container: &str) {
        // Azurite accepts every date.
        let date = "Sun, 01 Nov 2026 00:00:00 GMT";
        let headers = format!("x-ms-date:{date}\nx-ms-version:2021-08-06");
        let resource = format!("/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container");
        let mut text = "PUT".to_owned();
        // Eleven headers that this request does not have.
        write!(text, "{}{headers}\n{resource}", "\n".repeat(12)).unwrap();
        let signature = hmac_sha256(&BASE64_STANDARD.decode(KEY).unwrap(), text.as_bytes());
        let authorization = format!("SharedKey {ACCOUNT}:{}", BASE64_STANDARD.encode(signature));
        let request = http().put(format!("{}/{container}?restype=container", self.url));
        let request = request.header("x-ms-date", date).header("x-ms-version", "2021-08-06");
        let response =
            request.header("authorization", authorization).body("").send().await.unwrap();
        assert!(response.status().is_success(), "{response:?}");
    }
}

/// HMAC (RFC 2104) for keys of up to 64 bytes.
fn hmac_sha256(key: &[u8], text: &[u8]) -> [u8; 32] {
    let padded = |mask: u8| -> [u8; 64] {
        std::array::from_fn(|i| key.get(i).copied().unwrap_or_default() ^ mask)
    };
    let inner = Sha256::new().chain_update(padded(0x36)).chain_update(text).finalize();
    Sha256::new().chain_update(padded(0x5c)).chain_update(inner).finalize().into()
}
