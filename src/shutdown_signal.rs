//! A shutdown signal for thousands of tasks.
//!
//! A [`CancellationToken`] wakes the tasks, and a flag beside it makes checking as cheap as an atomic
//! load: the tasks wake often for other reasons, and register their waker only once.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// A signal that is triggered once. A cheap handle.
#[derive(Clone, Debug, Default)]
pub struct ShutdownSignal {
    triggered: Arc<AtomicBool>,
    token: CancellationToken,
}

impl ShutdownSignal {
    /// Triggers the signal.
    pub fn trigger(&self) {
        self.triggered.store(true, Ordering::Release);
        self.token.cancel();
    }

    /// Whether the signal was triggered.
    pub fn is_triggered(&self) -> bool {
        self.triggered.load(Ordering::Acquire)
    }

    /// A future that wakes its task when the signal is triggered. It has to be polled only once, because
    /// the waker of a task does not change.
    pub fn subscribe(&self) -> WaitForCancellationFutureOwned {
        self.token.clone().cancelled_owned()
    }
}
