//! The atomics of `recent_hashes` and `result_cache`. `tests/loom.rs` compiles both with those of `loom`
//! instead, which tries every order of memory accesses within a number of preemptions.

pub(super) use std::sync::atomic::{AtomicU64, Ordering};
