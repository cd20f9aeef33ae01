//! The stored form of the token cache: digests, grants and selectors, but no plaintext tokens.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::token::{Environment, Grant, Projects, Scope, TokenDigest, TokenKind};

const VERSION: u32 = 1;

/// The stored part of the token cache.
#[derive(Debug)]
pub(super) struct SavedCache {
    pub(super) valid: Vec<SavedToken>,
    /// Recently revoked tokens; v2 tokens are in `revoked_selectors`.
    pub(super) revoked: Vec<TokenDigest>,
    pub(super) revoked_selectors: Vec<Box<str>>,
}

/// A valid token without its plaintext.
#[derive(Debug)]
pub(super) struct SavedToken {
    pub(super) digest: TokenDigest,
    pub(super) grant: Arc<Grant>,
    pub(super) masked: Arc<str>,
    pub(super) selector: Option<Box<str>>,
    pub(super) is_listed: bool,
}

/// Why a stored token cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The bytes are not the expected JSON.
    #[error("the saved token cache is malformed")]
    Malformed(#[from] serde_json::Error),
    /// The format has another version.
    #[error("the saved token cache has format version {0}, not {VERSION}")]
    Version(u32),
}

#[derive(Deserialize, Serialize)]
struct Record {
    version: u32,
    verdicts: Vec<SavedTokenRecord>,
    #[serde(default)]
    revoked: Vec<String>,
    /// A release that does not read this field validates such a token again, and upstream itself
    /// rejects it one minute after the revocation.
    #[serde(default)]
    revoked_selectors: Vec<Box<str>>,
}

#[derive(Deserialize, Serialize)]
struct SavedTokenRecord {
    digest: String,
    kind: String,
    environment: String,
    projects: Vec<String>,
    masked: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    selector: Option<Box<str>>,
    #[serde(default)]
    listed: bool,
}

impl SavedCache {
    pub(super) fn to_json(&self) -> Vec<u8> {
        let record = Record {
            version: VERSION,
            verdicts: self.valid.iter().map(SavedTokenRecord::of).collect(),
            revoked: self.revoked.iter().map(TokenDigest::to_hex).collect(),
            revoked_selectors: self.revoked_selectors.clone(),
        };
        serde_json::to_vec(&record).expect("the token cache is plain text and numbers")
    }

    /// Parses the output of [`SavedCache::to_json`]. Unreadable items are skipped, so that their tokens
    /// are validated again.
    pub(super) fn parse(json: &[u8]) -> Result<Self, RestoreError> {
        let record: Record = serde_json::from_slice(json)?;
        if record.version != VERSION {
            return Err(RestoreError::Version(record.version));
        }
        let digests = record.revoked.iter().filter_map(|hex| TokenDigest::from_hex(hex));
        Ok(Self {
            revoked: digests.collect(),
            valid: record.verdicts.into_iter().filter_map(SavedTokenRecord::into_saved).collect(),
            revoked_selectors: record.revoked_selectors,
        })
    }
}

impl SavedTokenRecord {
    fn of(saved: &SavedToken) -> Self {
        let scope = &saved.grant.scope;
        Self {
            digest: saved.digest.to_hex(),
            kind: saved.grant.kind.as_str().to_owned(),
            environment: scope.environment.as_str().to_owned(),
            projects: scope.projects.to_list().into_iter().map(str::to_owned).collect(),
            masked: saved.masked.as_ref().to_owned(),
            selector: saved.selector.clone(),
            listed: saved.is_listed,
        }
    }

    fn into_saved(self) -> Option<SavedToken> {
        let scope = Scope {
            environment: Environment::new(&self.environment),
            projects: Projects::from_list(self.projects.iter().map(String::as_str)),
        };
        Some(SavedToken {
            digest: TokenDigest::from_hex(&self.digest)?,
            grant: Arc::new(Grant { kind: TokenKind::parse(&self.kind)?, scope }),
            masked: self.masked.into(),
            selector: self.selector,
            is_listed: self.listed,
        })
    }
}
