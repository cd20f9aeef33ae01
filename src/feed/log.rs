//! The last states of one environment.

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

/// How many states are kept: as many as Unleash Edge keeps.
const STATES: usize = 100;

/// The most memory that earlier states may hold, in bytes.
const BYTES: usize = 32 << 20;

/// The number of a state within its environment: positive, and below 2^31. Who follows is told it as
/// the id that it has in what they see of the state ([`Topic::id`](super::Topic::id)).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Number(pub(super) u32);

/// One state.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) number: Number,
    /// Everything that there was.
    pub(super) document: Arc<Document>,
    /// When its source told it.
    pub(super) told: Instant,
}

/// The states of one environment, the oldest first; there always is one.
#[derive(Debug)]
pub(super) struct Log {
    states: Mutex<States>,
    current: watch::Sender<Number>,
}

#[derive(Debug)]
struct States {
    earlier: VecDeque<(State, usize)>,
    /// What the earlier ones hold besides what the current one does, in bytes.
    bytes: usize,
    current: State,
}

impl Log {
    /// Begins with this state, under a number that no earlier process is likely to have told.
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let number = Number(rand::random_range(1..1 << 30));
        let document = Arc::clone(snapshot.document());
        let current = State { number, document, told: snapshot.received() };
        let states = States { earlier: VecDeque::new(), bytes: 0, current };
        Self { states: Mutex::new(states), current: watch::Sender::new(number) }
    }

    pub(super) fn follow(&self) -> watch::Receiver<Number> {
        self.current.subscribe()
    }

    /// Takes over what is served now, if that is another state. It is asked for under the lock, so
    /// that of two who ask, none takes over an older one after a newer.
    pub(super) fn catch_up(&self, served: impl FnOnce() -> Option<Arc<Snapshot>>) {
        let mut states = self.lock();
        let Some(snapshot) = served() else { return };
        let is_new = states.take(&snapshot);
        // Whoever is woken takes this lock first of all, and there may be thousands.
        drop(states);
        if is_new {
            self.current.send_if_modified(|number| {
                let newest = self.lock().current.number;
                std::mem::replace(number, newest) != newest
            });
        }
    }

    /// The state `from`, if it is known, and the current one.
    pub(super) fn between(&self, from: Option<Number>) -> (Option<State>, State) {
        let states = self.lock();
        let known = |number: Number| {
            if states.current.number == number {
                return Some(&states.current);
            }
            states.earlier.iter().map(|(state, _)| state).find(|state| state.number == number)
        };
        (from.and_then(known).cloned(), states.current.clone())
    }

    /// A panic under this lock leaves states that can be followed.
    fn lock(&self) -> MutexGuard<'_, States> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl States {
    /// True if that is a new state.
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
        let number = Number(if last < u32::MAX >> 1 { last + 1 } else { 1 });
        let next = State { number, document: Arc::clone(document), told: snapshot.received() };
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

/// What a document holds that the one after it does not: its lists, and what `lost` has of texts.
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
    fn only_the_last_states_are_kept_by_number_and_by_bytes() {
        let log = Log::of(&snapshot(r#"{"features":[]}"#));
        let Number(first) = *log.follow().borrow();
        for n in 1..=300 {
            log.catch_up(|| Some(snapshot(&format!(r#"{{"features":[{{"name":"a","x":{n}}}]}}"#))));
        }
        assert_eq!(*log.follow().borrow(), Number(first + 300));
        let known = |number| log.between(Some(Number(number))).0.is_some();
        assert!(!known(first + 200) && known(first + 201) && known(first + 300));
        for large in ["x", "y", "z"] {
            let text = large.repeat(20 << 20);
            let text = format!(r#"{{"features":[{{"name":"a","x":"{text}"}}]}}"#);
            log.catch_up(|| Some(snapshot(&text)));
        }
        assert!(!known(first + 301) && known(first + 302) && known(first + 303));
        assert!(log.lock().bytes <= BYTES);
    }
}
