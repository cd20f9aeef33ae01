//! A snapshot of the API tokens, with which SDKs are served if the database is unreachable at a start.
//!
//! It contains digests and no secrets. It permits no changes: accounts, sessions and new tokens need the
//! database. Its storage location is the caller's concern.

use std::borrow::Cow;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    database::of_millis,
    registry::{ApiToken, Held},
};
use crate::token::{Environment, Projects, TokenDigest, TokenKind};

#[derive(Serialize, Deserialize)]
struct Copy<'a> {
    /// The location of the database that the tokens belong to, without user and password.
    #[serde(borrow)]
    location: Cow<'a, str>,
    tokens: Vec<Token>,
}

/// A token without its time of last use. Times are milliseconds since 1970.
#[derive(Serialize, Deserialize)]
struct Token {
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
pub(super) fn write(location: &str, held: &[Held]) -> Vec<u8> {
    let tokens = held.iter().map(|Held { digest, token }| Token {
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
    let copy = Copy { location: location.into(), tokens: tokens.collect() };
    serde_json::to_vec(&copy).expect("tokens are plain data")
}

/// The tokens of a snapshot; `None` if it is malformed or belongs to another database.
pub(super) fn read(location: &str, copy: &[u8]) -> Option<Vec<Held>> {
    let copy: Copy<'_> = serde_json::from_slice(copy).ok()?;
    if copy.location != location {
        return None;
    }
    copy.tokens.into_iter().map(held).collect()
}

fn held(token: Token) -> Option<Held> {
    let digest = TokenDigest::from_hex(&token.digest)?;
    let token = ApiToken {
        id: token.id,
        name: token.name,
        kind: TokenKind::parse(&token.kind)?,
        environment: Environment::new(&token.environment),
        projects: Projects::from_list(token.projects.iter().map(String::as_str)),
        expires_at: token.expires_at.map(of_millis),
        created_at: of_millis(token.created_at),
        created_by: token.created_by,
        seen_at: None,
        masked: token.masked.into(),
    };
    Some(Held { digest, token })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_restored_for_the_same_database_only() {
        let token = ApiToken {
            id: "id".to_owned(),
            name: "checkout".to_owned(),
            kind: TokenKind::Frontend,
            environment: Environment::new("production"),
            projects: Projects::from_list(["web", "shop"]),
            expires_at: Some(of_millis(4_102_444_800_000)),
            created_at: of_millis(1_700_000_000_000),
            created_by: "ann \"a\" é".to_owned(),
            seen_at: None,
            masked: "[]:production.AbCd****".into(),
        };
        let held = [Held { digest: TokenDigest::of("secret"), token }];
        let location = "postgres://one:5432/\"quoted\"";
        let copy = write(location, &held);
        assert_eq!(read(location, &copy).as_deref(), Some(&held[..]));
        assert_eq!(read("postgres://other:5432/flags", &copy), None);
        assert_eq!(read(location, &copy[..copy.len() - 1]), None);
    }
}
