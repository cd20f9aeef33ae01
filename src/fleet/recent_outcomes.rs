//! The outcomes of the batches that this leader has sent lately.
//!
//! An instance appends a batch again if Redis has lost its data, also if the batch was sent before. The
//! leader that sent it knows its outcome, and stores it again, even if another instance leads now.

use std::collections::{HashMap, VecDeque};

use super::usage_log::FinalOutcome;
use crate::usage::BatchId;

/// The maximum number of batches. At three batches a minute from each of 100 instances, these are the
/// batches of three and a half hours.
const MAX_BATCHES: usize = 65_536;

/// The number of batches whose outcomes are stored again in a Redis that has lost its data. Instances have
/// seen older ones.
const MAX_STORED_AGAIN: usize = 10_000;
/// The number of batches to store at once.
const GROUP: usize = 1000;

/// Outcomes by batch.
#[derive(Debug, Default)]
pub(super) struct RecentOutcomes {
    by_batch: HashMap<BatchId, FinalOutcome>,
    oldest_first: VecDeque<BatchId>,
}

impl RecentOutcomes {
    pub(super) fn insert(&mut self, id: BatchId, outcome: FinalOutcome) {
        if self.by_batch.insert(id, outcome).is_none() {
            self.oldest_first.push_back(id);
        }
        if self.oldest_first.len() > MAX_BATCHES
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            self.by_batch.remove(&oldest);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_batch.is_empty()
    }

    /// The latest batches by outcome, in groups of [`GROUP`].
    pub(super) fn latest(&self) -> Vec<(FinalOutcome, Vec<BatchId>)> {
        let mut groups: Vec<(FinalOutcome, Vec<BatchId>)> = Vec::new();
        for id in self.oldest_first.iter().rev().take(MAX_STORED_AGAIN) {
            let Some(outcome) = self.get(*id) else { continue };
            let group = groups.iter_mut().find(|(of, ids)| *of == outcome && ids.len() < GROUP);
            match group {
                Some((_, ids)) => ids.push(*id),
                None => groups.push((outcome, vec![*id])),
            }
        }
        groups
    }

    pub(super) fn get(&self, id: BatchId) -> Option<FinalOutcome> {
        self.by_batch.get(&id).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latest_outcomes_are_remembered() {
        let id = |n: usize| BatchId::parse(&format!("{n:032x}")).expect("an id");
        let mut outcomes = RecentOutcomes::default();
        for n in 0..=MAX_BATCHES {
            for _ in 0..2 {
                outcomes.insert(id(n), FinalOutcome::Sent);
            }
        }
        assert_eq!(outcomes.get(id(0)), None);
        assert_eq!(outcomes.get(id(1)), Some(FinalOutcome::Sent));
        assert_eq!(outcomes.by_batch.len(), MAX_BATCHES);
        outcomes.insert(id(MAX_BATCHES + 1), FinalOutcome::Rejected);
        let groups = outcomes.latest();
        assert_eq!(groups[0], (FinalOutcome::Rejected, vec![id(MAX_BATCHES + 1)]));
        assert_eq!(groups[1].1[..2], [id(MAX_BATCHES), id(MAX_BATCHES - 1)]);
        let sizes: Vec<_> = groups.iter().map(|(_, ids)| ids.len()).collect();
        assert_eq!(sizes, [1, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 999]);
    }
}
