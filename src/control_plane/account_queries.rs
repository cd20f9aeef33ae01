//! Accounts of people: role, and permissions in addition to the role.
//!
//! This module reads them. Changes are in `account_changes`, and signing in is in `sessions`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use jiff::Timestamp;
use serde_json::{Value, json};
use sqlx::{Row as _, any::AnyRow};

use super::{
    audit::Author,
    database::{Connection, Database, timestamp_from_millis},
    error::Error,
    operator::Operator,
    permissions::{RootRole, TokenPermission},
    session_ref::SessionRef,
};

/// An account, without its password.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Account {
    /// Its id in the database.
    pub id: i64,
    /// The name to sign in with, compared without regard to case.
    pub username: String,
    /// The person's name.
    pub name: Option<String>,
    /// The person's email address.
    pub email: Option<String>,
    /// Its role.
    pub role: RootRole,
    /// Permissions in addition to its role.
    pub permissions: BTreeSet<TokenPermission>,
    /// The time of its creation.
    pub created_at: Timestamp,
    /// The time of its last sign-in.
    pub seen_at: Option<Timestamp>,
}

impl Account {
    /// The account as the operator of requests in `session`.
    pub(super) fn operator(&self, session: SessionRef) -> Operator {
        let (username, permissions) = (self.username.clone(), self.permissions.clone());
        Operator::Account {
            account_id: self.id,
            username,
            role: self.role,
            granted_permissions: permissions,
            session,
        }
    }

    /// The account as the author of events, acting from `address`.
    pub(super) fn author(&self, address: IpAddr) -> Author<'_> {
        Author { name: &self.username, id: Some(self.id), address: Some(address) }
    }

    /// The account as audit events contain it.
    pub(super) fn audit_data(&self) -> Value {
        let permissions: Vec<_> = self.permissions.iter().map(|it| it.as_str()).collect();
        json!({
            "id": self.id,
            "username": self.username,
            "name": self.name,
            "email": self.email,
            "rootRole": self.role.id(),
            "permissions": permissions,
        })
    }
}

/// The normalized form of a username, by which it is looked up.
pub(super) fn username_key(username: &str) -> String {
    username.trim().to_lowercase()
}

/// At most `limit` accounts with ids above `after`, the oldest first.
pub(super) async fn page(
    database: &Database,
    after: i64,
    limit: u32,
) -> Result<Vec<Account>, Error> {
    let mut transaction = database.begin_read().await?;
    let rows = sqlx::query("SELECT * FROM accounts WHERE id > $1 ORDER BY id LIMIT $2");
    let rows = rows.bind(after).bind(i64::from(limit)).fetch_all(&mut *transaction).await?;
    let last: i64 = rows.last().map_or(Ok(after), |row| row.try_get("id"))?;
    let grants =
        sqlx::query("SELECT * FROM account_permissions WHERE account_id > $1 AND account_id <= $2");
    let grants = grants.bind(after).bind(last).fetch_all(&mut *transaction).await?;
    let mut granted = BTreeMap::<i64, Vec<AnyRow>>::new();
    for grant in grants {
        granted.entry(grant.try_get("account_id")?).or_default().push(grant);
    }
    let account = |row: &AnyRow| {
        let grants = granted.get(&row.try_get("id")?).map_or(&[][..], Vec::as_slice);
        read_account(row, grants)
    };
    rows.iter().map(|row| Ok(account(row)?)).collect()
}

/// One account.
pub(super) async fn find(connection: &mut Connection, id: i64) -> Result<Option<Account>, Error> {
    let row = sqlx::query("SELECT * FROM accounts WHERE id = $1").bind(id);
    let Some(row) = row.fetch_optional(&mut *connection).await? else { return Ok(None) };
    let grants = sqlx::query("SELECT * FROM account_permissions WHERE account_id = $1").bind(id);
    let grants = grants.fetch_all(connection).await?;
    Ok(Some(read_account(&row, &grants)?))
}

/// The id and the password hash of the account with that username.
pub(super) async fn credentials(
    database: &Database,
    username: &str,
) -> Result<Option<(i64, String)>, Error> {
    let query = sqlx::query_as("SELECT id, password FROM accounts WHERE username_key = $1");
    Ok(query
        .bind(username_key(username))
        .fetch_optional(&mut *database.connection().await?)
        .await?)
}

/// The password hash of an account.
pub(super) async fn password_hash(database: &Database, id: i64) -> Result<Option<String>, Error> {
    let query = sqlx::query_scalar("SELECT password FROM accounts WHERE id = $1");
    Ok(query.bind(id).fetch_optional(&mut *database.connection().await?).await?)
}

/// The number of accounts.
pub(super) async fn count(connection: &mut Connection) -> Result<i64, Error> {
    Ok(sqlx::query_scalar("SELECT COUNT(*) FROM accounts").fetch_one(connection).await?)
}

/// The account in `row`; `grants` are the rows of its permissions.
fn read_account(row: &AnyRow, grants: &[AnyRow]) -> Result<Account, sqlx::Error> {
    let mut permissions = BTreeSet::new();
    for grant in grants {
        // Permissions that only a later version knows are ignored.
        permissions.extend(TokenPermission::parse(grant.try_get("permission")?));
    }
    Ok(Account {
        id: row.try_get("id")?,
        username: row.try_get("username")?,
        name: row.try_get("name")?,
        email: row.try_get("email")?,
        // A role that only a later version knows counts as the lowest.
        role: RootRole::from_id(row.try_get("role")?).unwrap_or(RootRole::Viewer),
        permissions,
        created_at: timestamp_from_millis(row.try_get("created_at")?),
        seen_at: row.try_get::<Option<i64>, _>("seen_at")?.map(timestamp_from_millis),
    })
}
