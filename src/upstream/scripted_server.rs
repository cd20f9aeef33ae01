//! A scripted HTTP server, for failures that a real Unleash does not produce.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use reqwest::{StatusCode, Url, header::HeaderMap};
use tokio::{net::TcpListener, task::AbortHandle};

use super::http_client::Config;

/// A received request.
#[derive(Clone, Debug)]
pub(crate) struct ReceivedRequest {
    pub(crate) line: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

/// Status, headers and body of a response.
pub(crate) type ScriptedReply = (u16, &'static [(&'static str, &'static str)], String);

/// A running server. It stops on drop.
pub(crate) struct ScriptedServer {
    address: SocketAddr,
    received: Arc<Mutex<Vec<ReceivedRequest>>>,
    task: AbortHandle,
}

impl ScriptedServer {
    /// Starts a server that responds to every request with the result of `script`.
    pub(crate) async fn start(
        script: impl Fn(&ReceivedRequest) -> ScriptedReply + Clone + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let received = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&received);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (log, script) = (Arc::clone(&log), script.clone());
                let service = service_fn(move |request| {
                    let (log, script) = (Arc::clone(&log), script.clone());
                    async move {
                        let request = read(request).await?;
                        let (status, headers, body) = script(&request);
                        log.lock().expect("log").push(request);
                        let mut reply = Response::new(Full::new(Bytes::from(body)));
                        *reply.status_mut() = StatusCode::from_u16(status).expect("status");
                        for (name, value) in headers {
                            let value = value.bytes().map(tilde_to_non_ascii).collect::<Vec<_>>();
                            let value = hyper::header::HeaderValue::from_bytes(&value);
                            reply.headers_mut().append(*name, value.expect("header"));
                        }
                        Ok::<_, hyper::Error>(reply)
                    }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { address, received, task: task.abort_handle() }
    }

    /// The requests received so far.
    pub(crate) fn received_requests(&self) -> Vec<ReceivedRequest> {
        self.received.lock().expect("log").clone()
    }

    /// The number of requests whose request line starts with `line`.
    pub(crate) fn count(&self, line: &str) -> usize {
        self.received_requests().iter().filter(|it| it.line.starts_with(line)).count()
    }

    /// A configuration for this server.
    pub(crate) fn config(&self) -> Config {
        config(&format!("http://{}/base/", self.address))
    }
}

impl Drop for ScriptedServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A configuration for `url`.
pub(crate) fn config(url: &str) -> Config {
    Config {
        url: Url::parse(url).expect("url"),
        token_header: hyper::header::AUTHORIZATION,
        extra_headers: Vec::new(),
        request_timeout: Duration::from_secs(30),
        connect_timeout: Duration::from_secs(30),
        keepalive: Duration::from_secs(15),
        certificate_file: None,
        client_certificate: None,
        skip_certificate_verification: false,
        no_proxy: String::new(),
        app_name: "parapet".to_owned(),
        instance_id: "one".to_owned(),
    }
}

async fn read(request: Request<Incoming>) -> Result<ReceivedRequest, hyper::Error> {
    let line = format!("{} {}", request.method(), request.uri());
    let headers = request.headers().clone();
    let body = request.into_body().collect().await?.to_bytes();
    Ok(ReceivedRequest { line, headers, body: String::from_utf8_lossy(&body).into_owned() })
}

/// Maps `~` to a non-ASCII byte, so that a script can put one into a header.
fn tilde_to_non_ascii(byte: u8) -> u8 {
    if byte == b'~' { 0xe9 } else { byte }
}
