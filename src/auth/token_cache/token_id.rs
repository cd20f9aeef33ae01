//! The identity of a token in upstream's list, in revocations and in deletions by operators.
//!
//! The caches themselves are keyed by digest, because a request presents a whole token.

use crate::{
    protocol::tokens::ListedSecret,
    token::{Token, TokenDigest},
};

/// Identifies a token as upstream's list does.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) enum TokenId {
    /// The public half of a v2 token. Upstream's list has only this half, so a listed token is
    /// recognized by it before it has been presented.
    Selector(Box<str>),
    /// The digest of any other token.
    Digest(TokenDigest),
}

impl TokenId {
    pub(super) fn new(digest: TokenDigest, selector: Option<&str>) -> Self {
        selector.map_or(Self::Digest(digest), |selector| Self::Selector(selector.into()))
    }

    pub(super) fn of(token: &Token) -> Self {
        match token.selector() {
            Some(selector) => Self::Selector(selector.into()),
            None => Self::Digest(token.digest()),
        }
    }

    pub(super) fn of_listed(secret: &ListedSecret) -> Self {
        match secret {
            ListedSecret::Full(token) => Self::of(token),
            ListedSecret::Selector(selector) => Self::Selector(selector.as_str().into()),
        }
    }

    pub(super) fn selector(&self) -> Option<&str> {
        match self {
            Self::Selector(selector) => Some(selector),
            Self::Digest(_) => None,
        }
    }
}
