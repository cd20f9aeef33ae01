//! The state of each flag that a streaming client has, to compute the next delta from.
//!
//! It outlives its snapshot: each stream keeps the states that it sent last. The JSON of the flags
//! belongs to the snapshot and is not part of it.

use std::sync::Arc;

use itertools::{
    EitherOrBoth::{Both, Left, Right},
    Itertools as _,
};

use super::fragments::{FragmentId, Fragments};

/// The states of the evaluated flags for one context.
#[derive(Debug)]
pub struct FlagStates {
    hash: u128,
    /// Sorted by name.
    flags: Box<[FlagState]>,
}

/// One evaluated flag.
#[derive(Debug)]
pub struct FlagState {
    /// The flag's name.
    pub name: Arc<str>,
    /// The hash of its JSON, by which states are compared.
    pub hash: u64,
    /// Its JSON, in the snapshot that it was evaluated in.
    pub fragment: FragmentId,
}

impl FlagStates {
    /// The states of the evaluated flags with this hash, sorted by name.
    pub fn new(hash: u128, flags: Vec<FlagState>) -> Self {
        Self { hash, flags: flags.into() }
    }

    /// The hash of the evaluated flags.
    pub fn hash(&self) -> u128 {
        self.hash
    }

    /// The delta from `before` as `{"toggles":[…],"removed":[…]}`: new and changed flags, and the names
    /// of flags that are not included any longer.
    ///
    /// `fragments` belong to the snapshot in which these flags were evaluated. `before` may be from any
    /// snapshot.
    pub fn delta_since(&self, before: &Self, fragments: &Fragments) -> String {
        let (mut changed, mut removed) = (String::new(), Vec::new());
        for pair in before.flags.iter().merge_join_by(&self.flags, |a, b| a.name.cmp(&b.name)) {
            match pair {
                Both(before, now) if before.hash == now.hash => {}
                Both(_, now) | Right(now) => {
                    changed.push_str(fragments.get(now.fragment).json_with_comma());
                }
                Left(gone) => removed.push(&*gone.name),
            }
        }
        let changed = changed.strip_suffix(',').unwrap_or(&changed);
        let removed = serde_json::json!(removed);
        format!(r#"{{"toggles":[{changed}],"removed":{removed}}}"#)
    }

    /// Its memory in bytes, without the names, which belong to the flags.
    pub fn memory_size(&self) -> usize {
        size_of::<Self>() + size_of_val(&*self.flags)
    }
}
