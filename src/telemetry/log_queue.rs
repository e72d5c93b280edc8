//! Log lines on their way to standard error. Writing one never blocks: a thread
//! of its own writes them, and what it cannot get rid of is dropped and counted.

use std::{
    io::{self, Write},
    mem,
    sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;
use serde_json::{Map, Value};

/// How many bytes wait at most, besides those that are being written.
const MAX_WAITING: usize = 1024 * 1024;

/// How long lines are collected before the next ones are written: a busy gateway
/// writes many at once, and a call does not wake another thread.
const INTERVAL: Duration = Duration::from_millis(10);

/// No line is longer.
pub(super) const MAX_LINE: usize = 4 * 1024;

/// How long the last lines may take to leave when the gateway stops.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Lines that were dropped.
pub(super) static LOST: LazyLock<Counter> = LazyLock::new(Counter::default);

static QUEUE: Mutex<Queue> = Mutex::new(Queue {
    waiting: Vec::new(),
    lost: 0,
    is_idle: false,
    is_stopping: false,
});
/// There are lines for the thread, or the gateway stops.
static WAKE: Condvar = Condvar::new();
/// All lines are written.
static IDLE: Condvar = Condvar::new();

struct Queue {
    waiting: Vec<u8>,
    /// How many lines were dropped since the last ones were taken.
    lost: u64,
    /// Whether the thread has nothing to do.
    is_idle: bool,
    is_stopping: bool,
}

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the thread that writes.
pub(super) fn start() -> io::Result<()> {
    let builder = thread::Builder::new().name("logs".to_owned());
    builder.spawn(write_lines).map(|_| ())
}

fn write_lines() {
    let mut lines = Vec::new();
    loop {
        let lost = {
            let mut queue = queue();
            while queue.waiting.is_empty() && queue.lost == 0 {
                queue.is_idle = true;
                IDLE.notify_all();
                queue = WAKE.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            queue.is_idle = false;
            mem::swap(&mut lines, &mut queue.waiting);
            mem::take(&mut queue.lost)
        };
        // Nobody could be told that standard error is gone.
        let _ = io::stderr().write_all(&lines);
        lines.clear();
        if lost > 0 {
            tracing::warn!(
                lost,
                "{lost} log lines were lost: standard error was not read"
            );
        }
        let is_running = |queue: &mut Queue| !queue.is_stopping;
        let _ = WAKE.wait_timeout_while(queue(), INTERVAL, is_running);
    }
}

/// Takes a line, with its end.
pub(super) fn push(line: &[u8]) {
    let mut queue = queue();
    if queue.waiting.len() + line.len() <= MAX_WAITING {
        queue.waiting.extend_from_slice(line);
    } else {
        queue.lost += 1;
        LOST.inc();
    }
    if mem::take(&mut queue.is_idle) {
        WAKE.notify_one();
    }
}

/// Writes the last lines. Waits for that, but not for ever: nobody may read them.
pub fn write_last_lines() {
    let mut queue = queue();
    queue.is_stopping = true;
    WAKE.notify_one();
    let is_busy = |queue: &mut Queue| !queue.is_idle || !queue.waiting.is_empty();
    let _ = IDLE.wait_timeout_while(queue, FLUSH_TIMEOUT, is_busy);
}

/// Takes one line at each write, as `tracing_subscriber::fmt` writes them.
pub(super) struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match line.len() > MAX_LINE {
            true => push(&shortened(line)),
            false => push(line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A line that is no longer than a line may be. JSON stays JSON: its texts are cut, and
/// if that is not enough, only what every line has is left.
fn shortened(line: &[u8]) -> Vec<u8> {
    const KEPT: [&str; 4] = ["timestamp", "level", "message", "target"];
    let Ok(mut json) = serde_json::from_slice::<Map<String, Value>>(line) else {
        let text = String::from_utf8_lossy(line);
        let end = text.floor_char_boundary(MAX_LINE - "…\n".len());
        return format!("{}…\n", &text[..end]).into_bytes();
    };
    for longest in [2048, 512, 128, 32] {
        json.values_mut()
            .for_each(|value| cut_texts(value, longest));
        let short = Value::from(json.clone()).to_string();
        if short.len() < MAX_LINE {
            return (short + "\n").into_bytes();
        }
    }
    json.retain(|key, _| KEPT.contains(&key.as_str()));
    (Value::from(json).to_string() + "\n").into_bytes()
}

fn cut_texts(json: &mut Value, longest: usize) {
    match json {
        Value::String(text) if text.len() > longest => {
            text.truncate(text.floor_char_boundary(longest));
            text.push('…');
        }
        Value::Array(list) => list.iter_mut().for_each(|item| cut_texts(item, longest)),
        Value::Object(object) => object
            .values_mut()
            .for_each(|item| cut_texts(item, longest)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_long_line_is_cut_and_stays_a_line() {
        let long = "\u{1}é".repeat(10_000);
        for json in [
            json!({ "level": "WARN", "fields": { "a": [long], "b": long } }),
            json!({ "level": "WARN", "a": vec![&long; 200] }),
            json!({ "level": "WARN", "message": long, "a": vec![1; 10_000] }),
        ] {
            let line = format!("{json}\n");
            let short = shortened(line.as_bytes());
            assert!(short.len() <= MAX_LINE);
            let line = str::from_utf8(&short).unwrap().strip_suffix('\n').unwrap();
            let parsed: Value = serde_json::from_str(line).unwrap();
            assert_eq!(parsed["level"], "WARN");
        }
        let short = shortened(format!("WARN {long}\n").as_bytes());
        assert!(short.len() <= MAX_LINE && short.ends_with("…\n".as_bytes()));
    }
}
