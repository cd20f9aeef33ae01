//! `parapet token` and `parapet account`: the control plane from a shell.
//!
//! A running instance takes up what is changed within a second. Whoever may write the database may
//! do everything; the audit log says that it was the command line.

use std::{
    fmt::Write as _,
    io::{self, Read as _},
};

use crate::{
    config::{Manage, PasswordSource, Task},
    control::{
        Account, Actor, ApiToken, Control, Error as Failed, NewAccount, NewToken, Operator,
        Password, PasswordError, Permission,
    },
    token::{Environment, Projects, TokenKind},
};

/// Why a task was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The control plane refused, or failed.
    #[error(transparent)]
    Control(#[from] Failed),
    /// A file, or the standard input, cannot be read.
    #[error("cannot read {0}")]
    Read(String, #[source] io::Error),
    /// What was read is no password.
    #[error(transparent)]
    Password(#[from] PasswordError),
    /// There is nobody of that name.
    #[error("there is no account `{0}`")]
    NoAccount(String),
    /// There is no such token.
    #[error("there is no such token")]
    NoToken,
}

/// Does a task; what it gives is to be printed.
pub async fn run(asked: Manage) -> Result<String, Error> {
    let control = Control::attach(asked.location).await?;
    let actor = Actor { operator: Operator::Shell, address: None };
    match asked.task {
        Task::CreateToken { name, kind, environment, projects, expires_at } => {
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
            Ok(format!("{}\n", secret.expose()))
        }
        Task::ListTokens { name } => {
            let all = control.tokens(&actor.operator).into_iter();
            let wanted = all.filter(|token| name.as_ref().is_none_or(|name| token.name == *name));
            Ok(table(HEADS_OF_TOKENS, wanted.map(|token| row_of_token(&token))))
        }
        Task::RevokeToken { identifier } => {
            let identifier = match identifier {
                Some(identifier) => identifier,
                None => first_line("-")?,
            };
            let gone = control.delete_token(&actor, &identifier).await?.ok_or(Error::NoToken)?;
            Ok(format!("revoked {} ({})\n", gone.name, gone.masked))
        }
        Task::AddAccount { username, role, name, email, password } => {
            let (password, shown) = password_of(password)?;
            let new = NewAccount { username, name, email, role, password };
            let account = control.create_account(&actor, new).await?;
            Ok(format!("created {} ({})\n{shown}", account.username, account.role.name()))
        }
        Task::ListAccounts => {
            let accounts = control.accounts(&actor.operator).await?;
            Ok(table(HEADS_OF_ACCOUNTS, accounts.iter().map(row_of_account)))
        }
        Task::Grant { username, permissions, revoke } => {
            let account = find(&control, &actor, username).await?;
            let mut granted = account.permissions;
            for permission in permissions {
                if revoke {
                    granted.remove(&permission);
                } else {
                    granted.insert(permission);
                }
            }
            let changed = control.set_permissions(&actor, account.id, granted).await?;
            let account = changed.ok_or(Error::NoAccount(account.username))?;
            Ok(format!("{}: {}\n", account.username, names(&account)))
        }
        Task::SetPassword { username, password } => {
            let account = find(&control, &actor, username).await?;
            let (password, shown) = password_of(password)?;
            control.set_password(&actor, account.id, password).await?;
            Ok(format!("{} has a new password, and no open session\n{shown}", account.username))
        }
    }
}

async fn find(control: &Control, actor: &Actor, username: String) -> Result<Account, Error> {
    let accounts = control.accounts(&actor.operator).await?;
    let wanted = username.to_lowercase();
    let mut found = accounts.into_iter().filter(|it| it.username.to_lowercase() == wanted);
    found.next().ok_or(Error::NoAccount(username))
}

/// A password, and what to print of it.
fn password_of(source: PasswordSource) -> Result<(Password, String), Error> {
    Ok(match source {
        PasswordSource::Generated => {
            let password = Password::generate();
            let shown = format!("password  {}   (shown only now)\n", password.expose());
            (password, shown)
        }
        PasswordSource::File(path) => (Password::parse(&first_line(&path)?)?, String::new()),
    })
}

/// The first line of a file; of the standard input where the path is `-`.
fn first_line(path: &str) -> Result<String, Error> {
    let mut text = String::new();
    let read = match path {
        "-" => io::stdin().lock().take(64 << 10).read_to_string(&mut text).map(drop),
        path => std::fs::read_to_string(path).map(|read| text = read),
    };
    read.map_err(|error| {
        Error::Read(if path == "-" { "the standard input" } else { path }.to_owned(), error)
    })?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

const HEADS_OF_TOKENS: [&str; 7] =
    ["IDENTIFIER", "NAME", "TYPE", "ENVIRONMENT", "PROJECTS", "EXPIRES", "LAST SEEN"];

fn row_of_token(token: &ApiToken) -> [String; 7] {
    let time = |time: Option<jiff::Timestamp>, none: &str| {
        time.map_or_else(|| none.to_owned(), |time| time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
    };
    [
        token.id.clone(),
        token.name.clone(),
        token.kind.as_str().to_owned(),
        token.environment.as_str().to_owned(),
        token.projects.to_list().join(","),
        time(token.expires_at, "never"),
        time(token.seen_at, "-"),
    ]
}

const HEADS_OF_ACCOUNTS: [&str; 4] = ["ID", "USERNAME", "ROLE", "GRANTED"];

fn row_of_account(account: &Account) -> [String; 4] {
    let role = account.role.name().to_owned();
    [account.id.to_string(), account.username.clone(), role, names(account)]
}

fn names(account: &Account) -> String {
    let names: Vec<_> = account.permissions.iter().map(|it| Permission::as_str(*it)).collect();
    if names.is_empty() { "-".to_owned() } else { names.join(",") }
}

/// Columns as wide as their widest text.
fn table<const N: usize>(heads: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<_> = std::iter::once(heads.map(str::to_owned)).chain(rows).collect();
    let widths: [usize; N] = std::array::from_fn(|at| {
        rows.iter().map(|row| row[at].chars().count()).max().unwrap_or_default()
    });
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        writeln!(text, "{}", line.trim_end()).expect("writing to a string cannot fail");
    }
    text
}
