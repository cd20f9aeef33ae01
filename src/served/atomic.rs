//! The atomics of the lock-free structures in this folder. `tests/loom.rs` compiles these structures with
//! those of `loom` instead, which tries every order of memory accesses.

pub(super) use std::sync::atomic::{AtomicU64, Ordering};
