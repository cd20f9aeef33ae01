//! Cached evaluation of flags for frontend clients.
//!
//! The evaluated flags are a function of a snapshot, the projects in scope, and a context. Three facts
//! make evaluation cheap.
//!
//! * Few fields matter. The cache key of a result has only what the flags in scope read from the context
//!   ([`EvaluationInputs`](crate::engine::EvaluationInputs)). If they depend on the time, the key has
//!   the interval between two of their dates. Flags that read nothing were evaluated when the snapshot
//!   was built.
//! * Few distinct results exist. The hash of every flag's outcome is the entity tag, so that a client
//!   with a current copy receives a 304 without a body; and equal results share one body with all its
//!   content codings.
//! * The JSON of each outcome of each flag is prepared; a new body concatenates it.
//!
//! Some outcomes are valid for one request only: those that are random, and those that read a generated
//! `sessionId`. Such flags are evaluated for each request; the outcomes of all others and the body come
//! from the cache. This module has no state: all caches belong to the
//! [`ServedSnapshot`](crate::served::ServedSnapshot).

mod cached_evaluation;
pub mod explain;
mod prewarm;
pub mod session_id;
pub mod subscription;

pub use self::{
    cached_evaluation::{EvaluatedFlags, evaluate_flag, ofrep_hash},
    prewarm::prewarm,
};
