//! Pieces that every operation of the document is put together from.
//!
//! What an operation is, and what it answers, stands in the tables of the modules beside this one.

use serde_json::{Value, json};

pub(super) fn content(media: &str, schema: &Value) -> Value {
    json!({ "description": "Done", "content": { media: { "schema": schema } } })
}

/// The parts in braces of a path.
pub(super) fn arguments(path: &str) -> Vec<Value> {
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
