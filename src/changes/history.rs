//! The latest states of one environment.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::watch, time::Instant};

use crate::{
    protocol::{
        delta::{self, Change},
        features::Document,
    },
    served::{ServedSnapshot, StateId},
};

/// Maximum number of states, the same as in Unleash Edge.
const MAX_STATES: usize = 100;

/// Memory limit of all states but the current one, in bytes.
const MAX_BYTES: usize = 32 << 20;

/// One state.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) id: StateId,
    /// All flags and segments.
    pub(super) document: Arc<Document>,
    /// When its source sent it.
    pub(super) received_at: Instant,
}

impl State {
    fn of(snapshot: &ServedSnapshot) -> Self {
        Self {
            id: snapshot.state_id(),
            document: Arc::clone(snapshot.document()),
            received_at: snapshot.received_at(),
        }
    }
}

/// The latest states of one environment, at least the current one.
#[derive(Debug)]
pub(super) struct StateHistory {
    states: Mutex<States>,
    current: watch::Sender<StateId>,
}

#[derive(Debug)]
struct States {
    /// The states before the current one, the oldest first, each with the bytes that it adds.
    previous: VecDeque<(State, usize)>,
    /// The memory of the previous states that is not shared with the current one, in bytes.
    previous_bytes: usize,
    current: State,
}

impl StateHistory {
    /// Starts with this state.
    pub(super) fn new(snapshot: &ServedSnapshot) -> Self {
        let current = State::of(snapshot);
        let id = current.id;
        let states = States { previous: VecDeque::new(), previous_bytes: 0, current };
        Self { states: Mutex::new(states), current: watch::Sender::new(id) }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<StateId> {
        self.current.subscribe()
    }

    /// Adds the currently served snapshot, if its state is new. `current` is called under the lock, so
    /// that concurrent calls cannot add an older state after a newer one.
    pub(super) fn refresh(&self, current: impl FnOnce() -> Option<Arc<ServedSnapshot>>) {
        let mut states = self.lock();
        let Some(snapshot) = current() else { return };
        let is_new = states.push_if_changed(&snapshot);
        // Thousands of subscribers may wake, and each takes this lock first.
        drop(states);
        if is_new {
            self.current.send_if_modified(|id| {
                let newest = self.lock().current.id;
                std::mem::replace(id, newest) != newest
            });
        }
    }

    /// The state with the id `base`, if it is still in the history, and the current state.
    pub(super) fn base_and_current(&self, base: Option<StateId>) -> (Option<State>, State) {
        let states = self.lock();
        let find = |id: StateId| {
            if states.current.id == id {
                return Some(&states.current);
            }
            states.previous.iter().map(|(state, _)| state).find(|state| state.id == id)
        };
        (base.and_then(find).cloned(), states.current.clone())
    }

    /// Ignores poisoning: a panic under this lock leaves consistent states.
    fn lock(&self) -> MutexGuard<'_, States> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl States {
    /// Makes the snapshot's state the current one. Returns whether it is new.
    fn push_if_changed(&mut self, snapshot: &ServedSnapshot) -> bool {
        if snapshot.state_id() == self.current.id {
            return false;
        }
        let lost = delta::diff(snapshot.document(), &self.current.document);
        let before = std::mem::replace(&mut self.current, State::of(snapshot));
        let weight = exclusive_bytes(&before.document, &lost);
        self.previous_bytes += weight;
        self.previous.push_back((before, weight));
        while self.previous.len() >= MAX_STATES || self.previous_bytes > MAX_BYTES {
            let Some((_, weight)) = self.previous.pop_front() else { break };
            self.previous_bytes -= weight;
        }
        true
    }
}

/// The memory of a document that it does not share with its successor, in bytes: its lists, and the text
/// of the flags and segments in `lost`.
fn exclusive_bytes(document: &Document, lost: &[Change]) -> usize {
    let handles = size_of_val(document.features()) + size_of_val(document.segments());
    let text = |change: &Change| match change {
        Change::FeatureUpdated(feature) => feature.raw().len(),
        Change::SegmentUpdated(segment) => segment.raw().len(),
        Change::Hydration(_) | Change::FeatureRemoved { .. } | Change::SegmentRemoved(_) => 0,
    };
    handles + lost.iter().map(text).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::{Environment, Projects, Scope};

    #[test]
    fn history_is_limited_in_number_and_in_bytes() {
        let scope = Scope { environment: Environment::new("development"), projects: Projects::All };
        let document = |text: &str| Document::parse(text.as_bytes()).unwrap();
        let empty = document(r#"{"features":[]}"#);
        let mut served = Arc::new(ServedSnapshot::build(scope.clone(), empty, None));
        let history = StateHistory::new(&served);
        let first = history.subscribe().borrow().get();
        let mut replace = |text: &str| {
            let next = ServedSnapshot::rebuild_from(&served, scope.clone(), document(text), None);
            served = Arc::new(next);
            history.refresh(|| Some(Arc::clone(&served)));
        };
        for n in 1..=300 {
            replace(&format!(r#"{{"features":[{{"name":"a","x":{n}}}]}}"#));
        }
        assert_eq!(history.subscribe().borrow().get(), first + 300);
        let known = |id| history.base_and_current(StateId::new(id)).0.is_some();
        assert!(!known(first + 200) && known(first + 201) && known(first + 300));
        for large in ["x", "y", "z"] {
            let text = large.repeat(20 << 20);
            replace(&format!(r#"{{"features":[{{"name":"a","x":"{text}"}}]}}"#));
        }
        assert!(!known(first + 301) && known(first + 302) && known(first + 303));
        assert!(history.lock().previous_bytes <= MAX_BYTES);
    }
}
