//! Reads the backup of Unleash Edge, so that a deployment can switch over while upstream is unavailable.
//!
//! It never writes one: Edge stores plaintext tokens there, and Parapet stores none. Version 20.1.0 keeps
//! two JSON documents: a list of tokens, and a list of pairs of environment and flags.
//!
//! | place | names |
//! |---|---|
//! | folder | `unleash_tokens.json`, `unleash_features.json` |
//! | Redis | strings `unleash-tokens`, `unleash-features`, without a prefix |
//! | S3 | `/unleash-tokens.json`, `/unleash-features.json`; the slash is part of the name |

use std::{io, path::PathBuf};

use serde::Deserialize;
use serde_json::value::RawValue;
use zeroize::Zeroizing;

use super::{
    object_storage::{Bucket, Cloud, ObjectStorage},
    record::MAX_RECORD_LEN,
};
use crate::{
    protocol::{
        byte_order_mark::without_byte_order_mark, lenient::readable_items, tokens::ValidatedToken,
    },
    redis_client::RedisClient,
    token::{Environment, Grant, Token},
};

/// Where Unleash Edge may have left a backup.
#[derive(Clone, Debug)]
pub enum EdgeBackup {
    /// In a folder.
    Folder(PathBuf),
    /// In Redis.
    Redis(RedisClient),
    /// In a bucket. Edge knows only S3.
    Bucket(Bucket),
}

/// Why a backup of Unleash Edge cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("{place} cannot be read")]
    Read {
        /// Where it is.
        place: String,
        /// The cause.
        source: io::Error,
    },
    /// It has an unexpected format. The error does not quote it, because it contains tokens.
    #[error("{place} is not a backup of Unleash Edge (line {line}, column {column})")]
    Malformed {
        /// Where it is.
        place: String,
        /// The line where parsing stopped.
        line: usize,
        /// The column where parsing stopped.
        column: usize,
    },
}

/// A document of a backup.
#[derive(Clone, Copy)]
enum Document {
    Tokens,
    Features,
}

/// The valid tokens of a backup; none if there is no backup.
///
/// Skips unreadable tokens and those that Edge found invalid.
pub async fn load_tokens(backup: &EdgeBackup) -> Result<Vec<(Token, Grant)>, Error> {
    #[derive(Deserialize)]
    #[serde(transparent)]
    struct Tokens {
        #[serde(deserialize_with = "readable_items")]
        tokens: Vec<ValidatedToken>,
    }
    let Some(json) = backup.read(Document::Tokens).await? else { return Ok(Vec::new()) };
    let Tokens { tokens } = serde_json::from_slice(without_byte_order_mark(&json))
        .map_err(|error| malformed_error(backup.place(Document::Tokens), &error))?;
    Ok(tokens.into_iter().map(|it| (it.token, it.grant)).collect())
}

/// The flags of a backup by environment, as written by Edge.
pub async fn load_features(
    backup: &EdgeBackup,
) -> Result<Vec<(Environment, Box<RawValue>)>, Error> {
    let Some(json) = backup.read(Document::Features).await? else { return Ok(Vec::new()) };
    let flags: Vec<(String, Box<RawValue>)> =
        serde_json::from_slice(without_byte_order_mark(&json))
            .map_err(|error| malformed_error(backup.place(Document::Features), &error))?;
    Ok(flags.into_iter().map(|(name, flags)| (Environment::new(&name), flags)).collect())
}

impl EdgeBackup {
    /// The name of a document.
    const fn name(&self, document: Document) -> &'static str {
        match (self, document) {
            (Self::Folder(_), Document::Tokens) => "unleash_tokens.json",
            (Self::Folder(_), Document::Features) => "unleash_features.json",
            (Self::Redis(_), Document::Tokens) => "unleash-tokens",
            (Self::Redis(_), Document::Features) => "unleash-features",
            (Self::Bucket(_), Document::Tokens) => "unleash-tokens.json",
            (Self::Bucket(_), Document::Features) => "unleash-features.json",
        }
    }

    /// Where a document is, as errors name it.
    fn place(&self, document: Document) -> String {
        let name = self.name(document);
        match self {
            Self::Folder(folder) => folder.join(name).display().to_string(),
            Self::Redis(client) => format!("{} {name}", client.location()),
            Self::Bucket(bucket) => format!("{bucket}//{name}"),
        }
    }

    /// A document; `None` if it does not exist.
    async fn read(&self, document: Document) -> Result<Option<Zeroizing<Vec<u8>>>, Error> {
        let failed = |source| Error::Read { place: self.place(document), source };
        let name = self.name(document);
        let found = match self {
            Self::Folder(folder) => match tokio::fs::read(folder.join(name)).await {
                Ok(json) => Some(json),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(failed(error)),
            },
            Self::Redis(client) => {
                // Bounded; a longer document would be cut, and malformed. A missing one is empty.
                let mut get = redis::cmd("GETRANGE");
                get.arg(name).arg(0).arg(MAX_RECORD_LEN);
                match client.run::<Vec<u8>>(&get).await {
                    Ok(json) => (!json.is_empty()).then_some(json),
                    // A user for Parapet's own keys only.
                    Err(error) if error.is_permission_denied() => None,
                    Err(error) => return Err(failed(io::Error::other(error))),
                }
            }
            Self::Bucket(Bucket { cloud: Cloud::Gcs | Cloud::Azure, .. }) => None,
            Self::Bucket(bucket) => {
                let storage = ObjectStorage::with_leading_slash(bucket)
                    .map_err(|error| failed(io::Error::other(error)))?;
                let found = storage.get(name).await;
                let found = found.map_err(|failure| failed(failure.into_cause()))?;
                found.map(|(json, _)| json.into())
            }
        };
        Ok(found.map(Zeroizing::new))
    }
}

fn malformed_error(place: String, error: &serde_json::Error) -> Error {
    Error::Malformed { place, line: error.line(), column: error.column() }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::token::TokenKind;

    const TOKENS: &str = r#"[
        {"token":"*:development.964a287e1b728cb5","type":"client","environment":"development",
         "projects":["*"],"status":"Validated"},
        {"token":"[]:production.aaaabbbbccccdddd","type":"frontend","environment":"production",
         "projects":["a","b"],"status":"Validated"},
        {"token":"*:production.eeeeffff00001111","type":"client","environment":"production",
         "projects":["*"],"status":"Invalid"},
        {"token":"x:production.eeeeffff00001112","type":null,"environment":"production",
         "projects":["x"],"status":"Unknown"}
    ]"#;

    fn backup_in(folder: &tempfile::TempDir) -> EdgeBackup {
        EdgeBackup::Folder(folder.path().to_owned())
    }

    #[tokio::test]
    async fn missing_backup_is_empty() {
        let folder = tempfile::tempdir().expect("folder");
        assert!(load_tokens(&backup_in(&folder)).await.expect("tokens").is_empty());
        assert!(load_features(&backup_in(&folder)).await.expect("features").is_empty());
    }

    #[tokio::test]
    async fn only_valid_tokens_are_loaded() {
        let folder = tempfile::tempdir().expect("folder");
        fs::write(folder.path().join("unleash_tokens.json"), TOKENS).expect("write");
        let read = load_tokens(&backup_in(&folder)).await.expect("tokens");
        let read: Vec<_> = read
            .iter()
            .map(|(_, grant)| {
                (grant.kind, grant.scope.environment.as_str(), grant.scope.projects.to_list())
            })
            .collect();
        assert_eq!(
            read,
            [
                (TokenKind::Client, "development", vec!["*"]),
                (TokenKind::Frontend, "production", vec!["a", "b"]),
            ]
        );
    }

    #[tokio::test]
    async fn flags_are_returned_as_written() {
        let folder = tempfile::tempdir().expect("folder");
        let flags = r#"{"version":2,"features":[], "new":1}"#;
        let json = format!(r#"[["development",{flags}]]"#);
        fs::write(folder.path().join("unleash_features.json"), json).expect("write");
        let read = load_features(&backup_in(&folder)).await.expect("features");
        let [(environment, json)] = read.as_slice() else { panic!("{read:?}") };
        assert_eq!((environment.as_str(), json.get()), ("development", flags));
    }

    #[tokio::test]
    async fn error_in_a_malformed_backup_does_not_quote_tokens() {
        let folder = tempfile::tempdir().expect("folder");
        let json = "{\"token\":\n\"*:development.964a287e1b728cb5\"}";
        fs::write(folder.path().join("unleash_tokens.json"), json).expect("write");
        let error = load_tokens(&backup_in(&folder)).await.expect_err("no list");
        let text = format!("{error} {error:?}");
        assert!(text.contains("unleash_tokens.json") && !text.contains("964a"), "{text}");
    }
}
