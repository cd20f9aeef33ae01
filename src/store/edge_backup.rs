//! Reads the backup files of Unleash Edge, so that a deployment can switch over while upstream is
//! unavailable.
//!
//! It never writes them: Edge stores plaintext tokens there, and Parapet stores none.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::value::RawValue;
use zeroize::Zeroizing;

use crate::{
    protocol::{
        byte_order_mark::without_byte_order_mark, lenient::readable_items, tokens::ValidatedToken,
    },
    token::{Environment, Grant, Token},
};

/// Why a backup file of Unleash Edge cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("{} cannot be read", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It has an unexpected format. The error does not quote it, because it contains tokens.
    #[error("{} is not a backup of Unleash Edge (line {line}, column {column})", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// The line where parsing stopped.
        line: usize,
        /// The column where parsing stopped.
        column: usize,
    },
}

/// The valid tokens of `unleash_tokens.json` in `folder`; none if the file does not exist.
///
/// Skips unreadable tokens and those that Edge found invalid.
pub async fn load_tokens(folder: &Path) -> Result<Vec<(Token, Grant)>, Error> {
    #[derive(Deserialize)]
    #[serde(transparent)]
    struct Tokens {
        #[serde(deserialize_with = "readable_items")]
        tokens: Vec<ValidatedToken>,
    }
    let file = folder.join("unleash_tokens.json");
    let Some(json) = read_if_exists(&file).await? else { return Ok(Vec::new()) };
    let Tokens { tokens } = serde_json::from_slice(without_byte_order_mark(&json))
        .map_err(|error| malformed_error(file, &error))?;
    Ok(tokens.into_iter().map(|it| (it.token, it.grant)).collect())
}

/// The flags of `unleash_features.json` in `folder`, by environment, as written by Edge.
pub async fn load_features(folder: &Path) -> Result<Vec<(Environment, Box<RawValue>)>, Error> {
    let file = folder.join("unleash_features.json");
    let Some(json) = read_if_exists(&file).await? else { return Ok(Vec::new()) };
    let flags: Vec<(String, Box<RawValue>)> =
        serde_json::from_slice(without_byte_order_mark(&json))
            .map_err(|error| malformed_error(file, &error))?;
    Ok(flags.into_iter().map(|(name, flags)| (Environment::new(&name), flags)).collect())
}

async fn read_if_exists(file: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, Error> {
    match tokio::fs::read(file).await {
        Ok(json) => Ok(Some(Zeroizing::new(json))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read { file: file.to_owned(), source }),
    }
}

fn malformed_error(file: PathBuf, error: &serde_json::Error) -> Error {
    Error::Malformed { file, line: error.line(), column: error.column() }
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

    #[tokio::test]
    async fn missing_backup_is_empty() {
        let folder = tempfile::tempdir().expect("folder");
        assert!(load_tokens(folder.path()).await.expect("tokens").is_empty());
        assert!(load_features(folder.path()).await.expect("features").is_empty());
    }

    #[tokio::test]
    async fn only_valid_tokens_are_loaded() {
        let folder = tempfile::tempdir().expect("folder");
        fs::write(folder.path().join("unleash_tokens.json"), TOKENS).expect("write");
        let read = load_tokens(folder.path()).await.expect("tokens");
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
        let read = load_features(folder.path()).await.expect("features");
        let [(environment, json)] = read.as_slice() else { panic!("{read:?}") };
        assert_eq!((environment.as_str(), json.get()), ("development", flags));
    }

    #[tokio::test]
    async fn error_in_a_malformed_backup_does_not_quote_tokens() {
        let folder = tempfile::tempdir().expect("folder");
        let json = "{\"token\":\n\"*:development.964a287e1b728cb5\"}";
        fs::write(folder.path().join("unleash_tokens.json"), json).expect("write");
        let error = load_tokens(folder.path()).await.expect_err("no list");
        let text = format!("{error} {error:?}");
        assert!(text.contains("unleash_tokens.json") && !text.contains("964a"), "{text}");
    }
}
