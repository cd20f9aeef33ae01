//! Decides from upstream's environment lists which environments were removed.
//!
//! An environment is removed only after three consecutive lists without it, and a list without any
//! enabled environment is ignored: a faulty list must not stop an environment from being served.
//! Pure: it sends no request.

use std::collections::{BTreeMap, BTreeSet};

use crate::{token::Environment, wire::tokens::ListedEnvironment};

/// An environment is removed after this many consecutive lists without it.
const MISSES: u8 = 3;

/// The environments that upstream lists, or has listed.
#[derive(Debug, Default)]
pub(super) struct Roll {
    /// Consecutive lists without each environment. One listed as disabled counts as removed immediately.
    missed: BTreeMap<Environment, u8>,
}

impl Roll {
    /// Applies a list while `known` are served. Returns the enabled environments; `None` if there are
    /// none.
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

    /// The environments that were removed or disabled upstream.
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
    fn disabled_environment_is_removed_until_it_is_enabled_again() {
        let mut environments = Roll::default();
        let enabled = environments.call(&list(&[("dev", true), ("old", false)]), names(&["old"]));
        assert_eq!((enabled, environments.gone()), (Some(names(&["dev"])), names(&["old"])));
        environments.call(&list(&[("dev", true), ("old", true)]), names(&["dev"]));
        assert_eq!(environments.gone(), names(&[]));
    }

    #[test]
    fn missing_environment_is_removed_after_three_consecutive_lists() {
        let mut environments = Roll::default();
        let (whole, short) = (list(&[("dev", true), ("prod", true)]), list(&[("prod", true)]));
        for _ in 0..5 {
            environments.call(&whole, names(&[]));
            environments.call(&short, names(&["dev", "prod"]));
            environments.call(&short, names(&["dev", "prod"]));
            assert_eq!(environments.gone(), names(&[]));
        }
        environments.call(&short, names(&["dev", "prod"]));
        assert_eq!(environments.gone(), names(&["dev"]));
    }

    #[test]
    fn list_without_enabled_environment_is_ignored() {
        let mut environments = Roll::default();
        for _ in 0..5 {
            assert_eq!(environments.call(&[], names(&["dev"])), None);
            assert_eq!(environments.call(&list(&[("dev", false)]), names(&["dev"])), None);
        }
        assert_eq!(environments.gone(), names(&[]));
    }
}
