//! The cost of cheap attacks by clients without a token or with a public one, and their effect on other
//! clients.

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde_json::json;

use crate::in_process_parapet::{CLIENT, FRONTEND, InProcessParapet};
use crate::rig::{Parapet, secret_leak_check, wait_until};

const FLAGS: &str =
    r#"{"features":[{"name":"a","enabled":true,"strategies":[{"name":"default"}]}]}"#;

/// Offline, with a client token and a frontend token.
async fn offline() -> Parapet {
    secret_leak_check::register(CLIENT);
    secret_leak_check::register(FRONTEND);
    let folder = tempfile::tempdir().unwrap().keep();
    let file = folder.join("flags.json");
    std::fs::write(&file, FLAGS).unwrap();
    let parapet = Parapet::mode("offline").flag("--bootstrap-file", &file);
    parapet.flag("--client-tokens", CLIENT).flag("--frontend-tokens", FRONTEND).start().await
}

/// A client at `127.0.0.<host>`.
fn client_at(host: u8) -> Client {
    let address = Ipv4Addr::new(127, 0, 0, host);
    Client::builder().no_proxy().local_address(Some(address.into())).build().unwrap()
}

/// Compresses this many bytes of a repeated text into a few dozen bytes.
fn compression_bomb(text: &str, bytes: usize) -> Vec<u8> {
    let mut encoder = brotli::CompressorWriter::new(Vec::new(), 4096, 11, 24);
    encoder.write_all(text.repeat(bytes / text.len()).as_bytes()).unwrap();
    encoder.into_inner()
}

#[tokio::test]
async fn compression_bombs_are_cheap_to_reject_and_throttle_their_sender() {
    /// About the number of rejected requests that one address may send at once.
    const REQUESTS: usize = 150;
    let parapet = offline().await;
    let post = async |client: &Client, path: &str, coding: &'static str, body: Vec<u8>| {
        let request = client.post(parapet.url() + path).header("content-encoding", coding);
        request.header("content-type", "application/json").body(body).send().await.unwrap().status()
    };
    let (attacker, other) = (client_at(2), client_at(3));
    // Two megabytes, the start of a list of 700,000 texts.
    let bombs = ["\"\",", " ", "[", "{\"tokens\":[\"\",\"\",\"\","]
        .map(|text| compression_bomb(text, 2 << 20));
    assert!(bombs.iter().all(|bomb| bomb.len() < 100));
    let list = format!(r#"{{"tokens":["{}"]}}"#, [""; 1001].join(r#"",""#));
    let ordinary = format!(r#"{{"tokens":["{CLIENT}"]}}"#);

    let before = parapet.cpu_time();
    for _ in 0..REQUESTS {
        let status = post(&other, "/edge/validate", "", ordinary.clone().into()).await;
        assert_eq!(status, StatusCode::OK);
    }
    let of_ordinary = parapet.cpu_time().saturating_sub(before);

    let before = parapet.cpu_time();
    for bomb in bombs.iter().cycle().take(REQUESTS) {
        let status = post(&attacker, "/edge/validate", "br", bomb.clone()).await;
        assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    }
    let of_bombs = parapet.cpu_time().saturating_sub(before);
    assert!(of_bombs < 30 * of_ordinary, "{of_bombs:?}, {of_ordinary:?} for ordinary questions");

    // A list that is too long is not read to its end.
    let status = post(&other, "/edge/validate", "", list.into()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let mut refused = 0;
    for bomb in bombs.iter().cycle().take(2 * REQUESTS) {
        refused += usize::from(
            post(&attacker, "/edge/validate", "br", bomb.clone()).await
                == StatusCode::TOO_MANY_REQUESTS,
        );
    }
    assert!(refused > REQUESTS, "{refused}");
    let status = post(&other, "/edge/validate", "", ordinary.into()).await;
    assert_eq!(status, StatusCode::OK, "others are answered");
    assert_eq!(parapet.features_status(CLIENT).await, StatusCode::OK);
}

#[tokio::test]
async fn validation_of_made_up_tokens_is_throttled_despite_forged_addresses() {
    let parapet = InProcessParapet::offline_with(FLAGS, &["--trust-proxy"]).await;
    let validate = async |number: u32| {
        let body = json!({ "tokens": [format!("*:development.made-up-{number}")] });
        let request = parapet.json_request("/edge/validate", &body);
        let [_, _, high, low] = number.to_be_bytes();
        let request = request.header("x-forwarded-for", format!("203.0.{high}.{low}"));
        request.send().await.unwrap().status()
    };
    let mut sent = 0;
    while validate(sent).await != StatusCode::TOO_MANY_REQUESTS {
        sent += 1;
        assert!(sent < 2000, "no request is throttled");
    }
}

/// The memory for hashing one password, in KiB.
const PASSWORD_HASH_KIB: u64 = 19_456;

#[tokio::test]
async fn rejected_sign_ins_use_memory_for_two_hashes_and_free_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    std::fs::write(&file, FLAGS).unwrap();
    let parapet = Parapet::mode("standalone").flag("--flags", &file).start().await;
    let before = parapet.proc_status("VmRSS");
    let sign_in = async |n: u32| {
        let body = json!({ "username": format!("nobody-{n}"), "password": "not the password" });
        let request = client_at(2).post(parapet.admin_url() + "/auth/simple/login");
        let request = request.header("content-type", "application/json").body(body.to_string());
        request.send().await.unwrap().status()
    };
    for status in futures_util::future::join_all((0..20).map(sign_in)).await {
        assert_eq!(status, StatusCode::UNAUTHORIZED);
    }
    let most = parapet.proc_status("VmHWM");
    assert!(most < before + 3 * PASSWORD_HASH_KIB, "{most} KiB at the most, {before} before");
    wait_until("the memory is freed", Duration::from_mins(1), async || {
        (parapet.proc_status("VmRSS") < before + PASSWORD_HASH_KIB).then_some(())
    })
    .await;
}
