//! Digests of a configuration's values, to find out which of them a reload changes. It contains no value.

use std::collections::{BTreeMap, BTreeSet};

/// Digests of the effective values, to find out later which of them have changed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SettingsDigests(BTreeMap<&'static str, [u8; 32]>);

impl SettingsDigests {
    /// Takes the name and the digest of each option.
    pub(super) fn new(digests: impl Iterator<Item = (&'static str, [u8; 32])>) -> Self {
        Self(digests.collect())
    }

    /// The names of the options whose values differ from `earlier`.
    pub fn changed_since(&self, earlier: &Self) -> Vec<&'static str> {
        let names: BTreeSet<_> = self.0.keys().chain(earlier.0.keys()).copied().collect();
        names.into_iter().filter(|name| self.0.get(name) != earlier.0.get(name)).collect()
    }

    /// Copies the digest of one option from `newer`.
    pub fn update(&mut self, name: &'static str, newer: &Self) {
        match newer.0.get(name) {
            Some(digest) => drop(self.0.insert(name, *digest)),
            None => drop(self.0.remove(name)),
        }
    }
}
