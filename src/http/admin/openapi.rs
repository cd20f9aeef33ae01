//! The document of the API (OpenAPI 3.1), written from the tables that requests are dispatched by.
//!
//! Schemas come from the types that are read and written. What SDKs ask is described by its outer
//! form only: the bodies are Unleash's, and pass through as they are.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::operation::{Access, Answer, OPERATIONS, Operation, Query, QueryKind};
use crate::wire::admin::Error;

/// Something that SDKs and other edges ask.
struct DataOperation {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    takes_body: bool,
    statuses: &'static [u16],
}

const fn data(
    method: &'static str,
    path: &'static str,
    takes_body: bool,
    statuses: &'static [u16],
    summary: &'static str,
) -> DataOperation {
    DataOperation { method, path, summary, takes_body, statuses }
}

#[rustfmt::skip]
const DATA: &[DataOperation] = &[
    data("get", "/api/client/features", false, &[200, 304], "The flag configuration that the token sees"),
    data("get", "/api/client/features/{name}", false, &[200, 304], "One flag's configuration"),
    data("post", "/api/client/register", true, &[202], "An application starts"),
    data("post", "/api/client/metrics", true, &[202], "What an SDK counted"),
    data("post", "/api/client/metrics/bulk", true, &[202], "What an edge gathered"),
    data("post", "/api/client/metrics/edge", true, &[202], "How an edge is doing"),
    data("get", "/api/frontend", false, &[200, 304], "The flags that are on for a context"),
    data("post", "/api/frontend", true, &[200, 304], "The same, the context in the body"),
    data("get", "/api/frontend/all", false, &[200, 304], "All flags for a context"),
    data("post", "/api/frontend/all", true, &[200, 304], "The same, the context in the body"),
    data("get", "/api/frontend/features/{name}", false, &[200, 304], "One flag for a context"),
    data("post", "/api/frontend/client/register", true, &[202], "A frontend application starts"),
    data("post", "/api/frontend/client/metrics", true, &[202], "What a frontend SDK counted"),
    data("post", "/edge/validate", true, &[200], "Which of these tokens are valid"),
];

/// The document.
pub(super) fn document() -> Value {
    let mut generator = SchemaSettings::draft2020_12()
        .with(|settings| settings.definitions_path = "/components/schemas".into())
        .into_generator();
    let error = generator.subschema_for::<Error>();
    let error =
        json!({ "description": "Refused", "content": { "application/json": { "schema": error } } });
    let mut paths: Map<String, Value> = Map::new();
    let mut add = |path: &str, method: &str, operation: Value| {
        let item = paths.entry(path).or_insert_with(|| json!({}));
        item[method.to_ascii_lowercase()] = operation;
    };
    for row in OPERATIONS {
        let success = match row.answer {
            Answer::Json(shape) | Answer::Created(shape) => {
                let schema = shape(&mut generator);
                content("application/json", &schema.to_value())
            }
            Answer::Probe => content("application/json", &json!({ "type": "object" })),
            Answer::Text => content("text/plain", &json!({ "type": "string" })),
            Answer::Done | Answer::Nothing => json!({ "description": "Done" }),
        };
        let body = row.body.map(|shape| shape(&mut generator).to_value());
        add(row.path, row.method.as_str(), described(row, success, body, &error));
    }
    for row in DATA {
        add(row.path, row.method, data_described(row, &error));
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Parapet",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "What operators and SDKs can ask of Parapet. The admin listener serves all of \
                it; the data listener what SDKs ask.",
            "license": { "name": "MIT OR Apache-2.0" },
        },
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "securitySchemes": {
                "token": {
                    "type": "apiKey", "in": "header", "name": "Authorization",
                    "description": "An API token, with or without `Bearer`",
                },
                "session": {
                    "type": "apiKey", "in": "cookie", "name": "parapet-session",
                    "description": "What signing in sets",
                },
            },
        },
    })
}

fn content(media: &str, schema: &Value) -> Value {
    json!({ "description": "Done", "content": { media: { "schema": schema } } })
}

fn described(row: &Operation, success: Value, body: Option<Value>, error: &Value) -> Value {
    let status = match row.answer {
        Answer::Json(_) | Answer::Done | Answer::Probe | Answer::Text => "200",
        Answer::Created(_) => "201",
        Answer::Nothing => "204",
    };
    let mut responses = Map::new();
    responses.insert(status.to_owned(), success);
    if matches!(row.answer, Answer::Probe) {
        responses
            .insert("503".to_owned(), content("application/json", &json!({ "type": "object" })));
    }
    let mut refusals = vec![];
    if row.access == Access::Operator {
        refusals.extend([401, 403, 404, 429, 503]);
    }
    if row.endpoint.is_some() || row.may_miss {
        refusals.push(404);
    }
    if row.body.is_some() {
        refusals.extend([400, 401, 403, 404, 408, 409, 413, 415, 429, 503]);
    }
    if !row.query.is_empty() || row.path.contains('{') {
        refusals.push(400);
    }
    if row.method.changes() {
        refusals.extend([403, 404, 409, 429, 503]);
    }
    for status in refusals {
        responses.entry(status.to_string()).or_insert_with(|| error.clone());
    }
    let mut parameters: Vec<Value> = arguments(row.path);
    parameters.extend(row.query.iter().map(query));
    let mut operation = json!({
        "operationId": format!("{:?}{}", row.call, discriminator(row)),
        "tags": [row.topic],
        "summary": row.summary,
        "parameters": parameters,
        "responses": responses,
        "security": match row.access {
            Access::Open => json!([]),
            Access::Operator => json!([{ "token": [] }, { "session": [] }]),
        },
    });
    if let Some(schema) = body {
        operation["requestBody"] = json!({
            "required": true, "content": { "application/json": { "schema": schema } },
        });
    }
    operation
}

/// What tells rows of the same call apart; the first has none.
fn discriminator(row: &Operation) -> String {
    let of_call: Vec<_> = OPERATIONS.iter().filter(|other| other.call == row.call).collect();
    match of_call.iter().position(|other| std::ptr::eq(*other, row)) {
        Some(0) | None => String::new(),
        Some(at) => (at + 1).to_string(),
    }
}

fn data_described(row: &DataOperation, error: &Value) -> Value {
    let mut responses = Map::new();
    for status in row.statuses {
        let description = if *status == 304 { "As before" } else { "Done" };
        responses.insert(status.to_string(), json!({ "description": description }));
    }
    for status in [400, 401, 403, 404, 408, 413, 415, 503] {
        responses.insert(status.to_string(), error.clone());
    }
    let mut operation = json!({
        "operationId": format!("{}{}", row.method, row.path.replace(['/', '{', '}'], "_")),
        "tags": ["SDKs"],
        "summary": row.summary,
        "parameters": arguments(row.path),
        "responses": responses,
        "security": if row.path == "/edge/validate" { json!([]) } else { json!([{ "token": [] }]) },
    });
    if row.takes_body {
        operation["requestBody"] = json!({
            "required": true,
            "content": { "application/json": { "schema": { "type": "object" } } },
        });
    }
    operation
}

/// The parts in braces of a path.
fn arguments(path: &str) -> Vec<Value> {
    let named = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let described = named.map(|name| {
        let schema = if name == "id" {
            json!({ "type": "integer", "format": "int64" })
        } else {
            json!({ "type": "string", "minLength": 1 })
        };
        json!({ "name": name, "in": "path", "required": true, "schema": schema })
    });
    described.collect()
}

fn query(query: &Query) -> Value {
    let schema = match query.kind {
        QueryKind::Text => json!({ "type": "string" }),
        QueryKind::Time => json!({ "type": "string", "format": "date-time" }),
        QueryKind::Number { least, most } => {
            json!({ "type": "integer", "minimum": least, "maximum": most })
        }
    };
    json!({
        "name": query.name, "in": "query", "description": query.help,
        "required": query.required, "schema": schema,
    })
}

#[cfg(test)]
mod tests {
    use hyper::Method;

    use super::*;
    use crate::http::route::Route;

    #[test]
    fn the_document_has_every_row_and_no_name_twice() {
        let document = document();
        let paths = document["paths"].as_object().unwrap();
        let described = paths.values().flat_map(|item| item.as_object().unwrap().values());
        let mut names: Vec<_> =
            described.map(|it| it["operationId"].as_str().unwrap().to_owned()).collect();
        assert_eq!(names.len(), OPERATIONS.len() + DATA.len());
        names.sort();
        names.dedup();
        assert_eq!(names.len(), OPERATIONS.len() + DATA.len());
    }

    #[test]
    fn references_lead_somewhere() {
        let document = document();
        let text = document.to_string();
        for (at, _) in text.match_indices("\"$ref\":\"#") {
            let rest = &text[at + "\"$ref\":\"#".len()..];
            let pointer = rest.split('"').next().unwrap();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
        }
    }

    #[test]
    fn what_is_told_of_sdks_is_what_the_data_listener_serves() {
        for row in DATA {
            let method = Method::from_bytes(row.method.to_ascii_uppercase().as_bytes()).unwrap();
            let path = row.path.replace("{name}", "x");
            assert!(Route::parse(&method, &path).is_ok(), "{method} {path}");
        }
    }
}
