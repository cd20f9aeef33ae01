//! The stored form of the token cache: digests, grants and selectors, but no plaintext tokens.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{cached_token::CachedToken, token_id::TokenId};
use crate::token::{Environment, Grant, Projects, Scope, TokenDigest, TokenKind};

const VERSION: u32 = 1;

/// The stored part of the token cache.
#[derive(Debug)]
pub(super) struct SavedCache {
    pub(super) valid: Vec<(TokenDigest, Arc<CachedToken>)>,
    /// Recently revoked tokens.
    pub(super) revoked: Vec<TokenId>,
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
    verdicts: Vec<TokenRecord>,
    #[serde(default)]
    revoked: Vec<String>,
    /// A release that does not read this field validates such a token again, and upstream itself
    /// rejects it one minute after the revocation.
    #[serde(default)]
    revoked_selectors: Vec<Box<str>>,
}

/// A valid token without its plaintext.
#[derive(Deserialize, Serialize)]
struct TokenRecord {
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
        let mut record = Record {
            version: VERSION,
            verdicts: self.valid.iter().map(|(digest, it)| TokenRecord::of(digest, it)).collect(),
            revoked: Vec::new(),
            revoked_selectors: Vec::new(),
        };
        for id in &self.revoked {
            match id {
                TokenId::Selector(selector) => record.revoked_selectors.push(selector.clone()),
                TokenId::Digest(digest) => record.revoked.push(digest.to_hex()),
            }
        }
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
        let selectors = record.revoked_selectors.into_iter().map(TokenId::Selector);
        Ok(Self {
            valid: record.verdicts.into_iter().filter_map(TokenRecord::into_cached).collect(),
            revoked: digests.map(TokenId::Digest).chain(selectors).collect(),
        })
    }
}

impl TokenRecord {
    fn of(digest: &TokenDigest, cached: &CachedToken) -> Self {
        let Grant { kind, scope } = &**cached.grant();
        Self {
            digest: digest.to_hex(),
            kind: kind.as_str().to_owned(),
            environment: scope.environment.as_str().to_owned(),
            projects: scope.projects.to_list().into_iter().map(str::to_owned).collect(),
            masked: cached.masked().to_owned(),
            selector: cached.id().selector().map(Into::into),
            listed: cached.is_listed(),
        }
    }

    fn into_cached(self) -> Option<(TokenDigest, Arc<CachedToken>)> {
        let scope = Scope {
            environment: Environment::new(&self.environment),
            projects: Projects::from_list(self.projects.iter().map(String::as_str)),
        };
        let digest = TokenDigest::from_hex(&self.digest)?;
        let grant = Arc::new(Grant { kind: TokenKind::parse(&self.kind)?, scope });
        let id = TokenId::new(digest, self.selector.as_deref());
        let cached = CachedToken::unconfirmed(grant, self.masked.into(), id, self.listed);
        Some((digest, Arc::new(cached)))
    }
}
