//! Connections to upstream through an HTTP proxy, or directly: `HTTP_PROXY`, `NO_PROXY`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::StatusCode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::in_process_parapet::CLIENT;
use crate::rig::{Parapet, http, wait_until};
use crate::upstream_misconfiguration::start_upstream;

const ADMIN: &str = "*:*.proxy-0123456789abcdef0123456789abcdef0123456789";

/// A proxy that counts connections and forwards nothing.
struct CountingProxy {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl CountingProxy {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::<AtomicUsize>::default();
        let counter = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move {
                    let _ = stream.read(&mut [0; 4096]).await;
                    let refusal = "HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                    let _ = stream.write_all(refusal.as_bytes()).await;
                });
            }
        });
        Self { address, connections }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

#[tokio::test]
async fn hosts_in_no_proxy_are_reached_directly() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = start_upstream(&folder, ADMIN).await;
    let port = upstream.admin_url().rsplit(':').next().unwrap().to_owned();
    let check = async |variables: &[(&str, &str)], url: &str| {
        let proxy = CountingProxy::start().await;
        let edge = Parapet::edge(url).env("HTTP_PROXY", format!("http://{}", proxy.address));
        let edge = variables.iter().fold(edge, |edge, (name, value)| edge.env(*name, *value));
        let edge = edge.env("UPSTREAM_ADMIN_TOKEN", ADMIN).spawn();
        wait_until(
            &format!("{variables:?}: flags are served"),
            Duration::from_secs(30),
            async || {
                let request = http().get(edge.url() + "/api/client/features");
                let answer = request.header("authorization", CLIENT).send().await.ok()?;
                (answer.status() == StatusCode::OK).then_some(())
            },
        )
        .await;
        assert_eq!(proxy.connections(), 0, "{variables:?}");
    };
    let by_address = upstream.admin_url();
    let by_name = by_address.replace("127.0.0.1", "localhost");
    let host_and_port = format!("other.example:1,127.0.0.1:{port}");
    check(&[("NO_PROXY", "*")], &by_address).await;
    check(&[("no_proxy", "*")], &by_address).await;
    check(&[("NO_PROXY", "other.example, *")], &by_address).await;
    check(&[("NO_PROXY", ""), ("no_proxy", "127.0.0.0/8")], &by_address).await;
    check(&[("NO_PROXY", &host_and_port)], &by_address).await;
    check(&[("NO_PROXY", "*")], &by_name).await;
    check(&[("NO_PROXY", "LOCALHOST")], &by_name).await;
}

#[tokio::test]
async fn proxy_is_used_for_hosts_not_in_no_proxy() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = start_upstream(&folder, ADMIN).await;
    for no_proxy in ["", "10.0.0.0/8,example.com", "127.0.0.1:1", "host"] {
        let proxy = CountingProxy::start().await;
        let edge = Parapet::edge(&upstream.admin_url());
        let edge =
            edge.env("HTTP_PROXY", format!("http://{}", proxy.address)).env("NO_PROXY", no_proxy);
        let _edge = edge.env("UPSTREAM_ADMIN_TOKEN", ADMIN).spawn();
        wait_until(
            &format!("{no_proxy}: the proxy is used"),
            Duration::from_secs(30),
            async || (proxy.connections() > 0).then_some(()),
        )
        .await;
    }
}
