//! The batches of one environment that the destination holds without having sent them on.
//!
//! They stay here until the destination says that they arrived upstream, so that they are not lost if it
//! loses them. Their number is bounded by the queue, which prepares no further batch beyond
//! [`MAX_PARKED`].

use std::{collections::VecDeque, time::Instant};

use super::issued_batch::IssuedBatch;

/// The number of parked batches above which an environment's other usage waits. At the largest size they
/// take 3 MiB.
const MAX_PARKED: usize = 32;

/// The parked batches, in the order in which they were parked or checked last.
#[derive(Clone, Debug, Default)]
pub(in crate::usage) struct ParkedBatches(VecDeque<Parked>);

#[derive(Clone, Debug)]
struct Parked {
    batch: IssuedBatch,
    check_at: Instant,
}

impl ParkedBatches {
    /// Adds a batch, whose outcome is to be asked for at `check_at`.
    pub(super) fn park(&mut self, batch: IssuedBatch, check_at: Instant) {
        self.0.push_back(Parked { batch: IssuedBatch { may_be_parked: true, ..batch }, check_at });
    }

    /// Removes a batch whose outcome is to be asked for.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<IssuedBatch> {
        let due = self.0.iter().position(|parked| parked.check_at <= now)?;
        self.0.remove(due).map(|parked| parked.batch)
    }

    /// When to ask for an outcome next.
    pub(super) fn next_check_at(&self) -> Option<Instant> {
        self.0.iter().map(|parked| parked.check_at).min()
    }

    /// Whether no further batch may be parked.
    pub(super) fn is_full(&self) -> bool {
        self.0.len() >= MAX_PARKED
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Since when the oldest of this usage has been waiting.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.0.iter().filter_map(|parked| parked.batch.waiting_since).min()
    }

    pub(in crate::usage) fn iter(&self) -> impl Iterator<Item = &IssuedBatch> {
        self.0.iter().map(|parked| &parked.batch)
    }
}
