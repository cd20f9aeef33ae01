//! What is followed, and under which ids its states are told.
//!
//! A state's number is the environment's, and says nothing of what somebody sees of it. So each topic
//! tells the numbers shifted by an amount of its own: an id that was told of something else, because
//! the token saw other projects then, is one that is not known here, and leads to the whole state.

use std::hash::{Hash as _, Hasher as _};

use xxhash_rust::xxh3::Xxh3Default;

use super::log::Number;
use crate::{
    snapshot::Filter,
    token::{Environment, Projects},
    wire::delta::EventId,
};

/// How many ids there are; the first is 1, and all fit in a signed integer, as SDKs may keep them in
/// one.
const IDS: u32 = EventId::MAX >> 1;

/// How many shifts there are. Numbers begin below as many, so that ids grow by one from state to state
/// for a long time before they begin anew.
const SHIFTS: u64 = 1 << 30;

/// What somebody follows: an environment, cut as a listing is.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Topic {
    pub(super) environment: Environment,
    /// The projects that the token sees.
    pub(super) projects: Projects,
    /// What the request narrows that to.
    pub(super) filter: Filter,
    /// What the ids that are told are ahead of the numbers.
    shift: u32,
}

impl Topic {
    /// The flags of `environment` and `projects`, narrowed by `filter`.
    pub fn new(environment: Environment, projects: Projects, filter: Filter) -> Self {
        let mut hasher = Xxh3Default::new();
        (&projects, &filter).hash(&mut hasher);
        let shift = u32::try_from(hasher.finish() % SHIFTS).expect("the remainder is below 2^30");
        Self { environment, projects, filter, shift }
    }

    /// Whose flags.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// Under which id a state is told.
    pub fn id(&self, Number(number): Number) -> EventId {
        // Both are below 2^31.
        (number - 1 + self.shift) % IDS + 1
    }

    /// The number of the state that is told under this id, if there is such a state.
    pub(super) fn number(&self, id: EventId) -> Option<Number> {
        (1..=IDS).contains(&id).then(|| Number((id - 1 + IDS - self.shift) % IDS + 1))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn topic(projects: Projects, prefix: Option<&str>) -> Topic {
        let filter = Filter { name_prefix: prefix.map(Into::into), ..Filter::default() };
        Topic::new(Environment::new("development"), projects, filter)
    }

    proptest! {
        #[test]
        fn ids_are_positive_fit_in_a_signed_integer_and_lead_back(
            number in prop_oneof![1..=IDS, Just(1), Just(IDS)],
            project in "[a-z]{1,8}",
        ) {
            let topic = topic(Projects::from_list([&*project]), None);
            let id = topic.id(Number(number));
            prop_assert!(i32::try_from(id).unwrap() > 0);
            prop_assert_eq!(topic.number(id), Some(Number(number)));
            prop_assert_eq!(topic.number(id + (IDS + 1)), None);
        }
    }

    #[test]
    fn whoever_sees_the_same_is_told_the_same_ids_and_others_are_told_others() {
        let (one, other) = (Projects::from_list(["a", "b"]), Projects::from_list(["a", "c"]));
        let id = |projects: &Projects, prefix| topic(projects.clone(), prefix).id(Number(7));
        assert_eq!(id(&one, None), id(&Projects::from_list(["b", "a"]), None));
        let ids = [id(&one, None), id(&other, None), id(&Projects::All, None), id(&one, Some("x"))];
        for (n, id) in ids.iter().enumerate() {
            assert!(ids[..n].iter().all(|it| it.abs_diff(*id) > 1000), "{ids:?}");
        }
        assert_eq!(topic(one, None).number(0), None);
    }
}
