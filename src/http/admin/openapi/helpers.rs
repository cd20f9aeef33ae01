//! Building blocks for operations in the OpenAPI document.

use serde_json::{Value, json};

/// Describes a successful response with a body.
pub(super) fn success_response(media: &str, schema: &Value) -> Value {
    json!({ "description": "Done", "content": { media: { "schema": schema } } })
}

/// Describes the path parameters of a template.
pub(super) fn path_parameters(path: &str) -> Vec<Value> {
    let named = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let described = named.map(|name| {
        let schema = if name == "id" {
            json!({ "type": "integer", "format": "int64" })
        } else if name == "project" {
            json!({ "type": "string", "minLength": 1, "examples": ["default"] })
        } else {
            json!({ "type": "string", "minLength": 1 })
        };
        json!({ "name": name, "in": "path", "required": true, "schema": schema })
    });
    described.collect()
}
