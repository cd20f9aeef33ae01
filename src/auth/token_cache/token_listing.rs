//! The part of upstream's token list that the cache uses. Its encoded form, for other instances of a
//! fleet, has digests and selectors, but no plaintext tokens.

use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::token_id::TokenId;
use crate::{
    protocol::tokens::{ListedSecret, TokenList, UnreadableTokens},
    token::{Environment, Grant, Projects, Scope, Token, TokenDigest, TokenKind},
};

/// The tokens that upstream lists.
#[derive(Clone, Debug, Default)]
pub(in crate::auth) struct TokenListing {
    pub(super) tokens: Vec<ListingEntry>,
    /// The tokens that unreadable items of the list may be.
    pub(super) unreadable: UnreadableTokens,
    unreadable_count: usize,
}

/// A token that upstream lists.
#[derive(Clone, Debug)]
pub(super) struct ListingEntry {
    pub(super) id: TokenId,
    pub(super) grant: Grant,
    /// Missing if upstream lists the selector only.
    pub(super) whole: Option<WholeToken>,
}

/// A token that can be accepted without asking upstream.
#[derive(Clone, Debug)]
pub(super) struct WholeToken {
    pub(super) digest: TokenDigest,
    pub(super) masked: Arc<str>,
    /// Missing if another instance has read the list.
    pub(super) plaintext: Option<Token>,
}

impl WholeToken {
    pub(super) fn of(token: &Token) -> Self {
        let (digest, masked) = (token.digest(), token.masked());
        Self { digest, masked, plaintext: Some(token.clone()) }
    }
}

impl TokenListing {
    /// The tokens of a list that have not expired at `wall`.
    pub(in crate::auth) fn new(list: &TokenList, wall: Timestamp) -> Self {
        let valid = list.tokens.iter().filter(|entry| !entry.is_expired(wall));
        let tokens = valid.map(|entry| ListingEntry {
            id: TokenId::of_listed(&entry.secret),
            grant: entry.grant(),
            whole: match &entry.secret {
                ListedSecret::Full(token) => Some(WholeToken::of(token)),
                ListedSecret::Selector(_) => None,
            },
        });
        Self {
            tokens: tokens.collect(),
            unreadable: list.unreadable_tokens(),
            unreadable_count: list.unreadable.len(),
        }
    }

    /// The environments of the tokens.
    pub(in crate::auth) fn environments(&self) -> impl Iterator<Item = &Environment> {
        self.tokens.iter().map(|entry| &entry.grant.scope.environment)
    }

    /// The number of items that cannot be read.
    pub(in crate::auth) fn unreadable_count(&self) -> usize {
        self.unreadable_count
    }

    /// Encodes the listing without plaintext tokens: the same bytes for the same tokens in any order.
    pub(in crate::auth) fn encode(&self) -> Vec<u8> {
        let mut tokens: Vec<_> = self.tokens.iter().map(EntryRecord::of).collect();
        tokens.sort();
        let UnreadableTokens { digests, selectors, has_unidentified } = &self.unreadable;
        let mut record = ListingRecord {
            tokens,
            unreadable_digests: digests.iter().map(TokenDigest::to_hex).collect(),
            unreadable_selectors: selectors.iter().cloned().collect(),
            has_unidentified: *has_unidentified,
            unreadable_count: self.unreadable_count,
        };
        record.unreadable_digests.sort();
        record.unreadable_selectors.sort();
        serde_json::to_vec(&record).expect("lists of strings serialize")
    }

    /// Parses the output of [`TokenListing::encode`].
    ///
    /// An entry that cannot be read, of a later version perhaps, makes the whole listing unusable: its
    /// token would otherwise be taken for a revoked one.
    pub(in crate::auth) fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let record: ListingRecord = serde_json::from_slice(body)?;
        let tokens = record.tokens.into_iter().map(EntryRecord::into_entry);
        let digests = record.unreadable_digests.iter().map(|hex| TokenDigest::from_hex(hex));
        Ok(Self {
            tokens: tokens.collect::<Option<_>>().ok_or(DecodeError::Entry)?,
            unreadable: UnreadableTokens {
                digests: digests.collect::<Option<_>>().ok_or(DecodeError::Entry)?,
                selectors: record.unreadable_selectors.into_iter().collect(),
                has_unidentified: record.has_unidentified,
            },
            unreadable_count: record.unreadable_count,
        })
    }
}

/// Why a listing of another instance cannot be used.
#[derive(Debug, thiserror::Error)]
pub(in crate::auth) enum DecodeError {
    #[error("it is not the expected JSON")]
    Malformed(#[from] serde_json::Error),
    #[error("it has a token that cannot be read")]
    Entry,
}

#[derive(Deserialize, Serialize)]
struct ListingRecord {
    tokens: Vec<EntryRecord>,
    #[serde(default)]
    unreadable_digests: Vec<String>,
    #[serde(default)]
    unreadable_selectors: Vec<String>,
    #[serde(default)]
    has_unidentified: bool,
    #[serde(default)]
    unreadable_count: usize,
}

#[derive(Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
struct EntryRecord {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    selector: Option<String>,
    kind: String,
    environment: String,
    projects: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    masked: Option<String>,
}

impl EntryRecord {
    fn of(ListingEntry { id, grant, whole }: &ListingEntry) -> Self {
        let Grant { kind, scope } = grant;
        Self {
            digest: whole.as_ref().map(|whole| whole.digest.to_hex()),
            selector: id.selector().map(str::to_owned),
            kind: kind.as_str().to_owned(),
            environment: scope.environment.as_str().to_owned(),
            projects: scope.projects.to_list().into_iter().map(str::to_owned).collect(),
            masked: whole.as_ref().map(|whole| whole.masked.to_string()),
        }
    }

    fn into_entry(self) -> Option<ListingEntry> {
        let scope = Scope {
            environment: Environment::new(&self.environment),
            projects: Projects::from_list(self.projects.iter().map(String::as_str)),
        };
        let grant = Grant { kind: TokenKind::parse(&self.kind)?, scope };
        let whole = match self.digest {
            Some(hex) => Some(WholeToken {
                digest: TokenDigest::from_hex(&hex)?,
                masked: self.masked?.into(),
                plaintext: None,
            }),
            None => None,
        };
        let id = match (self.selector, &whole) {
            (Some(selector), _) => TokenId::Selector(selector.into()),
            (None, Some(whole)) => TokenId::Digest(whole.digest),
            (None, None) => return None,
        };
        Some(ListingEntry { id, grant, whole })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "*:dev.964a287e1b728cb5f4f3e0120df92cb5f4f3e0120df92cb5964a287e";

    fn listing() -> TokenListing {
        let body = format!(
            r#"{{"tokens":[{{"tokenName":"a","type":"client","environment":"dev","projects":["*"],
                "secret":"{V1}"}},
                {{"tokenName":"b","type":"frontend","environment":"dev","projects":["p","q"],
                "secret":"AbCdEfGhIjKlMnOpQrStUv"}},
                {{"tokenName":"old","type":"client","environment":"dev","projects":["*"],
                "secret":"*:dev.old","expiresAt":"2020-01-01T00:00:00Z"}},
                {{"type":"later","secret":"*:dev.later"}}]}}"#
        );
        TokenListing::new(&serde_json::from_str(&body).expect("list"), Timestamp::now())
    }

    #[test]
    fn encoded_listing_has_digests_and_no_plaintext() {
        let encoded = listing().encode();
        let text = String::from_utf8(encoded.clone()).expect("text");
        assert!(!text.contains("964a287e1b") && !text.contains("dev.later"), "{text}");
        let decoded = TokenListing::decode(&encoded).expect("sound");
        assert_eq!((decoded.tokens.len(), decoded.unreadable_count()), (2, 1));
        assert_eq!(decoded.encode(), encoded);
        let whole = decoded.tokens.iter().find_map(|it| it.whole.as_ref()).expect("the v1 token");
        assert_eq!((whole.digest, whole.plaintext.is_none()), (TokenDigest::of(V1), true));
        assert!(decoded.unreadable.may_include(&TokenDigest::of("*:dev.later"), None));
        assert!(!decoded.unreadable.may_include_selector("AbCdEfGhIjKlMnOpQrStUv"));
    }

    #[test]
    fn listing_with_an_unreadable_entry_is_not_used() {
        let encoded = String::from_utf8(listing().encode()).expect("text");
        let later = encoded.replace(r#""kind":"frontend""#, r#""kind":"later""#);
        assert!(matches!(TokenListing::decode(later.as_bytes()), Err(DecodeError::Entry)));
        assert!(matches!(TokenListing::decode(b"[]"), Err(DecodeError::Malformed(_))));
    }
}
