//! One thread and runtime for each core. A connection stays on one of them, and
//! so do its calls and their connections to the API: no call wakes another
//! thread. The main thread accepts connections and serves the admin pages, so
//! that these answer also when the workers are busy.

use std::{future::pending, io, num::NonZero, sync::Arc, thread};

use tokio::runtime::{Builder, Handle};

use crate::telemetry::write_waiting_lines;

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
        let runtime = Builder::new_current_thread()
            .enable_all()
            .on_thread_park(write_waiting_lines)
            .build()?;
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
