//! Bodies and queries of operators, read into their types.

use bytes::Bytes;
use form_urlencoded::parse;
use jiff::Timestamp;
use serde::de::DeserializeOwned;

use crate::{
    control::{Password, PasswordError},
    http::reply::Failure,
    wire::admin::{Hidden, Problem, Problems},
};

/// Reads a JSON object; what is wrong with its members is for them to say.
pub(super) fn read<T: DeserializeOwned>(body: &Bytes) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| {
        Failure::Malformed(match error.classify() {
            serde_json::error::Category::Data => "the body must be a JSON object".to_owned(),
            _ => format!("the body is not JSON: line {}, column {}", error.line(), error.column()),
        })
    })
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

/// The members of a query.
#[derive(Debug)]
pub(super) struct Query<'a>(&'a str);

impl<'a> Query<'a> {
    /// Of a request's address.
    pub(super) fn of(text: Option<&'a str>) -> Self {
        Self(text.unwrap_or_default())
    }

    /// The first value of a name that is not empty.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        let value = parse(self.0.as_bytes()).find(|(key, _)| key == name)?.1;
        (!value.is_empty()).then(|| value.into_owned())
    }

    /// A value that must be there.
    pub(super) fn required(&self, name: &'static str) -> Result<String, Failure> {
        self.text(name).ok_or_else(|| wrong(name, "is missing from the query"))
    }

    /// A time.
    pub(super) fn time(&self, name: &'static str) -> Result<Option<Timestamp>, Failure> {
        let read = |text: String| {
            text.parse().map_err(|_| wrong(name, "must be a time, as in 2027-01-31T12:00:00Z"))
        };
        self.text(name).map(read).transpose()
    }

    /// A number between two others.
    pub(super) fn number(
        &self,
        name: &'static str,
        least: u32,
        most: u32,
    ) -> Result<Option<u32>, Failure> {
        let read = |text: String| {
            let number = text.parse().ok().filter(|number| (least..=most).contains(number));
            number.ok_or_else(|| wrong(name, &format!("must be a number from {least} to {most}")))
        };
        self.text(name).map(read).transpose()
    }
}

fn wrong(path: &'static str, reason: &str) -> Failure {
    Failure::Invalid(vec![Problem { path, reason: reason.to_owned() }])
}
