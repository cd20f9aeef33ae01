//! What was done: an append-only record, pruned only by a retention that the operator sets.
//!
//! An event is written in the transaction of the change that it tells of, and holds no secret.

use std::net::IpAddr;

use jiff::Timestamp;
use serde_json::Value;
use sqlx::{Row as _, any::AnyRow};

use super::{
    database::{Connection, Database, now, of_count, of_millis},
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
    /// How many there are on all pages.
    pub total: u64,
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

/// Which rows a query asks for: lists are texts with a comma at each end, and what is empty asks
/// for all.
macro_rules! from_where {
    () => {
        " FROM events WHERE ($1 = '' OR REPLACE($1, ',' || kind || ',', '') <> $1) \
         AND ($2 = '' OR created_by = $2) AND ($3 = '' OR environment = $3) \
         AND ($4 = '' OR REPLACE(',' || project || ',', ',' || $4 || ',', '') \
         <> ',' || project || ',') AND created_at >= $5 AND created_at < $6"
    };
}

/// The events that `query` asks for.
pub(super) async fn page(database: &Database, query: &EventQuery) -> Result<EventPage, Error> {
    let mut kinds = String::new();
    if !query.kinds.is_empty() {
        let names: Vec<_> = query.kinds.iter().map(|kind| kind.as_str()).collect();
        kinds = format!(",{},", names.join(","));
    }
    let since = query.since.map_or(i64::MIN, Timestamp::as_millisecond);
    let until = query.until.map_or(i64::MAX, Timestamp::as_millisecond);
    let mut transaction = database.read().await?;
    let total: i64 = sqlx::query_scalar(concat!("SELECT COUNT(*)", from_where!()))
        .bind(&kinds)
        .bind(query.created_by.as_deref().unwrap_or_default())
        .bind(query.environment.as_deref().unwrap_or_default())
        .bind(query.project.as_deref().unwrap_or_default())
        .bind(since)
        .bind(until)
        .fetch_one(&mut *transaction)
        .await?;
    let page = concat!("SELECT *", from_where!(), " ORDER BY id DESC LIMIT $7 OFFSET $8");
    let rows = sqlx::query(page)
        .bind(&kinds)
        .bind(query.created_by.as_deref().unwrap_or_default())
        .bind(query.environment.as_deref().unwrap_or_default())
        .bind(query.project.as_deref().unwrap_or_default())
        .bind(since)
        .bind(until)
        .bind(i64::from(query.limit.min(EventQuery::MAX_LIMIT)))
        .bind(i64::from(query.offset))
        .fetch_all(&mut *transaction)
        .await?;
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

/// Forgets the events before a time.
pub(super) async fn prune(database: &Database, before: Timestamp) -> Result<(), Error> {
    let delete = sqlx::query("DELETE FROM events WHERE created_at < $1");
    delete.bind(before.as_millisecond()).execute(&mut *database.connection().await?).await?;
    Ok(())
}
