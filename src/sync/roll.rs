//! Which environments are gone, by upstream's own lists of them.
//!
//! Upstream is not taken at its word where that would end what is served by mistake: one that is
//! missing must be missing for a while, and a list without any enabled environment says nothing.
//! Pure: it asks nobody.

use std::collections::{BTreeMap, BTreeSet};

use crate::{token::Environment, wire::tokens::ListedEnvironment};

/// After how many lists in a row without it an environment is gone.
const MISSES: u8 = 3;

/// The environments that upstream has, or had.
#[derive(Debug, Default)]
pub(super) struct Roll {
    /// In how many lists in a row each was missing; one that is listed as disabled is gone at once.
    missed: BTreeMap<Environment, u8>,
}

impl Roll {
    /// Takes over a list, while `known` are served: the enabled environments, unless there is none.
    pub(super) fn call(
        &mut self,
        list: &[ListedEnvironment],
        known: BTreeSet<Environment>,
    ) -> Option<BTreeSet<Environment>> {
        let enabled: BTreeSet<_> =
            list.iter().filter(|it| it.enabled).map(|it| it.name.clone()).collect();
        if enabled.is_empty() {
            return None;
        }
        for environment in known {
            self.missed.entry(environment).or_default();
        }
        for missed in self.missed.values_mut() {
            *missed = missed.saturating_add(1);
        }
        for ListedEnvironment { name, enabled } in list {
            self.missed.insert(name.clone(), if *enabled { 0 } else { MISSES });
        }
        Some(enabled)
    }

    /// The environments that are gone.
    pub(super) fn gone(&self) -> BTreeSet<Environment> {
        let gone = self.missed.iter().filter(|(_, missed)| **missed >= MISSES);
        gone.map(|(environment, _)| environment.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> BTreeSet<Environment> {
        names.iter().map(|name| Environment::new(name)).collect()
    }

    fn list(entries: &[(&str, bool)]) -> Vec<ListedEnvironment> {
        let entry =
            |&(name, enabled): &_| ListedEnvironment { name: Environment::new(name), enabled };
        entries.iter().map(entry).collect()
    }

    #[test]
    fn what_is_listed_as_disabled_is_gone_until_it_is_enabled_again() {
        let mut roll = Roll::default();
        let enabled = roll.call(&list(&[("dev", true), ("old", false)]), names(&["old"]));
        assert_eq!((enabled, roll.gone()), (Some(names(&["dev"])), names(&["old"])));
        roll.call(&list(&[("dev", true), ("old", true)]), names(&["dev"]));
        assert_eq!(roll.gone(), names(&[]));
    }

    #[test]
    fn what_is_missing_is_gone_after_three_lists_in_a_row() {
        let mut roll = Roll::default();
        let (whole, short) = (list(&[("dev", true), ("prod", true)]), list(&[("prod", true)]));
        for _ in 0..5 {
            roll.call(&whole, names(&[]));
            roll.call(&short, names(&["dev", "prod"]));
            roll.call(&short, names(&["dev", "prod"]));
            assert_eq!(roll.gone(), names(&[]));
        }
        roll.call(&short, names(&["dev", "prod"]));
        assert_eq!(roll.gone(), names(&["dev"]));
    }

    #[test]
    fn a_list_without_an_enabled_environment_says_nothing() {
        let mut roll = Roll::default();
        for _ in 0..5 {
            assert_eq!(roll.call(&[], names(&["dev"])), None);
            assert_eq!(roll.call(&list(&[("dev", false)]), names(&["dev"])), None);
        }
        assert_eq!(roll.gone(), names(&[]));
    }
}
