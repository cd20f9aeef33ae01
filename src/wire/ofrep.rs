//! The OpenFeature Remote Evaluation Protocol, version 0.3.0: bodies of questions and answers.
//!
//! Source: `service/openapi.yaml` of open-feature/protocol. What a flag's outcome comes to in these
//! words is the surface's business.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::context::{self, FrontendContext};

/// What a flag comes to.
#[derive(Debug, Serialize)]
pub struct Evaluation<'a> {
    /// The flag's name.
    pub key: &'a str,
    /// The value; without one, the application uses its own default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<Value<'a>>,
    /// The name of the value.
    pub variant: &'a str,
    /// What decided.
    pub reason: Reason,
    /// What else is known of the flag.
    pub metadata: Metadata<'a>,
}

/// The value of a flag.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Value<'a> {
    /// On or off.
    Boolean(bool),
    /// A number.
    Number(serde_json::Number),
    /// A text.
    Text(&'a str),
    /// A JSON object, as it was written.
    Object(&'a RawValue),
}

/// What decided a flag's value.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Reason {
    /// It is the same for everybody.
    Static,
    /// The context.
    TargetingMatch,
    /// The bucket that somebody falls into.
    Split,
    /// The flag is switched off.
    Disabled,
    /// Nothing of the above: the flag is on, for others.
    Unknown,
}

/// What else is known of a flag.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata<'a> {
    /// Whose it is.
    pub project: &'a str,
    /// Whether it is on for the context, which a value of another type does not tell.
    pub enabled: bool,
    /// Whether each evaluation should be reported to the application.
    pub impression_data: bool,
}

/// What all flags of a scope come to, sorted by name.
#[derive(Debug, Serialize)]
pub struct Evaluations<'a> {
    /// One for each flag.
    pub flags: Vec<Evaluation<'a>>,
    /// Where changes are told of.
    #[serde(rename = "eventStreams", skip_serializing_if = "Option::is_none")]
    pub event_streams: Option<[EventStream; 1]>,
}

/// A stream that tells when to ask again.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EventStream {
    r#type: &'static str,
    endpoint: Endpoint,
    /// After how many seconds out of sight a provider had better close it.
    inactivity_delay_sec: u32,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint {
    request_uri: String,
}

impl EventStream {
    /// Server-sent events at this path and query of wherever the provider reaches us.
    pub fn sse(request_uri: String) -> Self {
        let endpoint = Endpoint { request_uri };
        Self { r#type: "sse", endpoint, inactivity_delay_sec: 120 }
    }
}

/// The name of a stream's events, and what one says that asks for another evaluation.
pub const EVENT: &str = "message";
/// See [`EVENT`].
pub const REFETCH: &str = r#"{"type":"refetchEvaluation"}"#;

/// Why a question is not answered.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Refusal<'a> {
    /// The flag that was asked for, if it was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<&'a str>,
    /// The kind of failure, where it is the question's fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_code: Option<ErrorCode>,
    /// What is wrong, for people.
    pub error_details: String,
}

/// What is wrong with a question.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorCode {
    /// It cannot be read.
    ParseError,
    /// Its context cannot be used.
    InvalidContext,
    /// There is no such flag.
    FlagNotFound,
}

/// Why the context of a question cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// It is no question.
    #[error("the body is no JSON object: {0}")]
    Body(serde_json::Error),
    /// The context is no object.
    #[error("it is no JSON object")]
    NoObject,
    /// The context itself.
    #[error(transparent)]
    Context(#[from] context::Error),
}

/// Reads `{"context":{"targetingKey":…,…}}`; providers leave out what they have not.
///
/// The targeting key is the user, unless `userId` says who that is; it stays a property too. The
/// other fields are read as by `/api/frontend`.
pub fn context(body: &[u8]) -> Result<FrontendContext<'_>, Unreadable> {
    #[derive(Deserialize)]
    struct Question<'a> {
        #[serde(borrow, default)]
        context: Option<&'a RawValue>,
    }
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(FrontendContext::default());
    }
    let question: &RawValue = serde_json::from_slice(body).map_err(Unreadable::Body)?;
    if !question.get().starts_with('{') {
        return Err(Unreadable::Body(serde::de::Error::custom("it is of another type")));
    }
    let Question { context } = serde_json::from_str(question.get()).map_err(Unreadable::Body)?;
    let Some(context) = context else { return Ok(FrontendContext::default()) };
    if !context.get().starts_with('{') {
        return Err(Unreadable::NoObject);
    }
    let mut context = FrontendContext::from_json(context.get().as_bytes())?;
    if context.user_id.is_none() {
        let key = context.properties.iter().find(|(name, _)| name == "targetingKey");
        context.user_id = key.map(|(_, value)| value.clone());
    }
    Ok(context)
}

/// The value that a variant carries, by the type and text of its payload. A JSON payload that is no
/// object, and a number that JSON cannot write, are texts.
pub fn value<'a>(kind: &str, text: &'a str) -> Value<'a> {
    match kind {
        "number" => text.trim().parse().map_or(Value::Text(text), Value::Number),
        "json" => match serde_json::from_str::<&RawValue>(text.trim()) {
            Ok(raw) if raw.get().starts_with('{') => Value::Object(raw),
            _ => Value::Text(text),
        },
        _ => Value::Text(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_targeting_key_is_the_user_unless_another_is_named() {
        let read = |body: &'static str| context(body.as_bytes()).unwrap();
        let user = |body| read(body).user_id.map(std::borrow::Cow::into_owned);
        assert_eq!(user(r#"{"context":{"targetingKey":"7"}}"#).as_deref(), Some("7"));
        assert_eq!(user(r#"{"context":{"targetingKey":"7","userId":"8"}}"#).as_deref(), Some("8"));
        let other = read(r#"{"context":{"targetingKey":"7","plan":"gold","age":7,"tags":[1]}}"#);
        let properties: Vec<_> = other.properties.iter().map(|(a, b)| (&**a, &**b)).collect();
        let expect = [("targetingKey", "7"), ("plan", "gold"), ("age", "7"), ("tags", "1")];
        assert_eq!(properties, expect);
        for empty in ["", " ", "{}", r#"{"context":null}"#, r#"{"context":{}}"#] {
            assert_eq!(read(empty), FrontendContext::default(), "{empty}");
        }
        let error = |body: &'static str| context(body.as_bytes()).unwrap_err();
        assert!(matches!(error("{"), Unreadable::Body(_)));
        assert!(matches!(error("[]"), Unreadable::Body(_)));
        assert!(matches!(error(r#"{"context":7}"#), Unreadable::NoObject));
    }

    #[test]
    fn a_payload_is_of_the_type_that_it_says_where_it_can_be() {
        let check = |kind, text, expect: &str| {
            assert_eq!(serde_json::to_string(&value(kind, text)).unwrap(), expect, "{kind} {text}");
        };
        check("string", "a", r#""a""#);
        check("csv", "a,b", r#""a,b""#);
        check("number", " 1.5 ", "1.5");
        check("number", "7", "7");
        check("number", "seven", r#""seven""#);
        check("json", r#" {"b":1, "a":[]} "#, r#"{"b":1, "a":[]}"#);
        check("json", "[1]", r#""[1]""#);
        check("json", "{", r#""{""#);
    }
}
