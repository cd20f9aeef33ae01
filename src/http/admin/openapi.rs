//! Generates the OpenAPI 3.1 document from the tables that requests are routed by.
//!
//! Schemas are derived from the types of request and response bodies. Those of the SDK endpoints are
//! written by hand in `sdk_operations`.

mod helpers;
mod sdk_operations;

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use self::helpers::{path_parameters, success_response};
use super::operation::{
    Access, OPERATIONS, Operation, ParameterType, QueryParameter, ResponseSpec,
};
use crate::protocol::admin::Error;

/// Generates the document.
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
        let success = match row.response {
            ResponseSpec::Json(shape)
            | ResponseSpec::Created(shape)
            | ResponseSpec::Probe(shape) => {
                let schema = shape(&mut generator);
                success_response("application/json", &schema.to_value())
            }
            ResponseSpec::Text => success_response("text/plain", &json!({ "type": "string" })),
            ResponseSpec::Empty | ResponseSpec::NoContent => json!({ "description": "Done" }),
        };
        let body = row.body.map(|shape| shape(&mut generator).to_value());
        add(row.path, row.method.as_str(), operation_json(row, success, body, &error));
    }
    for (path, method, operation) in sdk_operations::operations(&error) {
        add(path, method, operation);
    }
    let mut schemas = generator.take_definitions(true);
    schemas.extend(sdk_operations::schemas());
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Parapet",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "The API of Parapet. The admin listener serves all operations; the data \
                listener serves those for SDKs.",
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
                    "description": "The session cookie that a sign-in sets; on an encrypted connection its \
                        name is `__Host-parapet-session`",
                },
            },
        },
    })
}

fn operation_json(row: &Operation, success: Value, body: Option<Value>, error: &Value) -> Value {
    let status = match row.response {
        ResponseSpec::Json(_)
        | ResponseSpec::Empty
        | ResponseSpec::Probe(_)
        | ResponseSpec::Text => "200",
        ResponseSpec::Created(_) => "201",
        ResponseSpec::NoContent => "204",
    };
    let mut responses = Map::new();
    if matches!(row.response, ResponseSpec::Probe(_)) {
        responses.insert("503".to_owned(), success.clone());
    }
    responses.insert(status.to_owned(), success);
    let mut error_statuses = vec![];
    if row.access != Access::Public {
        error_statuses.extend([401, 403, 404, 429, 503]);
    }
    if row.disabled_by.is_some() || row.can_404 {
        error_statuses.push(404);
    }
    if row.body.is_some() {
        error_statuses.extend([400, 401, 403, 404, 408, 413, 415, 429, 503]);
    }
    if !row.query.is_empty() || row.path.contains('{') {
        error_statuses.push(400);
    }
    if row.method.is_mutation() {
        error_statuses.extend([403, 404, 429, 503]);
    }
    for status in error_statuses {
        responses.entry(status.to_string()).or_insert_with(|| error.clone());
    }
    let mut parameters: Vec<Value> = path_parameters(row.path);
    parameters.extend(row.query.iter().map(query_parameter));
    let mut operation = json!({
        "operationId": format!("{:?}{}", row.id, operation_id_suffix(row)),
        "tags": [row.tag],
        "summary": row.summary,
        "parameters": parameters,
        "responses": responses,
        "security": match row.access {
            Access::Public => json!([]),
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

/// Distinguishes operations with the same id by a number. The first one has no suffix.
fn operation_id_suffix(row: &Operation) -> String {
    let of_call: Vec<_> = OPERATIONS.iter().filter(|other| other.id == row.id).collect();
    match of_call.iter().position(|other| std::ptr::eq(*other, row)) {
        Some(0) | None => String::new(),
        Some(at) => (at + 1).to_string(),
    }
}

fn query_parameter(query: &QueryParameter) -> Value {
    let schema = match query.kind {
        ParameterType::Text if query.name == "environment" => {
            json!({ "type": "string", "examples": ["development"] })
        }
        ParameterType::Text => json!({ "type": "string" }),
        ParameterType::TextList => json!({ "type": "array", "items": { "type": "string" } }),
        ParameterType::Time => json!({ "type": "string", "format": "date-time" }),
        ParameterType::Number { least, most } => {
            json!({ "type": "integer", "minimum": least, "maximum": most })
        }
    };
    json!({
        "name": query.name, "in": "query", "description": query.description,
        "required": query.required, "schema": schema,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::routes::ROUTES;

    #[test]
    fn document_contains_every_operation_with_a_unique_id() {
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
    fn every_schema_reference_resolves() {
        let document = document();
        let text = document.to_string();
        for (at, _) in text.match_indices("\"$ref\":\"#") {
            let rest = &text[at + "\"$ref\":\"#".len()..];
            let pointer = rest.split('"').next().unwrap();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
        }
    }

    #[test]
    fn document_contains_every_route_of_the_data_listener() {
        let document = document();
        for route in &ROUTES {
            for path in route.deprecated_paths.iter().chain([&route.path]) {
                for (method, operation) in [("get", route.get), ("post", route.post)] {
                    let described = document["paths"][path].get(method);
                    assert_eq!(described.is_some(), operation.is_some(), "{method} {path}");
                }
            }
        }
    }
}
