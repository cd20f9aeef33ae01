//! Decides from upstream's environment lists which environments were removed.
//!
//! An environment is removed only after three consecutive lists without it, and a list without any
//! enabled environment is ignored: a faulty list must not stop an environment from being served.
//! Pure: it sends no request.

use std::collections::{BTreeMap, BTreeSet};

use crate::{protocol::tokens::ListedEnvironment, token::Environment};

/// An environment is removed after this many consecutive lists without it.
const REMOVED_AFTER_MISSES: u8 = 3;

/// The environments that upstream lists, or has listed.
#[derive(Debug, Default)]
pub(super) struct EnvironmentTracker {
    /// Consecutive lists without each environment. One listed as disabled counts as removed immediately.
    consecutive_misses: BTreeMap<Environment, u8>,
}

impl EnvironmentTracker {
    /// Applies a list while `known` are served. Returns the enabled environments; `None` if there are
    /// none.
    pub(super) fn update(
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
            self.consecutive_misses.entry(environment).or_default();
        }
        for missed in self.consecutive_misses.values_mut() {
            *missed = missed.saturating_add(1);
        }
        for ListedEnvironment { name, enabled } in list {
            self.consecutive_misses
                .insert(name.clone(), if *enabled { 0 } else { REMOVED_AFTER_MISSES });
        }
        Some(enabled)
    }

    /// The environments that were removed or disabled upstream.
    pub(super) fn removed(&self) -> BTreeSet<Environment> {
        let gone =
            self.consecutive_misses.iter().filter(|(_, missed)| **missed >= REMOVED_AFTER_MISSES);
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
        let mut environments = EnvironmentTracker::default();
        let enabled = environments.update(&list(&[("dev", true), ("old", false)]), names(&["old"]));
        assert_eq!((enabled, environments.removed()), (Some(names(&["dev"])), names(&["old"])));
        environments.update(&list(&[("dev", true), ("old", true)]), names(&["dev"]));
        assert_eq!(environments.removed(), names(&[]));
    }

    #[test]
    fn missing_environment_is_removed_after_three_consecutive_lists() {
        let mut environments = EnvironmentTracker::default();
        let (whole, short) = (list(&[("dev", true), ("prod", true)]), list(&[("prod", true)]));
        for _ in 0..5 {
            environments.update(&whole, names(&[]));
            environments.update(&short, names(&["dev", "prod"]));
            environments.update(&short, names(&["dev", "prod"]));
            assert_eq!(environments.removed(), names(&[]));
        }
        environments.update(&short, names(&["dev", "prod"]));
        assert_eq!(environments.removed(), names(&["dev"]));
    }

    #[test]
    fn list_without_enabled_environment_is_ignored() {
        let mut environments = EnvironmentTracker::default();
        for _ in 0..5 {
            assert_eq!(environments.update(&[], names(&["dev"])), None);
            assert_eq!(environments.update(&list(&[("dev", false)]), names(&["dev"])), None);
        }
        assert_eq!(environments.removed(), names(&[]));
    }
}
