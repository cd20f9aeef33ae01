//! Ports, the HTTP client and polling, for the rig and the tests themselves. No protocol lives here.

use std::net::TcpListener;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use reqwest::{RequestBuilder, Response, StatusCode};
use serde_json::Value;

use super::secret_leak_check;

/// Ports that the rig assigns. They are below the range of the kernel's ephemeral ports, so that a
/// restarted server finds its port still free.
const PORT_RANGE: std::ops::Range<u16> = 12_000..32_000;

/// A loopback port that is free at the moment and that this process has not assigned recently.
pub(crate) fn free_port() -> u16 {
    static NEXT: LazyLock<AtomicU16> = LazyLock::new(|| {
        // Test processes that run concurrently start at different ports.
        let spread =
            std::process::id().wrapping_mul(97) % u32::from(PORT_RANGE.end - PORT_RANGE.start);
        AtomicU16::new(u16::try_from(spread).expect("the spread is below the number of ports"))
    });
    loop {
        let offset = NEXT.fetch_add(1, Ordering::Relaxed) % (PORT_RANGE.end - PORT_RANGE.start);
        let port = PORT_RANGE.start + offset;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// The HTTP client of the tests: bodies as sent (nothing is decompressed), no redirects, no proxies.
///
/// It keeps no idle connections: each test has its own runtime, and a connection must not outlive the
/// runtime that made it.
pub(crate) fn http() -> &'static reqwest::Client {
    static CLIENT: LazyLock<reqwest::Client> = LazyLock::new(|| {
        // Fails if another thread was faster, with the same provider: the tree has only one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        reqwest::Client::builder()
            .pool_max_idle_per_host(0)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .no_gzip()
            .no_brotli()
            .no_zstd()
            .timeout(Duration::from_secs(30) * BUSY_MACHINE_FACTOR)
            .build()
            .unwrap()
    });
    &CLIENT
}

/// Sends a request, with this JSON as its body unless it is `Null`. Returns the status and the JSON of the
/// response, which is `Null` if there is none.
pub(crate) async fn send_json(request: RequestBuilder, body: &Value) -> (StatusCode, Value) {
    let request = if body.is_null() {
        request
    } else {
        request.header("content-type", "application/json").body(body.to_string())
    };
    let response = request.send().await.unwrap();
    let (status, body) = (response.status(), response.bytes().await.unwrap());
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

/// The cookies that a response sets, as a client sends them back. Their values become secrets.
pub(crate) fn session_cookies(response: &Response) -> String {
    let cookies = response.headers().get_all("set-cookie").iter();
    let cookies = cookies.map(|cookie| {
        let (pair, _) = cookie.to_str().unwrap().split_once(';').unwrap();
        secret_leak_check::register(pair.split_once('=').unwrap().1);
        pair
    });
    cookies.collect::<Vec<_>>().join("; ")
}

/// How much longer a busy machine may take than an idle one: a test fails because something does not
/// happen, and not because it happens late.
pub(crate) const BUSY_MACHINE_FACTOR: u32 = 5;

/// Calls `poll` every 50 ms until it returns `Some`. Panics with `what` after [`BUSY_MACHINE_FACTOR`]
/// times `limit`, which is what an idle machine needs at most.
pub(crate) async fn wait_until<T>(
    what: &str,
    limit: Duration,
    mut poll: impl AsyncFnMut() -> Option<T>,
) -> T {
    let limit = limit * BUSY_MACHINE_FACTOR;
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = poll().await {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {limit:?} in vain: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
