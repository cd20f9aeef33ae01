//! Fields of a request that are validated one by one, so that all errors are reported at once.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// A field of a request.
#[derive(Debug, Default)]
pub enum Field<T> {
    /// The field is absent.
    #[default]
    Missing,
    /// The field has a valid value.
    Valid(T),
    /// The field has an invalid value; the text is the reason.
    Invalid(String),
}

/// The error of one field; repeats nothing of its value.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FieldError {
    /// The field, as in `projects`.
    pub field: &'static str,
    /// The expectation that it does not meet.
    pub reason: String,
}

/// The errors of all fields of a request.
#[derive(Debug, Default)]
pub struct FieldErrors(Vec<FieldError>);

impl FieldErrors {
    /// Adds an error.
    pub fn add(&mut self, field: &'static str, reason: impl Into<String>) {
        self.0.push(FieldError { field, reason: reason.into() });
    }

    /// The value of an optional field. An invalid value adds an error.
    pub fn optional<T>(&mut self, path: &'static str, field: Field<T>) -> Option<T> {
        match field {
            Field::Missing => None,
            Field::Valid(value) => Some(value),
            Field::Invalid(reason) => {
                self.add(path, reason);
                None
            }
        }
    }

    /// The value of a required field. A missing or invalid value adds an error.
    pub fn required<T>(&mut self, path: &'static str, field: Field<T>) -> Option<T> {
        if matches!(field, Field::Missing) {
            self.add(path, "is missing");
        }
        self.optional(path, field)
    }

    /// The errors, if there are any.
    pub fn finish(self) -> Result<(), Vec<FieldError>> {
        self.into_result(Some(()))
    }

    /// The errors, if there are any, or else `value`, which is built from the fields. It is `None` only
    /// if there are errors.
    pub fn into_result<T>(self, value: Option<T>) -> Result<T, Vec<FieldError>> {
        value.filter(|_| self.0.is_empty()).ok_or(self.0)
    }
}

impl<T> Field<T> {
    /// This field, or the one under its older name if this one is missing.
    #[must_use]
    pub fn or_legacy(self, older: Self) -> Self {
        match self {
            Self::Missing => older,
            Self::Valid(_) | Self::Invalid(_) => self,
        }
    }
}

/// A type of a field.
pub trait FieldType: Sized {
    /// Parses a JSON value. The error describes the expected value and does not repeat the actual one.
    fn from_json(value: &Value) -> Result<Self, String>;
}

impl<'de, T: FieldType> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Ok(T::from_json(&value).map_or_else(Self::Invalid, Self::Valid))
    }
}

impl<T: JsonSchema> JsonSchema for Field<T> {
    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

impl<T: FieldType> FieldType for Option<T> {
    fn from_json(value: &Value) -> Result<Self, String> {
        if value.is_null() { Ok(None) } else { T::from_json(value).map(Some) }
    }
}

/// A string for which blank means the same as null.
#[derive(Debug)]
pub struct BlankAsNull<T>(pub Option<T>);

impl<T: FieldType> FieldType for BlankAsNull<T> {
    fn from_json(value: &Value) -> Result<Self, String> {
        if value.as_str().is_some_and(|text| text.trim().is_empty()) {
            return Ok(Self(None));
        }
        Option::from_json(value).map(Self)
    }
}

impl<T: JsonSchema> JsonSchema for BlankAsNull<T> {
    fn schema_name() -> Cow<'static, str> {
        Option::<T>::schema_name()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Option::<T>::json_schema(generator)
    }
}

impl<T: FieldType> FieldType for Vec<T> {
    fn from_json(value: &Value) -> Result<Self, String> {
        let items = value.as_array().ok_or("must be a list")?;
        let read = |(at, item)| T::from_json(item).map_err(|why| format!("item {}: {why}", at + 1));
        items.iter().enumerate().map(read).collect()
    }
}

impl FieldType for i64 {
    fn from_json(value: &Value) -> Result<Self, String> {
        value.as_i64().ok_or_else(|| "must be a whole number".to_owned())
    }
}
