//! The operations for SDKs and other edges in the OpenAPI document.
//!
//! Their bodies are defined by Unleash. Flags and segments pass through unchanged, so their schemas
//! contain only the fields that all of them have. Schemas of bodies that are parsed contain the required
//! fields.

use serde_json::{Map, Value, json};

use super::helpers::{path_parameters, success_response};

/// One operation: a row of the table.
struct SdkOperation {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    /// The schema of the request body.
    body_schema: Option<&'static str>,
    response: SdkResponse,
    query: &'static [(&'static str, ParameterType)],
}

#[derive(Clone, Copy)]
enum SdkResponse {
    /// 200 with JSON, or 304 if the client's entity tag matches.
    Cached(&'static str),
    /// 200 with JSON.
    Json(&'static str),
    /// As `Cached`, with errors in OFREP's format.
    OfrepEvaluation(&'static str),
    /// 200 with server-sent events while the connection is open.
    EventStream,
    /// As `EventStream`, with errors in OFREP's format.
    OfrepEventStream,
    /// 202 without a body.
    Accepted,
}

#[derive(Clone, Copy)]
enum ParameterType {
    Text,
    Texts,
    /// `name[key]=value`
    Properties,
}

const FEATURE_FILTER: &[(&str, ParameterType)] =
    &[("namePrefix", ParameterType::Text), ("project", ParameterType::Texts)];

const STREAM_TICKET: &[(&str, ParameterType)] = &[("ticket", ParameterType::Text)];

/// Paths that need no token. The event stream requires a ticket instead.
const UNAUTHENTICATED_PATHS: [&str; 2] = ["/edge/validate", "/ofrep/v1/events"];

const CONTEXT_PARAMETERS: &[(&str, ParameterType)] = &[
    ("userId", ParameterType::Text),
    ("sessionId", ParameterType::Text),
    ("appName", ParameterType::Text),
    ("environment", ParameterType::Text),
    ("remoteAddress", ParameterType::Text),
    ("currentTime", ParameterType::Text),
    ("properties", ParameterType::Properties),
];

const fn get(path: &'static str, answer: &'static str, summary: &'static str) -> SdkOperation {
    let response = SdkResponse::Cached(answer);
    SdkOperation { method: "get", path, summary, body_schema: None, response, query: &[] }
}

const fn post(path: &'static str, takes: &'static str, summary: &'static str) -> SdkOperation {
    let body_schema = Some(takes);
    SdkOperation {
        method: "post",
        path,
        summary,
        body_schema,
        response: SdkResponse::Accepted,
        query: &[],
    }
}

impl SdkOperation {
    const fn query(self, query: &'static [(&'static str, ParameterType)]) -> Self {
        Self { query, ..self }
    }

    const fn response(self, answer: SdkResponse) -> Self {
        Self { response: answer, ..self }
    }
}

#[rustfmt::skip]
static SDK_OPERATIONS: &[SdkOperation] = &[
    get("/api/client/features", "ClientFeatures", "The flag configuration that the token has access to").query(FEATURE_FILTER),
    SdkOperation { body_schema: None, ..post("/api/client/features", "", "The same as GET") }.response(SdkResponse::Cached("ClientFeatures")).query(FEATURE_FILTER),
    get("/api/client/features/{name}", "ClientFeature", "One flag's configuration"),
    get("/api/client/delta", "ClientDelta", "Changes since the state named by If-None-Match").query(FEATURE_FILTER),
    get("/api/client/streaming", "", "Changes, as server-sent events").response(SdkResponse::EventStream).query(FEATURE_FILTER),
    post("/api/client/register", "Registration", "Register an application"),
    post("/api/client/metrics", "ClientMetrics", "Usage counted by an SDK"),
    post("/api/client/metrics/bulk", "BulkMetrics", "Usage and registrations collected by an edge"),
    post("/api/client/metrics/edge", "EdgeInstance", "The state of an edge"),
    get("/api/frontend", "Toggles", "The flags that are on for a context").query(CONTEXT_PARAMETERS),
    post("/api/frontend", "Context", "The same as GET, with the context in the body").response(SdkResponse::Cached("Toggles")),
    get("/api/frontend/all", "Toggles", "All flags for a context").query(CONTEXT_PARAMETERS),
    post("/api/frontend/all", "Context", "The same as GET, with the context in the body").response(SdkResponse::Cached("Toggles")),
    get("/api/frontend/features/{name}", "Toggle", "One flag for a context").query(CONTEXT_PARAMETERS),
    post("/api/frontend/features/{name}", "Context", "The same as GET, with the context in the body").response(SdkResponse::Cached("Toggle")),
    get("/api/frontend/streaming", "", "The flags that are on for a context and their changes, as server-sent events").response(SdkResponse::EventStream).query(CONTEXT_PARAMETERS),
    post("/api/frontend/streaming", "Context", "The same as GET, with the context in the body").response(SdkResponse::EventStream),
    post("/api/frontend/client/register", "Registration", "Register a frontend application"),
    post("/api/frontend/client/metrics", "ClientMetrics", "Usage counted by a frontend SDK"),
    post("/ofrep/v1/evaluate/flags", "OfrepQuestion", "All flags for an OpenFeature provider").response(SdkResponse::OfrepEvaluation("OfrepFlags")),
    post("/ofrep/v1/evaluate/flags/{key}", "OfrepQuestion", "One flag for an OpenFeature provider").response(SdkResponse::OfrepEvaluation("OfrepFlag")),
    get("/ofrep/v1/events", "", "Notifications to evaluate again, for an OpenFeature provider, as server-sent events").response(SdkResponse::OfrepEventStream).query(STREAM_TICKET),
    post("/edge/validate", "Tokens", "Validate tokens").response(SdkResponse::Json("ValidTokens")),
];

/// Deprecated paths, and the paths that replace them.
const DEPRECATED_PATHS: [(&str, &str); 9] = [
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

/// Path, method and description of each operation. `error` is the description of an error response.
pub(super) fn operations(error: &Value) -> Vec<(&'static str, &'static str, Value)> {
    let mut operations: Vec<_> = SDK_OPERATIONS
        .iter()
        .map(|row| (row.path, row.method, operation_json(row, row.path, error)))
        .collect();
    for (older, path) in DEPRECATED_PATHS {
        for row in SDK_OPERATIONS.iter().filter(|row| row.path == path) {
            let mut operation = operation_json(row, older, error);
            operation["deprecated"] = true.into();
            operations.push((older, row.method, operation));
        }
    }
    operations
}

fn operation_json(row: &SdkOperation, path: &str, error: &Value) -> Value {
    let schema = |name: &str| json!({ "$ref": format!("#/components/schemas/{name}") });
    let done = |name| success_response("application/json", &schema(name));
    let error_response = match row.response {
        SdkResponse::OfrepEvaluation(_) | SdkResponse::OfrepEventStream => {
            &success_response("application/json", &schema("OfrepRefusal"))
        }
        _ => error,
    };
    let mut responses = Map::new();
    match row.response {
        SdkResponse::Cached(name) | SdkResponse::OfrepEvaluation(name) => {
            responses.insert("200".to_owned(), done(name));
            responses.insert("304".to_owned(), json!({ "description": "Not modified" }));
        }
        SdkResponse::Json(name) => {
            responses.insert("200".to_owned(), done(name));
        }
        SdkResponse::EventStream | SdkResponse::OfrepEventStream => {
            let text = json!({ "type": "string" });
            let event = json!({
                "type": "object",
                "required": ["event", "data"],
                "properties": { "event": text, "id": text, "data": text },
            });
            let events = success_response("text/event-stream", &event);
            responses.insert("200".to_owned(), events);
            responses.insert("429".to_owned(), error_response.clone());
        }
        SdkResponse::Accepted => {
            responses.insert("202".to_owned(), json!({ "description": "Accepted" }));
            responses.insert("429".to_owned(), error_response.clone());
        }
    }
    for status in [400, 401, 403, 404, 408, 413, 415, 503] {
        responses.insert(status.to_string(), error_response.clone());
    }
    let mut parameters = path_parameters(path);
    parameters.extend(row.query.iter().map(|(name, kind)| query_parameter(name, *kind)));
    let mut operation = json!({
        "operationId": format!("{}{}", row.method, path.replace(['/', '{', '}'], "_")),
        "tags": ["SDKs"],
        "summary": row.summary,
        "parameters": parameters,
        "responses": responses,
        "security": if UNAUTHENTICATED_PATHS.contains(&row.path) { json!([]) } else { json!([{ "token": [] }]) },
    });
    if let Some(name) = row.body_schema {
        operation["requestBody"] = json!({
            "required": true, "content": { "application/json": { "schema": schema(name) } },
        });
    }
    operation
}

fn query_parameter(name: &str, kind: ParameterType) -> Value {
    let mut parameter = json!({ "name": name, "in": "query" });
    parameter["schema"] = match kind {
        ParameterType::Text => json!({ "type": "string" }),
        ParameterType::Texts => json!({ "type": "array", "items": { "type": "string" } }),
        ParameterType::Properties => {
            parameter["style"] = "deepObject".into();
            parameter["explode"] = true.into();
            json!({ "type": "object", "additionalProperties": { "type": "string" } })
        }
    };
    parameter
}

/// The schemas that the operations refer to.
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
            "description": "The context that a flag is evaluated for; every field is optional.",
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
    fn operations_match_the_routes_of_the_data_listener() {
        let route = |method: &str, path: &str| {
            let method = Method::from_bytes(method.to_ascii_uppercase().as_bytes()).unwrap();
            let path = path.replace("{name}", "x");
            Route::TEMPLATES[Route::parse(&method, &path).unwrap().index()]
        };
        for row in SDK_OPERATIONS {
            assert_eq!(route(row.method, row.path), row.path);
        }
        for (older, path) in DEPRECATED_PATHS {
            assert!(SDK_OPERATIONS.iter().any(|row| row.path == path), "{path}");
            for row in SDK_OPERATIONS.iter().filter(|row| row.path == path) {
                assert_eq!(route(row.method, older), path);
            }
        }
    }
}
