//! What a listener runs.

use std::{
    future::{Future, poll_fn},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hyper::rt::Executor;
use tokio::task::JoinSet;

use super::answer_body::Progress;

/// Everything that a listener runs: connections, and the requests of those that speak HTTP/2.
#[derive(Clone, Debug, Default)]
pub(super) struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl Tasks {
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.lock();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Waits for all to end, and for those that they may still start.
    pub(super) async fn finish(&self) {
        while poll_fn(|cx| self.lock().poll_join_next(cx)).await.is_some() {}
    }

    /// Ends all, and those that they may still start.
    pub(super) async fn abort(&self) {
        loop {
            let mut tasks = std::mem::take(&mut *self.lock());
            if tasks.is_empty() {
                return;
            }
            tasks.shutdown().await;
        }
    }

    /// A panic under this lock leaves a set of tasks, usable as it is.
    fn lock(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends what a listener runs when the listener itself is ended. Dropping [`Tasks`] does not: those that speak
/// HTTP/2 hold them as well.
#[derive(Debug)]
pub(super) struct AbortOnDrop(pub(super) Tasks);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.lock().abort_all();
    }
}

/// Hyper runs each request of an HTTP/2 connection as a task of its own, until its answer is sent.
impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.spawn(Progress::supervise(task));
    }
}
