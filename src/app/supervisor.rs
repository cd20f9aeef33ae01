//! Supervises long-lived tasks: restarts those that panic.

use std::{future::Future, time::Duration};

use metrics::{counter, describe_counter};
use tokio::{task::JoinSet, time::sleep};
use tracing::error;

/// Delay before a task restarts after a panic.
const RESTART_DELAY: Duration = Duration::from_secs(1);

const RESTARTS: &str = "parapet_task_restarts_total";

/// The tasks of a running instance; dropping this aborts them.
#[derive(Debug, Default)]
pub(super) struct Supervisor(JoinSet<()>);

impl Supervisor {
    /// Runs a task with its arguments, again after each panic, until it returns.
    pub(super) fn spawn<T, F>(
        &mut self,
        name: &'static str,
        with: T,
        task: impl Fn(T) -> F + Send + 'static,
    ) where
        T: Clone + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        describe_counter!(RESTARTS, "Tasks that were restarted after a panic");
        self.0.spawn(async move {
            // Owned by this future, so that aborting it aborts the task.
            let mut running = JoinSet::new();
            loop {
                running.spawn(task(with.clone()));
                let Some(Err(panic)) = running.join_next().await else { return };
                error!(task = name, %panic, "A task panicked and restarts in 1 s");
                counter!(RESTARTS, "task" => name).increment(1);
                sleep(RESTART_DELAY).await;
            }
        });
    }

    /// Aborts all tasks.
    pub(super) async fn abort_all(mut self) {
        self.0.shutdown().await;
    }

    /// Waits until all tasks have returned.
    pub(super) async fn join_all(mut self) {
        while self.0.join_next().await.is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn panicking_task_is_restarted_until_it_returns() {
        let runs = Arc::new(AtomicU32::new(0));
        let mut tasks = Supervisor::default();
        tasks.spawn("test", Arc::clone(&runs), |runs| async move {
            let run = runs.fetch_add(1, Ordering::Relaxed);
            assert!(run >= 2, "this run is meant to panic");
        });
        tasks.join_all().await;
        assert_eq!(runs.load(Ordering::Relaxed), 3);
    }
}
