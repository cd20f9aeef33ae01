//! A token of the registry: its public data, its digest, and its representation in audit events.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{
    audit::NewEvent,
    cookie_token,
    database::{now, timestamp_from_millis},
    new_token::NewToken,
};
use crate::token::{Environment, Grant, Projects, Scope, Token, TokenDigest, TokenKind};

/// A token, without its secret.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TokenMetadata {
    /// Its public id, which does not authenticate: 22 letters of base64url.
    pub id: String,
    /// Its display name.
    pub name: String,
    /// Its kind.
    pub kind: TokenKind,
    /// Its environment; `*` for admin tokens.
    pub environment: Environment,
    /// Its projects.
    pub projects: Projects,
    /// The time of its expiry.
    pub expires_at: Option<Timestamp>,
    /// The time of its creation.
    pub created_at: Timestamp,
    /// The name of the operator that created it.
    pub created_by: String,
    /// The time of its last use, with a precision of about a minute.
    pub seen_at: Option<Timestamp>,
    /// The token with its secret part masked, for display.
    pub masked: Arc<str>,
}

impl TokenMetadata {
    /// A token that is created now.
    pub(super) fn new(new: NewToken, secret: &Token, created_by: &str) -> Self {
        Self {
            id: public_id(secret),
            name: new.name.trim().to_owned(),
            kind: new.kind,
            environment: new.environment,
            projects: new.projects,
            expires_at: new.expires_at.map(|at| timestamp_from_millis(at.as_millisecond())),
            created_at: now(),
            created_by: created_by.to_owned(),
            seen_at: None,
            masked: secret.masked(),
        }
    }

    pub(super) fn grant(&self) -> Grant {
        let scope =
            Scope { environment: self.environment.clone(), projects: self.projects.clone() };
        Grant { kind: self.kind, scope }
    }

    pub(super) fn is_valid(&self, now: Timestamp) -> bool {
        self.expires_at.is_none_or(|at| now < at)
    }

    /// The token as audit events contain it, without its secret.
    pub(super) fn audit_data(&self) -> Value {
        let projects = self.projects.to_list();
        json!({
            "id": self.id,
            "tokenName": self.name,
            "type": self.kind.as_str(),
            "environment": self.environment.as_str(),
            "project": projects.join(","),
            "projects": projects,
            "expiresAt": self.expires_at,
            "createdAt": self.created_at,
            "seenAt": self.seen_at,
            "alias": null,
            "secure": true,
        })
    }

    pub(super) fn audit_event(&self) -> NewEvent {
        NewEvent {
            environment: Some(self.environment.as_str().to_owned()),
            project: Some(self.projects.to_list().join(",")),
            ..NewEvent::default()
        }
    }
}

/// The public id of a token: its selector, or a part of a digest for formats without one.
fn public_id(secret: &Token) -> String {
    let of_digest = || {
        let mut id = cookie_token::base64url(&Sha256::digest(secret.expose()));
        id.truncate(22);
        id
    };
    secret.selector().map_or_else(of_digest, str::to_owned)
}

/// A token with its digest.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RegisteredToken {
    pub(super) digest: TokenDigest,
    pub(super) token: TokenMetadata,
}
