//! The served state: for each environment one snapshot, swapped as a whole, and everything that depends
//! on the requests for it.
//!
//! A request loads one [`ServedSnapshot`] and uses it to the end. Its caches are its own, or shared with
//! its predecessor under keys of its own, so that no entry can be used with other flags. Each cache is
//! bounded and may drop any entry at any time, because the next request builds it again. This module
//! does not evaluate flags, which [`evaluation`](crate::evaluation) does, and does not fetch, store or
//! schedule anything.

mod atomic;
mod evaluation_cache;
mod prewarm_candidates;
mod recent_hashes;
mod result_cache;
mod scope_cache;
mod served_snapshot;
mod snapshots;
mod state_id;

pub use self::{
    evaluation_cache::{CacheKey, EvaluationCache},
    prewarm_candidates::HotContext,
    served_snapshot::ServedSnapshot,
    snapshots::{EnvironmentFilter, Snapshots},
    state_id::StateId,
};
