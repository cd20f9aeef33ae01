//! OpenFeature's official providers, and the responses to them.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::in_process_parapet::{
    CLIENT, FRONTEND, FullResponse, InProcessParapet, WEB_FRONTEND, send,
};
use crate::rig::{Driver, EventStream, node, tests_dir, wait_until};

const BULK_PATH: &str = "/ofrep/v1/evaluate/flags";

const TIMEOUT: Duration = Duration::from_mins(1);

fn variant(name: &str, kind: &str, value: &str) -> Value {
    json!({ "name": name, "weight": 1000, "payload": { "type": kind, "value": value } })
}

fn flags(plain: bool) -> String {
    let flag = |name: &str, enabled: bool, strategy: Value, variants: Value| json!({ "name": name, "project": "web", "enabled": enabled, "strategies": [strategy], "variants": variants });
    let everybody = || json!({ "name": "default" });
    let half = json!({ "name": "flexibleRollout", "parameters": { "rollout": "99", "stickiness": "userId" } });
    let gold = json!({ "name": "default", "constraints": [{ "contextName": "plan", "operator": "IN", "values": ["gold"] }] });
    let none = || json!([]);
    let features = [
        flag("plain", plain, everybody(), none()),
        flag("split", true, half, none()),
        flag("gold", true, gold.clone(), none()),
        flag("text", true, everybody(), json!([variant("blue", "string", "azure")])),
        flag("number", true, everybody(), json!([variant("half", "number", "0.5")])),
        flag("object", true, everybody(), json!([variant("wide", "json", r#"{"columns": 3}"#)])),
        flag("gold-text", true, gold, json!([variant("blue", "string", "azure")])),
        flag("off-text", false, everybody(), json!([variant("blue", "string", "azure")])),
        flag("bare", true, everybody(), json!([{ "name": "only", "weight": 1000 }])),
    ];
    let mut elsewhere = flag("elsewhere", true, everybody(), none());
    elsewhere["project"] = "other".into();
    let features = [&features[..], &[elsewhere]].concat();
    json!({ "features": features }).to_string()
}

/// Panics unless a response conforms to version 0.3.0 of the protocol.
#[track_caller]
fn assert_conforms(path: &str, status: u64, body: &Value) {
    let success = |it: &Value| {
        assert!(it["key"].is_string() && it["variant"].is_string(), "{it}");
        let value = &it["value"];
        assert!(
            value.is_null() && it.get("value").is_none()
                || value.is_boolean()
                || value.is_string()
                || value.is_number()
                || value.is_object(),
            "{it}"
        );
        let reasons = ["STATIC", "TARGETING_MATCH", "SPLIT", "DISABLED", "UNKNOWN"];
        assert!(reasons.contains(&it["reason"].as_str().unwrap()), "{it}");
        let metadata = it["metadata"].as_object().unwrap();
        assert!(metadata.values().all(|it| it.is_boolean() || it.is_string() || it.is_number()));
    };
    let is_bulk = path.ends_with(BULK_PATH);
    match status {
        200 if is_bulk => {
            body["flags"].as_array().unwrap().iter().for_each(success);
            for stream in body["eventStreams"].as_array().into_iter().flatten() {
                assert_eq!(stream["type"], "sse", "{stream}");
                assert!(stream["endpoint"]["requestUri"].as_str().unwrap().starts_with('/'));
                assert!(stream["inactivityDelaySec"].as_u64().unwrap() >= 1, "{stream}");
            }
        }
        200 => success(body),
        304 => assert_eq!(*body, "", "a 304 has no body"),
        400 => {
            let codes = ["PARSE_ERROR", "TARGETING_KEY_MISSING", "INVALID_CONTEXT", "GENERAL"];
            assert!(codes.contains(&body["errorCode"].as_str().unwrap()), "{body}");
            assert_eq!(body["key"].is_string(), !is_bulk, "{body}");
        }
        404 => {
            assert_eq!(body["errorCode"], "FLAG_NOT_FOUND", "{body}");
            assert!(body["key"].is_string(), "{body}");
        }
        401 | 403 => assert!(body["errorDetails"].is_string(), "{body}"),
        _ => panic!("{status} {body}"),
    }
}

/// The requests of the providers since the last call: address, status and body of each response.
async fn take_traffic(providers: &mut Driver) -> Vec<Value> {
    let traffic = providers.call("traffic", Value::Null).await;
    traffic["traffic"].as_array().unwrap().clone()
}

/// Waits until the web provider has reported more than `before` changes, and returns their number. It
/// applies new flags first and reports them later.
async fn wait_for_changes(providers: &mut Driver, before: u64) -> u64 {
    wait_until("a change is reported", TIMEOUT, async || {
        let changes = providers.call("changes", Value::Null).await["changes"].as_u64();
        changes.filter(|changes| *changes > before)
    })
    .await
}

#[tokio::test]
#[ignore = "needs the npm packages of tests/, see tests/run"]
async fn official_providers_get_every_value_type() {
    let parapet = InProcessParapet::offline(&flags(true)).await;
    let options = json!({ "url": format!("http://{}", parapet.address()), "frontend": FRONTEND, "client": CLIENT });
    let mut providers = Driver::start("OFREP providers", node("ofrep.mjs").into(), &options).await;
    let mut check = async |who: &str, kind: &str, flag: &str, context: Value, expect: Value| {
        let fallback = match kind {
            "boolean" => json!(false),
            "string" => json!("fallback"),
            "number" => json!(-1),
            _ => json!({ "fallback": true }),
        };
        let arguments =
            json!({ "type": kind, "flag": flag, "fallback": fallback, "context": context });
        let received = providers.call(who, arguments).await;
        let received = json!([
            received["value"],
            received["variant"],
            received["reason"],
            received["errorCode"]
        ]);
        assert_eq!(received, expect, "{who} {flag}");
    };
    let none = Value::Null;
    for who in ["server", "web"] {
        let user = || json!({ "targetingKey": "7" });
        check(who, "boolean", "plain", user(), json!([true, "enabled", "STATIC", none])).await;
        check(who, "boolean", "split", user(), json!([true, "enabled", "SPLIT", none])).await;
        check(who, "boolean", "gold", user(), json!([false, "disabled", "UNKNOWN", none])).await;
        check(who, "string", "text", user(), json!(["azure", "blue", "STATIC", none])).await;
        check(who, "number", "number", user(), json!([0.5, "half", "STATIC", none])).await;
        check(who, "object", "object", user(), json!([{ "columns": 3 }, "wide", "STATIC", none]))
            .await;
        check(who, "boolean", "bare", user(), json!([true, "only", "STATIC", none])).await;
        check(who, "boolean", "text", user(), json!([false, none, "ERROR", "TYPE_MISMATCH"])).await;
        check(who, "boolean", "nowhere", user(), json!([false, none, "ERROR", "FLAG_NOT_FOUND"]))
            .await;
    }
    let gold = || json!({ "plan": "gold" });
    check(
        "server",
        "string",
        "gold-text",
        gold(),
        json!(["azure", "blue", "TARGETING_MATCH", none]),
    )
    .await;
    check("server", "boolean", "gold", gold(), json!([true, "enabled", "TARGETING_MATCH", none]))
        .await;

    // A disabled flag yields the application's default, without a value of another type; these provider
    // versions report the missing value as an error.
    for (who, flag) in [("server", "off-text"), ("server", "gold-text"), ("web", "off-text")] {
        let arguments = json!({ "type": "string", "flag": flag, "fallback": "own", "context": {} });
        assert_eq!(providers.call(who, arguments).await["value"], "own", "{who} {flag}");
    }

    // The web provider polls, gets 304 without a change, and notices changes.
    let mut traffic = Vec::new();
    wait_until("a poll finds nothing new", TIMEOUT, async || {
        traffic.extend(take_traffic(&mut providers).await);
        traffic.iter().any(|it| it["status"] == 304).then_some(())
    })
    .await;
    let before = providers.call("changes", Value::Null).await["changes"].as_u64().unwrap();
    std::fs::write(parapet.flags_file(), flags(false)).unwrap();
    let arguments = json!({ "type": "boolean", "flag": "plain", "fallback": true });
    wait_until("the change arrives", TIMEOUT, async || {
        let received = providers.call("web", arguments.clone()).await;
        (received["value"] == false && received["reason"] == "DISABLED").then_some(())
    })
    .await;
    wait_for_changes(&mut providers, before).await;
    providers.call("context", json!({ "context": { "targetingKey": "8", "plan": "gold" } })).await;
    let received =
        providers.call("web", json!({ "type": "boolean", "flag": "gold", "fallback": false }));
    assert_eq!(received.await["value"], true);

    traffic.extend(take_traffic(&mut providers).await);
    for it in &traffic {
        assert_conforms(it["url"].as_str().unwrap(), it["status"].as_u64().unwrap(), &it["body"]);
    }
    let statuses: Vec<_> = traffic.iter().map(|it| it["status"].as_u64().unwrap()).collect();
    assert!([200, 304, 404].iter().all(|it| statuses.contains(it)), "{statuses:?}");
    assert_eq!(providers.stderr(), "");
    providers.close().await;
}

#[tokio::test]
async fn tokens_are_read_from_every_header_and_errors_conform_to_the_protocol() {
    let parapet = InProcessParapet::offline(&flags(true)).await;
    let one = |key: &str| format!("{BULK_PATH}/{key}");
    let evaluate = async |path: &str, header: (&str, String), body: &str| -> FullResponse {
        let request = parapet.json_request(path, &Value::Null).body(body.to_owned());
        send(request.header(header.0, header.1)).await
    };
    let check = async |path: &str, header: (&str, String), body: &str, expect: u16| {
        let received = evaluate(path, header, body).await;
        assert_eq!(received.status, expect, "{path} {body}");
        assert_conforms(path, expect.into(), &received.json());
        received.json()
    };
    let raw = |token: &str| ("authorization", token.to_owned());
    let bearer = |token: &str| ("authorization", format!("Bearer {token}"));
    let key = |token: &str| ("x-api-key", token.to_owned());
    for header in [raw(FRONTEND), bearer(FRONTEND), key(FRONTEND)] {
        let all = check(BULK_PATH, header, "{}", 200).await;
        assert_eq!(all["flags"].as_array().unwrap().len(), 10);
    }
    let web = check(BULK_PATH, raw(WEB_FRONTEND), "", 200).await;
    let names: Vec<_> =
        web["flags"].as_array().unwrap().iter().map(|it| it["key"].clone()).collect();
    assert!(names.is_sorted_by_key(|it| it.as_str().unwrap().to_owned()), "{names:?}");
    assert_eq!(names.len(), 9);
    check(&one("plain"), key(CLIENT), "{}", 200).await;
    check(&one("elsewhere"), raw(WEB_FRONTEND), "{}", 404).await;
    check(BULK_PATH, key(CLIENT), "{}", 403).await;
    check(BULK_PATH, key("*:development.nobody"), "{}", 401).await;
    check(&one("plain"), key("nonsense"), "{}", 401).await;
    assert_eq!(check(BULK_PATH, raw(FRONTEND), "{", 400).await["errorCode"], "PARSE_ERROR");
    let odd = check(&one("plain"), raw(FRONTEND), r#"{"context":7}"#, 400).await;
    assert_eq!((&odd["errorCode"], &odd["key"]), (&json!("INVALID_CONTEXT"), &json!("plain")));
    let long = json!({ "context": { "plan": "x".repeat(5000) } }).to_string();
    assert_eq!(check(BULK_PATH, raw(FRONTEND), &long, 400).await["errorCode"], "INVALID_CONTEXT");

    // The entity tag depends on the outcome and on the token.
    let first =
        evaluate(BULK_PATH, raw(FRONTEND), r#"{"context":{"targetingKey":"7","plan":"x"}}"#).await;
    assert_eq!(first.header("cache-control"), "private, no-cache");
    let etag = first.header("etag").to_owned();
    let again = async |token: &str, body: &str, expect: StatusCode| {
        let request = parapet.json_request(BULK_PATH, &Value::Null).body(body.to_owned());
        let request = request.header("authorization", token).header("if-none-match", &etag);
        assert_eq!(send(request).await.status, expect, "{body}");
    };
    let same = r#"{"context":{"plan":"x","targetingKey":"7"}}"#;
    again(FRONTEND, same, StatusCode::NOT_MODIFIED).await;
    again(WEB_FRONTEND, same, StatusCode::OK).await;
    again(FRONTEND, r#"{"context":{"targetingKey":"8","plan":"x"}}"#, StatusCode::OK).await;
    again(FRONTEND, r#"{"context":{"targetingKey":"7","plan":"gold"}}"#, StatusCode::OK).await;
}

#[tokio::test]
#[ignore = "needs the npm packages of tests/, see tests/run"]
async fn web_provider_is_notified_of_changes_without_polling() {
    let parapet = InProcessParapet::offline(&flags(true)).await;
    let options = json!({ "url": format!("http://{}", parapet.address()), "frontend": FRONTEND, "client": CLIENT });
    let mut command: tokio::process::Command = node("ofrep.mjs").into();
    command.env("NODE_OPTIONS", "--experimental-eventsource --no-warnings");
    let mut providers = Driver::start("OFREP providers", command, &options).await;
    let open = || async {
        let metrics = parapet.get("/internal-backstage/metrics", "").await;
        metrics.text().contains("\nparapet_streams 1\n").then_some(())
    };
    wait_until("the provider follows", TIMEOUT, open).await;
    let traffic = take_traffic(&mut providers).await;
    assert_eq!(traffic.len(), 1, "{traffic:?}");

    std::fs::write(parapet.flags_file(), flags(false)).unwrap();
    let arguments = json!({ "type": "boolean", "flag": "plain", "fallback": true });
    wait_until("the change arrives", TIMEOUT, async || {
        (providers.call("web", arguments.clone()).await["value"] == false).then_some(())
    })
    .await;
    assert_eq!(wait_for_changes(&mut providers, 0).await, 1);
    let traffic = take_traffic(&mut providers).await;
    assert_eq!(traffic.len(), 1, "it sent one request, after the event: {traffic:?}");
    assert_conforms(BULK_PATH, traffic[0]["status"].as_u64().unwrap(), &traffic[0]["body"]);

    // For another context it opens another stream.
    providers.call("context", json!({ "context": { "targetingKey": "8", "plan": "gold" } })).await;
    wait_until("the provider follows", TIMEOUT, open).await;
    std::fs::write(parapet.flags_file(), flags(true)).unwrap();
    wait_until("the change arrives", TIMEOUT, async || {
        (providers.call("web", arguments.clone()).await["value"] == true).then_some(())
    })
    .await;
    assert_eq!(providers.stderr(), "");
    providers.close().await;
}

#[tokio::test]
#[ignore = "needs the Python packages of tests/, see tests/run"]
async fn python_provider_gets_every_value_type() {
    let parapet = InProcessParapet::offline(&flags(true)).await;
    let options = json!({ "url": format!("http://{}", parapet.address()), "token": CLIENT });
    let mut command = tokio::process::Command::new(tests_dir().join(".venv/bin/python"));
    command.arg(tests_dir().join("sdk/ofrep.py"));
    let mut provider = Driver::start("Python provider", command, &options).await;
    let mut check = async |kind: &str, flag: &str, fallback: Value, expect: Value| {
        let context = json!({ "targetingKey": "7", "plan": "gold" });
        let arguments =
            json!({ "type": kind, "flag": flag, "fallback": fallback, "context": context });
        let received = provider.call("ask", arguments).await;
        let received = json!([
            received["value"],
            received["variant"],
            received["reason"],
            received["errorCode"]
        ]);
        assert_eq!(received, expect, "{flag}");
    };
    let none = Value::Null;
    check("boolean", "plain", json!(false), json!([true, "enabled", "STATIC", none])).await;
    check("boolean", "gold", json!(false), json!([true, "enabled", "TARGETING_MATCH", none])).await;
    check("string", "text", json!("own"), json!(["azure", "blue", "STATIC", none])).await;
    check("number", "number", json!(-0.5), json!([0.5, "half", "STATIC", none])).await;
    let columns = json!({ "columns": 3 });
    check("object", "object", json!({}), json!([columns, "wide", "STATIC", none])).await;
    // Without a value it is the application's default.
    check("string", "off-text", json!("own"), json!(["own", "disabled", "DISABLED", none])).await;
    check("string", "plain", json!("own"), json!(["own", none, "ERROR", "TYPE_MISMATCH"])).await;
    check("string", "nowhere", json!("own"), json!(["own", none, "ERROR", "FLAG_NOT_FOUND"])).await;
    assert_eq!(provider.stderr(), "");
    provider.close().await;
}

/// The path of the event stream in a response.
fn event_stream_path(response: &FullResponse) -> String {
    let streams = response.json()["eventStreams"].take();
    streams[0]["endpoint"]["requestUri"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn stream_sends_refetch_for_its_own_context_only() {
    let parapet = InProcessParapet::offline_with(&flags(true), &["--base-path", "/edge"]).await;
    let path = format!("/edge{BULK_PATH}");
    let evaluate = async |context: Value| {
        let response = parapet.post(&path, FRONTEND, &json!({ "context": context })).await;
        assert_eq!(response.status, StatusCode::OK);
        response
    };
    let gold = || json!({ "targetingKey": "7", "plan": "gold" });
    let (plain, golden) =
        (event_stream_path(&evaluate(json!({})).await), event_stream_path(&evaluate(gold()).await));
    assert!(plain.starts_with("/edge/ofrep/v1/events?ticket="), "{plain}");
    assert_eq!(
        event_stream_path(&evaluate(gold()).await),
        golden,
        "the same context, the same stream"
    );
    assert!(!golden.contains("gold") && !golden.contains(FRONTEND));
    let open = async |path: &str, last: Option<&str>| {
        EventStream::open(parapet.request(reqwest::Method::GET, path), last).await
    };
    let (mut one, mut two) = (open(&plain, None).await, open(&golden, None).await);

    // A change for gold users only.
    let before = flags(true);
    let silver = before.replace(r#""values":["gold"]"#, r#""values":["silver"]"#);
    assert_ne!(before, silver);
    std::fs::write(parapet.flags_file(), &silver).unwrap();
    let received = two.next().await.unwrap();
    assert_eq!((&*received.name, &*received.data), ("message", r#"{"type":"refetchEvaluation"}"#));
    // A change for all users: the first event on the other stream.
    std::fs::write(parapet.flags_file(), flags(false)).unwrap();
    let both = (one.next().await.unwrap(), two.next().await.unwrap());
    assert!(both.0.data.contains("refetch") && both.1.data.contains("refetch"));

    // A client that missed a change gets an event at once; one that is up to date does not.
    assert!(open(&golden, None).await.next().await.unwrap().data.contains("refetch"));
    assert!(open(&golden, Some(&received.id)).await.next().await.unwrap().data.contains("refetch"));
    let mut current = open(&golden, Some(&both.1.id)).await;
    std::fs::write(parapet.flags_file(), flags(true)).unwrap();
    let next = current.next().await.unwrap();
    assert_ne!(next.id, both.1.id, "that was the change after");

    let refused = async |path: &str| {
        let response = send(parapet.request(reqwest::Method::GET, path)).await;
        assert_eq!(response.status, StatusCode::UNAUTHORIZED, "{path}");
        assert!(response.json()["errorDetails"].is_string());
    };
    refused("/edge/ofrep/v1/events").await;
    refused("/edge/ofrep/v1/events?ticket=nonsense").await;
    refused(&golden[..golden.len() - 1]).await;
    // A context that is too long for a URL is evaluated, but gets no stream.
    let long = json!({ "a": "x".repeat(4000), "b": "x".repeat(4000) });
    assert!(evaluate(long).await.json().get("eventStreams").is_none());
}
