//! Tokens that nobody needs to vouch for: those of the command line, or of an own registry.
//!
//! Requests read them without a lock; whoever owns them replaces them all at once. Which of them are
//! used is noted for the owner; when they end is its business.

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

type Table = HashMap<TokenDigest, Arc<Known>, RandomState>;

/// The given tokens of the moment.
#[derive(Debug)]
pub(super) struct Given(ArcSwap<Table>);

#[derive(Debug)]
struct Known {
    grant: Arc<Grant>,
    /// Whether it was presented since somebody asked.
    used: AtomicBool,
}

impl Given {
    pub(super) fn new(given: impl IntoIterator<Item = (TokenDigest, Grant)>) -> Self {
        Self(ArcSwap::from_pointee(table(given, &Table::default())))
    }

    /// What a token allows, which counts as its use.
    pub(super) fn admit(&self, digest: &TokenDigest) -> Option<Arc<Grant>> {
        let table = self.0.load();
        let known = table.get(digest)?;
        // Only the first of many uses writes to what all cores read.
        if !known.used.load(Ordering::Relaxed) {
            known.used.store(true, Ordering::Relaxed);
        }
        Some(Arc::clone(&known.grant))
    }

    /// Takes other tokens in their place; what is known of those that stay is kept.
    pub(super) fn replace(&self, given: impl IntoIterator<Item = (TokenDigest, Grant)>) {
        let table = table(given, &self.0.load());
        self.0.store(Arc::new(table));
    }

    /// What each of them allows.
    pub(super) fn grants(&self) -> Vec<Arc<Grant>> {
        self.0.load().values().map(|known| Arc::clone(&known.grant)).collect()
    }

    /// Those presented since the last call.
    pub(super) fn take_used(&self) -> Vec<TokenDigest> {
        let table = self.0.load();
        let used = table.iter().filter(|(_, known)| known.used.swap(false, Ordering::Relaxed));
        used.map(|(digest, _)| *digest).collect()
    }
}

fn table(given: impl IntoIterator<Item = (TokenDigest, Grant)>, before: &Table) -> Table {
    let entry = |(digest, grant)| {
        let kept = before.get(&digest).filter(|known| *known.grant == grant).map(Arc::clone);
        let fresh = || Arc::new(Known { grant: Arc::new(grant), used: AtomicBool::new(false) });
        (digest, kept.unwrap_or_else(fresh))
    };
    given.into_iter().map(entry).collect()
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
    fn tokens_come_go_and_change_all_at_once() {
        let (a, b) = (token("a", TokenKind::Client), token("b", TokenKind::Client));
        let given = Given::new([a.clone(), b.clone()]);
        assert!(given.admit(&a.0).is_some() && given.admit(&b.0).is_some());
        let changed = token("b", TokenKind::Frontend);
        given.replace([changed, token("c", TokenKind::Client)]);
        assert!(given.admit(&a.0).is_none());
        assert_eq!(given.admit(&b.0).unwrap().kind, TokenKind::Frontend);
    }

    #[test]
    fn uses_are_told_once_and_survive_a_replacement() {
        let (a, b) = (token("a", TokenKind::Client), token("b", TokenKind::Client));
        let given = Given::new([a.clone(), b.clone()]);
        assert_eq!(given.take_used(), []);
        given.admit(&a.0);
        given.admit(&a.0);
        given.replace([a.clone(), b]);
        assert_eq!(given.take_used(), [a.0]);
        assert_eq!(given.take_used(), []);
    }
}
