//! The OpenFeature Remote Evaluation Protocol (OFREP), version 0.3.0: bodies of requests and responses.
//!
//! Source: `service/openapi.yaml` of open-feature/protocol. The mapping from an evaluated flag to these
//! types is in `http::ofrep`, not here.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::context::{self, FrontendContext};

/// The evaluated flag.
#[derive(Debug, Serialize)]
pub struct EvaluationSuccess<'a> {
    /// The name of the flag.
    pub key: &'a str,
    /// The value; without one, the application uses its default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<Value<'a>>,
    /// The name of the value.
    pub variant: &'a str,
    /// The reason for the value.
    pub reason: Reason,
    /// Additional information about the flag.
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
    /// A string.
    Text(&'a str),
    /// A JSON object, in its original text.
    Object(&'a RawValue),
}

/// The reason for a flag's value.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Reason {
    /// The value is the same for every context.
    Static,
    /// The context matched.
    TargetingMatch,
    /// The context was assigned to a bucket.
    Split,
    /// The flag is switched off.
    Disabled,
    /// None of the above: the flag is on, but not for this context.
    Unknown,
}

/// Additional information about a flag.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata<'a> {
    /// The project of the flag.
    pub project: &'a str,
    /// Whether it is on for the context; a value that is not a boolean does not show this.
    pub enabled: bool,
    /// Whether each evaluation should be reported to the application.
    pub impression_data: bool,
}

/// All evaluated flags of a scope, sorted by name.
#[derive(Debug, Serialize)]
pub struct BulkEvaluationSuccess<'a> {
    /// One for each flag.
    pub flags: Vec<EvaluationSuccess<'a>>,
    /// The stream that announces changes.
    #[serde(rename = "eventStreams", skip_serializing_if = "Option::is_none")]
    pub event_streams: Option<[EventStream; 1]>,
}

/// A stream that tells providers when to evaluate again.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EventStream {
    r#type: &'static str,
    endpoint: EventStreamEndpoint,
    /// The number of seconds in the background after which a provider should close it.
    inactivity_delay_sec: u32,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct EventStreamEndpoint {
    request_uri: String,
}

impl EventStream {
    /// Server-sent events at this path and query, on the host that the provider uses.
    pub fn sse(request_uri: String) -> Self {
        let endpoint = EventStreamEndpoint { request_uri };
        Self { r#type: "sse", endpoint, inactivity_delay_sec: 120 }
    }
}

/// The name of the stream's events.
pub const EVENT_NAME: &str = "message";
/// The data of an event that requests another evaluation.
pub const REFETCH_EVENT_DATA: &str = r#"{"type":"refetchEvaluation"}"#;

/// The response to a request that failed.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EvaluationFailure<'a> {
    /// The requested flag, if the request is for a single one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<&'a str>,
    /// The kind of failure, if the request caused it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_code: Option<ErrorCode>,
    /// A message for humans.
    pub error_details: String,
}

/// The kinds of failure that a request can cause.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorCode {
    /// The body cannot be parsed.
    ParseError,
    /// The context is invalid.
    InvalidContext,
    /// There is no such flag.
    FlagNotFound,
}

/// The error of a request whose context cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The body is not a JSON object.
    #[error("the body is no JSON object: {0}")]
    Body(serde_json::Error),
    /// The context is not an object.
    #[error("it is no JSON object")]
    ContextNotObject,
    /// The context is invalid.
    #[error(transparent)]
    Context(#[from] context::Error),
}

/// Parses `{"context":{"targetingKey":…,…}}`. Providers omit fields that they do not have.
///
/// The targeting key is used as the user id unless `userId` is present, and it remains a property. The
/// other fields are parsed as in `/api/frontend`.
pub fn parse_context(body: &[u8]) -> Result<FrontendContext<'_>, RequestError> {
    #[derive(Deserialize)]
    struct Request<'a> {
        #[serde(borrow, default)]
        context: Option<&'a RawValue>,
    }
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(FrontendContext::default());
    }
    let request: &RawValue = serde_json::from_slice(body).map_err(RequestError::Body)?;
    if !request.get().starts_with('{') {
        return Err(RequestError::Body(serde::de::Error::custom("it is of another type")));
    }
    let Request { context } = serde_json::from_str(request.get()).map_err(RequestError::Body)?;
    let Some(context) = context else { return Ok(FrontendContext::default()) };
    if !context.get().starts_with('{') {
        return Err(RequestError::ContextNotObject);
    }
    let mut context = FrontendContext::from_json(context.get().as_bytes())?;
    if context.user_id.is_none() {
        let key = context.properties.iter().find(|(name, _)| name == "targetingKey");
        context.user_id = key.map(|(_, value)| value.clone());
    }
    Ok(context)
}

/// The value of a variant, from the type and text of its payload. A JSON payload that is not an object,
/// and a number that JSON cannot represent, become strings.
pub fn payload_value<'a>(kind: &str, text: &'a str) -> Value<'a> {
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
    fn targeting_key_is_the_user_unless_user_id_is_present() {
        let read = |body: &'static str| parse_context(body.as_bytes()).unwrap();
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
        let error = |body: &'static str| parse_context(body.as_bytes()).unwrap_err();
        assert!(matches!(error("{"), RequestError::Body(_)));
        assert!(matches!(error("[]"), RequestError::Body(_)));
        assert!(matches!(error(r#"{"context":7}"#), RequestError::ContextNotObject));
    }

    #[test]
    fn payload_has_its_declared_type_if_possible() {
        let check = |kind, text, expect: &str| {
            assert_eq!(
                serde_json::to_string(&payload_value(kind, text)).unwrap(),
                expect,
                "{kind} {text}"
            );
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
