//! Accounts: people with a password, a role, and what was granted to them beyond it.
//!
//! Who is signed in is `sessions`' business.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use jiff::Timestamp;
use serde_json::{Value, json};
use sqlx::{Row as _, any::AnyRow};

use super::{
    audit::{self, Author, Entry, EventKind},
    database::{Connection, Database, Lane, now, of_millis},
    error::Error,
    password::Password,
    permission::{Actor, Operator, Permission, RootRole},
    rights,
    sessions::SessionRef,
};
use crate::wire::admin::{Email, Name, Username};

/// What may be told of an account.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Account {
    /// Its number.
    pub id: i64,
    /// The name to sign in with; its letters' case is remembered and does not matter.
    pub username: String,
    /// The person's name.
    pub name: Option<String>,
    /// The person's address.
    pub email: Option<String>,
    /// What it may do.
    pub role: RootRole,
    /// What it may do beyond its role.
    pub permissions: BTreeSet<Permission>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When somebody last signed in to it.
    pub seen_at: Option<Timestamp>,
}

impl Account {
    /// The account as somebody who acts in `session`.
    pub(super) fn operator(&self, session: SessionRef) -> Operator {
        let (username, permissions) = (self.username.clone(), self.permissions.clone());
        Operator::Account { id: self.id, username, role: self.role, permissions, session }
    }

    /// The account as the author of events, acting from `address`.
    pub(super) fn author(&self, address: IpAddr) -> Author<'_> {
        Author { name: &self.username, id: Some(self.id), address: Some(address) }
    }

    /// The account as audit events tell it.
    fn data(&self) -> Value {
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

/// An account to create.
#[derive(Clone, Debug)]
pub struct NewAccount {
    /// The name to sign in with.
    pub username: String,
    /// The person's name.
    pub name: Option<String>,
    /// The person's address.
    pub email: Option<String>,
    /// What it may do.
    pub role: RootRole,
    /// What it signs in with.
    pub password: Password,
}

/// What to change of an account; `None` leaves a field as it is.
#[derive(Clone, Debug, Default)]
pub struct AccountChange {
    /// The person's name, or that none is known.
    pub name: Option<Option<String>>,
    /// The person's address, or that none is known.
    pub email: Option<Option<String>>,
    /// What it may do.
    pub role: Option<RootRole>,
    /// What it signs in with.
    pub password: Option<Password>,
}

/// A change of what is granted to an account.
#[derive(Clone, Debug)]
pub enum Grants {
    /// These, and no others.
    Only(BTreeSet<Permission>),
    /// These as well.
    With(BTreeSet<Permission>),
    /// These no longer.
    Without(BTreeSet<Permission>),
}

impl Grants {
    fn applied_to(&self, granted: &BTreeSet<Permission>) -> BTreeSet<Permission> {
        match self {
            Self::Only(these) => these.clone(),
            Self::With(these) => granted | these,
            Self::Without(these) => granted - these,
        }
    }
}

/// The form of a username under which it is found.
pub(super) fn key_of(username: &str) -> String {
    username.trim().to_lowercase()
}

fn check_username(username: &str) -> Result<String, Error> {
    let read = Username::parse(username).map_err(|reason| Error::invalid("username", reason))?;
    Ok(read.0)
}

/// What a person is called; an empty text is nothing.
fn check_name(name: Option<String>) -> Result<Option<String>, Error> {
    let Some(name) = name.filter(|name| !name.trim().is_empty()) else { return Ok(None) };
    let read = Name::parse(&name).map_err(|reason| Error::invalid("name", reason))?;
    Ok(Some(read.0))
}

/// Where a person can be reached; an empty text is nowhere.
fn check_email(email: Option<String>) -> Result<Option<String>, Error> {
    let Some(email) = email.filter(|email| !email.trim().is_empty()) else { return Ok(None) };
    let read = Email::parse(&email).map_err(|reason| Error::invalid("email", reason))?;
    Ok(Some(read.0))
}

/// At most `limit` accounts with numbers above `after`, the oldest first.
pub(super) async fn page(
    database: &Database,
    after: i64,
    limit: u32,
) -> Result<Vec<Account>, Error> {
    let mut transaction = database.read().await?;
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
        read(row, grants)
    };
    rows.iter().map(|row| Ok(account(row)?)).collect()
}

/// One account.
pub(super) async fn find(connection: &mut Connection, id: i64) -> Result<Option<Account>, Error> {
    let row = sqlx::query("SELECT * FROM accounts WHERE id = $1").bind(id);
    let Some(row) = row.fetch_optional(&mut *connection).await? else { return Ok(None) };
    let grants = sqlx::query("SELECT * FROM account_permissions WHERE account_id = $1").bind(id);
    let grants = grants.fetch_all(connection).await?;
    Ok(Some(read(&row, &grants)?))
}

/// The number and the password's hash of the account of that name.
pub(super) async fn credentials(
    database: &Database,
    username: &str,
) -> Result<Option<(i64, String)>, Error> {
    let query = sqlx::query_as("SELECT id, password FROM accounts WHERE username_key = $1");
    Ok(query.bind(key_of(username)).fetch_optional(&mut *database.connection().await?).await?)
}

/// The hash of an account's password.
pub(super) async fn hash_of(database: &Database, id: i64) -> Result<Option<String>, Error> {
    let query = sqlx::query_scalar("SELECT password FROM accounts WHERE id = $1");
    Ok(query.bind(id).fetch_optional(&mut *database.connection().await?).await?)
}

/// How many accounts there are.
pub(super) async fn count(connection: &mut Connection) -> Result<i64, Error> {
    Ok(sqlx::query_scalar("SELECT COUNT(*) FROM accounts").fetch_one(connection).await?)
}

/// Makes an account whose password has this hash, and writes the event.
pub(super) async fn insert(
    transaction: &mut Connection,
    actor: &Actor,
    new: NewAccount,
    hash: &str,
) -> Result<Account, Error> {
    let username = check_username(&new.username)?;
    let (name, email) = (check_name(new.name)?, check_email(new.email)?);
    let taken = sqlx::query("SELECT id FROM accounts WHERE username_key = $1");
    let taken = taken.bind(key_of(&username)).fetch_optional(&mut *transaction).await?;
    if taken.is_some() {
        return Err(Error::Taken("username"));
    }
    let id: i64 = sqlx::query_scalar(
        "INSERT INTO accounts (username, username_key, name, email, role, password, created_at) \
         VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id",
    )
    .bind(&username)
    .bind(key_of(&username))
    .bind(name)
    .bind(email)
    .bind(new.role.id())
    .bind(hash)
    .bind(now().as_millisecond())
    .fetch_one(&mut *transaction)
    .await?;
    let account = find(transaction, id).await?.ok_or(Error::Busy)?;
    let entry = Entry { data: Some(account.data()), ..Entry::default() };
    audit::record(transaction, actor, EventKind::UserCreated, entry).await?;
    Ok(account)
}

/// Makes an account, unless there are `limit`. Like every change below, it checks the rights of
/// `actor` in its own transaction.
pub(super) async fn create(
    database: &Database,
    actor: &Actor,
    new: NewAccount,
    hash: &str,
    limit: usize,
) -> Result<Account, Error> {
    let mut transaction = database.write(Lane::Control).await?;
    rights::require_admin(&mut transaction, actor).await?;
    if usize::try_from(count(&mut transaction).await?).is_ok_and(|count| count >= limit) {
        return Err(Error::Limit { what: "accounts", limit });
    }
    let account = insert(&mut transaction, actor, new, hash).await?;
    transaction.commit().await?;
    Ok(account)
}

/// Changes what is known of an account, its role, and the hash of its password where there is a new
/// one.
pub(super) async fn update(
    database: &Database,
    actor: &Actor,
    id: i64,
    change: AccountChange,
    hash: Option<&str>,
) -> Result<Option<Account>, Error> {
    let mut transaction = database.write(Lane::Control).await?;
    rights::require_admin(&mut transaction, actor).await?;
    let Some(before) = find(&mut transaction, id).await? else { return Ok(None) };
    let mut after = before.clone();
    if let Some(name) = change.name {
        after.name = check_name(name)?;
    }
    if let Some(email) = change.email {
        after.email = check_email(email)?;
    }
    after.role = change.role.unwrap_or(before.role);
    if after.role != RootRole::Admin {
        keep_an_admin(&mut transaction, id).await?;
    }
    sqlx::query("UPDATE accounts SET name = $1, email = $2, role = $3 WHERE id = $4")
        .bind(after.name.as_deref())
        .bind(after.email.as_deref())
        .bind(after.role.id())
        .bind(id)
        .execute(&mut *transaction)
        .await?;
    if after != before {
        let entry = changed(&before, &after);
        audit::record(&mut transaction, actor, EventKind::UserUpdated, entry).await?;
    }
    if let Some(hash) = hash {
        replace_hash(&mut transaction, actor, &after, hash).await?;
    }
    transaction.commit().await?;
    Ok(Some(after))
}

/// Changes what is granted to an account beyond its role.
pub(super) async fn grant(
    database: &Database,
    actor: &Actor,
    id: i64,
    change: Grants,
) -> Result<Option<Account>, Error> {
    let mut transaction = database.write(Lane::Control).await?;
    rights::require_admin(&mut transaction, actor).await?;
    let Some(before) = find(&mut transaction, id).await? else { return Ok(None) };
    let permissions = change.applied_to(&before.permissions);
    let delete = sqlx::query("DELETE FROM account_permissions WHERE account_id = $1").bind(id);
    delete.execute(&mut *transaction).await?;
    for permission in &permissions {
        sqlx::query("INSERT INTO account_permissions (account_id, permission) VALUES ($1, $2)")
            .bind(id)
            .bind(permission.as_str())
            .execute(&mut *transaction)
            .await?;
    }
    let after = Account { permissions, ..before.clone() };
    let entry = changed(&before, &after);
    audit::record(&mut transaction, actor, EventKind::UserPermissionsChanged, entry).await?;
    transaction.commit().await?;
    Ok(Some(after))
}

/// Sets the hash of an account's password, and ends all of its sessions.
pub(super) async fn set_password(
    database: &Database,
    actor: &Actor,
    id: i64,
    hash: &str,
) -> Result<Option<Account>, Error> {
    let mut transaction = database.write(Lane::Control).await?;
    rights::require_admin(&mut transaction, actor).await?;
    let Some(account) = find(&mut transaction, id).await? else { return Ok(None) };
    replace_hash(&mut transaction, actor, &account, hash).await?;
    transaction.commit().await?;
    Ok(Some(account))
}

/// Replaces the hash `compared` of the password of the account `id`, which acts in `session`, and
/// ends its other sessions. `None` where its hash is another one by now.
pub(super) async fn set_own_password(
    database: &Database,
    actor: &Actor,
    (id, session): (i64, &SessionRef),
    compared: &str,
    hash: &str,
) -> Result<Option<Account>, Error> {
    let mut transaction = database.write(Lane::Control).await?;
    session.require_open(&mut transaction, id).await?;
    let update = sqlx::query("UPDATE accounts SET password = $1 WHERE id = $2 AND password = $3");
    let update = update.bind(hash).bind(id).bind(compared).execute(&mut *transaction).await?;
    if update.rows_affected() == 0 {
        return Ok(None);
    }
    let Some(account) = find(&mut transaction, id).await? else { return Ok(None) };
    end_sessions(&mut transaction, actor, &account, Some(session)).await?;
    transaction.commit().await?;
    Ok(Some(account))
}

async fn replace_hash(
    transaction: &mut Connection,
    actor: &Actor,
    account: &Account,
    hash: &str,
) -> Result<(), Error> {
    let update = sqlx::query("UPDATE accounts SET password = $1 WHERE id = $2");
    update.bind(hash).bind(account.id).execute(&mut *transaction).await?;
    end_sessions(transaction, actor, account, None).await
}

/// Ends the sessions of an account whose password has changed, except `keep`, and writes the event.
async fn end_sessions(
    transaction: &mut Connection,
    actor: &Actor,
    account: &Account,
    keep: Option<&SessionRef>,
) -> Result<(), Error> {
    let end = sqlx::query("DELETE FROM sessions WHERE account_id = $1 AND selector <> $2");
    let keep = keep.map_or("", SessionRef::selector);
    end.bind(account.id).bind(keep).execute(&mut *transaction).await?;
    let entry = Entry { data: Some(account.data()), ..Entry::default() };
    audit::record(transaction, actor, EventKind::UserPasswordChanged, entry).await
}

/// Deletes an account, with its sessions.
pub(super) async fn delete(
    database: &Database,
    actor: &Actor,
    id: i64,
) -> Result<Option<Account>, Error> {
    let mut transaction = database.write(Lane::Control).await?;
    rights::require_admin(&mut transaction, actor).await?;
    let Some(account) = find(&mut transaction, id).await? else { return Ok(None) };
    keep_an_admin(&mut transaction, id).await?;
    let delete = sqlx::query("DELETE FROM accounts WHERE id = $1").bind(id);
    delete.execute(&mut *transaction).await?;
    let entry = Entry { pre_data: Some(account.data()), ..Entry::default() };
    audit::record(&mut transaction, actor, EventKind::UserDeleted, entry).await?;
    transaction.commit().await?;
    Ok(Some(account))
}

/// Insists on an admin beside the account `id`.
async fn keep_an_admin(transaction: &mut Connection, id: i64) -> Result<(), Error> {
    let others = sqlx::query("SELECT id FROM accounts WHERE role = $1 AND id <> $2 LIMIT 1");
    let others = others.bind(RootRole::Admin.id()).bind(id).fetch_optional(transaction).await?;
    others.map(drop).ok_or(Error::LastAdmin)
}

fn changed(before: &Account, after: &Account) -> Entry {
    Entry { data: Some(after.data()), pre_data: Some(before.data()), ..Entry::default() }
}

/// The account of a row; `grants` are the rows of its permissions.
fn read(row: &AnyRow, grants: &[AnyRow]) -> Result<Account, sqlx::Error> {
    let mut permissions = BTreeSet::new();
    for grant in grants {
        // What only a later version knows is not granted by this one.
        permissions.extend(Permission::parse(grant.try_get("permission")?));
    }
    Ok(Account {
        id: row.try_get("id")?,
        username: row.try_get("username")?,
        name: row.try_get("name")?,
        email: row.try_get("email")?,
        // Likewise a role.
        role: RootRole::from_id(row.try_get("role")?).unwrap_or(RootRole::Viewer),
        permissions,
        created_at: of_millis(row.try_get("created_at")?),
        seen_at: row.try_get::<Option<i64>, _>("seen_at")?.map(of_millis),
    })
}
