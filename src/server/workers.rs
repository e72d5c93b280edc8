//! One thread and runtime per core. A connection stays on its worker, and so do its calls and
//! their connections to the API, so no call wakes another thread. The main thread accepts
//! connections and serves the admin pages, which therefore respond when the workers are busy.
//! docs/benchmark.md compares this with one multi-threaded runtime.

use std::{future::pending, io, num::NonZero, sync::Arc, thread, time::Duration};

use tokio::{
    runtime::{Builder, Handle},
    time::timeout,
};

/// A thread that serves connections.
pub(super) struct Worker {
    runtime: Handle,
    /// Each connection holds a clone.
    connections: Arc<()>,
}

/// Counts a connection of a worker until this is dropped.
pub(super) struct ConnectionGuard(#[expect(dead_code, reason = "counted")] Arc<()>);

/// Starts one worker per core. They live as long as the process.
pub(super) fn start() -> io::Result<Vec<Worker>> {
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    (0..cores).map(Worker::start).collect()
}

impl Worker {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let worker = Worker {
            runtime: runtime.handle().clone(),
            connections: Arc::default(),
        };
        thread::Builder::new()
            .name(format!("worker-{number}"))
            .spawn(move || runtime.block_on(pending::<()>()))?;
        Ok(worker)
    }

    /// The runtime of its connections.
    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Counts one more connection.
    pub(super) fn connection_guard(&self) -> ConnectionGuard {
        ConnectionGuard(self.connections.clone())
    }

    /// How many connections it has.
    pub(super) fn connections(&self) -> usize {
        Arc::strong_count(&self.connections) - 1
    }
}

/// Checks that no worker thread is blocked.
#[derive(Clone, Debug)]
pub(super) struct WorkerCheck(Arc<[Handle]>);

impl WorkerCheck {
    pub(super) fn new(workers: &[Worker]) -> Self {
        WorkerCheck(
            workers
                .iter()
                .map(|worker| worker.runtime.clone())
                .collect(),
        )
    }

    /// Whether each worker runs a task within 2 s.
    pub(super) async fn all_respond(&self) -> bool {
        const TIMEOUT: Duration = Duration::from_secs(2);
        let tasks: Vec<_> = self.0.iter().map(|worker| worker.spawn(async {})).collect();
        let all_done = async {
            for task in tasks {
                let _ = task.await;
            }
        };
        timeout(TIMEOUT, all_done).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_blocked_worker_is_noticed() {
        let workers = [Worker::start(0), Worker::start(1)].map(Result::unwrap);
        let check = WorkerCheck::new(&workers);
        assert!(check.all_respond().await);
        let (release, blocked) = std::sync::mpsc::channel::<()>();
        workers[1].runtime().spawn(async move {
            let _ = blocked.recv();
        });
        assert!(!check.all_respond().await);
        drop(release);
        assert!(check.all_respond().await);
    }
}
