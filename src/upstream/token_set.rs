//! The tokens of one environment with which the edge authenticates at upstream, and which of them are
//! used.
//!
//! Pure: it does not know where they come from and sends no request.

use std::{cmp::Reverse, mem};

use crate::token::{Projects, Token, TokenDigest};

/// The number of tokens per environment up to which redundant ones, covered by others, are retained.
pub(super) const MAX_REDUNDANT_TOKENS: usize = 16;

/// A token for upstream, with its projects.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Credential {
    /// The token.
    pub token: Token,
    /// The projects that it sees.
    pub projects: Projects,
}

/// The tokens of one environment.
#[derive(Default)]
pub(super) struct TokenSet(Vec<TokenEntry>);

struct TokenEntry {
    credential: Credential,
    state: TokenState,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum TokenState {
    Accepted,
    /// Upstream has refused it, possibly by mistake: it is still used for projects that no accepted
    /// token covers.
    Refused,
}

impl TokenSet {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it has a token that upstream accepts.
    pub(super) fn has_accepted(&self) -> bool {
        self.with_state(TokenState::Accepted).next().is_some()
    }

    fn with_state(&self, state: TokenState) -> impl Iterator<Item = &Credential> {
        self.0.iter().filter(move |entry| entry.state == state).map(|entry| &entry.credential)
    }

    /// The accepted tokens, then the refused ones; of each, those with the most projects first, of equals
    /// the one inserted first. Tokens covered by an earlier one are left out.
    pub(super) fn tokens_in_use(&self) -> Vec<Credential> {
        let by_width = |state| {
            let mut candidates: Vec<_> = self.with_state(state).collect();
            // The sort is stable: of two with the same projects the first stays, as it may have a
            // stream.
            candidates.sort_by_key(|it| match &it.projects {
                Projects::All => Reverse(usize::MAX),
                Projects::Only(ids) => Reverse(ids.len()),
            });
            candidates
        };
        let mut chosen: Vec<Credential> = Vec::new();
        for candidate in
            by_width(TokenState::Accepted).into_iter().chain(by_width(TokenState::Refused))
        {
            if !chosen.iter().any(|wider| wider.projects.covers(&candidate.projects)) {
                chosen.push(candidate.clone());
            }
        }
        chosen
    }

    /// Inserts an accepted token; returns whether no earlier one covered it.
    pub(super) fn insert(&mut self, credential: Credential) -> bool {
        let is_wider = !self
            .with_state(TokenState::Accepted)
            .any(|it| it.projects.covers(&credential.projects));
        if let Some(entry) = self.0.iter_mut().find(|it| it.credential.token == credential.token) {
            *entry = TokenEntry { credential, state: TokenState::Accepted };
            return is_wider;
        }
        if self.0.len() >= MAX_REDUNDANT_TOKENS {
            self.0.retain(|entry| {
                entry.state == TokenState::Accepted
                    || !credential.projects.covers(&entry.credential.projects)
            });
        }
        if is_wider || self.0.len() < MAX_REDUNDANT_TOKENS {
            self.0.push(TokenEntry { credential, state: TokenState::Accepted });
        }
        is_wider
    }

    pub(super) fn remove(&mut self, token: &TokenDigest) {
        self.0.retain(|entry| entry.credential.token.digest() != *token);
    }

    /// Records that upstream accepts a token.
    pub(super) fn mark_accepted(&mut self, token: &TokenDigest) {
        self.set_state(token, TokenState::Accepted);
    }

    /// Records that upstream refuses a token; returns whether it was accepted until now.
    pub(super) fn mark_refused(&mut self, token: &TokenDigest) -> bool {
        self.set_state(token, TokenState::Refused)
    }

    /// Sets the state of a token; returns whether it changed.
    fn set_state(&mut self, token: &TokenDigest, state: TokenState) -> bool {
        let entry = self.0.iter_mut().find(|entry| entry.credential.token.digest() == *token);
        entry.is_some_and(|entry| mem::replace(&mut entry.state, state) != state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_of_redundant_tokens_is_bounded() {
        let mut set = TokenSet::default();
        for number in 0..1000 {
            let token = Token::parse(&format!("*:development.{number}")).expect("token");
            set.insert(Credential { token, projects: Projects::All });
        }
        assert_eq!(set.0.len(), MAX_REDUNDANT_TOKENS);
    }
}
