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
    Is(T),
    /// The field has an invalid value; the text is the reason.
    Wrong(String),
}

/// The error of one field; repeats nothing of its value.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Problem {
    /// The field, as in `projects`.
    pub path: &'static str,
    /// The expectation that it does not meet.
    pub reason: String,
}

/// The errors of all fields of a request.
#[derive(Debug, Default)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Adds an error.
    pub fn add(&mut self, path: &'static str, reason: impl Into<String>) {
        self.0.push(Problem { path, reason: reason.into() });
    }

    /// The value of an optional field. An invalid value adds an error.
    pub fn optional<T>(&mut self, path: &'static str, field: Field<T>) -> Option<T> {
        match field {
            Field::Missing => None,
            Field::Is(value) => Some(value),
            Field::Wrong(reason) => {
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
    pub fn finish(self) -> Result<(), Vec<Problem>> {
        self.or(Some(()))
    }

    /// The errors, if there are any, or else `value`, which is built from the fields. It is `None` only
    /// if there are errors.
    pub fn or<T>(self, value: Option<T>) -> Result<T, Vec<Problem>> {
        value.filter(|_| self.0.is_empty()).ok_or(self.0)
    }
}

impl<T> Field<T> {
    /// This field, or the one under its older name if this one is missing.
    #[must_use]
    pub fn or(self, older: Self) -> Self {
        match self {
            Self::Missing => older,
            Self::Is(_) | Self::Wrong(_) => self,
        }
    }
}

/// A type of a field.
pub trait Member: Sized {
    /// Parses a JSON value. The error describes the expected value and does not repeat the actual one.
    fn read(value: &Value) -> Result<Self, String>;
}

impl<'de, T: Member> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Ok(T::read(&value).map_or_else(Self::Wrong, Self::Is))
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

impl<T: Member> Member for Option<T> {
    fn read(value: &Value) -> Result<Self, String> {
        if value.is_null() { Ok(None) } else { T::read(value).map(Some) }
    }
}

/// A string for which blank means the same as null.
#[derive(Debug)]
pub struct Blank<T>(pub Option<T>);

impl<T: Member> Member for Blank<T> {
    fn read(value: &Value) -> Result<Self, String> {
        if value.as_str().is_some_and(|text| text.trim().is_empty()) {
            return Ok(Self(None));
        }
        Option::read(value).map(Self)
    }
}

impl<T: JsonSchema> JsonSchema for Blank<T> {
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

impl<T: Member> Member for Vec<T> {
    fn read(value: &Value) -> Result<Self, String> {
        let items = value.as_array().ok_or("must be a list")?;
        let read = |(at, item)| T::read(item).map_err(|why| format!("item {}: {why}", at + 1));
        items.iter().enumerate().map(read).collect()
    }
}

impl Member for i64 {
    fn read(value: &Value) -> Result<Self, String> {
        value.as_i64().ok_or_else(|| "must be a whole number".to_owned())
    }
}
