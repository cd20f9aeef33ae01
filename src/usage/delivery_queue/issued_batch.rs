//! A batch between its first sending and its final outcome.

use std::time::Instant;

use crate::usage::batch::{Batch, BatchId};

/// A batch that has an id, and is sent unchanged until its outcome is known.
#[derive(Clone, Debug)]
pub(in crate::usage) struct IssuedBatch {
    pub(in crate::usage) id: BatchId,
    pub(in crate::usage) batch: Batch,
    /// Whether the destination may hold it: it was parked, or was given to it with an unknown outcome.
    pub(super) may_be_parked: bool,
    /// When the oldest usage of its environment was queued.
    pub(super) waiting_since: Option<Instant>,
}

impl IssuedBatch {
    /// A batch that the destination does not know.
    pub(in crate::usage) fn new(id: BatchId, batch: Batch) -> Self {
        Self { id, batch, may_be_parked: false, waiting_since: None }
    }

    /// A batch of an earlier run.
    pub(in crate::usage) fn restored(id: BatchId, batch: Batch) -> Self {
        Self { may_be_parked: true, ..Self::new(id, batch) }
    }
}
