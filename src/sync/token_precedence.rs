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

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_128;

use crate::{
    protocol::features::{Document, PreviousRun},
    token::{Projects, TokenDigest},
};

/// How long to wait for more states before the last change wins, if the order of two states is
/// ambiguous.
const ORDER_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest expected lag of one view behind another.
const MAX_LAG: Duration = Duration::from_secs(30);

/// The longest lag behind a token that is no longer in use: the new token has just been polled.
const MAX_LAG_BEHIND_RETIRED: Duration = Duration::from_secs(5);

/// The longest lag of a view with an older revision. After that, upstream is assumed to have been
/// restored from a backup and to count from there.
const MAX_LAG_BY_REVISION: Duration = Duration::from_mins(1);

/// The number of recorded states per project or segment.
const MAX_STATES: usize = 32;

/// A part of a document whose state changes independently.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) enum DocumentPart {
    /// All flags of a project.
    Project(Arc<str>),
    /// A segment, by its id.
    Segment(i64),
}

/// A hash of a document part; [`EMPTY_STATE`] if the document has no flag of the project.
type StateHash = u128;

const EMPTY_STATE: StateHash = 0;

/// The state of each project and segment of a document.
#[derive(Debug, Default)]
pub(super) struct PartHashes(HashMap<DocumentPart, StateHash>);

impl PartHashes {
    /// Hashes a document, in time linear in its text.
    pub(super) fn from_document(document: &Document) -> Self {
        let mut states = HashMap::<DocumentPart, StateHash>::new();
        for feature in document.features() {
            let hash = xxh3_128(feature.raw().as_bytes());
            let part = DocumentPart::Project(Arc::clone(feature.project()));
            // Flag names are unique, so the sum does not depend on their order.
            let state = states.entry(part).or_default();
            *state = state.wrapping_add(hash);
        }
        for segment in document.segments() {
            states.insert(DocumentPart::Segment(segment.id()), xxh3_128(segment.raw().as_bytes()));
        }
        Self(states)
    }
}

/// Which token leads in which document part.
#[derive(Debug, Default)]
pub(super) struct TokenPrecedence {
    parts: HashMap<DocumentPart, PartHistory>,
    tokens: HashMap<TokenDigest, TrackedToken>,
}

/// A token, and when its view was last confirmed.
#[derive(Debug)]
struct TrackedToken {
    projects: Projects,
    revision: Option<u64>,
    confirmed: Instant,
    status: TokenStatus,
}

/// How a token's view competes with others.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum TokenStatus {
    /// The token is in use.
    InUse,
    /// The token is no longer in use: any other that is as new replaces it.
    Retired,
    /// The age of its state is unknown: any other replaces it.
    UnknownAge,
}

/// The states of a document part that have been the newest one, in order.
#[derive(Debug)]
struct PartHistory {
    states: VecDeque<StateHash>,
    /// The position of the first recorded state.
    first_position: u64,
    /// When the newest state became the newest.
    newest_since: Instant,
    leader: TokenDigest,
    views: HashMap<TokenDigest, PartView>,
}

/// One token's view of a document part.
#[derive(Debug)]
struct PartView {
    state: StateHash,
    /// The last position that it is known to have reached.
    position: Option<u64>,
    /// Whether its state is the one at that position.
    is_at_position: bool,
    /// When its state last changed, or was first observed.
    changed_at: Instant,
    has_changed: bool,
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
            DocumentPart::Segment(id) => states.0.contains_key(&DocumentPart::Segment(*id)),
        };
        // A project without flags in the document is an empty project; a missing segment is unknown.
        let mut parts: HashSet<&DocumentPart> =
            states.0.keys().filter(|part| named(part)).collect();
        let known_parts: Vec<_> = self.parts.keys().cloned().collect();
        parts.extend(known_parts.iter().filter(|part| named(part)));
        for part in parts {
            let state = states.0.get(part).copied().unwrap_or(EMPTY_STATE);
            self.ensure_history(part, token, is_new, now);
            self.observe_part(part, token, state, now);
        }
        for part in known_parts.iter().filter(|part| !named(part)) {
            self.remove_view(part, token, now);
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
        let Some(tracked) = self.tokens.get_mut(token) else { return false };
        if tracked.status == TokenStatus::InUse {
            tracked.status = TokenStatus::Retired;
        }
        let now = tracked.confirmed;
        let parts: Vec<_> = self.parts.keys().cloned().collect();
        let mut leads = false;
        for part in &parts {
            let Some(history) = self.parts.get_mut(part) else { continue };
            history.replace_retired_leader(token, &self.tokens);
            let is_needed = match part {
                DocumentPart::Project(project) => covered.contains(project),
                DocumentPart::Segment(_) => true,
            };
            let (is_leader, is_alone) = (history.leader == *token, history.views.len() == 1);
            // A segment that only this token has may belong to a flag in which it leads.
            if !is_leader || !is_needed || is_alone && !is_segment(part) {
                self.remove_view(part, token, now);
            } else {
                leads |= !is_alone;
            }
        }
        if !leads {
            self.remove_token(token, now);
        }
        leads
    }

    /// Removes a token with all its views.
    pub(super) fn remove_token(&mut self, token: &TokenDigest, now: Instant) {
        let parts: Vec<_> = self.parts.keys().cloned().collect();
        for part in &parts {
            self.remove_view(part, token, now);
        }
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

    /// Creates the history of a new document part. Tokens that already see the project are recorded as
    /// having seen it empty.
    fn ensure_history(
        &mut self,
        part: &DocumentPart,
        token: &TokenDigest,
        is_new: bool,
        now: Instant,
    ) {
        if self.parts.contains_key(part) {
            return;
        }
        let mut history = PartHistory {
            states: VecDeque::new(),
            first_position: 0,
            newest_since: now,
            leader: *token,
            views: HashMap::new(),
        };
        if let DocumentPart::Project(project) = part {
            let sees = |(other, tracked): &(&TokenDigest, &TrackedToken)| {
                tracked.projects.contains(project) && (*other != token || !is_new)
            };
            for (other, _) in self.tokens.iter().filter(sees) {
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
        }
        self.parts.insert(part.clone(), history);
    }

    fn observe_part(
        &mut self,
        part: &DocumentPart,
        token: &TokenDigest,
        state: StateHash,
        now: Instant,
    ) {
        let Self { parts, tokens } = self;
        let Some(history) = parts.get_mut(part) else { return };
        history.observe(token, state, now, tokens);
    }

    fn remove_view(&mut self, part: &DocumentPart, token: &TokenDigest, now: Instant) {
        let Some(history) = self.parts.get_mut(part) else { return };
        history.remove_token(token, now);
        if history.views.is_empty() {
            self.parts.remove(part);
        }
    }
}

fn is_segment(part: &DocumentPart) -> bool {
    matches!(part, DocumentPart::Segment(_))
}

impl PartHistory {
    /// The position of the newest state.
    fn newest_position(&self) -> Option<u64> {
        let count = u64::try_from(self.states.len()).expect("a usize fits into 64 bits");
        (self.first_position + count).checked_sub(1).filter(|_| count > 0)
    }

    fn observe(
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
    fn replace_retired_leader(
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

    /// Removes a token's view. If it was the leader, the most advanced other token leads.
    fn remove_token(&mut self, token: &TokenDigest, now: Instant) {
        self.views.remove(token);
        if self.leader != *token {
            return;
        }
        let furthest = self.views.iter().max_by_key(|(_, view)| (view.position, view.changed_at));
        let Some((other, state)) = furthest.map(|(other, view)| (*other, view.state)) else {
            return;
        };
        if self.states.back() == Some(&state) {
            self.leader = other;
        } else {
            self.append_state(&other, state, now);
        }
    }

    /// The views of tokens in use that differ from the leader's.
    fn diverging_views<'a>(
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
    fn next_timeout(&self, tokens: &HashMap<TokenDigest, TrackedToken>) -> Option<Instant> {
        let views = self.diverging_views(tokens).filter(|(token, _, view)| {
            self.can_overtake(view) && !has_newer_revision(&self.leader, token, tokens)
        });
        views.map(|(.., view)| view.changed_at + ORDER_TIMEOUT).min()
    }

    /// When to confirm again the views that wait because a leader is no longer in use.
    fn next_recheck(&self, tokens: &HashMap<TokenDigest, TrackedToken>) -> Option<Instant> {
        let leader = tokens.get(&self.leader).filter(|it| it.status != TokenStatus::InUse)?;
        let others = self.diverging_views(tokens);
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
    fn resolve_timeouts(
        &mut self,
        tokens: &HashMap<TokenDigest, TrackedToken>,
        now: Instant,
    ) -> bool {
        let Some(newest) = self.newest_position() else { return false };
        let leader = tokens.get(&self.leader);
        let mut last = None::<(Instant, TokenDigest, StateHash)>;
        for (token, tracked, view) in self.diverging_views(tokens) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::Token;

    /// Two tokens that see one project.
    struct Bed {
        precedence: TokenPrecedence,
        tokens: [TokenDigest; 2],
        start: Instant,
    }

    const ONE: usize = 0;
    const TWO: usize = 1;

    impl Bed {
        fn new() -> Self {
            let digest = |secret: &str| Token::parse(&format!("p:dev.{secret}")).unwrap().digest();
            let tokens = ["one", "two"].map(digest);
            Self { precedence: TokenPrecedence::default(), tokens, start: Instant::now() }
        }

        /// Observes the project with this flag, or without flags, `seconds` after the start.
        fn observe(&mut self, token: usize, flag: &str, revision: Option<u64>, seconds: u64) {
            let feature = format!(r#"{{"name":"{flag}","project":"p"}}"#);
            let features = if flag.is_empty() { String::new() } else { feature };
            let text = format!(r#"{{"features":[{features}]}}"#);
            let states = PartHashes::from_document(&Document::parse(text.as_bytes()).unwrap());
            let at = self.at(seconds);
            let token = self.tokens[token];
            self.precedence.observe(&token, &Projects::from_list(["p"]), &states, revision, at);
        }

        fn at(&self, seconds: u64) -> Instant {
            self.start + Duration::from_secs(seconds)
        }

        /// The leader after confirming these tokens `seconds` after the start.
        fn leader(&mut self, confirmed: &[usize], seconds: u64) -> usize {
            for token in confirmed {
                self.precedence.confirm(&self.tokens[*token], self.at(seconds));
            }
            self.precedence.resolve_timeouts(self.at(seconds));
            let leader = self.precedence.leader_of_project(&"p".into()).unwrap();
            self.tokens.iter().position(|it| it == leader).unwrap()
        }
    }

    #[test]
    fn token_that_moves_on_from_newest_state_leads() {
        let mut fixture = Bed::new();
        for token in [ONE, TWO] {
            fixture.observe(token, "a", None, 0);
        }
        fixture.observe(TWO, "b", None, 0);
        assert_eq!(fixture.leader(&[ONE, TWO], 0), TWO);
        fixture.observe(ONE, "b", None, 1);
        assert_eq!(fixture.leader(&[ONE, TWO], 1), TWO, "it is as new");
        fixture.observe(ONE, "", None, 2);
        assert_eq!(fixture.leader(&[ONE, TWO], 2), ONE);
    }

    #[test]
    fn flag_switched_back_is_not_mistaken_for_its_earlier_state() {
        let mut fixture = Bed::new();
        for token in [ONE, TWO] {
            fixture.observe(token, "on", None, 0);
        }
        fixture.observe(ONE, "off", None, 1);
        fixture.observe(ONE, "on", None, 2);
        // The other token's stream delivers the same changes later.
        fixture.observe(TWO, "off", None, 3);
        assert_eq!(fixture.leader(&[ONE, TWO], 20), ONE, "an earlier change");
        fixture.observe(TWO, "on", None, 21);
        fixture.observe(TWO, "off", None, 22);
        assert_eq!(fixture.leader(&[ONE, TWO], 22), TWO);
    }

    #[test]
    fn last_change_wins_after_5_s_if_order_is_ambiguous() {
        let mut fixture = Bed::new();
        for token in [ONE, TWO] {
            fixture.observe(token, "a", None, 0);
        }
        fixture.observe(ONE, "b", None, 1);
        fixture.observe(TWO, "c", None, 2);
        assert_eq!(fixture.leader(&[ONE, TWO], 2), ONE);
        assert_eq!(fixture.precedence.next_timeout(), Some(fixture.at(2) + ORDER_TIMEOUT));
        assert_eq!(fixture.leader(&[ONE, TWO], 7), TWO);
        assert_eq!(fixture.precedence.next_timeout(), None);
    }

    #[test]
    fn new_token_with_other_state_waits_while_leader_is_confirmed() {
        let mut fixture = Bed::new();
        fixture.observe(ONE, "a", None, 0);
        fixture.observe(TWO, "old", None, 1);
        assert_eq!(fixture.precedence.next_timeout(), None);
        for minute in 1..5 {
            assert_eq!(fixture.leader(&[ONE, TWO], 60 * minute), ONE);
        }
        assert_eq!(fixture.leader(&[TWO], 300 - 31), ONE);
        assert_eq!(fixture.leader(&[TWO], 300), TWO, "upstream no longer confirms the leader");
    }

    #[test]
    fn newer_revision_leads() {
        let mut fixture = Bed::new();
        fixture.observe(ONE, "a", Some(5), 0);
        fixture.observe(TWO, "older", Some(4), 0);
        assert_eq!(fixture.leader(&[], 0), ONE);
        fixture.observe(TWO, "newer", Some(7), 0);
        assert_eq!(fixture.leader(&[], 0), TWO);
    }

    #[test]
    fn token_with_flags_leads_over_token_that_sees_project_empty() {
        let mut fixture = Bed::new();
        fixture.observe(ONE, "", None, 0);
        fixture.observe(TWO, "a", None, 0);
        assert_eq!(fixture.leader(&[ONE, TWO], 60), TWO);
    }

    #[test]
    fn retired_leader_is_replaced_by_token_as_new_or_confirmed_since() {
        let all = Projects::All;
        let mut fixture = Bed::new();
        fixture.observe(ONE, "a", None, 0);
        fixture.observe(TWO, "b", None, 0);
        let one = fixture.tokens[ONE];
        assert!(fixture.precedence.retire(&one, &all));
        assert_eq!(fixture.leader(&[TWO], 4), ONE);
        assert_eq!(fixture.leader(&[TWO], 5), TWO);
        assert!(!fixture.precedence.retire(&one, &all));

        let mut fixture = Bed::new();
        fixture.observe(ONE, "a", None, 0);
        fixture.observe(TWO, "b", None, 0);
        assert!(fixture.precedence.retire(&one, &all));
        fixture.observe(TWO, "a", None, 1);
        assert_eq!(fixture.leader(&[TWO], 1), TWO);
    }

    #[test]
    fn number_of_recorded_states_is_bounded() {
        let mut fixture = Bed::new();
        for n in 0..100 {
            fixture.observe(ONE, &format!("f{n}"), None, n);
        }
        assert!(fixture.precedence.parts.values().all(|it| it.states.len() <= MAX_STATES));
        fixture.observe(TWO, "f3", None, 100);
        assert_eq!(fixture.leader(&[ONE, TWO], 100), ONE);
        let two = fixture.tokens[TWO];
        fixture.precedence.remove_token(&two, fixture.at(100));
        assert_eq!((fixture.precedence.tokens.len(), fixture.leader(&[ONE], 101)), (1, ONE));
    }
}
