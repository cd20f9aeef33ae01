//! The latest states of one environment.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::watch, time::Instant};

use crate::{
    snapshot::Snapshot,
    wire::{
        delta::{self, Change},
        features::Document,
    },
};

/// Maximum number of states, the same as in Unleash Edge.
const STATES: usize = 100;

/// Memory limit of all states but the current one, in bytes.
const BYTES: usize = 32 << 20;

/// The id of a state within its environment, from 1 to 2^31 - 1. Subscribers see it as an event id,
/// which also depends on their scope ([`SubscriptionKey::event_id`](super::SubscriptionKey::event_id)).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Number(pub(super) u32);

/// One state.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) number: Number,
    /// All flags and segments.
    pub(super) document: Arc<Document>,
    /// When its source sent it.
    pub(super) told: Instant,
}

/// The latest states of one environment, at least the current one.
#[derive(Debug)]
pub(super) struct Log {
    states: Mutex<States>,
    current: watch::Sender<Number>,
}

#[derive(Debug)]
struct States {
    /// The states before the current one, the oldest first, each with the bytes that it adds.
    earlier: VecDeque<(State, usize)>,
    /// The memory of the previous states that is not shared with the current one, in bytes.
    bytes: usize,
    current: State,
}

impl Log {
    /// Starts with this state. Its id is random, so that it is unlikely to repeat an id that an earlier
    /// process sent.
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let id = Number(rand::random_range(1..1 << 30));
        let document = Arc::clone(snapshot.document());
        let current = State { number: id, document, told: snapshot.received() };
        let states = States { earlier: VecDeque::new(), bytes: 0, current };
        Self { states: Mutex::new(states), current: watch::Sender::new(id) }
    }

    pub(super) fn follow(&self) -> watch::Receiver<Number> {
        self.current.subscribe()
    }

    /// Adds the currently served snapshot, if its state is new. `current` is called under the lock, so
    /// that concurrent calls cannot add an older state after a newer one.
    pub(super) fn catch_up(&self, current: impl FnOnce() -> Option<Arc<Snapshot>>) {
        let mut states = self.lock();
        let Some(snapshot) = current() else { return };
        let is_new = states.take(&snapshot);
        // Thousands of subscribers may wake, and each takes this lock first.
        drop(states);
        if is_new {
            self.current.send_if_modified(|id| {
                let newest = self.lock().current.number;
                std::mem::replace(id, newest) != newest
            });
        }
    }

    /// The state with the id `base`, if it is still in the history, and the current state.
    pub(super) fn between(&self, base: Option<Number>) -> (Option<State>, State) {
        let states = self.lock();
        let find = |id: Number| {
            if states.current.number == id {
                return Some(&states.current);
            }
            states.earlier.iter().map(|(state, _)| state).find(|state| state.number == id)
        };
        (base.and_then(find).cloned(), states.current.clone())
    }

    /// Ignores poisoning: a panic under this lock leaves consistent states.
    fn lock(&self) -> MutexGuard<'_, States> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl States {
    /// Makes the snapshot's document the current state, unless it has the same content. Returns whether
    /// the state is new.
    fn take(&mut self, snapshot: &Snapshot) -> bool {
        let document = snapshot.document();
        if Arc::ptr_eq(document, &self.current.document) {
            return false;
        }
        let lost = delta::diff(document, &self.current.document);
        if lost.is_empty() {
            self.current.document = Arc::clone(document);
            return false;
        }
        let Number(last) = self.current.number;
        let id = Number(if last < u32::MAX >> 1 { last + 1 } else { 1 });
        let next = State { number: id, document: Arc::clone(document), told: snapshot.received() };
        let before = std::mem::replace(&mut self.current, next);
        let weight = weight(&before.document, &lost);
        self.bytes += weight;
        self.earlier.push_back((before, weight));
        while self.earlier.len() >= STATES || self.bytes > BYTES {
            let Some((_, weight)) = self.earlier.pop_front() else { break };
            self.bytes -= weight;
        }
        true
    }
}

/// The memory of a document that it does not share with its successor, in bytes: its lists, and the text
/// of the flags and segments in `lost`.
fn weight(document: &Document, lost: &[Change]) -> usize {
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

    fn snapshot(text: &str) -> Arc<Snapshot> {
        let scope = Scope { environment: Environment::new("development"), projects: Projects::All };
        let document = Document::parse(text.as_bytes()).unwrap();
        Arc::new(Snapshot::build(scope, document, None))
    }

    #[test]
    fn history_is_limited_in_number_and_in_bytes() {
        let history = Log::of(&snapshot(r#"{"features":[]}"#));
        let Number(first) = *history.follow().borrow();
        for n in 1..=300 {
            history.catch_up(|| {
                Some(snapshot(&format!(r#"{{"features":[{{"name":"a","x":{n}}}]}}"#)))
            });
        }
        assert_eq!(*history.follow().borrow(), Number(first + 300));
        let known = |id| history.between(Some(Number(id))).0.is_some();
        assert!(!known(first + 200) && known(first + 201) && known(first + 300));
        for large in ["x", "y", "z"] {
            let text = large.repeat(20 << 20);
            let text = format!(r#"{{"features":[{{"name":"a","x":"{text}"}}]}}"#);
            history.catch_up(|| Some(snapshot(&text)));
        }
        assert!(!known(first + 301) && known(first + 302) && known(first + 303));
        assert!(history.lock().bytes <= BYTES);
    }
}
