//! A snapshot of the API tokens, with which SDKs are served if the database is unreachable at a start.
//!
//! It contains digests and no secrets. It permits no changes: accounts, sessions and new tokens need the
//! database. Its storage location is the caller's concern.

use std::borrow::Cow;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    database::timestamp_from_millis,
    registered_token::{RegisteredToken, TokenMetadata},
};
use crate::token::{Environment, Projects, TokenDigest, TokenKind};

#[derive(Serialize, Deserialize)]
struct TokenSnapshot<'a> {
    /// The location of the database that the tokens belong to, without user and password.
    #[serde(borrow)]
    location: Cow<'a, str>,
    tokens: Vec<TokenRecord>,
}

/// A token without its time of last use. Times are milliseconds since 1970.
#[derive(Serialize, Deserialize)]
struct TokenRecord {
    id: String,
    digest: String,
    name: String,
    kind: String,
    environment: String,
    projects: Vec<String>,
    masked: String,
    expires_at: Option<i64>,
    created_at: i64,
    created_by: String,
}

/// Serializes the tokens of the database at `location`.
pub(super) fn serialize(location: &str, held: &[RegisteredToken]) -> Vec<u8> {
    let tokens = held.iter().map(|RegisteredToken { digest, token }| TokenRecord {
        id: token.id.clone(),
        digest: digest.to_hex(),
        name: token.name.clone(),
        kind: token.kind.as_str().to_owned(),
        environment: token.environment.as_str().to_owned(),
        projects: token.projects.to_list().into_iter().map(str::to_owned).collect(),
        masked: token.masked.to_string(),
        expires_at: token.expires_at.map(Timestamp::as_millisecond),
        created_at: token.created_at.as_millisecond(),
        created_by: token.created_by.clone(),
    });
    let copy = TokenSnapshot { location: location.into(), tokens: tokens.collect() };
    serde_json::to_vec(&copy).expect("tokens are plain data")
}

/// The tokens of a snapshot; `None` if it is malformed or belongs to another database.
pub(super) fn parse(location: &str, copy: &[u8]) -> Option<Vec<RegisteredToken>> {
    let copy: TokenSnapshot<'_> = serde_json::from_slice(copy).ok()?;
    if copy.location != location {
        return None;
    }
    copy.tokens.into_iter().map(registered_token).collect()
}

fn registered_token(token: TokenRecord) -> Option<RegisteredToken> {
    let digest = TokenDigest::from_hex(&token.digest)?;
    let token = TokenMetadata {
        id: token.id,
        name: token.name,
        kind: TokenKind::parse(&token.kind)?,
        environment: Environment::new(&token.environment),
        projects: Projects::from_list(token.projects.iter().map(String::as_str)),
        expires_at: token.expires_at.map(timestamp_from_millis),
        created_at: timestamp_from_millis(token.created_at),
        created_by: token.created_by,
        seen_at: None,
        masked: token.masked.into(),
    };
    Some(RegisteredToken { digest, token })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_restored_for_the_same_database_only() {
        let token = TokenMetadata {
            id: "id".to_owned(),
            name: "checkout".to_owned(),
            kind: TokenKind::Frontend,
            environment: Environment::new("production"),
            projects: Projects::from_list(["web", "shop"]),
            expires_at: Some(timestamp_from_millis(4_102_444_800_000)),
            created_at: timestamp_from_millis(1_700_000_000_000),
            created_by: "ann \"a\" é".to_owned(),
            seen_at: None,
            masked: "[]:production.AbCd****".into(),
        };
        let held = [RegisteredToken { digest: TokenDigest::of("secret"), token }];
        let location = "postgres://one:5432/\"quoted\"";
        let copy = serialize(location, &held);
        assert_eq!(parse(location, &copy).as_deref(), Some(&held[..]));
        assert_eq!(parse("postgres://other:5432/flags", &copy), None);
        assert_eq!(parse(location, &copy[..copy.len() - 1]), None);
    }
}
