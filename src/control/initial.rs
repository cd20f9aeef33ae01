//! What the first start was given, kept as digests: a later start tells from them that a setting was
//! changed, which has no effect any more.
//!
//! Nothing here decides what to do about it.

use sha2::{Digest as _, Sha256};
use sqlx::Row as _;

use super::{database::Connection, error::Error, first_start::Seed, secret::base64url};

/// A setting that only the first start heeds.
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

/// The digest that is kept of a setting, if any.
pub(super) async fn find(
    connection: &mut Connection,
    setting: InitialSetting,
) -> Result<Option<String>, Error> {
    let kept = sqlx::query("SELECT digest FROM initial_settings WHERE name = $1");
    let kept = kept.bind(setting.name()).fetch_optional(connection).await?;
    Ok(kept.map(|row| row.try_get("digest")).transpose()?)
}

/// Keeps the digest of a setting, in place of an earlier one.
pub(super) async fn keep(
    transaction: &mut Connection,
    setting: InitialSetting,
    digest: &str,
) -> Result<(), Error> {
    let keep = sqlx::query(
        "INSERT INTO initial_settings (name, digest) VALUES ($1, $2) \
         ON CONFLICT (name) DO UPDATE SET digest = excluded.digest",
    );
    keep.bind(setting.name()).bind(digest).execute(transaction).await?;
    Ok(())
}

/// The digest of tokens, in whichever order they are given.
pub(super) fn digest_of(seed: &Seed) -> String {
    let mut lines: Vec<String> = seed
        .all()
        .map(|(kind, token)| format!("{} {}\n", kind.as_str(), token.digest().hex()))
        .collect();
    lines.sort_unstable();
    lines.dedup();
    base64url(&Sha256::digest(lines.concat()))
}
