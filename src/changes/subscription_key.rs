//! The key of a subscription, and the event ids of its states.
//!
//! A state id belongs to the environment and does not depend on the scope of a subscriber. Therefore
//! each key adds its own offset to state ids. If the projects of a token change, an event id from before
//! is unknown under the new key, and the subscriber gets the whole state.

use std::hash::{Hash as _, Hasher as _};

use xxhash_rust::xxh3::Xxh3Default;

use crate::{
    protocol::delta::EventId,
    served::StateId,
    snapshot::Filter,
    token::{Environment, Projects},
};

/// The largest event id. The first is 1. All fit into a signed 32-bit integer, because SDKs may store
/// them in one.
const MAX_EVENT_ID: EventId = StateId::MAX.get();

/// Number of offsets. State ids start below this, too, so that event ids grow by one per state for a
/// long time before they wrap around.
const ID_OFFSETS: u64 = 1 << 30;

/// The scope of a subscription: an environment, its projects and a filter.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct SubscriptionKey {
    pub(super) environment: Environment,
    /// The projects of the token.
    pub(super) projects: Projects,
    /// The filter of the request.
    pub(super) filter: Filter,
    /// The difference between event ids and state ids.
    id_offset: u32,
}

impl SubscriptionKey {
    /// A subscription to the flags of `environment` and `projects` that match `filter`.
    pub fn new(environment: Environment, projects: Projects, filter: Filter) -> Self {
        let mut hasher = Xxh3Default::new();
        (&projects, &filter).hash(&mut hasher);
        let offset =
            u32::try_from(hasher.finish() % ID_OFFSETS).expect("the remainder is below 2^30");
        Self { environment, projects, filter, id_offset: offset }
    }

    /// The environment of the flags.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// The event id of a state.
    pub fn event_id(&self, id: StateId) -> EventId {
        // No overflow: both are below 2^31.
        (id.get() - 1 + self.id_offset) % MAX_EVENT_ID + 1
    }

    /// The id of the state with this event id; `None` if the event id is out of range.
    pub(super) fn state_id(&self, id: EventId) -> Option<StateId> {
        let id = (1..=MAX_EVENT_ID).contains(&id).then_some(id)?;
        StateId::new((id - 1 + MAX_EVENT_ID - self.id_offset) % MAX_EVENT_ID + 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(projects: Projects, prefix: Option<&str>) -> SubscriptionKey {
        let filter = Filter { name_prefix: prefix.map(Into::into), ..Filter::default() };
        SubscriptionKey::new(Environment::new("development"), projects, filter)
    }

    fn state_id(number: u32) -> StateId {
        StateId::new(number).expect("in range")
    }

    proptest! {
        #[test]
        fn event_ids_are_positive_fit_a_signed_integer_and_convert_back(
            state in prop_oneof![1..=MAX_EVENT_ID, Just(1), Just(MAX_EVENT_ID)],
            project in "[a-z]{1,8}",
        ) {
            let key = key(Projects::from_list([&*project]), None);
            let id = key.event_id(state_id(state));
            prop_assert!(i32::try_from(id).unwrap() > 0);
            prop_assert_eq!(key.state_id(id), Some(state_id(state)));
            prop_assert_eq!(key.state_id(id + (MAX_EVENT_ID + 1)), None);
        }
    }

    #[test]
    fn event_ids_are_equal_for_equal_scopes_and_differ_for_others() {
        let (one, other) = (Projects::from_list(["a", "b"]), Projects::from_list(["a", "c"]));
        let id = |projects: &Projects, prefix| key(projects.clone(), prefix).event_id(state_id(7));
        assert_eq!(id(&one, None), id(&Projects::from_list(["b", "a"]), None));
        let ids = [id(&one, None), id(&other, None), id(&Projects::All, None), id(&one, Some("x"))];
        for (n, id) in ids.iter().enumerate() {
            assert!(ids[..n].iter().all(|it| it.abs_diff(*id) > 1000), "{ids:?}");
        }
        assert_eq!(key(one, None).state_id(0), None);
    }
}
