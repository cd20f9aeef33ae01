//! Runs long computations without blocking the async worker threads, a limited number at a time.
//!
//! Work of several milliseconds, such as parsing a body of megabytes, would delay every other request on
//! the same thread. Compressing responses has its own limit, see [`response`](super::response).

use std::{num::NonZero, sync::LazyLock, thread::available_parallelism};

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    sync::Semaphore,
    task::block_in_place,
};

/// Inputs up to this many bytes are processed inline: moving them to another thread takes about as long.
pub(super) const MAX_INLINE_BYTES: usize = 64 << 10;

/// Limits concurrent long computations to half of the processors; the rest stay free for short requests.
static PERMITS: LazyLock<Semaphore> = LazyLock::new(|| {
    let processors = available_parallelism().map_or(1, NonZero::get);
    Semaphore::new((processors / 2).max(1))
});

/// Runs `work` on an input of `bytes` bytes.
pub(super) async fn run<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    if bytes <= MAX_INLINE_BYTES {
        return work();
    }
    let _permit = PERMITS.acquire().await.expect("the semaphore is never closed");
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => block_in_place(work),
        // A current-thread runtime has no other worker.
        _ => work(),
    }
}
