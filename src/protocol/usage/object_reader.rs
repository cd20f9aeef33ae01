//! Takes fields out of a JSON object one by one; errors contain the path of the field.
//!
//! Reports are parsed from a JSON tree, not by derived implementations, because the server's schema
//! coerces values (`"5"` is a count, `null` is absent, PHP's `[]` is an empty object) and unknown fields
//! are kept.

use std::sync::Arc;

use jiff::{Timestamp, civil::DateTime, tz::TimeZone};
use serde_json::{Map, Value};

/// The largest integer that upstream's schemas accept. A larger one makes it reject the whole request.
pub const MAX_INTEGER: u64 = (1 << 53) - 1;
/// The largest absolute value of other numbers that upstream's schemas accept.
pub const MAX_NUMBER: f64 = 9_007_199_254_740_991.0;

/// The maximum length of a field's path in an error, in bytes; paths contain names from clients.
const MAX_PATH_BYTES: usize = 120;

/// The error of an invalid report.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// The body is not JSON.
    #[error("the body is not JSON")]
    Syntax(#[source] serde_json::Error),
    /// The body is JSON, but not an object.
    #[error("the body is not an object")]
    NotAnObject,
    /// A required field is missing.
    #[error("`{path}` is missing")]
    Missing {
        /// The path of the field.
        path: String,
    },
    /// A name is empty.
    #[error("`{path}` is empty")]
    Empty {
        /// The path of the field.
        path: String,
    },
    /// A field has the wrong type.
    #[error("`{path}` is not {expected}")]
    WrongType {
        /// The path of the field.
        path: String,
        /// The expected type.
        expected: &'static str,
    },
}

/// A JSON object whose fields are taken out one by one.
pub(super) struct ObjectReader {
    path: String,
    fields: Map<String, Value>,
}

impl ObjectReader {
    pub(super) fn parse(body: &[u8]) -> Result<Self, ParseError> {
        match serde_json::from_slice(body).map_err(ParseError::Syntax)? {
            Value::Object(fields) => Ok(Self { path: String::new(), fields }),
            _ => Err(ParseError::NotAnObject),
        }
    }

    pub(super) fn from_value(value: Value, path: String) -> Result<Self, ParseError> {
        match value {
            Value::Object(fields) => Ok(Self { path, fields }),
            _ if path.is_empty() => Err(ParseError::NotAnObject),
            _ => Err(ParseError::WrongType { path, expected: "an object" }),
        }
    }

    /// The path of the field `name`, truncated.
    pub(super) fn path(&self, name: &str) -> String {
        let dot = if self.path.is_empty() { "" } else { "." };
        let mut path = format!("{}{dot}{name}", self.path);
        path.truncate(path.floor_char_boundary(MAX_PATH_BYTES));
        path
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.fields.contains_key(name)
    }

    /// Takes the field `name`; `null` counts as absent.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.fields.remove(name).filter(|value| !value.is_null())
    }

    /// The remaining fields.
    pub(super) fn into_remaining(self) -> Map<String, Value> {
        self.fields
    }

    /// A required string that is not empty.
    pub(super) fn required_text(&mut self, name: &str) -> Result<Arc<str>, ParseError> {
        match self.take(name) {
            None => Err(ParseError::Missing { path: self.path(name) }),
            Some(Value::String(text)) if text.is_empty() => {
                Err(ParseError::Empty { path: self.path(name) })
            }
            Some(Value::String(text)) => Ok(text.into()),
            Some(_) => Err(self.wrong_type(name, "a text")),
        }
    }

    /// An optional string, truncated to `max` bytes.
    pub(super) fn optional_text(&mut self, name: &str, max: usize) -> Option<Arc<str>> {
        self.take(name).and_then(|value| lenient_text(&value, max))
    }

    /// A count; 0 if absent.
    pub(super) fn count(&mut self, name: &str) -> Result<u64, ParseError> {
        let value = self.take(name);
        parse_count(value.as_ref(), || self.path(name))
    }

    pub(super) fn required_count(&mut self, name: &str) -> Result<u64, ParseError> {
        if !self.has(name) {
            return Err(ParseError::Missing { path: self.path(name) });
        }
        self.count(name)
    }

    pub(super) fn number(&mut self, name: &str) -> Result<f64, ParseError> {
        let value = self.take(name);
        let number = match &value {
            None => return Err(ParseError::Missing { path: self.path(name) }),
            Some(Value::Number(number)) => number.as_f64(),
            Some(Value::String(text)) => text.trim().parse().ok(),
            Some(_) => None,
        };
        number.filter(|number| number.is_finite()).ok_or_else(|| self.wrong_type(name, "a number"))
    }

    pub(super) fn timestamp(&mut self, name: &str) -> Result<Timestamp, ParseError> {
        let value = self.take(name);
        let value = value.ok_or_else(|| ParseError::Missing { path: self.path(name) })?;
        parse_timestamp(&value).ok_or_else(|| self.wrong_type(name, "a time"))
    }

    pub(super) fn array(&mut self, name: &str) -> Result<Option<Vec<Value>>, ParseError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(_) => Err(self.wrong_type(name, "an array")),
        }
    }

    pub(super) fn required_array(&mut self, name: &str) -> Result<Vec<Value>, ParseError> {
        self.array(name)?.ok_or_else(|| ParseError::Missing { path: self.path(name) })
    }

    /// The entries of an optional object. PHP's empty array counts as an empty object.
    pub(super) fn entries(&mut self, name: &str) -> Result<Map<String, Value>, ParseError> {
        match self.take(name) {
            None => Ok(Map::new()),
            Some(Value::Object(entries)) => Ok(entries),
            Some(Value::Array(values)) if values.is_empty() => Ok(Map::new()),
            Some(_) => Err(self.wrong_type(name, "an object")),
        }
    }

    fn wrong_type(&self, name: &str, expected: &'static str) -> ParseError {
        ParseError::WrongType { path: self.path(name), expected }
    }
}

/// Parses items and skips malformed ones; also returns their number.
pub(super) fn parse_items<T>(
    values: Vec<Value>,
    parse: impl Fn(Value) -> Result<T, ParseError>,
) -> (Vec<T>, usize) {
    let total = values.len();
    let items: Vec<_> = values.into_iter().filter_map(|value| parse(value).ok()).collect();
    let malformed = total - items.len();
    (items, malformed)
}

/// A non-empty string, truncated to `max` bytes. A number is converted to a string.
pub(super) fn lenient_text(value: &Value, max: usize) -> Option<Arc<str>> {
    let text = match value {
        Value::String(text) => text.as_str(),
        Value::Number(number) => return Some(number.to_string().into()),
        _ => return None,
    };
    let text = &text[..text.floor_char_boundary(max)];
    // PostgreSQL cannot store NUL, and upstream would lose a whole insert.
    let text = if text.contains('\0') { &text.replace('\0', "") } else { text };
    (!text.is_empty()).then(|| text.into())
}

/// A count, coerced as by the server: `"5"` is 5, fractions are truncated, an absent or empty value is
/// 0.
pub(super) fn parse_count(
    value: Option<&Value>,
    path: impl FnOnce() -> String,
) -> Result<u64, ParseError> {
    let count = match value {
        None | Some(Value::Null) => Some(0),
        Some(Value::Number(number)) => {
            number.as_u64().or_else(|| number.as_f64().and_then(truncate_to_u64))
        }
        Some(Value::String(text)) if text.trim().is_empty() => Some(0),
        Some(Value::String(text)) => text.trim().parse().ok(),
        Some(_) => None,
    };
    count.ok_or_else(|| ParseError::WrongType { path: path(), expected: "a count" })
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "fractions are truncated on purpose, the sign is checked, and the cast saturates"
)]
fn truncate_to_u64(number: f64) -> Option<u64> {
    (number >= 0.0).then_some(number as u64)
}

/// A timestamp, parsed as by the server: RFC 3339, or a number of milliseconds.
///
/// The server's documentation calls the number a UNIX timestamp and shows seconds, although the server
/// would take those for a day in January 1970. So numbers too small for milliseconds are seconds here. A
/// time without an offset is UTC. Years that RFC 3339 cannot represent are rejected.
fn parse_timestamp(value: &Value) -> Option<Timestamp> {
    /// 1973 in milliseconds, the year 5138 in seconds.
    const MILLISECONDS: i64 = 100_000_000_000;
    let of_number = |number: i64| match number {
        0..MILLISECONDS => Timestamp::from_second(number).ok(),
        _ => Timestamp::from_millisecond(number).ok(),
    };
    let time = match value {
        Value::Number(number) => of_number(
            number.as_i64().or_else(|| i64::try_from(truncate_to_u64(number.as_f64()?)?).ok())?,
        ),
        Value::String(text) => {
            let text = text.trim();
            let without_offset = || {
                let time: DateTime = text.parse().ok()?;
                TimeZone::UTC.to_timestamp(time).ok()
            };
            text.parse().ok().or_else(|| of_number(text.parse().ok()?)).or_else(without_offset)
        }
        _ => None,
    };
    time.filter(|time| *time >= Timestamp::UNIX_EPOCH)
}
