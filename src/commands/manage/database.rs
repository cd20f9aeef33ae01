//! Runs tasks on the database of a standalone instance, which may be running.
//!
//! A running instance applies changes within a second. Access to the database implies all permissions;
//! the audit log names the command line as the author.

use super::{
    error::Error,
    output::{AccountRow, Output, TokenRow},
    secret_input::{read_first_line, read_password},
};
use crate::{
    config::ManageTask,
    control_plane::{
        Account, Actor, ControlPlane, DatabaseLocation, NewAccount, NewToken, Operator,
        PermissionChange, TokenMetadata, TokenPermission,
    },
    token::{Environment, Projects, TokenKind},
};

/// Runs a task.
pub(super) async fn run(location: DatabaseLocation, task: ManageTask) -> Result<Output, Error> {
    let control = ControlPlane::open_existing(location).await?;
    let actor = Actor { operator: Operator::CommandLine, address: None };
    match task {
        ManageTask::CreateToken { name, kind, environment, projects, expires_at } => {
            let all = projects.is_empty() || kind == TokenKind::Admin;
            let new = NewToken {
                name,
                kind,
                environment: Environment::new(match kind {
                    TokenKind::Admin => "*",
                    TokenKind::Client | TokenKind::Frontend => &environment,
                }),
                projects: if all {
                    Projects::All
                } else {
                    Projects::from_list(projects.iter().map(String::as_str))
                },
                expires_at,
            };
            let (secret, _) = control.create_token(&actor, new).await?;
            Ok(Output::CreatedToken { secret })
        }
        ManageTask::ListTokens { name } => {
            let all = control.tokens(&actor.operator).into_iter();
            let matching = all.filter(|token| name.as_ref().is_none_or(|name| token.name == *name));
            Ok(Output::Tokens(matching.map(token_row).collect()))
        }
        ManageTask::RevokeToken { identifier } => {
            let identifier = match identifier {
                Some(identifier) => identifier,
                None => read_first_line("-")?,
            };
            let deleted =
                control.delete_token(&actor, &identifier).await?.ok_or(Error::TokenNotFound)?;
            Ok(Output::RevokedToken { name: deleted.name, masked: deleted.masked.to_string() })
        }
        ManageTask::AddAccount { username, role, name, email, password } => {
            let (password, shown) = read_password(password)?;
            let new = NewAccount { username, name, email, role, password };
            let account = control.create_account(&actor, new).await?;
            Ok(Output::CreatedAccount { account: account_row(account), password: shown })
        }
        ManageTask::ListAccounts => {
            let accounts = control.accounts(&actor.operator).await?;
            Ok(Output::Accounts(accounts.into_iter().map(account_row).collect()))
        }
        ManageTask::Grant { username, permissions, revoke } => {
            let account = find_account(&control, &actor, username).await?;
            let permissions = permissions.into_iter().collect();
            let change = if revoke {
                PermissionChange::Remove(permissions)
            } else {
                PermissionChange::Add(permissions)
            };
            let changed = control.update_permissions(&actor, account.id, change).await?;
            let account = changed.ok_or(Error::AccountNotFound(account.username))?;
            Ok(Output::ChangedPermissions(account_row(account)))
        }
        ManageTask::SetPassword { username, password } => {
            let account = find_account(&control, &actor, username).await?;
            let (password, shown) = read_password(password)?;
            control.set_password(&actor, account.id, password).await?;
            Ok(Output::NewPassword { username: account.username, password: shown })
        }
    }
}

async fn find_account(
    control: &ControlPlane,
    actor: &Actor,
    username: String,
) -> Result<Account, Error> {
    let accounts = control.accounts(&actor.operator).await?;
    let key = username.to_lowercase();
    let mut found = accounts.into_iter().filter(|it| it.username.to_lowercase() == key);
    found.next().ok_or(Error::AccountNotFound(username))
}

fn token_row(token: TokenMetadata) -> TokenRow {
    TokenRow {
        identifier: token.id,
        name: token.name,
        r#type: token.kind.as_str().to_owned(),
        environment: token.environment.as_str().to_owned(),
        projects: token.projects.to_list().into_iter().map(str::to_owned).collect(),
        expires_at: token.expires_at,
        last_seen_at: token.seen_at,
    }
}

fn account_row(account: Account) -> AccountRow {
    AccountRow {
        id: account.id,
        role: account.role.name().to_owned(),
        permissions: account
            .permissions
            .iter()
            .map(|it| TokenPermission::as_str(*it).to_owned())
            .collect(),
        username: account.username,
    }
}
