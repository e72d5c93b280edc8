//! Log lines: what they look like, and which are written.

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

/// Sends log lines to standard error from now on.
pub fn start_logs(format: LogFormat, filter: EnvFilter) -> LogLevel {
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::registry().with(filter);
    let layer = layer().with_writer(std::io::stderr);
    // Fails where a test has started logs already.
    let _ = match format {
        LogFormat::Json => lines.with(layer.json().flatten_event(true)).try_init(),
        LogFormat::Text => lines.with(layer.with_ansi(false)).try_init(),
    };
    LogLevel(handle)
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
