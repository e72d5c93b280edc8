//! Log lines on their way to standard error. Who writes one never waits: a thread
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

use super::logs::{self, LogFormat};

/// How many bytes wait at most, besides those that are being written.
const MOST_WAITING: usize = 1024 * 1024;

/// How many bytes of a busy thread wait until they are written together.
const TOGETHER: usize = 8 * 1024;

/// No line is longer.
pub(super) const LONGEST: usize = 4 * 1024;

/// How long the last lines may take to leave when the gateway stops.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Lines that were dropped.
pub(super) static LOST: LazyLock<Counter> = LazyLock::new(Counter::default);

static QUEUE: Mutex<Queue> = Mutex::new(Queue {
    waiting: Vec::new(),
    lost: 0,
    wanted: false,
    idle: false,
});
static WANTED: Condvar = Condvar::new();
static WRITTEN: Condvar = Condvar::new();

struct Queue {
    waiting: Vec<u8>,
    /// How many lines were dropped since the last ones were taken.
    lost: u64,
    /// Whether lines are to be written now.
    wanted: bool,
    /// Whether the thread has nothing to do.
    idle: bool,
}

impl Queue {
    fn push(&mut self, line: &[u8]) {
        if self.waiting.len() + line.len() <= MOST_WAITING {
            self.waiting.extend_from_slice(line);
        } else {
            self.lost += 1;
            LOST.inc();
        }
    }

    fn write(&mut self) {
        self.wanted = true;
        if mem::take(&mut self.idle) {
            WANTED.notify_one();
        }
    }
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
            while !queue.wanted {
                queue.idle = true;
                WRITTEN.notify_all();
                queue = WANTED.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            queue.wanted = false;
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
    }
}

/// Writes a line before this thread sleeps: a busy thread writes many lines at
/// once. For threads that call [`write_waiting_lines`].
pub(super) fn write_soon(line: &[u8]) {
    let mut queue = queue();
    queue.push(line);
    if queue.waiting.len() >= TOGETHER {
        queue.write();
    }
}

/// Has written what waits to be written. Does not wait for it.
pub fn write_waiting_lines() {
    let mut queue = queue();
    if !queue.waiting.is_empty() {
        queue.write();
    }
}

/// Writes the last lines. Waits for that, but not for ever: nobody may read them.
pub fn write_last_lines() {
    write_waiting_lines();
    let unwritten = |queue: &mut Queue| queue.wanted || !queue.idle;
    let _ = WRITTEN.wait_timeout_while(queue(), LAST_LINES, unwritten);
}

/// Takes one line at each write, as `tracing_subscriber::fmt` writes them.
pub(super) struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let short = (line.len() > LONGEST).then(|| shortened(line, logs::format()));
        let mut queue = queue();
        queue.push(short.as_deref().unwrap_or(line));
        queue.write();
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A line that is no longer than a line may be. JSON stays JSON: its texts are cut, and
/// if that is not enough, only what every line has is left.
fn shortened(line: &[u8], format: Option<LogFormat>) -> Vec<u8> {
    const KEPT: [&str; 4] = ["timestamp", "level", "message", "target"];
    let json = match format {
        Some(LogFormat::Json) => serde_json::from_slice::<Map<String, Value>>(line).ok(),
        _ => None,
    };
    let Some(mut json) = json else {
        let text = String::from_utf8_lossy(line);
        let end = text.floor_char_boundary(LONGEST - "…\n".len());
        return format!("{}…\n", &text[..end]).into_bytes();
    };
    for longest in [2048, 512, 128, 32] {
        json.values_mut()
            .for_each(|value| cut_texts(value, longest));
        let short = Value::from(json.clone()).to_string();
        if short.len() < LONGEST {
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
            let short = shortened(line.as_bytes(), Some(LogFormat::Json));
            assert!(short.len() <= LONGEST);
            let line = str::from_utf8(&short).unwrap().strip_suffix('\n').unwrap();
            let parsed: Value = serde_json::from_str(line).unwrap();
            assert_eq!(parsed["level"], "WARN");
        }
        let short = shortened(format!("WARN {long}\n").as_bytes(), Some(LogFormat::Text));
        assert!(short.len() <= LONGEST && short.ends_with("…\n".as_bytes()));
    }
}
