//! Bodies and queries of operators, read into their types.

use bytes::Bytes;
use form_urlencoded::parse;
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    control::{Password, PasswordError},
    http::reply::Failure,
    wire::{
        admin::{Hidden, Problems},
        instant,
    },
};

/// Reads a JSON object; what is wrong with its members is for them to say.
pub(super) fn read<T: DeserializeOwned>(body: &Bytes) -> Result<T, Failure> {
    let no_object = || Failure::Malformed("the body must be a JSON object".to_owned());
    // A list would be taken for the members in their order.
    let value: Value = serde_json::from_slice(body).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        Failure::Malformed(format!("the body is not JSON: line {line}, column {column}"))
    })?;
    if !value.is_object() {
        return Err(no_object());
    }
    T::deserialize(value).map_err(|_| no_object())
}

/// A password that somebody chooses.
pub(super) fn new_password(problems: &mut Problems, hidden: Option<&Hidden>) -> Option<Password> {
    password(problems, "password", hidden, Password::parse)
}

/// A password that somebody shows.
pub(super) fn shown_password(
    problems: &mut Problems,
    path: &'static str,
    hidden: Option<&Hidden>,
) -> Option<Password> {
    password(problems, path, hidden, Password::for_sign_in)
}

fn password(
    problems: &mut Problems,
    path: &'static str,
    hidden: Option<&Hidden>,
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

/// The members of a query; what is empty is not there.
#[derive(Debug)]
pub(super) struct Query<'a>(&'a str);

impl<'a> Query<'a> {
    /// Of a request's address.
    pub(super) fn of(text: Option<&'a str>) -> Self {
        Self(text.unwrap_or_default())
    }

    /// Every value of a name.
    pub(super) fn texts(&self, problems: &mut Problems, name: &'static str) -> Vec<String> {
        let named =
            parse(self.0.as_bytes()).filter(|(key, value)| key == name && !value.is_empty());
        let mut values: Vec<_> = named.map(|(_, value)| value.into_owned()).collect();
        // No name has one, and PostgreSQL takes none.
        if values.iter().any(|value| value.contains('\0')) {
            problems.add(name, "must be a text without NUL");
            values.clear();
        }
        values
    }

    /// The first value of a name.
    pub(super) fn text(&self, problems: &mut Problems, name: &'static str) -> Option<String> {
        self.texts(problems, name).into_iter().next()
    }

    /// A value that must be there.
    pub(super) fn required(&self, name: &'static str) -> Result<String, Failure> {
        let mut problems = Problems::default();
        let value = self.text(&mut problems, name);
        if value.is_none() {
            problems.add(name, "is missing from the query");
        }
        Ok(problems.or(value)?)
    }

    /// A time.
    pub(super) fn time(&self, problems: &mut Problems, name: &'static str) -> Option<Timestamp> {
        let time = instant::parse(&self.text(problems, name)?);
        if time.is_none() {
            problems.add(name, "must be a time, as in 2027-01-31T12:00:00Z");
        }
        time
    }

    /// A number between two others.
    pub(super) fn number(
        &self,
        problems: &mut Problems,
        name: &'static str,
        least: u32,
        most: u32,
    ) -> Option<u32> {
        let number = self.text(problems, name)?.parse().ok();
        let number = number.filter(|number| (least..=most).contains(number));
        if number.is_none() {
            problems.add(name, format!("must be a number from {least} to {most}"));
        }
        number
    }
}
