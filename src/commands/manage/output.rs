//! The output of a task, as text or as JSON.

use std::fmt::Write as _;

use jiff::Timestamp;
use serde::{Serialize, Serializer};

use crate::token::Token;

/// The output of a task.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Output {
    /// A token was created. It cannot be shown again.
    CreatedToken {
        #[serde(serialize_with = "expose_secret")]
        secret: Token,
    },
    /// The tokens.
    Tokens(Vec<TokenRow>),
    /// A token was revoked.
    RevokedToken { name: String, masked: String },
    /// An account was created; `password` is set if it was generated.
    CreatedAccount {
        #[serde(flatten)]
        account: AccountRow,
        #[serde(skip_serializing_if = "Option::is_none")]
        password: Option<String>,
    },
    /// The accounts.
    Accounts(Vec<AccountRow>),
    /// The permissions of an account were changed.
    ChangedPermissions(AccountRow),
    /// The password of an account was changed; `password` is set if it was generated.
    NewPassword {
        username: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        password: Option<String>,
    },
}

/// A token in a list.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct TokenRow {
    /// Identifies the token for a revocation: its id or selector, or the masked token.
    pub(super) identifier: String,
    pub(super) name: String,
    pub(super) r#type: String,
    pub(super) environment: String,
    pub(super) projects: Vec<String>,
    pub(super) expires_at: Option<Timestamp>,
    pub(super) last_seen_at: Option<Timestamp>,
}

/// An account in a list.
#[derive(Serialize)]
pub(super) struct AccountRow {
    pub(super) id: i64,
    pub(super) username: String,
    pub(super) role: String,
    pub(super) permissions: Vec<String>,
}

impl Output {
    /// The output as JSON.
    pub(super) fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("the output contains only texts and numbers")
            + "\n"
    }

    /// The output as text.
    pub(super) fn to_text(&self) -> String {
        match self {
            Self::CreatedToken { secret } => format!("{}\n", secret.expose()),
            Self::Tokens(tokens) => table(TOKEN_HEADERS, tokens.iter().map(token_cells)),
            Self::RevokedToken { name, masked } => format!("revoked {name} ({masked})\n"),
            Self::CreatedAccount { account, password } => {
                format!(
                    "created {} ({})\n{}",
                    account.username,
                    account.role,
                    password_line(password.as_ref())
                )
            }
            Self::Accounts(accounts) => table(ACCOUNT_HEADERS, accounts.iter().map(account_cells)),
            Self::ChangedPermissions(account) => {
                format!("{}: {}\n", account.username, permission_list(account))
            }
            Self::NewPassword { username, password } => {
                let shown = password_line(password.as_ref());
                format!("changed the password of {username}; all sessions are ended\n{shown}")
            }
        }
    }
}

fn expose_secret<S: Serializer>(secret: &Token, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(secret.expose())
}

fn password_line(password: Option<&String>) -> String {
    password
        .map_or_else(String::new, |password| format!("password  {password}   (shown only once)\n"))
}

const TOKEN_HEADERS: [&str; 7] =
    ["IDENTIFIER", "NAME", "TYPE", "ENVIRONMENT", "PROJECTS", "EXPIRES", "LAST SEEN"];

fn token_cells(token: &TokenRow) -> [String; 7] {
    let time = |time: Option<Timestamp>, none: &str| {
        time.map_or_else(|| none.to_owned(), |time| time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
    };
    [
        token.identifier.clone(),
        token.name.clone(),
        token.r#type.clone(),
        token.environment.clone(),
        token.projects.join(","),
        time(token.expires_at, "never"),
        time(token.last_seen_at, "-"),
    ]
}

const ACCOUNT_HEADERS: [&str; 4] = ["ID", "USERNAME", "ROLE", "GRANTED"];

fn account_cells(account: &AccountRow) -> [String; 4] {
    let AccountRow { id, username, role, .. } = account;
    [id.to_string(), username.clone(), role.clone(), permission_list(account)]
}

fn permission_list(account: &AccountRow) -> String {
    if account.permissions.is_empty() { "-".to_owned() } else { account.permissions.join(",") }
}

/// Formats rows as aligned columns.
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
