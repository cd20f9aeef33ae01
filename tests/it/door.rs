//! The front door as clients, load balancers and attackers meet it: how connections are kept, shared and ended.

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
use tokio::task::JoinSet;

use crate::local::CLIENT;
use crate::rig::{
    Certificate, Driver, Events, Kept, Nginx, Outcome, Parapet, Protocol, Setup, http, node,
    secrets, tests_dir, until,
};

const FLAGS: &str = r#"{"features":[{"name":"a","project":"default","enabled":true,
    "strategies":[{"name":"default"}]}]}"#;

/// The answer to SDKs of servers.
const FEATURES: &str = "/api/client/features";

/// Offline, with a token of each kind.
fn offline() -> Setup {
    secrets::remember(CLIENT);
    let file = tempfile::tempdir().unwrap().keep().join("flags.json");
    std::fs::write(&file, FLAGS).unwrap();
    Parapet::mode("offline").flag("--bootstrap-file", &file).flag("--client-tokens", CLIENT)
}

/// How clients poll.
#[derive(Clone, Copy, Debug)]
struct Polling<'a> {
    /// How many there are of each kind and interval.
    clients: usize,
    /// The milliseconds between an answer and the next request.
    intervals: &'a [u64],
    polls: usize,
}

impl Polling<'_> {
    /// Polls by a driver's clients; returns how many requests went over a connection used before.
    async fn by_driver(self, mut driver: Driver) -> u64 {
        let Self { clients, intervals, polls } = self;
        let how = json!({ "clients": clients, "intervals": intervals, "polls": polls });
        let told = driver.ask("poll", how).await;
        assert_eq!(told["failures"], json!([]));
        let statuses = told["statuses"].as_array().unwrap();
        assert_eq!(statuses.len(), clients * intervals.len() * polls);
        assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
        driver.close().await;
        told["reused"].as_u64().unwrap()
    }

    /// Polls by clients with a pool each, one after the other's answer.
    async fn by_pools(self, url: String, is_http2: bool) {
        let mut all = JoinSet::new();
        for &interval in self.intervals {
            for _ in 0..self.clients {
                let client = Client::builder().no_proxy().pool_idle_timeout(None);
                let client = if is_http2 { client.http2_prior_knowledge() } else { client };
                let (client, url) = (client.build().unwrap(), url.clone());
                all.spawn(async move {
                    let interval = Duration::from_millis(interval);
                    tokio::time::sleep(interval.mul_f64(rand::random())).await;
                    for nth in 0..self.polls {
                        if nth > 0 {
                            tokio::time::sleep(interval).await;
                        }
                        let answer = client.get(&url).header("authorization", CLIENT).send().await;
                        let answer = answer.unwrap_or_else(|error| {
                            panic!("after {interval:?}, HTTP/2 {is_http2}: {error:?}")
                        });
                        assert_eq!(answer.status(), StatusCode::OK);
                        answer.bytes().await.unwrap();
                    }
                });
            }
        }
        all.join_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the npm and Python packages of tests/, see tests/run"]
async fn clients_that_poll_about_when_a_timeout_is_over_are_all_answered() {
    http();
    let parapet = offline().flag("--edge-keepalive-timeout", "4");
    let parapet = parapet.flag("--header-read-timeout-seconds", "2").start().await;
    let polling =
        Polling { clients: 50, intervals: &[1950, 2000, 2050, 3950, 4000, 4050], polls: 4 };
    let url = parapet.url() + FEATURES;
    let options: Value = json!({ "url": url, "token": CLIENT });
    let mut python = tokio::process::Command::new(tests_dir().join(".venv/bin/python"));
    python.arg(tests_dir().join("sdk/poll.py"));
    let (node, python) = tokio::join!(
        Driver::start("Node clients", node("poll.mjs").into(), &options),
        Driver::start("Python clients", python, &options)
    );
    let (by_node, by_python, ..) = tokio::join!(
        polling.by_driver(node),
        polling.by_driver(python),
        polling.by_pools(url.clone(), false),
        polling.by_pools(url.clone(), true)
    );
    // Those who poll before the time is over do so over the connection that they have.
    assert!(by_node > 0 && by_python > 0, "{by_node}, {by_python}");
}

/// Two instances that are restarted one after the other, as their clients find them.
struct Fleet {
    instances: [Parapet; 2],
    is_ready: [AtomicBool; 2],
    nginx: Option<Nginx>,
    /// Of the instances, where they speak TLS, and of nginx.
    certificate: Certificate,
    is_tls: bool,
}

impl Fleet {
    async fn start(is_tls: bool, has_nginx: bool) -> Arc<Self> {
        let certificate = Certificate::new();
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

    /// Where a new connection goes, and whether it speaks TLS: to nginx, or to an instance that was ready when it
    /// was asked last, as in the list of endpoints that Kubernetes keeps.
    fn place(&self, protocol: Protocol) -> (String, bool) {
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

    async fn connect(&self, protocol: Protocol) -> std::io::Result<Kept> {
        let (address, is_tls) = self.place(protocol);
        let tls: Option<Arc<ClientConfig>> =
            is_tls.then(|| self.certificate.client_config(protocol.name()));
        Kept::connect(&address, protocol, tls).await
    }

    /// Keeps the list of those that are ready.
    async fn watch(self: Arc<Self>) {
        loop {
            for (instance, is_ready) in self.instances.iter().zip(&self.is_ready) {
                is_ready.store(instance.is_ready().await, Relaxed);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Restarts each when all are ready.
    async fn roll(&self) {
        for instance in &self.instances {
            until("all are ready", Duration::from_mins(1), async || {
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
    async fn follow(self: Arc<Self>, streams: Arc<Streams>) {
        let (http1, client) = (Protocol::Http1, self.certificate.http());
        loop {
            let (address, is_tls) = self.place(http1);
            let url = format!("http{}://{address}", if is_tls { "s" } else { "" });
            let client = if is_tls { &client } else { http() };
            let request = client.get(url + "/api/client/streaming").header("authorization", CLIENT);
            let mut events = Events::open(request, None).await;
            assert!(events.next().await.is_some(), "a stream begins with the flags");
            streams.open.fetch_add(1, Relaxed);
            while events.next().await.is_some() {}
            streams.open.fetch_sub(1, Relaxed);
            streams.ended.fetch_add(1, Relaxed);
        }
    }
}

/// How many streams are open, and how many have ended.
#[derive(Debug, Default)]
struct Streams {
    open: AtomicUsize,
    ended: AtomicUsize,
}

/// What became of the requests of a load.
#[derive(Debug, Default)]
struct Tally {
    answered: AtomicUsize,
    connections: AtomicUsize,
    failures: Mutex<Vec<String>>,
    stops: AtomicBool,
}

impl Tally {
    fn fail(&self, why: String) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push(why);
    }
}

/// How many requests an HTTP/2 client has under way at once.
const STREAMS: usize = 8;

/// A client that asks for flags, and reports what it has counted now and then, over a connection that it keeps as
/// long as it may.
async fn keep_asking(fleet: Arc<Fleet>, protocol: Protocol, tally: Arc<Tally>) {
    let ask = async |mut kept: Kept, nth: usize| {
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
        match kept.send(request).await {
            Outcome::Answered(status, _) if status.is_success() => {
                tally.answered.fetch_add(1, Relaxed);
            }
            Outcome::Unsent => {}
            other => tally.fail(format!("{protocol:?}, request {nth}: {other:?}")),
        }
        kept
    };
    let (mut kept, mut nth) = (None::<Kept>, 0);
    while !tally.stops.load(Relaxed) {
        let usable = match kept.take() {
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
                Err(error) => return tally.fail(format!("{protocol:?}, no connection: {error}")),
            },
        };
        // None is ready before its settings have come.
        let _ = connection.is_usable().await;
        let shared = (1..STREAMS).filter_map(|_| connection.share()).collect::<Vec<_>>();
        let all = shared.into_iter().chain([connection]).map(|it| {
            nth += 1;
            ask(it, nth)
        });
        kept = join_all(all).await.pop();
    }
}

/// Restarts two instances under load; no request may fail.
async fn check_rolling_restart(is_tls: bool, has_nginx: bool) {
    const CLIENTS: usize = 8;
    const FOLLOWERS: usize = 10;
    const REQUESTS: usize = 5_000;
    let fleet = Fleet::start(is_tls, has_nginx).await;
    let (tally, streams) = (Arc::<Tally>::default(), Arc::<Streams>::default());
    let mut others = JoinSet::new();
    others.spawn(Arc::clone(&fleet).watch());
    for _ in 0..FOLLOWERS {
        others.spawn(Arc::clone(&fleet).follow(Arc::clone(&streams)));
    }
    let mut load = JoinSet::new();
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let clients = if protocol == Protocol::Http1 { CLIENTS } else { CLIENTS / 4 };
        for _ in 0..clients {
            load.spawn(keep_asking(Arc::clone(&fleet), protocol, Arc::clone(&tally)));
        }
    }
    fleet.roll().await;
    let what = "the streams are back, and enough requests are answered";
    until(what, Duration::from_mins(2), async || {
        let failures = tally.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let are_back = streams.open.load(Relaxed) == FOLLOWERS;
        let enough = tally.answered.load(Relaxed) >= REQUESTS;
        (are_back && enough || !failures.is_empty()).then_some(())
    })
    .await;
    tally.stops.store(true, Relaxed);
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
