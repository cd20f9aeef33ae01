//! Parses the bodies and query parameters of admin requests.

use bytes::Bytes;
use form_urlencoded::parse;
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    control_plane::{Password, PasswordError},
    http::response::HttpError,
    protocol::{
        admin::{FieldErrors, SecretString},
        rfc3339,
    },
};

/// Parses a JSON object. Its fields collect their own errors.
pub(super) fn parse_object<T: DeserializeOwned>(body: &Bytes) -> Result<T, HttpError> {
    let no_object = || HttpError::Malformed("the body must be a JSON object".to_owned());
    // Serde would accept a list as the fields in their order.
    let value: Value = serde_json::from_slice(body).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        HttpError::Malformed(format!("the body is not JSON: line {line}, column {column}"))
    })?;
    if !value.is_object() {
        return Err(no_object());
    }
    T::deserialize(value).map_err(|_| no_object())
}

/// Parses a password that a user chooses; it must meet the rules for new passwords.
pub(super) fn new_password(
    problems: &mut FieldErrors,
    hidden: Option<&SecretString>,
) -> Option<Password> {
    parse_password(problems, "password", hidden, Password::parse)
}

/// Parses a password that a user presents for verification.
pub(super) fn current_password(
    problems: &mut FieldErrors,
    path: &'static str,
    hidden: Option<&SecretString>,
) -> Option<Password> {
    parse_password(problems, path, hidden, Password::for_sign_in)
}

fn parse_password(
    problems: &mut FieldErrors,
    path: &'static str,
    hidden: Option<&SecretString>,
    parse: fn(&str) -> Result<Password, PasswordError>,
) -> Option<Password> {
    match parse(&hidden?.0) {
        Ok(password) => Some(password),
        Err(error) => {
            problems.add(path, error.to_string());
            None
        }
    }
}

/// The query parameters of a request. A parameter with an empty value counts as missing.
#[derive(Debug)]
pub(super) struct QueryParams<'a>(&'a str);

impl<'a> QueryParams<'a> {
    /// Wraps the query of a request's URI.
    pub(super) fn new(text: Option<&'a str>) -> Self {
        Self(text.unwrap_or_default())
    }

    /// All values of a parameter.
    pub(super) fn texts(&self, problems: &mut FieldErrors, name: &'static str) -> Vec<String> {
        let named =
            parse(self.0.as_bytes()).filter(|(key, value)| key == name && !value.is_empty());
        let mut values: Vec<_> = named.map(|(_, value)| value.into_owned()).collect();
        // No name contains a NUL, and PostgreSQL rejects it.
        if values.iter().any(|value| value.contains('\0')) {
            problems.add(name, "must not contain NUL");
            values.clear();
        }
        values
    }

    /// The first value of a parameter.
    pub(super) fn first_text(
        &self,
        problems: &mut FieldErrors,
        name: &'static str,
    ) -> Option<String> {
        self.texts(problems, name).into_iter().next()
    }

    /// The first value of a required parameter.
    pub(super) fn required(&self, name: &'static str) -> Result<String, HttpError> {
        let mut problems = FieldErrors::default();
        let value = self.first_text(&mut problems, name);
        if value.is_none() {
            problems.add(name, "is missing from the query");
        }
        Ok(problems.into_result(value)?)
    }

    /// A point in time.
    pub(super) fn timestamp(
        &self,
        problems: &mut FieldErrors,
        name: &'static str,
    ) -> Option<Timestamp> {
        let time = rfc3339::parse(&self.first_text(problems, name)?);
        if time.is_none() {
            problems.add(name, "must be a time, as in 2027-01-31T12:00:00Z");
        }
        time
    }

    /// A number from `least` to `most`.
    pub(super) fn number(
        &self,
        problems: &mut FieldErrors,
        name: &'static str,
        least: u32,
        most: u32,
    ) -> Option<u32> {
        let number = self.first_text(problems, name)?.parse().ok();
        let number = number.filter(|number| (least..=most).contains(number));
        if number.is_none() {
            problems.add(name, format!("must be a number from {least} to {most}"));
        }
        number
    }
}
