//! The official client specification, in process: every test of every file.
//!
//! It knows nothing of HTTP; the same files are put through a running edge elsewhere. The two
//! files about delta events are applied to a document here, because what they test is the state
//! that results, and the engine only ever sees states.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use jiff::Timestamp;
use parapet::engine::{Context, Engine, Outcome};
use parapet::wire::features::Document;
use serde_json::{Value, json};

fn read(file: &str) -> Value {
    let specifications = "tests/node_modules/@unleash/client-specification/specifications";
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(specifications).join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// The features and segments that a sequence of delta events leads to.
fn apply(events: &[Value]) -> Value {
    let mut features = BTreeMap::new();
    let mut segments = BTreeMap::new();
    let mut put = |list: &Value| {
        for feature in list["features"].as_array().into_iter().flatten() {
            features.insert(feature["name"].to_string(), feature.clone());
        }
        for segment in list["segments"].as_array().into_iter().flatten() {
            segments.insert(segment["id"].to_string(), segment.clone());
        }
        if let Some(name) = list.get("featureName") {
            features.remove(&name.to_string());
        }
        if let Some(id) = list.get("segmentId") {
            segments.remove(&id.to_string());
        }
    };
    for event in events {
        match event["type"].as_str().unwrap() {
            "hydration" | "feature-removed" | "segment-removed" => put(event),
            "feature-updated" => put(&json!({ "features": [event["feature"]] })),
            "segment-updated" => put(&json!({ "segments": [event["segment"]] })),
            unknown => panic!("unknown delta event {unknown}"),
        }
    }
    let (features, segments) = (features.values(), segments.values());
    json!({
        "features": features.collect::<Vec<_>>(),
        "segments": segments.collect::<Vec<_>>(),
    })
}

fn evaluate(engine: &Engine, test: &Value) -> (bool, Value) {
    let context = &test["context"];
    let properties: Vec<(&str, &str)> = context["properties"]
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(name, value)| Some((name.as_str(), value.as_str()?)))
        .collect();
    let context = Context {
        user_id: context["userId"].as_str(),
        session_id: context["sessionId"].as_str(),
        environment: context["environment"].as_str(),
        app_name: context["appName"].as_str(),
        current_time: context["currentTime"].as_str(),
        remote_address: context["remoteAddress"].as_str(),
        properties: &properties,
        hostname: None,
        now: Timestamp::now(),
        draw: 7,
    };
    let disabled = |on| json!({ "name": "disabled", "enabled": false, "feature_enabled": on });
    let Some(id) = engine.find(test["toggleName"].as_str().unwrap()) else {
        return (false, disabled(false));
    };
    let outcome = engine.evaluate(id, &engine.bind(&context));
    let variant = match engine.flag(id).variant(outcome) {
        None => disabled(outcome.is_on()),
        Some(variant) => {
            let mut json =
                json!({ "name": variant.name, "enabled": true, "feature_enabled": true });
            if let Some(payload) = &variant.payload {
                json["payload"] = json!({ "type": payload.kind, "value": payload.value });
            }
            json
        }
    };
    assert_eq!(outcome.is_on(), outcome != Outcome::Off);
    (outcome.is_on(), variant)
}

#[test]
#[ignore = "needs the npm packages of tests/, see tests/run"]
fn the_official_specification_passes_whole() {
    let mut failures = Vec::new();
    let mut passed = 0;
    for file in read("index.json").as_array().unwrap() {
        let file = file.as_str().unwrap();
        let specification = read(file);
        let state = match specification["state"]["events"].as_array() {
            Some(events) => apply(events),
            None => specification["state"].clone(),
        };
        let document = Document::parse(state.to_string().as_bytes()).unwrap();
        let (engine, _) = Engine::compile(&document);
        let tests = |kind: &str| specification[kind].as_array().cloned().unwrap_or_default();
        let mut check = |test: &Value, answer: Value| {
            if answer == test["expectedResult"] {
                passed += 1;
            } else {
                failures.push(format!("{file}: {}: answered {answer}", test["description"]));
            }
        };
        for test in tests("tests") {
            let (on, _) = evaluate(&engine, &test);
            check(&test, on.into());
        }
        for test in tests("variantTests") {
            let (_, variant) = evaluate(&engine, &test);
            check(&test, variant);
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(passed >= 279, "only {passed} tests were found");
}
