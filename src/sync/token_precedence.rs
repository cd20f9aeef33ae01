//! Decides which of several tokens' documents has the newest state of each project and segment.
//!
//! Upstream does not say how old a document is. But each token's view only moves forward, although some
//! lag: replicas and streams differ in speed. So the states of a project are recorded in order. A token
//! becomes the leader by moving on from the newest state; a token with a state that others have left is
//! behind. If the order is ambiguous, for example because a token has missed some states, it usually
//! becomes clear within 5 s; otherwise the last change wins. A leader that is no longer confirmed is
//! replaced by a token that is. At the start, the flags that an earlier run served lead, like a token
//! that is no longer in use.
//!
//! Pure: times are arguments, and states are identified by hashes of their text.

use std::{collections::HashMap, sync::Arc};

use tokio::time::Instant;

use super::{
    document_parts::{DocumentPart, EMPTY_STATE, PartHashes},
    part_precedence::{PartPrecedence, TokenStatus, TrackedToken},
};
use crate::{
    protocol::features::PreviousRun,
    token::{Projects, TokenDigest},
};

/// Which token leads in which document part.
#[derive(Debug, Default)]
pub(super) struct TokenPrecedence {
    parts: HashMap<DocumentPart, PartPrecedence>,
    tokens: HashMap<TokenDigest, TrackedToken>,
}

impl TokenPrecedence {
    /// Applies the current view of a token. `revision` is upstream's revision of that state, if it is
    /// comparable between tokens.
    pub(super) fn observe(
        &mut self,
        token: &TokenDigest,
        projects: &Projects,
        states: &PartHashes,
        revision: Option<u64>,
        now: Instant,
    ) {
        let is_new =
            self.tokens.get(token).is_none_or(|tracked| tracked.status != TokenStatus::InUse);
        let tracked = TrackedToken {
            projects: projects.clone(),
            revision,
            confirmed: now,
            status: TokenStatus::InUse,
        };
        self.tokens.insert(*token, tracked);
        let named = |part: &DocumentPart| match part {
            DocumentPart::Project(project) => projects.contains(project),
            DocumentPart::Segment(_) => states.0.contains_key(part),
        };
        let Self { parts, tokens } = self;
        parts.retain(|part, history| {
            if !named(part) {
                return history.remove_token(token, now);
            }
            // A project without flags in the document is an empty project; a missing segment is unknown.
            let state = states.0.get(part).copied().unwrap_or(EMPTY_STATE);
            history.observe(token, state, now, tokens);
            true
        });
        let is_unseen = |(part, _): &(&DocumentPart, _)| named(part) && !parts.contains_key(part);
        let unseen: Vec<_> = states.0.iter().filter(is_unseen).collect();
        for (part, state) in unseen {
            // Tokens that already see the project have seen it empty.
            let sees = |(other, tracked): &(&TokenDigest, &TrackedToken)| {
                let DocumentPart::Project(project) = part else { return false };
                tracked.projects.contains(project) && (*other != token || !is_new)
            };
            let sightings = tokens.iter().filter(sees).map(|it| it.0);
            let mut precedence = PartPrecedence::new(token, sightings, now);
            precedence.observe(token, *state, now, tokens);
            parts.insert(part.clone(), precedence);
        }
    }

    /// Starts with the state of an earlier run, under the digest of an unused token. If that run has
    /// served the state, another token leads only once it is as new or has been confirmed for a while.
    pub(super) fn inherit(
        &mut self,
        token: &TokenDigest,
        projects: &Projects,
        states: &PartHashes,
        served: Option<PreviousRun>,
        now: Instant,
    ) {
        self.observe(token, projects, states, served.and_then(|it| it.upstream_revision), now);
        if let Some(tracked) = self.tokens.get_mut(token) {
            tracked.status =
                if served.is_some() { TokenStatus::Retired } else { TokenStatus::UnknownAge };
        }
    }

    /// Records that a token's view was confirmed at this time.
    pub(super) fn confirm(&mut self, token: &TokenDigest, at: Instant) {
        if let Some(tracked) = self.tokens.get_mut(token) {
            tracked.confirmed = tracked.confirmed.max(at);
        }
    }

    /// When a token's view was last confirmed.
    pub(super) fn confirmed_at(&self, token: &TokenDigest) -> Option<Instant> {
        Some(self.tokens.get(token)?.confirmed)
    }

    /// Records that a token's view is also the state of this revision.
    pub(super) fn raise_revision(&mut self, token: &TokenDigest, revision: Option<u64>) {
        if let Some(tracked) = self.tokens.get_mut(token) {
            tracked.revision = tracked.revision.max(revision);
        }
    }

    /// Marks a token as no longer in use. It stays the leader only in projects that tokens in use see
    /// (`covered`), while no other token is known to be as new. Returns whether it still leads
    /// somewhere.
    pub(super) fn retire(&mut self, token: &TokenDigest, covered: &Projects) -> bool {
        let Self { parts, tokens } = self;
        let Some(tracked) = tokens.get_mut(token) else { return false };
        if tracked.status == TokenStatus::InUse {
            tracked.status = TokenStatus::Retired;
        }
        let now = tracked.confirmed;
        let mut leads = false;
        parts.retain(|part, history| {
            history.replace_retired_leader(token, tokens);
            let (is_needed, is_segment) = match part {
                DocumentPart::Project(project) => (covered.contains(project), false),
                DocumentPart::Segment(_) => (true, true),
            };
            let (is_leader, is_alone) = (history.leader == *token, history.views.len() == 1);
            // A segment that only this token has may belong to a flag in which it leads.
            if !is_leader || !is_needed || is_alone && !is_segment {
                return history.remove_token(token, now);
            }
            leads |= !is_alone;
            true
        });
        if !leads {
            self.remove_token(token, now);
        }
        leads
    }

    /// Removes a token with all its views.
    pub(super) fn remove_token(&mut self, token: &TokenDigest, now: Instant) {
        self.parts.retain(|_, history| history.remove_token(token, now));
        self.tokens.remove(token);
    }

    /// Decides ambiguous orders whose time is up; returns whether any leader changed.
    pub(super) fn resolve_timeouts(&mut self, now: Instant) -> bool {
        let mut has_changed = false;
        for history in self.parts.values_mut() {
            has_changed |= history.resolve_timeouts(&self.tokens, now);
        }
        has_changed
    }

    /// The next time at which [`TokenPrecedence::resolve_timeouts`] may decide something.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.parts.values().filter_map(|history| history.next_timeout(&self.tokens)).min()
    }

    /// When to poll again with tokens whose states do not count yet, because a token that is no longer
    /// in use may be newer.
    pub(super) fn next_recheck(&self) -> Option<Instant> {
        self.parts.values().filter_map(|history| history.next_recheck(&self.tokens)).min()
    }

    /// The token with the newest state of a project.
    pub(super) fn leader_of_project(&self, project: &Arc<str>) -> Option<&TokenDigest> {
        Some(&self.parts.get(&DocumentPart::Project(Arc::clone(project)))?.leader)
    }

    /// The leader of each document part.
    pub(super) fn leaders(&self) -> impl Iterator<Item = (&DocumentPart, &TokenDigest)> {
        self.parts.iter().map(|(part, history)| (part, &history.leader))
    }
}

#[cfg(test)]
mod tests;
