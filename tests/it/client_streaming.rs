//! Delta events and event streams for server SDKs, with raw requests and with the official SDK.

use std::net::IpAddr;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::in_process_parapet::{CLIENT, FRONTEND, InProcessParapet, WEB_CLIENT, send};
use crate::rig::{
    DeltaStream, Parapet, STREAM, Sdk, TokenKind, Unleash, event_summary, summary, wait_until,
};

const ADMIN: &str = "*:*.admin-0123456789abcdef0123456789abcdef";

/// The timeout for anything in these tests.
const TIMEOUT: Duration = Duration::from_mins(1);

const DELTA: &str = "/api/client/delta";

/// Flags of the projects `web` and `default`, the first with a segment.
fn flags(web: bool, other: bool) -> String {
    let flag = |name: &str, project: &str, enabled: bool, segments: Value| {
        let strategy = json!({ "name": "default", "segments": segments });
        json!({ "name": name, "project": project, "enabled": enabled, "strategies": [strategy] })
    };
    let segment = json!({ "id": 7, "constraints": [] });
    let features =
        [flag("in-web", "web", web, json!([7])), flag("other", "default", other, json!([]))];
    // Line breaks within a flag's JSON must be preserved.
    let text = json!({ "features": features, "segments": [segment] });
    serde_json::to_string_pretty(&text).unwrap()
}

fn write_flags(parapet: &InProcessParapet, flags: &str) {
    std::fs::write(parapet.flags_file(), flags).unwrap();
}

async fn open_at(parapet: &InProcessParapet, token: &str, last: Option<&str>) -> DeltaStream {
    DeltaStream::open(&format!("http://{}", parapet.address()), token, last).await
}

#[tokio::test]
async fn delta_contains_changes_since_the_clients_state() {
    let parapet = InProcessParapet::offline(&flags(false, false)).await;
    let fetch = async |token: &str, etag: &str| {
        let request = parapet.request(Method::GET, DELTA).header("authorization", token);
        send(request.header("if-none-match", etag)).await
    };
    let first = fetch(CLIENT, "\"0\"").await;
    assert_eq!(event_summary(&first.json()), [summary("hydration", "in-web,other")]);
    let etag = first.header("etag").to_owned();
    assert_eq!(etag, format!("\"{}\"", first.json()["events"][0]["eventId"]));
    let again = fetch(CLIENT, &etag).await;
    assert_eq!((again.status, again.header("etag")), (StatusCode::NOT_MODIFIED, &*etag));
    let web = fetch(WEB_CLIENT, "").await;

    write_flags(&parapet, &flags(false, true));
    let then = wait_until("the change is in the delta", TIMEOUT, async || {
        let then = fetch(CLIENT, &etag).await;
        (then.status == StatusCode::OK).then_some(then)
    })
    .await;
    assert_eq!(event_summary(&then.json()), [summary("feature-updated", "other")]);
    assert_eq!(then.json()["events"][0]["feature"]["enabled"], true);
    assert_ne!(then.header("etag"), etag);
    assert_eq!(fetch(CLIENT, then.header("etag")).await.status, StatusCode::NOT_MODIFIED);
    // In a project without changes there is no event.
    assert_eq!(fetch(WEB_CLIENT, web.header("etag")).await.status, StatusCode::NOT_MODIFIED);
    // A client with the state of another token, or with an unknown state, gets a full snapshot.
    let whole = fetch(WEB_CLIENT, then.header("etag")).await.json();
    assert_eq!(event_summary(&whole), [summary("hydration", "in-web")]);
    let whole = fetch(WEB_CLIENT, "\"5\"").await.json();
    assert_eq!(event_summary(&whole), [summary("hydration", "in-web")]);
    assert_eq!(whole["events"][0]["segments"][0]["id"], 7);

    let status = async |path: &str, token: &str| parapet.get(path, token).await.status.as_u16();
    assert_eq!(status(DELTA, FRONTEND).await, 403);
    assert_eq!(status(DELTA, "*:development.nobody").await, 401);
    assert_eq!(status(&format!("{DELTA}?namePrefix={}", "x".repeat(300)), CLIENT).await, 400);
    let prefixed = parapet.get(&format!("{DELTA}?namePrefix=oth"), CLIENT).await.json();
    assert_eq!(event_summary(&prefixed), [summary("hydration", "other")]);
}

#[tokio::test]
async fn stream_begins_with_snapshot_or_missed_changes_and_sends_each_change() {
    let parapet = InProcessParapet::offline(&flags(false, false)).await;
    let mut all = open_at(&parapet, CLIENT, None).await;
    let mut web = open_at(&parapet, WEB_CLIENT, None).await;
    let (name, first, events) = all.next_update().await;
    assert_eq!((&*name, events), ("unleash-connected", vec![summary("hydration", "in-web,other")]));
    assert_eq!(web.next_update().await.2, [summary("hydration", "in-web")]);

    write_flags(&parapet, &flags(false, true));
    let (name, second, events) = all.next_update().await;
    assert_eq!((&*name, events), ("unleash-updated", vec![summary("feature-updated", "other")]));
    write_flags(&parapet, &flags(true, true));
    let (_, third, events) = all.next_update().await;
    assert_eq!(events, [summary("feature-updated", "in-web")]);
    let events = web.next_update().await.2;
    assert_eq!(events, [summary("feature-updated", "in-web")], "the other change is not visible");

    // A client that reconnects gets the changes it missed in one event, or no change if it is up to
    // date.
    let resumed = open_at(&parapet, CLIENT, Some(&first)).await.next_update().await;
    let missed = vec![summary("feature-updated", "in-web"), summary("feature-updated", "other")];
    assert_eq!(resumed, ("unleash-connected".to_owned(), third.clone(), missed));
    let resumed = open_at(&parapet, CLIENT, Some(&second)).await.next_update().await;
    assert_eq!(resumed.2, [summary("feature-updated", "in-web")]);
    assert!(open_at(&parapet, CLIENT, Some(&third)).await.next_update().await.2.is_empty());
    let unknown = open_at(&parapet, CLIENT, Some("1")).await.next_update().await;
    assert_eq!(unknown.2, [summary("hydration", "in-web,other")]);
    // The state of another token's stream counts as unknown.
    let narrowed = open_at(&parapet, WEB_CLIENT, Some(&third)).await.next_update().await;
    assert_eq!(narrowed.2, [summary("hydration", "in-web")]);

    write_flags(&parapet, r#"{"features":[]}"#);
    let events = all.next_update().await.2;
    let gone = ["in-web", "other"].map(|name| summary("feature-removed", name));
    assert_eq!(events, [&gone[..], &[summary("segment-removed", "7")]].concat());
}

#[tokio::test]
async fn stream_closes_when_its_token_is_deleted_and_others_continue() {
    let variables = [("INIT_ADMIN_API_TOKENS", ADMIN), ("INIT_BACKEND_API_TOKENS", CLIENT)];
    let parapet = InProcessParapet::standalone(&flags(false, false), &[], &variables).await;
    let admin = |method: Method, path: &str| {
        let request = parapet.admin_request(method, &format!("/api/admin/api-tokens{path}"));
        request.header("authorization", ADMIN).header("content-type", "application/json")
    };
    let body = json!({ "tokenName": "short", "type": "client", "environment": "development" });
    let made = send(admin(Method::POST, "").body(body.to_string())).await;
    assert_eq!(made.status, StatusCode::CREATED);
    let secret = made.json()["secret"].as_str().unwrap().to_owned();
    let (mut doomed, mut other) =
        (open_at(&parapet, &secret, None).await, open_at(&parapet, CLIENT, None).await);
    doomed.next_update().await;
    other.next_update().await;
    let deleted = send(admin(Method::DELETE, &format!("/{secret}"))).await;
    assert_eq!(deleted.status, StatusCode::OK);
    assert_eq!(doomed.next_event().await, None, "the stream ends");
    write_flags(&parapet, &flags(true, false));
    assert_eq!(other.next_update().await.2, [summary("feature-updated", "in-web")]);
}

#[tokio::test]
async fn stream_beyond_the_limit_gets_429_with_retry_after() {
    let parapet =
        InProcessParapet::offline_with(&flags(false, false), &["--max-streams", "1"]).await;
    let first = open_at(&parapet, CLIENT, None).await;
    let refused = parapet.get(STREAM, CLIENT).await;
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.header("retry-after"), "60");
    drop(first);
    wait_until("there is room again", TIMEOUT, async || {
        let request = parapet.request(Method::GET, STREAM).header("authorization", CLIENT);
        let response = request.send().await.unwrap();
        (response.status() == StatusCode::OK).then_some(())
    })
    .await;
}

#[tokio::test]
async fn stream_limits_per_address_and_token_leave_room_for_others() {
    let args = ["--max-streams", "5", "--max-streams-per-token", "3"];
    let parapet = InProcessParapet::offline_with(
        &flags(false, false),
        &[&args[..], &["--max-streams-per-address", "2"]].concat(),
    )
    .await;
    let url = format!("http://{}{STREAM}", parapet.address());
    let open = async |host: u8, token: &str| {
        let client = reqwest::Client::builder()
            .no_proxy()
            .local_address(Some(IpAddr::from([127, 0, 0, host])));
        let request = client.build().unwrap().get(&url).header("authorization", token);
        let response = request.send().await.unwrap();
        (response.status() == StatusCode::OK).then_some(response)
    };
    let mut of_one = vec![open(2, CLIENT).await.unwrap(), open(2, WEB_CLIENT).await.unwrap()];
    assert!(open(2, CLIENT).await.is_none() && open(2, WEB_CLIENT).await.is_none());
    let of_two = [open(3, CLIENT).await.unwrap(), open(3, CLIENT).await.unwrap()];
    assert!(open(4, CLIENT).await.is_none(), "its bearers have three");
    let _other = open(4, WEB_CLIENT).await.unwrap();
    assert!(open(4, WEB_CLIENT).await.is_none(), "there are five");
    // A stream that one address closes is available to it again.
    of_one.pop();
    wait_until("there is room again", TIMEOUT, async || open(2, WEB_CLIENT).await).await;
    drop(of_two);
}

#[tokio::test]
async fn forged_addresses_share_the_stream_limit_of_the_peer_address() {
    let args = ["--trust-proxy", "--max-streams", "5", "--max-streams-per-address", "2"];
    let parapet = InProcessParapet::offline_with(&flags(false, false), &args).await;
    let open = async |path: &str, token: &str, claimed: u8| {
        let request = parapet.request(Method::GET, path).header("authorization", token);
        let request = request.header("x-forwarded-for", format!("203.0.113.{claimed}"));
        request.send().await.unwrap()
    };
    let frontend = "/api/frontend/streaming";
    let opened = [
        open(STREAM, CLIENT, 1).await,
        open(frontend, FRONTEND, 2).await,
        open(STREAM, CLIENT, 3).await,
        open(frontend, FRONTEND, 4).await,
    ];
    assert_eq!(opened.each_ref().map(|response| response.status().as_u16()), [200, 200, 429, 429]);
}

#[tokio::test]
async fn fetch_mode_event_switches_sdks_to_streaming_or_polling() {
    let parapet = InProcessParapet::offline(&flags(false, false)).await;
    assert_eq!(parapet.get("/api/client/features", CLIENT).await.header("fetch-mode"), "");
    let args = ["--sdk-fetch-mode", "streaming"];
    let parapet = InProcessParapet::offline_with(&flags(false, false), &args).await;
    let poll = parapet.get("/api/client/features", CLIENT).await;
    assert_eq!(poll.header("fetch-mode"), "streaming");
    let args = ["--sdk-fetch-mode", "polling"];
    let parapet = InProcessParapet::offline_with(&flags(false, false), &args).await;
    assert_eq!(parapet.get("/api/client/features", CLIENT).await.header("fetch-mode"), "");
    let mut stream = open_at(&parapet, CLIENT, None).await;
    assert_eq!(stream.next_update().await.2, [summary("hydration", "in-web,other")]);
    let sent = stream.next_event().await.unwrap();
    assert_eq!((&*sent.name, &*sent.data), ("fetch-mode", "polling"));
    // The stream of an SDK that cannot poll continues.
    write_flags(&parapet, &flags(true, false));
    assert_eq!(stream.next_update().await.2, [summary("feature-updated", "in-web")]);
}

#[tokio::test]
async fn streams_end_cleanly_at_shutdown_and_at_maximum_age() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    std::fs::write(&file, flags(false, false)).unwrap();
    let offline = Parapet::mode("offline").flag("--bootstrap-file", &file);
    let parapet = offline.flag("--client-tokens", CLIENT).start().await;
    let mut stream = DeltaStream::open(&parapet.url(), CLIENT, None).await;
    stream.next_update().await;
    let (end, status) = tokio::join!(stream.next_event(), parapet.terminate());
    assert_eq!(end, None);
    assert!(status.success(), "{}", parapet.log());
    assert!(!parapet.log().contains(" WARN "), "{}", parapet.log());

    let args = ["--stream-max-age-seconds", "1"];
    let parapet = InProcessParapet::offline_with(&flags(false, false), &args).await;
    let mut stream = open_at(&parapet, CLIENT, None).await;
    stream.next_update().await;
    assert_eq!(stream.next_event().await, None);
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn node_sdk_streams_from_edge_in_front_of_unleash_without_streaming() {
    Unleash::on_every_version(async |unleash| {
        let flag = format!("streamed-{:?}", unleash.version()).to_lowercase();
        unleash.create_enabled_flag(&flag, "development", &[]).await;
        let edge = Parapet::edge(&unleash.url()).admin_token(unleash.admin_token()).with_short_intervals();
        let parapet = edge.flag("--fleet-name", "streaming").start().await;
        let token = unleash.create_token(TokenKind::Backend, "development", &["*"], "streaming").await;
        let mut sdk = Sdk::node_streaming(&parapet.url(), &token, "streaming").await;
        let mut wait_for = async |expect: bool| {
            wait_until(&format!("the SDK sees the flag {expect}"), TIMEOUT, async || {
                let flags = sdk.evaluate(json!({})).await;
                flags.get(&flag).is_some_and(|it| it.enabled == expect).then_some(())
            })
            .await;
        };
        wait_for(true).await;
        unleash.disable(&flag, "development").await;
        wait_for(false).await;
        // After a crash and restart the SDK reconnects, and gets the changes it missed.
        parapet.kill();
        unleash.enable(&flag, "development").await;
        parapet.restart();
        parapet.wait_until_ready().await;
        wait_for(true).await;
        unleash.disable(&flag, "development").await;
        wait_for(false).await;
        assert_eq!(sdk.stderr(), "", "no warning, and no change of mode");
        assert_eq!(parapet.metric("parapet_streams").await, Some(1.0));
        let polls = r#"http_server_requests_total{http_route="/api/client/features",http_request_method="GET",http_response_status_code="200"}"#;
        assert_eq!(parapet.metric(polls).await, None, "the SDK polled nothing");
        sdk.close().await;
        wait_until("the stream is closed", Duration::from_secs(30), async || {
            (parapet.metric("parapet_streams").await == Some(0.0)).then_some(())
        })
        .await;
    })
    .await;
}
