//! Streaming for frontend clients: with raw requests, and with the example client.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::in_process_parapet::{CLIENT, FRONTEND, InProcessParapet, WEB_FRONTEND};
use crate::rig::{Driver, EventStream, Parapet, http, node, wait_until};

const STREAM: &str = "/api/frontend/streaming";

const TIMEOUT: Duration = Duration::from_mins(1);

/// A flag of the project `web` with these strategies.
fn flag(name: &str, strategies: &[Value]) -> Value {
    json!({ "name": name, "project": "web", "enabled": true, "strategies": strategies })
}

fn default_strategy() -> Value {
    json!({ "name": "default" })
}

fn constrained_strategy(field: &str, value: &str) -> Value {
    let constraint = json!({ "contextName": field, "operator": "IN", "values": [value] });
    json!({ "name": "default", "constraints": [constraint] })
}

fn document(flags: &[Value]) -> String {
    json!({ "features": flags }).to_string()
}

fn write_flags(parapet: &InProcessParapet, flags: &[Value]) {
    std::fs::write(parapet.flags_file(), document(flags)).unwrap();
}

async fn open_stream(parapet: &InProcessParapet, query: &str, last: Option<&str>) -> EventStream {
    let request = parapet.request(Method::GET, &format!("{STREAM}?{query}"));
    EventStream::open(request.header("authorization", FRONTEND), last).await
}

/// The next event's name and id, the flags that it updates, and those that it removes.
async fn next_update(events: &mut EventStream) -> (String, String, Vec<String>, Vec<String>) {
    let event = events.next().await.expect("the stream continues");
    let data: Value = serde_json::from_str(&event.data).unwrap();
    let toggles = data["toggles"].as_array().unwrap().iter();
    let updated = toggles.map(|it| it["name"].as_str().unwrap().to_owned()).collect();
    let removed = data["removed"].as_array().into_iter().flatten();
    let removed = removed.map(|it| it.as_str().unwrap().to_owned()).collect();
    (event.name, event.id, updated, removed)
}

#[tokio::test]
async fn stream_sends_only_changes_for_its_context() {
    let all = flag("all", &[default_strategy()]);
    let parapet = InProcessParapet::offline(&document(&[
        all.clone(),
        flag("gold", &[constrained_strategy("plan", "gold")]),
    ]))
    .await;
    let mut seven = open_stream(&parapet, "userId=7", None).await;
    let (name, first, updated, _) = next_update(&mut seven).await;
    assert_eq!((&*name, updated), ("unleash-connected", vec!["all".to_owned()]));
    // The context of a POST is in its body.
    let gold =
        parapet.json_request(STREAM, &json!({ "context": { "properties": { "plan": "gold" } } }));
    let mut gold = EventStream::open(gold.header("authorization", WEB_FRONTEND), None).await;
    assert_eq!(next_update(&mut gold).await.2, ["all", "gold"]);

    // The flag is now off for one context. For the other it never was on, which therefore gets no event.
    write_flags(&parapet, &[all.clone(), flag("gold", &[constrained_strategy("plan", "silver")])]);
    let (name, _, updated, removed) = next_update(&mut gold).await;
    assert_eq!((&*name, updated.len(), removed), ("unleash-updated", 0, vec!["gold".to_owned()]));
    write_flags(&parapet, &[all.clone(), flag("seven", &[constrained_strategy("userId", "7")])]);
    let (name, second, updated, removed) = next_update(&mut seven).await;
    assert_eq!((&*name, updated), ("unleash-updated", vec!["seven".to_owned()]));
    assert!(removed.is_empty());
    let polled = parapet.get("/api/frontend?userId=7", FRONTEND).await.json();
    assert_eq!(polled["toggles"].as_array().unwrap().len(), 2);

    // A client that reconnects gets everything, or the confirmation that it is up to date.
    let (name, id, updated, _) =
        next_update(&mut open_stream(&parapet, "userId=7", Some(&first)).await).await;
    assert_eq!((&*name, &id, updated.len()), ("unleash-connected", &second, 2));
    let (name, id, updated, removed) =
        next_update(&mut open_stream(&parapet, "userId=7", Some(&second)).await).await;
    assert_eq!((&*name, id, updated.len() + removed.len()), ("unleash-updated", second, 0));

    let status = async |token: &str| parapet.get(STREAM, token).await.status.as_u16();
    assert_eq!(status(CLIENT).await, 403);
    assert_eq!(status("*:development.nobody").await, 401);
    let long = format!("{STREAM}?plan={}", "x".repeat(5000));
    assert_eq!(parapet.get(&long, FRONTEND).await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn stream_of_large_context_closes_when_flags_need_fields_that_were_not_stored() {
    let all = flag("all", &[default_strategy()]);
    let gold = flag("gold", &[constrained_strategy("plan", "gold")]);
    let parapet = InProcessParapet::offline(&document(&[all.clone(), gold.clone()])).await;
    let notes = "x".repeat(4000);
    let context = json!({ "properties": { "plan": "gold", "team": "red", "notes": notes } });
    let open = async |last: Option<&str>| {
        let request = parapet.json_request(STREAM, &json!({ "context": context }));
        EventStream::open(request.header("authorization", FRONTEND), last).await
    };
    let mut stream = open(None).await;
    assert_eq!(next_update(&mut stream).await.2, ["all", "gold"]);
    // A field that the context does not have is known to be missing.
    let pro =
        flag("pro", &[constrained_strategy("plan", "gold"), constrained_strategy("size", "7")]);
    write_flags(&parapet, &[all.clone(), gold.clone(), pro]);
    let (_, id, updated, _) = next_update(&mut stream).await;
    assert_eq!(updated, ["pro"]);
    let red = flag("red", &[constrained_strategy("team", "red")]);
    write_flags(&parapet, &[all, gold, red]);
    assert_eq!(stream.next().await, None, "it has to reconnect");
    assert_eq!(next_update(&mut open(Some(&id)).await).await.2, ["all", "gold", "red"]);
}

/// Opens streams with contexts of this many properties of this length, which are small on the wire.
/// Returns the memory of each, in KiB.
async fn stream_memory_kib(properties: usize, length: usize) -> u64 {
    const STREAMS: usize = 800;
    const CONNECTIONS: usize = 10;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    std::fs::write(&file, document(&[flag("gold", &[constrained_strategy("plan", "gold")])]))
        .unwrap();
    let parapet = Parapet::mode("offline").flag("--bootstrap-file", &file);
    let parapet = parapet.flag("--frontend-tokens", FRONTEND).start().await;
    let notes: serde_json::Map<_, _> =
        (0..properties).map(|n| (format!("{n}"), "x".repeat(length).into())).collect();
    let mut body = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    serde_json::to_writer(&mut body, &json!({ "properties": notes })).unwrap();
    let body = body.finish().unwrap();
    let before = parapet.proc_status("VmRSS");
    let mut streams = Vec::new();
    for _ in 0..CONNECTIONS {
        let client = reqwest::Client::builder().http2_prior_knowledge().no_proxy().build().unwrap();
        for _ in 0..STREAMS / CONNECTIONS {
            let request = client.post(parapet.url() + STREAM).body(body.clone());
            let request = request.header("content-encoding", "gzip");
            let request = request.header("content-type", "application/json");
            let mut stream =
                EventStream::open(request.header("authorization", FRONTEND), None).await;
            stream.next().await.unwrap();
            streams.push(stream);
        }
    }
    parapet.proc_status("VmRSS").saturating_sub(before) / STREAMS as u64
}

#[tokio::test]
async fn streams_with_large_contexts_use_little_more_memory() {
    let small = stream_memory_kib(0, 0).await;
    let large = stream_memory_kib(15, 4000).await;
    assert!(large < small + 16, "{large} KiB for each instead of {small} KiB");
    let many = stream_memory_kib(256, 1).await;
    assert!(many < small + 8, "{many} KiB for each instead of {small} KiB");
}

#[tokio::test]
async fn passing_date_of_a_constraint_is_sent_without_a_flag_change() {
    let date = |operator: &str, seconds: i64| {
        let at = Timestamp::now() + SignedDuration::from_secs(seconds);
        let constraint =
            json!({ "contextName": "currentTime", "operator": operator, "value": at.to_string() });
        json!({ "name": "default", "constraints": [constraint] })
    };
    let flags = [flag("ends", &[date("DATE_BEFORE", 3)]), flag("begins", &[date("DATE_AFTER", 3)])];
    let parapet = InProcessParapet::offline(&document(&flags)).await;
    let mut events = open_stream(&parapet, "", None).await;
    let mut on: BTreeSet<String> = next_update(&mut events).await.2.into_iter().collect();
    assert!(on.iter().eq(["ends"]), "{on:?}");
    // At that very instant neither constraint holds, so there may be one event or two.
    while !on.iter().eq(["begins"]) {
        let (_, _, updated, removed) = next_update(&mut events).await;
        on.extend(updated);
        on.retain(|name| !removed.contains(name));
    }
}

#[tokio::test]
async fn random_stickiness_is_drawn_once_per_stream() {
    let mut lots: Vec<_> = (0..64)
        .map(|n| {
            let half = json!({ "rollout": "50", "stickiness": "random", "groupId": n.to_string() });
            flag(&format!("lot-{n}"), &[json!({ "name": "flexibleRollout", "parameters": half })])
        })
        .collect();
    for child in &mut lots[32..] {
        child["dependencies"] = json!([{ "feature": "parent" }]);
    }
    lots.push(flag("parent", &[default_strategy()]));
    let parapet = InProcessParapet::offline(&document(&lots)).await;
    let mut events = open_stream(&parapet, "", None).await;
    next_update(&mut events).await;
    for (name, segments) in [("a", json!([])), ("b", json!([{ "id": 1, "constraints": [] }]))] {
        lots.push(flag(name, &[default_strategy()]));
        let all = json!({ "version": 2, "features": lots, "segments": segments }).to_string();
        std::fs::write(parapet.flags_file(), all).unwrap();
        let (_, _, updated, removed) = next_update(&mut events).await;
        assert_eq!((updated, removed.len()), (vec![name.to_owned()], 0));
    }
}

#[tokio::test]
#[ignore = "needs the npm packages of tests/, see tests/run"]
async fn example_client_reconnects_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    let write = |flags: &[Value]| std::fs::write(&file, document(flags)).unwrap();
    write(&[
        flag("one", &[default_strategy()]),
        flag("two", &[constrained_strategy("plan", "gold")]),
    ]);
    let offline = Parapet::mode("offline").flag("--bootstrap-file", &file);
    let parapet = offline.flag("--frontend-tokens", FRONTEND).start().await;
    let options = |token: &str| {
        let url = format!("{}/api/frontend", parapet.url());
        json!({ "url": url, "token": token, "context": { "properties": { "plan": "gold" } } })
    };
    let node = || node("follow-flags.mjs").into();
    let mut client = Driver::start("example", node(), &options(FRONTEND)).await;
    let mut wait_for = async |expect: &[&str]| {
        wait_until(&format!("the client has {expect:?}"), TIMEOUT, async || {
            let has = client.call("toggles", Value::Null).await;
            has["toggles"].as_object().unwrap().keys().eq(expect).then_some(())
        })
        .await;
    };
    wait_for(&["one", "two"]).await;
    write(&[flag("one", &[default_strategy()]), flag("three", &[default_strategy()])]);
    wait_for(&["one", "three"]).await;
    parapet.kill();
    write(&[flag("three", &[default_strategy()])]);
    parapet.restart();
    wait_for(&["three"]).await;
    let changes = client.call("changes", Value::Null).await;
    let expect = json!([[["one", "two"], []], [["three"], ["two"]], [["three"], ["one"]]]);
    assert_eq!(changes["changes"], expect);
    client.close().await;

    // A rejected token ends it.
    let refused = Driver::start("example", node(), &options("*:development.nobody")).await;
    wait_until("the rejection is reported", TIMEOUT, async || {
        refused.stderr().contains("401").then_some(())
    })
    .await;
    refused.close().await;
    assert_eq!(http().get(parapet.url() + STREAM).send().await.unwrap().status(), 401);
}
