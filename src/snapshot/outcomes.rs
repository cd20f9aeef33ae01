//! What each flag came to that somebody was told of, to be compared with what it comes to later.
//!
//! It outlives its snapshot in the hands of those who were told; only their texts are the snapshot's
//! own.

use std::sync::Arc;

use itertools::{
    EitherOrBoth::{Both, Left, Right},
    Itertools as _,
};

use super::fragments::{FragmentId, Fragments};

/// What each flag that an answer lists came to.
#[derive(Debug)]
pub struct Outcomes {
    hash: u128,
    /// Sorted by name.
    flags: Box<[Listed]>,
}

/// One flag of an answer.
#[derive(Debug)]
pub struct Listed {
    /// The flag's name.
    pub name: Arc<str>,
    /// The hash of its JSON, by which it is compared.
    pub hash: u64,
    /// Where its JSON is, in the snapshot that it was evaluated in.
    pub fragment: FragmentId,
}

impl Outcomes {
    /// Those of an answer that `hash` identifies, sorted by name.
    pub fn new(hash: u128, flags: Vec<Listed>) -> Self {
        Self { hash, flags: flags.into() }
    }

    /// What identifies the answer.
    pub fn hash(&self) -> u128 {
        self.hash
    }

    /// What leads from `before` to these, as `{"toggles":[…],"removed":[…]}`: the flags that are new
    /// or came to something else, and the names of those that are listed no more.
    ///
    /// `fragments` are those of the snapshot in which these were evaluated; `before` is of any.
    pub fn since(&self, before: &Self, fragments: &Fragments) -> String {
        let (mut changed, mut removed) = (String::new(), Vec::new());
        for pair in before.flags.iter().merge_join_by(&self.flags, |a, b| a.name.cmp(&b.name)) {
            match pair {
                Both(before, now) if before.hash == now.hash => {}
                Both(_, now) | Right(now) => {
                    changed.push_str(fragments.get(now.fragment).with_comma());
                }
                Left(gone) => removed.push(&*gone.name),
            }
        }
        let changed = changed.strip_suffix(',').unwrap_or(&changed);
        let removed = serde_json::json!(removed);
        format!(r#"{{"toggles":[{changed}],"removed":{removed}}}"#)
    }

    /// The memory that it holds, in bytes; names belong to the flags.
    pub(super) fn weight(&self) -> usize {
        size_of::<Self>() + size_of_val(&*self.flags)
    }
}
