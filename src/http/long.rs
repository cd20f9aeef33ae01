//! Work that takes long: off the threads that answer requests, and little of it at a time.
//!
//! What takes milliseconds, as reading a body of megabytes does, keeps everybody else waiting on such a
//! thread. Compressing bodies has rules of its own, see `reply`.

use std::{num::NonZero, sync::LazyLock, thread::available_parallelism};

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    sync::Semaphore,
    task::block_in_place,
};

/// Up to so many bytes are worked on at once: about as long as it takes to involve another thread.
pub(super) const SHORT: usize = 64 << 10;

/// How much is done at a time: half of the processors stay free for what is short.
static ROOM: LazyLock<Semaphore> = LazyLock::new(|| {
    let processors = available_parallelism().map_or(1, NonZero::get);
    Semaphore::new((processors / 2).max(1))
});

/// Works on so many bytes.
pub(super) async fn work<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    if bytes <= SHORT {
        return work();
    }
    let _room = ROOM.acquire().await.expect("nobody closes it");
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => block_in_place(work),
        // There is no other thread to take over.
        _ => work(),
    }
}
