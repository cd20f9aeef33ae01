//! A sign to stop that very many wait for.
//!
//! They are woken by it, and woken for other reasons all the while: so looking whether it was given
//! costs a load, and waiting for it is done once.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// The sign. A cheap handle.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    given: Arc<AtomicBool>,
    wake: CancellationToken,
}

impl Stop {
    /// Gives it.
    pub fn give(&self) {
        self.given.store(true, Ordering::Release);
        self.wake.cancel();
    }

    /// Whether it was given.
    pub fn is_given(&self) -> bool {
        self.given.load(Ordering::Acquire)
    }

    /// Wakes the task that has polled it once, when the sign is given: a task's waker stays the same.
    pub fn wake(&self) -> WaitForCancellationFutureOwned {
        self.wake.clone().cancelled_owned()
    }
}
