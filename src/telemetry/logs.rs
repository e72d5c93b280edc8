//! Log lines: what they look like, which are written, and when.

use std::{
    io::{self, Write},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use tracing_subscriber::{
    EnvFilter, Registry, fmt::layer, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object to a line.
    Json,
    /// For people.
    Text,
}

/// Which log lines are written. Can be changed while the gateway runs.
#[derive(Clone, Debug)]
pub struct LogLevel(reload::Handle<EnvFilter, Registry>);

static FORMAT: OnceLock<LogFormat> = OnceLock::new();

/// Lines that are not written yet.
static WAITING: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// How many bytes wait at most.
const MOST_WAITING: usize = 8 * 1024;

/// Sends log lines to standard error from now on.
pub fn start_logs(format: LogFormat, filter: EnvFilter) -> LogLevel {
    let _ = FORMAT.set(format); // the first holds
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::registry().with(filter);
    let layer = layer().with_writer(|| StandardError);
    // Fails where a test has started logs already.
    let _ = match format {
        LogFormat::Json => lines.with(layer.json().flatten_event(true)).try_init(),
        LogFormat::Text => lines.with(layer.with_ansi(false)).try_init(),
    };
    LogLevel(handle)
}

/// How log lines look, once they are started.
pub(super) fn format() -> Option<LogFormat> {
    FORMAT.get().copied()
}

/// Writes a line before this thread sleeps: a busy thread writes many lines at
/// once. For threads that call [`write_waiting_lines`].
pub(super) fn write_soon(line: &[u8]) {
    let mut waiting = waiting();
    waiting.extend_from_slice(line);
    if waiting.len() >= MOST_WAITING {
        write_out(&mut waiting);
    }
}

/// Writes what waits to be written.
pub fn write_waiting_lines() {
    let mut waiting = waiting();
    if !waiting.is_empty() {
        write_out(&mut waiting);
    }
}

fn waiting() -> MutexGuard<'static, Vec<u8>> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_out(waiting: &mut Vec<u8>) {
    // Nobody could be told that standard error is gone.
    let _ = io::stderr().write_all(waiting);
    waiting.clear();
}

/// Standard error, after what waits to be written there.
struct StandardError;

impl Write for StandardError {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut waiting = waiting();
        waiting.extend_from_slice(line);
        write_out(&mut waiting);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LogLevel {
    /// The filter that holds.
    pub fn get(&self) -> String {
        let filter = self.0.with_current(ToString::to_string);
        filter.unwrap_or_default()
    }

    /// Another filter from now on: a level, or directives like
    /// `info,h2=debug`. Fails with what is wrong with it.
    pub fn set(&self, filter: &str) -> Result<(), String> {
        let filter = EnvFilter::try_new(filter).map_err(|error| error.to_string())?;
        self.0.reload(filter).map_err(|error| error.to_string())
    }
}
