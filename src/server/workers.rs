//! One thread and runtime for each core. A connection stays on one of them, and
//! so do its calls and their connections to the API: no call wakes another
//! thread. The main thread accepts connections and serves the admin pages, so
//! that these answer also when the workers are busy.

use std::{future::pending, io, num::NonZero, sync::Arc, thread, time::Duration};

use tokio::{
    runtime::{Builder, Handle},
    time::timeout,
};

/// A thread that serves connections.
pub(super) struct Worker {
    runtime: Handle,
    /// Each connection holds a copy.
    connections: Arc<()>,
}

/// A connection on a worker, for which it counts until this is dropped.
pub(super) struct Place(#[expect(dead_code, reason = "counted")] Arc<()>);

/// As many as there are cores. They last as long as the process.
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

    /// Where its connections live.
    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// A place for one more connection.
    pub(super) fn place(&self) -> Place {
        Place(self.connections.clone())
    }

    /// How many connections it has.
    pub(super) fn connections(&self) -> usize {
        Arc::strong_count(&self.connections) - 1
    }
}

/// Asks workers for a sign of life.
#[derive(Clone, Debug)]
pub(super) struct Pulse(Arc<[Handle]>);

impl Pulse {
    pub(super) fn of(workers: &[Worker]) -> Self {
        Pulse(
            workers
                .iter()
                .map(|worker| worker.runtime.clone())
                .collect(),
        )
    }

    /// Whether each does what it is asked within 2 s.
    pub(super) async fn beats(&self) -> bool {
        const LONGEST: Duration = Duration::from_secs(2);
        let asked: Vec<_> = self.0.iter().map(|worker| worker.spawn(async {})).collect();
        let answered = async {
            for answer in asked {
                let _ = answer.await;
            }
        };
        timeout(LONGEST, answered).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_worker_that_is_held_up_is_noticed() {
        let workers = [Worker::start(0), Worker::start(1)].map(Result::unwrap);
        let pulse = Pulse::of(&workers);
        assert!(pulse.beats().await);
        let (release, held) = std::sync::mpsc::channel::<()>();
        workers[1].runtime().spawn(async move {
            let _ = held.recv();
        });
        assert!(!pulse.beats().await);
        drop(release);
        assert!(pulse.beats().await);
    }
}
