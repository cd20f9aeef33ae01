//! The operations for SDKs and other edges in the OpenAPI document, from the table of their routes.
//!
//! Their bodies are defined by Unleash. Flags and segments pass through unchanged, so their schemas
//! contain only the fields that all of them have. Schemas of bodies that are parsed contain the required
//! fields.

use serde_json::{Map, Value, json};

use super::helpers::{path_parameters, success_response};
use crate::http::routes::{
    Endpoint, Operation, ParameterKind, QueryParameter, ROUTES, ResponseSpec, Route,
};

/// Path, method and description of each operation. `error` is the description of an error response.
pub(super) fn operations(error: &Value) -> Vec<(&'static str, &'static str, Value)> {
    let mut operations = Vec::new();
    for route in &ROUTES {
        for (method, operation) in [("get", &route.get), ("post", &route.post)] {
            let Some(operation) = operation else { continue };
            let Some(responses) = responses(route, operation, error) else { continue };
            let describe = |path| describe_operation(route, method, path, operation, &responses);
            operations.push((route.path, method, describe(route.path)));
            for path in route.deprecated_paths {
                let mut described = describe(path);
                described["deprecated"] = true.into();
                operations.push((path, method, described));
            }
        }
    }
    operations
}

fn reference(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}

/// The responses of an operation; `None` if the admin listener's table describes it.
fn responses(route: &Route, operation: &Operation, error: &Value) -> Option<Map<String, Value>> {
    let json_body = |schema| success_response("application/json", &reference(schema));
    let error = match route.endpoint {
        Endpoint::Ofrep(_) | Endpoint::OfrepEvents => &json_body("OfrepRefusal"),
        _ => error,
    };
    let mut responses = Map::new();
    match operation.response {
        ResponseSpec::AsForOperators => return None,
        ResponseSpec::Cached(schema) => {
            responses.insert("200".to_owned(), json_body(schema));
            responses.insert("304".to_owned(), json!({ "description": "Not modified" }));
        }
        ResponseSpec::Json(schema) => {
            responses.insert("200".to_owned(), json_body(schema));
        }
        ResponseSpec::EventStream => {
            let text = json!({ "type": "string" });
            let event = json!({
                "type": "object",
                "required": ["event", "data"],
                "properties": { "event": text, "id": text, "data": text },
            });
            responses.insert("200".to_owned(), success_response("text/event-stream", &event));
            responses.insert("429".to_owned(), error.clone());
        }
        ResponseSpec::Accepted => {
            responses.insert("202".to_owned(), json!({ "description": "Accepted" }));
            responses.insert("429".to_owned(), error.clone());
        }
    }
    for status in [400, 401, 403, 404, 408, 413, 415, 503] {
        responses.insert(status.to_string(), error.clone());
    }
    Some(responses)
}

fn describe_operation(
    route: &Route,
    method: &str,
    path: &str,
    operation: &Operation,
    responses: &Map<String, Value>,
) -> Value {
    let mut parameters = path_parameters(path);
    parameters.extend(operation.query.iter().map(query_parameter));
    let security = if route.token_kinds.is_empty() { json!([]) } else { json!([{ "token": [] }]) };
    let mut described = json!({
        "operationId": format!("{method}{}", path.replace(['/', '{', '}'], "_")),
        "tags": ["SDKs"],
        "summary": operation.summary,
        "parameters": parameters,
        "responses": responses,
        "security": security,
    });
    if let Some(schema) = operation.body {
        described["requestBody"] = json!({
            "required": true, "content": { "application/json": { "schema": reference(schema) } },
        });
    }
    described
}

fn query_parameter(query: &QueryParameter) -> Value {
    let mut parameter = json!({ "name": query.name, "in": "query" });
    parameter["schema"] = match query.kind {
        ParameterKind::Text => json!({ "type": "string" }),
        ParameterKind::TextList => json!({ "type": "array", "items": { "type": "string" } }),
        ParameterKind::Properties => {
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
