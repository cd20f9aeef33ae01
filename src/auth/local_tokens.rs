//! Static tokens: tokens from the command line or from this instance's own registry, which need no
//! validation.
//!
//! Requests read them without a lock. Their owner replaces the whole set, handles expiry, and reads
//! which of them were used.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwap;
use foldhash::fast::RandomState;

use crate::token::{Grant, TokenDigest};

type TokenTable = HashMap<TokenDigest, Arc<LocalToken>, RandomState>;

/// The current set of static tokens.
#[derive(Debug)]
pub(super) struct LocalTokens(ArcSwap<TokenTable>);

#[derive(Debug)]
struct LocalToken {
    grant: Arc<Grant>,
    /// Whether the token was presented since the last [`LocalTokens::take_used`].
    is_used: AtomicBool,
}

impl LocalTokens {
    pub(super) fn new(tokens: impl IntoIterator<Item = (TokenDigest, Grant)>) -> Self {
        Self(ArcSwap::from_pointee(build_table(tokens, &TokenTable::default())))
    }

    /// The grant of a token, which is marked as used.
    pub(super) fn get_and_mark_used(&self, digest: &TokenDigest) -> Option<Arc<Grant>> {
        let table = self.0.load();
        let known = table.get(digest)?;
        // Only the first use writes, so that the cache line stays shared between cores.
        if !known.is_used.load(Ordering::Relaxed) {
            known.is_used.store(true, Ordering::Relaxed);
        }
        Some(Arc::clone(&known.grant))
    }

    /// Replaces the set; tokens whose grant is unchanged keep their mark of use.
    pub(super) fn replace(&self, tokens: impl IntoIterator<Item = (TokenDigest, Grant)>) {
        let table = build_table(tokens, &self.0.load());
        self.0.store(Arc::new(table));
    }

    /// The grant of each token.
    pub(super) fn grants(&self) -> Vec<Arc<Grant>> {
        self.0.load().values().map(|known| Arc::clone(&known.grant)).collect()
    }

    /// The tokens that were presented since the last call.
    pub(super) fn take_used(&self) -> Vec<TokenDigest> {
        let table = self.0.load();
        let used = table.iter().filter(|(_, known)| known.is_used.swap(false, Ordering::Relaxed));
        used.map(|(digest, _)| *digest).collect()
    }
}

fn build_table(
    tokens: impl IntoIterator<Item = (TokenDigest, Grant)>,
    before: &TokenTable,
) -> TokenTable {
    let entry = |(digest, grant)| {
        let unchanged = before.get(&digest).filter(|known| *known.grant == grant).map(Arc::clone);
        let fresh =
            || Arc::new(LocalToken { grant: Arc::new(grant), is_used: AtomicBool::new(false) });
        (digest, unchanged.unwrap_or_else(fresh))
    };
    tokens.into_iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::{Environment, Projects, Scope, TokenKind};

    fn token(text: &str, kind: TokenKind) -> (TokenDigest, Grant) {
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        (TokenDigest::of(text), Grant { kind, scope })
    }

    #[test]
    fn replace_adds_removes_and_changes_tokens() {
        let (a, b) = (token("a", TokenKind::Client), token("b", TokenKind::Client));
        let tokens = LocalTokens::new([a.clone(), b.clone()]);
        assert!(
            tokens.get_and_mark_used(&a.0).is_some() && tokens.get_and_mark_used(&b.0).is_some()
        );
        let changed = token("b", TokenKind::Frontend);
        tokens.replace([changed, token("c", TokenKind::Client)]);
        assert!(tokens.get_and_mark_used(&a.0).is_none());
        assert_eq!(tokens.get_and_mark_used(&b.0).unwrap().kind, TokenKind::Frontend);
    }

    #[test]
    fn uses_are_reported_once_and_survive_a_replacement() {
        let (a, b) = (token("a", TokenKind::Client), token("b", TokenKind::Client));
        let tokens = LocalTokens::new([a.clone(), b.clone()]);
        assert_eq!(tokens.take_used(), []);
        tokens.get_and_mark_used(&a.0);
        tokens.get_and_mark_used(&a.0);
        tokens.replace([a.clone(), b]);
        assert_eq!(tokens.take_used(), [a.0]);
        assert_eq!(tokens.take_used(), []);
    }
}
