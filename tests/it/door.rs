//! The front door as clients, load balancers and attackers meet it: how connections are kept, shared and ended.

use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::local::CLIENT;
use crate::rig::{Driver, Parapet, Setup, http, node, secrets, tests_dir};

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
    let polling = Polling {
        clients: 50,
        intervals: &[1950, 2000, 2050, 3950, 4000, 4050],
        polls: 5,
    };
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
