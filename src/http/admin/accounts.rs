//! Operations on accounts: list, create, change, delete, permissions and passwords.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{
    operation::MAX_ACCOUNTS,
    request::{self, QueryParams},
};
use crate::{
    control_plane::{
        Account, AccountChange, Actor, ControlPlane, NewAccount, Operator, PermissionChange,
        RootRole, TokenPermission,
    },
    http::response::{self, HttpError, HttpResponse},
    protocol::admin::{self as wire, Field, FieldErrors, Rfc3339Millis, RoleRef},
};

/// Lists all accounts or a page of them, and all roles.
pub(super) async fn list(
    control: &ControlPlane,
    operator: &Operator,
    query: &QueryParams<'_>,
) -> Result<HttpResponse, HttpError> {
    let mut problems = FieldErrors::default();
    let after = query.number(&mut problems, "after", 0, u32::MAX).unwrap_or(0);
    let limit = query.number(&mut problems, "limit", 1, MAX_ACCOUNTS).unwrap_or(u32::MAX);
    problems.finish()?;
    let users = control.accounts_after(operator, after.into(), limit).await?;
    let users = users.into_iter().map(account_json).collect();
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
    Ok(response::json_document(&wire::Users { users, root_roles: root_roles.into() }))
}

/// Returns one account.
pub(super) async fn get(
    control: &ControlPlane,
    actor: &Actor,
    id: &str,
) -> Result<HttpResponse, HttpError> {
    account_response(control.account(actor, parse_account_id(id)?).await?)
}

/// Creates an account.
pub(super) async fn create(
    control: &ControlPlane,
    actor: &Actor,
    body: &Bytes,
) -> Result<HttpResponse, HttpError> {
    let request: wire::CreateUser = request::parse_object(body)?;
    let mut problems = FieldErrors::default();
    let may_be_missing = !matches!(request.username, Field::Invalid(_));
    let username = problems.optional("username", request.username).and_then(|it| it.0);
    let name = problems.optional("name", request.name).and_then(|it| it.0).map(|name| name.0);
    let email = problems.optional("email", request.email).and_then(|it| it.0).map(|email| email.0);
    let role = parse_root_role(&mut problems, request.root_role, true);
    let password = problems.required("password", request.password);
    let password = request::new_password(&mut problems, password.as_ref());
    let username = username.map(|name| name.0).or_else(|| email.clone());
    if username.is_none() && may_be_missing {
        problems.add("username", "is missing");
    }
    let new = || {
        let (username, role, password) = (username?, role?, password?);
        Some(NewAccount { username, name, email, role, password })
    };
    let account = control.create_account(actor, problems.into_result(new())?).await?;
    let location = account.id.to_string();
    Ok(response::created(&account_json(account), &location))
}

/// Changes the name, email address, role or password of an account.
pub(super) async fn update(
    control: &ControlPlane,
    actor: &Actor,
    id: &str,
    body: &Bytes,
) -> Result<HttpResponse, HttpError> {
    let request: wire::UpdateUser = request::parse_object(body)?;
    let mut problems = FieldErrors::default();
    let name = problems.optional("name", request.name).map(|it| it.0.map(|name| name.0));
    let email = problems.optional("email", request.email).map(|it| it.0.map(|email| email.0));
    let role = parse_root_role(&mut problems, request.root_role, false);
    let password = problems.optional("password", request.password);
    let password = request::new_password(&mut problems, password.as_ref());
    problems.finish()?;
    let change = AccountChange { name, email, role, password };
    account_response(control.update_account(actor, parse_account_id(id)?, change).await?)
}

/// Deletes an account.
pub(super) async fn delete(
    control: &ControlPlane,
    actor: &Actor,
    id: &str,
) -> Result<HttpResponse, HttpError> {
    control.delete_account(actor, parse_account_id(id)?).await?.ok_or_else(account_not_found)?;
    Ok(response::empty_ok())
}

/// Sets the permissions of an account beyond those of its role.
pub(super) async fn set_permissions(
    control: &ControlPlane,
    actor: &Actor,
    id: &str,
    body: &Bytes,
) -> Result<HttpResponse, HttpError> {
    let request: wire::SetPermissions = request::parse_object(body)?;
    let mut problems = FieldErrors::default();
    let names = problems.required("permissions", request.permissions).unwrap_or_default();
    let mut permissions = BTreeSet::new();
    for name in &names {
        if let Some(granted) = TokenPermission::from_grant_name(&name.0) {
            permissions.extend(granted);
        } else {
            let known = TokenPermission::ALL.map(TokenPermission::as_str).join(", ");
            problems.add("permissions", format!("must be one of {known} or CREATE_API_TOKEN"));
            break;
        }
    }
    problems.finish()?;
    account_response(
        control
            .update_permissions(
                actor,
                parse_account_id(id)?,
                PermissionChange::Replace(permissions),
            )
            .await?,
    )
}

/// Sets a new password for an account.
pub(super) async fn reset_password(
    control: &ControlPlane,
    actor: &Actor,
    id: &str,
    body: &Bytes,
) -> Result<HttpResponse, HttpError> {
    let request: wire::ResetPassword = request::parse_object(body)?;
    let mut problems = FieldErrors::default();
    let password = problems.required("password", request.password);
    let password = request::new_password(&mut problems, password.as_ref());
    let password = problems.into_result(password)?;
    control
        .set_password(actor, parse_account_id(id)?, password)
        .await?
        .ok_or_else(account_not_found)?;
    Ok(response::empty_ok())
}

fn parse_root_role(
    problems: &mut FieldErrors,
    field: Field<RoleRef>,
    required: bool,
) -> Option<RootRole> {
    let requested = if required {
        problems.required("rootRole", field)
    } else {
        problems.optional("rootRole", field)
    };
    let role = match requested? {
        RoleRef::Id(id) => RootRole::from_id(id),
        RoleRef::Name(name) => {
            RootRole::ALL.into_iter().find(|role| role.name().eq_ignore_ascii_case(&name))
        }
    };
    if role.is_none() {
        problems.add("rootRole", "must be 1 (Admin), 2 (Editor) or 3 (Viewer)");
    }
    role
}

/// Parses an account id. A text that is not a number names no account.
fn parse_account_id(id: &str) -> Result<i64, HttpError> {
    id.parse().map_err(|_| account_not_found())
}

fn account_not_found() -> HttpError {
    HttpError::ResourceNotFound("there is no such account".to_owned())
}

fn account_response(account: Option<Account>) -> Result<HttpResponse, HttpError> {
    account
        .map(|account| response::json_document(&account_json(account)))
        .ok_or_else(account_not_found)
}

fn account_json(account: Account) -> wire::User {
    wire::User {
        id: account.id,
        username: account.username,
        name: account.name,
        email: account.email,
        root_role: account.role.id(),
        permissions: account.permissions.into_iter().map(TokenPermission::as_str).collect(),
        created_at: Rfc3339Millis(account.created_at),
        seen_at: account.seen_at.map(Rfc3339Millis),
        is_api: false,
    }
}
