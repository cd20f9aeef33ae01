//! The request to explain a flag: `{"environment", "flag", "context"}`.
//!
//! The context is parsed like that of a frontend request. The response is defined by the engine, not
//! here.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    context::{self, FrontendContext},
    lenient::{Lenient, Text},
};

/// A request to explain a flag.
#[derive(Debug)]
pub struct ExplainRequest<'a> {
    /// The environment of the flag.
    pub environment: Text<'a>,
    /// The name of the flag.
    pub flag: Text<'a>,
    /// The context to evaluate it for.
    pub context: FrontendContext<'a>,
}

/// The error of an invalid request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The body is not a JSON object.
    #[error("the body must be a JSON object: {0}")]
    Json(#[from] serde_json::Error),
    /// A name is missing, empty, or not a string.
    #[error("`{0}` must be a name")]
    InvalidName(&'static str),
    /// The context is invalid.
    #[error("`context` cannot be read: {0}")]
    Context(#[from] context::Error),
}

impl<'a> ExplainRequest<'a> {
    /// Parses a body. A context that is absent or `null` is empty.
    pub fn parse(body: &'a [u8]) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Body<'a> {
            #[serde(borrow, default)]
            environment: Lenient<Text<'a>>,
            #[serde(borrow, default)]
            flag: Lenient<Text<'a>>,
            #[serde(borrow, default)]
            context: Option<&'a RawValue>,
        }
        let body: Body<'a> = serde_json::from_slice(body)?;
        let name = |text: Lenient<Text<'a>>, field| {
            text.valid().filter(|text| !text.is_empty()).ok_or(Error::InvalidName(field))
        };
        Ok(Self {
            environment: name(body.environment, "environment")?,
            flag: name(body.flag, "flag")?,
            context: match body.context {
                Some(text) => FrontendContext::from_json(text.get().as_bytes())?,
                None => FrontendContext::default(),
            },
        })
    }
}

impl JsonSchema for ExplainRequest<'_> {
    fn schema_name() -> Cow<'static, str> {
        "Question".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "object",
            "description": "A request to explain a flag.",
            "required": ["environment", "flag"],
            "properties": {
                "environment": {
                    "type": "string", "minLength": 1, "description": "The environment of the flag",
                    "examples": ["development"],
                },
                "flag": { "type": "string", "minLength": 1, "description": "The name of the flag" },
                "context": { "$ref": "#/components/schemas/Context" },
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_is_optional() {
        let body = br#"{"environment":"dev","flag":"a","context":{"userId":7,"plan":"gold"}}"#;
        let request = ExplainRequest::parse(body).unwrap();
        assert_eq!((&*request.environment, &*request.flag), ("dev", "a"));
        assert_eq!(request.context.user_id.as_deref(), Some("7"));
        assert_eq!(request.context.properties, [("plan".into(), "gold".into())]);
        for context in ["", r#","context":null"#, r#","context":{}"#] {
            let body = format!(r#"{{"environment":"dev","flag":"a"{context}}}"#);
            let request = ExplainRequest::parse(body.as_bytes()).unwrap();
            assert_eq!(request.context, FrontendContext::default(), "{body}");
        }
    }

    #[test]
    fn error_names_invalid_field() {
        let check = |body: &str, expect: &str| {
            let error = ExplainRequest::parse(body.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with(expect), "{body}: {error}");
        };
        check("[", "the body must be a JSON object");
        check("{}", "`environment` must be a name");
        check(r#"{"environment":["dev"],"flag":"a"}"#, "`environment` must be a name");
        check(r#"{"environment":"dev","flag":""}"#, "`flag` must be a name");
        check(r#"{"environment":"dev","flag":"a","context":3}"#, "`context` cannot be read");
        let long = "x".repeat(5000);
        let body = format!(r#"{{"environment":"dev","flag":"a","context":{{"userId":"{long}"}}}}"#);
        check(&body, "`context` cannot be read: a value is longer than 4096 bytes");
    }
}
