//! Unleash's event log: the response of `GET /api/admin/search/events` (Unleash 6 and newer).
//!
//! Only what identifies and classifies an event is read; the changed objects are not.

use jiff::Timestamp;
use serde::{Deserialize, Deserializer};

use crate::token::Environment;

/// A page of the event log, newest first.
#[derive(Debug, Deserialize)]
pub struct EventPage {
    /// The events.
    pub events: Vec<LoggedEvent>,
    /// The number of events on all pages.
    pub total: u64,
}

/// An entry of the event log.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LoggedEvent {
    /// Its id. Ids grow, but an event may become visible after one with a higher id: both were written at
    /// the same time.
    pub id: u64,
    /// When it was written.
    pub created_at: Timestamp,
    /// What it changed.
    #[serde(rename = "type")]
    pub subject: ChangedSubject,
    /// The only environment that it concerns; `None` if it concerns all.
    #[serde(default, deserialize_with = "deserialize_environment")]
    pub environment: Option<Environment>,
}

/// The kind of object that an event changed.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(from = "String")]
pub enum ChangedSubject {
    /// A flag or a segment.
    Flag,
    /// An API token.
    Token,
    /// Any other object. Its change may affect flags, tokens and environments: deleting a project deletes
    /// its tokens too.
    Other,
}

impl From<String> for ChangedSubject {
    /// Classifies a type such as `feature-environment-enabled`. The types of all versions of Unleash begin
    /// with the kind of the object.
    fn from(event_type: String) -> Self {
        match event_type.split('-').next() {
            Some("feature" | "segment") => Self::Flag,
            Some("api") if event_type.starts_with("api-token-") => Self::Token,
            _ => Self::Other,
        }
    }
}

fn deserialize_environment<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Environment>, D::Error> {
    let name = Option::<String>::deserialize(deserializer)?;
    Ok(name.filter(|name| !name.is_empty()).map(|name| Environment::new(&name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_of_a_real_server_is_read() {
        // The shape that Unleash 8.2 sends, without the changed objects.
        let page: EventPage = serde_json::from_str(
            r#"{"events":[
                {"id":31,"type":"feature-environment-enabled","createdBy":"admin","createdByUserId":1,
                 "createdAt":"2026-01-02T03:04:05.678Z","data":{},"preData":null,"tags":[],
                 "featureName":"f","project":"default","environment":"production","label":"x","summary":"y"},
                {"id":30,"type":"api-token-deleted","createdAt":"2026-01-02T03:04:05.000Z","environment":""},
                {"id":29,"type":"project-deleted","createdAt":"2026-01-02T03:04:05.000Z","environment":null}
            ],"total":31}"#,
        )
        .unwrap();
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let expected = [
            (31, "2026-01-02T03:04:05.678Z", ChangedSubject::Flag, Some("production")),
            (30, "2026-01-02T03:04:05Z", ChangedSubject::Token, None),
            (29, "2026-01-02T03:04:05Z", ChangedSubject::Other, None),
        ];
        let expected = expected.map(|(id, created_at, subject, environment)| LoggedEvent {
            id,
            created_at: at(created_at),
            subject,
            environment: environment.map(Environment::new),
        });
        assert_eq!((page.events, page.total), (expected.to_vec(), 31));
    }

    #[test]
    fn types_are_classified_by_the_kind_of_the_changed_object() {
        for (event_type, subject) in [
            ("feature-created", ChangedSubject::Flag),
            ("features-imported", ChangedSubject::Other),
            ("segment-deleted", ChangedSubject::Flag),
            ("api-token-created", ChangedSubject::Token),
            ("api-key", ChangedSubject::Other),
            ("environment-import", ChangedSubject::Other),
            ("", ChangedSubject::Other),
        ] {
            assert_eq!(ChangedSubject::from(event_type.to_owned()), subject, "{event_type}");
        }
    }
}
