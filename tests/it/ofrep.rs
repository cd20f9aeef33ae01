//! OpenFeature's official providers, and what they are sent.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::local::{Answer, CLIENT, FRONTEND, Local, WEB_FRONTEND, answer};
use crate::rig::{Driver, node, until};

const ALL: &str = "/ofrep/v1/evaluate/flags";

const PATIENCE: Duration = Duration::from_mins(1);

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

/// Panics unless an answer is what version 0.3.0 of the protocol allows.
#[track_caller]
fn assert_allowed(path: &str, status: u64, body: &Value) {
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
    let is_bulk = path.ends_with(ALL);
    match status {
        200 if is_bulk => body["flags"].as_array().unwrap().iter().for_each(success),
        200 => success(body),
        304 => assert_eq!(*body, "", "a 304 has no body"),
        400 => {
            let codes = ["PARSE_ERROR", "TARGETING_KEY_MISSING", "INVALID_CONTEXT", "GENERAL"];
            assert!(codes.contains(&body["errorCode"].as_str().unwrap()), "{body}");
            assert_eq!(body["key"].is_string(), !is_bulk, "{body}");
        }
        404 => assert_eq!(body["errorCode"], "FLAG_NOT_FOUND", "{body}"),
        401 | 403 => assert!(body["errorDetails"].is_string(), "{body}"),
        _ => panic!("{status} {body}"),
    }
}

#[tokio::test]
#[ignore = "needs the npm packages of tests/, see tests/run"]
async fn the_official_providers_get_every_type_of_value() {
    let parapet = Local::offline(&flags(true)).await;
    let options = json!({ "url": format!("http://{}", parapet.address()), "frontend": FRONTEND, "client": CLIENT });
    let mut providers = Driver::start("OFREP providers", node("ofrep.mjs").into(), &options).await;
    let mut check = async |who: &str, kind: &str, flag: &str, context: Value, expect: Value| {
        let fallback = match kind {
            "boolean" => json!(false),
            "string" => json!("fallback"),
            "number" => json!(-1),
            _ => json!({ "fallback": true }),
        };
        let question =
            json!({ "type": kind, "flag": flag, "fallback": fallback, "context": context });
        let told = providers.ask(who, question).await;
        let told = json!([told["value"], told["variant"], told["reason"], told["errorCode"]]);
        assert_eq!(told, expect, "{who} {flag}");
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

    // Off, it is the application's own default and no value of another type; these versions of the
    // providers do take the missing value for an error.
    for (who, flag) in [("server", "off-text"), ("server", "gold-text"), ("web", "off-text")] {
        let question = json!({ "type": "string", "flag": flag, "fallback": "own", "context": {} });
        assert_eq!(providers.ask(who, question).await["value"], "own", "{who} {flag}");
    }

    // The web provider polls, is told when nothing is new, and notices what is.
    let before = providers.ask("changes", Value::Null).await["changes"].as_u64().unwrap();
    std::fs::write(parapet.flags_file(), flags(false)).unwrap();
    let question = json!({ "type": "boolean", "flag": "plain", "fallback": true });
    until("the change arrives", PATIENCE, async || {
        let told = providers.ask("web", question.clone()).await;
        (told["value"] == false && told["reason"] == "DISABLED").then_some(())
    })
    .await;
    assert!(providers.ask("changes", Value::Null).await["changes"].as_u64().unwrap() > before);
    providers.ask("context", json!({ "context": { "targetingKey": "8", "plan": "gold" } })).await;
    let told =
        providers.ask("web", json!({ "type": "boolean", "flag": "gold", "fallback": false }));
    assert_eq!(told.await["value"], true);

    let traffic = providers.ask("traffic", Value::Null).await;
    let traffic = traffic["traffic"].as_array().unwrap();
    for it in traffic {
        assert_allowed(it["url"].as_str().unwrap(), it["status"].as_u64().unwrap(), &it["body"]);
    }
    let statuses: Vec<_> = traffic.iter().map(|it| it["status"].as_u64().unwrap()).collect();
    assert!([200, 304, 404].iter().all(|it| statuses.contains(it)), "{statuses:?}");
    assert_eq!(providers.complaints(), "");
    providers.close().await;
}

#[tokio::test]
async fn tokens_are_taken_from_each_of_their_places_and_refusals_are_of_the_protocol() {
    let parapet = Local::offline(&flags(true)).await;
    let one = |key: &str| format!("{ALL}/{key}");
    let ask = async |path: &str, header: (&str, String), body: &str| -> Answer {
        let request = parapet.json(path, &Value::Null).body(body.to_owned());
        answer(request.header(header.0, header.1)).await
    };
    let check = async |path: &str, header: (&str, String), body: &str, expect: u16| {
        let told = ask(path, header, body).await;
        assert_eq!(told.status, expect, "{path} {body}");
        assert_allowed(path, expect.into(), &told.json());
        told.json()
    };
    let raw = |token: &str| ("authorization", token.to_owned());
    let bearer = |token: &str| ("authorization", format!("Bearer {token}"));
    let key = |token: &str| ("x-api-key", token.to_owned());
    for header in [raw(FRONTEND), bearer(FRONTEND), key(FRONTEND)] {
        let all = check(ALL, header, "{}", 200).await;
        assert_eq!(all["flags"].as_array().unwrap().len(), 10);
    }
    let web = check(ALL, raw(WEB_FRONTEND), "", 200).await;
    let names: Vec<_> =
        web["flags"].as_array().unwrap().iter().map(|it| it["key"].clone()).collect();
    assert!(names.is_sorted_by_key(|it| it.as_str().unwrap().to_owned()), "{names:?}");
    assert_eq!(names.len(), 9);
    check(&one("plain"), key(CLIENT), "{}", 200).await;
    check(&one("elsewhere"), raw(WEB_FRONTEND), "{}", 404).await;
    check(ALL, key(CLIENT), "{}", 403).await;
    check(ALL, key("*:development.nobody"), "{}", 401).await;
    check(&one("plain"), key("nonsense"), "{}", 401).await;
    assert_eq!(check(ALL, raw(FRONTEND), "{", 400).await["errorCode"], "PARSE_ERROR");
    let odd = check(&one("plain"), raw(FRONTEND), r#"{"context":7}"#, 400).await;
    assert_eq!((&odd["errorCode"], &odd["key"]), (&json!("INVALID_CONTEXT"), &json!("plain")));
    let long = json!({ "context": { "plan": "x".repeat(5000) } }).to_string();
    assert_eq!(check(ALL, raw(FRONTEND), &long, 400).await["errorCode"], "INVALID_CONTEXT");

    // The tag is of the outcome: who reads differently and gets the same has it already.
    let first = ask(ALL, raw(FRONTEND), r#"{"context":{"targetingKey":"7"}}"#).await;
    let etag = first.header("etag").to_owned();
    let again = async |body: &Value, expect: StatusCode| {
        let request = parapet.json(ALL, body).header("authorization", FRONTEND);
        assert_eq!(answer(request.header("if-none-match", &etag)).await.status, expect, "{body}");
    };
    again(&json!({ "context": { "targetingKey": "8" } }), StatusCode::NOT_MODIFIED).await;
    again(&json!({ "context": { "plan": "gold" } }), StatusCode::OK).await;
}
