//! Decides which of several tokens' documents has the newest state of each project and segment.
//!
//! Upstream does not say how old a document is. What is known is that each token's view only moves
//! forward, though some lag: replicas and streams are not equally fast. So the states of a project are
//! kept in their order, and a token takes the lead in it by moving on from the newest state. One that
//! shows a state that others have left is behind. Where the order cannot be told, as of a token that
//! has missed some states, it mostly shows within a moment; then the last change counts. A leader that
//! is not confirmed any more gives way to those that are. What an earlier run has served leads at the
//! start, as a token does that is not in use any more.
//!
//! Pure: times are arguments, and documents are known by hashes of their text.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_128;

use crate::{
    token::{Projects, TokenDigest},
    wire::features::{Document, EarlierRun},
};

/// How long the others have time to show the order of two states that cannot be told.
const DOUBT: Duration = Duration::from_secs(5);

/// The longest that a view is expected to lag behind another.
const LONGEST_LAG: Duration = Duration::from_secs(30);

/// The same behind a token that is not in use any more: the new one has just been asked with.
const LAG_BEHIND_RETIRED: Duration = Duration::from_secs(5);

/// The same where upstream's revisions say that the view is behind: upstream may have been restored from a
/// backup, and count from there.
const LAG_BY_REVISION: Duration = Duration::from_mins(1);

/// How many states of a project or segment are remembered.
const REMEMBERED: usize = 32;

/// A part of a document whose state changes on its own.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) enum Unit {
    /// All flags of a project.
    Project(Arc<str>),
    /// A segment, by its id.
    Segment(i64),
}

/// A hash of what a document has of a unit; [`NOTHING`] if it has no flag of the project.
type State = u128;

const NOTHING: State = 0;

/// The state of each project and segment of a document.
#[derive(Debug, Default)]
pub(super) struct States(HashMap<Unit, State>);

impl States {
    /// Hashes a document: work for as much text as it has.
    pub(super) fn of(document: &Document) -> Self {
        let mut states = HashMap::<Unit, State>::new();
        for feature in document.features() {
            let hash = xxh3_128(feature.raw().as_bytes());
            let unit = Unit::Project(Arc::clone(feature.project()));
            // Names are unique, so that the order of the flags does not matter.
            let state = states.entry(unit).or_default();
            *state = state.wrapping_add(hash);
        }
        for segment in document.segments() {
            states.insert(Unit::Segment(segment.id()), xxh3_128(segment.raw().as_bytes()));
        }
        Self(states)
    }
}

/// Which token leads in which unit.
#[derive(Debug, Default)]
pub(super) struct Precedence {
    units: HashMap<Unit, History>,
    tokens: HashMap<TokenDigest, Known>,
}

/// A token, and what it shows.
#[derive(Debug)]
struct Known {
    projects: Projects,
    revision: Option<u64>,
    confirmed: Instant,
    standing: Standing,
}

/// How much counts what a token shows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Standing {
    /// It is in use.
    InUse,
    /// It is not in use any more, and gives way to any other that is as new.
    Retired,
    /// Nothing is known of its age: it gives way to any other.
    Ageless,
}

/// The states of a unit that have been the newest one, in their order.
#[derive(Debug)]
struct History {
    states: VecDeque<State>,
    /// The position of the first of them.
    first: u64,
    /// When the newest one became that.
    since: Instant,
    leader: TokenDigest,
    views: HashMap<TokenDigest, View>,
}

/// What one token shows of a unit.
#[derive(Debug)]
struct View {
    state: State,
    /// The last position that it is known to have reached.
    reached: Option<u64>,
    /// Whether its state is the one of that position.
    is_placed: bool,
    /// When it changed to its state, or was first seen.
    since: Instant,
    has_changed: bool,
}

impl Precedence {
    /// Takes over what a token shows now. `revision` is upstream's number of that state, where upstream
    /// counts in a way that tokens can be compared by.
    pub(super) fn observe(
        &mut self,
        token: &TokenDigest,
        projects: &Projects,
        states: &States,
        revision: Option<u64>,
        now: Instant,
    ) {
        let is_new = self.tokens.get(token).is_none_or(|known| known.standing != Standing::InUse);
        let known = Known {
            projects: projects.clone(),
            revision,
            confirmed: now,
            standing: Standing::InUse,
        };
        self.tokens.insert(*token, known);
        let named = |unit: &Unit| match unit {
            Unit::Project(project) => projects.contains(project),
            Unit::Segment(id) => states.0.contains_key(&Unit::Segment(*id)),
        };
        // A project that the document has no flag of is one without flags; a segment, one unknown.
        let mut units: HashSet<&Unit> = states.0.keys().filter(|unit| named(unit)).collect();
        let known_units: Vec<_> = self.units.keys().cloned().collect();
        units.extend(known_units.iter().filter(|unit| named(unit)));
        for unit in units {
            let state = states.0.get(unit).copied().unwrap_or(NOTHING);
            self.begin(unit, token, is_new, now);
            self.observe_unit(unit, token, state, now);
        }
        for unit in known_units.iter().filter(|unit| !named(unit)) {
            self.forget_view(unit, token, now);
        }
    }

    /// Begins with what an earlier run has left, under the name of a token that nobody uses. Where that run
    /// has served it, others must be as new, or be confirmed after a while, to take the lead.
    pub(super) fn inherit(
        &mut self,
        token: &TokenDigest,
        projects: &Projects,
        states: &States,
        served: Option<EarlierRun>,
        now: Instant,
    ) {
        self.observe(token, projects, states, served.and_then(|it| it.upstream_revision), now);
        if let Some(known) = self.tokens.get_mut(token) {
            known.standing = if served.is_some() { Standing::Retired } else { Standing::Ageless };
        }
    }

    /// Takes note that what a token shows is confirmed at this time.
    pub(super) fn confirm(&mut self, token: &TokenDigest, at: Instant) {
        if let Some(known) = self.tokens.get_mut(token) {
            known.confirmed = known.confirmed.max(at);
        }
    }

    /// Takes note that what a token shows is the state of this revision as well.
    pub(super) fn reach_revision(&mut self, token: &TokenDigest, revision: Option<u64>) {
        if let Some(known) = self.tokens.get_mut(token) {
            known.revision = known.revision.max(revision);
        }
    }

    /// Takes note that a token is not in use any more: it stays the leader only where `covered`, which
    /// another in use sees, and nobody is known to be as new. True if what others show is not as new still.
    pub(super) fn retire(&mut self, token: &TokenDigest, covered: &Projects) -> bool {
        let Some(known) = self.tokens.get_mut(token) else { return false };
        if known.standing == Standing::InUse {
            known.standing = Standing::Retired;
        }
        let now = known.confirmed;
        let units: Vec<_> = self.units.keys().cloned().collect();
        let mut leads = false;
        for unit in &units {
            let Some(history) = self.units.get_mut(unit) else { continue };
            history.give_way(token, &self.tokens);
            let is_needed = match unit {
                Unit::Project(project) => covered.contains(project),
                Unit::Segment(_) => true,
            };
            let (is_leader, is_alone) = (history.leader == *token, history.views.len() == 1);
            // A segment that no other has may be one of a flag that it leads in.
            if !is_leader || !is_needed || is_alone && !is_segment(unit) {
                self.forget_view(unit, token, now);
            } else {
                leads |= !is_alone;
            }
        }
        if !leads {
            self.forget(token, now);
        }
        leads
    }

    /// Drops all that a token shows.
    pub(super) fn forget(&mut self, token: &TokenDigest, now: Instant) {
        let units: Vec<_> = self.units.keys().cloned().collect();
        for unit in &units {
            self.forget_view(unit, token, now);
        }
        self.tokens.remove(token);
    }

    /// Has time decide where the order cannot be told; true if another token leads in something.
    pub(super) fn settle(&mut self, now: Instant) -> bool {
        let mut has_changed = false;
        for history in self.units.values_mut() {
            has_changed |= history.settle(&self.tokens, now);
        }
        has_changed
    }

    /// When time decides next, if it is to.
    pub(super) fn next_decision(&self) -> Option<Instant> {
        self.units.values().filter_map(|history| history.next_decision(&self.tokens)).min()
    }

    /// When to ask again with tokens whose answers do not count yet, because what is not in use any more may
    /// be newer; if that is of use.
    pub(super) fn next_question(&self) -> Option<Instant> {
        self.units.values().filter_map(|history| history.next_question(&self.tokens)).min()
    }

    /// Whose document has the newest state of a project.
    pub(super) fn leader_of_project(&self, project: &Arc<str>) -> Option<&TokenDigest> {
        Some(&self.units.get(&Unit::Project(Arc::clone(project)))?.leader)
    }

    /// The leader of each unit.
    pub(super) fn leaders(&self) -> impl Iterator<Item = (&Unit, &TokenDigest)> {
        self.units.iter().map(|(unit, history)| (unit, &history.leader))
    }

    /// Makes a history for a unit that was not known. Tokens that see a project have shown that it had
    /// no flags, as far as they knew.
    fn begin(&mut self, unit: &Unit, token: &TokenDigest, is_new: bool, now: Instant) {
        if self.units.contains_key(unit) {
            return;
        }
        let mut history = History {
            states: VecDeque::new(),
            first: 0,
            since: now,
            leader: *token,
            views: HashMap::new(),
        };
        if let Unit::Project(project) = unit {
            let sees = |(other, known): &(&TokenDigest, &Known)| {
                known.projects.contains(project) && (*other != token || !is_new)
            };
            for (other, _) in self.tokens.iter().filter(sees) {
                history.states = VecDeque::from([NOTHING]);
                history.leader = *other;
                let view = View {
                    state: NOTHING,
                    reached: Some(0),
                    is_placed: true,
                    since: now,
                    has_changed: false,
                };
                history.views.insert(*other, view);
            }
        }
        self.units.insert(unit.clone(), history);
    }

    fn observe_unit(&mut self, unit: &Unit, token: &TokenDigest, state: State, now: Instant) {
        let Self { units, tokens } = self;
        let Some(history) = units.get_mut(unit) else { return };
        history.observe(token, state, now, tokens);
    }

    fn forget_view(&mut self, unit: &Unit, token: &TokenDigest, now: Instant) {
        let Some(history) = self.units.get_mut(unit) else { return };
        history.forget(token, now);
        if history.views.is_empty() {
            self.units.remove(unit);
        }
    }
}

fn is_segment(unit: &Unit) -> bool {
    matches!(unit, Unit::Segment(_))
}

impl History {
    /// The position of the newest state.
    fn newest(&self) -> Option<u64> {
        let count = u64::try_from(self.states.len()).expect("a usize fits into 64 bits");
        (self.first + count).checked_sub(1).filter(|_| count > 0)
    }

    fn observe(
        &mut self,
        token: &TokenDigest,
        state: State,
        now: Instant,
        tokens: &HashMap<TokenDigest, Known>,
    ) {
        let Some(newest) = self.newest() else { return self.advance(token, state, now) };
        let (reached, is_first) = match self.views.get_mut(token) {
            Some(view) if view.state == state => return,
            Some(view) => (view.reached, false),
            None => (None, true),
        };
        let leader = tokens.get(&self.leader);
        let is_ageless = leader.is_some_and(|it| it.standing == Standing::Ageless);
        let is_behind = is_newer(&self.leader, token, tokens);
        let moves_on = self.leader == *token || reached == Some(newest) && !is_behind;
        if is_ageless || !is_first && moves_on {
            return self.advance(token, state, now);
        }
        let position = self.position(state, reached, is_first);
        if position.is_none() && is_newer(token, &self.leader, tokens) {
            return self.advance(token, state, now);
        }
        let view = View {
            state,
            reached: position.or(reached),
            is_placed: position.is_some(),
            since: now,
            has_changed: !is_first,
        };
        self.views.insert(*token, view);
        let leader = self.leader;
        self.give_way(&leader, tokens);
    }

    /// Where a state stands: for a token that has moved on, behind the position that it had `reached`,
    /// and no further than it must be; for a new one as far as it can be.
    fn position(&self, state: State, reached: Option<u64>, is_first: bool) -> Option<u64> {
        let mut positions = (self.first..)
            .zip(&self.states)
            .filter(|(at, it)| **it == state && reached.is_none_or(|reached| *at > reached));
        let found = if is_first { positions.last() } else { positions.next() };
        found.map(|(at, _)| at)
    }

    /// Makes this state, which a token shows, the newest one.
    fn advance(&mut self, token: &TokenDigest, state: State, now: Instant) {
        self.states.push_back(state);
        if self.states.len() > REMEMBERED {
            self.states.pop_front();
            self.first += 1;
        }
        self.leader = *token;
        self.since = now;
        let newest = self.newest();
        for view in self.views.values_mut().filter(|it| !it.is_placed && it.state == state) {
            (view.reached, view.is_placed) = (newest, true);
        }
        let has_changed = self.views.contains_key(token);
        let view = View { state, reached: newest, is_placed: true, since: now, has_changed };
        self.views.insert(*token, view);
    }

    /// Has another lead instead of a retired leader that is as new.
    fn give_way(&mut self, token: &TokenDigest, tokens: &HashMap<TokenDigest, Known>) {
        let is_retired = |token| tokens.get(token).is_none_or(|it| it.standing != Standing::InUse);
        if self.leader != *token || !is_retired(token) {
            return;
        }
        let newest = self.newest();
        let as_new = self.views.iter().find(|(other, view)| {
            *other != token && !is_retired(other) && view.is_placed && view.reached == newest
        });
        if let Some((other, _)) = as_new {
            self.leader = *other;
        }
    }

    /// Drops what a token shows; if it was the leader, the one follows that has come furthest.
    fn forget(&mut self, token: &TokenDigest, now: Instant) {
        self.views.remove(token);
        if self.leader != *token {
            return;
        }
        let furthest = self.views.iter().max_by_key(|(_, view)| (view.reached, view.since));
        let Some((other, state)) = furthest.map(|(other, view)| (*other, view.state)) else {
            return;
        };
        if self.states.back() == Some(&state) {
            self.leader = other;
        } else {
            self.advance(&other, state, now);
        }
    }

    /// The views of tokens in use that differ from the leader's.
    fn others<'a>(
        &'a self,
        tokens: &'a HashMap<TokenDigest, Known>,
    ) -> impl Iterator<Item = (&'a TokenDigest, &'a Known, &'a View)> {
        let newest = self.states.back();
        let views =
            self.views.iter().filter_map(|(token, view)| Some((token, tokens.get(token)?, view)));
        views.filter(move |(token, known, view)| {
            let is_in_use = known.standing == Standing::InUse;
            **token != self.leader && is_in_use && newest != Some(&view.state)
        })
    }

    /// Whether a view may lead although its place is not known: it changed later than the leader's, or
    /// no flag of the project was ever seen.
    fn may_overtake(&self, view: &View) -> bool {
        let is_last_change = view.has_changed && view.since >= self.since;
        let was_empty = self.first == 0 && self.states.iter().eq([&NOTHING]);
        !view.is_placed && (is_last_change || was_empty)
    }

    /// When time decides about a view whose place is not known.
    fn next_decision(&self, tokens: &HashMap<TokenDigest, Known>) -> Option<Instant> {
        let views = self.others(tokens).filter(|(token, _, view)| {
            self.may_overtake(view) && !is_newer(&self.leader, token, tokens)
        });
        views.map(|(.., view)| view.since + DOUBT).min()
    }

    /// When those views are to be confirmed again that a leader which is not in use holds up.
    fn next_question(&self, tokens: &HashMap<TokenDigest, Known>) -> Option<Instant> {
        let leader = tokens.get(&self.leader).filter(|it| it.standing != Standing::InUse)?;
        let others = self.others(tokens);
        others.map(|(token, ..)| leader.confirmed + self.patience(leader, token, tokens)).min()
    }

    /// How long after the leader was confirmed a view must be confirmed that differs, so as to count.
    fn patience(
        &self,
        leader: &Known,
        token: &TokenDigest,
        tokens: &HashMap<TokenDigest, Known>,
    ) -> Duration {
        if is_newer(&self.leader, token, tokens) {
            return LAG_BY_REVISION;
        }
        match leader.standing {
            Standing::InUse => LONGEST_LAG,
            Standing::Retired | Standing::Ageless => LAG_BEHIND_RETIRED,
        }
    }

    /// Has time decide: true if another token leads from now on.
    fn settle(&mut self, tokens: &HashMap<TokenDigest, Known>, now: Instant) -> bool {
        let Some(newest) = self.newest() else { return false };
        let leader = tokens.get(&self.leader);
        let mut last = None::<(Instant, TokenDigest, State)>;
        for (token, known, view) in self.others(tokens) {
            let is_leader_silent = leader.is_none_or(|leader| {
                let patience = self.patience(leader, token, tokens);
                known.confirmed.saturating_duration_since(leader.confirmed) >= patience
            });
            let is_decided = self.may_overtake(view)
                && !is_newer(&self.leader, token, tokens)
                && now >= view.since + DOUBT;
            if (is_leader_silent || is_decided) && last.is_none_or(|it| view.since > it.0) {
                last = Some((view.since, *token, view.state));
            }
        }
        let (state, since) = (self.states.back().copied(), self.since);
        for (token, view) in self.views.iter_mut().filter(|(_, view)| Some(view.state) == state) {
            // It may have had this state before the others left it and came back to it.
            let confirmed =
                tokens.get(token).map(|it| it.confirmed.saturating_duration_since(since));
            if confirmed.is_some_and(|it| it >= LONGEST_LAG) {
                (view.reached, view.is_placed) = (Some(newest), true);
            }
        }
        let Some((since, token, state)) = last else { return false };
        self.advance(&token, state, since);
        true
    }
}

/// Whether upstream's numbers say that what a token shows is newer than what another does.
fn is_newer(
    token: &TokenDigest,
    other: &TokenDigest,
    tokens: &HashMap<TokenDigest, Known>,
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
        precedence: Precedence,
        tokens: [TokenDigest; 2],
        start: Instant,
    }

    const ONE: usize = 0;
    const TWO: usize = 1;

    impl Bed {
        fn new() -> Self {
            let digest = |secret: &str| Token::parse(&format!("p:dev.{secret}")).unwrap().digest();
            let tokens = ["one", "two"].map(digest);
            Self { precedence: Precedence::default(), tokens, start: Instant::now() }
        }

        /// A token shows the project with this flag, or without any, so many seconds after the start.
        fn show(&mut self, token: usize, flag: &str, revision: Option<u64>, seconds: u64) {
            let feature = format!(r#"{{"name":"{flag}","project":"p"}}"#);
            let features = if flag.is_empty() { String::new() } else { feature };
            let text = format!(r#"{{"features":[{features}]}}"#);
            let states = States::of(&Document::parse(text.as_bytes()).unwrap());
            let at = self.at(seconds);
            let token = self.tokens[token];
            self.precedence.observe(&token, &Projects::from_list(["p"]), &states, revision, at);
        }

        fn at(&self, seconds: u64) -> Instant {
            self.start + Duration::from_secs(seconds)
        }

        /// Who leads, once those are confirmed at this time.
        fn leader(&mut self, confirmed: &[usize], seconds: u64) -> usize {
            for token in confirmed {
                self.precedence.confirm(&self.tokens[*token], self.at(seconds));
            }
            self.precedence.settle(self.at(seconds));
            let leader = self.precedence.leader_of_project(&"p".into()).unwrap();
            self.tokens.iter().position(|it| it == leader).unwrap()
        }
    }

    #[test]
    fn token_that_moves_on_from_the_newest_state_leads() {
        let mut bed = Bed::new();
        for token in [ONE, TWO] {
            bed.show(token, "a", None, 0);
        }
        bed.show(TWO, "b", None, 0);
        assert_eq!(bed.leader(&[ONE, TWO], 0), TWO);
        bed.show(ONE, "b", None, 1);
        assert_eq!(bed.leader(&[ONE, TWO], 1), TWO, "it is as new");
        bed.show(ONE, "", None, 2);
        assert_eq!(bed.leader(&[ONE, TWO], 2), ONE);
    }

    #[test]
    fn flag_that_is_switched_back_is_not_mistaken_for_the_state_before() {
        let mut bed = Bed::new();
        for token in [ONE, TWO] {
            bed.show(token, "on", None, 0);
        }
        bed.show(ONE, "off", None, 1);
        bed.show(ONE, "on", None, 2);
        // The stream of the other tells the same, later.
        bed.show(TWO, "off", None, 3);
        assert_eq!(bed.leader(&[ONE, TWO], 20), ONE, "that was before");
        bed.show(TWO, "on", None, 21);
        bed.show(TWO, "off", None, 22);
        assert_eq!(bed.leader(&[ONE, TWO], 22), TWO);
    }

    #[test]
    fn last_change_counts_after_a_moment_where_the_order_cannot_be_told() {
        let mut bed = Bed::new();
        for token in [ONE, TWO] {
            bed.show(token, "a", None, 0);
        }
        bed.show(ONE, "b", None, 1);
        bed.show(TWO, "c", None, 2);
        assert_eq!(bed.leader(&[ONE, TWO], 2), ONE);
        assert_eq!(bed.precedence.next_decision(), Some(bed.at(2) + DOUBT));
        assert_eq!(bed.leader(&[ONE, TWO], 7), TWO);
        assert_eq!(bed.precedence.next_decision(), None);
    }

    #[test]
    fn token_that_comes_with_another_state_waits_while_the_leader_is_confirmed() {
        let mut bed = Bed::new();
        bed.show(ONE, "a", None, 0);
        bed.show(TWO, "old", None, 1);
        assert_eq!(bed.precedence.next_decision(), None);
        for minute in 1..5 {
            assert_eq!(bed.leader(&[ONE, TWO], 60 * minute), ONE);
        }
        assert_eq!(bed.leader(&[TWO], 300 - 31), ONE);
        assert_eq!(bed.leader(&[TWO], 300), TWO, "upstream does not answer to the other any more");
    }

    #[test]
    fn revisions_tell_the_order() {
        let mut bed = Bed::new();
        bed.show(ONE, "a", Some(5), 0);
        bed.show(TWO, "older", Some(4), 0);
        assert_eq!(bed.leader(&[], 0), ONE);
        bed.show(TWO, "newer", Some(7), 0);
        assert_eq!(bed.leader(&[], 0), TWO);
    }

    #[test]
    fn project_that_the_leader_shows_without_flags_is_shown_with_those_of_another() {
        let mut bed = Bed::new();
        bed.show(ONE, "", None, 0);
        bed.show(TWO, "a", None, 0);
        assert_eq!(bed.leader(&[ONE, TWO], 60), TWO);
    }

    #[test]
    fn retired_leader_gives_way_to_a_token_that_is_as_new_or_confirmed_since() {
        let all = Projects::All;
        let mut bed = Bed::new();
        bed.show(ONE, "a", None, 0);
        bed.show(TWO, "b", None, 0);
        let one = bed.tokens[ONE];
        assert!(bed.precedence.retire(&one, &all));
        assert_eq!(bed.leader(&[TWO], 4), ONE);
        assert_eq!(bed.leader(&[TWO], 5), TWO);
        assert!(!bed.precedence.retire(&one, &all));

        let mut bed = Bed::new();
        bed.show(ONE, "a", None, 0);
        bed.show(TWO, "b", None, 0);
        assert!(bed.precedence.retire(&one, &all));
        bed.show(TWO, "a", None, 1);
        assert_eq!(bed.leader(&[TWO], 1), TWO);
    }

    #[test]
    fn few_states_are_remembered() {
        let mut bed = Bed::new();
        for n in 0..100 {
            bed.show(ONE, &format!("f{n}"), None, n);
        }
        assert!(bed.precedence.units.values().all(|it| it.states.len() <= REMEMBERED));
        bed.show(TWO, "f3", None, 100);
        assert_eq!(bed.leader(&[ONE, TWO], 100), ONE);
        let two = bed.tokens[TWO];
        bed.precedence.forget(&two, bed.at(100));
        assert_eq!((bed.precedence.tokens.len(), bed.leader(&[ONE], 101)), (1, ONE));
    }
}
