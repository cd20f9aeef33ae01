//! Connections to upstream through an HTTP proxy, or directly: `HTTP_PROXY`, `NO_PROXY`.

use std::time::Duration;

use reqwest::StatusCode;

use crate::in_process_parapet::CLIENT;
use crate::rig::{ChaosProxy, FEATURES, Parapet, http, wait_until};
use crate::upstream_misconfiguration::start_upstream;

const ADMIN: &str = "*:*.proxy-0123456789abcdef0123456789abcdef0123456789";

/// An HTTP proxy that forwards nothing.
async fn start_http_proxy() -> ChaosProxy {
    let proxy = ChaosProxy::start("http://127.0.0.1:9").await;
    proxy.respond_with(StatusCode::BAD_GATEWAY, &[]).await;
    proxy
}

#[tokio::test]
async fn hosts_in_no_proxy_are_reached_directly() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = start_upstream(&folder, ADMIN).await;
    let port = upstream.admin_url().rsplit(':').next().unwrap().to_owned();
    let check = async |variables: &[(&str, &str)], url: &str| {
        let proxy = start_http_proxy().await;
        let edge = Parapet::edge(url).env("HTTP_PROXY", proxy.url());
        let edge = variables.iter().fold(edge, |edge, (name, value)| edge.env(*name, *value));
        let edge = edge.env("UPSTREAM_ADMIN_TOKEN", ADMIN).spawn();
        wait_until(
            &format!("{variables:?}: flags are served"),
            Duration::from_secs(30),
            async || {
                let request = http().get(edge.url() + FEATURES);
                let response = request.header("authorization", CLIENT).send().await.ok()?;
                (response.status() == StatusCode::OK).then_some(())
            },
        )
        .await;
        assert_eq!(proxy.requests(), [], "{variables:?}");
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
        let proxy = start_http_proxy().await;
        let edge = Parapet::edge(&upstream.admin_url());
        let edge = edge.env("HTTP_PROXY", proxy.url()).env("NO_PROXY", no_proxy);
        let _edge = edge.env("UPSTREAM_ADMIN_TOKEN", ADMIN).spawn();
        wait_until(
            &format!("{no_proxy}: the proxy is used"),
            Duration::from_secs(30),
            async || (!proxy.requests().is_empty()).then_some(()),
        )
        .await;
    }
}
