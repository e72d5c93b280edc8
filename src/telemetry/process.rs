//! The process itself, as Linux tells it: the metrics that every Prometheus
//! client library has (`process_…`). Elsewhere there are none.

use std::{fmt, fs, str::FromStr, time::SystemTime};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

/// `/proc/self/stat` counts hundredths of a second on every platform of Linux
/// that Rust supports (USER_HZ).
const TICKS_PER_SECOND: f64 = 100.0;

#[derive(Debug)]
pub(super) struct Process {
    started: SystemTime,
}

impl Default for Process {
    fn default() -> Self {
        Process {
            started: SystemTime::now(),
        }
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut tell = |name: &str, help: &str, unit: Option<Unit>, metric: &dyn EncodeMetric| {
            let kind = metric.metric_type();
            metric.encode(encoder.encode_descriptor(name, help, unit.as_ref(), kind)?)
        };
        if let Some(seconds) = cpu_seconds() {
            let cpu = ConstCounter::new(seconds);
            let help = "Processor time, user and system";
            tell("process_cpu", help, Some(Unit::Seconds), &cpu)?;
        }
        if let Some(kilobytes) = field::<u64>("/proc/self/status", "VmRSS:", 0) {
            let memory = ConstGauge::new(kilobytes * 1024);
            let help = "Resident memory";
            tell("process_resident_memory", help, Some(Unit::Bytes), &memory)?;
        }
        if let Ok(files) = fs::read_dir("/proc/self/fd") {
            let open = ConstGauge::new(files.count() as u64);
            tell("process_open_fds", "Open file descriptors", None, &open)?;
        }
        if let Some(most) = field::<u64>("/proc/self/limits", "Max open files", 0) {
            let help = "How many file descriptors may be open";
            tell("process_max_fds", help, None, &ConstGauge::new(most))?;
        }
        let started = self.started.duration_since(SystemTime::UNIX_EPOCH);
        let started = ConstGauge::new(started.unwrap_or_default().as_secs_f64());
        let help = "When the process started, since the epoch";
        tell("process_start_time", help, Some(Unit::Seconds), &started)
    }
}

/// utime and stime (proc_pid_stat(5)).
fn cpu_seconds() -> Option<f64> {
    let user: f64 = field("/proc/self/stat", "", 13)?;
    let system: f64 = field("/proc/self/stat", "", 14)?;
    Some((user + system) / TICKS_PER_SECOND)
}

/// The `n`th word after `name` in a file of /proc. The program's own name has
/// no blank, which would count.
fn field<T: FromStr>(file: &str, name: &str, n: usize) -> Option<T> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().nth(n)?.parse().ok()
}
