//! The tasks of a server.

use std::{
    future::{Future, poll_fn},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hyper::rt::Executor;
use tokio::task::JoinSet;

use super::tracked_body::StallTimer;

/// All tasks of a server: its connections, and the requests of HTTP/2 connections.
#[derive(Clone, Debug, Default)]
pub(super) struct ServerTasks(Arc<Mutex<JoinSet<()>>>);

impl ServerTasks {
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.lock();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Waits for all tasks to finish, those that they still start included.
    pub(super) async fn join_all(&self) {
        while poll_fn(|cx| self.lock().poll_join_next(cx)).await.is_some() {}
    }

    /// Aborts all tasks, those that they still start included.
    pub(super) async fn abort_all(&self) {
        loop {
            let mut tasks = std::mem::take(&mut *self.lock());
            if tasks.is_empty() {
                return;
            }
            tasks.shutdown().await;
        }
    }

    /// A panic under this lock leaves a usable set of tasks.
    fn lock(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Aborts all tasks of a server when it is dropped. Dropping [`ServerTasks`] does not, because HTTP/2
/// connections hold a handle too.
#[derive(Debug)]
pub(super) struct AbortOnDrop(pub(super) ServerTasks);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.lock().abort_all();
    }
}

/// Hyper runs each request of an HTTP/2 connection in a task, until its response is sent.
impl<F: Future<Output: Send> + Send + 'static> Executor<F> for ServerTasks {
    fn execute(&self, task: F) {
        self.spawn(StallTimer::run_until_stalled(task));
    }
}
