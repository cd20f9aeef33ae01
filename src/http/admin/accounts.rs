//! Accounts: listing, creating, changing, deleting, what they are granted, and their passwords.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{
    body::{self, Query},
    operation::MOST_ACCOUNTS,
};
use crate::{
    control::{
        Account, AccountChange, Actor, Control, Grants, NewAccount, Operator, Permission, RootRole,
    },
    http::reply::{self, Failure, Reply},
    wire::admin::{self as wire, Field, Problems, Role, Time},
};

/// The accounts, all or a page of them, and the roles that there are.
pub(super) async fn list(
    control: &Control,
    operator: &Operator,
    query: &Query<'_>,
) -> Result<Reply, Failure> {
    let mut problems = Problems::default();
    let after = query.number(&mut problems, "after", 0, u32::MAX).unwrap_or(0);
    let limit = query.number(&mut problems, "limit", 1, MOST_ACCOUNTS).unwrap_or(u32::MAX);
    problems.finish()?;
    let users = control.accounts_after(operator, after.into(), limit).await?;
    let users = users.into_iter().map(shown).collect();
    let root_roles = RootRole::ALL.map(|role| wire::RootRole {
        id: role.id(),
        name: role.name(),
        description: match role {
            RootRole::Admin => "May do everything",
            RootRole::Editor => "Sees client and frontend tokens",
            RootRole::Viewer => "Sees client tokens",
        },
        r#type: "root",
    });
    Ok(reply::document(&wire::Users { users, root_roles: root_roles.into() }))
}

/// One account.
pub(super) async fn show(control: &Control, actor: &Actor, id: &str) -> Result<Reply, Failure> {
    found(control.account(actor, number(id)?).await?)
}

/// Creates an account.
pub(super) async fn create(
    control: &Control,
    actor: &Actor,
    body: &Bytes,
) -> Result<Reply, Failure> {
    let asked: wire::CreateUser = body::read(body)?;
    let mut problems = Problems::default();
    let may_be_missing = !matches!(asked.username, Field::Wrong(_));
    let username = problems.optional("username", asked.username).and_then(|it| it.0);
    let name = problems.optional("name", asked.name).and_then(|it| it.0).map(|name| name.0);
    let email = problems.optional("email", asked.email).and_then(|it| it.0).map(|email| email.0);
    let role = role(&mut problems, asked.root_role, true);
    let password = problems.required("password", asked.password);
    let password = body::new_password(&mut problems, password.as_ref());
    let username = username.map(|name| name.0).or_else(|| email.clone());
    if username.is_none() && may_be_missing {
        problems.add("username", "is missing");
    }
    let new = || {
        let (username, role, password) = (username?, role?, password?);
        Some(NewAccount { username, name, email, role, password })
    };
    let account = control.create_account(actor, problems.or(new())?).await?;
    let location = account.id.to_string();
    Ok(reply::created(&shown(account), &location))
}

/// Changes what is told of an account.
pub(super) async fn update(
    control: &Control,
    actor: &Actor,
    id: &str,
    body: &Bytes,
) -> Result<Reply, Failure> {
    let asked: wire::UpdateUser = body::read(body)?;
    let mut problems = Problems::default();
    let name = problems.optional("name", asked.name).map(|it| it.0.map(|name| name.0));
    let email = problems.optional("email", asked.email).map(|it| it.0.map(|email| email.0));
    let role = role(&mut problems, asked.root_role, false);
    let password = problems.optional("password", asked.password);
    let password = body::new_password(&mut problems, password.as_ref());
    problems.finish()?;
    let change = AccountChange { name, email, role, password };
    found(control.update_account(actor, number(id)?, change).await?)
}

/// Deletes an account.
pub(super) async fn delete(control: &Control, actor: &Actor, id: &str) -> Result<Reply, Failure> {
    control.delete_account(actor, number(id)?).await?.ok_or_else(missing)?;
    Ok(reply::done())
}

/// Says what an account may do beyond its role.
pub(super) async fn set_permissions(
    control: &Control,
    actor: &Actor,
    id: &str,
    body: &Bytes,
) -> Result<Reply, Failure> {
    let asked: wire::SetPermissions = body::read(body)?;
    let mut problems = Problems::default();
    let names = problems.required("permissions", asked.permissions).unwrap_or_default();
    let mut permissions = BTreeSet::new();
    for name in &names {
        if let Some(granted) = Permission::granted_by(&name.0) {
            permissions.extend(granted);
        } else {
            let known = Permission::ALL.map(Permission::as_str).join(", ");
            problems.add("permissions", format!("must be of {known} or CREATE_API_TOKEN"));
            break;
        }
    }
    problems.finish()?;
    found(control.grant(actor, number(id)?, Grants::Only(permissions)).await?)
}

/// Gives an account a new password.
pub(super) async fn reset_password(
    control: &Control,
    actor: &Actor,
    id: &str,
    body: &Bytes,
) -> Result<Reply, Failure> {
    let asked: wire::ResetPassword = body::read(body)?;
    let mut problems = Problems::default();
    let password = problems.required("password", asked.password);
    let password = body::new_password(&mut problems, password.as_ref());
    let password = problems.or(password)?;
    control.set_password(actor, number(id)?, password).await?.ok_or_else(missing)?;
    Ok(reply::done())
}

fn role(problems: &mut Problems, field: Field<Role>, required: bool) -> Option<RootRole> {
    let asked = if required {
        problems.required("rootRole", field)
    } else {
        problems.optional("rootRole", field)
    };
    let role = match asked? {
        Role::Id(id) => RootRole::from_id(id),
        Role::Name(name) => {
            RootRole::ALL.into_iter().find(|role| role.name().eq_ignore_ascii_case(&name))
        }
    };
    if role.is_none() {
        problems.add("rootRole", "must be 1 (Admin), 2 (Editor) or 3 (Viewer)");
    }
    role
}

/// The number of an account; a text that is none names no account.
fn number(id: &str) -> Result<i64, Failure> {
    id.parse().map_err(|_| missing())
}

fn missing() -> Failure {
    Failure::Missing("there is no such account".to_owned())
}

fn found(account: Option<Account>) -> Result<Reply, Failure> {
    account.map(|account| reply::document(&shown(account))).ok_or_else(missing)
}

fn shown(account: Account) -> wire::User {
    wire::User {
        id: account.id,
        username: account.username,
        name: account.name,
        email: account.email,
        root_role: account.role.id(),
        permissions: account.permissions.into_iter().map(Permission::as_str).collect(),
        created_at: Time(account.created_at),
        seen_at: account.seen_at.map(Time),
        is_api: false,
    }
}
