//! The tokens of the first start, and digests of its settings. With them a later start detects that such a
//! setting was changed, which has no effect.
//!
//! The caller decides whether to warn about it.

use sha2::{Digest as _, Sha256};
use sqlx::Row as _;

use super::{cookie_token::base64url, database::Connection, error::Error};
use crate::token::{Token, TokenKind};

/// Tokens to create in an empty registry.
#[derive(Clone, Debug, Default)]
pub struct InitialTokens {
    /// For the admin API.
    pub admin: Vec<Token>,
    /// For server SDKs.
    pub client: Vec<Token>,
    /// For frontend SDKs.
    pub frontend: Vec<Token>,
}

impl InitialTokens {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    /// Each token with its kind.
    pub(super) fn iter(&self) -> impl Iterator<Item = (TokenKind, &Token)> {
        let kinds = [
            (TokenKind::Admin, &self.admin),
            (TokenKind::Client, &self.client),
            (TokenKind::Frontend, &self.frontend),
        ];
        kinds.into_iter().flat_map(|(kind, tokens)| tokens.iter().map(move |it| (kind, it)))
    }
}

/// A setting that only the first start uses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum InitialSetting {
    /// The tokens of the registry.
    Tokens,
    /// The password of the first account.
    Password,
}

impl InitialSetting {
    fn name(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Password => "password",
        }
    }
}

/// The stored digest of a setting, if any.
pub(super) async fn find(
    connection: &mut Connection,
    setting: InitialSetting,
) -> Result<Option<String>, Error> {
    let row = sqlx::query("SELECT digest FROM initial_settings WHERE name = $1");
    let row = row.bind(setting.name()).fetch_optional(connection).await?;
    Ok(row.map(|row| row.try_get("digest")).transpose()?)
}

/// Stores the digest of a setting, replacing an earlier one.
pub(super) async fn store(
    transaction: &mut Connection,
    setting: InitialSetting,
    digest: &str,
) -> Result<(), Error> {
    let upsert = sqlx::query(
        "INSERT INTO initial_settings (name, digest) VALUES ($1, $2) \
         ON CONFLICT (name) DO UPDATE SET digest = excluded.digest",
    );
    upsert.bind(setting.name()).bind(digest).execute(transaction).await?;
    Ok(())
}

/// The digest of tokens, independent of their order.
pub(super) fn tokens_digest(seed: &InitialTokens) -> String {
    let mut lines: Vec<String> = seed
        .iter()
        .map(|(kind, token)| format!("{} {}\n", kind.as_str(), token.digest().to_hex()))
        .collect();
    lines.sort_unstable();
    lines.dedup();
    base64url(&Sha256::digest(lines.concat()))
}
