//! The document of the API (OpenAPI 3.1), written from the tables that requests are dispatched by.
//!
//! Schemas come from the types that are read and written; those of what SDKs ask are in `sdks`.

mod parts;
mod sdks;

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use self::parts::{arguments, content};
use super::operation::{Access, Answer, OPERATIONS, Operation, Query, QueryKind};
use crate::wire::admin::Error;

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
            Answer::Json(shape) | Answer::Created(shape) | Answer::Probe(shape) => {
                let schema = shape(&mut generator);
                content("application/json", &schema.to_value())
            }
            Answer::Text => content("text/plain", &json!({ "type": "string" })),
            Answer::Done | Answer::Nothing => json!({ "description": "Done" }),
        };
        let body = row.body.map(|shape| shape(&mut generator).to_value());
        add(row.path, row.method.as_str(), described(row, success, body, &error));
    }
    for (path, method, operation) in sdks::operations(&error) {
        add(path, method, operation);
    }
    let mut schemas = generator.take_definitions(true);
    schemas.extend(sdks::schemas());
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
            "schemas": schemas,
            "securitySchemes": {
                "token": {
                    "type": "apiKey", "in": "header", "name": "Authorization",
                    "description": "An API token, with or without `Bearer`",
                },
                "session": {
                    "type": "apiKey", "in": "cookie", "name": "parapet-session",
                    "description": "What signing in sets; over an encrypted connection it is called \
                        `__Host-parapet-session`",
                },
            },
        },
    })
}

fn described(row: &Operation, success: Value, body: Option<Value>, error: &Value) -> Value {
    let status = match row.answer {
        Answer::Json(_) | Answer::Done | Answer::Probe(_) | Answer::Text => "200",
        Answer::Created(_) => "201",
        Answer::Nothing => "204",
    };
    let mut responses = Map::new();
    if matches!(row.answer, Answer::Probe(_)) {
        responses.insert("503".to_owned(), success.clone());
    }
    responses.insert(status.to_owned(), success);
    let mut refusals = vec![];
    if row.access != Access::Open {
        refusals.extend([401, 403, 404, 429, 503]);
    }
    if row.endpoint.is_some() || row.may_miss {
        refusals.push(404);
    }
    if row.body.is_some() {
        refusals.extend([400, 401, 403, 404, 408, 413, 415, 429, 503]);
    }
    if !row.query.is_empty() || row.path.contains('{') {
        refusals.push(400);
    }
    if row.method.changes() {
        refusals.extend([403, 404, 429, 503]);
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
            Access::Operator | Access::Admin => json!([{ "token": [] }, { "session": [] }]),
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

fn query(query: &Query) -> Value {
    let schema = match query.kind {
        QueryKind::Text if query.name == "environment" => {
            json!({ "type": "string", "examples": ["development"] })
        }
        QueryKind::Text => json!({ "type": "string" }),
        QueryKind::Texts => json!({ "type": "array", "items": { "type": "string" } }),
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
    use super::*;
    use crate::http::route::Route;

    #[test]
    fn the_document_has_every_row_and_no_name_twice() {
        let document = document();
        let paths = document["paths"].as_object().unwrap();
        let described = paths.values().flat_map(|item| item.as_object().unwrap().values());
        let mut names: Vec<_> =
            described.map(|it| it["operationId"].as_str().unwrap().to_owned()).collect();
        let count = names.len();
        assert!(count > OPERATIONS.len());
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
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
    fn every_route_of_the_data_listener_is_told() {
        let document = document();
        for template in Route::TEMPLATES {
            assert!(document["paths"].get(template).is_some(), "{template}");
        }
    }
}
