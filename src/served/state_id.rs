//! Ids of the states of an environment's flags.
//!
//! Instances of a fleet, and an instance after a restart, go on with the ids that a document brings along,
//! so that a subscriber may continue at any of them. Nothing coordinates the ids of instances that fetch
//! flags independently of each other. Therefore the first id that an instance assigns after one of another
//! run or instance is larger by a random number: two instances that assign ids independently hardly ever
//! assign the same one.

use crate::protocol::features::Document;

/// The largest id. Event ids, which are derived from ids, have to fit into a signed 32-bit integer.
const MAX_ID: u32 = u32::MAX >> 1;

/// The first id of an environment is below this, so that ids grow for a long time.
const MAX_FIRST_ID: u32 = 1 << 30;

/// The largest difference between an id of another run or instance and the next one. Ids of instances that
/// lead in turn still grow through more than sixty changes of the leader, and usually through two hundred.
const MAX_GAP: u32 = 1 << 24;

/// The id of a state within its environment, from 1 to 2^31 - 1. Ids grow from state to state, until they
/// wrap around. Subscribers see an event id, which also depends on their scope.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct StateId(u32);

impl StateId {
    /// The largest id.
    pub const MAX: Self = Self(MAX_ID);

    /// The id with this number; `None` if it is out of range.
    pub fn new(number: u32) -> Option<Self> {
        (1..=MAX_ID).contains(&number).then_some(Self(number))
    }

    /// The id under which an earlier run or another instance served the flags of `document`.
    pub fn stored_with(document: &Document) -> Option<Self> {
        Self::new(document.previous_run()?.state_id?)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The id that is larger by `number`, which is at most 2^30, or wraps around.
    fn plus(self, number: u32) -> Self {
        Self((self.0 - 1 + number) % MAX_ID + 1)
    }
}

/// The id of a state, and its origin.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum AssignedId {
    /// This instance has assigned it, in this run.
    Here(StateId),
    /// An earlier run or another instance of the fleet has assigned it.
    Elsewhere(StateId),
}

impl AssignedId {
    /// The id of the state of `document`: its own if it was stored or shared, and else one after
    /// `previous`. Without either, it is unlikely to repeat the id of another run.
    pub(super) fn of(document: &Document, previous: Option<Self>) -> Self {
        match (StateId::stored_with(document), previous) {
            (Some(id), _) => Self::Elsewhere(id),
            (None, Some(previous)) => previous.next(),
            (None, None) => Self::Here(StateId(rand::random_range(1..MAX_FIRST_ID))),
        }
    }

    fn next(self) -> Self {
        Self::Here(match self {
            Self::Here(id) => id.plus(1),
            Self::Elsewhere(id) => id.plus(rand::random_range(1..=MAX_GAP)),
        })
    }

    /// The id.
    pub(super) const fn id(self) -> StateId {
        let (Self::Here(id) | Self::Elsewhere(id)) = self;
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_grow_by_one_and_by_a_random_number_after_those_of_others() {
        let id = |number| StateId::new(number).expect("in range");
        assert_eq!(AssignedId::Here(id(7)).next(), AssignedId::Here(id(8)));
        assert_eq!(AssignedId::Here(StateId::MAX).next(), AssignedId::Here(id(1)));
        let next = || AssignedId::Elsewhere(id(7)).next();
        let (one, other) = (next(), next());
        assert!(matches!(one, AssignedId::Here(StateId(8..=16_777_223))), "{one:?}");
        assert_ne!(one, other, "the probability of equal ones is 2^-24");
        assert!(AssignedId::Elsewhere(StateId::MAX).next().id().get() <= MAX_GAP);
    }

    #[test]
    fn numbers_out_of_range_are_no_ids() {
        assert_eq!([0, MAX_ID + 1, u32::MAX].map(StateId::new), [None; 3]);
        assert_eq!(
            [1, MAX_ID].map(|it| StateId::new(it).map(StateId::get)),
            [Some(1), Some(MAX_ID)]
        );
    }
}
