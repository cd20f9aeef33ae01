//! What SDKs and other edges ask, as the document of the API tells it.
//!
//! Bodies are Unleash's. Those that pass through as they are, flags and segments, are described by
//! what every one of them has; those that are read, by what must be there.

use serde_json::{Map, Value, json};

use super::parts::{arguments, content};

/// What a row of the table is asked with, and answers.
struct Row {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    /// The schema of the body.
    takes: Option<&'static str>,
    answer: Answer,
    query: &'static [(&'static str, Kind)],
}

#[derive(Clone, Copy)]
enum Answer {
    /// 200, or 304 for who knows it already.
    Cached(&'static str),
    /// 200.
    Told(&'static str),
    /// As the former, refusals in the words of OpenFeature.
    Evaluated(&'static str),
    /// 200, and events for as long as it is open.
    Events,
    /// As the former, refusals in the words of OpenFeature.
    Notices,
    /// 202 without a body.
    Accepted,
}

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Texts,
    /// `name[key]=value`
    Properties,
}

const FILTER: &[(&str, Kind)] = &[("namePrefix", Kind::Text), ("project", Kind::Texts)];

const TICKET: &[(&str, Kind)] = &[("ticket", Kind::Text)];

/// What is asked without a token; a ticket stands for one.
const OPEN: [&str; 2] = ["/edge/validate", "/ofrep/v1/events"];

const CONTEXT: &[(&str, Kind)] = &[
    ("userId", Kind::Text),
    ("sessionId", Kind::Text),
    ("appName", Kind::Text),
    ("environment", Kind::Text),
    ("remoteAddress", Kind::Text),
    ("currentTime", Kind::Text),
    ("properties", Kind::Properties),
];

const fn get(path: &'static str, answer: &'static str, summary: &'static str) -> Row {
    let answer = Answer::Cached(answer);
    Row { method: "get", path, summary, takes: None, answer, query: &[] }
}

const fn post(path: &'static str, takes: &'static str, summary: &'static str) -> Row {
    let takes = Some(takes);
    Row { method: "post", path, summary, takes, answer: Answer::Accepted, query: &[] }
}

impl Row {
    const fn asks(self, query: &'static [(&'static str, Kind)]) -> Self {
        Self { query, ..self }
    }

    const fn tells(self, answer: Answer) -> Self {
        Self { answer, ..self }
    }
}

#[rustfmt::skip]
static ROWS: &[Row] = &[
    get("/api/client/features", "ClientFeatures", "The flag configuration that the token sees").asks(FILTER),
    Row { takes: None, ..post("/api/client/features", "", "The same") }.tells(Answer::Cached("ClientFeatures")).asks(FILTER),
    get("/api/client/features/{name}", "ClientFeature", "One flag's configuration"),
    get("/api/client/delta", "ClientDelta", "What changed since the state that If-None-Match names").asks(FILTER),
    get("/api/client/streaming", "", "What changes, as server-sent events").tells(Answer::Events).asks(FILTER),
    post("/api/client/register", "Registration", "An application starts"),
    post("/api/client/metrics", "ClientMetrics", "What an SDK counted"),
    post("/api/client/metrics/bulk", "BulkMetrics", "What an edge gathered"),
    post("/api/client/metrics/edge", "EdgeInstance", "How an edge is doing"),
    get("/api/frontend", "Toggles", "The flags that are on for a context").asks(CONTEXT),
    post("/api/frontend", "Context", "The same, the context in the body").tells(Answer::Cached("Toggles")),
    get("/api/frontend/all", "Toggles", "All flags for a context").asks(CONTEXT),
    post("/api/frontend/all", "Context", "The same, the context in the body").tells(Answer::Cached("Toggles")),
    get("/api/frontend/features/{name}", "Toggle", "One flag for a context").asks(CONTEXT),
    post("/api/frontend/features/{name}", "Context", "The same, the context in the body").tells(Answer::Cached("Toggle")),
    get("/api/frontend/streaming", "", "The flags that are on for a context, and what changes of that, as server-sent events").tells(Answer::Events).asks(CONTEXT),
    post("/api/frontend/streaming", "Context", "The same, the context in the body").tells(Answer::Events),
    post("/api/frontend/client/register", "Registration", "A frontend application starts"),
    post("/api/frontend/client/metrics", "ClientMetrics", "What a frontend SDK counted"),
    post("/ofrep/v1/evaluate/flags", "OfrepQuestion", "All flags for an OpenFeature provider").tells(Answer::Evaluated("OfrepFlags")),
    post("/ofrep/v1/evaluate/flags/{key}", "OfrepQuestion", "One flag for an OpenFeature provider").tells(Answer::Evaluated("OfrepFlag")),
    get("/ofrep/v1/events", "", "When an OpenFeature provider is to ask again, as server-sent events").tells(Answer::Notices).asks(TICKET),
    post("/edge/validate", "Tokens", "Which of these tokens are valid").tells(Answer::Told("ValidTokens")),
];

/// Older paths, and what they stand for.
const OLDER: [(&str, &str); 9] = [
    ("/api/proxy", "/api/frontend"),
    ("/api/proxy/all", "/api/frontend/all"),
    ("/api/proxy/streaming", "/api/frontend/streaming"),
    ("/api/proxy/client/register", "/api/frontend/client/register"),
    ("/api/proxy/client/metrics", "/api/frontend/client/metrics"),
    ("/api/proxy/all/client/register", "/api/frontend/client/register"),
    ("/api/proxy/all/client/metrics", "/api/frontend/client/metrics"),
    ("/api/frontend/all/client/register", "/api/frontend/client/register"),
    ("/api/frontend/all/client/metrics", "/api/frontend/client/metrics"),
];

/// Path, method and description of each operation; `error` is what a refusal is.
pub(super) fn operations(error: &Value) -> Vec<(&'static str, &'static str, Value)> {
    let mut told: Vec<_> =
        ROWS.iter().map(|row| (row.path, row.method, described(row, row.path, error))).collect();
    for (older, path) in OLDER {
        for row in ROWS.iter().filter(|row| row.path == path) {
            let mut operation = described(row, older, error);
            operation["deprecated"] = true.into();
            told.push((older, row.method, operation));
        }
    }
    told
}

fn described(row: &Row, path: &str, error: &Value) -> Value {
    let schema = |name: &str| json!({ "$ref": format!("#/components/schemas/{name}") });
    let done = |name| content("application/json", &schema(name));
    let refusal = match row.answer {
        Answer::Evaluated(_) | Answer::Notices => {
            &content("application/json", &schema("OfrepRefusal"))
        }
        _ => error,
    };
    let mut responses = Map::new();
    match row.answer {
        Answer::Cached(name) | Answer::Evaluated(name) => {
            responses.insert("200".to_owned(), done(name));
            responses.insert("304".to_owned(), json!({ "description": "As before" }));
        }
        Answer::Told(name) => {
            responses.insert("200".to_owned(), done(name));
        }
        Answer::Events | Answer::Notices => {
            let text = json!({ "type": "string" });
            let event = json!({
                "type": "object",
                "required": ["event", "data"],
                "properties": { "event": text, "id": text, "data": text },
            });
            let events = content("text/event-stream", &event);
            responses.insert("200".to_owned(), events);
            responses.insert("429".to_owned(), refusal.clone());
        }
        Answer::Accepted => {
            responses.insert("202".to_owned(), json!({ "description": "Taken in" }));
            responses.insert("429".to_owned(), refusal.clone());
        }
    }
    for status in [400, 401, 403, 404, 408, 413, 415, 503] {
        responses.insert(status.to_string(), refusal.clone());
    }
    let mut parameters = arguments(path);
    parameters.extend(row.query.iter().map(|(name, kind)| query(name, *kind)));
    let mut operation = json!({
        "operationId": format!("{}{}", row.method, path.replace(['/', '{', '}'], "_")),
        "tags": ["SDKs"],
        "summary": row.summary,
        "parameters": parameters,
        "responses": responses,
        "security": if OPEN.contains(&row.path) { json!([]) } else { json!([{ "token": [] }]) },
    });
    if let Some(name) = row.takes {
        operation["requestBody"] = json!({
            "required": true, "content": { "application/json": { "schema": schema(name) } },
        });
    }
    operation
}

fn query(name: &str, kind: Kind) -> Value {
    let mut parameter = json!({ "name": name, "in": "query" });
    parameter["schema"] = match kind {
        Kind::Text => json!({ "type": "string" }),
        Kind::Texts => json!({ "type": "array", "items": { "type": "string" } }),
        Kind::Properties => {
            parameter["style"] = "deepObject".into();
            parameter["explode"] = true.into();
            json!({ "type": "object", "additionalProperties": { "type": "string" } })
        }
    };
    parameter
}

/// The schemas that the operations refer to, and those of whom a context is part.
pub(super) fn schemas() -> Map<String, Value> {
    let text = || json!({ "type": "string" });
    let name = || json!({ "type": "string", "minLength": 1 });
    let time = || json!({ "type": "string", "format": "date-time" });
    let count = || json!({ "type": "integer", "minimum": 0 });
    let list = |items: Value| json!({ "type": "array", "items": items });
    let object = |required: &[&str], properties: Value| json!({ "type": "object", "required": required, "properties": properties });
    let counts = json!({
        "yes": count(),
        "no": count(),
        "variants": { "type": "object", "additionalProperties": count() },
    });
    let mut counter = counts.clone();
    for (field, schema) in [
        ("featureName", name()),
        ("appName", name()),
        ("environment", name()),
        ("timestamp", time()),
    ] {
        counter[field] = schema;
    }
    let registration = object(
        &["appName", "started", "interval"],
        json!({
            "appName": name(), "instanceId": text(), "connectionId": text(), "sdkVersion": text(),
            "started": time(), "interval": count(), "strategies": list(text()),
        }),
    );
    let schemas = json!({
        "ClientFeatures": object(&["version", "features", "query"], json!({
            "version": { "type": "integer" },
            "features": list(json!({ "$ref": "#/components/schemas/ClientFeature" })),
            "segments": list(object(&["id"], json!({ "id": { "type": "integer" } }))),
            "query": { "type": "object" },
            "meta": object(&["revisionId", "etag", "queryHash"], json!({
                "revisionId": count(), "etag": text(), "queryHash": text(),
            })),
        })),
        "ClientDelta": object(&["events"], json!({
            "events": list(object(&["type", "eventId"], json!({
                "type": { "enum": [
                    "hydration", "feature-updated", "feature-removed", "segment-updated",
                    "segment-removed",
                ] },
                "eventId": count(),
            }))),
        })),
        "ClientFeature": object(&["name"], json!({ "name": name() })),
        "Toggles": object(&["toggles"], json!({
            "toggles": list(json!({ "$ref": "#/components/schemas/Toggle" })),
        })),
        "Toggle": object(&["name", "enabled", "variant", "impressionData"], json!({
            "name": name(),
            "enabled": { "type": "boolean" },
            "variant": object(&["name", "enabled"], json!({
                "name": text(),
                "enabled": { "type": "boolean" },
                "payload": object(&["type", "value"], json!({ "type": text(), "value": text() })),
            })),
            "impressionData": { "type": "boolean" },
        })),
        "Context": {
            "type": "object",
            "description": "Whom a flag is evaluated for; every field may be left out.",
            "properties": {
                "userId": text(), "sessionId": text(), "appName": text(), "environment": text(),
                "remoteAddress": text(), "currentTime": text(),
                "properties": { "type": "object", "additionalProperties": text() },
            },
        },
        "Registration": registration,
        "ClientMetrics": object(&["appName"], json!({
            "appName": name(), "instanceId": text(), "connectionId": text(),
            "bucket": object(&["start", "toggles"], json!({
                "start": time(),
                "stop": time(),
                "toggles": {
                    "type": "object",
                    "additionalProperties": { "type": "object", "properties": counts },
                },
            })),
        })),
        "BulkMetrics": object(&["applications", "metrics"], json!({
            "applications": list(json!({ "$ref": "#/components/schemas/Registration" })),
            "metrics": list(object(&["featureName", "appName", "environment", "timestamp"], counter)),
        })),
        "EdgeInstance": object(&["identifier"], json!({ "identifier": name() })),
        "OfrepQuestion": object(&[], json!({ "context": {
            "type": "object", "properties": { "targetingKey": text() },
        } })),
        "OfrepFlags": object(&["flags"], json!({
            "flags": list(json!({ "$ref": "#/components/schemas/OfrepFlag" })),
            "eventStreams": list(object(&["type", "endpoint"], json!({
                "type": { "const": "sse" },
                "endpoint": object(&["requestUri"], json!({ "requestUri": text() })),
                "inactivityDelaySec": { "type": "integer", "minimum": 1 },
            }))),
        })),
        "OfrepFlag": object(&["key", "reason", "variant", "metadata"], json!({
            "key": name(),
            "value": { "type": ["boolean", "string", "number", "object"] },
            "variant": text(),
            "reason": { "enum": ["STATIC", "TARGETING_MATCH", "SPLIT", "DISABLED", "UNKNOWN"] },
            "metadata": {
                "type": "object",
                "additionalProperties": { "type": ["boolean", "string", "number"] },
            },
        })),
        "OfrepRefusal": object(&["errorDetails"], json!({
            "key": text(),
            "errorCode": { "enum": [
                "PARSE_ERROR", "TARGETING_KEY_MISSING", "INVALID_CONTEXT", "FLAG_NOT_FOUND", "GENERAL",
            ] },
            "errorDetails": text(),
        })),
        "Tokens": object(&["tokens"], json!({ "tokens": list(text()) })),
        "ValidTokens": object(&["tokens"], json!({
            "tokens": list(object(&["token", "type", "environment", "projects"], json!({
                "token": text(), "type": text(), "environment": text(), "projects": list(text()),
            }))),
        })),
    });
    match schemas {
        Value::Object(schemas) => schemas,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use hyper::Method;

    use super::*;
    use crate::http::route::Route;

    #[test]
    fn what_is_told_is_what_the_data_listener_serves() {
        let route = |method: &str, path: &str| {
            let method = Method::from_bytes(method.to_ascii_uppercase().as_bytes()).unwrap();
            let path = path.replace("{name}", "x");
            Route::TEMPLATES[Route::parse(&method, &path).unwrap().index()]
        };
        for row in ROWS {
            assert_eq!(route(row.method, row.path), row.path);
        }
        for (older, path) in OLDER {
            assert!(ROWS.iter().any(|row| row.path == path), "{path}");
            for row in ROWS.iter().filter(|row| row.path == path) {
                assert_eq!(route(row.method, older), path);
            }
        }
    }
}
