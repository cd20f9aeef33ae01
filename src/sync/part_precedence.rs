//! The order of the states of one document part, and which token has the newest of them.
//!
//! Pure. It knows one part; `token_precedence` has all.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use tokio::time::Instant;

use super::document_parts::{EMPTY_STATE, StateHash};
use crate::token::{Projects, TokenDigest};

/// How long to wait for more states before the last change wins, if the order of two states is
/// ambiguous.
pub(super) const ORDER_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest expected lag of one view behind another.
const MAX_LAG: Duration = Duration::from_secs(30);

/// The longest lag behind a token that is no longer in use: the new token has just been polled.
const MAX_LAG_BEHIND_RETIRED: Duration = Duration::from_secs(5);

/// The longest lag of a view with an older revision. After that, upstream is assumed to have been
/// restored from a backup and to count from there.
const MAX_LAG_BY_REVISION: Duration = Duration::from_mins(1);

/// The number of recorded states per project or segment.
pub(super) const MAX_STATES: usize = 32;

/// A token, and when its view was last confirmed.
#[derive(Debug)]
pub(super) struct TrackedToken {
    pub(super) projects: Projects,
    pub(super) revision: Option<u64>,
    pub(super) confirmed: Instant,
    pub(super) status: TokenStatus,
}

/// How a token's view competes with others.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum TokenStatus {
    /// The token is in use.
    InUse,
    /// The token is no longer in use: any other that is as new replaces it.
    Retired,
    /// The age of its state is unknown: any other replaces it.
    UnknownAge,
}

/// The states of a document part that have been the newest one, in order.
#[derive(Debug)]
pub(super) struct PartPrecedence {
    pub(super) states: VecDeque<StateHash>,
    /// The position of the first recorded state.
    first_position: u64,
    /// When the newest state became the newest.
    newest_since: Instant,
    pub(super) leader: TokenDigest,
    pub(super) views: HashMap<TokenDigest, PartView>,
}

/// One token's view of a document part.
#[derive(Debug)]
pub(super) struct PartView {
    state: StateHash,
    /// The last position that it is known to have reached.
    position: Option<u64>,
    /// Whether its state is the one at that position.
    is_at_position: bool,
    /// When its state last changed, or was first observed.
    changed_at: Instant,
    has_changed: bool,
}

impl PartPrecedence {
    /// Starts without a state. `earlier` are tokens that have seen the project empty: one of them leads,
    /// otherwise `token` does.
    pub(super) fn new<'a>(
        token: &TokenDigest,
        earlier: impl IntoIterator<Item = &'a TokenDigest>,
        now: Instant,
    ) -> Self {
        let mut history = Self {
            states: VecDeque::new(),
            first_position: 0,
            newest_since: now,
            leader: *token,
            views: HashMap::new(),
        };
        for other in earlier {
            history.states = VecDeque::from([EMPTY_STATE]);
            history.leader = *other;
            let view = PartView {
                state: EMPTY_STATE,
                position: Some(0),
                is_at_position: true,
                changed_at: now,
                has_changed: false,
            };
            history.views.insert(*other, view);
        }
        history
    }

    /// The position of the newest state.
    fn newest_position(&self) -> Option<u64> {
        let count = u64::try_from(self.states.len()).expect("a usize fits into 64 bits");
        (self.first_position + count).checked_sub(1).filter(|_| count > 0)
    }

    /// Applies the state that a token sees now.
    pub(super) fn observe(
        &mut self,
        token: &TokenDigest,
        state: StateHash,
        now: Instant,
        tokens: &HashMap<TokenDigest, TrackedToken>,
    ) {
        let Some(newest) = self.newest_position() else {
            return self.append_state(token, state, now);
        };
        let (reached, is_first) = match self.views.get_mut(token) {
            Some(view) if view.state == state => return,
            Some(view) => (view.position, false),
            None => (None, true),
        };
        let leader = tokens.get(&self.leader);
        let is_ageless = leader.is_some_and(|it| it.status == TokenStatus::UnknownAge);
        let is_behind = has_newer_revision(&self.leader, token, tokens);
        let moves_on = self.leader == *token || reached == Some(newest) && !is_behind;
        if is_ageless || !is_first && moves_on {
            return self.append_state(token, state, now);
        }
        let position = self.find_position(state, reached, is_first);
        if position.is_none() && has_newer_revision(token, &self.leader, tokens) {
            return self.append_state(token, state, now);
        }
        let view = PartView {
            state,
            position: position.or(reached),
            is_at_position: position.is_some(),
            changed_at: now,
            has_changed: !is_first,
        };
        self.views.insert(*token, view);
        let leader = self.leader;
        self.replace_retired_leader(&leader, tokens);
    }

    /// The position of a state. For a token that has moved on: the first match after the position that
    /// it had `reached`. For a new token: the last match.
    fn find_position(&self, state: StateHash, reached: Option<u64>, is_first: bool) -> Option<u64> {
        let mut positions = (self.first_position..)
            .zip(&self.states)
            .filter(|(at, it)| **it == state && reached.is_none_or(|reached| *at > reached));
        let found = if is_first { positions.last() } else { positions.next() };
        found.map(|(at, _)| at)
    }

    /// Makes this state of a token the newest one.
    fn append_state(&mut self, token: &TokenDigest, state: StateHash, now: Instant) {
        self.states.push_back(state);
        if self.states.len() > MAX_STATES {
            self.states.pop_front();
            self.first_position += 1;
        }
        self.leader = *token;
        self.newest_since = now;
        let newest = self.newest_position();
        for view in self.views.values_mut().filter(|it| !it.is_at_position && it.state == state) {
            (view.position, view.is_at_position) = (newest, true);
        }
        let has_changed = self.views.contains_key(token);
        let view = PartView {
            state,
            position: newest,
            is_at_position: true,
            changed_at: now,
            has_changed,
        };
        self.views.insert(*token, view);
    }

    /// Replaces a retired leader by a token in use that is as new.
    pub(super) fn replace_retired_leader(
        &mut self,
        token: &TokenDigest,
        tokens: &HashMap<TokenDigest, TrackedToken>,
    ) {
        let is_retired = |token| tokens.get(token).is_none_or(|it| it.status != TokenStatus::InUse);
        if self.leader != *token || !is_retired(token) {
            return;
        }
        let newest = self.newest_position();
        let as_new = self.views.iter().find(|(other, view)| {
            *other != token && !is_retired(other) && view.is_at_position && view.position == newest
        });
        if let Some((other, _)) = as_new {
            self.leader = *other;
        }
    }

    /// Removes a token's view. If it was the leader, the most advanced other token leads. Returns whether
    /// any view is left.
    pub(super) fn remove_token(&mut self, token: &TokenDigest, now: Instant) -> bool {
        self.views.remove(token);
        let furthest = self.views.iter().max_by_key(|(_, view)| (view.position, view.changed_at));
        if self.leader == *token
            && let Some((other, state)) = furthest.map(|(other, view)| (*other, view.state))
        {
            if self.states.back() == Some(&state) {
                self.leader = other;
            } else {
                self.append_state(&other, state, now);
            }
        }
        !self.views.is_empty()
    }

    /// The views of tokens in use that differ from the leader's.
    fn views_differing_from_leader<'a>(
        &'a self,
        tokens: &'a HashMap<TokenDigest, TrackedToken>,
    ) -> impl Iterator<Item = (&'a TokenDigest, &'a TrackedToken, &'a PartView)> {
        let newest = self.states.back();
        let views =
            self.views.iter().filter_map(|(token, view)| Some((token, tokens.get(token)?, view)));
        views.filter(move |(token, tracked, view)| {
            let is_in_use = tracked.status == TokenStatus::InUse;
            **token != self.leader && is_in_use && newest != Some(&view.state)
        })
    }

    /// Whether a view with an unknown position may become the leader: it changed later than the
    /// leader's, or the project was empty so far.
    fn can_overtake(&self, view: &PartView) -> bool {
        let is_last_change = view.has_changed && view.changed_at >= self.newest_since;
        let was_empty = self.first_position == 0 && self.states.iter().eq([&EMPTY_STATE]);
        !view.is_at_position && (is_last_change || was_empty)
    }

    /// When the order of a view with an unknown position is decided.
    pub(super) fn next_timeout(
        &self,
        tokens: &HashMap<TokenDigest, TrackedToken>,
    ) -> Option<Instant> {
        let views = self.views_differing_from_leader(tokens).filter(|(token, _, view)| {
            self.can_overtake(view) && !has_newer_revision(&self.leader, token, tokens)
        });
        views.map(|(.., view)| view.changed_at + ORDER_TIMEOUT).min()
    }

    /// When to confirm again the views that wait because a leader is no longer in use.
    pub(super) fn next_recheck(
        &self,
        tokens: &HashMap<TokenDigest, TrackedToken>,
    ) -> Option<Instant> {
        let leader = tokens.get(&self.leader).filter(|it| it.status != TokenStatus::InUse)?;
        let others = self.views_differing_from_leader(tokens);
        others.map(|(token, ..)| leader.confirmed + self.max_lag(leader, token, tokens)).min()
    }

    /// A differing view counts once it is confirmed this long after the leader was.
    fn max_lag(
        &self,
        leader: &TrackedToken,
        token: &TokenDigest,
        tokens: &HashMap<TokenDigest, TrackedToken>,
    ) -> Duration {
        if has_newer_revision(&self.leader, token, tokens) {
            return MAX_LAG_BY_REVISION;
        }
        match leader.status {
            TokenStatus::InUse => MAX_LAG,
            TokenStatus::Retired | TokenStatus::UnknownAge => MAX_LAG_BEHIND_RETIRED,
        }
    }

    /// Decides ambiguous orders whose time is up; returns whether the leader changed.
    pub(super) fn resolve_timeouts(
        &mut self,
        tokens: &HashMap<TokenDigest, TrackedToken>,
        now: Instant,
    ) -> bool {
        let Some(newest) = self.newest_position() else { return false };
        let leader = tokens.get(&self.leader);
        let mut last = None::<(Instant, TokenDigest, StateHash)>;
        for (token, tracked, view) in self.views_differing_from_leader(tokens) {
            let is_leader_silent = leader.is_none_or(|leader| {
                let lag = self.max_lag(leader, token, tokens);
                tracked.confirmed.saturating_duration_since(leader.confirmed) >= lag
            });
            let is_decided = self.can_overtake(view)
                && !has_newer_revision(&self.leader, token, tokens)
                && now >= view.changed_at + ORDER_TIMEOUT;
            if (is_leader_silent || is_decided) && last.is_none_or(|it| view.changed_at > it.0) {
                last = Some((view.changed_at, *token, view.state));
            }
        }
        let (state, since) = (self.states.back().copied(), self.newest_since);
        for (token, view) in self.views.iter_mut().filter(|(_, view)| Some(view.state) == state) {
            // It may have had this state before the others left it and returned to it.
            let confirmed =
                tokens.get(token).map(|it| it.confirmed.saturating_duration_since(since));
            if confirmed.is_some_and(|it| it >= MAX_LAG) {
                (view.position, view.is_at_position) = (Some(newest), true);
            }
        }
        let Some((since, token, state)) = last else { return false };
        self.append_state(&token, state, since);
        true
    }
}

/// Whether the view of `token` has a newer upstream revision than that of `other`.
fn has_newer_revision(
    token: &TokenDigest,
    other: &TokenDigest,
    tokens: &HashMap<TokenDigest, TrackedToken>,
) -> bool {
    let revision = |token| tokens.get(token).and_then(|it| it.revision);
    matches!((revision(token), revision(other)), (Some(new), Some(old)) if new > old)
}
