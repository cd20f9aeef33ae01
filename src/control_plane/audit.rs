//! The audit log: an append-only record of changes, sign-ins and denials.
//!
//! An event is written in the transaction of the change that it describes, and contains no secret.
//! Events are deleted only by the retention that the operator sets.

use std::{fmt::Write as _, net::IpAddr};

use jiff::Timestamp;
use serde_json::Value;
use sqlx::{
    Arguments as _, AssertSqlSafe, Row as _,
    any::{AnyArguments, AnyRow},
};

use super::{
    database::{Connection, Database, WriteLock, now, timestamp_from_millis, unsigned_count},
    error::Error,
    operator::Actor,
};

/// The kind of an event.
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

    /// The name of the kind in the admin API.
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

    /// The kind with that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

/// An event of the audit log.
#[derive(Clone, Debug, PartialEq)]
pub struct AuditEvent {
    /// Its id; later events have higher ids.
    pub id: i64,
    /// The name of an [`EventKind`] of this or a later version.
    pub kind: String,
    /// The author: a username, the name of an admin token, or the command line.
    pub created_by: String,
    /// The author's account, if it has one.
    pub created_by_user_id: Option<i64>,
    /// The time of the event.
    pub created_at: Timestamp,
    /// The client address of the author.
    pub ip: Option<String>,
    /// The affected environment.
    pub environment: Option<String>,
    /// The affected projects, comma-separated.
    pub project: Option<String>,
    /// The object after the change.
    pub data: Option<Value>,
    /// The object before the change.
    pub pre_data: Option<Value>,
}

/// A filter for events; an empty field matches all.
#[derive(Clone, Debug, Default)]
pub struct EventQuery {
    /// Matches any of these kinds.
    pub kinds: Vec<EventKind>,
    /// The name of the author.
    pub created_by: Option<String>,
    /// The affected environment.
    pub environment: Option<String>,
    /// One of the affected projects.
    pub project: Option<String>,
    /// Earliest time, inclusive.
    pub since: Option<Timestamp>,
    /// Latest time, exclusive.
    pub until: Option<Timestamp>,
    /// Only events with lower ids than this one: the page after that event.
    pub before: Option<i64>,
    /// The maximum number of events, capped at [`EventQuery::MAX_LIMIT`].
    pub limit: u32,
    /// The number of matching events to skip.
    pub offset: u32,
}

impl EventQuery {
    /// The number of events in one page if a request names none.
    pub const DEFAULT_LIMIT: u32 = 100;

    /// The maximum number of events in one page.
    pub const MAX_LIMIT: u32 = 1000;
}

/// One page of matching events.
#[derive(Clone, Debug, PartialEq)]
pub struct EventPage {
    /// The newest first.
    pub events: Vec<AuditEvent>,
    /// The number of matching events, counted up to [`EventPage::MAX_COUNTED`].
    pub total: u64,
}

impl EventPage {
    /// The upper bound of the count: counting further would take longer than finding the events.
    pub const MAX_COUNTED: u32 = 10_000;
}

/// An event to write.
#[derive(Debug, Default)]
pub(super) struct NewEvent {
    pub(super) environment: Option<String>,
    pub(super) project: Option<String>,
    pub(super) data: Option<Value>,
    pub(super) pre_data: Option<Value>,
}

/// The author of an event.
#[derive(Debug)]
pub(super) struct Author<'a> {
    pub(super) name: &'a str,
    pub(super) id: Option<i64>,
    pub(super) address: Option<IpAddr>,
}

impl<'a> From<&'a Actor> for Author<'a> {
    fn from(Actor { operator, address }: &'a Actor) -> Self {
        Self { name: operator.name(), id: operator.account_id(), address: *address }
    }
}

/// Writes an event in the transaction of the change that it describes.
pub(super) async fn record(
    transaction: &mut Connection,
    actor: &Actor,
    kind: EventKind,
    entry: NewEvent,
) -> Result<(), Error> {
    record_by(transaction, &actor.into(), kind, entry).await
}

/// Like [`record`], for an author that is not an operator.
pub(super) async fn record_by(
    transaction: &mut Connection,
    author: &Author<'_>,
    kind: EventKind,
    entry: NewEvent,
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

/// The `WHERE` clause of a query with its parameters. It contains only the given conditions, so that an
/// index can be used.
#[derive(Debug, Default)]
struct WhereClause {
    sql: String,
    values: Vec<SqlValue>,
}

/// A parameter of a statement.
#[derive(Debug)]
enum SqlValue {
    Text(String),
    Integer(i64),
}

impl WhereClause {
    fn from_query(query: &EventQuery) -> Self {
        let mut conditions = Self::default();
        if !query.kinds.is_empty() {
            let kinds = query.kinds.iter().map(|kind| SqlValue::Text(kind.as_str().to_owned()));
            conditions.add("kind IN (", ")", kinds.collect());
        }
        let text = |value: &Option<String>| value.clone().map(SqlValue::Text);
        let millis = |at: Option<Timestamp>| at.map(|at| SqlValue::Integer(at.as_millisecond()));
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

    fn add(&mut self, before: &str, after: &str, values: Vec<SqlValue>) {
        self.sql.push_str(if self.sql.is_empty() { " WHERE " } else { " AND " });
        self.sql.push_str(before);
        for (n, value) in values.into_iter().enumerate() {
            self.values.push(value);
            let comma = if n > 0 { ", " } else { "" };
            write!(self.sql, "{comma}${}", self.values.len()).expect("it is a string");
        }
        self.sql.push_str(after);
    }

    /// The arguments of a statement with this clause.
    fn arguments(&self) -> Result<AnyArguments, Error> {
        let mut arguments = AnyArguments::default();
        for value in &self.values {
            let added = match value {
                SqlValue::Text(text) => arguments.add(text.clone()),
                SqlValue::Integer(number) => arguments.add(*number),
            };
            added.map_err(|error| Error::from(sqlx::Error::Encode(error)))?;
        }
        Ok(arguments)
    }
}

/// The events that match `query`.
pub(super) async fn page(database: &Database, query: &EventQuery) -> Result<EventPage, Error> {
    let mut conditions = WhereClause::from_query(query);
    let mut transaction = database.begin_read().await?;
    // The column by which the chosen index is sorted.
    let (events, id) = match query.project {
        Some(_) => ("events JOIN event_projects ON event_id = id", "event_id"),
        None => ("events", "id"),
    };
    let (found, most) = (&conditions.sql, EventPage::MAX_COUNTED);
    // Safe: the SQL is composed of the constant texts above.
    let count =
        format!("SELECT COUNT(*) FROM (SELECT 1 FROM {events}{found} LIMIT {most}) AS found");
    let count = sqlx::query_scalar_with(AssertSqlSafe(count), conditions.arguments()?);
    let total: i64 = count.fetch_one(&mut *transaction).await?;
    if let Some(before) = query.before {
        conditions.add(&format!("{id} < "), "", vec![SqlValue::Integer(before)]);
    }
    let (limit, offset) = (query.limit.min(EventQuery::MAX_LIMIT), query.offset);
    let found = &conditions.sql;
    let page = format!(
        "SELECT events.* FROM {events}{found} ORDER BY {id} DESC LIMIT {limit} OFFSET {offset}"
    );
    let rows = sqlx::query_with(AssertSqlSafe(page), conditions.arguments()?);
    let rows = rows.fetch_all(&mut *transaction).await?;
    let events = rows.iter().map(read_event).collect::<Result<_, _>>()?;
    Ok(EventPage { events, total: unsigned_count(total) })
}

fn read_event(row: &AnyRow) -> Result<AuditEvent, sqlx::Error> {
    let value = |text: Option<String>| text.and_then(|text| serde_json::from_str(&text).ok());
    Ok(AuditEvent {
        id: row.try_get("id")?,
        kind: row.try_get("kind")?,
        created_by: row.try_get("created_by")?,
        created_by_user_id: row.try_get("created_by_user_id")?,
        created_at: timestamp_from_millis(row.try_get("created_at")?),
        ip: row.try_get("ip")?,
        environment: row.try_get("environment")?,
        project: row.try_get("project")?,
        data: value(row.try_get("data")?),
        pre_data: value(row.try_get("pre_data")?),
    })
}

/// Deletes the events before a time, in batches of 5,000, so that other writers are not blocked for
/// long.
pub(super) async fn prune(database: &Database, before: Timestamp) -> Result<(), Error> {
    const BATCH: u64 = 5000;
    loop {
        let mut transaction = database.begin_write(WriteLock::Control).await?;
        let delete = sqlx::query(
            "DELETE FROM events WHERE id IN \
             (SELECT id FROM events WHERE created_at < $1 ORDER BY created_at LIMIT 5000)",
        );
        let delete = delete.bind(before.as_millisecond()).execute(&mut *transaction).await?;
        transaction.commit().await?;
        if delete.rows_affected() < BATCH {
            return Ok(());
        }
    }
}
