//! What was done: an append-only record, pruned only by a retention that the operator sets.
//!
//! An event is written in the transaction of the change that it tells of, and holds no secret.

use std::{fmt::Write as _, net::IpAddr};

use jiff::Timestamp;
use serde_json::Value;
use sqlx::{
    Arguments as _, AssertSqlSafe, Row as _,
    any::{AnyArguments, AnyRow},
};

use super::{
    database::{Connection, Database, Lane, now, of_count, of_millis},
    error::Error,
    permission::Actor,
};

/// What happened.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[expect(missing_docs, reason = "each name is its documentation")]
pub enum EventKind {
    TokenCreated,
    TokenUpdated,
    TokenDeleted,
    UserCreated,
    UserUpdated,
    UserDeleted,
    UserPermissionsChanged,
    UserPasswordChanged,
    UserSignedIn,
    UserSignedOut,
    SignInRefused,
    PermissionDenied,
}

impl EventKind {
    /// Every kind.
    pub const ALL: [Self; 12] = [
        Self::TokenCreated,
        Self::TokenUpdated,
        Self::TokenDeleted,
        Self::UserCreated,
        Self::UserUpdated,
        Self::UserDeleted,
        Self::UserPermissionsChanged,
        Self::UserPasswordChanged,
        Self::UserSignedIn,
        Self::UserSignedOut,
        Self::SignInRefused,
        Self::PermissionDenied,
    ];

    /// The kind as the admin API writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TokenCreated => "api-token-created",
            Self::TokenUpdated => "api-token-updated",
            Self::TokenDeleted => "api-token-deleted",
            Self::UserCreated => "user-created",
            Self::UserUpdated => "user-updated",
            Self::UserDeleted => "user-deleted",
            Self::UserPermissionsChanged => "user-permissions-changed",
            Self::UserPasswordChanged => "user-password-changed",
            Self::UserSignedIn => "user-signed-in",
            Self::UserSignedOut => "user-signed-out",
            Self::SignInRefused => "sign-in-refused",
            Self::PermissionDenied => "permission-denied",
        }
    }

    /// The kind of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its number; later ones have higher numbers.
    pub id: i64,
    /// What, by the name of an [`EventKind`] of this or a later version.
    pub kind: String,
    /// Who: an account, an admin token's name, or the command line.
    pub created_by: String,
    /// Which account.
    pub created_by_user_id: Option<i64>,
    /// When.
    pub created_at: Timestamp,
    /// From where.
    pub ip: Option<String>,
    /// The environment that it concerns.
    pub environment: Option<String>,
    /// The projects that it concerns, with commas between them.
    pub project: Option<String>,
    /// What it became.
    pub data: Option<Value>,
    /// What it was.
    pub pre_data: Option<Value>,
}

/// Which events to tell; an empty field asks for all.
#[derive(Clone, Debug, Default)]
pub struct EventQuery {
    /// Of one of these kinds.
    pub kinds: Vec<EventKind>,
    /// Of this name's doing.
    pub created_by: Option<String>,
    /// Concerning this environment.
    pub environment: Option<String>,
    /// Concerning this project.
    pub project: Option<String>,
    /// Not before this time.
    pub since: Option<Timestamp>,
    /// Before this time.
    pub until: Option<Timestamp>,
    /// With a lower number: the next page after an event of that number.
    pub before: Option<i64>,
    /// At most so many, and never more than [`EventQuery::MAX_LIMIT`].
    pub limit: u32,
    /// After so many.
    pub offset: u32,
}

impl EventQuery {
    /// The most events that are told at once.
    pub const MAX_LIMIT: u32 = 1000;
}

/// A part of what was asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct EventPage {
    /// The newest first.
    pub events: Vec<Event>,
    /// How many there are on all pages, counted up to [`EventPage::MOST_COUNTED`].
    pub total: u64,
}

impl EventPage {
    /// How far events are counted: further would take longer than to find them.
    pub const MOST_COUNTED: u32 = 10_000;
}

/// An event to write.
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) environment: Option<String>,
    pub(super) project: Option<String>,
    pub(super) data: Option<Value>,
    pub(super) pre_data: Option<Value>,
}

/// Whose doing an event is.
#[derive(Debug)]
pub(super) struct Author<'a> {
    pub(super) name: &'a str,
    pub(super) id: Option<i64>,
    pub(super) address: Option<IpAddr>,
}

impl<'a> From<&'a Actor> for Author<'a> {
    fn from(Actor { operator, address }: &'a Actor) -> Self {
        Self { name: operator.name(), id: operator.id(), address: *address }
    }
}

/// Writes an event in the transaction of the change that it tells of.
pub(super) async fn record(
    transaction: &mut Connection,
    actor: &Actor,
    kind: EventKind,
    entry: Entry,
) -> Result<(), Error> {
    record_by(transaction, &actor.into(), kind, entry).await
}

/// The same for an author who is no operator.
pub(super) async fn record_by(
    transaction: &mut Connection,
    author: &Author<'_>,
    kind: EventKind,
    entry: Entry,
) -> Result<(), Error> {
    let text = |value: Option<Value>| value.map(|value| value.to_string());
    sqlx::query(
        "INSERT INTO events (kind, created_by, created_by_user_id, created_at, ip, environment, \
         project, data, pre_data) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
    )
    .bind(kind.as_str())
    .bind(author.name.to_owned())
    .bind(author.id)
    .bind(now().as_millisecond())
    .bind(author.address.map(|address| address.to_string()))
    .bind(entry.environment)
    .bind(entry.project)
    .bind(text(entry.data))
    .bind(text(entry.pre_data))
    .execute(transaction)
    .await?;
    Ok(())
}

/// What a row must be like: only what is asked for, so that an index can be used.
#[derive(Debug, Default)]
struct Conditions {
    sql: String,
    values: Vec<Bound>,
}

/// A value beside a statement's text.
#[derive(Debug)]
enum Bound {
    Text(String),
    Number(i64),
}

impl Conditions {
    fn of(query: &EventQuery) -> Self {
        let mut conditions = Self::default();
        if !query.kinds.is_empty() {
            let kinds = query.kinds.iter().map(|kind| Bound::Text(kind.as_str().to_owned()));
            conditions.add("kind IN (", ")", kinds.collect());
        }
        let text = |value: &Option<String>| value.clone().map(Bound::Text);
        let millis = |at: Option<Timestamp>| at.map(|at| Bound::Number(at.as_millisecond()));
        for (before, value, after) in [
            ("created_by = ", text(&query.created_by), ""),
            ("environment = ", text(&query.environment), ""),
            ("event_projects.project = ", text(&query.project), ""),
            ("created_at >= ", millis(query.since), ""),
            ("created_at < ", millis(query.until), ""),
        ] {
            if let Some(value) = value {
                conditions.add(before, after, vec![value]);
            }
        }
        conditions
    }

    fn add(&mut self, before: &str, after: &str, values: Vec<Bound>) {
        self.sql.push_str(if self.sql.is_empty() { " WHERE " } else { " AND " });
        self.sql.push_str(before);
        for (n, value) in values.into_iter().enumerate() {
            self.values.push(value);
            let comma = if n > 0 { ", " } else { "" };
            write!(self.sql, "{comma}${}", self.values.len()).expect("it is a string");
        }
        self.sql.push_str(after);
    }

    /// The arguments of a statement with these conditions.
    fn arguments(&self) -> Result<AnyArguments, Error> {
        let mut arguments = AnyArguments::default();
        for value in &self.values {
            let added = match value {
                Bound::Text(text) => arguments.add(text.clone()),
                Bound::Number(number) => arguments.add(*number),
            };
            added.map_err(|error| Error::from(sqlx::Error::Encode(error)))?;
        }
        Ok(arguments)
    }
}

/// The events that `query` asks for.
pub(super) async fn page(database: &Database, query: &EventQuery) -> Result<EventPage, Error> {
    let mut conditions = Conditions::of(query);
    let mut transaction = database.read().await?;
    // The column is named by which an index is in order.
    let (events, id) = match query.project {
        Some(_) => ("events JOIN event_projects ON event_id = id", "event_id"),
        None => ("events", "id"),
    };
    let (found, most) = (&conditions.sql, EventPage::MOST_COUNTED);
    // Each text is made of the fixed ones above.
    let count =
        format!("SELECT COUNT(*) FROM (SELECT 1 FROM {events}{found} LIMIT {most}) AS found");
    let count = sqlx::query_scalar_with(AssertSqlSafe(count), conditions.arguments()?);
    let total: i64 = count.fetch_one(&mut *transaction).await?;
    if let Some(before) = query.before {
        conditions.add(&format!("{id} < "), "", vec![Bound::Number(before)]);
    }
    let (limit, offset) = (query.limit.min(EventQuery::MAX_LIMIT), query.offset);
    let found = &conditions.sql;
    let page = format!(
        "SELECT events.* FROM {events}{found} ORDER BY {id} DESC LIMIT {limit} OFFSET {offset}"
    );
    let rows = sqlx::query_with(AssertSqlSafe(page), conditions.arguments()?);
    let rows = rows.fetch_all(&mut *transaction).await?;
    let events = rows.iter().map(event).collect::<Result<_, _>>()?;
    Ok(EventPage { events, total: of_count(total) })
}

fn event(row: &AnyRow) -> Result<Event, sqlx::Error> {
    let value = |text: Option<String>| text.and_then(|text| serde_json::from_str(&text).ok());
    Ok(Event {
        id: row.try_get("id")?,
        kind: row.try_get("kind")?,
        created_by: row.try_get("created_by")?,
        created_by_user_id: row.try_get("created_by_user_id")?,
        created_at: of_millis(row.try_get("created_at")?),
        ip: row.try_get("ip")?,
        environment: row.try_get("environment")?,
        project: row.try_get("project")?,
        data: value(row.try_get("data")?),
        pre_data: value(row.try_get("pre_data")?),
    })
}

/// Forgets the events before a time, some at a time: others write in between.
pub(super) async fn prune(database: &Database, before: Timestamp) -> Result<(), Error> {
    const AT_ONCE: u64 = 5000;
    loop {
        let mut transaction = database.write(Lane::Control).await?;
        let delete = sqlx::query(
            "DELETE FROM events WHERE id IN \
             (SELECT id FROM events WHERE created_at < $1 ORDER BY created_at LIMIT 5000)",
        );
        let delete = delete.bind(before.as_millisecond()).execute(&mut *transaction).await?;
        transaction.commit().await?;
        if delete.rows_affected() < AT_ONCE {
            return Ok(());
        }
    }
}
