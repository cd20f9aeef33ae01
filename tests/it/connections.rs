//! How connections are kept alive, shared, limited and closed, as clients, load balancers and attackers
//! see it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::Full;
use hyper::Request;
use reqwest::{Client, StatusCode};
use rustls::ClientConfig;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::in_process_parapet::{CLIENT, FRONTEND, InProcessParapet};
use crate::rig::{
    Driver, EventStream, FEATURES, LogEvent, Nginx, Parapet, PersistentConnection, Protocol,
    SelfSignedCertificate, SendOutcome, Setup, StallMode, StalledClient, http, node,
    secret_leak_check, tests_dir, wait_until,
};

const FLAGS: &str = r#"{"features":[{"name":"a","project":"default","enabled":true,
    "strategies":[{"name":"default"}]}]}"#;

/// Offline, with a client token and a frontend token.
fn offline() -> Setup {
    offline_with(FLAGS)
}

fn offline_with(flags: &str) -> Setup {
    secret_leak_check::register(CLIENT);
    secret_leak_check::register(FRONTEND);
    let file = tempfile::tempdir().unwrap().keep().join("flags.json");
    std::fs::write(&file, flags).unwrap();
    let setup = Parapet::mode("offline").flag("--bootstrap-file", &file);
    setup.flag("--client-tokens", CLIENT).flag("--frontend-tokens", FRONTEND)
}

/// A load of polling clients.
#[derive(Clone, Copy, Debug)]
struct PollingLoad<'a> {
    /// The number of clients of each kind and interval.
    clients: usize,
    /// The milliseconds between a response and the next request.
    intervals: &'a [u64],
    polls: usize,
}

impl PollingLoad<'_> {
    /// Polls with a driver's clients. Returns how many requests reused a connection.
    async fn run_with_driver(self, mut driver: Driver) -> u64 {
        let Self { clients, intervals, polls } = self;
        let how = json!({ "clients": clients, "intervals": intervals, "polls": polls });
        let received = driver.call("poll", how).await;
        assert_eq!(received["failures"], json!([]));
        let statuses = received["statuses"].as_array().unwrap();
        assert_eq!(statuses.len(), clients * intervals.len() * polls);
        assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
        driver.close().await;
        received["reused"].as_u64().unwrap()
    }

    /// Polls with reqwest clients, each with its own pool and one request at a time.
    async fn run_with_reqwest(self, url: String, is_http2: bool) {
        let mut all = JoinSet::new();
        for &interval in self.intervals {
            for _ in 0..self.clients {
                // Without the system's certificates, which each client would load.
                let client = Client::builder().no_proxy().tls_certs_only([]);
                let client = client.pool_idle_timeout(None);
                let client = if is_http2 { client.http2_prior_knowledge() } else { client };
                let (client, url) = (client.build().unwrap(), url.clone());
                all.spawn(async move {
                    let interval = Duration::from_millis(interval);
                    tokio::time::sleep(interval.mul_f64(rand::random())).await;
                    for nth in 0..self.polls {
                        if nth > 0 {
                            tokio::time::sleep(interval).await;
                        }
                        let response =
                            client.get(&url).header("authorization", CLIENT).send().await;
                        let response = response.unwrap_or_else(|error| {
                            panic!("after {interval:?}, HTTP/2 {is_http2}: {error:?}")
                        });
                        assert_eq!(response.status(), StatusCode::OK);
                        response.bytes().await.unwrap();
                    }
                });
            }
        }
        all.join_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the npm and Python packages of tests/, see tests/run"]
async fn polling_around_the_idle_timeout_gets_every_response() {
    http();
    // A busy machine delays a client by up to a second, and an idle connection closes two to four
    // seconds after its timeout.
    let parapet = offline().flag("--edge-keepalive-timeout", "16");
    let parapet = parapet.flag("--header-read-timeout-seconds", "8").start().await;
    let polling =
        PollingLoad { clients: 50, intervals: &[7950, 8000, 8050, 15950, 16000, 16050], polls: 3 };
    let url = parapet.url() + FEATURES;
    let options: Value = json!({ "url": url, "token": CLIENT });
    let mut python = tokio::process::Command::new(tests_dir().join(".venv/bin/python"));
    python.arg(tests_dir().join("sdk/poll.py"));
    let (node, python) = tokio::join!(
        Driver::start("Node clients", node("poll.mjs").into(), &options),
        Driver::start("Python clients", python, &options)
    );
    let (by_node, by_python, ..) = tokio::join!(
        polling.run_with_driver(node),
        polling.run_with_driver(python),
        polling.run_with_reqwest(url.clone(), false),
        polling.run_with_reqwest(url.clone(), true)
    );
    // Clients that poll before the timeout reuse their connection.
    assert!(by_node > 0 && by_python > 0, "{by_node}, {by_python}");
}

/// Two instances that are restarted one after the other, and how clients find them.
struct Fleet {
    instances: [Parapet; 2],
    is_ready: [AtomicBool; 2],
    nginx: Option<Nginx>,
    /// The certificate of nginx, and of the instances if they use TLS.
    certificate: SelfSignedCertificate,
    is_tls: bool,
}

impl Fleet {
    async fn start(is_tls: bool, has_nginx: bool) -> Arc<Self> {
        let certificate = SelfSignedCertificate::new();
        let start = async || {
            let setup = offline().flag("--drain-delay-seconds", "2");
            let setup = setup.flag("--shutdown-timeout-seconds", "10");
            if is_tls { setup.tls(&certificate).start().await } else { setup.start().await }
        };
        let instances = [start().await, start().await];
        let addresses = instances.each_ref().map(Parapet::address);
        let nginx = if has_nginx {
            Some(Nginx::start(&addresses, is_tls, &certificate).await)
        } else {
            None
        };
        let is_ready = [true, true].map(AtomicBool::new);
        Arc::new(Self { instances, is_ready, nginx, certificate, is_tls })
    }

    /// Where a new connection goes, and whether it uses TLS: to nginx, or to an instance that was ready
    /// at the last check, like the endpoints list of Kubernetes.
    fn pick_endpoint(&self, protocol: Protocol) -> (String, bool) {
        if let Some(nginx) = &self.nginx {
            return match protocol {
                _ if self.is_tls => (nginx.tls(), true),
                Protocol::Http1 => (nginx.http1(), false),
                Protocol::Http2 => (nginx.http2(), false),
            };
        }
        let ready = self.is_ready.iter().zip(&self.instances).filter(|(it, _)| it.load(Relaxed));
        let ready: Vec<_> = ready.map(|(_, instance)| instance).collect();
        assert!(!ready.is_empty(), "one is ready at any time");
        (ready[rand::random_range(0..ready.len())].address(), self.is_tls)
    }

    async fn connect(&self, protocol: Protocol) -> std::io::Result<PersistentConnection> {
        let (address, is_tls) = self.pick_endpoint(protocol);
        let tls: Option<Arc<ClientConfig>> =
            is_tls.then(|| self.certificate.client_config(protocol.alpn_name()));
        PersistentConnection::connect(&address, protocol, tls).await
    }

    /// Updates the list of ready instances.
    async fn watch_readiness(self: Arc<Self>) {
        loop {
            for (instance, is_ready) in self.instances.iter().zip(&self.is_ready) {
                is_ready.store(instance.is_ready().await, Relaxed);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Restarts each instance once all are ready.
    async fn rolling_restart(&self) {
        for instance in &self.instances {
            wait_until("all are ready", Duration::from_mins(1), async || {
                self.is_ready.iter().all(|it| it.load(Relaxed)).then_some(())
            })
            .await;
            let status = instance.terminate().await;
            assert!(status.success(), "{}", instance.log());
            instance.restart();
            instance.wait_until_ready().await;
        }
    }

    /// Follows changes on one stream after the other.
    async fn follow_streams(self: Arc<Self>, streams: Arc<StreamCounts>) {
        let (http1, client) = (Protocol::Http1, self.certificate.http());
        loop {
            let (address, is_tls) = self.pick_endpoint(http1);
            let url = format!("http{}://{address}", if is_tls { "s" } else { "" });
            let client = if is_tls { &client } else { http() };
            let request = client.get(url + "/api/client/streaming").header("authorization", CLIENT);
            let mut events = EventStream::open(request, None).await;
            assert!(events.next().await.is_some(), "a stream begins with the flags");
            streams.open.fetch_add(1, Relaxed);
            while events.next().await.is_some() {}
            streams.open.fetch_sub(1, Relaxed);
            streams.ended.fetch_add(1, Relaxed);
        }
    }
}

/// The number of open streams, and of those that have ended.
#[derive(Debug, Default)]
struct StreamCounts {
    open: AtomicUsize,
    ended: AtomicUsize,
}

/// The results of a load.
#[derive(Debug, Default)]
struct LoadResult {
    succeeded: AtomicUsize,
    connections: AtomicUsize,
    failures: Mutex<Vec<String>>,
    is_stopping: AtomicBool,
}

impl LoadResult {
    fn record_failure(&self, why: String) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push(why);
    }
}

/// The number of concurrent requests of an HTTP/2 client.
const CONCURRENT_REQUESTS: usize = 8;

/// A client that fetches flags, and sometimes reports usage, over a connection that it keeps as long as
/// possible.
async fn run_client(fleet: Arc<Fleet>, protocol: Protocol, tally: Arc<LoadResult>) {
    let send_request = async |mut connection: PersistentConnection, nth: usize| {
        let request = Request::builder().header("authorization", CLIENT);
        let request = if nth.is_multiple_of(8) {
            let report = json!({ "appName": "door", "instanceId": "1", "bucket": {
                "start": "2026-01-01T00:00:00Z", "stop": "2026-01-01T00:00:00Z", "toggles": {} } });
            let post = request.method("POST").uri("/api/client/metrics");
            let post = post.header("content-type", "application/json");
            post.body(Full::new(Bytes::from(report.to_string()))).unwrap()
        } else {
            request.uri(FEATURES).body(Full::default()).unwrap()
        };
        match connection.send(request).await {
            SendOutcome::Response(status, _) if status.is_success() => {
                tally.succeeded.fetch_add(1, Relaxed);
            }
            SendOutcome::NotSent => {}
            other => tally.record_failure(format!("{protocol:?}, request {nth}: {other:?}")),
        }
        connection
    };
    let (mut idle, mut nth) = (None::<PersistentConnection>, 0);
    while !tally.is_stopping.load(Relaxed) {
        let usable = match idle.take() {
            Some(mut connection) => connection.is_usable().await.then_some(connection),
            None => None,
        };
        let mut connection = match usable {
            Some(connection) => connection,
            None => match fleet.connect(protocol).await {
                Ok(connection) => {
                    tally.connections.fetch_add(1, Relaxed);
                    connection
                }
                Err(error) => {
                    return tally.record_failure(format!("{protocol:?}, no connection: {error}"));
                }
            },
        };
        // It is not ready before it has received the server's settings.
        let _ = connection.is_usable().await;
        let shared =
            (1..CONCURRENT_REQUESTS).filter_map(|_| connection.try_clone()).collect::<Vec<_>>();
        let all = shared.into_iter().chain([connection]).map(|it| {
            nth += 1;
            send_request(it, nth)
        });
        idle = join_all(all).await.pop();
    }
}

/// Restarts two instances under load; no request may fail.
async fn check_rolling_restart(is_tls: bool, has_nginx: bool) {
    const CLIENTS: usize = 8;
    const FOLLOWERS: usize = 10;
    const REQUESTS: usize = 5_000;
    let fleet = Fleet::start(is_tls, has_nginx).await;
    let (tally, streams) = (Arc::<LoadResult>::default(), Arc::<StreamCounts>::default());
    let mut others = JoinSet::new();
    others.spawn(Arc::clone(&fleet).watch_readiness());
    for _ in 0..FOLLOWERS {
        others.spawn(Arc::clone(&fleet).follow_streams(Arc::clone(&streams)));
    }
    let mut load = JoinSet::new();
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let clients = if protocol == Protocol::Http1 { CLIENTS } else { CLIENTS / 4 };
        for _ in 0..clients {
            load.spawn(run_client(Arc::clone(&fleet), protocol, Arc::clone(&tally)));
        }
    }
    fleet.rolling_restart().await;
    let what = "the streams are back, and enough requests are answered";
    wait_until(what, Duration::from_mins(2), async || {
        let failures = tally.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let are_back = streams.open.load(Relaxed) == FOLLOWERS;
        let enough = tally.succeeded.load(Relaxed) >= REQUESTS;
        (are_back && enough || !failures.is_empty()).then_some(())
    })
    .await;
    tally.is_stopping.store(true, Relaxed);
    load.join_all().await;
    while let Some(ended) = others.try_join_next() {
        ended.unwrap();
    }
    let failures = tally.failures.lock().unwrap_or_else(PoisonError::into_inner);
    let log = fleet.nginx.as_ref().map(Nginx::log).unwrap_or_default();
    assert!(failures.is_empty(), "{} failed: {failures:#?}\n{log}", failures.len());
    assert!(streams.ended.load(Relaxed) >= FOLLOWERS, "{streams:?}");
    if fleet.nginx.is_none() {
        let moved = tally.connections.load(Relaxed);
        assert!(moved > CLIENTS + CLIENTS / 4, "{moved} connections: none has moved");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn rolling_restart_loses_no_request_of_clients_that_choose_ready_instances() {
    tokio::join!(check_rolling_restart(false, false), check_rolling_restart(true, false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "needs nginx, see tests/run"]
async fn rolling_restart_loses_no_request_behind_nginx() {
    tokio::join!(check_rolling_restart(false, true), check_rolling_restart(true, true));
}

/// The timeout for anything that ends by itself.
const TIMEOUT: Duration = Duration::from_mins(2);

/// Flags that are each on for half of all users, a different half for each flag.
fn many_flags(count: usize) -> String {
    let parameters = json!({ "rollout": "50", "stickiness": "userId" });
    let flag = |nth: usize| {
        let mut parameters = parameters.clone();
        parameters["groupId"] = json!(format!("group-{nth}"));
        json!({ "name": format!("flag-of-a-usual-name-{nth}-{}", "x".repeat(100)), "enabled": true,
                "project": "default",
                "strategies": [{ "name": "flexibleRollout", "parameters": parameters }] })
    };
    json!({ "version": 2, "features": (0..count).map(flag).collect::<Vec<_>>() }).to_string()
}

/// The path of a user's request.
fn user_request_path(nth: usize) -> String {
    format!("/api/frontend?userId={nth}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unread_http2_responses_use_bounded_memory_and_time_out() {
    const CONNECTIONS: usize = 20;
    const REQUESTS: usize = 200;
    /// In KiB.
    const MIB: u64 = 1024;
    let parapet = offline_with(&many_flags(2000)).start().await;
    let fetch = async |number: usize| {
        let request = http().get(parapet.url() + &user_request_path(number));
        let response = request.header("authorization", FRONTEND).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        response.bytes().await.unwrap().len()
    };
    let length = fetch(usize::MAX).await;
    assert!(length > 150_000, "{length}");
    let before = parapet.proc_status("VmRSS");

    let mut few = StalledClient::send(
        &parapet.address(),
        StallMode::ZeroWindow,
        FRONTEND,
        (0..3).map(user_request_path),
    )
    .await;
    let (address, mut users) = (parapet.address(), (3..).map(user_request_path));
    let mut hold = async |how: StallMode| {
        let mut all = Vec::new();
        for _ in 0..CONNECTIONS / 2 {
            let metrics = (0..REQUESTS / 10).map(|_| "/internal-backstage/metrics".to_owned());
            all.push(StalledClient::send(&address, how, "", metrics).await);
            let users = users.by_ref().take(REQUESTS);
            all.push(StalledClient::send(&address, how, FRONTEND, users).await);
        }
        all
    };
    let gone = hold(StallMode::ZeroWindow).await;
    let unread = hold(StallMode::NoReads).await;
    // Other clients are served meanwhile.
    for nth in 0..20 {
        fetch(usize::MAX - nth).await;
    }
    drop(gone);
    wait_until("the memory is freed, even that of unread connections", TIMEOUT, async || {
        (parapet.proc_status("VmRSS") < before + 32 * MIB).then_some(())
    })
    .await;
    drop(unread);
    let most = parapet.proc_status("VmHWM");
    assert!(most < 250 * MIB, "{most} KiB at the most, {before} before");

    let resets = std::mem::take(&mut few.responses).into_iter().map(async |response| {
        let mut body = response.await.unwrap().into_body();
        body.data().await.map(|data| data.unwrap_err().reason())
    });
    let resets = tokio::time::timeout(TIMEOUT, join_all(resets)).await.unwrap();
    assert_eq!(resets, [Some(Some(h2::Reason::CANCEL)); 3]);
}

#[tokio::test]
async fn idle_http2_connection_closes_despite_pings() {
    let parapet = InProcessParapet::offline_with(FLAGS, &["--edge-keepalive-timeout", "1"]).await;
    let stream = TcpStream::connect(parapet.address()).await.unwrap();
    let (mut sender, mut connection) = h2::client::handshake(stream).await.unwrap();
    let mut pings = connection.ping_pong().unwrap();
    let connection = tokio::spawn(connection);
    let request = Request::get("http://a/nothing").body(()).unwrap();
    let response = sender.send_request(request, true).unwrap().0.await.unwrap();
    assert_eq!(response.status(), StatusCode::NOT_FOUND);
    let mut answered = 0;
    let pinging = async {
        while pings.ping(h2::Ping::opaque()).await.is_ok() {
            answered += 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, pinging).await.expect("the connection ends");
    assert!(answered > 10, "{answered}: it ended before");
    connection.await.unwrap().unwrap();
}

#[tokio::test]
async fn idle_connections_leave_file_descriptors_for_probes() {
    const IDLE: usize = 300;
    let parapet = offline().limit_fds(256, 256).start().await;
    let mut idle = Vec::new();
    for nth in 0..IDLE {
        let mut stream = TcpStream::connect(parapet.address()).await.unwrap();
        // Half of them have been used.
        if nth % 2 == 0 {
            stream.write_all(b"GET /nothing HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await;
        }
        idle.push(stream);
        if nth % 20 == 19 {
            assert!(parapet.is_healthy().await && parapet.is_ready().await, "with {nth} more");
        }
    }
    assert_eq!(parapet.features_status(CLIENT).await, StatusCode::OK);
    assert_eq!(parapet.fd_limit(), 256);
    assert_eq!(parapet.logged(LogEvent::warn("app::file_descriptors")).len(), 1);
    assert!(parapet.logged(LogEvent::warn("server")).is_empty(), "{}", parapet.log());
    drop(idle);

    let parapet = offline().limit_fds(64, 512).start().await;
    assert_eq!(parapet.fd_limit(), 512, "it is raised");
}

/// Connects from `127.0.0.<host>`.
async fn connect_from(host: u8, address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::new(127, 0, 0, host), 0).into()).unwrap();
    socket.connect(address).await.unwrap()
}

#[tokio::test]
async fn one_address_cannot_exhaust_connections_of_others() {
    let limits = ["--max-connections", "20", "--max-connections-per-address", "15"];
    let parapet = InProcessParapet::offline_with(FLAGS, &limits).await;
    let begun = format!(
        "POST /api/frontend HTTP/1.1\r\nhost: a\r\nauthorization: {FRONTEND}\r\n\
         content-length: 2\r\nexpect: 100-continue\r\n\r\n"
    );
    let mut streams = Vec::new();
    for _ in 0..40 {
        let mut stream = connect_from(2, parapet.address()).await;
        let _ = stream.write_all(begun.as_bytes()).await;
        // Either it is busy from now on, so that it is not closed for another connection, or it is
        // refused.
        let mut received = [0; "HTTP/1.1 100 Continue\r\n\r\n".len()];
        if stream.read_exact(&mut received).await.is_ok() {
            streams.push(stream);
        }
    }
    assert_eq!(streams.len(), 15, "it has its share");
    let mut other = connect_from(3, parapet.address()).await;
    other.write_all(b"GET /internal-backstage/health HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut status = [0; 12];
    other.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 200");
    for mut stream in streams {
        stream.write_all(b"{}").await.unwrap();
        stream.read_exact(&mut status).await.unwrap();
        assert_eq!(&status, b"HTTP/1.1 200");
    }
}

/// A request for evaluated flags that closes the connection.
fn last_request(token: &str) -> Vec<u8> {
    let head = "GET /api/frontend HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n";
    format!("{head}authorization: {token}\r\n\r\n").into_bytes()
}

/// Sends these bytes and returns everything that the server sends.
async fn send_raw(mut io: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) -> String {
    // The server may close the connection before it has read everything.
    let _ = io.write_all(bytes).await;
    let mut back = Vec::new();
    let _ = tokio::time::timeout(TIMEOUT, io.read_to_end(&mut back)).await.expect("it ends");
    String::from_utf8(back).unwrap()
}

#[tokio::test]
async fn proxy_protocol_address_is_used_from_trusted_balancers() {
    const BALANCER: u8 = 2;
    const STRANGER: u8 = 3;
    const OFFICE: [u8; 4] = [192, 0, 2, 7];
    const ELSEWHERE: [u8; 4] = [192, 0, 2, 8];
    const DENIED: [u8; 4] = [192, 0, 2, 66];
    let flags = r#"{"features":[{"name":"in-the-office","project":"default","enabled":true,
        "strategies":[{"name":"remoteAddress","parameters":{"IPs":"192.0.2.7"}}]}]}"#;
    let certificate = SelfSignedCertificate::new();
    let (file, key) = (certificate.file(), certificate.key_file());
    let arguments = ["--proxy-protocol", "--proxy-trusted-servers", "127.0.0.2"];
    let arguments = [&arguments[..], &["--deny-list", "192.0.2.66"]].concat();
    let tls = ["--tls-enable", "--tls-server-port", "0"];
    let files = ["--tls-server-cert", file.to_str().unwrap()];
    let files = [&files[..], &["--tls-server-key", key.to_str().unwrap()]].concat();
    let plain = InProcessParapet::offline_with(flags, &arguments).await;
    let encrypted =
        InProcessParapet::offline_with(flags, &[&arguments[..], &tls, &files].concat()).await;

    let version_1 = |[a, b, c, d]: [u8; 4]| {
        format!("PROXY TCP4 {a}.{b}.{c}.{d} 127.0.0.1 50000 443\r\n").into_bytes()
    };
    let version_2 = |address: [u8; 4]| {
        let begin = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c";
        [&begin[..], &address, &[127, 0, 0, 1, 0xc3, 0x50, 1, 0xbb]].concat()
    };
    let fetch = async |is_tls: bool, host: u8, header: &[u8]| {
        let parapet = if is_tls { &encrypted } else { &plain };
        let mut stream = connect_from(host, parapet.address()).await;
        if !is_tls {
            return send_raw(stream, &[header, &last_request(FRONTEND)].concat()).await;
        }
        stream.write_all(header).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(certificate.client_config("http/1.1"));
        match connector.connect("localhost".try_into().unwrap(), stream).await {
            Ok(stream) => send_raw(stream, &last_request(FRONTEND)).await,
            Err(_) => String::new(),
        }
    };
    for is_tls in [false, true] {
        for header in [&version_1 as &dyn Fn([u8; 4]) -> Vec<u8>, &version_2] {
            let response = fetch(is_tls, BALANCER, &header(OFFICE)).await;
            assert!(response.starts_with("HTTP/1.1 200") && response.contains("in-the-office"));
            let response = fetch(is_tls, BALANCER, &header(ELSEWHERE)).await;
            assert!(response.starts_with("HTTP/1.1 200") && !response.contains("in-the-office"));
            let response = fetch(is_tls, BALANCER, &header(DENIED)).await;
            assert!(response.starts_with("HTTP/1.1 403"), "{response}");

            let response = fetch(is_tls, STRANGER, &header(OFFICE)).await;
            let expect = if is_tls { "" } else { "HTTP/1.1 400" };
            assert_eq!(
                response.get(..12).unwrap_or_default(),
                expect,
                "it is malformed: {response}"
            );
        }
        assert_eq!(fetch(is_tls, BALANCER, b"").await, "", "a header is missing");
        let response = fetch(is_tls, STRANGER, b"").await;
        assert!(response.starts_with("HTTP/1.1 200") && !response.contains("in-the-office"));
    }
}
