//! A Parapet in this process: the whole program on ports that the system chooses, offline by default.
//!
//! For tests of its responses. Tests of the process itself, its output, exit code or memory, need the
//! real binary of the rig.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use parapet::app::App;
use parapet::config::Command;
use reqwest::header::HeaderMap;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::rig::http;

/// Reads flag configuration of all projects.
pub(crate) const CLIENT: &str = "*:development.client-0123456789abcdef0123456789abcdef";
/// Reads flag configuration of the project `web`.
pub(crate) const WEB_CLIENT: &str = "web:development.client-of-web-0123456789abcdef01234";
/// Reads evaluated flags of all projects.
pub(crate) const FRONTEND: &str = "*:development.frontend-0123456789abcdef0123456789ab";
/// Reads evaluated flags of the project `web`.
pub(crate) const WEB_FRONTEND: &str = "web:development.frontend-of-web-0123456789abcdef012";

/// A running instance; it ends with the runtime of the test.
#[derive(Debug)]
pub(crate) struct InProcessParapet {
    data: SocketAddr,
    admin: SocketAddr,
    folder: TempDir,
}

impl InProcessParapet {
    /// Offline, with these flags and the four tokens of this module.
    pub(crate) async fn offline(flags: &str) -> Self {
        Self::offline_with(flags, &[]).await
    }

    /// Offline as [`InProcessParapet::offline`], with further arguments.
    pub(crate) async fn offline_with(flags: &str, args: &[&str]) -> Self {
        let (client, frontend) =
            (format!("{CLIENT},{WEB_CLIENT}"), format!("{FRONTEND},{WEB_FRONTEND}"));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("flags.json");
        std::fs::write(&file, flags).unwrap();
        let file = file.to_str().unwrap();
        let mode = ["offline", "-b", file, "-c", &client, "-f", &frontend];
        Self::start(folder, &[&mode, args].concat(), &[]).await
    }

    /// `standalone` with these flags and arguments; `variables` is its whole environment.
    pub(crate) async fn standalone(
        flags: &str,
        args: &[&str],
        variables: &[(&'static str, &'static str)],
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("flags.json");
        std::fs::write(&file, flags).unwrap();
        let file = file.to_str().unwrap();
        Self::start(folder, &[&["standalone", "--flags", file], args].concat(), variables).await
    }

    async fn start(
        folder: TempDir,
        args: &[&str],
        variables: &[(&'static str, &'static str)],
    ) -> Self {
        let data_dir = folder.path().join("data");
        let config = folder.path().join("parapet.toml");
        std::fs::write(&config, "").unwrap();
        let fixed = ["--port=0", "--admin-port=0", "--interface=127.0.0.1"].map(String::from);
        let places = [
            format!("--data-dir={}", data_dir.display()),
            format!("--config={}", config.display()),
        ];
        let args = args.iter().map(|&arg| arg.to_owned()).chain(fixed).chain(places);
        let line = std::iter::once("parapet".to_owned()).chain(args).map(Into::into);
        let variable = |key: &str| {
            let found = variables.iter().find(|(name, _)| *name == key);
            found.map(|(_, value)| (*value).to_owned())
        };
        let command = Command::parse(line, &variable).unwrap_or_else(|error| panic!("{error}"));
        let Command::Run(config) = command else { panic!("the arguments start a server") };
        let app = App::start(*config).await.unwrap();
        let (data, admin) = app.addresses().unwrap();
        tokio::spawn(app.run(futures_util::stream::pending()));
        Self { data, admin, folder }
    }

    /// The address for SDKs.
    pub(crate) fn address(&self) -> SocketAddr {
        self.data
    }

    /// The flag file.
    pub(crate) fn flags_file(&self) -> PathBuf {
        self.folder.path().join("flags.json")
    }

    /// A directory that lasts as long as the instance.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A request to the data listener, without a token.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        http().request(method, format!("http://{}{path}", self.data))
    }

    /// A request to the admin listener, without a token.
    pub(crate) fn admin_request(&self, method: Method, path: &str) -> RequestBuilder {
        http().request(method, format!("http://{}{path}", self.admin))
    }

    /// The response to a GET with this token from an SDK that resolves segments itself.
    pub(crate) async fn get(&self, path: &str, token: &str) -> FullResponse {
        send(self.request(Method::GET, path).header("authorization", token).with_client_spec())
            .await
    }

    /// The response to a POST of JSON with this token.
    pub(crate) async fn post(&self, path: &str, token: &str, body: &Value) -> FullResponse {
        send(self.json_request(path, body).header("authorization", token)).await
    }

    /// A POST of JSON to the data listener, without a token.
    pub(crate) fn json_request(&self, path: &str, body: &Value) -> RequestBuilder {
        let request = self.request(Method::POST, path);
        request.header("content-type", "application/json").body(body.to_string())
    }

    /// Sends these bytes and returns everything until the server closes the connection.
    pub(crate) async fn send_raw(&self, bytes: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(self.data).await.unwrap();
        // The server may close the connection before it has read everything.
        let _ = stream.write_all(bytes).await;
        let mut back = Vec::new();
        let _ = stream.read_to_end(&mut back).await;
        back
    }
}

/// The header with the client specification of an SDK.
pub(crate) trait ClientSpecHeader {
    /// Declares that the SDK resolves segments itself.
    fn with_client_spec(self) -> Self;
}

impl ClientSpecHeader for RequestBuilder {
    fn with_client_spec(self) -> Self {
        self.header("unleash-client-spec", "5.2.0")
    }
}

/// A response, read to its end.
#[derive(Clone, Debug)]
pub(crate) struct FullResponse {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl FullResponse {
    /// The first value of a header; empty if it is missing.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The body as text.
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// The body as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }
}

/// Sends a request and reads the response to its end.
pub(crate) async fn send(request: RequestBuilder) -> FullResponse {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status(), response.headers().clone());
    FullResponse { status, headers, body: response.bytes().await.unwrap() }
}
