//! Changes of accounts, each with its check of permissions, its SQL and its audit event in one transaction.

use std::collections::BTreeSet;

use super::{
    account_queries::{Account, count, find, username_key},
    audit::{self, EventKind, NewEvent},
    authorization,
    database::{Connection, Database, WriteLock, now},
    error::Error,
    operator::Actor,
    password::Password,
    permissions::{RootRole, TokenPermission},
    session_ref::SessionRef,
};
use crate::protocol::admin::{Email, Name, Username};

/// An account to create.
#[derive(Clone, Debug)]
pub struct NewAccount {
    /// The name to sign in with.
    pub username: String,
    /// The person's name.
    pub name: Option<String>,
    /// The person's email address.
    pub email: Option<String>,
    /// Its role.
    pub role: RootRole,
    /// Its password.
    pub password: Password,
}

/// The changes to an account; `None` leaves a field unchanged.
#[derive(Clone, Debug, Default)]
pub struct AccountChange {
    /// The person's name; `Some(None)` removes it.
    pub name: Option<Option<String>>,
    /// The person's email address; `Some(None)` removes it.
    pub email: Option<Option<String>>,
    /// Its role.
    pub role: Option<RootRole>,
    /// Its password.
    pub password: Option<Password>,
}

/// A change of the permissions that an account has in addition to its role.
#[derive(Clone, Debug)]
pub enum PermissionChange {
    /// Sets the permissions to these.
    Replace(BTreeSet<TokenPermission>),
    /// Adds these permissions.
    Add(BTreeSet<TokenPermission>),
    /// Removes these permissions.
    Remove(BTreeSet<TokenPermission>),
}

impl PermissionChange {
    fn apply(&self, granted: &BTreeSet<TokenPermission>) -> BTreeSet<TokenPermission> {
        match self {
            Self::Replace(these) => these.clone(),
            Self::Add(these) => granted | these,
            Self::Remove(these) => granted - these,
        }
    }
}

fn check_username(username: &str) -> Result<String, Error> {
    let read = Username::parse(username).map_err(|reason| Error::invalid("username", reason))?;
    Ok(read.0)
}

/// A valid name of a person; an empty text is `None`.
fn check_name(name: Option<String>) -> Result<Option<String>, Error> {
    let Some(name) = name.filter(|name| !name.trim().is_empty()) else { return Ok(None) };
    let read = Name::parse(&name).map_err(|reason| Error::invalid("name", reason))?;
    Ok(Some(read.0))
}

/// A valid email address; an empty text is `None`.
fn check_email(email: Option<String>) -> Result<Option<String>, Error> {
    let Some(email) = email.filter(|email| !email.trim().is_empty()) else { return Ok(None) };
    let read = Email::parse(&email).map_err(|reason| Error::invalid("email", reason))?;
    Ok(Some(read.0))
}

/// Creates an account with this password hash, and writes the audit event.
pub(super) async fn insert(
    transaction: &mut Connection,
    actor: &Actor,
    new: NewAccount,
    hash: &str,
) -> Result<Account, Error> {
    let username = check_username(&new.username)?;
    let (name, email) = (check_name(new.name)?, check_email(new.email)?);
    let taken = sqlx::query("SELECT id FROM accounts WHERE username_key = $1");
    let taken = taken.bind(username_key(&username)).fetch_optional(&mut *transaction).await?;
    if taken.is_some() {
        return Err(Error::NameTaken("username"));
    }
    let id: i64 = sqlx::query_scalar(
        "INSERT INTO accounts (username, username_key, name, email, role, password, created_at) \
         VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id",
    )
    .bind(&username)
    .bind(username_key(&username))
    .bind(name)
    .bind(email)
    .bind(new.role.id())
    .bind(hash)
    .bind(now().as_millisecond())
    .fetch_one(&mut *transaction)
    .await?;
    let account = find(transaction, id).await?.ok_or(Error::Busy)?;
    let entry = NewEvent { data: Some(account.audit_data()), ..NewEvent::default() };
    audit::record(transaction, actor, EventKind::UserCreated, entry).await?;
    Ok(account)
}

/// Creates an account, unless there are `limit` already. Like every change below, it checks the
/// permissions of `actor` in its own transaction.
pub(super) async fn create(
    database: &Database,
    actor: &Actor,
    new: NewAccount,
    hash: &str,
    limit: usize,
) -> Result<Account, Error> {
    let mut transaction = database.begin_write(WriteLock::Control).await?;
    authorization::require_admin(&mut transaction, actor).await?;
    if usize::try_from(count(&mut transaction).await?).is_ok_and(|count| count >= limit) {
        return Err(Error::LimitReached { what: "accounts", limit });
    }
    let account = insert(&mut transaction, actor, new, hash).await?;
    transaction.commit().await?;
    Ok(account)
}

/// Changes the person's data, the role, and the password hash if `hash` is given.
pub(super) async fn update(
    database: &Database,
    actor: &Actor,
    id: i64,
    change: AccountChange,
    hash: Option<&str>,
) -> Result<Option<Account>, Error> {
    let mut transaction = database.begin_write(WriteLock::Control).await?;
    authorization::require_admin(&mut transaction, actor).await?;
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
        require_other_admin(&mut transaction, id).await?;
    }
    sqlx::query("UPDATE accounts SET name = $1, email = $2, role = $3 WHERE id = $4")
        .bind(after.name.as_deref())
        .bind(after.email.as_deref())
        .bind(after.role.id())
        .bind(id)
        .execute(&mut *transaction)
        .await?;
    if after != before {
        let entry = change_event(&before, &after);
        audit::record(&mut transaction, actor, EventKind::UserUpdated, entry).await?;
    }
    if let Some(hash) = hash {
        set_password_hash(&mut transaction, actor, &after, hash).await?;
    }
    transaction.commit().await?;
    Ok(Some(after))
}

/// Changes the permissions that an account has in addition to its role.
pub(super) async fn update_permissions(
    database: &Database,
    actor: &Actor,
    id: i64,
    change: PermissionChange,
) -> Result<Option<Account>, Error> {
    let mut transaction = database.begin_write(WriteLock::Control).await?;
    authorization::require_admin(&mut transaction, actor).await?;
    let Some(before) = find(&mut transaction, id).await? else { return Ok(None) };
    let permissions = change.apply(&before.permissions);
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
    let entry = change_event(&before, &after);
    audit::record(&mut transaction, actor, EventKind::UserPermissionsChanged, entry).await?;
    transaction.commit().await?;
    Ok(Some(after))
}

/// Sets the password hash of an account, and ends all of its sessions.
pub(super) async fn set_password(
    database: &Database,
    actor: &Actor,
    id: i64,
    hash: &str,
) -> Result<Option<Account>, Error> {
    let mut transaction = database.begin_write(WriteLock::Control).await?;
    authorization::require_admin(&mut transaction, actor).await?;
    let Some(account) = find(&mut transaction, id).await? else { return Ok(None) };
    set_password_hash(&mut transaction, actor, &account, hash).await?;
    transaction.commit().await?;
    Ok(Some(account))
}

/// Replaces the password hash of the account `id` and ends its sessions except `session`. Returns `None`
/// if the stored hash is no longer `compared`.
pub(super) async fn set_own_password(
    database: &Database,
    actor: &Actor,
    (id, session): (i64, &SessionRef),
    compared: &str,
    hash: &str,
) -> Result<Option<Account>, Error> {
    let mut transaction = database.begin_write(WriteLock::Control).await?;
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

async fn set_password_hash(
    transaction: &mut Connection,
    actor: &Actor,
    account: &Account,
    hash: &str,
) -> Result<(), Error> {
    let update = sqlx::query("UPDATE accounts SET password = $1 WHERE id = $2");
    update.bind(hash).bind(account.id).execute(&mut *transaction).await?;
    end_sessions(transaction, actor, account, None).await
}

/// Ends the sessions of an account whose password has changed, except `keep`, and writes the audit
/// event.
async fn end_sessions(
    transaction: &mut Connection,
    actor: &Actor,
    account: &Account,
    keep: Option<&SessionRef>,
) -> Result<(), Error> {
    let end = sqlx::query("DELETE FROM sessions WHERE account_id = $1 AND selector <> $2");
    let keep = keep.map_or("", SessionRef::selector);
    end.bind(account.id).bind(keep).execute(&mut *transaction).await?;
    let entry = NewEvent { data: Some(account.audit_data()), ..NewEvent::default() };
    audit::record(transaction, actor, EventKind::UserPasswordChanged, entry).await
}

/// Deletes an account, with its sessions.
pub(super) async fn delete(
    database: &Database,
    actor: &Actor,
    id: i64,
) -> Result<Option<Account>, Error> {
    let mut transaction = database.begin_write(WriteLock::Control).await?;
    authorization::require_admin(&mut transaction, actor).await?;
    let Some(account) = find(&mut transaction, id).await? else { return Ok(None) };
    require_other_admin(&mut transaction, id).await?;
    let delete = sqlx::query("DELETE FROM accounts WHERE id = $1").bind(id);
    delete.execute(&mut *transaction).await?;
    let entry = NewEvent { pre_data: Some(account.audit_data()), ..NewEvent::default() };
    audit::record(&mut transaction, actor, EventKind::UserDeleted, entry).await?;
    transaction.commit().await?;
    Ok(Some(account))
}

/// Requires an admin other than the account `id`.
async fn require_other_admin(transaction: &mut Connection, id: i64) -> Result<(), Error> {
    let others = sqlx::query("SELECT id FROM accounts WHERE role = $1 AND id <> $2 LIMIT 1");
    let others = others.bind(RootRole::Admin.id()).bind(id).fetch_optional(transaction).await?;
    others.map(drop).ok_or(Error::LastAdmin)
}

fn change_event(before: &Account, after: &Account) -> NewEvent {
    NewEvent {
        data: Some(after.audit_data()),
        pre_data: Some(before.audit_data()),
        ..NewEvent::default()
    }
}
