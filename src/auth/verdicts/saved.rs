//! The saved form of verdicts: digests, grants and selectors; never a token.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::token::{Environment, Grant, Projects, Scope, TokenDigest, TokenKind};

const VERSION: u32 = 1;

/// What is saved.
#[derive(Debug)]
pub(super) struct SavedVerdicts {
    pub(super) valid: Vec<Saved>,
    /// Tokens that their issuer took back not long ago; v2 tokens by their selectors.
    pub(super) revoked: Vec<TokenDigest>,
    pub(super) revoked_selectors: Vec<Box<str>>,
}

/// What is saved of a valid token.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) digest: TokenDigest,
    pub(super) grant: Arc<Grant>,
    pub(super) masked: Arc<str>,
    pub(super) selector: Option<Box<str>>,
    pub(super) is_listed: bool,
}

/// Why saved verdicts cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Not the JSON that was saved.
    #[error("saved verdicts are malformed")]
    Malformed(#[from] serde_json::Error),
    /// Written by another version of the format.
    #[error("saved verdicts have format version {0}, not {VERSION}")]
    Version(u32),
}

#[derive(Deserialize, Serialize)]
struct Record {
    version: u32,
    verdicts: Vec<Item>,
    #[serde(default)]
    revoked: Vec<String>,
    /// A release that does not read these asks for such a token again, which upstream itself refuses
    /// a minute after its revocation.
    #[serde(default)]
    revoked_selectors: Vec<Box<str>>,
}

#[derive(Deserialize, Serialize)]
struct Item {
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

impl SavedVerdicts {
    pub(super) fn to_json(&self) -> Vec<u8> {
        let record = Record {
            version: VERSION,
            verdicts: self.valid.iter().map(Item::of).collect(),
            revoked: self.revoked.iter().map(TokenDigest::hex).collect(),
            revoked_selectors: self.revoked_selectors.clone(),
        };
        serde_json::to_vec(&record).expect("verdicts are plain text and numbers")
    }

    /// Reads what [`SavedVerdicts::to_json`] wrote; items that cannot be read are left out, so that
    /// their tokens are asked for anew.
    pub(super) fn parse(json: &[u8]) -> Result<Self, RestoreError> {
        let record: Record = serde_json::from_slice(json)?;
        if record.version != VERSION {
            return Err(RestoreError::Version(record.version));
        }
        let digests = record.revoked.iter().filter_map(|hex| TokenDigest::from_hex(hex));
        Ok(Self {
            revoked: digests.collect(),
            valid: record.verdicts.into_iter().filter_map(Item::saved).collect(),
            revoked_selectors: record.revoked_selectors,
        })
    }
}

impl Item {
    fn of(saved: &Saved) -> Self {
        let scope = &saved.grant.scope;
        Self {
            digest: saved.digest.hex(),
            kind: saved.grant.kind.as_str().to_owned(),
            environment: scope.environment.as_str().to_owned(),
            projects: scope.projects.to_list().into_iter().map(str::to_owned).collect(),
            masked: saved.masked.as_ref().to_owned(),
            selector: saved.selector.clone(),
            listed: saved.is_listed,
        }
    }

    fn saved(self) -> Option<Saved> {
        let scope = Scope {
            environment: Environment::new(&self.environment),
            projects: Projects::from_list(self.projects.iter().map(String::as_str)),
        };
        Some(Saved {
            digest: TokenDigest::from_hex(&self.digest)?,
            grant: Arc::new(Grant { kind: TokenKind::parse(&self.kind)?, scope }),
            masked: self.masked.into(),
            selector: self.selector,
            is_listed: self.listed,
        })
    }
}
