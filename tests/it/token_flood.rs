//! A flood of made-up tokens has a bounded cost in upstream requests and memory, and does not affect
//! clients with a valid token.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::json;
use tokio::task::JoinSet;

use crate::rig::{FEATURES, Parapet, ScriptedUpstream, http, wait_until};

/// Made-up tokens, each well-formed and unique: this many in request headers, and in requests to
/// `/edge/validate`, which need no token, this many in each.
const TOKENS_IN_HEADERS: usize = 20_000;
const VALIDATE_REQUESTS: usize = 80;
const TOKENS_PER_VALIDATE_REQUEST: usize = 1000;
const TOTAL_TOKENS: usize = TOKENS_IN_HEADERS + VALIDATE_REQUESTS * TOKENS_PER_VALIDATE_REQUEST;

/// The attacker's connections, the concurrent requests on each, and the concurrent validation requests.
/// The latter need more tokens validated at a time than the 5,000 that may wait for such requests.
const CONNECTIONS: usize = 20;
const REQUESTS_PER_CONNECTION: usize = 100;
const CONCURRENT_VALIDATE_REQUESTS: usize = 12;

/// The limit for upstream requests about first-seen tokens: this many at once, and this many more per
/// second.
const BURST: usize = 20;
const PER_SECOND: f64 = 10.0;

/// The limit for the memory of the flood, in KiB, including requests in progress.
const MAX_MEMORY_KIB: u64 = 128 * 1024;

const VALID_TOKEN: &str = "*:development.valid-and-known-0123456789abcdef";

/// The responses to the attacker: the number of rejected tokens, and of those that were turned away
/// without validation.
type StatusCounts = BTreeMap<StatusCode, usize>;

fn made_up_token() -> String {
    format!("*:development.{:032x}{:024x}", rand::random::<u128>(), rand::random::<u64>())
}

/// Takes one and returns true, unless nothing is left.
fn take_one(left: &AtomicUsize) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |it| it.checked_sub(1)).is_ok()
}

/// Sends tokens in headers, on one connection.
fn send_token_requests(
    parapet: &Parapet,
    left: &Arc<AtomicUsize>,
    attackers: &mut JoinSet<StatusCounts>,
) {
    let client = reqwest::Client::builder().http2_prior_knowledge().no_proxy().build().unwrap();
    let url: reqwest::Url = (parapet.url() + FEATURES).parse().unwrap();
    for _ in 0..REQUESTS_PER_CONNECTION {
        let (client, url, left) = (client.clone(), url.clone(), Arc::clone(left));
        attackers.spawn(async move {
            let mut statuses = StatusCounts::new();
            while take_one(&left) {
                let request = client.get(url.clone()).header("authorization", made_up_token());
                *statuses.entry(request.send().await.unwrap().status()).or_default() += 1;
            }
            statuses
        });
    }
}

/// Sends validation requests with many tokens each.
fn send_validate_requests(
    parapet: &Parapet,
    left: &Arc<AtomicUsize>,
    attackers: &mut JoinSet<StatusCounts>,
) {
    let (url, left) = (parapet.url() + "/edge/validate", Arc::clone(left));
    attackers.spawn(async move {
        let mut statuses = StatusCounts::new();
        while take_one(&left) {
            let tokens: Vec<_> =
                (0..TOKENS_PER_VALIDATE_REQUEST).map(|_| made_up_token()).collect();
            let request = http().post(&url).body(json!({ "tokens": tokens }).to_string());
            let response = request.send().await.unwrap();
            let status = response.status();
            if status == StatusCode::OK {
                assert_eq!(response.text().await.unwrap(), r#"{"tokens":[]}"#);
            }
            *statuses.entry(status).or_default() += TOKENS_PER_VALIDATE_REQUEST;
        }
        statuses
    });
}

async fn sum_status_counts(mut parts: JoinSet<StatusCounts>) -> StatusCounts {
    let mut sum = StatusCounts::new();
    while let Some(part) = parts.join_next().await {
        for (status, count) in part.unwrap() {
            *sum.entry(status).or_default() += count;
        }
    }
    sum
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flood_of_made_up_tokens_is_bounded_and_does_not_affect_valid_clients() {
    let upstream = ScriptedUpstream::start().await;
    upstream.set_flags("*", &["default/a"]);
    upstream.state().valid_tokens_contain = ".valid-";
    let parapet = Parapet::edge(&upstream.url()).env("TOKENS", VALID_TOKEN).start().await;
    assert_eq!(parapet.features_status(VALID_TOKEN).await, StatusCode::OK);

    let validations_before = upstream.requests("/edge/validate").len();
    let memory_before = parapet.proc_status("VmRSS");
    let begin = Instant::now();
    let headers = Arc::new(AtomicUsize::new(TOKENS_IN_HEADERS));
    let validate_requests = Arc::new(AtomicUsize::new(VALIDATE_REQUESTS));
    let mut attackers = JoinSet::new();
    for _ in 0..CONNECTIONS {
        send_token_requests(&parapet, &headers, &mut attackers);
    }
    for _ in 0..CONCURRENT_VALIDATE_REQUESTS {
        send_validate_requests(&parapet, &validate_requests, &mut attackers);
    }

    let is_over = AtomicBool::new(false);
    let known = async {
        let mut served = 0_usize;
        while !is_over.load(Ordering::Relaxed) {
            assert_eq!(parapet.features_status(VALID_TOKEN).await, StatusCode::OK);
            served += 1;
        }
        served
    };
    let fresh = async {
        let mut accepted = 0;
        let url = parapet.url() + FEATURES;
        while headers.load(Ordering::Relaxed) > 0 {
            let token = format!("*:development.valid-and-fresh-{accepted}");
            wait_until("a fresh token is accepted", Duration::from_mins(1), async || {
                let request = http().get(&url).header("authorization", &token);
                let response = request.send().await.unwrap();
                let status = response.status();
                // At the limit a new token gets 503 with a retry hint, never 401.
                let is_busy = status == StatusCode::SERVICE_UNAVAILABLE;
                assert!(is_busy || status == StatusCode::OK, "{status}");
                assert_eq!(response.headers().contains_key("retry-after"), is_busy);
                (!is_busy).then_some(())
            })
            .await;
            accepted += 1;
        }
        accepted
    };
    let statuses = async {
        let statuses = sum_status_counts(attackers).await;
        is_over.store(true, Ordering::Relaxed);
        statuses
    };
    let (statuses, served, accepted) = tokio::join!(statuses, known, fresh);
    let took = begin.elapsed();
    let validations = upstream.requests("/edge/validate").len() - validations_before;
    let peak = parapet.proc_status("VmHWM").saturating_sub(memory_before);
    println!(
        "{TOTAL_TOKENS} tokens in {took:?}: {statuses:?}; {validations} validations; {peak} KiB; {served} known, {accepted} fresh served"
    );

    assert_eq!(statuses.values().sum::<usize>(), TOTAL_TOKENS);
    // Rejected in a header, missing from a validation response, or turned away without validation.
    let known = [StatusCode::UNAUTHORIZED, StatusCode::OK, StatusCode::SERVICE_UNAVAILABLE];
    assert!(statuses.keys().all(|status| known.contains(status)), "{statuses:?}");
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a flood of seconds"
    )]
    let bound = BURST + (PER_SECOND * took.as_secs_f64()).ceil() as usize;
    assert!(validations <= bound, "{validations} validations in {took:?}, more than {bound}");
    assert!(peak <= MAX_MEMORY_KIB, "{peak} KiB more than before, allowed are {MAX_MEMORY_KIB}");
    assert!(served > 0 && accepted > 0, "{served} known, {accepted} fresh");
    assert!(upstream.state().requests.iter().all(|it| !it.path.contains("admin")));
}
